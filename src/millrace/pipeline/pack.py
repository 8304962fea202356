"""pack: record batches in, shards out. Here identity becomes a digest.

A shard is an Arrow IPC file. Its bytes are gathered as the pieces Arrow hands out, most of them views of the
records' own memory, so a shard is hashed and written without being copied together first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from millrace.core.errors import TransformError
from millrace.core.model import Block, Digest, Shard, block_digest
from millrace.core.spec import Shards
from millrace.pipeline.canonical import canonical
from millrace.pipeline.process.plain import plain_batch
from millrace.pipeline.rowsize import row_sizes

__all__ = ["PackedShard", "pack"]

_MAGIC = b"ARROW1\0\0"
_JOIN_BELOW_BYTES = 4096
"""Pieces smaller than this are copied together: a system call a padding byte costs more."""


@dataclass(frozen=True, slots=True)
class PackedShard:
    """A shard and its bytes: ``pieces``, concatenated, are what the digest names."""

    shard: Shard
    pieces: tuple[memoryview, ...]


def pack(batches: Iterable[pa.RecordBatch], shards: Shards) -> Iterator[PackedShard]:
    """Cut ``batches`` into blocks and blocks into shards.

    A block is closed by its ``shards.block_rows``-th row or by the one that brings it to ``shards.block_size`` bytes,
    whichever comes first; see ``rowsize`` for what a row's size is. A shard is closed by the first block that brings
    it to ``shards.size`` bytes. All batches have one schema; it is packed as its plain one. Equal records in an equal
    order have equal bytes, however the batches were cut.

    Raises:
        TransformError: the schema changes between batches, or a type has no plain form; names the column.
    """
    writer: _ShardWriter | None = None
    for block in _blocks((plain_batch(b) for b in batches), shards):
        if writer is None:
            writer = _ShardWriter(block.schema, shards.compression)
        writer.write(canonical(block))
        if writer.size_bytes >= shards.size:
            yield writer.close()
            writer = None
    if writer is not None:
        yield writer.close()


def _blocks(batches: Iterable[pa.RecordBatch], shards: Shards) -> Iterator[pa.RecordBatch]:
    """One batch a block; slices where one batch suffices, copies only across batch borders."""
    pending: list[pa.RecordBatch] = []
    rows = size = 0
    schema: pa.Schema | None = None
    for batch in batches:
        if schema is None:
            schema = batch.schema
        elif not batch.schema.equals(schema):
            raise TransformError(_difference(schema, batch.schema))
        sizes = row_sizes(batch)
        start = 0
        while start < batch.num_rows:
            end = min(start + shards.block_rows - rows, sizes.reaching(shards.block_size - size, start))
            pending.append(batch.slice(start, end - start))
            rows += end - start
            size += sizes.between(start, end)
            start = end
            if rows == shards.block_rows or size >= shards.block_size:
                yield _join(pending)
                pending, rows, size = [], 0, 0
    if rows:
        yield _join(pending)


def _join(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _difference(first: pa.Schema, other: pa.Schema) -> str:
    if first.names != other.names:
        return f"the columns change within one chunk: first {', '.join(first.names)}, then {', '.join(other.names)}"
    for a, b in zip(first, other, strict=True):
        if a.type != b.type:
            return f"column {a.name!r} changes its type within one chunk: first {a.type}, then {b.type}"
    return "whether a column may be null changes within one chunk"


class _Pieces:
    """A sink for Arrow's writer that keeps the buffers it is given, in order, and counts."""

    def __init__(self, header_bytes: int) -> None:
        self.pieces: list[memoryview] = []
        self.size_bytes = 0
        self.closed = False
        self._small = bytearray()
        self._header_bytes = header_bytes

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if len(view) < _JOIN_BELOW_BYTES:
            self._small += view
        else:
            self.flush()
            self.pieces.append(view)
        self.size_bytes += len(view)
        if self.size_bytes == self._header_bytes:
            self.flush()  # the first block begins here, in a piece of its own
        return len(view)

    def flush(self) -> None:
        if self._small:
            self.pieces.append(memoryview(bytes(self._small)))
            self._small.clear()

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class _ShardWriter:
    """One shard in the making: bytes, digest and block index."""

    def __init__(self, schema: pa.Schema, compression: str) -> None:
        # Arrow writes the magic and the schema together with the first batch, so where that one begins is computed.
        self._header_bytes = len(_MAGIC) + schema.serialize().size
        self._sink = _Pieces(self._header_bytes)
        self._file = pa.PythonFile(self._sink, mode="w")
        options = pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression, use_threads=False)
        self._writer = pa.ipc.new_file(self._file, schema, options=options)
        self._digest = hashlib.sha256()
        self._hashed = 0
        self._blocks: list[Block] = []
        self._rows = 0

    @property
    def size_bytes(self) -> int:
        return self._sink.size_bytes

    def write(self, block: pa.RecordBatch) -> None:
        start = self._sink.size_bytes or self._header_bytes
        self._writer.write_batch(block)
        self._sink.flush()
        digest = block_digest(*self._hash_new()[0 if self._blocks else 1 :])
        length = self._sink.size_bytes - start
        self._blocks.append(Block(start, length, block.num_rows, digest))
        self._rows += block.num_rows

    def close(self) -> PackedShard:
        self._writer.close()
        self._sink.flush()
        self._hash_new()
        shard = Shard(Digest(self._digest.hexdigest()), self._sink.size_bytes, self._rows, tuple(self._blocks))
        return PackedShard(shard, tuple(self._sink.pieces))

    def _hash_new(self) -> list[memoryview]:
        new = self._sink.pieces[self._hashed :]
        for piece in new:
            self._digest.update(piece)
        self._hashed = len(self._sink.pieces)
        return new
