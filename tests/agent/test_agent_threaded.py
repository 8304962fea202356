"""A generator in a thread: one item ahead, closed whatever happens, its errors where they are awaited."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator
from contextlib import aclosing

import pytest

from millrace.agent.threaded import in_thread


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(main())


class Source:
    """Counts up, and notes what is made, where, and whether it was closed."""

    def __init__(self, count: int = 10, *, fails_at: int = -1) -> None:
        self.made = 0
        self.closed = False
        self.threads: set[int] = set()
        self._count = count
        self._fails_at = fails_at
        self.gate = threading.Event()
        self.gate.set()

    def items(self) -> Generator[int, None, None]:
        try:
            for i in range(self._count):
                self.threads.add(threading.get_ident())
                self.gate.wait(20)
                if i == self._fails_at:
                    raise ValueError(f"item {i} is bad")
                self.made += 1
                yield i
        finally:
            self.closed = True


def test_every_item_comes_in_order_from_another_thread() -> None:
    async def scenario() -> None:
        source = Source()
        assert [i async for i in in_thread(source.items())] == list(range(10))
        assert source.closed
        assert threading.get_ident() not in source.threads

    play(scenario)


def test_no_more_than_one_item_is_made_ahead() -> None:
    async def scenario() -> None:
        source = Source()
        used = 0
        async for _ in in_thread(source.items()):
            used += 1
            for _ in range(50):
                await asyncio.sleep(0.0005)
            assert source.made <= used + 1
        assert used == 10

    play(scenario)


def test_leaving_early_waits_for_the_item_in_the_making_and_closes() -> None:
    async def scenario() -> None:
        source = Source()
        async with aclosing(in_thread(source.items())) as items:
            async for i in items:
                if i == 3:
                    break
        assert source.closed
        assert source.made <= 5
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scenario)


def test_an_error_is_raised_where_its_item_is_awaited() -> None:
    async def scenario() -> None:
        source = Source(fails_at=2)
        items = in_thread(source.items())
        assert [await anext(items), await anext(items)] == [0, 1]
        with pytest.raises(ValueError, match="item 2 is bad"):
            await anext(items)
        assert source.closed

    play(scenario)


def test_an_error_of_the_reader_closes_the_source() -> None:
    async def scenario() -> None:
        source = Source()

        async def read() -> None:
            async with aclosing(in_thread(source.items())) as items:
                async for _ in items:
                    raise KeyError("the reader's")

        with pytest.raises(KeyError):
            await read()
        assert source.closed

    play(scenario)


def test_cancelling_waits_for_the_thread_and_closes() -> None:
    async def scenario() -> None:
        source = Source()
        source.gate.clear()

        async def read() -> None:
            async with aclosing(in_thread(source.items())) as items:
                async for _ in items:
                    pass

        task = asyncio.create_task(read())
        while not source.threads:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.sleep(0.01)
        assert not task.done()  # the thread can't be stopped, so it is waited for
        source.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert source.closed

    play(scenario)


def test_nothing_is_nothing() -> None:
    async def scenario() -> None:
        assert [i async for i in in_thread(Source(0).items())] == []

    play(scenario)
