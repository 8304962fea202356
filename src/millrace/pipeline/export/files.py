"""The original files of a ``files`` dataset, put together from their pieces, byte for byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pyarrow as pa

from millrace.core.errors import PolicyRefused, SourceError, UsageError
from millrace.pipeline.export.staging import Staging, sync

__all__ = ["FilesWriter"]

_COLUMNS: Final = ("path", "offset", "size", "data")


class FilesWriter:
    """Writes pieces to their places, in whatever order they come; every byte must come exactly once."""

    def __init__(self, staging: Staging, schema: pa.Schema, shard_bytes: int, compression: str) -> None:
        """Write files under their own paths.

        Raises:
            UsageError: the dataset isn't one of ``files``.
        """
        if sorted(schema.names) != sorted(_COLUMNS):
            raise UsageError(
                f"this dataset has the columns {', '.join(schema.names)}; only a dataset made from a source with "
                "'format: files' can be exported as files, so export it as parquet or jsonl"
            )
        self._staging = staging
        self._pieces: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self._done: set[str] = set()
        self._open: tuple[str, int] | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        """Add pieces.

        Raises:
            PolicyRefused: a path leads out of the directory.
            SourceError: a piece overlaps another, lies outside its file, or the file's size isn't always the same.
        """
        paths, offsets, sizes = (batch.column(name).to_pylist() for name in _COLUMNS[:3])
        for path, offset, size, data in zip(paths, offsets, sizes, batch.column("data"), strict=True):
            if path is None or offset is None or size is None or not data.is_valid:
                raise SourceError(f"a piece of file {path!r} has a null; the dataset isn't one of files")
            self._piece(path, offset, size, memoryview(data.as_buffer()))

    def finish(self) -> None:
        """Check that every file is whole.

        Raises:
            SourceError: bytes of a file are in no record; names it and the first of them.
        """
        self._let_go()
        for path, (size, spans) in self._pieces.items():
            at = spans[0][1] if spans and spans[0][0] == 0 else 0
            raise SourceError(
                f"{path}: the bytes from {at} on are in no record, of {size} in all; nothing was exported"
            )

    def abandon(self) -> None:
        """Let go of everything."""
        self._let_go()

    def _piece(self, path: str, offset: int, size: int, data: memoryview) -> None:
        if path not in self._pieces:
            if path in self._done:
                raise SourceError(f"{path}: the same bytes are in two records; nothing was exported")
            self._create(path)
            self._pieces[path] = (size, [])
        known, spans = self._pieces[path]
        end = offset + len(data)
        if known != size or offset < 0 or end > size:
            raise SourceError(f"{path}: a piece at {offset} of {len(data)} bytes doesn't fit a file of {known}")
        if any(offset < b and a < end for a, b in spans) or (len(data) == 0 and size):
            raise SourceError(f"{path}: the same bytes are in two records; nothing was exported")
        self._write(path, offset, data)
        spans = _joined([*spans, (offset, end)])
        self._pieces[path] = (size, spans)
        if spans == [(0, size)]:
            del self._pieces[path]
            self._done.add(path)
            self._let_go()
            sync(self._staging.path / path)

    def _create(self, path: str) -> None:
        parts = path.split("/")
        if "\0" in path or any(part in ("", ".", "..") for part in parts):
            raise PolicyRefused(
                f"{path!r} is not a relative path inside the directory, so it is not written", rule="safe paths"
            )
        try:
            self._staging.new(path).touch(exist_ok=False)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as err:
            raise SourceError(f"{path}: another file of the dataset is a folder of this name, or the reverse") from err

    def _write(self, path: str, offset: int, data: memoryview) -> None:
        if self._open is None or self._open[0] != path:
            self._let_go()
            self._open = (path, os.open(Path(self._staging.path, path), os.O_WRONLY))
        while len(data):
            written = os.pwrite(self._open[1], data, offset)
            data, offset = data[written:], offset + written

    def _let_go(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for a, b in sorted(spans):
        if out and out[-1][1] == a:
            out[-1] = (out[-1][0], b)
        else:
            out.append((a, b))
    return out
