"""Blocking work in threads that end when their caller is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

__all__ = ["Stop", "Stopped", "WorkerThreads"]

T = TypeVar("T")


class Stopped(Exception):
    """The caller of a blocking function was cancelled; the function cleans up and leaves."""


class Stop(Protocol):
    """What a blocking function looks at between two steps. ``threading.Event`` is one."""

    def is_set(self) -> bool:
        """Whether the caller is gone."""

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep, but not longer than the caller lives. Gives ``is_set()``."""


class WorkerThreads:
    """A bounded set of threads, started as they are needed.

    A cancelled :meth:`run` tells its function to stop and waits for it, so that nothing runs on behind
    the caller's back. It waits at most ``grace_s``: a thread that the kernel holds (a dead network disk)
    must not make a timeout hang too. Such a thread cleans up whenever it is let go.

    Args:
        name: For the threads' names.
        count: How many at most, at least 1.
        grace_s: Seconds to wait for a cancelled function.
    """

    def __init__(self, name: str, count: int, *, grace_s: float = 10.0) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)
        self._grace_s = grace_s

    async def run(self, work: Callable[[Stop], T]) -> T:
        """Call ``work`` in a thread and give what it gives, or raise what it raises."""
        stop = threading.Event()
        job = self._pool.submit(work, stop)
        outcome = asyncio.wrap_future(job)
        try:
            await asyncio.wait((outcome,))  # unlike awaiting it, this does not cancel it with us
        except asyncio.CancelledError:
            stop.set()
            if not job.cancel():
                await self._settle(outcome)
            raise
        return outcome.result()

    async def aclose(self) -> None:
        """Wait for the threads to end. What waits in line is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._pool.shutdown, wait=True)

    async def _settle(self, outcome: asyncio.Future[T]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace_s
        while not outcome.done() and loop.time() < deadline:
            try:
                await asyncio.wait((outcome,), timeout=deadline - loop.time())
            except asyncio.CancelledError:
                continue  # cancelled twice: the first is raised once the thread is out
        outcome.add_done_callback(_forget)


def _forget(outcome: asyncio.Future[T]) -> None:
    """Take the error of a cancelled call, which nobody is left to hear."""
    if not outcome.cancelled():
        outcome.exception()
