"""Exporters: record batches into a directory of files of another format, which appears whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa

from millrace.core.errors import UsageError
from millrace.pipeline.export.files import FilesWriter
from millrace.pipeline.export.jsonl import JsonlWriter
from millrace.pipeline.export.mds import MdsWriter
from millrace.pipeline.export.parquet import ParquetWriter
from millrace.pipeline.export.staging import Staging
from millrace.pipeline.export.webdataset import WebDatasetWriter
from millrace.pipeline.formats.tabular import conform, plain_type

__all__ = ["EXPORT_FORMATS", "SHARD_BYTES", "Exporter", "open_exporter"]

SHARD_BYTES: Final = 64_000_000
"""A file is closed at the first record, batch or row group that reaches this size."""


class _Writer(Protocol):
    """Writes records into a staging directory."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None: ...

    def write(self, batch: pa.RecordBatch) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...


_WRITERS: Final[Mapping[str, tuple[type[_Writer], tuple[str, ...]]]] = {
    "parquet": (ParquetWriter, ("zstd", "none", "snappy", "gzip", "lz4")),
    "webdataset": (WebDatasetWriter, ("none",)),
    "mds": (MdsWriter, ("none",)),
    "jsonl": (JsonlWriter, ("none", "gzip", "zstd")),
    "files": (FilesWriter, ("none",)),
}
EXPORT_FORMATS: Final[tuple[str, ...]] = tuple(_WRITERS)


class Exporter:
    """Writes record batches of one schema. Its methods block; call them from one thread at a time."""

    def __init__(self, staging: Staging, writer: _Writer, schema: pa.Schema) -> None:
        """Use :func:`open_exporter`."""
        self._staging, self._writer, self._schema = staging, writer, schema

    def write(self, batch: pa.RecordBatch) -> None:
        """Add records, in order.

        Raises:
            UsageError: the format can't hold a value; names the column or row and the way out.
            StoreError: the disk refuses.
        """
        if batch.num_rows:
            with self._staging.on_disk():
                self._writer.write(conform(batch, self._schema))

    def close(self) -> tuple[str, ...]:
        """Finish the files, make them durable and give the directory its name.

        Returns:
            The files, relative to the directory, in the order they were begun.

        Raises:
            MillraceError: as ``write``; the directory then doesn't appear, and ``abort`` takes away what was written.
        """
        with self._staging.on_disk():
            self._writer.finish()
        return self._staging.publish()

    def abort(self) -> None:
        """Take away what was written. May be called at any time, also after ``close`` has failed."""
        self._writer.abandon()
        self._staging.discard()


def open_exporter(
    format: str,
    directory: Path,
    schema: pa.Schema,
    *,
    shard_bytes: int = SHARD_BYTES,
    compression: str | None = None,
) -> Exporter:
    """An exporter into ``directory``, which must be absent or empty.

    Args:
        format: One of ``EXPORT_FORMATS``.
        directory: Appears when the exporter is closed.
        schema: Of every batch. Dictionary-encoded columns and the like are written as their plain types.
        shard_bytes: About how large a file gets, in bytes; ``files`` keeps the sizes it was given.
        compression: One that the format offers; None means its default (zstd for parquet, else none).

    Raises:
        UsageError: no such format or compression, the directory isn't free, or the format can't hold the schema.
        StoreError: the disk refuses.
    """
    if format not in _WRITERS:
        raise UsageError(f"there is no export format {format!r}; there are {', '.join(EXPORT_FORMATS)}")
    kind, codecs = _WRITERS[format]
    codec = codecs[0] if compression is None else compression
    if codec not in codecs:
        raise UsageError(f"{format} can't be exported with compression {codec!r}; it offers {', '.join(codecs)}")
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise UsageError(f"there is more than one column {twice[0]!r}; rename one of them with a transform")
    plain = pa.schema([pa.field(f.name, plain_type(f.type)) for f in schema])
    staging = Staging(directory)
    try:
        with staging.on_disk():
            return Exporter(staging, kind(staging, plain, shard_bytes, codec), plain)
    except BaseException:
        staging.discard()
        raise
