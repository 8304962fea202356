"""A dataset version as a feed reads it: which blocks there are, where they lie, and how they become plain."""

from __future__ import annotations

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa

from millrace.catalog.manifests import OpenManifest
from millrace.core.errors import Corrupt, TransformError, Unavailable
from millrace.core.facts import ReplicaPage
from millrace.core.manifest import BlockTable, Segment
from millrace.core.model import digest_of, shard_key
from millrace.core.ports import Bytes
from millrace.feed.background import Background
from millrace.feed.index import BlockIndex, Extent, build_index
from millrace.feed.replicas import ReplicaReader
from millrace.pipeline.adopted.decode import decode_block

__all__ = ["VersionSource", "read_index"]

T = TypeVar("T")

_AT_ONCE: Final = 8
"""Segments of a manifest on their way: 0.1 MB each, and far stores answer late."""
_PAGES_KEPT: Final = 64
"""Replica pages in memory: about 1 MB each."""
_AUX_KEPT: Final = 64
"""Footers and headers of adopted files in memory."""


async def read_index(opened: OpenManifest) -> BlockIndex:
    """Every block of a version: 57 bytes each.

    Raises:
        StoreError: no whole replica of a part of the manifest can be read.
        Corrupt: the manifest doesn't fit together.
    """
    parts: list[tuple[Segment, BlockTable]] = []
    for start in range(0, len(opened), _AT_ONCE):
        some = range(start, min(start + _AT_ONCE, len(opened)))
        parts += await asyncio.gather(*(_part(opened, i) for i in some))
    schema = opened.schema if opened.schema is not None else pa.schema([])
    return build_index(opened.digest, schema, opened.root.encoding, parts)


async def _part(opened: OpenManifest, i: int) -> tuple[Segment, BlockTable]:
    return await asyncio.gather(opened.segment(i), opened.block_table(i))


class VersionSource:
    """The blocks of one version; a ``feed.blocks.BlockSource``.

    Args:
        opened: The version's manifest.
        index: Its blocks.
        reader: Reads a range from the best of its replicas.
        background: The loop that its stores live on; who fetches may be on another, in a mixture of worlds.
    """

    def __init__(self, opened: OpenManifest, index: BlockIndex, reader: ReplicaReader, background: Background) -> None:
        self.index = index
        self._background = background
        self._schema = digest_of(index.schema.serialize())[:16]
        self._opened = opened
        self._reader = reader
        self._first_shard = np.cumsum([0, *(ref.shards for ref in opened.root.segments)])
        self._pages: OrderedDict[int, asyncio.Future[ReplicaPage | None]] = OrderedDict()
        self._aux: OrderedDict[int, asyncio.Future[memoryview]] = OrderedDict()

    def name(self, block: int) -> str:
        """What the plain block is called in a cache: its own digest, and those of what else it was decoded with."""
        digest: str = self.index.digests[block].tobytes().hex()
        aux = self.index.aux.get(int(self.index.shards[block]))
        if self.index.encoding == "arrow" and aux is None:
            return digest
        return f"{digest}.{self.index.encoding}{'' if aux is None else aux.digest[:16]}.{self._schema}"

    async def fetch(self, block: int) -> Sequence[Bytes]:
        """The block as a plain Arrow message, verified. See ``feed.blocks.BlockSource``."""
        if not self._background.runs_here():
            return await asyncio.wrap_future(self._background.start(self.fetch(block)))
        shard = int(self.index.shards[block])
        extent = self.index.extent(block)
        aux = None
        if shard in self.index.aux:
            aux = await _once(self._aux, shard, _AUX_KEPT, lambda: self._read(shard, self.index.aux[shard]))
        data = await self._read(shard, extent)
        return await asyncio.to_thread(_plain, self.index, extent, aux, data)

    async def _read(self, shard: int, extent: Extent) -> memoryview:
        segment = int(np.searchsorted(self._first_shard, shard, side="right")) - 1
        page = await _once(self._pages, segment, _PAGES_KEPT, lambda: self._opened.replicas(segment))
        known = None if page is None else page.entries[shard - int(self._first_shard[segment])]
        if known is None and self.index.encoding != "arrow":
            raise Unavailable(
                f"where the files of manifest {self._opened.digest[:12]} lie is not known any more; adopt them again: "
                "the same bytes give the same digest"
            )
        key = shard_key(extent.shard) if known is None else known.key
        names = self._opened.names(known)
        held = {} if known is None else known.stores
        holders = sum(1 for _ in itertools.takewhile(held.__contains__, names))
        return await self._reader.read(extent, key, names, holders=holders)


def _plain(index: BlockIndex, extent: Extent, aux: memoryview | None, data: memoryview) -> Sequence[Bytes]:
    """Bytes in which Arrow finds every value in place, and values that are what they say."""
    what = f"block {extent.digest[:12]} of shard {extent.shard[:12]}"
    if index.encoding != "arrow" or aux is not None:
        batch = decode_block(index.encoding, index.schema, aux, data, offset=extent.offset, rows=extent.rows)
        is_plain = False
    else:
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), index.schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Corrupt(f"{what} is not a record batch of the version's schema: {error}") from error
        is_plain = _lies_in(batch, data)
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        raise TransformError(f"{what} is whole, but holds values that are not of its schema: {error}") from error
    if batch.num_rows != extent.rows:
        raise Corrupt(f"{what} has {batch.num_rows} rows; its index says {extent.rows}")
    return [data] if is_plain else [memoryview(batch.serialize())]


def _lies_in(batch: pa.RecordBatch, data: memoryview) -> bool:
    """Whether no buffer was decompressed, or otherwise made anew."""
    start = int(np.frombuffer(data, np.uint8).ctypes.data)
    buffers = [b for column in batch.columns for b in column.buffers() if b is not None and b.size]
    return all(start <= b.address <= start + len(data) - b.size for b in buffers)


async def _once(
    kept: OrderedDict[int, asyncio.Future[T]], key: int, limit: int, make: Callable[[], Coroutine[Any, Any, T]]
) -> T:
    """``make()`` once for all who ask for ``key`` at a time; the newest ``limit`` results are kept, failures aren't."""
    future = kept.get(key)
    if future is None:
        future = asyncio.ensure_future(make())
        kept[key] = future
        future.add_done_callback(lambda ended: _drop_failed(kept, key, ended))
        if len(kept) > limit:
            kept.popitem(last=False)
    else:
        kept.move_to_end(key)
    return await asyncio.shield(future)


def _drop_failed(kept: OrderedDict[int, asyncio.Future[T]], key: int, ended: asyncio.Future[T]) -> None:
    """Also where all who asked are gone: the next one is not to hear of it."""
    if (ended.cancelled() or ended.exception() is not None) and kept.get(key) is ended:
        del kept[key]
