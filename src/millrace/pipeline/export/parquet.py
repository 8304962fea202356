"""Parquet files: ``part-00000.parquet`` and so on, zstd unless said otherwise."""

from __future__ import annotations

import contextlib

import pyarrow as pa
import pyarrow.parquet as pq

from millrace.pipeline.export.staging import Parts, Staging

__all__ = ["ParquetWriter"]

_GROUP_BYTES = 32_000_000


class ParquetWriter:
    """Gathers batches into row groups of about 32 MB, and row groups into files."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None:
        """Write files of about ``shard_bytes``, counted as compressed."""
        self._parts = Parts(staging, "part-", ".parquet")
        self._schema, self._compression = schema, compression
        self._shard_bytes, self._group_bytes = shard_bytes, min(_GROUP_BYTES, shard_bytes)
        self._writer: pq.ParquetWriter | None = None
        self._written = False
        self._batches: list[pa.RecordBatch] = []
        self._held = 0

    def write(self, batch: pa.RecordBatch) -> None:
        """Add records; holds at most a row group."""
        self._batches.append(batch)
        self._held += batch.nbytes
        if self._held >= self._group_bytes:
            self._flush()

    def finish(self) -> None:
        """Write what is held; a dataset without rows is one file without rows."""
        if self._batches or not self._written:
            self._flush()
        self._seal()

    def abandon(self) -> None:
        """Let go of everything."""
        writer, self._writer, self._batches = self._writer, None, []
        if writer is not None:
            with contextlib.suppress(OSError, ValueError):
                writer.close()
        self._parts.abandon()

    def _flush(self) -> None:
        table = pa.Table.from_batches(self._batches, schema=self._schema)
        handle = self._parts.current()
        if self._writer is None:
            self._writer = pq.ParquetWriter(handle, self._schema, compression=self._compression)
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        self._written, self._batches, self._held = True, [], 0
        if handle.tell() >= self._shard_bytes:
            self._seal()

    def _seal(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._parts.seal()
