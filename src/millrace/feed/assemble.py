"""From a span's rows to batches: gathered, in place, or as Arrow; rows that can't be given are left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import TransformError, UsageError
from millrace.feed.blocks import BlockPool
from millrace.feed.columns import Gather
from millrace.feed.recipe import Recipe
from millrace.feed.spans import Span

__all__ = ["Assembler", "Found"]

Int64s = npt.NDArray[np.int64]
SetAside = Callable[[Span, int, str], None]


@dataclass(frozen=True, slots=True)
class Found:
    """A span whose blocks are in memory.

    Attributes:
        starts: For each column where its rows lie; see ``columns.Gather.starts``.
        slots: Each row's block, by its place in the pool.
        whole: Whether all of its rows can be given, as far as is known before decoding.
    """

    starts: Sequence[Int64s]
    slots: npt.NDArray[np.int32]
    whole: bool


class Assembler:
    """Makes batches of spans.

    Args:
        recipe: What batches are.
        pool: Where the blocks are.
        set_aside: Told of each row that can't be given; notes it in the span.
    """

    def __init__(self, recipe: Recipe, pool: BlockPool, set_aside: SetAside) -> None:
        self._recipe = recipe
        self._pool = pool
        self._set_aside = set_aside
        self._gather = Gather(pool.arena, recipe.columns, recipe.decode)
        self._names = tuple(c.name for c in recipe.columns)
        self._kinds = tuple(c.kind for c in recipe.columns)

    def find(self, span: Span) -> Found:
        """Have a span's blocks in memory, and find its rows in them.

        Raises:
            StoreError: a block can't be read anywhere.
        """
        self._pool.need(span.blocks, span.number)
        slots = self._pool.slots(span.blocks)
        spoilt = self._pool.spoilt(slots)
        if spoilt.any():
            for i in np.flatnonzero(spoilt).tolist():
                loaded = self._pool.loaded(int(slots[i]))
                reason = loaded.failed or loaded.bound.bad.get(int(span.row[i]))
                if reason is not None:
                    self._set_aside(span, i, reason)
        starts = self._gather.starts(self._pool.addresses, slots, span.row)
        return Found(starts, slots, bool(span.given.all()))

    def batch(self, span: Span, found: Found, a: int, b: int) -> Any:
        """Rows ``[a, b)`` of the span, as the user gets them."""
        finish = self._recipe.finish
        kept: slice | Int64s = slice(a, b) if found.whole else a + np.flatnonzero(span.given[a:b])
        if finish is None:
            return self._arrow(found.slots[kept], span.row[kept])
        if self._recipe.decode:
            return finish(self._decoded(span, found, np.arange(a, b)[span.given[a:b]]))
        if self._recipe.in_place and found.whole and _lies_together(span, a, b):
            return finish(self._in_place(found, a, b))
        return finish({name: self._column(i, found, kept) for i, name in enumerate(self._names)})

    def done(self, span: Span) -> None:
        """Let go of what may have been given in place, once no step needs it any more."""
        if self._recipe.in_place:
            self._pool.retire(span.blocks, span.number)

    def _column(self, i: int, found: Found, kept: slice | Int64s) -> Any:
        blocks = None
        if self._kinds[i] == "objects":
            blocks = [self._pool.loaded(slot).bound.batch for slot in found.slots[kept].tolist()]
        return self._gather.column(i, found.starts[i][kept], blocks)

    def _decoded(self, span: Span, found: Found, rows: Int64s) -> dict[str, Any]:
        """A batch with the user's decoders run: a row that one of them fails on is set aside, whole."""
        decoded: dict[str, list[Any]] = {name: [] for name in self._recipe.decode}
        numbers = {name: i for i, name in enumerate(self._names)}
        for row in rows.tolist():
            values = {}
            for name, decode in self._recipe.decode.items():
                one = self._column(numbers[name], found, slice(row, row + 1))
                value = one.values if self._kinds[numbers[name]] == "ragged" else one[0]
                try:
                    values[name] = decode(value)
                except Exception as error:  # theirs: whatever it is, this row is what it failed on
                    self._set_aside(span, row, f"decode[{name!r}] raised {type(error).__name__}: {error}")
                    break
            else:
                for name, value in values.items():
                    decoded[name].append(value)
        kept = rows[span.given[rows]]
        return {
            name: _stacked(decoded[name]) if name in decoded else self._column(i, found, kept)
            for i, name in enumerate(self._names)
        }

    def _in_place(self, found: Found, a: int, b: int) -> dict[str, Any]:
        """Rows that lie together in one block: columns of a fixed width are views of it."""
        room = self._pool.loaded(int(found.slots[a])).room
        if room is None:
            raise UsageError("a block without rows was asked for some")
        batch = {}
        for i, column in enumerate(self._recipe.columns):
            if column.kind == "fixed":
                begin = int(found.starts[i][a]) - room.offset
                data = room.bytes[begin : begin + (b - a) * column.row_bytes]
                batch[column.name] = column.shaped(data, b - a)
            else:
                batch[column.name] = self._column(i, found, slice(a, b))
        return batch

    def _arrow(self, slots: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> pa.RecordBatch:
        distinct, which = np.unique(slots, return_inverse=True)
        order = np.argsort(which, kind="stable")
        taken = [self._taken(slot, rows[which == i]) for i, slot in enumerate(distinct.tolist())]
        if not taken:
            schema = pa.schema([self._recipe.schema.field(name) for name in self._names])
            return pa.RecordBatch.from_arrays([pa.array([], f.type) for f in schema], schema=schema)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return pa.concat_batches(taken).take(pa.array(back))

    def _taken(self, slot: int, rows: Int64s) -> pa.RecordBatch:
        try:
            return self._pool.loaded(slot).bound.batch.select(list(self._names)).take(pa.array(rows))
        except pa.ArrowNotImplementedError as error:
            raise TransformError(
                f"Arrow can't take rows of one of the columns {', '.join(self._names)}: {error}; leave it out with "
                "columns=, or take format='numpy'"
            ) from error


def _lies_together(span: Span, a: int, b: int) -> bool:
    return b > a and bool(span.blocks[a] == span.blocks[b - 1] and span.row[b - 1] - span.row[a] == b - 1 - a)


def _stacked(values: list[Any]) -> Any:
    """An array if all values are arrays or numbers of one shape; the list otherwise."""
    shapes = {getattr(v, "shape", () if isinstance(v, (int, float, bool, np.generic)) else None) for v in values}
    if len(shapes) == 1 and None not in shapes:
        return np.stack([np.asarray(v) for v in values])
    return values
