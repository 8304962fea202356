"""JSON Lines: ``part-00000.jsonl`` and so on, an object a line. See ``values`` for how each type is written."""

from __future__ import annotations

import contextlib

import pyarrow as pa

from millrace.pipeline.export.staging import Parts, Staging
from millrace.pipeline.export.values import json_text, json_values

__all__ = ["JsonlWriter"]

_ENDINGS = {"none": ".jsonl", "gzip": ".jsonl.gz", "zstd": ".jsonl.zst"}


class JsonlWriter:
    """Writes each batch as lines; a null is written as null, so that every line has every key."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None:
        """Write files of about ``shard_bytes``, counted as they lie on the disk."""
        self._parts = Parts(staging, "part-", _ENDINGS[compression])
        self._schema, self._shard_bytes, self._compression = schema, shard_bytes, compression
        self._stream: pa.NativeFile | None = None
        self._parts.current()

    def write(self, batch: pa.RecordBatch) -> None:
        """Add records."""
        names = self._schema.names
        columns = [json_values(c, f.type) for c, f in zip(batch.columns, self._schema, strict=True)]
        lines = [json_text(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
        handle = self._parts.current()
        data = ("\n".join(lines) + "\n").encode() if lines else b""
        if self._compression == "none":
            handle.write(data)
        else:
            if self._stream is None:
                self._stream = pa.CompressedOutputStream(pa.PythonFile(handle, mode="w"), self._compression)
            self._stream.write(data)
        if handle.tell() >= self._shard_bytes:
            self.finish()

    def finish(self) -> None:
        """Close the file being written."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
        self._parts.seal()

    def abandon(self) -> None:
        """Let go of everything."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
        self._parts.abandon()
