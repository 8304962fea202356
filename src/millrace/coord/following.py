"""Watching: how any coordination store turns looks at its newest facts into an endless stream of changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from dataclasses import dataclass

from millrace.core.errors import CoordError
from millrace.core.ports import Change

__all__ = ["BATCH_CHANGES_MAX", "Bell", "Cursor", "Look", "follow"]

BATCH_CHANGES_MAX = 100
"""Changes in one look: what a watch holds in memory is at most this many values."""


class Bell:
    """Wakes those who wait on one event loop. A ring between a look at ``rings`` and the wait is not lost.

    Unlike ``asyncio.Condition`` it belongs to no event loop, so a store outlives ``asyncio.run``.
    """

    def __init__(self) -> None:
        self.rings = 0
        self._waiting: set[asyncio.Event] = set()

    def ring(self) -> None:
        """Wake everybody."""
        self.rings += 1
        for event in self._waiting:
            event.set()

    async def wait(self, rings: int, timeout_s: float | None = None) -> None:
        """Wait until it has rung since ``rings`` was read, or ``timeout_s`` has passed."""
        if self.rings != rings:
            return
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await event.wait()
        finally:
            self._waiting.discard(event)


@dataclass(frozen=True, slots=True)
class Cursor:
    """All changes up to and including ``key`` at ``revision`` were told; ``key`` None means all of that revision."""

    revision: int
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What one look found.

    Attributes:
        revision: The store's, at that moment.
        floor: Deletions up to this revision may have been forgotten.
        changes: After the cursor, by revision, then key; at most ``BATCH_CHANGES_MAX``.
        more: Whether there may be more of them than that.
        stamp: Changes when the store does; equal stamps mean that another look would find nothing new.
    """

    revision: int
    floor: int
    changes: tuple[Change, ...]
    more: bool
    stamp: Hashable


async def follow(
    prefix: str,
    since_revision: int,
    look: Callable[[Cursor], Awaitable[Look | None]],
    wait: Callable[[Hashable], Awaitable[bool]],
) -> AsyncGenerator[Change, None]:
    """Tell the changes after ``since_revision``, in order, until the store is closed.

    Args:
        prefix: For the message.
        since_revision: 0 tells all that is there now, then what comes.
        look: Gives what lies after a cursor; None when the store was closed.
        wait: Returns True once the store may no longer be at a stamp, False when it was closed.

    Raises:
        CoordError: The store no longer remembers every deletion since the last one told.
    """
    cursor = Cursor(since_revision)
    told = since_revision
    while (found := await look(cursor)) is not None:
        if told == 0:
            told = found.revision  # A watch that starts from nothing has told of no key that could be missed going.
        elif told < found.floor:
            raise CoordError(
                f"the watch of {prefix!r} is at revision {told}, and deletions up to revision {found.floor} are no "
                "longer remembered; watch again from revision 0, which tells all that is there now"
            )
        for change in found.changes:
            yield change
        if found.more:
            last = found.changes[-1].entry
            cursor = Cursor(last.revision, last.key)
            continue
        told = max(told, found.revision)
        cursor = Cursor(told)
        if not await wait(found.stamp):
            return
