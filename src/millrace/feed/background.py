"""An event loop in a thread of its own: what a plain ``for`` loop has its reads done by."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from millrace.core.errors import UsageError

__all__ = ["Background"]

T = TypeVar("T")

_ROUNDS: Final = 8
"""Tasks that are cancelled may start others to clean up with; so often are those cancelled in turn."""

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
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def forked(self) -> bool:
        """Whether this process was forked from the one that the thread lives in."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Whether this is the process that the thread lives in.

        Raises:
            UsageError: it was forked off.
        """
        if self.forked:
            raise UsageError(FORKED)

    def runs_here(self) -> bool:
        """Whether the caller is a coroutine on this very loop."""
        return threading.current_thread() is self._thread

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have it done; cancelling the future cancels the work.

        Raises:
            UsageError: this was closed, or the process was forked off.
        """
        if not self.forked:
            with self._lock:  # what is started before the end is cancelled by it; nothing is started behind it
                if not self._closed:
                    return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        self.check_process()
        raise UsageError("Millrace was closed in this process; open it again")

    def soon(self, work: Callable[[], object]) -> None:
        """Have a plain function called on the loop, if it still runs. Waits for nothing, so finalizers may say it."""
        if not self.forked:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(work)

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
        if self.forked:
            return
        with self._lock:
            is_first, self._closed = not self._closed, True
        if is_first:
            self._loop.call_soon_threadsafe(self._loop.stop)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            for _ in range(_ROUNDS):
                tasks = asyncio.all_tasks(self._loop)
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
