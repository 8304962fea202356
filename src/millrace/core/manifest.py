"""A dataset version's manifest: a small root, and segments that are loaded as they are needed.

::

    root (JSON)        schema, counts, and for each segment its digests and counts
    segment (Arrow)    2,048 shards: digest, size_bytes, rows
    blocks (Arrow)     the blocks of those shards: shard, offset, length_bytes, rows, digest

All three are named by their SHA-256, so the root's digest names the whole version. Nothing in them speaks of
stores, clouds, times, runs or source URLs: the same data gives the same digest wherever and however it was
made. Where replicas lie is kept beside it, in ``core.facts.ReplicaPage``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt
from millrace.core.model import Block, Digest, Shard

__all__ = [
    "ENCODINGS",
    "FORMAT",
    "SEGMENT_SHARDS",
    "BlockTable",
    "Encoding",
    "Manifest",
    "Segment",
    "SegmentRef",
    "decode_block_table",
    "decode_blocks",
    "decode_root",
    "decode_segment",
    "encode_root",
    "encode_segment",
]

FORMAT: Final = "millrace-manifest/1"
SEGMENT_SHARDS: Final = 2048
"""Shards in a segment: half a million shards are 245 segments."""

Encoding = Literal["arrow", "parquet", "webdataset", "mds"]
"""What a block's bytes are. Millrace packs ``arrow``: an IPC message. The others are adopted, read in place."""
ENCODINGS: Final[tuple[Encoding, ...]] = get_args(Encoding)

Number = TypeVar("Number", bound=np.generic)

_DIGEST: Final = pa.binary(32)
_SEGMENT: Final = pa.schema([("digest", _DIGEST), ("size_bytes", pa.int64()), ("rows", pa.int64())])
_BLOCKS: Final = pa.schema(
    [
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("length_bytes", pa.int64()),
        ("rows", pa.int64()),
        ("digest", _DIGEST),
    ]
)


@dataclass(frozen=True, slots=True)
class SegmentRef:
    """A segment as the root names it.

    Attributes:
        digest, size_bytes: Of the segment object.
        blocks, blocks_size_bytes: Of the object with its shards' blocks.
        shards, rows, bytes: In it.
    """

    digest: Digest
    size_bytes: int
    blocks: Digest
    blocks_size_bytes: int
    shards: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest's root.

    Attributes:
        schema: Of every shard; None when the dataset has no rows.
        block_rows: Rows in a block at most; fewer where a shard ends or the bytes reached the block size.
        encoding: What a block's bytes are. A block of no rows holds what its shard's others need to be read: a
            footer or a header.
    """

    schema: pa.Schema | None
    block_rows: int
    segments: tuple[SegmentRef, ...]
    rows: int = field(default=0)
    bytes: int = field(default=0)
    shards: int = field(default=0)
    encoding: Encoding = "arrow"


@dataclass(frozen=True, slots=True)
class Segment:
    """The shards of one segment, as columns of equal length (at most 2,048).

    Attributes:
        digests: uint8, shape (shards, 32).
        sizes: int64, bytes.
        rows: int64.
    """

    digests: npt.NDArray[np.uint8]
    sizes: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.sizes)

    def digest(self, i: int) -> Digest:
        """The digest of shard ``i`` of this segment."""
        return Digest(self.digests[i].tobytes().hex())


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of one segment's shards in order, as columns of equal length.

    Attributes:
        shards: int32: which of the segment's shards, from 0.
        offsets, lengths: int64, bytes, in the shard.
        rows: int64.
        digests: uint8, shape (blocks, 32): BLAKE3 of the bytes.
    """

    shards: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.rows)


def encode_segment(shards: Sequence[Shard]) -> tuple[bytes, bytes]:
    """The segment object and the blocks object of at most 2,048 shards. The same shards give the same bytes."""
    digests = pa.array([bytes.fromhex(s.digest) for s in shards], _DIGEST)
    sizes = pa.array([s.size_bytes for s in shards], pa.int64())
    rows = pa.array([s.rows for s in shards], pa.int64())
    blocks = [(i, b) for i, s in enumerate(shards) for b in s.blocks]
    columns = [
        pa.array([i for i, _ in blocks], pa.int32()),
        pa.array([b.offset for _, b in blocks], pa.int64()),
        pa.array([b.length_bytes for _, b in blocks], pa.int64()),
        pa.array([b.rows for _, b in blocks], pa.int64()),
        pa.array([bytes.fromhex(b.digest) for _, b in blocks], _DIGEST),
    ]
    return (
        _to_ipc(pa.record_batch([digests, sizes, rows], schema=_SEGMENT)),
        _to_ipc(pa.record_batch(columns, schema=_BLOCKS)),
    )


def decode_segment(data: memoryview | bytes) -> Segment:
    """The shards of a segment object, without copying them.

    Raises:
        Corrupt: it isn't one.
    """
    batch = _from_ipc(data, _SEGMENT)
    if len(batch) > SEGMENT_SHARDS:
        raise Corrupt(f"a manifest's segment has {len(batch)} shards, more than {SEGMENT_SHARDS}")
    return Segment(
        _digests(batch.column(0)),
        _numbers(batch.column(1), np.int64),
        _numbers(batch.column(2), np.int64),
    )


