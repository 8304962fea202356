"""Finding the lines of byte streams, a block at a time, and joining them to batches. No Python loop per line.

The line rule: a chunk owns the lines whose first byte lies in ``[start, end)``. It drops what comes before its
first newline unless the byte before ``start`` is one, and reads past ``end`` to finish its last line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, SourceObject
from millrace.core.ports import Bytes
from millrace.pipeline.decompress import BLOCK_BYTES, blocks
from millrace.pipeline.formats.objects import INT32_MAX, rejected, whole_objects
from millrace.pipeline.records import ReadContext

__all__ = ["Boundaries", "LineBatch", "LineRun", "Newlines", "line_batches", "line_runs", "sample_lines"]

_TAIL_BYTES: Final = 65_536
"""First read past a chunk's end; each further one is four times as long."""
_SAMPLE_LINE_BYTES: Final = 64_000_000
"""A longer line is not looked at to find fields."""

Ints = npt.NDArray[np.int64]


class Boundaries(Protocol):
    """Where records end in a stream of blocks; remembers what it must between two blocks."""

    def ends(self, block: npt.NDArray[np.uint8]) -> Ints:
        """Indices one past the newline of each record that ends in this block."""

    @property
    def is_open(self) -> bool:
        """Whether the stream, ending here, would end inside something that must be closed."""


class Newlines:
    """Every newline ends a line."""

    is_open = False

    def ends(self, block: npt.NDArray[np.uint8]) -> Ints:
        """See :class:`Boundaries`."""
        return np.flatnonzero(block == 10) + 1


@dataclass(frozen=True, slots=True)
class LineRun:
    """Lines of one object, back to back.

    Attributes:
        data: Their bytes; every line, also the last, ends in a newline.
        ends: int64, one a line: one past its newline in ``data``.
        offset: Where ``data`` begins in the object (in its decompressed bytes, when it is compressed).
    """

    data: Bytes
    ends: Ints
    offset: int


class _Splitter:
    """Blocks in, runs of whole lines out. Holds one unfinished line, and never more of it than ``max_bytes``."""

    def __init__(
        self, offset: int, max_bytes: int, too_long: Callable[[int], None], boundaries: Boundaries, *, partial: bool
    ) -> None:
        self.skipping = partial
        self._at = offset
        self._max_bytes = max_bytes
        self._too_long = too_long
        self._boundaries = boundaries
        self._carry: list[Bytes] = []
        self._carried = 0

    @property
    def pending(self) -> bool:
        """Whether the line that would be next has begun."""
        return self._carried > 0

    def feed(self, block: Bytes, *, only_first: bool = False) -> tuple[list[LineRun], bool]:
        """The lines that end in this block, and whether any boundary was found.

        Args:
            block: The next bytes.
            only_first: Stop at the first boundary; the rest is somebody else's.
        """
        view = memoryview(block)
        ends = self._boundaries.ends(np.frombuffer(view, np.uint8))
        found = len(ends) > 0
        if only_first:
            ends = ends[:1]
        if self.skipping:
            if not found:
                self._at += len(view)
                return [], False
            self.skipping = False
            first = int(ends[0])
            view, ends = view[first:], ends[1:] - first
            self._at += first
        runs: list[LineRun] = []
        if len(ends):
            last = int(ends[-1])
            data = b"".join((*self._carry, view[:last])) if self._carry else view[:last]
            runs = self._cut_out(data, ends + self._carried)
            self._at += len(data)
            self._carry, self._carried = [], 0
            view = view[last:]
        if not (only_first and found):
            self._hold(view)
        return runs, found

    def finish(self) -> list[LineRun]:
        """The last line, if it has no newline of its own."""
        if not self._carried or self.skipping:
            return []
        data = b"".join((*self._carry, b"\n"))
        self._carry, self._carried = [], 0
        return [LineRun(data, np.array([len(data)], np.int64), self._at)]

    def _hold(self, rest: memoryview) -> None:
        self._carried += len(rest)
        if self._carried > self._max_bytes:
            self._too_long(self._at)
            self._at += self._carried
            self._carry, self._carried = [], 0
            self.skipping = True
        elif len(rest):
            self._carry.append(bytes(rest))

    def _cut_out(self, data: Bytes, ends: Ints) -> list[LineRun]:
        """A run without the lines that are too long."""
        starts = np.concatenate(([0], ends[:-1]))
        long = np.flatnonzero(ends - starts - 1 > self._max_bytes)
        if not len(long):
            return [LineRun(data, ends, self._at)]
        runs = []
        line = 0
        view = memoryview(data)
        for bad in (*long.tolist(), len(ends)):
            if bad > line:
                first, last = int(starts[line]), int(ends[bad - 1])
                runs.append(LineRun(view[first:last], ends[line:bad] - first, self._at + first))
            if bad < len(ends):
                self._too_long(self._at + int(starts[bad]))
            line = bad + 1
        return runs


def _whole_runs(
    content: Iterator[Bytes], obj: SourceObject, splitter: _Splitter, found: Boundaries
) -> Iterator[LineRun]:
    for block in content:
        yield from splitter.feed(block)[0]
    if found.is_open:
        raise SourceError(
            f"{obj.path} ends inside a quoted value: it is cut short, or lacks a quote; mend it or exclude it"
        )
    yield from splitter.finish()


