"""Blocks in memory: loaded once, ahead, within bounds; let go of; and what happens when loading is disturbed."""

from __future__ import annotations

import asyncio
import gc
import itertools
import logging
import os
import signal
import threading
import time
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.errors import Corrupt, Unavailable, UsageError
from millrace.core.ports import Bytes
from millrace.feed.background import Background
from millrace.feed.loader import Loader

MakeLoader = Callable[..., Loader]
SourceOf = Callable[[Sequence[pa.RecordBatch]], Any]

PATIENCE_S = 30.0
BLOCK = 2**17


def numbered(blocks: int, rows: int = 8, width: int = 1) -> list[pa.RecordBatch]:
    """Blocks whose column ``id`` counts through all of them; a row has ``width`` more bytes."""
    edges = range(0, blocks * rows, rows)
    pad = pa.array([bytes(width)] * rows, pa.binary(width))
    return [pa.record_batch({"id": pa.array(np.arange(a, a + rows), pa.int64()), "pad": pad}) for a in edges]


def ids(batches: Iterable[Any]) -> list[int]:
    return [i for batch in batches for i in batch["id"].tolist()]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)


class Shelf:
    """A local cache in memory, as the feed sees one.

    Args:
        keeps: How many blocks; what came first leaves first.
    """

    def __init__(self, keeps: int = 10**9) -> None:
        self.blocks: dict[str, bytes] = {}
        self.keeps = keeps
        self.filling: list[str] = []
        self.twice: list[str] = []

    def read(self, name: str, alloc: Callable[[int], memoryview]) -> bool:
        data = self.blocks.get(name)
        if data is None:
            return False
        alloc(len(data))[:] = data
        return True

    async def fill(self, name: str, fetch: Callable[[], Awaitable[Sequence[Bytes]]]) -> Sequence[Bytes] | None:
        if name in self.blocks:
            return None
        if name in self.filling:
            self.twice.append(name)
        self.filling.append(name)
        try:
            pieces = await fetch()
        finally:
            self.filling.remove(name)
        if self.keeps:
            self.blocks[name] = b"".join(pieces)
            while len(self.blocks) > self.keeps:
                del self.blocks[next(iter(self.blocks))]
        return pieces

    def needed_many(self, needs: Iterable[tuple[str, float]], *, after_read: bool = False) -> None:
        list(needs)


def settle(background: Background, shelf: Shelf) -> None:
    """Wait until all that was begun to be put there is there."""
    background.call(asyncio.sleep(0))
    until(lambda: not shelf.filling)


class Gate:
    """A source whose fetches, of all blocks or of those from one on, wait until they are let through.

    Attributes:
        waiting: Blocks whose fetch has begun and not ended.
        cancelled: Blocks whose fetch was cancelled.
    """

    def __init__(self, source: Any, *, is_open: bool = False) -> None:
        self._source = source
        self._shut_from = 10**9 if is_open else 0
        self.index = source.index
        self.name = source.name
        self.fetched: list[int] = source.fetched
        self.broken: dict[int, Exception] = source.broken
        self.waiting: list[int] = []
        self.cancelled: list[int] = []

    def open(self) -> None:
        self._shut_from = 10**9

    def shut(self, block: int = 0) -> None:
        self._shut_from = block

    async def fetch(self, block: int) -> Sequence[Bytes]:
        self.waiting.append(block)
        try:
            while block >= self._shut_from:
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            self.cancelled.append(block)
            raise
        finally:
            self.waiting.remove(block)
        found: Sequence[Bytes] = await self._source.fetch(block)
        return found


