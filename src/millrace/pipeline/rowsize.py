"""How many bytes a row is, told by the row alone: what closes a block must not depend on how batches were cut.

A row's size is the sum over its columns, by type:

- numbers, times, decimals, fixed-size binary: their width; a boolean counts as 1; ``null`` as nothing;
- strings and binary: 4 for the offset and the value's length;
- lists and maps: 4 for the offset and their elements;
- structs and fixed-size lists: their parts.

A null is as large as what is always there: its width, its offset, or those of its parts. The bits that say what is
null, padding and the message's header are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.pipeline.canonical import raw_offsets

__all__ = ["RowSizes", "row_sizes"]

Sizes = npt.NDArray[np.int64]

_OFFSET_BYTES = 4


@dataclass(frozen=True, slots=True)
class RowSizes:
    """The sizes of a batch's rows.

    Attributes:
        rows: How many rows.
        fixed: Bytes every row has.
        ends: int64[rows]: bytes that the rows up to and with each one have beyond these; None where there are none.
    """

    rows: int
    fixed: int
    ends: Sizes | None

    def between(self, start: int, end: int) -> int:
        """Bytes of the rows ``[start, end)``."""
        size = self.fixed * (end - start)
        if self.ends is not None and end > start:
            size += int(self.ends[end - 1]) - (int(self.ends[start - 1]) if start else 0)
        return size

    def reaching(self, size_bytes: int, start: int) -> int:
        """One past the row that brings those from ``start`` on to ``size_bytes``; ``rows`` when none does.

        Args:
            size_bytes: At least 1.
            start: Below ``rows``.
        """
        if self.ends is None:
            return self.rows if self.fixed == 0 else min(self.rows, start + -(-size_bytes // self.fixed))
        low, high = start, self.rows  # the sum of both parts grows with the row, so it is searched without an array
        while low < high:
            middle = (low + high) // 2
            if self.between(start, middle + 1) >= size_bytes:
                high = middle
            else:
                low = middle + 1
        return min(low + 1, self.rows)


def row_sizes(batch: pa.RecordBatch) -> RowSizes:
    """The sizes of all rows of a batch of plain types (``process.plain``).

    A schema without strings, binary, lists and maps costs nothing but a look at its types.
    """
    fixed, varying = 0, None
    for column in batch.columns:
        column_fixed, column_varying = _sizes(column)
        fixed += column_fixed
        varying = _sum(varying, column_varying)
    return RowSizes(batch.num_rows, fixed, None if varying is None else np.cumsum(varying, out=varying))


def _sizes(array: pa.Array) -> tuple[int, Sizes | None]:
    """What each value has, and int64[n] of what each has beyond that: nothing where it is null."""
    kind, types = array.type, pa.types
    if types.is_boolean(kind):
        return 1, None
    if types.is_string(kind) or types.is_binary(kind):
        return _OFFSET_BYTES, _shown(array, np.diff(raw_offsets(array, np.int32)).astype(np.int64))
    if types.is_list(kind) or types.is_map(kind):
        return _OFFSET_BYTES, _shown(array, _elements(array))
    if types.is_struct(kind):
        fixed, varying = 0, None
        for i in range(kind.num_fields):
            field_fixed, field_varying = _sizes(array.field(i))
            fixed += field_fixed
            varying = _sum(varying, field_varying)
        return fixed, None if varying is None else _shown(array, varying)
    if types.is_fixed_size_list(kind):
        n, length = len(array), kind.list_size
        fixed, varying = _sizes(array.values.slice(array.offset * length, n * length))
        if varying is None:
            return fixed * length, None
        return fixed * length, _shown(array, varying.reshape(n, length).sum(axis=1))
    try:
        return (0 if types.is_null(kind) else int(kind.bit_width) // 8), None
    except ValueError:
        return 0, None  # a type that canonical refuses, with a sentence


def _elements(array: pa.Array) -> Sizes:
    """Bytes of the elements of each list or map."""
    offsets = raw_offsets(array, np.int32).astype(np.int64)
    start, end = int(offsets[0]), int(offsets[-1])
    parts = (array.keys, array.items) if pa.types.is_map(array.type) else (array.values,)
    fixed, varying = 0, None
    for part in parts:
        part_fixed, part_varying = _sizes(part.slice(start, end - start))
        fixed += part_fixed
        varying = _sum(varying, part_varying)
    sizes: Sizes = np.diff(offsets) * fixed
    if varying is not None:
        sums = np.concatenate(([0], np.cumsum(varying)))
        sizes += np.diff(sums[offsets - start])
    return sizes


def _sum(one: Sizes | None, other: Sizes | None) -> Sizes | None:
    if one is None or other is None:
        return other if one is None else one
    one += other
    return one


def _shown(array: pa.Array, sizes: Sizes) -> Sizes:
    """``sizes``, with nothing where the value is null: what lies under it is not packed."""
    if array.null_count:
        sizes[array.is_null().to_numpy(zero_copy_only=False)] = 0
    return sizes
