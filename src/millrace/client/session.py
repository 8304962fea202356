"""A world, opened once for a process and shared by everything in it that asks."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from millrace.core.errors import MillraceError, UsageError
from millrace.feed.background import Background
from millrace.wiring.world import OpenWorld, open_bare, open_world, read_world

__all__ = ["Held", "Session", "session_at", "session_for"]

T = TypeVar("T")

_FORKABLE: Final = ("file://", "memory://")


class Held(Generic[T]):
    """A context that stays entered on an event loop in another thread, until :meth:`release`.

    Attributes:
        value: What it gave.

    Raises:
        Exception: whatever entering it raises.
    """

    value: T

    def __init__(self, background: Background, opening: AbstractAsyncContextManager[T]) -> None:
        self._background = background
        self._leave = asyncio.Event()
        entered: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._left = background.start(_hold(opening, entered, self._leave))
        try:
            self.value = entered.result()
        except BaseException:
            self.release_soon()
            raise

    @property
    def left(self) -> bool:
        """Whether it was left, or ended by itself."""
        return self._left.done()

    def release(self) -> None:
        """Leave it, and wait until that is done. Safe to call twice."""
        self.release_soon()
        self._left.result()

    def release_soon(self) -> None:
        """Leave it. Waits for nothing, so finalizers may say it."""
        self._background.soon(self._leave.set)


class Session:
    """An open world on an event loop of its own, for code that isn't async.

    Attributes:
        world: The open world. Use it only in coroutines given to :meth:`call` and :meth:`start`.
        background: The event loop.

    Raises:
        UsageError, SpecError: there is no world file or it is wrong.
    """

    world: OpenWorld

    def __init__(self, opening: AbstractAsyncContextManager[OpenWorld]) -> None:
        self.background = Background("millrace-client")
        self._guests: set[Held[None]] = set()
        try:
            self._world = Held(self.background, opening)
        except BaseException:
            self.background.close()
            raise
        self.world = self._world.value

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done, and wait for it.

        Raises:
            UsageError: this process was forked from the one that opened the session.
        """
        return self.background.call(work)

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have it done in the background."""
        return self.background.start(work)

    def hold(self, opening: AbstractAsyncContextManager[None]) -> Held[None]:
        """Enter a context; it is left when it is released, or else before the world is closed.

        Raises:
            Exception: whatever entering it raises.
        """
        held = Held(self.background, opening)
        self._guests = {guest for guest in self._guests if not guest.left} | {held}
        return held

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._world.left

    def close(self) -> None:
        """Close the stores and end the thread. Safe to call twice."""
        if self.background.forked:
            return
        try:
            if not self.closed:
                for guest in self._guests:
                    guest.release_soon()
                for guest in self._guests:
                    with contextlib.suppress(MillraceError):  # what it ended with is its own affair
                        guest.release()
                self._world.release()
        finally:
            self.background.close()


_sessions: dict[tuple[int, str], Session] = {}
_registered: list[bool] = []
_lock = threading.Lock()


def session_for(world: Path | None) -> Session:
    """The process's one session with a world; it is closed when the process ends.

    Args:
        world: The world file; None means ``$MILLRACE_WORLD``, or ``world.yaml`` here or in a folder above.

    Raises:
        UsageError, SpecError: there is no world file or it is wrong.
    """
    file = read_world(world)[0].resolve()
    return _shared(str(file), lambda: open_world(file))


def session_at(root: str) -> Session:
    """The process's one session with a store; it needs no world file.

    Args:
        root: The store's URL. A relative ``file://`` one starts from the working directory.

    Raises:
        UsageError: it is no URL of a store Millrace knows.
    """
    return _shared(f"{root} from {Path.cwd()}", lambda: open_bare(root))


def _shared(place: str, opening: Callable[[], AbstractAsyncContextManager[OpenWorld]]) -> Session:
    key = (os.getpid(), place)
    with _lock:
        if key not in _sessions or _sessions[key].closed:
            _check_forked()
            _sessions[key] = Session(opening())
            if not _registered:
                _registered.append(True)
                _at_exit(_close_all)
        return _sessions[key]


def _check_forked() -> None:
    """Whether a world can be opened in this process: the library behind cloud stores hangs in a forked child.

    Raises:
        UsageError: it can't.
    """
    for (pid, _), session in _sessions.items():
        urls = [store.url for store in session.world.spec.stores().values()]
        if pid != os.getpid() and not all(url.startswith(_FORKABLE) for url in urls):
            raise UsageError(
                "this process was forked from one that has Millrace open on cloud stores, and their connections did "
                "not come along; start it with 'spawn' or 'forkserver' (multiprocessing.set_start_method('spawn'))"
            )


def _at_exit(work: Callable[[], None]) -> None:
    """Before thread pools close: what closes a world needs them, and ``atexit`` comes too late."""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(work)


def _close_all() -> None:
    for (pid, _), session in list(_sessions.items()):
        if pid == os.getpid():
            session.close()


async def _hold(
    opening: AbstractAsyncContextManager[T], entered: concurrent.futures.Future[T], leave: asyncio.Event
) -> None:
    try:
        async with opening as value:
            entered.set_result(value)
            await leave.wait()
    except BaseException as error:
        if entered.done():
            raise
        entered.set_exception(error)
