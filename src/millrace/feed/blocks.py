"""The blocks that are in memory: loaded ahead in the order of their first use, let go in that of their last.

All bookkeeping is done by the one thread that consumes batches; other threads only fill memory. What is loaded ahead
keeps to a budget of bytes; what the next batch needs is loaded whatever the budget says, so that nothing can block.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt, MillraceError
from millrace.core.ports import Bytes
from millrace.feed.arena import Arena, Room
from millrace.feed.background import Background
from millrace.feed.columns import Bound, Column, bind
from millrace.feed.foresight import Foresight
from millrace.feed.index import BlockIndex

__all__ = ["BlockPool", "BlockSource", "Loaded", "LocalBlocks", "PoolStats"]

Int64s = npt.NDArray[np.int64]

_THREADS: Final = 3
_LARGER_MAX: Final = 4.0
"""So many times their stored size may the blocks in memory have before they count against the budget."""
_NEVER: Final = np.iinfo(np.int64).min


class LocalBlocks(Protocol):
    """Blocks on this machine's disk: ``feed.cache.BlockCache``, or nothing at all."""

    def read(self, name: str, alloc: _Alloc) -> bool:
        """Fill the memory that ``alloc(size)`` gives with the block; False if it isn't there."""

    async def fill(self, name: str, fetch: _Fetch) -> Sequence[Bytes] | None:
        """Have it there: None if it was, or what ``fetch`` gave."""

    def needed_many(self, needs: Iterable[tuple[str, float]], *, after_read: bool = False) -> None:
        """When blocks will next be needed: pairs of a name and seconds since 1970."""


class _Alloc(Protocol):
    def __call__(self, size_bytes: int, /) -> memoryview: ...


class _Fetch(Protocol):
    async def __call__(self) -> Sequence[Bytes]: ...


class BlockSource(Protocol):
    """The blocks of one dataset version, wherever they are."""

    @property
    def index(self) -> BlockIndex:
        """All of them."""

    def name(self, block: int) -> str:
        """What the block's plain form is called in a cache: the same bytes have the same name, and only they."""

    async def fetch(self, block: int) -> Sequence[Bytes]:
        """The block as a plain Arrow message (uncompressed, without dictionaries), verified.

        Raises:
            StoreError: no whole replica can be read.
            TransformError: it is whole, and can't be decoded.
        """


