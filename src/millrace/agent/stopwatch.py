"""How long each stage of a task took, though the stages are nested generators in one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from millrace.core.model import StageTime

__all__ = ["Stopwatch"]

T = TypeVar("T")


class Stopwatch:
    """Charges time to the innermost stage at work, so that the stages' seconds add up to the task's.

    Args:
        monotonic_s: The clock.
    """

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._now = monotonic_s
        self._stack: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}
        self._rows: dict[str, int] = {}
        self._bytes: dict[str, int] = {}
        self.current = ""
        """The stage at work, or the last one that was: for the sentence about a failure."""

    def wrap(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """``items``, with the time spent in getting each charged to ``stage`` (less what inner stages took)."""
        iterator = iter(items)
        while True:
            self._push(stage)
            try:
                item = next(iterator, _END)
            except BaseException:
                self._pop(failed=True)
                raise
            self._pop()
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def add(self, stage: str, *, seconds: float = 0.0, rows: int = 0, size_bytes: int = 0) -> None:
        """Count what went through a stage, or time measured elsewhere."""
        # Each sum of a stage is added to by one thread only, so none is touched without need.
        if seconds or stage not in self._seconds:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + seconds
        if rows:
            self._rows[stage] = self._rows.get(stage, 0) + rows
        if size_bytes:
            self._bytes[stage] = self._bytes.get(stage, 0) + size_bytes

    def times(self) -> tuple[StageTime, ...]:
        """What each stage took, in the order in which they first worked."""
        return tuple(
            StageTime(stage, seconds, self._rows.get(stage, 0), self._bytes.get(stage, 0))
            for stage, seconds in self._seconds.items()
        )

    def _push(self, stage: str) -> None:
        now = self._now()
        if self._stack:
            self.add(self._stack[-1], seconds=now - self._since)
        self._stack.append(stage)
        self.current = stage
        self._since = now

    def _pop(self, *, failed: bool = False) -> None:
        now = self._now()
        self.add(self._stack.pop(), seconds=now - self._since)
        self._since = now
        # An error passes through the outer stages on its way up; it belongs to the one it began in.
        if self._stack and not failed:
            self.current = self._stack[-1]


_END = object()
