"""``files``: opaque bytes in pieces of 8,000,000, which an export puts together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.objects import path_column
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["FILES", "FILES_SCHEMA", "PIECE_BYTES", "FilesFormat"]

PIECE_BYTES: Final = 8_000_000
"""Bytes of every piece but a file's last. A constant: it is part of what a dataset's digest stands for."""
_BATCH_PIECES: Final = 8

FILES_SCHEMA: Final = pa.schema(
    [("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("data", pa.binary())]
)


class FilesFormat:
    """Each record is a piece of a file: ``path``, ``offset`` in it, ``size`` of the whole file, and ``data``.

    An empty file is one record with empty ``data``. Nothing is decompressed, and ``max_record`` doesn't apply.
    """

    name = "files"
    position = "byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Between pieces."""
        return [*range(0, obj.size_bytes, PIECE_BYTES), obj.size_bytes]

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path``, ``offset``, ``size`` and ``data``."""
        return FILES_SCHEMA

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """See :class:`millrace.pipeline.records.Format`.

        A batch is at most 8 pieces: of one large file, all in the buffer they were read into, or of small files.
        """
        if chunk.is_range:
            yield from _large(chunk, context, 0, chunk.start, chunk.end)
            return
        at = 0
        while at < len(chunk.objects):
            end = at
            while end < len(chunk.objects) and chunk.objects[end].size_bytes <= PIECE_BYTES:
                end += 1
            if end > at:
                yield from _small(chunk, context, at, end)
                at = end
            else:
                yield from _large(chunk, context, at, 0, chunk.objects[at].size_bytes)
                at += 1


def _large(chunk: Chunk, context: ReadContext, index: int, start: int, end: int) -> Iterator[Records]:
    """Pieces of one file, as slices of what one read gave."""
    for at in range(start, end, PIECE_BYTES * _BATCH_PIECES):
        length = min(PIECE_BYTES * _BATCH_PIECES, end - at)
        data = context.reads.read(chunk.objects[index], at, length)
        inner = np.append(np.arange(0, length, PIECE_BYTES), length).astype(np.int32)
        buffers = [None, pa.py_buffer(inner), pa.py_buffer(data)]
        column = pa.BinaryArray.from_buffers(pa.binary(), len(inner) - 1, buffers)
        yield _records(chunk, np.full(len(inner) - 1, index, np.int32), at + inner[:-1].astype(np.int64), column)
        del data, buffers, column


def _small(chunk: Chunk, context: ReadContext, first: int, end: int) -> Iterator[Records]:
    """Whole files of one piece each."""
    pieces: list[memoryview] = []
    at, held = first, 0
    for _, data in context.reads.read_whole(chunk.objects[first:end]):
        pieces.append(data)
        held += len(data)
        if len(pieces) == _BATCH_PIECES or held >= context.batch_bytes:
            yield _whole(chunk, at, pieces)
            at, held = at + len(pieces), 0
            pieces = []
    if pieces:
        yield _whole(chunk, at, pieces)


def _whole(chunk: Chunk, first: int, pieces: list[memoryview]) -> Records:
    rows = np.arange(first, first + len(pieces), dtype=np.int32)
    return _records(chunk, rows, np.zeros(len(pieces), np.int64), pa.array(pieces, pa.binary()))


def _records(chunk: Chunk, rows: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], data: pa.Array) -> Records:
    sizes = pa.array([chunk.objects[i].size_bytes for i in rows.tolist()], pa.int64())
    columns = [path_column(chunk.objects, rows), pa.array(offsets), sizes, data]
    return Records(pa.record_batch(columns, schema=FILES_SCHEMA), rows, offsets)


FILES: Final = FilesFormat()
