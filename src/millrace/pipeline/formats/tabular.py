"""What every format that carries its own schema shares: plain types, one schema for all files, bounded batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.errors import SourceError
from millrace.core.model import Quarantined, SourceObject
from millrace.pipeline.records import ReadContext, Records

__all__ = ["conform", "emit", "plain_schema", "plain_type", "renamed", "require_same", "with_path"]

_SIMPLE: Final = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
_ENCODED: Final = (
    pa.types.is_dictionary,
    pa.types.is_run_end_encoded,
    pa.types.is_string_view,
    pa.types.is_binary_view,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type a column comes out as, however a file chose to encode it.

    Dictionaries and runs become their values, views become strings, binaries and lists, extension types their
    storage; names, nullability and metadata inside nested types are made the same, since they would end up in
    the shards' bytes.
    """
    if isinstance(kind, pa.BaseExtensionType):
        return plain_type(kind.storage_type)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if pa.types.is_map(kind):
        return pa.map_(plain_type(kind.key_type), plain_type(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(plain_type(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_list_view(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, plain_type(f.type)) for f in kind])
    return _SIMPLE.get(kind, kind)


def plain_schema(schema: pa.Schema, obj: SourceObject) -> pa.Schema:
    """A file's schema in plain types, every column nullable, without metadata.

    Raises:
        SourceError: two columns have the same name.
    """
    twice = next((name for name, count in Counter(schema.names).items() if count > 1), None)
    if twice is not None:
        raise SourceError(f"{obj.path} has more than one column {twice!r}; rename one of them")
    return pa.schema([pa.field(f.name, plain_type(f.type)) for f in schema])


def with_path(schema: pa.Schema) -> pa.Schema:
    """The schema with a ``path`` column first, unless the data has a column of that name."""
    return schema if "path" in schema.names else pa.schema([pa.field("path", pa.string()), *schema])


def require_same(found: pa.Schema, expected: pa.Schema, obj: SourceObject) -> None:
    """Check one file's schema against the source's; both plain, both with their path column.

    Raises:
        SourceError: they differ; names the first column that does.
    """
    if found.equals(expected):
        return
    way_out = "make the files agree, or read them as two sources"
    for field in expected:
        where = found.get_field_index(field.name)
        if where < 0:
            raise SourceError(
                f"{obj.path}: column {field.name!r} is missing, but it is {field.type} in the source's first file; "
                f"{way_out}"
            )
        if found.field(where).type != field.type:
            raise SourceError(
                f"{obj.path}: column {field.name!r} is {found.field(where).type}, but {field.type} in the source's "
                f"first file; {way_out}"
            )
    for field in found:
        if field.name not in expected.names:
            raise SourceError(
                f"{obj.path}: column {field.name!r} ({field.type}) is not in the source's first file; {way_out}"
            )
    at = next(i for i, name in enumerate(expected.names) if found.names[i] != name)
    raise SourceError(
        f"{obj.path}: column {at + 1} is {found.names[at]!r}, but {expected.names[at]!r} in the source's first file; "
        f"{way_out}"
    )


class _Renamed:
    """A batch seen under another schema of the same layout: nothing is copied."""

    def __init__(self, batch: pa.RecordBatch, schema: pa.Schema) -> None:
        self._batch, self._schema = batch, schema

    def __arrow_c_array__(self, requested_schema: object = None) -> tuple[Any, Any]:
        return self._schema.__arrow_c_schema__(), self._batch.__arrow_c_array__()[1]


def conform(batch: pa.RecordBatch, plain: pa.Schema) -> pa.RecordBatch:
    """A batch as read, in the plain schema of its file. Copies only what is dictionary-encoded, a view or in runs.

    Raises:
        pa.ArrowException: a column can't be decoded.
    """
    columns = [_decoded(column, field.type) for column, field in zip(batch.columns, plain, strict=True)]
    out = pa.RecordBatch.from_arrays(columns, names=plain.names) if columns else batch
    return renamed(out, plain)


def renamed(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The same buffers under another schema of the same layout: names, nullability, or times as their integers."""
    return pa.record_batch(_Renamed(batch, schema))


def _decoded(column: pa.Array, kind: pa.DataType) -> pa.Array:
    if not _is_encoded(column.type):
        return column
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_run_end_encoded(column.type):
        column = pc.run_end_decode(column)
    return column.cast(kind) if _is_encoded(column.type) else column


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether the layout, and not just a name, differs from that of the plain type."""
    if isinstance(kind, pa.BaseExtensionType):
        return _is_encoded(kind.storage_type)
    return any(test(kind) for test in _ENCODED) or any(_is_encoded(kind.field(i).type) for i in range(kind.num_fields))


def emit(
    batch: pa.RecordBatch,
    positions: npt.NDArray[np.int64],
    index: int,
    obj: SourceObject,
    context: ReadContext,
    *,
    position: str,
) -> Iterator[Records]:
    """A decoded batch as records: bad rows rejected, cut to the bounds, with its ``path`` column.

    Args:
        batch: In the plain schema, without ``path`` unless it is the data's own.
        positions: One a row.
        index: Of the object in its chunk.
        obj: The object.
        context: Bounds and where bad rows go.
        position: The format's word for a position.

    Raises:
        SourceError: values are corrupt in another way than bad UTF-8.
    """
    for start, length in _pieces(batch, context):
        piece, at = batch.slice(start, length), positions[start : start + length]
        bad: dict[int, tuple[str, str]] = {}
        if piece.nbytes > context.max_record_bytes:
            _sift(piece, 0, lambda part: _too_long(part, context.max_record_bytes), bad)
        if any(_has_text(field.type) for field in piece.schema):
            _sift(piece, 0, lambda part: _not_text(part, obj), bad)
        if bad:
            for row, (rule, reason) in sorted(bad.items()):
                context.reject(Quarantined(obj.path, f"{position} {at[row]}", "ingest", rule, reason))
            keep = np.ones(piece.num_rows, dtype=np.bool_)
            keep[list(bad)] = False
            piece, at = piece.filter(pa.array(keep)), at[keep]
        if piece.num_rows == 0:
            continue
        if "path" not in piece.schema.names:
            path = pa.repeat(pa.scalar(obj.path, pa.string()), piece.num_rows)
            piece = pa.RecordBatch.from_arrays([path, *piece.columns], schema=context.schema)
        yield Records(piece, np.full(piece.num_rows, index, dtype=np.int32), np.ascontiguousarray(at))


def _pieces(batch: pa.RecordBatch, context: ReadContext) -> Iterator[tuple[int, int]]:
    """Where to cut, as (first row, rows): halves until each piece is within the bounds or one row."""
    pending = [(0, batch.num_rows)]
    while pending:
        start, rows = pending.pop()
        if rows == 0:
            continue
        if rows > 1 and (rows > context.batch_rows or batch.slice(start, rows).nbytes > context.batch_bytes):
            pending += [(start + rows // 2, rows - rows // 2), (start, rows // 2)]
        else:
            yield start, rows


def _sift(
    batch: pa.RecordBatch,
    offset: int,
    find: Callable[[pa.RecordBatch], tuple[str, str] | None],
    bad: dict[int, tuple[str, str]],
) -> None:
    """Finds bad rows by halving, so that a good batch costs one look."""
    found = find(batch)
    if found is None:
        return
    if batch.num_rows == 1:
        bad.setdefault(offset, found)
        return
    half = batch.num_rows // 2
    _sift(batch.slice(0, half), offset, find, bad)
    _sift(batch.slice(half), offset + half, find, bad)


def _too_long(batch: pa.RecordBatch, limit: int) -> tuple[str, str] | None:
    if batch.nbytes <= limit:
        return None
    return "max_record", f"the record has {batch.nbytes} bytes, more than max_record ({limit})"


def _not_text(batch: pa.RecordBatch, obj: SourceObject) -> tuple[str, str] | None:
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid as err:
        if "UTF8" not in str(err):
            raise SourceError(f"{obj.path} holds corrupt values: {err}; write it again or exclude it") from err
        names = [f.name for f, column in zip(batch.schema, batch.columns, strict=True) if not _valid(column)]
        return "utf-8", f"column {', '.join(map(repr, names))} is not valid UTF-8; store it as binary or mend it"
    return None


def _valid(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _has_text(kind: pa.DataType) -> bool:
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return True
    return any(_has_text(kind.field(i).type) for i in range(kind.num_fields))
