"""A cache that stops working is an inconvenience: it is said once, and tried again after a while."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

from millrace.core.ports import Clock
from millrace.feed.events import FeedEvent

__all__ = ["FULL", "CacheTrouble"]

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
_GONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ENXIO})
_WAIT_S_MIN = 1.0
_WAIT_S_MAX = 60.0
_SILENT_S = 600.0
"""One cause is reported once in this time, so that a disk that comes and goes does not fill the log."""


class CacheTrouble:
    """Whether the cache takes blocks now, and what was said about it. May be used from several threads.

    Args:
        folder: Of the cache, for the sentences.
        clock: For waiting and for the events' time.
        on_event: Called in the thread that met the trouble.
    """

    def __init__(self, folder: Path, clock: Clock, on_event: Callable[[FeedEvent], None]) -> None:
        self._folder = str(folder)
        self._clock = clock
        self._on_event = on_event
        self._mutex = threading.Lock()
        self._said_s: dict[str, float] = {}
        self._round = 0
        self._wait_s = 0.0
        self._next_s = 0.0

    def degraded(self) -> bool:
        """Whether blocks are not stored for now."""
        return self._wait_s > 0

    def attempt(self) -> int | None:
        """Ask whether to store a block: a ticket for :meth:`failed` or :meth:`worked`, or None.

        While degraded, one caller gets a ticket each time the wait is over.
        """
        with self._mutex:
            if self._wait_s > 0:
                now_s = self._clock.monotonic_s()
                if now_s < self._next_s:
                    return None
                self._next_s = now_s + self._wait_s
            return self._round

    def failed(self, ticket: int, problem: OSError) -> None:
        """The disk refused. Those that asked before this was known, and fail too, change nothing."""
        with self._mutex:
            if ticket == self._round:
                self._round += 1
                self._wait_s = min(max(2 * self._wait_s, _WAIT_S_MIN), _WAIT_S_MAX)
                self._next_s = self._clock.monotonic_s() + self._wait_s
        cause, sentence = _explain(problem)
        self.report(
            f"store {cause}",
            f"the cache {self._folder!r} takes no more blocks, which are read from the stores instead: {sentence}",
        )

    def worked(self, ticket: int) -> None:
        """A block was stored."""
        if self._wait_s == 0:
            return
        with self._mutex:
            if ticket != self._round:
                return
            self._wait_s = 0.0
        self.report("works", f"the cache {self._folder!r} takes blocks again")

    def unreadable(self, name: str, problem: OSError) -> None:
        """A block is there, or may be, and can't be read."""
        cause, sentence = _explain(problem)
        self.report(
            f"read {cause}",
            f"the cache {self._folder!r} can't give block {name[:12]}, which is read from a store instead: {sentence}",
        )

    def report(self, cause: str, sentence: str) -> None:
        """Tell of something, unless the same cause was told of lately."""
        with self._mutex:
            now_s = self._clock.monotonic_s()
            said_s = self._said_s.get(cause)
            if said_s is not None and now_s - said_s < _SILENT_S:
                return
            self._said_s[cause] = now_s
        self._on_event(FeedEvent("cache", sentence, self._clock.now_ms()))


def _explain(problem: OSError) -> tuple[str, str]:
    """The kind of a failed system call, and what to tell a person."""
    words = (problem.strerror or str(problem)).lower()
    code = problem.errno or 0
    if code in FULL:
        return "full", f"its disk is full ({words}); free some space, or lower the cache's limit"
    if code == errno.EROFS:
        return "read-only", f"its disk is read-only now ({words}); look at the disk's log, or mount it for writing"
    if code in _DENIED:
        return "denied", f"permission denied ({words}); give this user access to all of the folder"
    if code in _GONE:
        return "gone", f"it has vanished ({words}); mount its disk again, or start again with another folder"
    if code == errno.ETIMEDOUT:
        return "silent", f"{words}; look at the disk, or start again with another folder"
    return f"errno {code}", f"{words}; look at the disk's log, or start again with another folder"