@pytest.fixture(autouse=True)
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is told by asyncio or futures: each error has somebody who hears of it."""
    yield
    gc.collect()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


# --- each once, ahead, within bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, "full", "blocks", False])
@pytest.mark.parametrize("cached", [True, False])
def test_a_block_is_fetched_once(
    make_loader: MakeLoader, source_of: SourceOf, shuffle: bool | str, cached: bool
) -> None:
    source, shelf = source_of(numbered(50)), Shelf()
    loader = make_loader(source, 8, shuffle=shuffle, cache=shelf if cached else None)
    assert sorted(ids(loader)) == list(range(400))
    assert sorted(source.fetched) == list(range(50))
    assert not shelf.twice
    if cached:
        assert sorted(ids(loader)) == list(range(400))
        assert len(source.fetched) == 50
        assert loader.stats()["blocks_from_cache"] >= loader.stats()["blocks_loaded"] - 50


def test_what_is_loaded_and_filled_at_once_is_fetched_once(make_loader: MakeLoader, source_of: SourceOf) -> None:
    """Filling ahead is overtaken by the batch that needs the block."""
    gate, shelf = Gate(source_of(numbered(12, width=BLOCK // 8))), Shelf()
    loader = make_loader(gate, 8, shuffle=False, cache=shelf, memory=1)
    thread = threading.Thread(target=lambda: ids(loader))
    thread.start()
    until(lambda: 0 in gate.waiting)
    gate.open()
    thread.join()
    assert sorted(gate.fetched) == list(range(12))
    assert not shelf.twice


@pytest.mark.parametrize("memory", [1, 3 * BLOCK])
@pytest.mark.parametrize("shuffle", [True, "full", "blocks", False])
def test_a_budget_slows_down_and_blocks_nothing(
    make_loader: MakeLoader, source_of: SourceOf, memory: int, shuffle: bool | str
) -> None:
    source = source_of(numbered(10, width=BLOCK))  # each of 1 MB
    loader = make_loader(source, 4, shuffle=shuffle, memory=memory)
    assert sorted(ids(loader)) == list(range(80))
    assert loader.receipt().complete


def test_memory_keeps_to_the_budget_where_nothing_needs_more(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered(40, width=BLOCK // 8))  # rooms of 192 KB
    loader = make_loader(source, 4, shuffle=False, memory=10 * BLOCK, window_rows=128, arrow=True)
    most = 0
    for _batch in loader:
        most = max(most, loader.stats()["memory_bytes"])
    assert 5 * BLOCK < most <= 10 * BLOCK
    loader.close()
    assert loader.stats()["memory_bytes"] == 0


def test_very_many_tiny_blocks(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered(3000, rows=1))
    loader = make_loader(source, 64, cache=Shelf(), memory=500_000_000)
    for _epoch in range(2):
        assert sorted(ids(loader)) == list(range(3000))
    assert len(source.fetched) == 3000


@pytest.mark.parametrize(
    ("batch_size", "world_size", "lanes", "batches"),
    [(1, 1, None, 40), (1000, 1, None, 1), (16, 9, 2, 3), (8, 8, 1, 5)],
)
def test_odd_sizes(
    make_loader: MakeLoader, source_of: SourceOf, batch_size: int, world_size: int, lanes: int | None, batches: int
) -> None:
    source = source_of(numbered(5))
    ranks = [make_loader(source, batch_size, rank=r, world_size=world_size, lanes=lanes) for r in range(world_size)]
    given = [list(loader) for loader in ranks]
    assert {len(g) for g in given} == {len(loader) for loader in ranks} == {batches}
    assert sorted(i for g in given for i in ids(g)) == list(range(40))


def test_one_row(make_loader: MakeLoader, source_of: SourceOf) -> None:
    for shuffle in (True, "full", "blocks", False):
        loader = make_loader(source_of(numbered(1, rows=1)), 32, shuffle=shuffle)
        assert [ids(loader), ids(loader)] == [[0], [0]]
        assert loader.epoch == 2


# --- filling ahead -------------------------------------------------------------------------------------------------


def test_blocks_beyond_the_budget_wait_in_the_cache(
    make_loader: MakeLoader, source_of: SourceOf, background: Background
) -> None:
    source, shelf = source_of(numbered(12, width=BLOCK // 8)), Shelf()
    batches = iter(make_loader(source, 8, shuffle=False, cache=shelf, memory=1, window_rows=64))
    for _ in range(6):
        next(batches)
        settle(background, shelf)
    assert len(shelf.blocks) >= 9  # 0 to 6 are in memory
    assert len(ids(batches)) == 6 * 8


def test_no_prefetch(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source, shelf = source_of(numbered(12, width=BLOCK // 8)), Shelf()
    batches = iter(make_loader(source, 8, shuffle=False, cache=shelf, memory=1, ahead=0, window_rows=64))
    for step in range(12):
        next(batches)
        assert len(source.fetched) <= step + 3


def test_a_cache_that_keeps_nothing_doesn_t_have_blocks_fetched_twice(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    source = source_of(numbered(60, width=BLOCK // 8))
    loader = make_loader(source, 8, shuffle=False, cache=Shelf(keeps=0), memory=1)
    assert ids(loader) == list(range(480))
    assert len(source.fetched) <= 60 + 12


def test_a_cache_smaller_than_the_dataset_is_filled_again_in_the_next_epoch(
    make_loader: MakeLoader, source_of: SourceOf, background: Background
) -> None:
    source, shelf = source_of(numbered(40, width=BLOCK // 8)), Shelf(keeps=12)
    loader = make_loader(source, 8, shuffle=False, cache=shelf, memory=1, ahead=4 * BLOCK, window_rows=64)
    for _epoch in range(3):
        assert ids(loader) == list(range(320))
    batches = iter(loader)
    for _ in range(20):
        next(batches)
        settle(background, shelf)
    ahead = {source.name(b) for b in range(21, 26)}  # the 20th batch is of block 19, and 20 is loaded with it
    assert ahead & set(shelf.blocks)


def test_what_can_t_be_fetched_ahead_is_tried_again_when_it_is_needed_and_not_before(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    source = source_of(numbered(30, width=BLOCK // 8))
    source.broken[20] = Unavailable("nobody answers")
    for cache in (Shelf(), None):
        source.fetched.clear()
        batches = iter(make_loader(source, 8, shuffle=False, cache=cache, memory=12 * BLOCK, window_rows=64))
        for _ in range(19):
            next(batches)
        assert source.fetched.count(20) <= 2  # into the cache, and into memory
        with pytest.raises(Unavailable, match="nobody answers"):
            list(batches)


def test_an_earlier_failure_is_forgotten_when_the_block_can_be_had(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    source = source_of(numbered(30, width=BLOCK // 8))
    source.broken[20] = Unavailable("nobody answers")
    batches = iter(make_loader(source, 8, shuffle=False, cache=Shelf(), memory=12 * BLOCK, window_rows=64))
    for _ in range(15):
        next(batches)
    source.broken.clear()
    assert ids(batches) == list(range(15 * 8, 240))


def test_a_failure_that_was_under_way_when_the_block_could_be_had_again_is_not_told(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    source = source_of(numbered(8))
    gate = Gate(source, is_open=True)
    source.broken[3] = Unavailable("nobody answers")
    batches = iter(make_loader(gate, 8, shuffle=False, memory=10 * BLOCK, window_rows=64))
    gate.shut(3)
    taken = ids(itertools.islice(batches, 3))
    until(lambda: 3 in gate.waiting)

    class Mended(dict[int, Exception]):
        """What was asked for first fails, what is asked for after that doesn't."""

        def __contains__(self, block: object) -> bool:
            return block == 3 and source.fetched.count(3) == 1

    source.broken = Mended(source.broken)
    threading.Timer(0.02, gate.open).start()
    assert taken + ids(batches) == list(range(64))
    assert source.fetched.count(3) == 2


