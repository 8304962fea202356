"""The sampled second run: the same input must give the same output, bit for bit."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.types as pt

from millrace.core.errors import Nondeterministic
from millrace.pipeline.process.rows import ProcessContext, Rows

__all__ = ["difference", "require_same"]

_BITS: Final = {16: pa.int16(), 32: pa.int32(), 64: pa.int64()}


def require_same(first: pa.RecordBatch, second: pa.RecordBatch, *, label: str, rows: Rows, ctx: ProcessContext) -> None:
    """That two outputs for the input ``rows`` are the same.

    Raises:
        Nondeterministic: they differ; the message names the transform, the column, the row and the input.
    """
    found = difference(first, second)
    if found is None:
        return
    path, position = ctx.place(rows.origins, 0)
    start = f"{position} of {path}" if position else path
    raise Nondeterministic(
        f"{label} gives different output for the same input: {found} of the batch that starts at {start}; "
        "use no clock, dice, hash order or state in a transform"
    )


def difference(first: pa.RecordBatch, second: pa.RecordBatch) -> str | None:
    """Where two batches differ first (``column 'text', row 3``), or None."""
    if first.schema.names != second.schema.names:
        return (
            f"the columns are {', '.join(first.schema.names)} once and {', '.join(second.schema.names)} the next time"
        )
    for field, other in zip(first.schema, second.schema, strict=True):
        if field.type != other.type:
            return f"column {field.name!r} is {field.type} once and {other.type} the next time"
    if first.num_rows != second.num_rows:
        return f"there are {first.num_rows} rows once and {second.num_rows} the next time"
    rows = [
        (row, name)
        for name, a, b in zip(first.schema.names, first.columns, second.columns, strict=True)
        if (row := _first_difference(a, b)) is not None
    ]
    if not rows:
        return None
    row, name = min(rows, key=lambda found: found[0])
    return f"column {name!r}, row {row}"


def _first_difference(a: pa.Array, b: pa.Array) -> int | None:
    if pt.is_floating(a.type):
        # By their bits: NaN is the same as NaN, and 0.0 is not -0.0, because a digest sees bits.
        bits = _BITS[a.type.bit_width]
        a, b = a.view(bits), b.view(bits)
    if a.equals(b):
        return None
    low, high = 0, len(a)
    if not pt.is_nested(a.type):
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if not a[low:middle].equals(b[low:middle]) else (middle, high)
        return low
    # Nested values may hold NaN, which Arrow holds to differ from itself.
    return next((i for i in range(high) if repr(a[i].as_py()) != repr(b[i].as_py())), None)
