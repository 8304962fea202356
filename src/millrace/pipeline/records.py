"""What flows from ingest to process: record batches that know where each row came from.

A *format* (``pipeline/formats``) is a pair of plain functions over blocking reads. It runs in a worker thread
while the event loop moves bytes; it never awaits, never touches a store itself, and holds a bounded amount.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source

__all__ = ["BATCH_BYTES", "BATCH_ROWS", "Format", "ReadContext", "Reads", "Records", "Reject"]

BATCH_BYTES = 8_000_000
"""A reader closes a batch when its values reach this many bytes ..."""
BATCH_ROWS = 8192
"""... or this many rows. Both are constants: where batches are cut is part of what transforms see."""


@dataclass(frozen=True, slots=True)
class Records:
    """A batch with the origin of each of its rows.

    Attributes:
        batch: The records. Has a ``path`` column (string, relative to the source) first, unless the data
            itself has a column of that name; no schema metadata.
        objects: int32, one a row: index into the chunk's ``objects``.
        positions: int64, one a row: what ``Format.position`` calls it (a byte offset or a row number).
    """

    batch: pa.RecordBatch
    objects: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]


Reject = Callable[[Quarantined], None]
"""Where a reader or a transform puts a bad record."""


class Reads(Protocol):
    """Blocking reads of source objects, for code that runs in a worker thread.

    Every read checks that the object is still the version the plan saw.

    Raises (all methods):
        SourceChanged: it changed or disappeared since the plan was made; names the object.
        SourceError: it can't be read; names the object and the reason.
        StoreError: the store failed (retryable kinds have been retried already).
    """

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        """Bytes ``[start, start + length)`` of one object, cut off at its end."""

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        """Each object whole, as (index in ``objects``, bytes), in order, fetched ahead in bounded groups.

        Only for objects that fit in memory; larger ones are read by ranges.
        """


@dataclass(frozen=True, slots=True)
class ReadContext:
    """What a format needs to read one chunk.

    Attributes:
        source: The source's spec.
        schema: What ``Format.schema`` said at planning, the same for every chunk of the source.
        reads: Blocking reads.
        reject: Where bad records go; the reader carries on with the next.
        max_record_bytes: A longer record is rejected, and is never held in memory whole.
        batch_bytes, batch_rows: Where batches are cut.
    """

    source: Source
    schema: pa.Schema
    reads: Reads
    reject: Reject
    max_record_bytes: int
    batch_bytes: int = BATCH_BYTES
    batch_rows: int = BATCH_ROWS


class Format(Protocol):
    """One input format. Stateless; one instance serves everything."""

    name: str
    position: str
    """What a position is, for sentences: ``byte``, ``line at byte``, ``row`` ..."""

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Where an object larger than ``chunk_bytes`` may be cut: increasing byte offsets, first 0, last its size.

        Whatever *starts* in a range belongs to it. ``[0, size]`` means it can't be cut. Most formats answer from
        the size alone; a tar is walked header by header.
        """

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """The schema of every record of this source, found from its first objects. No metadata."""

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """The chunk's records, in order, in batches that depend on the chunk alone.

        Raises:
            SourceError: an object isn't what the format says (truncated, another schema); names the object.
        """