def decode_blocks(data: memoryview | bytes, shards: int) -> list[tuple[Block, ...]]:
    """The blocks of each of a segment's ``shards``, in order.

    Raises:
        Corrupt: it isn't a blocks object, or speaks of other shards.
    """
    table = decode_block_table(data, shards)
    owner, offsets, lengths, rows = (c.tolist() for c in (table.shards, table.offsets, table.lengths, table.rows))
    result: list[list[Block]] = [[] for _ in range(shards)]
    for i, shard in enumerate(owner):
        result[shard].append(Block(offsets[i], lengths[i], rows[i], Digest(table.digests[i].tobytes().hex())))
    return [tuple(blocks) for blocks in result]


def decode_block_table(data: memoryview | bytes, shards: int) -> BlockTable:
    """The blocks of a segment's ``shards`` as columns, without copying them.

    Raises:
        Corrupt: it isn't a blocks object, or speaks of other shards, or of no bytes.
    """
    batch = _from_ipc(data, _BLOCKS)
    owner = _numbers(batch.column(0), np.int32)
    offsets, lengths, rows = (_numbers(batch.column(i), np.int64) for i in (1, 2, 3))
    if len(owner) and (strange := (owner < 0) | (owner >= shards)).any():
        raise Corrupt(f"a manifest's block index names shard {owner[strange][0]} of a segment of {shards}")
    if any(len(column) and int(column.min()) < 0 for column in (offsets, lengths, rows)):
        raise Corrupt("a manifest's block index has a negative offset, length or number of rows")
    return BlockTable(owner, offsets, lengths, rows, _digests(batch.column(4)))


def encode_root(
    schema: pa.Schema | None, block_rows: int, segments: Sequence[SegmentRef], *, encoding: Encoding = "arrow"
) -> bytes:
    """The root object: canonical JSON. ``encoding`` is written only where it isn't ``arrow``."""
    root: dict[str, Any] = {
        "format": FORMAT,
        "schema": None if schema is None else base64.b64encode(memoryview(schema.serialize())).decode(),
        "block_rows": block_rows,
        "rows": sum(s.rows for s in segments),
        "bytes": sum(s.bytes for s in segments),
        "shards": sum(s.shards for s in segments),
        "segments": [[getattr(s, name) for name in SegmentRef.__slots__] for s in segments],
    }
    if encoding != "arrow":
        root["encoding"] = encoding
    return json.dumps(root, sort_keys=True, separators=(",", ":")).encode()


def decode_root(data: memoryview | bytes) -> Manifest:
    """The manifest in a root object.

    Raises:
        Corrupt: it isn't one, or is of a newer format.
    """
    try:
        root = json.loads(bytes(data))
        if root["format"] != FORMAT:
            raise Corrupt(f"the manifest has format {root['format']!r}; this Millrace reads {FORMAT!r}: upgrade it")
        encoding = root.get("encoding", "arrow")
        if encoding not in ENCODINGS:
            raise Corrupt(f"the manifest's blocks are {encoding!r}, which this Millrace can't read: upgrade it")
        schema = root["schema"]
        return Manifest(
            schema=None
            if schema is None
            else pa.ipc.read_schema(pa.py_buffer(base64.b64decode(schema, validate=True))),
            block_rows=int(root["block_rows"]),
            segments=tuple(SegmentRef(*fields) for fields in root["segments"]),
            rows=int(root["rows"]),
            bytes=int(root["bytes"]),
            shards=int(root["shards"]),
            encoding=encoding,
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, OSError, pa.ArrowException) as error:
        raise Corrupt(f"this is not a manifest: {error}") from error


def _to_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _from_ipc(data: memoryview | bytes, schema: pa.Schema) -> pa.RecordBatch:
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        if reader.schema != schema or reader.num_record_batches != 1:
            raise Corrupt("a manifest's segment has another layout than this Millrace reads: upgrade it")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise Corrupt(f"this is not a manifest's segment: {error}") from error
    if any(column.null_count for column in batch.columns):
        raise Corrupt("this is not a manifest's segment: it has nulls")
    return batch


def _numbers(column: pa.Array, kind: type[Number]) -> npt.NDArray[Number]:
    """A view of a column without nulls. Arrow's own ``to_numpy`` imports pandas where it is there: half a second."""
    if len(column) == 0:
        return np.empty(0, kind)
    return np.frombuffer(column.buffers()[1], kind, column.offset + len(column))[column.offset :]


def _digests(column: pa.Array) -> npt.NDArray[np.uint8]:
    if len(column) == 0:
        return np.empty((0, 32), dtype=np.uint8)
    data = np.frombuffer(column.buffers()[1], dtype=np.uint8)
    return data[column.offset * 32 : (column.offset + len(column)) * 32].reshape(-1, 32)