def _range_runs(chunk: Chunk, context: ReadContext, splitter: _Splitter) -> Iterator[LineRun]:
    obj = chunk.objects[0]
    begin = max(chunk.start - 1, 0)
    for block in blocks(context.reads, obj, begin, chunk.end):
        yield from splitter.feed(block)[0]
    at, step = chunk.end, _TAIL_BYTES
    while at < obj.size_bytes and splitter.pending and not splitter.skipping:
        block = context.reads.read(obj, at, step)
        runs, found = splitter.feed(block, only_first=True)
        yield from runs
        if found:
            return
        if not len(block):
            break
        at += len(block)
        step = min(step * 4, BLOCK_BYTES)
    if at >= obj.size_bytes:
        yield from splitter.finish()


def line_runs(
    chunk: Chunk, context: ReadContext, position: str, boundaries: Callable[[], Boundaries] = Newlines
) -> Iterator[tuple[int, LineRun]]:
    """The lines a chunk owns, as (index into its objects, run), in order. Too long ones are rejected.

    Args:
        chunk: Whole objects, or a range of one uncompressed object.
        context: Its ``reads``, ``reject`` and ``max_record_bytes``.
        position: The format's word for a position.
        boundaries: Makes a fresh finder of boundaries for each object.
    """

    def splitter(obj: SourceObject, found: Boundaries, start: int) -> _Splitter:
        def too_long(at: int) -> None:
            reason = f"the line has more than max_record ({context.max_record_bytes}) bytes"
            context.reject(rejected(obj, f"{position} {at}", "max_record", reason))

        return _Splitter(max(start - 1, 0), context.max_record_bytes, too_long, found, partial=start > 0)

    if chunk.is_range:
        for run in _range_runs(chunk, context, splitter(chunk.objects[0], boundaries(), chunk.start)):
            yield 0, run
        return
    for i, content in whole_objects(context, chunk.objects):
        found = boundaries()
        obj = chunk.objects[i]
        for run in _whole_runs(content, obj, splitter(obj, found, 0), found):
            yield i, run


@dataclass(frozen=True, slots=True)
class LineBatch:
    """Lines for one batch of records, of one object or several.

    Attributes:
        data: Their bytes, back to back, each with its newline.
        ends: int64, one a line: one past its newline in ``data``.
        objects: int32, one a line: index into the chunk's objects.
        positions: int64, one a line: where it begins in its object.
    """

    data: Bytes
    ends: Ints
    objects: npt.NDArray[np.int32]
    positions: Ints

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> Ints:
        """Where each line begins in ``data``."""
        return np.concatenate((np.zeros(1, np.int64), self.ends[:-1]))[: len(self.ends)]


class _Joiner:
    """Runs in, batches out, closed where ``batch_bytes`` or ``batch_rows`` is reached."""

    def __init__(self, context: ReadContext) -> None:
        self._bytes_max = context.batch_bytes
        self._rows_max = context.batch_rows
        self._pieces: list[tuple[int, LineRun]] = []
        self._bytes = 0
        self._rows = 0

    def add(self, index: int, run: LineRun) -> Iterator[LineBatch]:
        view, ends, offset = memoryview(run.data), run.ends, run.offset
        while len(ends):
            fits = int(np.searchsorted(ends, self._bytes_max - self._bytes, side="left")) + 1
            count = min(fits, self._rows_max - self._rows, len(ends))
            if self._bytes + int(ends[count - 1]) > INT32_MAX:
                if count == 1:
                    yield self.batch()
                    continue
                count -= 1
            size = int(ends[count - 1])
            self._pieces.append((index, LineRun(view[:size], ends[:count], offset)))
            self._bytes += size
            self._rows += count
            view, ends, offset = view[size:], ends[count:] - size, offset + size
            if self._bytes >= self._bytes_max or self._rows >= self._rows_max:
                yield self.batch()

    def batch(self) -> LineBatch:
        pieces, self._pieces, self._bytes, self._rows = self._pieces, [], 0, 0
        data = pieces[0][1].data if len(pieces) == 1 else b"".join(run.data for _, run in pieces)
        ends, objects, positions = [], [], []
        base = 0
        for index, run in pieces:
            starts = np.concatenate((np.zeros(1, np.int64), run.ends[:-1]))
            ends.append(run.ends + base)
            objects.append(np.full(len(run.ends), index, np.int32))
            positions.append(starts + run.offset)
            base += len(run.data)
        return LineBatch(data, np.concatenate(ends), np.concatenate(objects), np.concatenate(positions))

    @property
    def rows(self) -> int:
        return self._rows


def line_batches(context: ReadContext, runs: Iterator[tuple[int, LineRun]]) -> Iterator[LineBatch]:
    """Runs joined to batches of ``batch_bytes`` or ``batch_rows``, whichever is reached first."""
    joiner = _Joiner(context)
    for index, run in runs:
        yield from joiner.add(index, run)
    if joiner.rows:
        yield joiner.batch()


def sample_lines(content: Iterator[Bytes]) -> Iterator[tuple[int, list[bytes]]]:
    """The lines of one object for a look at them, as (bytes taken, lines), block by block."""
    splitter = _Splitter(0, _SAMPLE_LINE_BYTES, lambda at: None, Newlines(), partial=False)
    for block in content:
        yield len(block), [line for run in splitter.feed(block)[0] for line in _split(run)]
    yield 0, [line for run in splitter.finish() for line in _split(run)]


def _split(run: LineRun) -> list[bytes]:
    view, ends = memoryview(run.data), run.ends.tolist()
    return [bytes(view[start : end - 1]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
