"""Locks between processes that end with their holder, however it ends; and threads for what may block.

All locks are ``flock``: the kernel takes them from a process that dies, and two open files of one process exclude each
other like those of two. A lock belongs to whoever holds it *and* finds its own file still under the lock's name: so a
holder may remove the file, and no lock files are left over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["BlockLock", "CacheThreads", "drop_lock", "locked", "take_lock"]

T = TypeVar("T")

_LOOK_S = 0.002


def take_lock(path: str) -> int | None:
    """Take the lock at ``path``, making its file if it isn't there.

    Returns:
        The open file, which holds the lock until it is closed; None if somebody else holds it.

    Raises:
        OSError: as the system says.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held; or its last holder has removed the file, and a lock on that keeps nobody out
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def drop_lock(handle: int) -> None:
    """Give a lock back, also where a forked child has inherited the open file."""
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


@contextlib.contextmanager
def locked(path: str, stop: threading.Event, *, patience_s: float) -> Iterator[int]:
    """Hold a lock that others hold for moments only; gives its open file.

    Raises:
        OSError: ETIMEDOUT if it was held for longer than that, ECANCELED if ``stop`` was set; otherwise as the system
            says.
    """
    waited_s = 0.0
    while (handle := take_lock(path)) is None:
        if stop.wait(_LOOK_S):
            raise OSError(errno.ECANCELED, "cancelled", path)
        waited_s += _LOOK_S
        if waited_s >= patience_s:
            raise OSError(errno.ETIMEDOUT, f"another process has held {path!r} for {patience_s:.0f} s", path)
    try:
        yield handle
    finally:
        drop_lock(handle)


class BlockLock:
    """The right to fetch one block, for one call. Both methods may be called from any thread.

    Attributes:
        over: It was released, or can't be taken any more.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._mutex = threading.Lock()
        self._handle = -1
        self.over = False

    def take(self) -> bool:
        """Try to take it. False if another has it, or :meth:`release` was called before.

        Raises:
            OSError: as the system says.
        """
        with self._mutex:
            if self.over:
                return False
            handle = take_lock(self._path)
            self._handle = -1 if handle is None else handle
            return handle is not None

    def release(self) -> None:
        """Give it back if it was taken, for good: a later :meth:`take` gets nothing."""
        with self._mutex:
            self.over = True
            if self._handle >= 0:
                with contextlib.suppress(OSError):
                    os.unlink(self._path)
                drop_lock(self._handle)
                self._handle = -1


class CacheThreads:
    """A few threads, started as they are needed, for calls that a sick disk may hold up.

    A cancelled call tells its work to stop and waits for it, so that nothing goes on behind the caller's back; but not
    for longer than ``patience_s``, since a thread that the kernel holds can't be stopped. Such a thread cleans up when
    it is let go.

    Args:
        count: How many at most.
        patience_s: After how many seconds a call counts as failed.
    """

    def __init__(self, count: int, *, patience_s: float) -> None:
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="millrace-cache")
        self._patience_s = patience_s
        self._mutex = threading.Lock()
        self._stuck = 0

    def hang(self) -> bool:
        """Whether a call was given up and has not come back: then the disk hangs."""
        return self._stuck > 0

    def later(self, work: Callable[[], None]) -> None:
        """Call ``work`` in a thread, whenever there is one, and don't wait for it."""
        self._pool.submit(work)

    async def run(self, work: Callable[[threading.Event], T], *, surely: bool = False) -> T:
        """Call ``work`` in a thread; give what it gives, or raise what it raises.

        Args:
            work: Given what is set when its caller is gone.
            surely: Cleaning up: it is called even if the caller is cancelled before a thread was free.

        Raises:
            OSError: ETIMEDOUT after ``patience_s``.
        """
        stop = threading.Event()
        job = self._pool.submit(work, stop)
        outcome = asyncio.wrap_future(job)
        try:
            done, _ = await asyncio.wait((outcome,), timeout=self._patience_s)
        except asyncio.CancelledError:
            stop.set()
            if surely or not job.cancel():
                await self._settle(outcome)
            raise
        if not done:
            stop.set()
            self._give_up(job)
            outcome.add_done_callback(_forget)
            raise OSError(errno.ETIMEDOUT, f"the disk has not answered for {self._patience_s:.0f} s")
        return outcome.result()

    def close(self) -> None:
        """Take no more work. What has begun ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _give_up(self, job: Future[T]) -> None:
        def back(_: Future[T]) -> None:
            with self._mutex:
                self._stuck -= 1

        with self._mutex:
            self._stuck += 1
        job.add_done_callback(back)

    async def _settle(self, outcome: asyncio.Future[T]) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience_s
        while not outcome.done() and loop.time() < deadline:
            try:
                await asyncio.wait((outcome,), timeout=deadline - loop.time())
            except asyncio.CancelledError:
                continue  # cancelled twice: the first is raised once the thread is out
        outcome.add_done_callback(_forget)


def _forget(outcome: asyncio.Future[T]) -> None:
    """Take the error of a call that nobody waits for any more."""
    if not outcome.cancelled():
        outcome.exception()
