"""One store as the feed reads it: what it was asked, what it gave, what is held against it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from millrace.core.model import Digest, StoreSite, block_digest
from millrace.core.ports import Store
from millrace.feed.index import Extent
from millrace.feed.sources_choice import Candidate, Patience, Standing, Usual, size_class

__all__ = ["Attempt", "Source", "StoreTraffic", "is_whole"]

_INLINE_BYTES: Final = 256 << 10
"""Hashed where it is: 0.1 ms, about what the way to a thread and back costs."""
_MISSING_S: Final = 60.0
"""A shard that was not there is not looked for again so soon: repair may bring it."""
_MISSING_MOST: Final = 65_536


@dataclass(frozen=True, slots=True)
class StoreTraffic:
    """What was read from one store so far.

    Attributes:
        bytes_useful: Given to the caller, verified.
        bytes_wasted: Read for nothing: rotten, probes, and calls that lost to another store. A call that was
            cancelled counts whole, so this is what the cloud may bill at most.
        reads: Calls made.
        failures: Those that raised, went quiet or gave wrong bytes.
        seconds: Spent in calls, summed.
        hedges: Those that were late, so that another store was asked too.
    """

    bytes_useful: int = 0
    bytes_wasted: int = 0
    reads: int = 0
    failures: int = 0
    seconds: float = 0.0
    hedges: int = 0


class Source:
    """One store, its standing, its usual times and its counters.

    Args:
        name: In the world.
        store: Where the bytes come from.
        site: Where it is; None when the world does not say.
        distance, price: From here; see :class:`~millrace.feed.sources_choice.Candidate`.
        at_once: Calls under way, at most.
    """

    def __init__(
        self, name: str, store: Store, site: StoreSite | None, *, distance: int, price: float, at_once: int
    ) -> None:
        self.name = name
        self.store = store
        self.site = site
        self.places = asyncio.Semaphore(at_once)
        self.standing = Standing()
        self.answers = 0
        """Counts signs of life: a call during which none came has met a store that is quiet."""
        self.probing = False
        self.told = False
        """Somebody was told that it is left, and is to be told when it is back."""
        self.bells: set[asyncio.Event] = set()
        """Of the reads that wait for it: rung when it is found to have stalled."""
        self.bytes_useful = self.bytes_wasted = self.reads = self.failures = self.hedges = 0
        self.seconds = 0.0
        self._distance = distance
        self._price = price
        self._usual: dict[int, Usual] = {}
        self._rotten: set[Digest] = set()
        self._missing: OrderedDict[Digest, float] = OrderedDict()

    def candidate(self, extent: Extent, place: int, *, holder: bool, now_s: float) -> Candidate:
        """This store, to be chosen or not."""
        return Candidate(
            self.name,
            place,
            holder=holder,
            missing=self._missing.get(extent.shard, now_s) > now_s,
            distance=self._distance,
            price=self._price,
            bucket=self.usual(extent.length).bucket,
            standing=self.standing,
        )

    def usual(self, length: int) -> Usual:
        """How long reads of about so many bytes take."""
        return self._usual.get(size_class(length), Usual())

    def took(self, length: int, seconds: float) -> None:
        """One read more to go by."""
        self._usual[size_class(length)] = self.usual(length).after(seconds)

    def is_rotten(self, shard: Digest) -> bool:
        """Whether it gave wrong bytes of this shard before."""
        return shard in self._rotten

    def has_rotten(self, shard: Digest) -> None:
        """It gave wrong bytes of this shard: not to be asked for it again."""
        self._rotten.add(shard)

    def has_not(self, shard: Digest, now_s: float) -> None:
        """It has no such shard: to be asked last for a while."""
        self._missing[shard] = now_s + _MISSING_S
        self._missing.move_to_end(shard)
        if len(self._missing) > _MISSING_MOST:
            self._missing.popitem(last=False)

    def traffic(self) -> StoreTraffic:
        """The counters."""
        return StoreTraffic(self.bytes_useful, self.bytes_wasted, self.reads, self.failures, self.seconds, self.hedges)


class Attempt:
    """One call of one store for one read. Times are the event loop's.

    Attributes:
        source: The store.
        asked_s: When the read turned to it.
        began_s: When the call began; None while it waits for a place.
        arrived: The bytes are here and are being hashed: nobody is late any more.
        episode, answers: The store's when it began.
        patience: How long to wait for it.
        trusted: Nothing was held against the store when it was asked.
        excused_s: Time in which this process was not looking.
        judged_late, overdue, stalled: What the read made of it: it was looked at when late; another store is
            asked as well; it waited too long altogether.
        task: The call.
    """

    __slots__ = (
        "answers", "arrived", "asked_s", "began_s", "episode", "excused_s", "judged_late", "overdue", "patience",
        "source", "stalled", "task", "trusted",
    )  # fmt: skip

    def __init__(self, source: Source, patience: Patience, now_s: float) -> None:
        self.source = source
        self.patience = patience
        self.asked_s = now_s
        self.began_s: float | None = None
        self.arrived = False
        self.trusted = source.standing.failures == 0
        self.episode = source.standing.episode
        self.answers = source.answers
        self.excused_s = 0.0
        self.judged_late = self.overdue = self.stalled = False
        self.task: asyncio.Task[memoryview] | None = None
        if not source.places.locked():
            self.begin(now_s)

    def begin(self, now_s: float) -> None:
        """The call is made now."""
        self.began_s = now_s
        self.episode = self.source.standing.episode
        self.answers = self.source.answers

    @property
    def waits(self) -> bool:
        """Whether the store still owes an answer."""
        return self.began_s is not None and not self.arrived

    @property
    def quiet(self) -> bool:
        """Whether nothing at all came from the store since it began."""
        return self.source.answers == self.answers

    @property
    def left_since(self) -> bool:
        """Whether the store was left since it began."""
        return self.source.standing.episode != self.episode and self.source.standing.failures > 0

    def waited_s(self, now_s: float) -> float:
        """Since the call began, without what this process slept through; 0 before."""
        return 0.0 if self.began_s is None else now_s - self.began_s - self.excused_s


async def is_whole(view: memoryview, extent: Extent) -> bool:
    """Whether these are the bytes the extent names. Large ones are hashed in a thread, which frees the event loop."""
    if view.nbytes != extent.length:
        return False
    if view.nbytes <= _INLINE_BYTES:
        return block_digest(view) == extent.digest
    return await asyncio.to_thread(block_digest, view) == extent.digest
