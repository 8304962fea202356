"""All blocks of one dataset version, as columns: 57 bytes a block, whatever the rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt
from millrace.core.manifest import BlockTable, Encoding, Segment
from millrace.core.model import Digest

__all__ = ["BlockIndex", "Extent", "build_index"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of one shard that is fetched and verified alone.

    Attributes:
        shard: The shard's SHA-256.
        offset, length: Bytes in it.
        rows: 0 for a footer or header that other blocks of its shard need.
        digest: BLAKE3 of exactly these bytes.
    """

    shard: Digest
    offset: int
    length: int
    rows: int
    digest: Digest


@dataclass(frozen=True, slots=True)
class BlockIndex:
    """The blocks of a version that have rows, in dataset order.

    Attributes:
        manifest: The version's digest.
        schema: Of every block.
        encoding: What a block's bytes are.
        shards: int32: each block's shard, counted through the whole version.
        offsets, lengths, rows: int64.
        first_rows: int64, shape (blocks + 1,): the number of rows before each block; the last is the total.
        digests: uint8, shape (blocks, 32).
        shard_digests: uint8, shape (shards, 32).
        aux: For shards whose blocks need one: the extent of their footer or header.
    """

    manifest: Digest
    schema: pa.Schema
    encoding: Encoding
    shards: npt.NDArray[np.int32]
    offsets: Int64s
    lengths: Int64s
    rows: Int64s
    first_rows: Int64s
    digests: npt.NDArray[np.uint8]
    shard_digests: npt.NDArray[np.uint8]
    aux: Mapping[int, Extent]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total_rows(self) -> int:
        """Rows in the version."""
        return int(self.first_rows[-1])

    def extent(self, block: int) -> Extent:
        """One block."""
        return Extent(
            shard=Digest(self.shard_digests[self.shards[block]].tobytes().hex()),
            offset=int(self.offsets[block]),
            length=int(self.lengths[block]),
            rows=int(self.rows[block]),
            digest=Digest(self.digests[block].tobytes().hex()),
        )


def build_index(
    manifest: Digest,
    schema: pa.Schema,
    encoding: Encoding,
    segments: Sequence[tuple[Segment, BlockTable]],
) -> BlockIndex:
    """Join the segments of a version, in order.

    Raises:
        Corrupt: the blocks of a shard don't add up to its rows; names the shard.
    """
    shards_before = np.cumsum([0, *(len(segment) for segment, _ in segments)])
    shards = _join([t.shards + np.int32(n) for (_, t), n in zip(segments, shards_before, strict=False)], np.int32)
    rows = _join([t.rows for _, t in segments], np.int64)
    offsets = _join([t.offsets for _, t in segments], np.int64)
    lengths = _join([t.lengths for _, t in segments], np.int64)
    digests = np.concatenate([t.digests for _, t in segments] or [np.empty((0, 32), np.uint8)])
    shard_digests = np.concatenate([s.digests for s, _ in segments] or [np.empty((0, 32), np.uint8)])
    shard_rows = _join([s.rows for s, _ in segments], np.int64)
    counted = np.bincount(shards, weights=rows, minlength=len(shard_rows)).astype(np.int64)
    if (wrong := np.flatnonzero(counted != shard_rows)).size:
        name = shard_digests[wrong[0]].tobytes().hex()
        raise Corrupt(
            f"the blocks of shard {name[:12]} of manifest {manifest[:12]} have {counted[wrong[0]]} rows, "
            f"the shard {shard_rows[wrong[0]]}"
        )
    whole = BlockIndex(
        manifest, schema, encoding, shards, offsets, lengths, rows, _first_rows(rows), digests, shard_digests, {}
    )
    if not (without := np.flatnonzero(rows == 0)).size:
        return whole
    has = rows > 0
    return BlockIndex(
        manifest,
        schema,
        encoding,
        shards[has],
        offsets[has],
        lengths[has],
        rows[has],
        _first_rows(rows[has]),
        digests[has],
        shard_digests,
        {int(shards[i]): whole.extent(int(i)) for i in without},
    )


def _first_rows(rows: Int64s) -> Int64s:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(rows, dtype=np.int64)])


def _join(columns: Sequence[npt.NDArray[Any]], kind: type[Any]) -> npt.NDArray[Any]:
    return np.concatenate(columns).astype(kind, copy=False) if columns else np.empty(0, kind)
