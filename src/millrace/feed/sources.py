"""One store as the feed reads it: what it was asked, what it gave, what is held against it."""

from __future__ import annotations

import asyncio
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from millrace.core.errors import Corrupt, NotFound, StoreError
from millrace.core.model import Digest, StoreSite, block_digest
from millrace.core.ports import Clock, Store
from millrace.feed.events import FeedEvent
from millrace.feed.index import Extent
from millrace.feed.sources_choice import (
    Budget,
    Candidate,
    Cause,
    HedgePlan,
    Patience,
    Standing,
    Usual,
    distance,
    pause_s,
    put_aside,
    reinstated,
    size_class,
)
from millrace.feed.sources_report import Reports

__all__ = ["Attempt", "Source", "Sources", "StoreTraffic", "bytes_of", "is_whole"]

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
        distance, price: From here; see :class:`~millrace.feed.sources_choice.Candidate`.
        at_once: Calls under way, at most.
    """

    def __init__(self, name: str, store: Store, *, distance: int, price: float, at_once: int) -> None:
        self.name = name
        self.store = store
        self.places = asyncio.Semaphore(at_once)
        self.standing = Standing()
        self.answers = 0
        """Counts signs of life: a call during which none came has met a store that is quiet."""
        self.probing = False
        self.told = False
        """Somebody was told that it is left, and is to be told when it is back."""
        self.bells: set[asyncio.Event] = set()
        """Of the reads that wait for it: rung when it is left."""
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


class Sources:
    """All stores that a reader has, and what its reads share: the plan, the budget, what is told.

    Args:
        stores, sites, here, price, per_store: See :class:`~millrace.feed.replicas.ReplicaReader`.
        plan: How long to wait.
        clock: For how long a store is left.
        rng: For the jitter of that.
        on_event: Told what a person on call would want to know.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        sites: Sequence[StoreSite],
        *,
        here: str | None,
        price: Callable[[StoreSite], float],
        per_store: int,
        plan: HedgePlan,
        clock: Clock,
        rng: random.Random,
        on_event: Callable[[FeedEvent], None],
    ) -> None:
        site_of = {site.name: site for site in sites}
        self.by_name: Mapping[str, Source] = {
            name: Source(
                name,
                store,
                distance=distance(site_of.get(name), here),
                price=price(site_of[name]) if name in site_of else 0.0,
                at_once=per_store,
            )
            for name, store in stores.items()
        }
        self.plan = plan
        self.clock = clock
        self.reports = Reports(clock, on_event)
        self._rng = rng
        self._budget = Budget(plan.burst)
        self._behind: set[asyncio.Task[object]] = set()

    def begin(self) -> None:
        """One more read begins."""
        self.reports.due()
        self._budget = self._budget.after_read(self.plan)

    async def aclose(self) -> None:
        """End the probes, wait for what was cancelled, and tell what was not told yet."""
        for task in self._behind:
            task.cancel()
        while self._behind:
            await asyncio.wait(self._behind)
        self.reports.close()

    def may_hedge(self) -> bool:
        """Take one hedge out of the budget, if there is one."""
        left = self._budget.spent()
        self._budget = left or self._budget
        return left is not None

    def pause_s(self, tries: int) -> float:
        """How long a read waits before it asks a store again that failed it so many times."""
        return pause_s(tries, self._rng.random())

    def leave(self, source: Source, cause: Cause, episode: int, *, first_s: float | None = None) -> None:
        """A store failed in a call that began in ``episode``: reads go elsewhere for a while."""
        now_s = self.clock.monotonic_s()
        source.standing = put_aside(
            source.standing, self.plan, cause, episode=episode, now_s=now_s, dice=self._rng.random(), first_s=first_s
        )
        for bell in source.bells:
            bell.set()

    def trust(self, source: Source, episode: int) -> None:
        """A store gave what it was asked for in a call that began in ``episode``."""
        before = source.standing
        source.standing = reinstated(before, episode=episode)
        if source.told and not source.standing.failures:
            source.told = False
            away_s = self.clock.monotonic_s() - before.since_s
            sentence = f"store {source.name} answers again, {away_s:.1f} s after it was left; it is read from as before"
            self.reports.say("failover", source.name, "answers again", sentence)

    async def ask(self, attempt: Attempt, extent: Extent, key: str) -> memoryview:
        """One call of one store; gives whole bytes, or raises what was wrong after counting it."""
        source, loop = attempt.source, asyncio.get_running_loop()
        source.reads += 1
        began_s = loop.time()
        try:
            view = await source.store.get_range(key, extent.offset, extent.length)
        except NotFound:
            source.failures += 1
            source.answers += 1
            source.has_not(extent.shard, self.clock.monotonic_s())
            self.trust(source, attempt.episode)
            raise
        except StoreError:
            source.failures += 1
            self.leave(source, "error", attempt.episode)
            raise
        finally:
            source.seconds += loop.time() - began_s
        seconds = loop.time() - began_s
        attempt.arrived = True
        source.answers += 1
        if not await is_whole(view, extent):
            source.failures += 1
            source.bytes_wasted += view.nbytes
            source.has_rotten(extent.shard)
            self.leave(source, "rotten", attempt.episode)
            short = f"only {view.nbytes} of {extent.length} bytes came"
            wrong = "the bytes are not those the digest names"
            raise Corrupt(short if view.nbytes < extent.length else wrong, store=source.name, key=key)
        source.took(extent.length, seconds)
        self.trust(source, attempt.episode)
        return view

    async def probe(self, attempt: Attempt, extent: Extent, key: str) -> None:
        """Try a store that was left, beside a read that does not wait for it."""
        source = attempt.source
        source.probing = True
        try:
            async with asyncio.timeout(attempt.patience.stall_s), source.places:
                attempt.begin(asyncio.get_running_loop().time())
                view = await self.ask(attempt, extent, key)
            source.bytes_wasted += view.nbytes
        except TimeoutError:
            source.failures += 1
            source.bytes_wasted += extent.length
            self.leave(source, "stall", attempt.episode)
        except Corrupt:
            _tell_rotten(self.reports, source, extent)
        except StoreError:
            pass  # counted, and left for longer, by the call itself
        finally:
            source.probing = False

    def keep(self, task: asyncio.Task[object]) -> None:
        """Own a task that outlives its read: a probe, or a cancelled call that has not ended."""
        self._behind.add(task)
        task.add_done_callback(self._let_go)

    def _let_go(self, task: asyncio.Task[object]) -> None:
        self._behind.discard(task)
        if not task.cancelled():
            task.exception()  # its read has its bytes or its own error: nobody is left to hear this one


def _tell_rotten(reports: Reports, source: Source, extent: Extent) -> None:
    sentence = (
        f"store {source.name} holds shard {extent.shard[:12]} rotten: {bytes_of(extent)} are not those the digest "
        "names; it is not used again for this shard; run millrace verify NAME --repair"
    )
    reports.say("failover", source.name, "rotten", sentence)


def bytes_of(extent: Extent) -> str:
    """For sentences: ``bytes 0-99``."""
    return f"bytes {extent.offset}-{extent.offset + extent.length - 1}"
