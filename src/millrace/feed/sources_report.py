"""Events that don't repeat themselves: a dead cloud is one sentence and a count, not one for each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from millrace.core.ports import Clock
from millrace.feed.events import EventKind, FeedEvent

__all__ = ["Reports"]

_EVERY_S: Final = 1.0


@dataclass(slots=True)
class _Held:
    """What was not said again yet: how many, the newest sentence, the longest wait."""

    said_s: float
    more: int = 0
    sentence: str = ""
    waited_s: float = 0.0


class Reports:
    """Passes an event on at once when it is the first of its store and cause for a second, else counts it.

    Those counted are told as one, with the newest sentence and the longest wait, when the second is over: by the next
    :meth:`say` or :meth:`due`, at the latest by :meth:`close`.

    Args:
        clock: For the second, and for the events' dates.
        on_event: Told each one.
    """

    def __init__(self, clock: Clock, on_event: Callable[[FeedEvent], None]) -> None:
        self._clock = clock
        self._on_event = on_event
        self._held: dict[tuple[EventKind, str, str], _Held] = {}

    def say(self, kind: EventKind, store: str, cause: str, sentence: str, waited_s: float = 0.0) -> None:
        """One more event. ``cause`` is what makes it the same as another of its store."""
        now_s = self._clock.monotonic_s()
        held = self._held.get((kind, store, cause))
        if held is None:
            self._held[kind, store, cause] = _Held(now_s)
            self._tell(kind, store, sentence, waited_s)
        else:
            held.more += 1
            held.sentence = sentence
            held.waited_s = max(held.waited_s, waited_s)
        self.due()

    def due(self) -> None:
        """Tell what was counted for a second; forget what did not come again. Cheap when there is nothing."""
        if not self._held:
            return
        now_s = self._clock.monotonic_s()
        for key, held in list(self._held.items()):
            if now_s - held.said_s >= _EVERY_S:
                del self._held[key]
                if held.more:
                    self._held[key] = _Held(now_s)
                    self._tell_counted(key, held)

    def close(self) -> None:
        """Tell all that was counted."""
        held_all, self._held = self._held, {}
        for key, held in held_all.items():
            if held.more:
                self._tell_counted(key, held)

    def _tell_counted(self, key: tuple[EventKind, str, str], held: _Held) -> None:
        more = f" (and {held.more - 1:,} more like it)" if held.more > 1 else ""
        self._tell(key[0], key[1], held.sentence + more, held.waited_s)

    def _tell(self, kind: EventKind, store: str, sentence: str, waited_s: float) -> None:
        self._on_event(FeedEvent(kind, sentence, self._clock.now_ms(), store, waited_s))
