"""One form for equal records: what a shard's digest is taken of must not tell how its arrays were allocated.

Arrow leaves much open: what lies under a null, where offsets begin, the bits behind the last row, whether a bitmap
without nulls is there, and its writer sends up to seven bytes of the *next* values as padding. So the same rows, cut
or copied in another way, would have other bytes. Here every buffer is cut to its exact length (a view where that is
enough), offsets begin at 0, and what no reader can see is zero, empty or null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.errors import TransformError

__all__ = ["canonical", "raw_offsets"]

Mask = npt.NDArray[np.bool_]

_BINARY: Final[Mapping[pa.DataType, type[np.signedinteger[Any]]]] = {
    pa.string(): np.int32,
    pa.binary(): np.int32,
    pa.large_string(): np.int64,
    pa.large_binary(): np.int64,
}
_UINTS: Final[Mapping[int, type[np.unsignedinteger[Any]]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def canonical(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows in buffers that depend on nothing but the rows.

    Args:
        batch: Of plain types (``process.plain``). Columns without nulls are not copied.

    Raises:
        TransformError: a column is of a type without such a form (a union); names it.
    """
    columns = []
    for column, field in zip(batch.columns, batch.schema, strict=True):
        try:
            columns.append(_exact(column, field.type))
        except _NoForm:
            raise TransformError(
                f"column {field.name!r} is of type {field.type}, which shards don't hold; select the fields you need"
            ) from None
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


class _NoForm(Exception):
    """A type, somewhere inside of a column, that is none of those below."""


def _exact(array: pa.Array, kind: pa.DataType, *, all_valid: bool = False) -> pa.Array:
    """``array`` in exact buffers.

    Args:
        array: Any slice.
        kind: Its type.
        all_valid: Make what is null a zero; for what lies under a null parent in a field that can't be null.
    """
    types = pa.types
    n = len(array)
    if types.is_null(kind):
        return pa.nulls(n)
    valid = None if array.null_count == 0 else _valid(array)
    bitmap = None if valid is None or all_valid else _bitmap(valid)
    buffers: list[Any] = [bitmap]
    children: list[pa.Array] | None = None
    if types.is_struct(kind):
        children = [_under(array.field(i), f, valid, 1) for i, f in enumerate(kind)]
    elif types.is_fixed_size_list(kind):
        size = kind.list_size
        children = [_under(array.values.slice(array.offset * size, n * size), kind.value_field, valid, size)]
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        array, offsets, start, end = _offsets(array, np.int64 if types.is_large_list(kind) else np.int32, valid)
        buffers.append(offsets)
        children = [_list_child(array, kind, start, end)]
    elif kind in _BINARY:
        array, offsets, start, end = _offsets(array, _BINARY[kind], valid)
        data = array.buffers()[2]
        buffers += [offsets, pa.py_buffer(b"") if data is None else data.slice(start, end - start)]
    else:
        buffers.append(_fixed_width(array, kind, valid))
    nulls = 0 if bitmap is None or valid is None else n - int(np.count_nonzero(valid))
    return pa.Array.from_buffers(kind, n, buffers, nulls, 0, children)


def _under(child: pa.Array, field: pa.Field, valid: Mask | None, per_row: int) -> pa.Array:
    """The child of a struct or of fixed-size lists; what lies under a null parent is null, or zero if it can't be."""
    if valid is None:
        return _exact(child, field.type)
    shown = np.repeat(valid, per_row)
    all_valid = not field.nullable and bool(_valid(child)[shown].all())
    rows = pa.array(np.arange(len(child)), mask=~shown)
    return _exact(child.take(rows), field.type, all_valid=all_valid)


def _list_child(array: pa.Array, kind: pa.DataType, start: int, end: int) -> pa.Array:
    n = end - start
    if not pa.types.is_map(kind):
        return _exact(array.values.slice(start, n), kind.value_type)
    entries = pa.struct([kind.key_field, kind.item_field])
    pair = [_exact(array.keys.slice(start, n), kind.key_type), _exact(array.items.slice(start, n), kind.item_type)]
    return pa.Array.from_buffers(entries, n, [None], 0, 0, pair)


def _offsets(
    array: pa.Array, width: type[np.signedinteger[Any]], valid: Mask | None
) -> tuple[pa.Array, pa.Buffer, int, int]:
    """The array (another one, if values lay under nulls), its offsets from 0, and which values are its own."""
    n = len(array)
    found = raw_offsets(array, width)
    if valid is not None and bool((np.diff(found)[~valid] != 0).any()):
        array = array.take(pa.array(np.arange(n), mask=~valid))
        found = raw_offsets(array, width)
    start, end = int(found[0]), int(found[-1])
    return array, pa.py_buffer(found - width(start) if start else np.ascontiguousarray(found)), start, end


def raw_offsets(array: pa.Array, width: type[np.signedinteger[Any]]) -> npt.NDArray[Any]:
    """The ``len(array) + 1`` offsets of strings, binary, lists or maps: a view, as they lie, so not always from 0."""
    buffer = array.buffers()[1]
    if len(array) == 0 or buffer is None:
        return np.zeros(1, dtype=width)
    found: npt.NDArray[Any] = np.frombuffer(buffer, dtype=width, count=array.offset + len(array) + 1)
    return found[array.offset :]


def _fixed_width(array: pa.Array, kind: pa.DataType, valid: Mask | None) -> pa.Buffer:
    if pa.types.is_boolean(kind):
        return _bitmap(pc.fill_null(array, False).to_numpy(zero_copy_only=False))
    n, width = len(array), _width(kind)
    buffer = array.buffers()[1]
    if n == 0 or buffer is None:
        return pa.py_buffer(b"")
    exact = buffer.slice(array.offset * width, n * width)
    if valid is None:
        return exact
    if width in _UINTS:
        return pa.py_buffer(np.where(valid, np.frombuffer(exact, dtype=_UINTS[width]), _UINTS[width](0)))
    values = np.frombuffer(exact, dtype=np.uint8).reshape(n, width).copy()
    values[~valid] = 0
    return pa.py_buffer(values)


def _width(kind: pa.DataType) -> int:
    """Bytes in a value."""
    is_other = kind.num_fields or pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType)
    try:
        width = 0 if is_other else int(kind.bit_width) // 8
    except ValueError:  # a layout without a width, such as views
        width = 0
    if width == 0:
        raise _NoForm
    return width


def _valid(array: pa.Array) -> Mask:
    found: Mask = array.is_valid().to_numpy(zero_copy_only=False)
    return found


def _bitmap(bits: Mask) -> pa.Buffer:
    return pa.py_buffer(np.packbits(bits, bitorder="little"))
