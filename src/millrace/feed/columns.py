"""What a batch's columns are made of: from the schema, how rows are gathered out of the arena.

A block in the arena is an Arrow message, and its arrays' buffers are addresses in there. A column of a fixed width is
gathered by one indexing call for a whole batch, whatever blocks the rows are in; a column of variable width by its
offsets and one concatenation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt, TransformError, UsageError
from millrace.feed.arena import Arena

__all__ = ["Bound", "Column", "Gather", "Ragged", "bind", "columns_of"]

Int64s = npt.NDArray[np.int64]
Values = npt.NDArray[Any]


class Ragged(NamedTuple):
    """Rows of different lengths, end to end.

    Attributes:
        values: All rows' values, one after the other.
        offsets: int64, shape (rows + 1,): row ``i`` is ``values[offsets[i]:offsets[i + 1]]``.
    """

    values: Any
    offsets: Any


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the batches.

    Attributes:
        name: As in the schema.
        index: Its place there.
        kind: ``fixed`` (an array of ``dtype`` and ``shape`` a row), ``bits``, ``ragged``, ``text``, or ``objects``
            (Python values: nested types).
        dtype: Of the values.
        shape: Of one row.
        axes: Where not all in their order, which axis of ``shape`` each axis of what is given is.
        wide: Whether offsets have 64 bits.
        null: What a null is: ``nan``, ``none``, or ``bad`` (the row can't be given).
    """

    name: str
    index: int
    kind: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    wide: bool = False
    null: str = "bad"

    @property
    def row_bytes(self) -> int:
        """Bytes of a fixed row."""
        return self.dtype.itemsize * math.prod(self.shape)

    def shaped(self, data: Values, rows: int) -> Values:
        """The bytes of ``rows`` rows of a fixed column as an array, without a copy."""
        found = data.view(self.dtype).reshape(rows, *self.shape)
        return found.transpose(0, *(axis + 1 for axis in self.axes)) if self.axes else found


@dataclass(frozen=True, slots=True)
class Bound:
    """A block's columns, found in the arena.

    Attributes:
        addresses: int64, shape (columns, 3): where values, offsets (or bits) and, for text with nulls, validity begin,
            as arena offsets; 0 where there is none.
        bad: Row to why it can't be given.
        batch: The block itself, for columns of Python values and for Arrow batches.
    """

    addresses: Int64s
    bad: Mapping[int, str]
    batch: pa.RecordBatch


_OBJECT: Final = np.dtype(object)
_U8: Final = np.dtype(np.uint8)


def columns_of(schema: pa.Schema, names: Sequence[str] | None, *, as_arrow: bool = False) -> tuple[Column, ...]:
    """How each column is given, in the schema's order or that of ``names``.

    Args:
        schema: Of the blocks.
        names: Which columns; None means all.
        as_arrow: Batches are Arrow's own, which has a null for every type: no row lacks a value.

    Raises:
        UsageError: there is no such column; names those there are.
    """
    wanted = list(schema.names) if names is None else list(names)
    for name in wanted:
        if (times := schema.names.count(name)) != 1:
            what = "no column" if times == 0 else "more than one column"
            raise UsageError(f"there is {what} {name!r}; there is {', '.join(schema.names)}")
    if not wanted:
        raise UsageError(f"columns= names no column; there is {', '.join(schema.names)}")
    if as_arrow:
        return tuple(Column(name, schema.get_field_index(name), "objects", _OBJECT, null="none") for name in wanted)
    return tuple(_column(name, schema.get_field_index(name), schema.field(name).type) for name in wanted)


def _column(name: str, index: int, kind: pa.DataType) -> Column:
    types = pa.types
    if isinstance(kind, pa.FixedShapeTensorType) and (tensor := _tensor(name, index, kind)) is not None:
        return tensor
    while isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_boolean(kind):
        return Column(name, index, "bits", np.dtype(np.bool_))
    if types.is_string(kind) or types.is_large_string(kind):
        return Column(name, index, "text", _U8, wide=types.is_large_string(kind), null="none")
    if types.is_binary(kind) or types.is_large_binary(kind):
        return Column(name, index, "ragged", _U8, wide=types.is_large_binary(kind))
    if (types.is_list(kind) or types.is_large_list(kind)) and (dtype := _primitive(kind.value_type)) is not None:
        return Column(name, index, "ragged", dtype, wide=types.is_large_list(kind))
    shape: list[int] = []
    while types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    dtype = _primitive(kind)
    if types.is_fixed_size_binary(kind):
        shape.append(kind.byte_width)
        dtype = _U8
    if dtype is None or 0 in shape:
        return Column(name, index, "objects", _OBJECT, null="none")
    null = "nan" if dtype.kind == "f" and not shape else "bad"
    return Column(name, index, "fixed", dtype, tuple(shape), null=null)


