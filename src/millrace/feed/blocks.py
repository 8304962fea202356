"""The blocks that are in memory: loaded ahead in the order of their first use, let go in that of their last.

All bookkeeping is done by the one thread that consumes batches; other threads only fill memory. What is loaded ahead
keeps to a budget of bytes; what this span and the next one need is loaded whatever the budget says, so that nothing
can block. An interrupt anywhere in here leaves a block in memory, or not, and never half.
"""

from __future__ import annotations

import concurrent.futures
import functools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import StoreError, UsageError
from millrace.feed.arena import Arena, room_bytes
from millrace.feed.background import Background
from millrace.feed.block_reads import CLOSED, BlockReads, BlockSource, Loaded, LocalBlocks
from millrace.feed.columns import Column
from millrace.feed.foresight import Foresight

__all__ = ["BlockPool", "BlockSource", "Loaded", "LocalBlocks", "PoolStats"]

Int64s = npt.NDArray[np.int64]

_AT_ONCE: Final = 1024
"""Blocks that are being loaded ahead, and as many that are put into the cache, however small they are: a span of the
smallest needs 512 new ones."""
_LARGER_MAX: Final = 4.0
"""So many times their stored size may the blocks in memory have before they count against the budget."""
_NEVER: Final = np.iinfo(np.int64).min


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


