"""From the lines of a CSV to typed columns, a batch at a time, with a reason for each row that is bad.

Arrow splits rows into values; values become what their column wants by Arrow's casts, the same for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv as pacsv

from millrace.pipeline.formats.columns import TIME_TYPE, to_times, type_word
from millrace.pipeline.formats.linescan import LineBatch
from millrace.pipeline.formats.objects import BOM
from millrace.pipeline.formats.quotes import closed_at_newlines

__all__ = ["BadRow", "RowParser"]

_NEWLINE, _RETURN, _QUOTE = 10, 13, 34

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row is rejected. ``rule`` is ``csv``, ``columns``, ``utf-8`` or ``type``."""

    rule: str
    reason: str


@dataclass(slots=True)
class _Found:
    """Rows split into values: ``columns`` hold ``rows``, and the others are ``bad``."""

    columns: list[pa.Array]
    rows: Rows
    bad: dict[int, BadRow] = field(default_factory=dict)


class RowParser:
    """Parses rows under one header.

    Args:
        header: The names of all columns of the file, in its order.
        fields: What to read.
        multiline: Whether quoted values may hold newlines.
    """

    def __init__(self, header: Sequence[str], fields: Sequence[pa.Field], *, multiline: bool) -> None:
        self._header = list(header)
        self._fields = list(fields)
        self._multiline = multiline
        names = [f.name for f in fields]
        self._raw = pacsv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()),
            include_columns=names,
            null_values=[],
            strings_can_be_null=False,
        )

    def parse(self, lines: LineBatch, bad: Callable[[int, BadRow], None]) -> tuple[list[pa.Array], Rows]:
        """The columns, and which lines they hold. Blank lines are passed over, ``bad`` is told of bad ones."""
        data = np.frombuffer(lines.data, np.uint8)
        starts = lines.starts
        lengths = lines.ends - starts - 1
        blank = (lengths == 0) | ((lengths == 1) & (data[starts] == _RETURN))
        rows = np.flatnonzero(~blank)
        parts: list[_Found] = []
        waiting = self._apart(rows, lines, data)
        while waiting:
            some = waiting.pop()
            raw = memoryview(lines.data)[int(starts[some[0]]) : int(lines.ends[some[-1]])]
            part = self._split(raw, some)
            if part is not None:
                parts.append(part)
            elif len(some) == 1:
                parts.append(_Found([], some[:0], {int(some[0]): self._why(raw)}))
            else:
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
        whole = self._joined(parts)
        typed = [self._typed(column, f, whole) for column, f in zip(whole.columns, self._fields, strict=True)]
        for row, reason in sorted(whole.bad.items()):
            bad(row, reason)
        if not whole.bad:
            return typed, whole.rows
        keep = np.array([int(row) not in whole.bad for row in whole.rows], np.bool_)
        return [column.filter(pa.array(keep)) for column in typed], whole.rows[keep]

    def _apart(self, rows: Rows, lines: LineBatch, data: npt.NDArray[np.uint8]) -> list[Rows]:
        """Runs of rows to be split at once, the last first; rows of one line with an odd quote are by themselves."""
        if self._multiline or not len(rows):
            return [rows] if len(rows) else []
        quotes = np.concatenate(([0], np.cumsum(data == _QUOTE)))
        odd = (quotes[lines.ends[rows]] - quotes[lines.starts[rows]]) % 2 == 1
        bounds = np.flatnonzero(odd)
        runs = np.split(rows, np.unique(np.concatenate((bounds, bounds + 1)))) if len(bounds) else [rows]
        return [run for run in reversed(runs) if len(run)]

    def _split(self, raw: memoryview, rows: Rows) -> _Found | None:
        """The values of these rows, or None when they aren't what Arrow takes for as many rows."""
        data = np.frombuffer(raw, np.uint8)
        if not self._multiline and not closed_at_newlines(data):
            return None
        if len(rows) > 1:
            returns = np.flatnonzero(data == _RETURN)
            if not (data[returns + 1] == _NEWLINE).all():  # one by itself ends a row for Arrow, unless quoted
                return None
        uneven: dict[int, int] = {}

        def pass_over(row: pacsv.InvalidRow) -> str:
            uneven[row.number - 1] = row.actual_columns
            return "skip"

        # Arrow passes over a byte order mark, but in the middle of a file it is text.
        source = pa.py_buffer(b"\n" + bytes(raw) if bytes(raw[: len(BOM)]) == BOM else raw)
        try:
            table = pacsv.read_csv(
                pa.BufferReader(source),
                pacsv.ReadOptions(use_threads=False, block_size=source.size + 1, column_names=self._header),
                pacsv.ParseOptions(newlines_in_values=self._multiline, invalid_row_handler=pass_over),
                self._raw,
            )
        except pa.ArrowInvalid:
            return None
        if table.num_rows + len(uneven) != len(rows):
            return None
        expected = len(self._header)
        bad = {
            int(rows[i]): BadRow("columns", f"the row has {count} values, the header {expected}")
            for i, count in uneven.items()
        }
        left = np.delete(rows, list(uneven)) if uneven else rows
        return _Found([_one(table[f.name]) for f in self._fields], left, bad)

    def _joined(self, parts: Sequence[_Found]) -> _Found:
        bad = {row: reason for part in parts for row, reason in part.bad.items()}
        good = [part for part in parts if len(part.rows)]
        if not good:
            return _Found([pa.array([], pa.binary()) for _ in self._fields], np.zeros(0, np.int64), bad)
        if len(good) == 1:
            return _Found(good[0].columns, good[0].rows, bad)
        columns = [pa.concat_arrays(arrays) for arrays in zip(*(part.columns for part in good), strict=True)]
        return _Found(columns, np.concatenate([part.rows for part in good]), bad)

    def _typed(self, column: pa.Array, wanted: pa.Field, whole: _Found) -> pa.Array:
        """The column as its type; values that don't fit are null, and their rows bad."""

        def misfit(row: int) -> None:
            whole.bad.setdefault(int(whole.rows[row]), _misfit(column[row].as_py(), wanted))

        if wanted.type == pa.binary():
            return column
        text = _by_halves(column, pa.string(), lambda part: part.cast(pa.string()), misfit)
        if wanted.type == pa.string():
            return text
        text = pc.ascii_trim_whitespace(text)
        text = pc.if_else(pc.equal(text, ""), None, text)
        if wanted.type == TIME_TYPE:
            return _by_halves(text, TIME_TYPE, to_times, misfit)
        return _by_halves(text, wanted.type, lambda part: part.cast(wanted.type), misfit)

    def _why(self, raw: memoryview) -> BadRow:
        """What is wrong with a row that isn't one."""
        if not self._multiline and not closed_at_newlines(np.frombuffer(raw, np.uint8)):
            return BadRow("csv", "a quoted value does not end on its line; mend it, or set multiline: true")
        return BadRow("csv", "a carriage return stands in a value without quotes")


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _by_halves(
    values: pa.Array, kind: pa.DataType, convert: Callable[[pa.Array], pa.Array], misfit: Callable[[int], None]
) -> pa.Array:
    """``convert`` all values; those it refuses are null in what comes back, and ``misfit`` is told of each."""
    pieces: list[pa.Array] = []
    waiting = [(0, len(values))]
    while waiting:
        start, end = waiting.pop()
        try:
            pieces.append(convert(values.slice(start, end - start)))
        except pa.ArrowInvalid:
            if end - start > 1:
                half = (start + end) // 2
                waiting += [(half, end), (start, half)]
            else:
                pieces.append(pa.nulls(1, kind))
                misfit(start)
    return pieces[0] if len(pieces) == 1 else pa.concat_arrays(pieces)


def _misfit(value: bytes, wanted: pa.Field) -> BadRow:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow("utf-8", f"column {wanted.name[:80]!r} is not UTF-8: {error.reason} at its byte {error.start}")
    return BadRow("type", f"column {wanted.name[:80]!r} holds {text[:40]!r}, expected {type_word(wanted.type)}")