def _tensor(name: str, index: int, kind: pa.FixedShapeTensorType) -> Column | None:
    dtype, shape = _primitive(kind.value_type), tuple(kind.shape)
    if dtype is None or 0 in shape or not shape:
        return None
    axes = tuple(kind.permutation or ())
    return Column(name, index, "fixed", dtype, shape, () if axes == tuple(range(len(shape))) else axes)


def _primitive(kind: pa.DataType) -> np.dtype[Any] | None:
    types = pa.types
    is_number = types.is_integer(kind) or types.is_floating(kind)
    is_span = types.is_time(kind) or types.is_duration(kind)
    if not (is_number or is_span or types.is_timestamp(kind) or types.is_date(kind)):
        return None
    if is_span or (types.is_date(kind) and kind.bit_width == 32):
        return np.dtype(f"i{kind.bit_width // 8}")
    if types.is_date(kind):
        return np.dtype("M8[ms]")
    if types.is_timestamp(kind):
        return np.dtype(f"M8[{kind.unit}]")
    dtype: np.dtype[Any] = np.dtype(kind.to_pandas_dtype())
    return dtype


def bind(batch: pa.RecordBatch, columns: Sequence[Column], arena: Arena) -> Bound:
    """Find the columns of a block that lies in the arena.

    Nulls of floating-point columns are made NaN where they lie.

    Raises:
        Corrupt: a buffer lies elsewhere: the block was not plain.
    """
    addresses = np.zeros((len(columns), 3), np.int64)
    bad: dict[int, str] = {}
    for i, column in enumerate(columns):
        array = _stored(batch.column(column.index))
        if array.null_count and column.null == "bad":
            for row in _nulls(array):
                bad.setdefault(int(row), f"column {column.name!r} is null, and {array.type} has no value for that")
        if column.kind != "objects" and len(array):
            for row in _inner_nulls(array):
                bad.setdefault(row, f"column {column.name!r} has a null inside of a value")
            addresses[i, :2] = _addresses(array, column, arena)
            if array.null_count and column.kind == "text":
                addresses[i, 2] = _place(array.buffers()[0], arena)
            if array.null_count and column.null == "nan":
                _fill_nan(array, column, arena, int(addresses[i, 0]))
    return Bound(addresses, bad, batch)


def _stored(array: pa.Array) -> pa.Array:
    while isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array


def _addresses(array: pa.Array, column: Column, arena: Arena) -> tuple[int, int]:
    buffers = array.buffers()
    if column.kind in {"ragged", "text"}:
        is_list = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
        values = array.values.buffers()[1] if is_list else buffers[2]
        return _place(values, arena), _place(buffers[1], arena)
    while pa.types.is_fixed_size_list(array.type):
        array = array.values
    place = _place(array.buffers()[1], arena)
    return (0, place) if column.kind == "bits" else (place, 0)


def _place(buffer: pa.Buffer | None, arena: Arena) -> int:
    if buffer is None or buffer.size == 0:
        return 0
    place = int(buffer.address) - arena.address
    if not 0 <= place <= len(arena.bytes) - buffer.size:
        raise Corrupt("a block's values don't lie in the block: it was cached in a form that can't be read in place")
    return place


