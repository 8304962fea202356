"""Arrow values for formats that know fewer types: as JSON, and as arrays of numbers.

As JSON: binary is ``{"base64": "..."}``, times are ISO 8601 with all the digits of their unit (and ``Z`` when they have
a zone, since Arrow keeps those in UTC), decimals are strings, durations whole numbers of their unit, maps lists of
pairs, and the floats that JSON lacks the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import UsageError
from millrace.pipeline.formats.tabular import renamed

__all__ = ["as_numbers", "is_numbers", "json_text", "json_values", "numbers_shape"]

_EPOCH: Final = datetime(1970, 1, 1)
_PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_DIGITS: Final = {"s": 0, "ms": 3, "us": 6, "ns": 9}


def json_text(value: object) -> str:
    """A JSON value as text: no spaces, UTF-8 as it is."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    """A column of plain type ``kind`` as JSON values, null as None."""
    bare = pa.schema([pa.field("v", _bare(kind))])
    values = renamed(pa.RecordBatch.from_arrays([column], names=["v"]), bare).column(0).to_pylist()
    turn = _turn(kind)
    return values if turn is None else [None if v is None else turn(v) for v in values]


def _bare(kind: pa.DataType) -> pa.DataType:
    """The integers that times are stored as, at any depth: Python's own times lose nanoseconds."""
    if (
        pa.types.is_timestamp(kind)
        or pa.types.is_duration(kind)
        or pa.types.is_time64(kind)
        or pa.types.is_date64(kind)
    ):
        return pa.int64()
    if pa.types.is_date32(kind) or pa.types.is_time32(kind):
        return pa.int32()
    if pa.types.is_map(kind):
        return pa.map_(_bare(kind.key_type), _bare(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_bare(kind.value_type), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(_bare(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(_bare(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, _bare(f.type)) for f in kind])
    return kind


def _turn(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """From what ``to_pylist`` gives to JSON, for values that aren't None; None where they are JSON already."""
    is_a = pa.types
    if is_a.is_nested(kind):
        return _turn_nested(kind)
    if is_a.is_floating(kind):
        return _float
    if is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_fixed_size_binary(kind):
        return lambda v: {"base64": base64.b64encode(v).decode()}
    if is_a.is_timestamp(kind):
        return lambda v: _timestamp(v, kind.unit, kind.tz)
    if is_a.is_date(kind):
        days = 1 if is_a.is_date32(kind) else 86_400_000
        return lambda v: _timestamp(v // days * 86_400, "s", None)[:10]
    if is_a.is_time(kind):
        return lambda v: _timestamp(v, kind.unit, None)[11:]
    if is_a.is_decimal(kind) or is_a.is_interval(kind):
        return str
    return None


def _turn_nested(kind: pa.DataType) -> Callable[[Any], Any] | None:
    if pa.types.is_struct(kind):
        turns = {f.name: _turn(f.type) or _same for f in kind}
        return lambda v: {name: None if v[name] is None else turn(v[name]) for name, turn in turns.items()}
    if pa.types.is_map(kind):
        key, item = _turn(kind.key_type) or _same, _turn(kind.item_type) or _same
        return lambda v: [[key(k), None if x is None else item(x)] for k, x in v]
    inner = _turn(kind.value_type)
    return None if inner is None else lambda v: [None if x is None else inner(x) for x in v]


def _same(value: Any) -> Any:
    return value


def _float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _timestamp(value: int, unit: str, tz: str | None) -> str:
    seconds, part = divmod(value, _PER_SECOND[unit])
    try:
        text = (_EPOCH + timedelta(seconds=seconds)).isoformat()
    except OverflowError as err:
        raise UsageError(
            f"a time {value} {unit} from 1970 lies outside the years 1 to 9999 and has no ISO 8601 form; "
            "cast the column to an integer first, or export to parquet"
        ) from err
    digits = _DIGITS[unit]
    return text + (f".{part:0{digits}}" if digits else "") + ("Z" if tz else "")


def is_numbers(kind: pa.DataType) -> bool:
    """Whether a column is arrays of numbers of one shape: fixed-size lists, nested or not."""
    if not pa.types.is_fixed_size_list(kind) or kind.list_size < 1:
        return False
    inner = kind.value_type
    return bool(pa.types.is_integer(inner) or pa.types.is_floating(inner)) or is_numbers(inner)


def numbers_shape(kind: pa.DataType) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """(dtype, shape) of one value of such a column."""
    shape = []
    while pa.types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return np.dtype(kind.to_pandas_dtype()), tuple(shape)


def as_numbers(column: pa.Array, name: str) -> npt.NDArray[Any]:
    """Such a column as one array of shape (rows, *shape), without a copy; rows that are null hold anything.

    Raises:
        UsageError: there is a null inside an array; names the column.
    """
    dtype, shape = numbers_shape(column.type)
    rows, inside, values = len(column), column, column
    while pa.types.is_fixed_size_list(values.type):
        size = values.type.list_size
        # flatten leaves out what lies under a null row, where a null means nothing.
        inside = inside.flatten()
        if inside.null_count:
            raise UsageError(
                f"column {name!r} has a null inside an array, which this format can't hold; fill it with a transform, "
                "or export to parquet"
            )
        values = values.values.slice(values.offset * size, len(values) * size)
    if values.null_count:
        values = values.fill_null(0)
    flat: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return flat.astype(dtype, copy=False).reshape(rows, *shape)
