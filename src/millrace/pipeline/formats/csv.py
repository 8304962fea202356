"""``csv``: a record a row, under the header that each file begins with."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import pyarrow as pa

from millrace.core.errors import SourceError, SpecError, UsageError
from millrace.core.model import Chunk, SourceObject
from millrace.core.ports import Bytes
from millrace.core.spec import Source
from millrace.pipeline.decompress import compression_of
from millrace.pipeline.formats.columns import COLUMN_TYPES
from millrace.pipeline.formats.csvrows import BadRow, RowParser
from millrace.pipeline.formats.linescan import Boundaries, LineBatch, LineRun, Newlines, line_batches, line_runs
from millrace.pipeline.formats.objects import BOM, even_cuts, object_blocks, path_column, rejected
from millrace.pipeline.formats.quotes import QuotedRecords
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["CSV", "CsvFormat"]

_HEADER_MAX: Final = 1_000_000
_FIRST_LOOK: Final = 65_536


class CsvFormat:
    """Each row is a record: ``path`` and the columns of the header.

    - Commas between values, quotes as in RFC 4180, UTF-8. A byte order mark is passed over; so are blank rows.
    - Every column is a string, and an empty value an empty string, unless ``columns`` says otherwise; a blank
      value of another type is null, and spaces around it don't count. With ``columns``, others are left out.
    - Every file has a header, the same in all files; with ``columns``, one that has those. A column that is
      itself called ``path`` takes the place of ours, and comes last.
    - With ``multiline: false`` a quoted value ends on its line, and large files can be cut.
    - An empty file has no rows.
    """

    name = "csv"
    position = "row at byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """At any byte when rows are lines; otherwise never."""
        return (0, obj.size_bytes) if source.multiline else even_cuts(source, obj, chunk_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path``, then ``columns`` or the header of the first object that has one.

        Raises:
            SpecError: a column is to be ``json``.
            UsageError: there are no ``columns``, and no object has a header.
            SourceError: the header can't be read or lacks a column.
        """
        listed = source.columns
        if listed is not None and (wrong := [name for name, word in listed.items() if word == "json"]):
            raise SpecError(f"columns: {wrong[0]!r} can't be json, as a csv holds text; make it a string")
        headers = (_header_of(reads, source, obj) for obj in objects if obj.size_bytes)
        header = next((found for found in headers if found is not None), None)
        if header is None and listed is None:
            raise UsageError(
                f"{source.url} has no row, so the columns are not known; list them under columns, or check the url"
            )
        if listed is not None:
            if header is not None:
                header.check_has(tuple(listed))
            kinds = {name: COLUMN_TYPES[word] for name, word in listed.items()}
        else:
            kinds = dict.fromkeys(_path_last(header.names) if header is not None else (), pa.string())
        if "path" not in kinds:
            kinds = {"path": pa.string(), **kinds}
        return pa.schema(list(kinds.items()))

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """See :class:`millrace.pipeline.records.Format`. A row with something wrong is rejected."""
        boundaries = QuotedRecords if context.source.multiline else Newlines
        runs = line_runs(chunk, context, self.position, boundaries)
        ours = _ours(context)
        columns = [field for field in context.schema if not (ours and field.name == "path")]
        for names, group in groupby(_under_headers(chunk, context, runs), key=lambda found: found[0]):
            parser = RowParser(names, columns, multiline=context.source.multiline)
            for lines in line_batches(context, ((i, run) for _, i, run in group)):
                yield from _records(lines, parser, chunk, context, ours=ours)


def _records(
    lines: LineBatch, parser: RowParser, chunk: Chunk, context: ReadContext, *, ours: bool
) -> Iterator[Records]:
    def bad(row: int, reason: BadRow) -> None:
        obj = chunk.objects[int(lines.objects[row])]
        at = f"{CsvFormat.position} {int(lines.positions[row])}"
        context.reject(rejected(obj, at, reason.rule, reason.reason))

    columns, rows = parser.parse(lines, bad)
    if not len(rows):
        return
    objects, positions = lines.objects[rows], lines.positions[rows]
    if ours:
        columns.insert(0, path_column(chunk.objects, objects))
    yield Records(pa.record_batch(columns, schema=context.schema), objects, positions)


