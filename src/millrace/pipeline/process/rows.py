"""What flows between the steps of a chain: batches whose rows know where they came from, and the chunk's context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.model import Chunk, Quarantined
from millrace.pipeline.records import BATCH_BYTES, BATCH_ROWS, Reject

__all__ = ["UNKNOWN", "Deadline", "Origins", "ProcessContext", "ProcessCounts", "Rows", "Step", "cut"]

UNKNOWN: Final = -1
"""In ``Origins``: not known."""

_PIECE_BYTES: Final = 4 * BATCH_BYTES

Deadline = Callable[[str, float], AbstractContextManager[None]]
"""Entered with (name, seconds) around every call into code that is not ours."""


@dataclass(frozen=True, slots=True)
class Origins:
    """Where the rows of a batch came from.

    Attributes:
        objects: int32, one a row: index into the chunk's objects, or ``UNKNOWN``.
        positions: int64, one a row: where in the object, or ``UNKNOWN``.
        among: For rows whose object is ``UNKNOWN``: the objects it must be one of, in the chunk's order.
    """

    objects: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    among: tuple[int, ...] = ()

    def take(self, rows: npt.NDArray[np.int64]) -> Origins:
        """The origins of these rows, in this order."""
        return Origins(self.objects[rows], self.positions[rows], self.among)

    def slice(self, start: int, length: int) -> Origins:
        """The origins of rows ``[start, start + length)``."""
        return Origins(self.objects[start : start + length], self.positions[start : start + length], self.among)

    def lost(self, batch: pa.RecordBatch, chunk: Chunk) -> Origins:
        """Origins for what code that we can't follow made of these rows.

        A row's object is found by its ``path`` column, or is the only one there was; its position is unknown.
        """
        among = self.among or tuple(np.unique(self.objects).tolist())
        objects = np.full(batch.num_rows, UNKNOWN, np.int32)
        if len(among) == 1:
            objects[:] = among[0]
        elif "path" in batch.schema.names and batch.schema.field("path").type == pa.string():
            paths = pa.array([chunk.objects[i].path for i in among], pa.string())
            found = pc.fill_null(pc.index_in(batch.column("path"), value_set=paths), UNKNOWN).to_numpy()
            objects = np.where(found >= 0, np.asarray(among, np.int32)[found], UNKNOWN).astype(np.int32)
        return Origins(objects, np.full(batch.num_rows, UNKNOWN, np.int64), among)


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of plain columns and the origin of each of its rows."""

    batch: pa.RecordBatch
    origins: Origins

    @property
    def count(self) -> int:
        """How many rows."""
        return int(self.batch.num_rows)

    def slice(self, start: int, length: int) -> Rows:
        """Rows ``[start, start + length)``, without a copy."""
        return Rows(self.batch.slice(start, length), self.origins.slice(start, length))

    def keep(self, mask: npt.NDArray[np.bool_]) -> Rows:
        """The rows where the mask (one a row) is true; the same object when that is all of them."""
        if bool(mask.all()):
            return self
        return Rows(self.batch.filter(pa.array(mask)), self.origins.take(np.flatnonzero(mask)))


@dataclass(slots=True)
class ProcessCounts:
    """What a pass over one chunk counted.

    Attributes:
        rows_in: Records that arrived.
        duplicates: Rows that ``dedup`` left out.
        quarantined: Records this stage set aside.
    """

    rows_in: int = 0
    duplicates: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class ProcessContext:
    """What a chain needs to know to process one chunk.

    Attributes:
        chunk: Which.
        format_position: What the reader's positions are: ``Format.position``.
        reject: Where bad records go. A survey's caller passes one that does nothing: the main pass says it all again.
        deadline: Entered around every call into code that is not ours.
        losers: For each key barrier already resolved, in order: sorted int64 row numbers (of the stream of this
            chunk that arrives at the barrier) that lose.
        sample_every: The first batch and every so-manieth after it go twice through each transform; 0 means none.
        counts: Filled as the batches go by.
    """

    chunk: Chunk
    format_position: str
    reject: Reject
    deadline: Deadline
    losers: Sequence[npt.NDArray[np.int64]] = ()
    sample_every: int = 64
    counts: ProcessCounts = field(default_factory=ProcessCounts)

    def is_sampled(self, batch: int) -> bool:
        """Whether this batch (counted from 0 at each step) is run twice."""
        return self.sample_every > 0 and batch % self.sample_every == 0

    def place(self, origins: Origins, row: int) -> tuple[str, str]:
        """Path and position of one row, in words; an empty position when it is not known."""
        index = int(origins.objects[row])
        position = int(origins.positions[row])
        where = f"{self.format_position} {position}" if position != UNKNOWN else ""
        if index != UNKNOWN:
            return self.chunk.objects[index].path, where
        if not origins.among:
            return self.chunk.describe(), where
        first = self.chunk.objects[origins.among[0]].path
        return (first if len(origins.among) == 1 else f"{first} or {len(origins.among) - 1} more"), where

    def set_aside(self, origins: Origins, row: int, rule: str, reason: str) -> None:
        """Quarantine one record."""
        path, position = self.place(origins, row)
        self.counts.quarantined += 1
        self.reject(Quarantined(path, position, "process", rule, reason))


class Step(Protocol):
    """One link of a chain. Holds no state of a chunk: that lives in the generator that ``run`` makes."""

    @property
    def label(self) -> str:
        """The transform in sentences: ``python m:f``."""

    def run(self, rows: Iterator[Rows], context: ProcessContext) -> Iterator[Rows]:
        """Rows in, rows out; never an empty batch."""


def cut(rows: Rows) -> Iterator[Rows]:
    """The same rows in pieces of at most ``BATCH_ROWS`` rows and, if rows are of like size, about 32 MB.

    Where it cuts depends on the rows alone. Nothing is copied; an empty batch gives nothing.
    """
    count = rows.count
    if count == 0:
        return
    pieces = max(-(-count // BATCH_ROWS), min(count, -(-rows.batch.nbytes // _PIECE_BYTES)))
    length = -(-count // pieces)
    for start in range(0, count, length):
        yield rows.slice(start, min(length, count - start)) if length < count else rows