@dataclass(slots=True)
class PoolStats:
    """What loading did.

    Attributes:
        loaded, hits: Blocks loaded, and how many of them from the local cache.
        waits, waited_s, waited_max_s: How often, and how long in all and at most, a batch waited for a block.
    """

    loaded: int = 0
    hits: int = 0
    waits: int = 0
    waited_s: float = 0.0
    waited_max_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A block in memory.

    Attributes:
        room: Where its bytes are.
        bound: Where its columns are.
        failed: Why none of its rows can be given; None when they can.
    """

    room: Room | None
    bound: Bound
    failed: str | None
    hit: bool


class BlockPool:
    """See the module's text.

    Args:
        sources: One for each stream. A block's number counts through all of them: ``first[stream] + block``.
        columns: Which columns, of all streams alike.
        schema: Of all blocks.
        cache: The local cache, or None.
        background: Where fetches run.
        budget_bytes: For blocks in memory, loaded ahead included.
        ahead_bytes: For blocks on their way into the cache.
        foresight: Says when blocks come up again, for the cache.
    """

    def __init__(
        self,
        sources: Sequence[BlockSource],
        columns: Sequence[Column],
        schema: pa.Schema,
        *,
        cache: LocalBlocks | None,
        background: Background,
        budget_bytes: int,
        ahead_bytes: int,
        foresight: Foresight,
    ) -> None:
        self._sources = tuple(sources)
        self._columns = tuple(columns)
        self._foresight = foresight
        self._done_with: list[int] = []  # let go of, and the cache not yet told
        self._schema = schema
        self._cache = cache
        self._background = background
        self._budget = budget_bytes
        self._ahead = ahead_bytes if cache is not None else 0
        counts = [len(s.index) for s in sources]
        self.first: Int64s = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        total = int(self.first[-1])
        self.first_rows: Int64s = np.concatenate([s.index.first_rows[:-1] for s in sources])
        self._sizes = np.concatenate([s.index.lengths for s in sources] or [np.empty(0, np.int64)])
        largest = int(self._sizes.max(initial=0))
        # Address space only: demand may go past the budget, and decoded blocks may be larger than stored ones.
        self.arena = Arena(4 * budget_bytes + 64 * largest + 2**28)
        self._slot = np.full(total, -1, np.int32)
        self._wanted = np.full(total, _NEVER, np.int64)  # the last span planned that needs the block
        self._addresses = np.zeros((64, len(columns), 3), np.int64)
        self._spoilt = np.zeros(64, np.bool_)
        self._loaded: list[Loaded | None] = [None] * 64
        self._owner = np.full(64, -1, np.int64)
        self._loading: dict[int, concurrent.futures.Future[Loaded]] = {}
        self._coming: deque[int] = deque()  # wanted, not begun
        self._filling: dict[int, concurrent.futures.Future[None]] = {}
        self._local = np.zeros(total, np.bool_)  # known to be in the cache
        self._fills: dict[int, asyncio.Task[Sequence[Bytes] | None]] = {}  # touched by the background loop only
        self._in_flight = 0
        self._held_bytes = self._held_stored_bytes = 0  # of all blocks so far: in memory, and where they lie
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="millrace-feed")
        self.stats = PoolStats()

    def want(self, blocks: Int64s, span: int) -> None:
        """A span that comes needs these; load them ahead as far as the budget goes.

        Args:
            blocks: In the order of their use.
            span: The span's number; they only grow.
        """
        self._wanted[blocks] = span
        self._coming.extend(g for g in self._missing(blocks) if g not in self._loading)

    def need(self, blocks: Int64s, span: int) -> None:
        """Have these in memory, and begin on what comes next.

        Raises:
            StoreError: one can't be read anywhere.
        """
        self._collect()
        if missing := self._missing(blocks):
            begun = time.perf_counter()
            for g in missing:
                if g not in self._loading:
                    self._make_room(int(self._sizes[g]), span)  # if there is none, it is loaded all the same
                    self._begin(g)
            for g in missing:
                self._take_in(g, self._loading[g].result())
                self._loading.pop(g, None)
            waited = time.perf_counter() - begun
            self.stats.waits += 1
            self.stats.waited_s += waited
            self.stats.waited_max_s = max(self.stats.waited_max_s, waited)
        self._pump(span)

    def slots(self, blocks: Int64s) -> npt.NDArray[np.int32]:
        """Where loaded blocks stand in :meth:`addresses`."""
        return self._slot.take(blocks)

    def addresses(self, slots: npt.NDArray[np.int32]) -> Int64s:
        """int64, shape (n, columns, 3): see ``columns.Gather.starts``."""
        return self._addresses.take(slots, axis=0)

    def spoilt(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Which of these blocks have rows that can't be given."""
        return self._spoilt.take(slots)

    def loaded(self, slot: int) -> Loaded:
        """A block in memory."""
        found = self._loaded[slot]
        if found is None:
            raise IndexError(f"no block stands at {slot}")
        return found

    def retire(self, blocks: Int64s, span: int) -> None:
        """Let go of those that no later span needs: memory that was handed out stays for who holds it."""
        for g in np.unique(blocks[self._wanted[blocks] <= span]).tolist():
            self._forget(g)

    def _forget(self, block: int) -> None:
        slot = int(self._slot[block])
        if slot >= 0:
            self._slot[block] = -1
            self._loaded[slot] = None
            self._owner[slot] = -1
            if self._cache is not None:
                self._done_with.append(block)

    def reset(self) -> None:
        """Another place in the order, or another epoch: what was to come no longer is."""
        self._coming.clear()
        self._wanted[:] = _NEVER
        for future in self._filling.values():
            future.cancel()
        self._filling.clear()
        self._in_flight = 0

    def close(self) -> None:
        """Stop loading and let the memory go."""
        self.reset()
        for future in self._loading.values():
            future.cancel()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._loading.clear()
        self._loaded = [None] * len(self._loaded)

    # --- the consumer's side ---------------------------------------------------------------------------------

    def _missing(self, blocks: Int64s) -> list[int]:
        """Those not in memory, each once, in the order of their use."""
        missing = blocks[self._slot[blocks] < 0]
        if not len(missing):
            return []
        found, where = np.unique(missing, return_index=True)
        return found[np.argsort(where)].tolist()  # type: ignore[no-any-return]

    def _collect(self) -> None:
        for g in [g for g, future in self._loading.items() if future.done()]:
            future = self._loading.pop(g)
            if future.exception() is None:  # what failed is tried again when a batch needs it, and raised then
                self._take_in(g, future.result())
        for g in [g for g, filling in self._filling.items() if filling.done()]:
            self._in_flight -= int(self._sizes[g])
            if not self._filling.pop(g).exception():
                self._local[g] = True

    def _pump(self, span: int) -> None:
        """Begin loading what comes next, as far as the budget goes, and fill the cache beyond that."""
        if self._done_with:
            self._threads.submit(self._tell_cache, self._done_with)
            self._done_with = []
        while self._coming:
            g = self._coming[0]
            if self._slot[g] >= 0 or g in self._loading:
                self._coming.popleft()
                continue
            if not self._make_room(int(self._sizes[g]), span):
                break
            self._coming.popleft()
            self._begin(g)
        for g in self._coming:
            if self._in_flight >= self._ahead:
                break
            if not self._local[g] and g not in self._filling:
                self._in_flight += int(self._sizes[g])
                self._filling[g] = self._background.start(self._fill_only(g))

    def _make_room(self, size: int, span: int) -> bool:
        """Whether ``size`` more bytes keep to the budget, letting go of what no planned span needs."""
        # Blocks of compressed files are larger in memory than where they lie, and so is what windows of them need.
        larger = min(max(self._held_bytes / max(self._held_stored_bytes, 1), 1.0), _LARGER_MAX)
        coming = size + sum(int(self._sizes[g]) for g in self._loading)
        while self.arena.used_bytes + coming * larger > self._budget * larger:
            slots = np.flatnonzero(self._owner >= 0)
            last = self._wanted[self._owner[slots]]
            if not len(slots) or int(last.min()) >= span:
                return False
            self._forget(int(self._owner[slots[int(last.argmin())]]))
        return True

    def _take_in(self, g: int, loaded: Loaded) -> None:
        if self._slot[g] >= 0:
            return
        free = np.flatnonzero(self._owner < 0)
        if not len(free):
            more = len(self._owner)
            self._addresses = np.concatenate([self._addresses, np.zeros_like(self._addresses)])
            self._spoilt = np.concatenate([self._spoilt, np.zeros(more, np.bool_)])
            self._owner = np.concatenate([self._owner, np.full(more, -1, np.int64)])
            self._loaded.extend([None] * more)
            free = np.flatnonzero(self._owner < 0)
        slot = int(free[0])
        self._slot[g] = slot
        self._owner[slot] = g
        self._loaded[slot] = loaded
        self._addresses[slot] = loaded.bound.addresses
        if loaded.room is not None:
            self._held_bytes += len(loaded.room.bytes)
            self._held_stored_bytes += int(self._sizes[g])
        self._spoilt[slot] = bool(loaded.bound.bad) or loaded.failed is not None
        self._local[g] = self._cache is not None
        self.stats.loaded += 1
        self.stats.hits += loaded.hit

    def _split(self, g: int) -> tuple[BlockSource, int]:
        stream = int(np.searchsorted(self.first, g, side="right")) - 1
        return self._sources[stream], g - int(self.first[stream])

    # --- the other threads' side -----------------------------------------------------------------------------

    def _begin(self, g: int) -> None:
        source, block = self._split(g)
        done: concurrent.futures.Future[Loaded] = concurrent.futures.Future()
        self._loading[g] = done
        self._threads.submit(self._from_disk, g, source, block, done)

    def _from_disk(self, g: int, source: BlockSource, block: int, done: concurrent.futures.Future[Loaded]) -> None:
        try:
            loaded = self._read_local(source, block)
            if loaded is None:
                fetching = self._background.start(self._fetch(g, source, block))
                fetching.add_done_callback(lambda f: _pass_on(f, done))
            else:
                done.set_result(loaded)
        except BaseException as error:  # whoever needs the block hears of it
            done.set_exception(error)

    def _tell_cache(self, blocks: list[int]) -> None:
        if self._cache is not None:
            names = [source.name(block) for source, block in map(self._split, blocks)]
            self._cache.needed_many(zip(names, self._foresight.needs(blocks), strict=True), after_read=True)

    def _read_local(self, source: BlockSource, block: int) -> Loaded | None:
        if self._cache is None:
            return None
        rooms: list[Room] = []

        def alloc(size_bytes: int) -> memoryview:
            rooms.append(self.arena.take(size_bytes))
            return memoryview(rooms[-1].bytes)  # type: ignore[arg-type]

        if not self._cache.read(source.name(block), alloc):
            return None
        return self._parse(rooms[-1], source, block, hit=True)

    async def _fetch(self, g: int, source: BlockSource, block: int) -> Loaded:
        try:
            pieces = await self._fill(g, source, block)
        except MillraceError as error:
            if not _is_of_the_rows(error):
                raise
            return _unreadable(len(self._columns), str(error))
        if pieces is None:
            loaded = await asyncio.to_thread(self._read_local, source, block)
            if loaded is not None:
                return loaded
            pieces = await source.fetch(block)  # it was there, and was evicted in this moment
        return await asyncio.to_thread(self._copy_in, pieces, source, block)

    async def _fill_only(self, g: int) -> None:
        source, block = self._split(g)
        await self._fill(g, source, block)

    async def _fill(self, g: int, source: BlockSource, block: int) -> Sequence[Bytes] | None:
        """One fetch at a time for a block, whoever asks."""
        if self._cache is None:
            return await source.fetch(block)
        task = self._fills.get(g)
        if task is None:
            task = asyncio.create_task(self._cache.fill(source.name(block), lambda: source.fetch(block)))
            self._fills[g] = task
            task.add_done_callback(lambda t: (self._fills.pop(g, None), t.cancelled() or t.exception()))
        return await asyncio.shield(task)

    def _copy_in(self, pieces: Sequence[Bytes], source: BlockSource, block: int) -> Loaded:
        views = [memoryview(p).cast("B") for p in pieces]
        room = self.arena.take(sum(len(v) for v in views))
        into = memoryview(room.bytes)  # type: ignore[arg-type]
        at = 0
        for view in views:
            into[at : at + len(view)] = view
            at += len(view)
        return self._parse(room, source, block, hit=False)

    def _parse(self, room: Room, source: BlockSource, block: int, *, hit: bool) -> Loaded:
        extent = source.index.extent(block)
        try:
            batch = pa.ipc.read_record_batch(pa.py_buffer(room.bytes), self._schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Corrupt(
                f"block {extent.digest[:12]} of shard {extent.shard[:12]} is not a record batch of its schema: {error}"
            ) from error
        if batch.num_rows != extent.rows:
            raise Corrupt(
                f"block {extent.digest[:12]} of shard {extent.shard[:12]} has {batch.num_rows} rows, "
                f"its index says {extent.rows}"
            )
        return Loaded(room, bind(batch, self._columns, self.arena), None, hit)


def _pass_on(ended: concurrent.futures.Future[Loaded], to: concurrent.futures.Future[Loaded]) -> None:
    if ended.cancelled():
        to.cancel()
    elif (error := ended.exception()) is not None:
        to.set_exception(error)
    else:
        to.set_result(ended.result())


def _is_of_the_rows(error: MillraceError) -> bool:
    """Whether it is the rows that can't be given, everywhere and always, rather than bytes that can't be had."""
    return error.kind in {"TransformError", "SourceError"}


def _unreadable(columns: int, why: str) -> Loaded:
    nothing = Bound(np.zeros((columns, 3), np.int64), {}, pa.record_batch({}))
    return Loaded(None, nothing, why, hit=False)
