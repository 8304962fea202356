"""What goes wrong while a feed goes on, each in one sentence: for logs, ``loader.events`` and the receipt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EventKind", "FeedEvent"]

EventKind = Literal["failover", "hedge", "cache", "quarantine"]


@dataclass(frozen=True, slots=True)
class FeedEvent:
    """Something a person on call would want to know; the feed went on.

    Attributes:
        kind: ``failover`` (a replica was left for another), ``hedge`` (a late read was asked for elsewhere too),
            ``cache`` (the local cache stopped taking or giving blocks), ``quarantine`` (a row can't be decoded).
        sentence: Names the store, shard, folder or row, the cause, and the way out if there is one.
        at_ms: Wall time, milliseconds since 1970.
        store: The store it is about, or ``""``.
        waited_s: How long a read waited because of it.
    """

    kind: EventKind
    sentence: str
    at_ms: int
    store: str = ""
    waited_s: float = 0.0
