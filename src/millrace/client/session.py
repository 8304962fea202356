"""A world, opened once for a process and shared by everything in it that asks."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, TypeVar

from millrace.feed.background import Background
from millrace.wiring.world import OpenWorld, open_bare, open_world, read_world

__all__ = ["Session", "session_at", "session_for"]

T = TypeVar("T")


class Session:
    """An open world on an event loop of its own, for code that isn't async.

    Attributes:
        world: The open world. Use it only in coroutines given to :meth:`call` and :meth:`start`.

    Raises:
        UsageError, SpecError: there is no world file or it is wrong.
    """

    world: OpenWorld

    def __init__(self, opening: AbstractAsyncContextManager[OpenWorld]) -> None:
        self.background = Background("millrace-client")
        self._closing = self.background.call(_event())
        opened: concurrent.futures.Future[OpenWorld] = concurrent.futures.Future()
        self._holding = self.background.start(self._hold(opening, opened))
        try:
            self.world = opened.result()
        except BaseException:
            self.background.close()
            raise

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done, and wait for it.

        Raises:
            UsageError: this process was forked from the one that opened the session.
        """
        return self.background.call(work)

    def start(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Have it done in the background."""
        return self.background.start(work)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._holding.done()

    def close(self) -> None:
        """Close the stores and end the thread. Safe to call twice."""
        if not self._holding.done():
            self.background.call(_set(self._closing))
            self._holding.result()
        self.background.close()

    async def _hold(
        self, opening: AbstractAsyncContextManager[OpenWorld], opened: concurrent.futures.Future[OpenWorld]
    ) -> None:
        try:
            async with opening as world:
                opened.set_result(world)
                await self._closing.wait()
        except BaseException as error:
            if opened.done():
                raise
            opened.set_exception(error)


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


def session_at(manifest_url: str) -> Session:
    """The process's one session with the store that a manifest's URL lies in; it needs no world file.

    Raises:
        UsageError: it is no URL of a store Millrace knows.
    """
    root = manifest_url.partition("/manifests/")[0]
    return _shared(root, lambda: open_bare(root))


def _shared(place: str, opening: Callable[[], AbstractAsyncContextManager[OpenWorld]]) -> Session:
    key = (os.getpid(), place)
    with _lock:
        if key not in _sessions or _sessions[key].closed:
            _sessions[key] = Session(opening())
            if not _registered:
                _registered.append(True)
                _at_exit(_close_all)
        return _sessions[key]


def _at_exit(work: Callable[[], None]) -> None:
    """Before thread pools close: what closes a world needs them, and ``atexit`` comes too late."""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(work)


def _close_all() -> None:
    for (pid, _), session in list(_sessions.items()):
        if pid == os.getpid():
            session.close()


async def _event() -> asyncio.Event:
    return asyncio.Event()


async def _set(event: asyncio.Event) -> None:
    event.set()
