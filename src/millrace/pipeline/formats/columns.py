"""The column types a user may name for ``csv`` and ``jsonl``, and reading times the same way in both."""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["COLUMN_TYPES", "JSON_TYPE", "TIME_TYPE", "to_times", "type_word"]

JSON_TYPE: Final = pa.large_string()
"""JSON text. ``large_string`` holds nothing else, so that a schema tells it from a column of strings."""

TIME_TYPE: Final = pa.timestamp("us", tz="UTC")

COLUMN_TYPES: Final[dict[str, pa.DataType]] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "double": pa.float64(),
    "bool": pa.bool_(),
    "json": JSON_TYPE,
    "timestamp": TIME_TYPE,
    "binary": pa.binary(),
}

_ZONE: Final = r"[T ]\d\d.*(Z|[+-]\d\d(:?\d\d)?)$"


def type_word(kind: pa.DataType) -> str:
    """What a user calls an Arrow type."""
    return next((word for word, known in COLUMN_TYPES.items() if known == kind), str(kind))


def to_times(texts: pa.Array) -> pa.Array:
    """ISO 8601 texts as UTC times of microseconds. A text without a zone is in UTC; null stays null.

    Raises:
        pyarrow.ArrowInvalid: a text is not a time.
    """
    zoned = pc.match_substring_regex(texts, _ZONE)
    with_zone = pc.if_else(zoned, texts, None).cast(TIME_TYPE)
    without = pc.if_else(zoned, None, texts).cast(pa.timestamp("us"))
    return pc.coalesce(with_zone, pc.assume_timezone(without, "UTC"))
