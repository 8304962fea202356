"""``jsonl``: a JSON object a line.

Two readers give the same records: Arrow's, for a whole batch at once where every line is plain and right, and
Python's, line by line, for batches with anything else. The second one defines what is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from millrace.core.errors import SourceError, UsageError
from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.columns import COLUMN_TYPES, TIME_TYPE, to_times
from millrace.pipeline.formats.jsonvalues import BadLine, Fields, LineParser, Sample
from millrace.pipeline.formats.linescan import LineBatch, line_batches, line_runs, sample_lines
from millrace.pipeline.formats.objects import even_cuts, object_blocks, path_column, rejected
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["JSONL", "SAMPLE_BYTES", "JsonlFormat", "read_at_once", "read_line_by_line"]

SAMPLE_BYTES: Final = 4_000_000
"""How much is looked at to find the fields and their types."""
_SAMPLE_OBJECTS: Final = 256

_BRACE_OPEN, _BRACE_CLOSE, _RETURN = ord("{"), ord("}"), ord("\r")


class JsonlFormat:
    """Each line is a JSON object, and one record with ``path`` and its fields.

    - Blank lines are passed over, and so is a byte order mark at the beginning of a file.
    - Of a key that a line has twice, the last one counts.
    - Without ``columns``, fields and types are those of the first 4 MB: string, int64, double, bool; a field
      that is nested in any line there is JSON text, with sorted keys and no spaces. Whole numbers fit a double
      column. A line with another field, or with a value of another type, is rejected. A field that is itself
      called ``path`` takes the place of ours, and comes last.
    - With ``columns``, other fields are left out.
    - A field that is missing is null. ``NaN`` and infinities are no numbers.
    - ``timestamp`` wants ISO 8601 text (UTC unless it says otherwise), ``binary`` wants base64 text.
    """

    name = "jsonl"
    position = "line at byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Anywhere: the line rule sorts it out. Compressed objects can't be cut."""
        return even_cuts(source, obj, chunk_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path``, then ``columns`` or what the first 4 MB hold.

        Raises:
            UsageError: there are no ``columns``, and nothing to find them from.
            SourceError: the objects to find them from can't be read.
        """
        if source.columns is not None:
            found = {name: COLUMN_TYPES[word] for name, word in source.columns.items()}
            if "path" not in found:
                found = {"path": pa.string(), **found}
            return pa.schema(list(found.items()))
        found = _sampled(reads, source, objects)
        if "path" in found:
            found["path"] = found.pop("path")  # last, so that a reader can tell it from the one we put first
        else:
            found = {"path": pa.string(), **found}
        return pa.schema(list(found.items()))

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """See :class:`millrace.pipeline.records.Format`."""
        fields = _fields(context)
        for lines in line_batches(context, line_runs(chunk, context, self.position)):
            columns = read_at_once(lines, fields)
            rows: Any = slice(None)
            if columns is None:
                columns, kept = read_line_by_line(lines, fields, chunk, context)
                rows = np.array(kept, np.int64)
            objects, positions = lines.objects[rows], lines.positions[rows]
            if len(objects):
                if len(fields.kinds) < len(context.schema):
                    columns.insert(0, path_column(chunk.objects, objects))
                yield Records(pa.record_batch(columns, schema=context.schema), objects, positions)


def _fields(context: ReadContext) -> Fields:
    """What lines should hold, by the schema found at planning."""
    listed = context.source.columns
    schema = context.schema
    ours = schema.names[0] == "path" and len(schema) > 1 if listed is None else "path" not in listed
    return Fields({f.name: f.type for f in schema if not (ours and f.name == "path")}, strict=listed is None)


def _sampled(reads: Reads, source: Source, objects: Sequence[SourceObject]) -> dict[str, pa.DataType]:
    sample = Sample()
    trouble: SourceError | None = None
    seen = looked = 0
    for obj in objects:
        if obj.size_bytes == 0:
            continue
        try:
            first = True
            for size, lines in sample_lines(object_blocks(reads, source, obj)):
                sample.look(lines, first=first)
                first = first and not lines
                seen += size
                if seen >= SAMPLE_BYTES and sample.kinds:
                    break
        except SourceError as error:  # the chunk that holds it will say so; the next object may do
            trouble = error
        looked += 1
        if sample.kinds and (seen >= SAMPLE_BYTES or looked >= _SAMPLE_OBJECTS):
            break
    if not sample.kinds:
        if trouble is not None:
            raise trouble
        raise UsageError(
            f"{source.url} holds no JSON object with a field, so the fields are not known; "
            "list them under columns, or check the format"
        )
    return sample.kinds


def read_at_once(lines: LineBatch, fields: Fields) -> list[pa.Array] | None:
    """The columns of a whole batch by Arrow's reader, or None when any line needs a closer look.

    Arrow's reader doesn't care for lines, lets broken UTF-8 through, takes NaN for a number and stops at a NUL, so
    each of these is ruled out. A line that begins with ``{`` and ends in ``}`` can't begin or end inside an
    object that spans lines; as many objects as lines then means one in each.
    """
    kinds = fields.kinds
    if not kinds or not all(kind in _fast_types() for kind in kinds.values()) or not _plain(lines):
        return None
    data = pa.py_buffer(lines.data)
    asked = pa.schema([(name, pa.string() if kind == TIME_TYPE else kind) for name, kind in kinds.items()])
    try:
        table = pj.read_json(
            pa.BufferReader(data),
            read_options=pj.ReadOptions(use_threads=False, block_size=data.size + 1),
            parse_options=pj.ParseOptions(
                explicit_schema=asked, unexpected_field_behavior="error" if fields.strict else "ignore"
            ),
        )
        if table.num_rows != len(lines):
            return None
        columns = [_one(table[name]) for name in kinds]
        for i, kind in enumerate(kinds.values()):
            if kind == TIME_TYPE:
                columns[i] = to_times(columns[i])
            elif kind == pa.float64() and pc.all(pc.is_finite(columns[i])).as_py() is False:
                return None
    except pa.ArrowInvalid:
        return None
    return columns


def _fast_types() -> tuple[pa.DataType, ...]:
    return (pa.string(), pa.int64(), pa.float64(), pa.bool_(), TIME_TYPE)


def _plain(lines: LineBatch) -> bool:
    """Whether every line is ``{...}`` in UTF-8, without a NUL."""
    data = np.frombuffer(lines.data, np.uint8)
    last = lines.ends - 2
    if (last <= lines.starts).any():
        return False
    last = last - (data[last] == _RETURN)
    if not ((data[lines.starts] == _BRACE_OPEN).all() and (data[last] == _BRACE_CLOSE).all()):
        return False
    buffer = pa.py_buffer(lines.data)
    offsets = pa.py_buffer(np.array([0, buffer.size], np.int64))
    try:
        pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, buffer]).cast(pa.large_string())
    except pa.ArrowInvalid:
        return False
    return bool(data.all())


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def read_line_by_line(
    lines: LineBatch, fields: Fields, chunk: Chunk, context: ReadContext
) -> tuple[list[pa.Array], list[int]]:
    """The columns of a batch, and which of its lines they hold. Bad lines are rejected, blank ones passed over."""
    view = memoryview(lines.data)
    parser = LineParser(fields)
    rows: list[list[object]] = []
    kept: list[int] = []
    bounds = zip(lines.starts.tolist(), lines.ends.tolist(), strict=True)
    for line, (start, end) in enumerate(bounds):
        at = int(lines.positions[line])
        try:
            row = parser.parse(bytes(view[start : end - 1]), first=at == 0)
        except BadLine as bad:
            obj = chunk.objects[int(lines.objects[line])]
            context.reject(rejected(obj, f"{JsonlFormat.position} {at}", bad.rule, bad.reason))
            continue
        if row is not None:
            rows.append(row)
            kept.append(line)
    return [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(fields.kinds.values())], kept


JSONL: Final = JsonlFormat()
