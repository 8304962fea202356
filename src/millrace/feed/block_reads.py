"""Blocks into memory, in other threads: from the local cache, or through it from wherever they lie."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import pyarrow as pa

from millrace.core.errors import Corrupt, MillraceError, UsageError
from millrace.core.ports import Bytes
from millrace.feed.arena import Arena, Room
from millrace.feed.background import Background
from millrace.feed.columns import Bound, Column, bind
from millrace.feed.index import BlockIndex

__all__ = ["CLOSED", "BlockReads", "BlockSource", "Loaded", "LocalBlocks"]

_THREADS: Final = 2
CLOSED: Final = "the loader was closed while a batch waited for a block; make another with ds.loader(...)"


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


@dataclass(frozen=True, slots=True)
class Loaded:
    """A block in memory.

    Attributes:
        room: Where its bytes are; None for one whose rows can't be given.
        bound: Where its columns are.
        failed: Why none of its rows can be given; None when they can.
        hit: Whether it came from the local cache.
    """

    room: Room | None
    bound: Bound
    failed: str | None
    hit: bool


@dataclass(slots=True)
class _Filling:
    """A fetch into the cache, and how many wait for it."""

    task: asyncio.Task[Sequence[Bytes] | None]
    waiters: int = 0


class BlockReads:
    """Reads blocks into an arena. Its methods are for the one thread that consumes batches.

    Args:
        split: From a block, counted through all streams, to its source and its number there.
        columns: Which columns, of all streams alike.
        schema: Of all blocks.
        arena: Where to.
        cache: The local cache, or None.
        background: Where fetches run.
    """

    def __init__(
        self,
        split: Callable[[int], tuple[BlockSource, int]],
        columns: Sequence[Column],
        schema: pa.Schema,
        *,
        arena: Arena,
        cache: LocalBlocks | None,
        background: Background,
    ) -> None:
        self._split = split
        self._columns = tuple(columns)
        self._schema = schema
        self._arena = arena
        self._cache = cache
        self._background = background
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="millrace-feed")
        self._fetching: set[concurrent.futures.Future[Loaded]] = set()
        self._fills: dict[int, _Filling] = {}  # touched by the background loop only

    def load(self, block: int) -> concurrent.futures.Future[Loaded]:
        """Begin to load a block.

        Raises:
            UsageError: this was closed.
        """
        done: concurrent.futures.Future[Loaded] = concurrent.futures.Future()
        self.later(self._load, block, done)
        return done

    def fill(self, block: int) -> concurrent.futures.Future[None]:
        """Have a block in the local cache; cancelling the future cancels its fetch, unless it is being loaded too.

        Raises:
            UsageError: Millrace was closed.
        """
        return self._background.start(self._fill(block))

    def later(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call ``work`` in one of the threads.

        Raises:
            UsageError: this was closed.
        """
        try:
            self._threads.submit(work, *arguments)
        except RuntimeError as error:
            raise UsageError(CLOSED) from error

    def close(self) -> None:
        """End the threads, and cancel what is being fetched. Safe to call twice."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for fetching in list(self._fetching):
            fetching.cancel()
        self._cache = None

    # --- in the threads --------------------------------------------------------------------------------------

    def _load(self, block: int, done: concurrent.futures.Future[Loaded]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            loaded = self._read_local(block)
            if loaded is None:
                fetching = self._background.start(self._fetch(block))
                self._fetching.add(fetching)
                fetching.add_done_callback(lambda fetched: self._pass_on(fetched, done))
                return
        except BaseException as error:  # whoever needs the block hears of it
            done.set_exception(error)
        else:
            done.set_result(loaded)

    def _pass_on(self, fetched: concurrent.futures.Future[Loaded], to: concurrent.futures.Future[Loaded]) -> None:
        self._fetching.discard(fetched)
        if fetched.cancelled():
            to.set_exception(UsageError(CLOSED))
        elif (error := fetched.exception()) is not None:
            to.set_exception(error)
        else:
            to.set_result(fetched.result())

    def _read_local(self, block: int) -> Loaded | None:
        if self._cache is None:
            return None
        source, number = self._split(block)
        rooms: list[Room] = []

        def alloc(size_bytes: int) -> memoryview:
            rooms.append(self._arena.take(size_bytes))
            return memoryview(rooms[-1].bytes)  # type: ignore[arg-type]

        if not self._cache.read(source.name(number), alloc):
            return None
        return self._parse(rooms[-1], source, number, hit=True)

    def _copy_in(self, pieces: Sequence[Bytes], source: BlockSource, number: int) -> Loaded:
        views = [memoryview(p).cast("B") for p in pieces]
        room = self._arena.take(sum(len(v) for v in views))
        into = memoryview(room.bytes)  # type: ignore[arg-type]
        at = 0
        for view in views:
            into[at : at + len(view)] = view
            at += len(view)
        return self._parse(room, source, number, hit=False)

    def _parse(self, room: Room, source: BlockSource, number: int, *, hit: bool) -> Loaded:
        extent = source.index.extent(number)
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
        return Loaded(room, bind(batch, self._columns, self._arena), None, hit)

    # --- on the background loop ------------------------------------------------------------------------------

    async def _fetch(self, block: int) -> Loaded:
        source, number = self._split(block)
        try:
            pieces = await self._filled(block)
            if pieces is None:
                loaded = await asyncio.to_thread(self._read_local, block)
                if loaded is not None:
                    return loaded
                pieces = await source.fetch(number)  # it was there, and was evicted in this moment
        except MillraceError as error:
            if not _is_of_the_rows(error):
                raise
            return _unreadable(len(self._columns), str(error))
        return await asyncio.to_thread(self._copy_in, pieces, source, number)

    async def _fill(self, block: int) -> None:
        await self._filled(block)

    async def _filled(self, block: int) -> Sequence[Bytes] | None:
        """One fetch at a time for a block, whoever asks; it ends with the last who waits for it."""
        source, number = self._split(block)
        if self._cache is None:
            return await source.fetch(number)
        filling = self._fills.get(block)
        if filling is None:
            task = asyncio.create_task(self._cache.fill(source.name(number), lambda: source.fetch(number)))
            task.add_done_callback(lambda t: t.cancelled() or t.exception())  # heard of by those who wait, if any
            filling = self._fills[block] = _Filling(task)
        filling.waiters += 1
        try:
            return await asyncio.shield(filling.task)
        finally:
            filling.waiters -= 1
            if not filling.waiters:
                filling.task.cancel()
            if (not filling.waiters or filling.task.done()) and self._fills.get(block) is filling:
                del self._fills[block]


def _is_of_the_rows(error: MillraceError) -> bool:
    """Whether it is the rows that can't be given, everywhere and always, rather than bytes that can't be had."""
    return error.kind in {"TransformError", "SourceError"}


def _unreadable(columns: int, why: str) -> Loaded:
    nothing = Bound(np.zeros((columns, 3), np.int64), {}, pa.record_batch({}))
    return Loaded(None, nothing, why, hit=False)