def test_moving_about_leaves_nothing_behind(make_loader: MakeLoader, source_of: SourceOf) -> None:
    """What was fetched ahead of a place that was left is no longer fetched."""
    gate, shelf = Gate(source_of(numbered(40, width=BLOCK // 8)), is_open=True), Shelf()
    loader = make_loader(gate, 8, shuffle=False, cache=shelf, memory=1)
    for epoch in range(20):
        loader.set_epoch(epoch)
        batches = iter(loader)
        next(batches)
        gate.shut()
        threading.Timer(0.01, gate.open).start()
        next(batches)
        shelf.blocks.clear()
    loader.set_epoch(99)
    gate.open()
    until(lambda: not gate.waiting)
    assert ids(loader) == list(range(320))


# --- disturbed -----------------------------------------------------------------------------------------------------


def test_closed_while_a_batch_waits(make_loader: MakeLoader, source_of: SourceOf) -> None:
    for cache in (Shelf(), None):
        gate = Gate(source_of(numbered(4)))
        loader = make_loader(gate, 8, cache=cache)
        said: list[Exception] = []

        def consume(loader: Loader = loader, said: list[Exception] = said) -> None:
            try:
                list(loader)
            except UsageError as error:
                said.append(error)

        thread = threading.Thread(target=consume)
        thread.start()
        until(lambda gate=gate: bool(gate.waiting))  # type: ignore[misc]
        loader.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert "was closed while a batch waited" in str(said[0])
        until(lambda gate=gate: not gate.waiting)  # type: ignore[misc]
        assert gate.cancelled
        assert not gate.fetched


def test_closed_while_others_are_fetched(make_loader: MakeLoader, source_of: SourceOf) -> None:
    gate, shelf = Gate(source_of(numbered(40, width=BLOCK // 8)), is_open=True), Shelf()
    loader = make_loader(gate, 8, shuffle=False, cache=shelf, memory=4 * BLOCK)
    batches = iter(loader)
    gate.shut(12)
    next(batches)
    next(batches)
    until(lambda: bool(gate.waiting))
    loader.close()
    until(lambda: not gate.waiting)
    done = len(gate.fetched)
    gate.open()
    time.sleep(0.02)
    assert len(gate.fetched) == done
    loader.close()
    with pytest.raises(UsageError, match="was closed; make another"):
        iter(loader)
    assert loader.state_dict()["position"] == 16
    assert loader.receipt().rows == 16


def test_a_loader_nobody_has_any_more_takes_nothing(make_loader: MakeLoader, source_of: SourceOf) -> None:
    """Without close(): threads and memory go with it."""
    before = set(threading.enumerate())
    made = make_loader(source_of(numbered(40)), 8, cache=Shelf(), keep=False)
    batches = iter(made)
    batch = next(batches)
    threads = [t for t in set(threading.enumerate()) - before if t.name.startswith("millrace-feed")]
    assert threads
    gone = weakref.ref(made)
    del made, batches
    gc.collect()
    assert gone() is None
    until(lambda: not any(t.is_alive() for t in threads))
    assert len(batch["id"]) == 8


def test_a_loop_that_is_left_and_taken_up_again_at_each_step(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered(12))
    expected = [batch["id"].tolist() for batch in make_loader(source, 8)]
    loader = make_loader(source, 8, cache=Shelf())
    source.fetched.clear()
    assert [next(iter(loader))["id"].tolist() for _ in range(12)] == expected
    assert sorted(source.fetched) == sorted(set(source.fetched))
    generator = iter(loader)
    next(generator)
    generator.close()  # type: ignore[attr-defined]
    assert loader.position == 8


def test_a_loop_that_was_overtaken_changes_nothing(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered(12))
    for shuffle in (True, "blocks"):
        expected = [batch["id"].tolist() for batch in make_loader(source, 8, shuffle=shuffle)]
        loader = make_loader(source, 8, shuffle=shuffle)
        stale = iter(loader)
        next(stale)
        loader.set_epoch(0)
        fresh = iter(loader)
        got = [next(fresh)["id"].tolist()]
        with pytest.raises(UsageError, match="overtaken"):
            next(stale)
        assert got + [batch["id"].tolist() for batch in fresh] == expected


def test_an_interrupt_while_a_batch_waits_loses_nothing(make_loader: MakeLoader, source_of: SourceOf) -> None:
    gate = Gate(source_of(numbered(20)), is_open=True)
    loader = make_loader(gate, 8, shuffle=False, memory=1, window_rows=64)
    taken = ids(itertools.islice(loader, 3))
    for _ in range(3):
        until(lambda: not gate.waiting)
        gate.shut()

        def interrupt() -> None:
            place = -1
            while not gate.waiting or loader.position != place:  # until the loop waits for it, too
                place = loader.position
                time.sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        with pytest.raises(KeyboardInterrupt):
            _drain(loader, taken, thread.start)
        thread.join()
        gate.open()
    taken += ids(loader)
    assert taken == list(range(160))
    assert loader.receipt().complete


def _drain(loader: Loader, into: list[int], first: Callable[[], None]) -> None:
    first()
    for batch in loader:
        into += batch["id"].tolist()


@pytest.mark.parametrize("shuffle", ["blocks", False])
def test_writing_into_a_batch_doesn_t_reach_the_next_loop(
    make_loader: MakeLoader, source_of: SourceOf, shuffle: bool | str
) -> None:
    source = source_of(numbered(4, rows=16))
    expected = ids(make_loader(source, 8, shuffle=shuffle))
    loader = make_loader(source, 8, shuffle=shuffle, cache=Shelf())
    for steps in (1, 3, 8):
        for batch in itertools.islice(loader, steps):
            batch["id"][:] = -1
        loader.set_epoch(0)
    assert ids(loader) == expected


def test_a_block_that_isn_t_what_the_index_says(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered(3))
    source.messages[1] = b"nothing of the kind"
    with pytest.raises(Corrupt, match="is not a record batch of its schema"):
        list(make_loader(source, 4))
    source.messages[1] = bytes(memoryview(numbered(1, rows=5)[0].serialize()))
    with pytest.raises(Corrupt, match="has 5 rows, its index says 8"):
        list(make_loader(source, 4))


# --- forked children -------------------------------------------------------------------------------------------------


def in_fork(work: Callable[[], None]) -> str:
    """What ``work`` raised in a forked child; it hangs nowhere."""
    out, into = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: that is the point
        pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(into, said.encode())
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.timeout(60)
def test_a_forked_child_is_told(background: Background, make_loader: MakeLoader, source_of: SourceOf) -> None:
    loader = make_loader(source_of(numbered(100)), 8, memory=1)
    batches = iter(loader)
    next(batches)
    for work in (
        lambda: list(loader),
        lambda: list(batches),
        lambda: background.call(asyncio.sleep(0)),
        background.check_process,
    ):
        said = in_fork(work)  # type: ignore[arg-type]
        assert said.startswith("UsageError: this process was forked")
        assert "spawn" in said
    assert in_fork(loader.close) == "nothing"
    assert in_fork(background.close) == "nothing"
    assert len(ids(batches)) == 792


# --- the background loop -----------------------------------------------------------------------------------------


def test_the_background_ends_what_is_under_way_and_starts_nothing_behind_it() -> None:
    background = Background("test-short")
    waiting = background.start(asyncio.sleep(1000))
    background.soon(lambda: None)
    background.close()
    assert waiting.cancelled()
    background.close()
    background.soon(lambda: None)
    with pytest.raises(UsageError, match="Millrace was closed in this process; open it again"):
        background.start(asyncio.sleep(0))


def test_tasks_that_start_others_to_clean_up_with_are_ended_too() -> None:
    background = Background("test-short")
    ended: list[str] = []

    async def inner() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append("inner")

    async def outer() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            asyncio.create_task(inner())  # noqa: RUF006
            await asyncio.sleep(0)
            ended.append("outer")

    background.start(outer())
    background.call(asyncio.sleep(0.01))
    background.close()
    assert sorted(ended) == ["inner", "outer"]


def test_many_start_while_it_closes() -> None:
    """Each of them is told, or cancelled: none waits for ever."""
    for _ in range(20):
        background = Background("test-short")
        outcomes: list[str] = []

        def caller(background: Background = background, outcomes: list[str] = outcomes) -> None:
            try:
                while True:
                    background.call(asyncio.sleep(0))
            except BaseException as error:
                outcomes.append(type(error).__name__)

        threads = [threading.Thread(target=caller) for _ in range(3)]
        for thread in threads:
            thread.start()
        background.close()
        for thread in threads:
            thread.join(PATIENCE_S)
        assert len(outcomes) == 3
        assert set(outcomes) <= {"UsageError", "CancelledError"}
