from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from millrace.core.errors import (
    AccessDenied,
    MillraceError,
    RunStopped,
    SourceChanged,
    SourceError,
    Unavailable,
)
from millrace.core.model import SourceObject
from millrace.core.ports import ObjectInfo, RangeRequest
from millrace.core.spec import Pipeline, Source
from millrace.pipeline.formats.registry import format_named
from millrace.pipeline.plan import plan_sources
from millrace.pipeline.reads import StoreReads
from millrace.pipeline.records import ReadContext
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryStore

T = TypeVar("T")


class Watched(MemoryStore):
    """Remembers what was asked for; can fail or wait forever on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[str]] = []
        self.error: MillraceError | None = None
        self.hang = False
        self.running = 0

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        await self._meet()
        return await super().get_range(key, start, length, version=version)

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        self.groups.append([r.key for r in requests])
        await self._meet()
        return await super().read_many(requests)

    async def _meet(self) -> None:
        if self.error is not None:
            raise self.error
        if self.hang:
            self.running += 1
            try:
                await asyncio.sleep(3600)
            finally:
                self.running -= 1


def seen(info: ObjectInfo) -> SourceObject:
    return SourceObject(info.key, info.size_bytes, info.version)


def working(work: Callable[[StoreReads, Watched, list[SourceObject]], T], **limits: Any) -> T:
    async def go() -> T:
        store = Watched()
        objects = [seen(await store.put(f"{i}.txt", [b"%d" % i * 10])) for i in range(5)]
        reads = StoreReads(store, asyncio.get_running_loop(), **limits)
        return await asyncio.to_thread(work, reads, store, objects)

    return asyncio.run(go())


def on_store(store: MemoryStore, change: Callable[[MemoryStore], Any]) -> None:
    """From a worker thread: memory stores are not bound to a loop."""
    asyncio.run(change(store))


def test_ranges_are_cut_off_at_the_end() -> None:
    def work(reads: StoreReads, _: Watched, objects: list[SourceObject]) -> list[bytes]:
        one = objects[1]
        return [bytes(reads.read(one, *at)) for at in ((), (2, 3), (8, 100), (10, 1), (99,), (0, 0))]

    assert working(work) == [b"1" * 10, b"111", b"11", b"", b"", b""]


def test_whole_objects_come_in_order_in_bounded_groups() -> None:
    def work(reads: StoreReads, store: Watched, objects: list[SourceObject]) -> list[list[str]]:
        got = [(i, bytes(view)) for i, view in reads.read_whole(objects)]
        assert got == [(i, b"%d" % i * 10) for i in range(5)]
        return store.groups

    assert working(work, group_bytes=25) == [["0.txt", "1.txt"], ["2.txt", "3.txt"], ["4.txt"]]
    assert working(work, group_objects=4) == [["0.txt", "1.txt", "2.txt", "3.txt"], ["4.txt"]]
    assert working(work, group_bytes=5) == [[f"{i}.txt"] for i in range(5)]


def test_only_one_group_is_fetched_ahead() -> None:
    def work(reads: StoreReads, store: Watched, objects: list[SourceObject]) -> list[list[str]]:
        running = reads.read_whole(objects)
        next(running)
        reads.read(objects[0])  # what was submitted before has begun when this is answered
        groups = list(store.groups)
        running.close()  # type: ignore[attr-defined]
        return groups

    assert working(work, group_objects=1) == [["0.txt"], ["1.txt"]]


def test_no_objects_are_no_reads() -> None:
    assert working(lambda reads, store, _: (list(reads.read_whole([])), store.groups)) == ([], [])


@pytest.mark.parametrize("whole", [True, False])
def test_a_changed_object_is_named(whole: bool) -> None:
    def work(reads: StoreReads, store: Watched, objects: list[SourceObject]) -> None:
        on_store(store, lambda s: s.put("1.txt", [b"new"]))
        with pytest.raises(SourceChanged, match=r"^1\.txt changed since the run was planned; start a new run"):
            list(reads.read_whole(objects)) if whole else reads.read(objects[1])

    working(work)


@pytest.mark.parametrize("whole", [True, False])
def test_a_vanished_object_is_named(whole: bool) -> None:
    def work(reads: StoreReads, store: Watched, objects: list[SourceObject]) -> None:
        on_store(store, lambda s: s.delete("1.txt"))
        with pytest.raises(SourceChanged, match=r"^1\.txt disappeared since the run was planned"):
            list(reads.read_whole(objects)) if whole else reads.read(objects[1])

    working(work)


def test_an_object_of_another_length_has_changed() -> None:
    def work(reads: StoreReads, _: Watched, objects: list[SourceObject]) -> None:
        longer = SourceObject("1.txt", 11, "")
        with pytest.raises(SourceChanged, match="no longer 11 bytes"):
            reads.read(longer)
        with pytest.raises(SourceChanged, match="no longer 11 bytes"):
            list(reads.read_whole([objects[0], longer]))

    working(work)


def test_what_may_pass_stays_retryable_and_the_rest_names_the_object() -> None:
    def work(reads: StoreReads, store: Watched, objects: list[SourceObject]) -> None:
        store.error = Unavailable("the store is having a rest")
        with pytest.raises(Unavailable, match="a rest"):
            reads.read(objects[1])
        store.error = AccessDenied("store s: no permission", store="s", key="1.txt")
        with pytest.raises(SourceError, match=r"^1\.txt can't be read: store s: no permission"):
            reads.read(objects[1])
        with pytest.raises(SourceError, match=r"^1\.txt can't be read"):
            list(reads.read_whole(objects))

    working(work)


def test_closing_frees_a_blocked_thread_and_stops_its_read() -> None:
    async def go() -> None:
        store = Watched()
        store.hang = True
        info = await store.put("a", [b"x"])
        reads = StoreReads(store, asyncio.get_running_loop())
        blocked = asyncio.create_task(asyncio.to_thread(reads.read, seen(info)))
        while not store.running:
            await asyncio.sleep(0)
        reads.close()
        with pytest.raises(RunStopped):
            await blocked
        assert store.running == 0
        with pytest.raises(RunStopped):
            await asyncio.to_thread(reads.read, seen(info))
        reads.close()

    asyncio.run(go())


def test_an_iterator_that_is_let_go_stops_what_it_fetched_ahead() -> None:
    async def go() -> None:
        store = Watched()
        objects = [seen(await store.put(str(i), [b"x"])) for i in range(3)]
        reads = StoreReads(store, asyncio.get_running_loop(), group_objects=1)

        def begin() -> Any:
            running = reads.read_whole(objects)
            first = next(running)
            assert first[0] == 0
            return running

        running = await asyncio.to_thread(begin)
        store.hang = True

        def step() -> None:
            next(running)  # group 1 was there; group 2 hangs

        await asyncio.to_thread(step)
        while not store.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(running.close)
        while store.running:
            await asyncio.sleep(0)

    asyncio.run(go())


def test_a_thread_does_not_hang_when_the_loop_goes_away() -> None:
    caught: list[BaseException] = []
    begun = threading.Event()

    async def go() -> threading.Thread:
        store = Watched()
        store.hang = True
        info = await store.put("a", [b"x"])
        reads = StoreReads(store, asyncio.get_running_loop())

        def work() -> None:
            for _ in range(2):  # once while the loop ends, once after it is closed
                try:
                    begun.set()
                    reads.read(seen(info))
                except MillraceError as error:
                    caught.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not store.running:
            await asyncio.sleep(0)
        return thread

    thread = asyncio.run(go())
    thread.join(20)
    assert not thread.is_alive()
    assert [type(e) for e in caught] == [RunStopped, RunStopped]


@pytest.mark.parametrize("form", ["text", "lines", "files"])
def test_a_file_that_changes_or_disappears_after_planning_is_named(tmp_path: Path, form: str) -> None:
    names = ["a b.txt", "new\nline.txt", "ü.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    source = Source.model_validate({"url": tmp_path.as_uri(), "format": form})

    async def go(change: Callable[[], object]) -> list[str]:
        store = LocalStore(tmp_path, name="src")
        try:
            plan = await plan_sources(Pipeline(dataset="d", sources=(source,)), [store])
            change()
            reads = StoreReads(store, asyncio.get_running_loop())
            context = ReadContext(source, plan.source_schemas[0], reads, lambda q: None, 1000)
            form_ = format_named(form)

            def work() -> list[str]:
                return [path for r in form_.read(plan.chunk(0), context) for path in r.batch["path"].to_pylist()]

            return await asyncio.to_thread(work)
        finally:
            await store.aclose()

    assert sorted(set(asyncio.run(go(lambda: None)))) == sorted(names)
    with pytest.raises(SourceChanged, match=r"^ü\.txt changed since the run was planned; start a new run"):
        asyncio.run(go(lambda: (tmp_path / "ü.txt").write_text("something else")))
    with pytest.raises(SourceChanged, match=r"^a b\.txt disappeared since the run was planned"):
        asyncio.run(go((tmp_path / "a b.txt").unlink))
