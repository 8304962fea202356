"""A version's manifest, opened: the root at once, segments, blocks and replica pages as they are asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Final

import pyarrow as pa

from millrace.catalog.versions import policy_of
from millrace.core.errors import StoreError, Unavailable, UsageError
from millrace.core.facts import ReplicaEntry, ReplicaPage, VersionRecord
from millrace.core.keys import manifest_key, replica_page, segment_key
from millrace.core.manifest import (
    BlockTable,
    Manifest,
    Segment,
    SegmentRef,
    decode_block_table,
    decode_blocks,
    decode_root,
    decode_segment,
)
from millrace.core.model import Block, Digest, StoreSite, block_digest, shard_key
from millrace.core.pages import read_meta, read_page
from millrace.core.ports import Coordination, Store
from millrace.core.replicas import fetch
from millrace.decide.placement import legal

__all__ = ["OpenManifest", "open_manifest", "read_order"]

_AHEAD: Final = 8
"""Segments on their way while one is looked at: 0.1 MB each."""
_SEGMENTS_KEPT: Final = 256
"""0.1 MB each: all of half a million shards, 25 MB."""


def read_order(sites: Sequence[StoreSite], *, near: str | None = None) -> tuple[str, ...]:
    """Store names in the order they are read from: the near cloud's first, then as the world has them."""
    return tuple(s.name for s in sorted(sites, key=lambda s: s.cloud != near))


class OpenManifest:
    """A manifest whose root has been read and verified. Made by :func:`open_manifest`.

    Attributes:
        digest: The version's true name.
        root: Schema, counts and segments.
        meta: The parts of the page that says where the manifest's own objects lie; empty when it is lost.
    """

    def __init__(
        self,
        digest: Digest,
        root: Manifest,
        root_entry: ReplicaEntry,
        meta: tuple[ReplicaPage, ...],
        *,
        coord: Coordination,
        stores: Mapping[str, Store],
        order: tuple[str, ...],
        allowed: frozenset[str],
    ) -> None:
        self.digest = digest
        self.root = root
        self.meta = meta
        self._root_entry = root_entry
        self._coord = coord
        self._stores = stores
        self._order = order
        self._allowed = allowed
        self._where = {entry.digest: entry for part in meta for entry in part.entries}
        self._segments: OrderedDict[int, Segment] = OrderedDict()

    @property
    def schema(self) -> pa.Schema | None:
        """Of every shard; None when the dataset has no rows."""
        return self.root.schema

    def __len__(self) -> int:
        """How many segments there are."""
        return len(self.root.segments)

    async def segment(self, i: int) -> Segment:
        """The shards of segment ``i``, from any true replica.

        Raises:
            StoreError: no whole replica of it can be read.
        """
        if i in self._segments:
            self._segments.move_to_end(i)
            return self._segments[i]
        ref = self._ref(i)
        segment = decode_segment(await self._own(ref.digest))
        self._segments[i] = segment
        if len(self._segments) > _SEGMENTS_KEPT:
            self._segments.popitem(last=False)
        return segment

    async def segments(self) -> AsyncGenerator[tuple[int, Segment], None]:
        """Every segment in order, the next few already on their way.

        Whoever may leave it early wraps it in ``contextlib.aclosing``, so that those are called back at once.

        Raises:
            StoreError: no whole replica of one can be read.
        """
        coming: deque[asyncio.Task[Segment]] = deque()
        try:
            for i in range(len(self) + _AHEAD):
                if i < len(self):
                    coming.append(asyncio.create_task(self.segment(i)))
                if i >= _AHEAD and coming:
                    segment = await coming[0]
                    coming.popleft()
                    yield i - _AHEAD, segment
        finally:
            for task in coming:
                task.cancel()
            await asyncio.gather(*coming, return_exceptions=True)

    async def blocks(self, i: int) -> list[tuple[Block, ...]]:
        """The blocks of each shard of segment ``i``, in order.

        Raises:
            StoreError: no whole replica of the block index can be read.
        """
        ref = self._ref(i)
        return decode_blocks(await self._own(ref.blocks), ref.shards)

    async def block_table(self, i: int) -> BlockTable:
        """The same as columns: what a feed works with.

        Raises:
            StoreError: no whole replica of the block index can be read.
        """
        ref = self._ref(i)
        return decode_block_table(await self._own(ref.blocks), ref.shards)

    async def replicas(self, i: int) -> ReplicaPage | None:
        """Where the shards of segment ``i`` lie; None when that was lost. One page is about 1 MB in memory."""
        return await read_page(self._coord, replica_page(self.digest, i))

    async def shard(self, digest: Digest, known: ReplicaEntry | None = None) -> memoryview:
        """A whole shard, verified, from any true replica.

        Args:
            digest: Which.
            known: Where it lies, as a replica page says; the other legal stores are asked after those.

        Raises:
            StoreError: no whole replica can be read.
        """
        key = shard_key(digest) if known is None else known.key
        return await fetch(self._stores, key, digest, self.names(known))

    async def block(self, block: Block, known: ReplicaEntry) -> memoryview:
        """One block of a shard, verified, from any true replica.

        Args:
            block: Which.
            known: Where its shard lies, as a replica page says.

        Raises:
            StoreError: no whole replica can be read; says why for each store.
        """
        failures: list[str] = []
        for name in self.names(known):
            store = self._stores.get(name)
            if store is None:
                failures.append(f"{name}: not in this world file")
                continue
            try:
                data = await store.get_range(known.key, block.offset, block.length_bytes)
            except StoreError as error:
                failures.append(f"{name}: {error}")
                continue
            if block_digest(data) == block.digest:
                return data
            failures.append(f"{name}: the bytes are not those the digest names")
        raise Unavailable(
            f"the block at byte {block.offset} of {known.key} can't be read whole "
            f"({'; '.join(failures) or 'no store is known to hold it'})",
            key=known.key,
        )

    def names(self, known: ReplicaEntry | None) -> tuple[str, ...]:
        """The stores to read an object from: those known to hold it, then every other that may."""
        return _names(self._order, self._allowed, known)

    def own_objects(self) -> tuple[ReplicaEntry, ...]:
        """The manifest's own objects: segments and blocks in order, then the root, with where they lie."""
        found = [
            self._where.get(digest) or ReplicaEntry(digest=digest, key=segment_key(digest), size_bytes=size)
            for ref in self.root.segments
            for digest, size in ((ref.digest, ref.size_bytes), (ref.blocks, ref.blocks_size_bytes))
        ]
        return (*found, self._root_entry)

    def _ref(self, i: int) -> SegmentRef:
        if not 0 <= i < len(self):
            raise UsageError(f"there is no segment {i} in manifest {self.digest[:12]}; it has {len(self)}")
        return self.root.segments[i]

    async def _own(self, digest: Digest) -> memoryview:
        return await fetch(self._stores, segment_key(digest), digest, self.names(self._where.get(digest)))


