"""persist: chunk outputs in, a manifest version out. Here visibility becomes a version.

Outputs are read in chunk order, whatever order they were made in; the manifest's objects are replicated and read
back like shards before their digest is given to anyone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import pyarrow as pa

from millrace.core.facts import ReplicaEntry, ReplicaPage
from millrace.core.keys import manifest_key, segment_key
from millrace.core.manifest import SEGMENT_SHARDS, SegmentRef, encode_root, encode_segment
from millrace.core.model import ChunkOutput, Digest, Receipt, Shard, digest_of, shard_key
from millrace.pipeline.distribute import Blob, Distributor

__all__ = ["Persisted", "persist"]


@dataclass(frozen=True, slots=True)
class Persisted:
    """What persist made.

    Attributes:
        manifest: The version's digest.
        pages: Where each segment's shards lie, in order.
        meta: Where the manifest's own objects lie.
    """

    manifest: Digest
    rows: int
    bytes: int
    shards: int
    pages: tuple[ReplicaPage, ...]
    meta: ReplicaPage


async def persist(outputs: AsyncIterator[ChunkOutput], block_rows: int, distributor: Distributor) -> Persisted:
    """Build and replicate the manifest of ``outputs``, which come in chunk order.

    A shard that two chunks made alike is listed twice: the rows are there twice.

    Raises:
        StoreError: the manifest can't be made durable where policy wants it.
    """
    schema: pa.Schema | None = None
    pending: list[Shard] = []
    receipts: dict[Digest, dict[str, int]] = {}
    refs: list[SegmentRef] = []
    pages: list[ReplicaPage] = []
    meta: list[ReplicaEntry] = []

    async def close_segment() -> None:
        segment, blocks = encode_segment(pending)
        entries = [await _replicate(distributor, data) for data in (segment, blocks)]
        meta.extend(entries)
        refs.append(
            SegmentRef(
                digest=Digest(entries[0].digest),
                size_bytes=len(segment),
                blocks=Digest(entries[1].digest),
                blocks_size_bytes=len(blocks),
                shards=len(pending),
                rows=sum(s.rows for s in pending),
                bytes=sum(s.size_bytes for s in pending),
            )
        )
        pages.append(ReplicaPage(entries=tuple(_shard_entry(s, receipts[s.digest]) for s in pending)))
        pending.clear()
        receipts.clear()

    async for output in outputs:
        if output.schema and schema is None:
            schema = pa.ipc.read_schema(pa.py_buffer(output.schema))
        made = _by_digest(output.receipts)
        for shard in output.shards:
            pending.append(shard)
            receipts.setdefault(shard.digest, {}).update(made[shard.digest])
            if len(pending) == SEGMENT_SHARDS:
                await close_segment()
    if pending:
        await close_segment()

    root = encode_root(schema, block_rows, refs)
    meta.append(await _replicate(distributor, root, root=True))
    return Persisted(
        manifest=Digest(meta[-1].digest),
        rows=sum(r.rows for r in refs),
        bytes=sum(r.bytes for r in refs),
        shards=sum(r.shards for r in refs),
        pages=tuple(pages),
        meta=ReplicaPage(entries=tuple(meta)),
    )


async def _replicate(distributor: Distributor, data: bytes, *, root: bool = False) -> ReplicaEntry:
    digest = digest_of(data)
    key = manifest_key(digest) if root else segment_key(digest)
    receipts = await distributor.distribute(Blob(digest, key, len(data), [data]))
    return ReplicaEntry(
        digest=digest, key=key, size_bytes=len(data), stores={r.store: r.verified_at_ms for r in receipts}
    )


def _by_digest(receipts: tuple[Receipt, ...]) -> dict[Digest, dict[str, int]]:
    found: dict[Digest, dict[str, int]] = {}
    for receipt in receipts:
        found.setdefault(receipt.digest, {})[receipt.store] = receipt.verified_at_ms
    return found


def _shard_entry(shard: Shard, stores: dict[str, int]) -> ReplicaEntry:
    return ReplicaEntry(
        digest=shard.digest, key=shard_key(shard.digest), size_bytes=shard.size_bytes, stores=dict(stores)
    )