class BlockPool:
    """See the module's text.

    Args:
        sources: One for each stream. A block's number counts through all of them: ``first[stream] + block``.
        columns: Which columns, of all streams alike.
        schema: Of all blocks.
        cache: The local cache, or None.
        background: Where fetches run.
        budget_bytes: For blocks in memory, loaded ahead included.
        ahead_bytes: For blocks on their way into the cache, or waiting there to be loaded for the first time.
        foresight: Says when blocks come up again, for the cache.

    Raises:
        UsageError: the system doesn't grant so much address space.
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
        self._foresight = foresight
        self._cache = cache
        self._background = background
        self._budget = budget_bytes
        self._ahead = ahead_bytes if cache is not None else 0
        counts = [len(s.index) for s in sources]
        self.first: Int64s = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        total = int(self.first[-1])
        self.first_rows: Int64s = np.concatenate([s.index.first_rows[:-1] for s in sources])
        self._sizes = np.concatenate([s.index.lengths for s in sources])
        largest = int(self._sizes.max(initial=0))
        # Address space only: need may go past the budget, and decoded blocks may be larger than stored ones.
        self.arena = Arena(8 * budget_bytes + 64 * largest + 2**30, budget_bytes + 4 * largest + 2**26)
        self._split = functools.partial(_split, tuple(sources), self.first)
        self._reads = BlockReads(self._split, columns, schema, arena=self.arena, cache=cache, background=background)
        # Of all blocks.
        self._slot = np.full(total, -1, np.int32)  # where it stands in what is in memory; written last, cleared first
        self._wanted = np.full(total, _NEVER, np.int64)  # the last span planned that needs it
        self._queued = np.zeros(total, np.bool_)  # stands in self._coming
        self._local = np.zeros(total, np.bool_)  # in the cache, as far as is known
        # Of those in memory.
        self._addresses = np.zeros((len(columns), 3, 0), np.int64)
        self._spoilt = np.zeros(0, np.bool_)
        self._owner = np.zeros(0, np.int64)
        self._loaded: list[Loaded | None] = []
        self._free: list[int] = []  # slots
        self._idle: list[int] | None = None  # blocks that no planned span needs, that of the latest use first
        self._held_bytes = 0
        # Of those on their way.
        self._coming: deque[tuple[int, int]] = deque()  # wanted and not begun, and by which span
        self._loading: dict[int, concurrent.futures.Future[Loaded]] = {}
        self._loading_bytes = 0
        self._to_fill: deque[int] = deque()  # wanted, and perhaps not in the cache
        self._filling: dict[int, concurrent.futures.Future[None]] = {}
        self._filled: set[int] = set()  # waiting in the cache
        self._ahead_bytes = 0  # of both
        self._filled_well = self._filled_in_vain = 0
        self._done_with: list[int] = []  # let go of, and the cache not yet told
        self._ever_bytes = self._ever_stored_bytes = 0  # of all blocks so far: in memory, and where they lie
        self.stats = PoolStats()

    # --- what a loop asks for --------------------------------------------------------------------------------

    def want(self, blocks: Int64s, span: int) -> None:
        """A span that comes needs these; load them ahead as far as the budget goes.

        Args:
            blocks: In the order of their use.
            span: The span's number; they only grow.
        """
        self._wanted[blocks] = span
        new = [g for g in self._missing(blocks[~self._queued[blocks]]) if g not in self._loading]
        self._queued[new] = True
        self._coming.extend((g, span) for g in new)
        if self._ahead:
            self._to_fill.extend(new)

    def need(self, blocks: Int64s, span: int) -> None:
        """Have these in memory, and begin on what comes next.

        Raises:
            StoreError: one can't be read anywhere.
            UsageError: this process was forked off, or the loader closed meanwhile.
        """
        self._background.check_process()
        self._idle = None
        self._collect()
        if missing := self._missing(blocks):
            begun = time.perf_counter()
            earlier = set(self._loading)
            for g in missing:
                if g not in earlier:
                    self._make_room(g, span)  # if there is none, it is loaded all the same
                    self._begin(g)
            for g in missing:
                self._take_in(g, self._wait_for(g, is_earlier=g in earlier))
                self._end(g)
            waited = time.perf_counter() - begun
            self.stats.waits += 1
            self.stats.waited_s += waited
            self.stats.waited_max_s = max(self.stats.waited_max_s, waited)
        self._pump(span)

    def slots(self, blocks: Int64s) -> npt.NDArray[np.int32]:
        """Where loaded blocks stand in :attr:`addresses`."""
        return self._slot.take(blocks)

    @property
    def addresses(self) -> Int64s:
        """int64, shape (columns, 3, slots): see ``columns.Gather.starts``."""
        return self._addresses

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

    def reset(self, *, drop: bool = False) -> None:
        """Another place in the order, or another epoch: what was to come no longer is.

        Args:
            drop: Let go of what is in memory too: rows that were given in place may have been written to.
        """
        if drop:
            for g in self._owner[self._owner >= 0].tolist():
                self._forget(g)
        self._coming.clear()
        self._to_fill.clear()
        self._queued[:] = False
        self._wanted[:] = _NEVER
        for future in list(self._filling.values()):
            future.cancel()
        self._filling.clear()
        self._filled.clear()
        self._ahead_bytes = 0
        self._filled_well = self._filled_in_vain = 0

    def close(self) -> None:
        """Stop loading and let the memory go, but for what batches hold. Safe to call twice, and in a forked child."""
        if self._background.forked:
            return
        self.reset()
        for future in list(self._loading.values()):
            future.cancel()
        self._reads.close()
        self._loading.clear()
        self._slot[:] = -1
        self._owner[:] = -1
        self._loaded = [None] * len(self._loaded)
        self._free = list(range(len(self._loaded)))
        self._held_bytes = 0
        self._cache = None
        self.arena.trim()

    # --- what is in memory -----------------------------------------------------------------------------------

    def _missing(self, blocks: Int64s) -> list[int]:
        """Those not in memory, each once, in the order of their use."""
        missing = blocks[self._slot[blocks] < 0]
        if not len(missing):
            return []
        found, where = np.unique(missing, return_index=True)
        return found[np.argsort(where)].tolist()  # type: ignore[no-any-return]

    def _take_in(self, g: int, loaded: Loaded) -> None:
        if self._slot[g] >= 0:
            return
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._owner[slot] = g
        self._loaded[slot] = loaded
        self._addresses[:, :, slot] = loaded.bound.addresses
        self._spoilt[slot] = bool(loaded.bound.bad) or loaded.failed is not None
        self._slot[g] = slot
        if loaded.room is not None:
            self._held_bytes += loaded.room.taken
            self._ever_bytes += len(loaded.room.bytes)
            self._ever_stored_bytes += int(self._sizes[g])
        self.stats.loaded += 1
        self.stats.hits += loaded.hit
        if self._cache is not None:
            self._note_cache(g, hit=loaded.hit)

    def _note_cache(self, g: int, *, hit: bool) -> None:
        """Learn what the cache is worth: a full, failing or too small one would have blocks fetched twice."""
        if g in self._filled:
            self._filled.discard(g)
            self._ahead_bytes -= self._room_of(g)
            self._filled_well += hit
            self._filled_in_vain += not hit
        elif not hit and self._local[g]:
            self._local[:] = False  # it was there once, so any of them may be gone
        self._local[g] = True

    def _grow(self) -> None:
        more = max(len(self._owner), 64)
        self._addresses = np.concatenate(
            [self._addresses, np.zeros((*self._addresses.shape[:2], more), np.int64)], axis=2
        )
        self._spoilt = np.concatenate([self._spoilt, np.zeros(more, np.bool_)])
        self._owner = np.concatenate([self._owner, np.full(more, -1, np.int64)])
        slots = range(len(self._loaded), len(self._owner))
        self._loaded.extend([None] * more)
        self._free.extend(reversed(slots))

    def _forget(self, g: int) -> None:
        slot = int(self._slot[g])
        if slot < 0:
            return
        loaded = self._loaded[slot]
        self._slot[g] = -1
        if loaded is not None and loaded.room is not None:
            self._held_bytes -= loaded.room.taken
        self._loaded[slot] = None
        self._owner[slot] = -1
        self._free.append(slot)
        if self._cache is not None:
            self._done_with.append(g)

    def _make_room(self, g: int, span: int) -> bool:
        """Whether a block more keeps to the budget, letting go of what no planned span needs."""
        # Blocks of compressed files are larger in memory than where they lie, and so is what windows of them need.
        larger = min(max(self._ever_bytes / max(self._ever_stored_bytes, 1), 1.0), _LARGER_MAX)
        room = (self._budget - self._loading_bytes - self._room_of(g)) * larger
        while self._held_bytes > room:
            if self._idle is None:
                slots = np.flatnonzero(self._owner >= 0)
                last = self._wanted.take(self._owner.take(slots))
                order = np.argsort(last, kind="stable")[::-1]
                self._idle = self._owner[slots[order[last[order] < span]]].tolist()
            if not self._idle:
                return False
            self._forget(self._idle.pop())
        return True

    # --- what is on its way ----------------------------------------------------------------------------------

    def _begin(self, g: int) -> None:
        self._loading[g] = self._reads.load(g)
        self._loading_bytes += self._room_of(g)

    def _wait_for(self, g: int, *, is_earlier: bool) -> Loaded:
        try:
            return _result(self._loading[g])
        except StoreError:
            if not is_earlier:
                raise
        # It was begun before anybody needed it, perhaps before what was wrong was mended.
        self._end(g)
        self._begin(g)
        return _result(self._loading[g])

    def _end(self, g: int) -> None:
        if self._loading.pop(g, None) is not None:
            self._loading_bytes = self._loading_bytes - self._room_of(g) if self._loading else 0

    def _collect(self) -> None:
        for g in [g for g, future in self._loading.items() if future.done()]:
            future = self._loading[g]
            # What failed is tried again when a batch needs it, and raised then.
            if not future.cancelled() and future.exception() is None:
                self._take_in(g, future.result())
            self._end(g)
        for g in [g for g, filling in self._filling.items() if filling.done()]:
            filling = self._filling.pop(g)
            is_there = not filling.cancelled() and filling.exception() is None
            self._local[g] |= is_there
            if is_there and self._slot[g] < 0 and g not in self._loading:  # else one fetch served both
                self._filled.add(g)
            else:
                self._ahead_bytes -= self._room_of(g)

    def _pump(self, span: int) -> None:
        """Begin loading what comes next, as far as the budget goes, and fill the cache beyond that."""
        if self._done_with:
            self._reads.later(self._tell_cache, self._done_with)
            self._done_with = []
        while self._coming and len(self._loading) < _AT_ONCE:
            g, by = self._coming[0]
            if self._slot[g] < 0 and g not in self._loading:
                if not self._make_room(g, span) and by > span + 1:
                    break
                self._begin(g)
            self._coming.popleft()
            self._queued[g] = False
        if self._filled_in_vain > 1 + self._filled_well // 4:
            return
        while self._to_fill and self._ahead_bytes < self._ahead and len(self._filling) < _AT_ONCE:
            g = self._to_fill.popleft()
            # Once: what can't be fetched now is fetched when it is loaded.
            if self._slot[g] < 0 and g not in self._loading and g not in self._filling and not self._local[g]:
                self._filling[g] = self._reads.fill(g)
                self._ahead_bytes += self._room_of(g)

    def _room_of(self, g: int) -> int:
        return room_bytes(int(self._sizes[g]))

    def _tell_cache(self, blocks: list[int]) -> None:
        if self._cache is not None:
            names = [source.name(block) for source, block in map(self._split, blocks)]
            self._cache.needed_many(zip(names, self._foresight.needs(blocks), strict=True), after_read=True)


def _split(sources: Sequence[BlockSource], first: Int64s, g: int) -> tuple[BlockSource, int]:
    stream = int(np.searchsorted(first, g, side="right")) - 1
    return sources[stream], g - int(first[stream])


def _result(loading: concurrent.futures.Future[Loaded]) -> Loaded:
    try:
        return loading.result()
    except concurrent.futures.CancelledError:
        raise UsageError(CLOSED) from None
