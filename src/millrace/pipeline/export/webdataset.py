"""WebDataset tars: ``part-00000.tar`` and so on, a member ``key.extension`` for each value that isn't null.

=========================  =========================================
column                     member
=========================  =========================================
``__key__``                the key; without it, the row's number in nine digits
binary                     ``.column``
string                     ``.column.txt``
fixed-size list of numbers ``.column.npy``
any other                  ``.column.json``, see ``values``
=========================  =========================================
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from millrace.core.errors import UsageError
from millrace.pipeline.export.staging import Parts, Staging
from millrace.pipeline.export.values import as_numbers, is_numbers, json_text, json_values, numbers_shape
from millrace.pipeline.formats.tarheader import BLOCK, file_header
from millrace.pipeline.formats.webdataset import KEY, split_name, unsafe_name

__all__ = ["WebDatasetWriter", "member_extension"]

Bytes = bytes | memoryview


def member_extension(field: pa.Field) -> str:
    """What a column's members end in, without the first dot."""
    if _is_binary(field.type):
        return str(field.name)
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return f"{field.name}.txt"
    return f"{field.name}.npy" if is_numbers(field.type) else f"{field.name}.json"


class WebDatasetWriter:
    """Writes samples. Headers carry no time and no owner, so the same rows make the same bytes."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None:
        """Write tars of about ``shard_bytes``.

        Raises:
            UsageError: a column's name can't be an extension, or the keys aren't strings.
        """
        self._parts = Parts(staging, "part-", ".tar")
        self._schema, self._shard_bytes = schema, shard_bytes
        self._row = self._size = 0
        self._last_key = ""
        seen: dict[str, str] = {}
        for field in schema:
            if field.name == KEY:
                if not (pa.types.is_string(field.type) or pa.types.is_large_string(field.type)):
                    raise UsageError(f"column {KEY!r} is {field.type}, but keys of samples are strings; cast it")
                continue
            extension = member_extension(field)
            if split_name(f"key.{extension}") != ("key", extension) or "\0" in extension:
                raise UsageError(
                    f"column {field.name!r} can't be an extension of a tar's members; rename it with a transform"
                )
            # Readers fold the case of extensions.
            if extension.lower() in seen:
                raise UsageError(
                    f"columns {seen[extension.lower()]!r} and {field.name!r} would both be members .{extension}; "
                    "rename one of them with a transform"
                )
            seen[extension.lower()] = field.name

    def write(self, batch: pa.RecordBatch) -> None:
        """Add samples.

        Raises:
            UsageError: a key can't be the name of a sample, follows itself, or a row has no value at all.
        """
        names = batch.schema.names
        keys = batch.column(names.index(KEY)).to_pylist() if KEY in names else None
        columns = [
            (member_extension(field), _values(column, field))
            for field, column in zip(self._schema, batch.columns, strict=True)
            if field.name != KEY
        ]
        for i in range(batch.num_rows):
            key = f"{self._row:09}" if keys is None else self._checked(keys[i])
            members = [(extension, values[i]) for extension, values in columns]
            self._sample(key, [(extension, value) for extension, value in members if value is not None])
            self._row, self._last_key = self._row + 1, key

    def finish(self) -> None:
        """End the tar being written."""
        if self._parts.handle is not None:
            self._parts.handle.write(bytes(2 * BLOCK))
        self._parts.seal()
        self._size = 0

    def abandon(self) -> None:
        """Let go of everything."""
        self._parts.abandon()

    def _checked(self, key: str | None) -> str:
        way_out = f"write another {KEY!r} with a transform, or leave the column out"
        if key is None or split_name(f"{key}.x") != (key, "x") or unsafe_name(key):
            raise UsageError(f"row {self._row}: {key!r} can't be the key of a WebDataset sample; {way_out}")
        if key == self._last_key:
            raise UsageError(f"row {self._row}: key {key!r} is that of the row before, so both would be one; {way_out}")
        return key

    def _sample(self, key: str, members: Sequence[tuple[str, Bytes]]) -> None:
        if not members:
            raise UsageError(f"row {self._row} has no value in any column, so it would not be a sample; drop such rows")
        handle = self._parts.current()
        for extension, value in members:
            head = file_header(f"{key}.{extension}", len(value))
            padding = bytes(-len(value) % BLOCK)
            handle.writelines((head, value, padding))
            self._size += len(head) + len(value) + len(padding)
        if self._size >= self._shard_bytes:
            self.finish()


def _is_binary(kind: pa.DataType) -> bool:
    is_a = pa.types
    return bool(is_a.is_binary(kind) or is_a.is_large_binary(kind) or is_a.is_fixed_size_binary(kind))


def _values(column: pa.Array, field: pa.Field) -> list[Bytes | None]:
    if _is_binary(field.type):
        return [memoryview(v.as_buffer()) if v.is_valid else None for v in column]
    if is_numbers(field.type):
        dtype, shape = numbers_shape(field.type)
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        rows = as_numbers(column, field.name)
        return _present(column, lambda i: head.getvalue() + rows[i].tobytes())
    if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
        return [None if v is None else v.encode() for v in column.to_pylist()]
    return [None if v is None else json_text(v).encode() for v in json_values(column, field.type)]


def _present(column: pa.Array, value: Callable[[int], Any]) -> list[Bytes | None]:
    valid = column.is_valid().to_pylist()
    return [value(i) if valid[i] else None for i in range(len(column))]