def _inner_nulls(array: pa.Array) -> Sequence[int]:
    """Rows with a null inside of their value, however deep; none nearly always, and that is quick."""
    types = pa.types
    found: list[Int64s] = []
    if types.is_list(array.type) or types.is_large_list(array.type):
        if array.values.null_count:
            found.append(np.searchsorted(_offsets(array), _nulls(array.values), side="right") - 1)
    else:
        per_row, inner = 1, array
        while types.is_fixed_size_list(inner.type):
            per_row *= inner.type.list_size
            inner = inner.values
            if inner.null_count:
                found.append(_nulls(inner) // per_row)
    if not found:
        return ()
    rows = np.unique(np.concatenate(found))
    rows = rows[(rows >= 0) & (rows < len(array))]  # what lies before the first row and after the last is nobody's
    return rows[_valid(array)[rows]].tolist()  # type: ignore[no-any-return]


def _offsets(array: pa.Array) -> npt.NDArray[Any]:
    kind = np.int64 if pa.types.is_large_list(array.type) else np.int32
    return np.frombuffer(array.buffers()[1], kind, array.offset + len(array) + 1)[array.offset :]


def _nulls(array: pa.Array) -> Int64s:
    return np.flatnonzero(~_valid(array))


def _valid(array: pa.Array) -> npt.NDArray[np.bool_]:
    # By the bits themselves: Arrow's ``to_numpy`` imports pandas where it is there, which takes half a second.
    bits = array.is_valid()
    found = np.unpackbits(np.frombuffer(bits.buffers()[1], np.uint8), bitorder="little")
    return found[bits.offset : bits.offset + len(bits)].astype(np.bool_)


def _fill_nan(array: pa.Array, column: Column, arena: Arena, place: int) -> None:
    values = arena.bytes[place : place + len(array) * column.dtype.itemsize].view(column.dtype)
    values[_nulls(array)] = np.nan


class Gather:
    """Gathers rows of the arena's blocks into arrays of their own, column by column.

    Args:
        arena: Where the blocks are.
        columns: Which columns.
        decode: Column name to what makes a value of a row's bytes (or text, or Python value).
    """

    def __init__(self, arena: Arena, columns: Sequence[Column], decode: Mapping[str, Callable[[Any], Any]]) -> None:
        unknown = set(decode) - {c.name for c in columns}
        if unknown:
            raise UsageError(f"decode= names {sorted(unknown)[0]!r}, which is not a column that is read")
        self.columns = tuple(columns)
        self.decode = dict(decode)
        self._arena = arena
        self._memory = memoryview(arena.bytes)  # type: ignore[arg-type]
        self._wide = arena.strided(np.dtype(np.int64))
        self._narrow = arena.strided(np.dtype(np.int32))
        self._fixed = {
            i: arena.strided(np.dtype(f"V{c.row_bytes}")) for i, c in enumerate(columns) if c.kind == "fixed"
        }

    def starts(self, addresses: Int64s, slots: npt.NDArray[np.int32], rows: Int64s) -> list[Int64s]:
        """For each column, where each of many rows lies; what :meth:`column` takes slices of.

        Args:
            addresses: Shape (columns, 3, slots): of blocks, see :class:`Bound`.
            slots: Shape (rows,): which of them each row's is.
            rows: Shape (rows,): each row's place in its block.

        Returns:
            For fixed columns offsets of the values, shape (rows,); for ragged ones begin and end, shape (rows, 2),
            -1 for a null; for bits the number of the bit; for objects the row's place in its block.
        """
        found: list[Int64s] = []
        for column, (values, offsets, validity) in zip(self.columns, addresses, strict=True):
            if column.kind == "fixed":
                found.append(values.take(slots) + rows * column.row_bytes)
            elif column.kind == "bits":
                found.append(offsets.take(slots) * 8 + rows)
            elif column.kind in {"ragged", "text"}:
                width, table = (8, self._wide) if column.wide else (4, self._narrow)
                at = offsets.take(slots) + rows * width
                ends = np.stack([table[at], table[at + width]], axis=1).astype(np.int64)
                found.append(values.take(slots)[:, None] + ends * column.dtype.itemsize)
                if column.kind == "text" and validity.any():
                    self._mark_nulls(found[-1], validity.take(slots), rows)
            else:
                found.append(rows)
        return found

    def column(self, i: int, starts: Int64s, batches: Sequence[pa.RecordBatch] | None) -> Any:
        """One column of one batch.

        Args:
            i: Which.
            starts: A slice of what :meth:`starts` gave.
            batches: Each row's block, for columns of Python values.

        Raises:
            TransformError: a value has no Python form.
        """
        column = self.columns[i]
        if column.kind == "fixed":
            return column.shaped(self._fixed[i][starts], len(starts))
        if column.kind == "bits":
            return (self._arena.bytes[starts >> 3] >> (starts & 7).astype(np.uint8) & 1).astype(np.bool_)
        if column.kind == "ragged":
            return self._ragged(column, starts)
        if column.kind == "text":
            memory = self._memory
            return [None if a < 0 else str(memory[a:b], "utf-8") for a, b in starts.tolist()]
        if batches is None:
            raise UsageError(f"column {column.name!r} is nested and can't be gathered without its blocks")
        try:
            return [b.column(column.index)[r].as_py() for b, r in zip(batches, starts.tolist(), strict=True)]
        except (ValueError, OverflowError, pa.ArrowException) as error:
            raise TransformError(
                f"column {column.name!r} has a value that can't be made a Python object: {error}; leave it out with "
                "columns=, or take format='arrow'"
            ) from error

    def _mark_nulls(self, starts: Int64s, validity: Int64s, rows: Int64s) -> None:
        bits = self._arena.bytes[validity + (rows >> 3)] >> (rows & 7).astype(np.uint8) & 1
        starts[(validity > 0) & (bits == 0)] = -1

    def _ragged(self, column: Column, starts: Int64s) -> Ragged:
        lengths = starts[:, 1] - starts[:, 0]
        offsets = np.zeros(len(starts) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        data = np.empty(int(offsets[-1]), np.uint8)
        if len(starts):
            memory = self._arena.bytes
            np.concatenate([memory[a:b] for a, b in starts.tolist()], out=data)
        if column.dtype.itemsize != 1:
            offsets //= column.dtype.itemsize
        return Ragged(data.view(column.dtype), offsets)