async def open_manifest(
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    version: VersionRecord | Digest,
    *,
    near: str | None = None,
) -> OpenManifest:
    """Read a manifest's root from any true replica.

    Args:
        coord: Where the replica pages are.
        stores: Every store of the world by name.
        sites: Every store as decisions see it.
        version: A version, or just a manifest's digest; then any store may be asked.
        near: The cloud to read from first.

    Raises:
        StoreError: no whole replica of the root can be read; says why for each store.
    """
    digest = Digest(version.digest if isinstance(version, VersionRecord) else version)
    policy = policy_of(version) if isinstance(version, VersionRecord) else None
    meta = await read_meta(coord, digest)
    allowed = frozenset(s.name for s in sites if policy is None or legal(s, policy) is None)
    order = read_order(sites, near=near)
    known = next((e for part in meta for e in part.entries if e.digest == digest), None)
    data = await fetch(stores, manifest_key(digest), digest, _names(order, allowed, known))
    return OpenManifest(
        digest,
        decode_root(data),
        known or ReplicaEntry(digest=digest, key=manifest_key(digest), size_bytes=len(data)),
        meta,
        coord=coord,
        stores=stores,
        order=order,
        allowed=allowed,
    )


def _names(order: Sequence[str], allowed: Collection[str], known: ReplicaEntry | None) -> tuple[str, ...]:
    held = known.stores if known else {}
    first = tuple(name for name in order if name in held)
    not_in_world = tuple(sorted(set(held) - set(first)))
    return first + tuple(n for n in order if n in allowed and n not in held) + not_in_world