def _ours(context: ReadContext) -> bool:
    """Whether the schema's ``path`` is the one we put first, rather than a column of the data."""
    if context.source.columns is not None:
        return "path" not in context.source.columns
    return context.schema.names[0] == "path" and len(context.schema) > 1


def _path_last(names: Sequence[str]) -> tuple[str, ...]:
    return (*(name for name in names if name != "path"), *(name for name in names if name == "path"))


def _under_headers(
    chunk: Chunk, context: ReadContext, runs: Iterator[tuple[int, LineRun]]
) -> Iterator[tuple[tuple[str, ...], int, LineRun]]:
    """The runs without headers, each with the names of its columns."""
    current = -1
    names: tuple[str, ...] = ()
    for i, run in runs:
        obj = chunk.objects[i]
        if i != current:
            current = i
            header: _Header | None
            if chunk.start > 0:
                header = _header_of(context.reads, context.source, obj)
            else:
                first = int(run.ends[0])
                header = _header(obj, bytes(memoryview(run.data)[:first]))
                run = LineRun(memoryview(run.data)[first:], run.ends[1:] - first, run.offset + first)
            names = header.names if header is not None else ()
            if header is not None:
                _check(header, context)
        if len(run.ends):
            yield names, i, run


def _check(header: _Header, context: ReadContext) -> None:
    if context.source.columns is not None:
        header.check_has(tuple(context.source.columns))
        return
    expected = [name for name in context.schema.names if not (_ours(context) and name == "path")]
    header.check_is(tuple(expected))


@dataclass(frozen=True, slots=True)
class _Header:
    obj: SourceObject
    names: tuple[str, ...]

    def check_has(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.names:
                raise SourceError(
                    f"{self.obj.path} has no column {name!r}; its header is {', '.join(map(repr, self.names))[:500]}"
                )

    def check_is(self, names: Sequence[str]) -> None:
        """``names`` are those of the first object, with ``path`` last."""
        found = _path_last(self.names)
        if found == tuple(names):
            return
        way_out = "; list the columns to read under columns, or make it a source of its own"
        for i, (mine, theirs) in enumerate(zip(found, names, strict=False), start=1):
            if mine != theirs:
                raise SourceError(
                    f"{self.obj.path} has another header than the first file: column {i} is {mine!r} instead of "
                    f"{theirs!r}{way_out}"
                )
        longer = len(found) > len(names)
        detail = f"it also has {found[len(names)]!r}" if longer else f"it lacks {names[len(found)]!r}"
        raise SourceError(f"{self.obj.path} has another header than the first file: {detail}{way_out}")


def _header(obj: SourceObject, line: bytes) -> _Header:
    try:
        text = line.removeprefix(BOM).decode("utf-8")
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{obj.path} has a header that can't be read: {error}") from None
    names = tuple(rows[0]) if rows else ()
    if not names:
        raise SourceError(f"{obj.path} begins with a blank line, where its header should be")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise SourceError(f"{obj.path} has two columns called {twice[0]!r}; rename one")
    return _Header(obj, names)


def _header_of(reads: Reads, source: Source, obj: SourceObject) -> _Header | None:
    """Read an object's header; None when it holds nothing."""
    found: Boundaries = QuotedRecords() if source.multiline else Newlines()
    line = b""
    for block in _beginning(reads, source, obj):
        ends = found.ends(np.frombuffer(block, np.uint8))
        line += bytes(memoryview(block)[: int(ends[0]) if len(ends) else len(block)])
        if len(ends):
            break
        if len(line) > _HEADER_MAX:
            raise SourceError(f"{obj.path} has no header in its first {_HEADER_MAX} bytes; is it a csv?")
    return _header(obj, line) if line else None


def _beginning(reads: Reads, source: Source, obj: SourceObject) -> Iterator[Bytes]:
    if compression_of(source, obj.path) != "none":
        yield from object_blocks(reads, source, obj)
        return
    for at in range(0, obj.size_bytes, _FIRST_LOOK):
        yield reads.read(obj, at, _FIRST_LOOK)


CSV: Final = CsvFormat()
