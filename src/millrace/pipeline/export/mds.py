"""MDS, version 2: ``shard.00000.mds`` and so on, and ``index.json``, as mosaicml-streaming reads them.

==========================  =====================================================
column                      encoding
==========================  =====================================================
string                      str
binary                      bytes
integers, floats            intN, uintN, floatN
bool                        uint8
fixed-size list of numbers  ndarray:type:shape
decimal                     str_decimal
timestamp, date, time       str, ISO 8601
any other                   json, see ``values``
==========================  =====================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from millrace.core.errors import UsageError
from millrace.pipeline.export.staging import Parts, Staging, sync
from millrace.pipeline.export.values import as_numbers, is_numbers, json_text, json_values, numbers_shape

__all__ = ["MdsWriter", "mds_encoding"]

_OFFSET_MAX: Final = 2**32 - 1


def mds_encoding(kind: pa.DataType) -> str:
    """The encoding of a column of this type."""
    is_a = pa.types
    if is_a.is_string(kind) or is_a.is_large_string(kind) or (is_a.is_temporal(kind) and not is_a.is_duration(kind)):
        return "str"
    if is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_fixed_size_binary(kind):
        return "bytes"
    if is_a.is_integer(kind) or is_a.is_floating(kind):
        return str(np.dtype(kind.to_pandas_dtype()))
    if is_a.is_boolean(kind):
        return "uint8"
    if is_a.is_duration(kind):
        return "int64"
    if is_a.is_decimal(kind):
        return "str_decimal"
    if is_numbers(kind):
        dtype, shape = numbers_shape(kind)
        return f"ndarray:{dtype}:{','.join(map(str, shape))}"
    return "json"


def _size(kind: pa.DataType, encoding: str) -> int | None:
    if encoding.startswith("ndarray"):
        dtype, shape = numbers_shape(kind)
        return int(dtype.itemsize * np.prod(shape, dtype=object))
    return None if encoding in ("str", "bytes", "str_decimal", "json") else np.dtype(encoding).itemsize


class MdsWriter:
    """Writes shards. Holds one shard's samples, since a shard begins with where each of them lies."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None:
        """Write shards of at most ``shard_bytes``, or of one sample that is larger."""
        self._staging, self._parts = staging, Parts(staging, "shard.", ".mds")
        self._shard_bytes = min(shard_bytes, _OFFSET_MAX)
        # The library sorts columns by name, and reads them in the order that the config gives.
        self._order = sorted(range(len(schema)), key=lambda i: schema.field(i).name)
        self._fields = [schema.field(i) for i in self._order]
        self._encodings = [mds_encoding(f.type) for f in self._fields]
        sizes = [_size(f.type, e) for f, e in zip(self._fields, self._encodings, strict=True)]
        self._fixed = [size is not None for size in sizes]
        self._config: dict[str, Any] = {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": shard_bytes,
            "column_names": [f.name for f in self._fields],
            "column_encodings": self._encodings,
            "column_sizes": sizes,
        }
        self._head = json.dumps(self._config, sort_keys=True).encode()
        self._shards: list[dict[str, Any]] = []
        self._samples: list[bytes] = []
        self._held = self._least = 8 + len(self._head)
        self._row = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Add samples.

        Raises:
            UsageError: a column has a null, which MDS can't hold, or a sample is too large for it.
        """
        columns = [
            _encoded(batch.column(i), field, encoding, self._row)
            for i, field, encoding in zip(self._order, self._fields, self._encodings, strict=True)
        ]
        varying = [values for values, fixed in zip(columns, self._fixed, strict=True) if not fixed]
        for i in range(batch.num_rows):
            sizes = b"".join(len(values[i]).to_bytes(4, "little") for values in varying)
            sample = sizes + b"".join(values[i] for values in columns)
            if self._least + 4 + len(sample) > _OFFSET_MAX:
                raise UsageError(f"row {self._row + i} is larger than an MDS shard can be (4 GB); export to parquet")
            if self._samples and self._held + 4 + len(sample) > self._shard_bytes:
                self._flush()
            self._samples.append(sample)
            self._held += 4 + len(sample)
        self._row += batch.num_rows

    def finish(self) -> None:
        """Write what is held, and the index."""
        if self._samples:
            self._flush()
        path = self._staging.new("index.json")
        path.write_text(json.dumps({"version": 2, "shards": self._shards}, sort_keys=True))
        sync(path)

    def abandon(self) -> None:
        """Let go of everything."""
        self._samples = []
        self._parts.abandon()

    def _flush(self) -> None:
        count = len(self._samples)
        first = 4 + 4 * (count + 1) + len(self._head)
        offsets = np.cumsum([first, *map(len, self._samples)], dtype=np.int64)
        handle = self._parts.current()
        handle.write(count.to_bytes(4, "little") + offsets.astype("<u4").tobytes() + self._head)
        handle.writelines(self._samples)
        self._parts.seal()
        raw = {"basename": self._staging.files[-1], "bytes": int(offsets[-1]), "hashes": {}}
        self._shards.append({**self._config, "samples": count, "raw_data": raw, "zip_data": None})
        self._samples, self._held = [], self._least


def _encoded(column: pa.Array, field: pa.Field, encoding: str, row: int) -> Sequence[bytes | memoryview]:
    if column.null_count:
        at = row + column.is_null().to_pylist().index(True)
        raise UsageError(
            f"column {field.name!r} has a null in row {at}, which MDS can't hold; fill or drop such rows with a "
            "transform, or export to parquet"
        )
    kind = field.type
    if encoding.startswith("ndarray"):
        numbers = as_numbers(column, field.name)
        return [row.tobytes() for row in numbers.astype(numbers.dtype.newbyteorder("<"), copy=False)]
    if encoding == "bytes":
        return [memoryview(v.as_buffer()) for v in column]
    if encoding == "json":
        return [json_text(v).encode() for v in json_values(column, kind)]
    if encoding in ("str", "str_decimal"):
        return [v.encode() for v in json_values(column, kind)]
    if pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    if pa.types.is_duration(kind):
        column = column.cast(pa.int64())
    data = column.to_numpy(zero_copy_only=False).astype(np.dtype(encoding).newbyteorder("<"), copy=False).tobytes()
    size = np.dtype(encoding).itemsize
    return [data[i : i + size] for i in range(0, len(data), size)]
