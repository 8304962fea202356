"""From the lines of a CSV to typed columns: all at once by Arrow, and by halves where a row is bad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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

_NEWLINE, _RETURN = 10, 13


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row is rejected. ``rule`` is ``csv``, ``columns``, ``utf-8`` or ``type``."""

    rule: str
    reason: str


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
        self._kinds = {f.name: pa.string() if f.type == TIME_TYPE else f.type for f in self._fields}

    def parse(
        self, lines: LineBatch, bad: Callable[[int, BadRow], None]
    ) -> tuple[list[pa.Array], npt.NDArray[np.int64]]:
        """The columns, and which lines they hold. Blank lines are passed over, ``bad`` is told of bad ones."""
        data = np.frombuffer(lines.data, np.uint8)
        starts = lines.starts
        lengths = lines.ends - starts - 1
        blank = (lengths == 0) | ((lengths == 1) & (data[starts] == _RETURN))
        rows = np.flatnonzero(~blank)
        good: list[list[pa.Array]] = []
        kept: list[npt.NDArray[np.int64]] = []
        waiting = [rows] if len(rows) else []
        while waiting:
            some = waiting.pop()
            raw = memoryview(lines.data)[int(starts[some[0]]) : int(lines.ends[some[-1]])]
            columns = self._at_once(raw, len(some))
            if columns is not None:
                good.append(columns)
                kept.append(some)
            elif len(some) == 1:
                bad(int(some[0]), self._why(raw))
            else:
                half = len(some) // 2
                waiting += [some[half:], some[:half]]
        if not good:
            return [], np.zeros(0, np.int64)
        merged = good[0] if len(good) == 1 else [pa.concat_arrays(parts) for parts in zip(*good, strict=True)]
        return merged, np.concatenate(kept)

    def _at_once(self, raw: memoryview, rows: int) -> list[pa.Array] | None:
        """The columns of these rows, or None when something is wrong with one of them."""
        data = np.frombuffer(raw, np.uint8)
        if not self._multiline and not closed_at_newlines(data):
            return None
        if rows > 1:
            returns = np.flatnonzero(data == _RETURN)
            if not (data[returns + 1] == _NEWLINE).all():  # one by itself ends a row for Arrow, unless quoted
                return None
        try:
            table = self._table(raw, self._kinds)
            if table.num_rows != rows:
                return None
            return [self._typed(table[f.name], f.type) for f in self._fields]
        except pa.ArrowInvalid:
            return None

    def _table(self, raw: memoryview, kinds: dict[str, pa.DataType] | None) -> pa.Table:
        # Arrow passes over a byte order mark, but in the middle of a file it is text.
        source = pa.py_buffer(b"\n" + bytes(raw) if bytes(raw[: len(BOM)]) == BOM else raw)
        options: dict[str, Any] = {} if kinds is None else {"column_types": kinds, "include_columns": list(kinds)}
        names: dict[str, Any] = {"autogenerate_column_names": True} if kinds is None else {"column_names": self._header}
        return pacsv.read_csv(
            pa.BufferReader(source),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=source.size + 1, **names),
            parse_options=pacsv.ParseOptions(newlines_in_values=self._multiline),
            convert_options=pacsv.ConvertOptions(null_values=[""], strings_can_be_null=False, **options),
        )

    def _typed(self, column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        if kind == TIME_TYPE:
            return to_times(pc.if_else(pc.equal(array, ""), None, array))
        return array

    def _why(self, raw: memoryview) -> BadRow:
        """What is wrong with one row."""
        if not closed_at_newlines(np.frombuffer(raw, np.uint8)) and not self._multiline:
            return BadRow("csv", "a quoted value does not end on its line; mend it, or set multiline: true")
        try:
            table = self._table(raw, None)
        except pa.ArrowInvalid as error:
            return BadRow("csv", f"the row can't be parsed: {str(error)[:200]}")
        if table.num_rows != 1:
            return BadRow("csv", "a carriage return stands in a value without quotes")
        if table.num_columns != len(self._header):
            return BadRow("columns", f"the row has {table.num_columns} values, the header {len(self._header)}")
        values = self._table(raw, {f.name: pa.binary() for f in self._fields})
        for field in self._fields:
            reason = self._wrong_value(values[field.name][0].as_py(), field)
            if reason is not None:
                return reason
        return BadRow("csv", "the row can't be parsed")

    def _wrong_value(self, value: bytes | None, field: pa.Field) -> BadRow | None:
        if field.type == pa.binary() or value is None:
            return None
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError as error:
            return BadRow("utf-8", f"column {field.name[:80]!r} is not UTF-8: {error.reason} at its byte {error.start}")
        if field.type == pa.string():
            return None
        quoted = b'"' + value.replace(b'"', b'""') + b'"\n'
        alone = RowParser([field.name], [field], multiline=True)
        if alone._at_once(memoryview(quoted), 1) is not None:
            return None
        return BadRow("type", f"column {field.name[:80]!r} holds {text[:40]!r}, expected {type_word(field.type)}")
