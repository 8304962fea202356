"""An event loop in a thread of its own: what a plain ``for`` loop has its reads done by."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from millrace.core.errors import UsageError

__all__ = ["Background"]

T = TypeVar("T")

FORKED = (
    "this process was forked from one that has Millrace open, and its background thread did not come along; "
    "start workers with 'spawn' or 'forkserver' "
    "(DataLoader(..., multiprocessing_context='spawn')), or open Millrace in the child"
)


class Background:
    """A daemon thread that runs one event loop until :meth:`close`.

    Args:
        name: The thread's.
    """

    def __init__(self, name: str) -> None:
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def check_process(self) -> None:
        """Whether this is the process that the thread lives in.

        Raises:
            UsageError: it was forked off.
        """
        if os.getpid() != self._pid:
            raise UsageError(FORKED)

    def runs_here(self) -> bool:
        """Whether the caller is a coroutine on this very loop."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have it done; cancelling the future cancels the work."""
        if os.getpid() != self._pid or self._loop.is_closed():
            work.close()
            self.check_process()
            raise UsageError("Millrace was closed in this process; open it again")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done and wait; an interrupt of the wait cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is under way and end the thread. Safe to call twice, and from a forked child."""
        if os.getpid() != self._pid or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
