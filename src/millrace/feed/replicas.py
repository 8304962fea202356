"""Reading one verified extent from the best of its replicas, and from another when that one fails, stalls or lies.

``docs/design/feed-reading.md`` says why it waits as long as it does. Decisions are in :mod:`.sources_choice`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from millrace.core.errors import Corrupt, NotFound, StoreError, Unavailable
from millrace.core.model import StoreSite
from millrace.core.ports import Clock, Store
from millrace.feed.events import EventKind, FeedEvent
from millrace.feed.index import Extent
from millrace.feed.sources import Attempt, Source, Sources, StoreTraffic, bytes_of
from millrace.feed.sources_choice import HedgePlan, in_order, patience, probe_of

__all__ = ["HedgePlan", "ReplicaReader", "StoreTraffic"]

_SETTLE_S: Final = 0.05
"""How long a read that has its bytes waits for the calls it cancelled. A thread that a dead disk holds takes longer."""
_LAG_S: Final = 0.05
"""An event loop that wakes up this late was not looking: what waited meanwhile is not held against a store."""
_PLAN: Final = HedgePlan()


class ReplicaReader:
    """Reads extents from whichever replica is near, cheap, quick and true. Belongs to one event loop.

    Args:
        stores: By name.
        sites: Where they are. A store without one counts as far away and free.
        here: Where this process is, ``cloud/region`` or ``cloud``; None when not known.
        price: Dollars a GB to read from a site to here.
        clock: For how long a store is left, and for the dates of events.
        rng: For the jitter of that.
        on_event: Told of each replica left for another and each read asked for twice, on the event loop's thread.
        hedge: How long to wait.
        in_flight: Reads under way, at most; others wait their turn.
        per_store: Calls under way in one store, at most.
    """

    def __init__(
        self,
        stores: Mapping[str, Store],
        sites: Sequence[StoreSite],
        *,
        here: str | None,
        price: Callable[[StoreSite], float],
        clock: Clock,
        rng: random.Random,
        on_event: Callable[[FeedEvent], None],
        hedge: HedgePlan = _PLAN,
        in_flight: int = 64,
        per_store: int = 16,
    ) -> None:
        self._sources = Sources(
            stores,
            sites,
            here=here,
            price=price,
            per_store=per_store,
            plan=hedge,
            clock=clock,
            rng=rng,
            on_event=on_event,
        )
        self._places = asyncio.Semaphore(in_flight)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def read(self, extent: Extent, key: str, names: Sequence[str], *, holders: int | None = None) -> memoryview:
        """The bytes of one extent, verified.

        Args:
            extent: What to read.
            key: The shard's object in every store.
            names: The stores that may hold it and that policy allows, those known to hold it first.
            holders: How many of ``names`` are known to hold it; None for all. The others are asked after those.

        Raises:
            Corrupt: every replica gave wrong bytes.
            Unavailable: no replica could be read; the message says why for each store, and how to repair.
        """
        async with self._places:
            self._sources.begin()
            return await _Read(self._sources, extent, key, names, len(names) if holders is None else holders).run()

    def traffic(self) -> Mapping[str, StoreTraffic]:
        """What was read so far, for each store."""
        return {name: source.traffic() for name, source in self._sources.by_name.items()}

    async def aclose(self) -> None:
        """End the probes, wait for what was cancelled, and tell what was not told yet. The stores stay open."""
        await self._sources.aclose()


class _Read:
    """One extent on its way: who was asked, who is to be asked next, and what went wrong so far."""

    def __init__(self, sources: Sources, extent: Extent, key: str, names: Sequence[str], holders: int) -> None:
        self._sources = sources
        self._plan = sources.plan
        self._extent = extent
        self._key = key
        self._loop = asyncio.get_running_loop()
        self._deadline_s = self._loop.time() + self._plan.patience_s(extent.length)
        self._bell = asyncio.Event()
        self._live: list[Attempt] = []
        self._dropped: list[asyncio.Task[memoryview]] = []
        self._probe: asyncio.Task[None] | None = None
        self._again: dict[str, float] = {}
        self._tries: Counter[str] = Counter()
        self._reasons: dict[str, str] = {}
        self._rotten: set[str] = set()
        self._unsaid: list[tuple[EventKind, str, str, str, float]] = []
        self._holders = frozenset(names[:holders])
        self._queue = self._choose(list(dict.fromkeys(names)))

    async def run(self) -> memoryview:
        """The verified bytes."""
        won: Attempt | None = None
        grace_s: float | None = _SETTLE_S
        try:
            while True:
                self._bell.clear()
                won = self._collect()
                if won is not None and won.task is not None:
                    view = won.task.result()
                    won.source.bytes_useful += view.nbytes
                    return view
                await self._news_within(self._advance(self._loop.time()))
        except asyncio.CancelledError:
            grace_s = None
            raise
        finally:
            await self._end(won, grace_s)

    # --- choosing -----------------------------------------------------------------------------------------------

    def _choose(self, names: Sequence[str]) -> deque[Source]:
        now_s = self._sources.clock.monotonic_s()
        candidates = []
        for place, name in enumerate(names):
            source = self._sources.by_name.get(name)
            if source is None:
                self._reasons[name] = "not in this world file"
            elif source.is_rotten(self._extent.shard):
                self._reasons[name] = "the bytes are not those the digest names"
                self._rotten.add(name)
            else:
                candidates.append(source.candidate(self._extent, place, holder=name in self._holders, now_s=now_s))
        due = probe_of(candidates, now_s)
        if due is not None:
            self._start_probe(self._sources.by_name[due.name])
        return deque(self._sources.by_name[c.name] for c in in_order(candidates, now_s))

    def _start_probe(self, source: Source) -> None:
        if source.probing or source.places.locked():
            return
        attempt = Attempt(source, patience(self._plan, source.usual(self._extent.length)), self._loop.time())
        source.probing = True
        self._probe = asyncio.create_task(self._sources.probe(attempt, self._extent, self._key))
        self._sources.keep(self._probe)

    def _start(self, source: Source, now_s: float) -> None:
        attempt = Attempt(source, patience(self._plan, source.usual(self._extent.length)), now_s)
        attempt.task = asyncio.create_task(self._ask(attempt))
        attempt.task.add_done_callback(lambda _: self._bell.set())
        source.bells.add(self._bell)
        self._live.append(attempt)

    async def _ask(self, attempt: Attempt) -> memoryview:
        async with attempt.source.places:
            attempt.begin(self._loop.time())
            return await self._sources.ask(attempt, self._extent, self._key)

    def _next(self, now_s: float) -> Source | None:
        if self._queue:
            return self._queue.popleft()
        for name, at_s in self._again.items():
            if at_s <= now_s:
                del self._again[name]
                return self._sources.by_name[name]
        return None

    # --- looking ------------------------------------------------------------------------------------------------

    def _collect(self) -> Attempt | None:
        """Take what has ended: the one that won, or None."""
        for attempt in [a for a in self._live if a.task is not None and a.task.done()]:
            assert attempt.task is not None
            self._live.remove(attempt)
            error = None if attempt.task.cancelled() else attempt.task.exception()
            if error is None and not attempt.task.cancelled():
                return attempt
            if error is not None and not isinstance(error, StoreError):
                raise error
            self._failed(attempt, error or Unavailable("the call was cut off", store=attempt.source.name))
        return None

    def _failed(self, attempt: Attempt, error: StoreError) -> None:
        source, shard = attempt.source, self._extent.shard[:12]
        waited_s = self._loop.time() - attempt.asked_s
        self._reasons[source.name] = str(error)
        if isinstance(error, Corrupt):
            self._rotten.add(source.name)
            cause = f"store {source.name} holds shard {shard} rotten: of {bytes_of(self._extent)}, {error}"
        elif isinstance(error, NotFound):
            cause = f"store {source.name} does not have shard {shard}"
        else:
            cause = f"store {source.name} failed on shard {shard}: {error}"
        if error.retryable:
            self._tries[source.name] += 1
            self._again[source.name] = self._loop.time() + self._sources.pause_s(self._tries[source.name])
        if isinstance(error, NotFound) and source.name not in self._holders:
            return  # it never said that it had it
        self._unsaid.append(("failover", source.name, error.kind, cause, waited_s))

    def _advance(self, now_s: float) -> float:
        """Judge who is waited for, ask the next store if all are overdue; gives the seconds until the next look.

        Raises:
            Corrupt, Unavailable: there is nobody left to wait for.
        """
        for attempt in list(self._live):
            self._judge(attempt, now_s)
        if all(a.overdue for a in self._live):
            source = self._next(now_s)
            if source is not None:
                self._start(source, now_s)
        soonest_again_s = min(self._again.values(), default=self._deadline_s)
        over = now_s >= self._deadline_s or soonest_again_s >= self._deadline_s
        if now_s >= self._deadline_s or (over and not self._live and not self._queue):
            raise self._nobody_left(now_s)
        self._say()
        looks = [self._deadline_s]
        if all(a.overdue for a in self._live):
            looks.append(soonest_again_s)
        for attempt in self._live:
            if attempt.began_s is None:
                looks.append(now_s + self._late_s(attempt))  # it can't be late before
            elif attempt.waits:
                began_s = now_s - attempt.waited_s(now_s)
                if not attempt.judged_late:
                    looks.append(began_s + self._late_s(attempt))
                if not attempt.stalled:
                    looks.append(began_s + attempt.patience.stall_s)
        return max(0.0, min(looks) - now_s)

    def _late_s(self, attempt: Attempt) -> float:
        return attempt.patience.late_s if attempt.trusted else min(attempt.patience.late_s, self._plan.first_s)

    def _judge(self, attempt: Attempt, now_s: float) -> None:
        source = attempt.source
        if attempt.began_s is None and attempt.left_since and source.standing.cause != "late":
            self._live.remove(attempt)  # it stood in line, and the store was left meanwhile: ask it last
            self._drop(attempt)
            self._queue.append(source)
            return
        if attempt.began_s is None:
            attempt.overdue = not attempt.trusted
            return
        if not attempt.waits:
            return
        waited_s = attempt.waited_s(now_s)
        stalled_elsewhere = attempt.left_since and source.standing.cause == "stall" and attempt.quiet
        if not attempt.stalled and (waited_s >= attempt.patience.stall_s or stalled_elsewhere):
            attempt.stalled = attempt.judged_late = attempt.overdue = True
            source.failures += 1
            self._reasons[source.name] = f"no answer in {waited_s:.2f} s"
            if attempt.quiet:
                self._sources.leave(source, "stall", attempt.episode)
            what = "stalled" if attempt.quiet else "answers others but not this read"
            cause = f"store {source.name} {what}: nothing of shard {self._extent.shard[:12]} came in {waited_s:.2f} s"
            self._unsaid.append(("failover", source.name, "stall", cause, waited_s))
        elif not attempt.overdue and waited_s >= self._late_s(attempt):
            free = not attempt.trusted or (attempt.left_since and attempt.quiet)
            if self._queue and (free or (not attempt.judged_late and self._sources.may_hedge())):
                attempt.overdue = True
                source.hedges += 1
                cause = f"store {source.name} is late with shard {self._extent.shard[:12]}: {waited_s:.2f} s so far"
                self._unsaid.append(("hedge", source.name, "late", cause, waited_s))
            attempt.judged_late = True

    def _say(self) -> None:
        """Tell what went wrong, now that it is known who is read instead. What ends the read, its error tells."""
        instead = next((a.source.name for a in reversed(self._live) if not a.overdue), None)
        if instead is None and self._queue:
            return
        for kind, store, cause, sentence, waited_s in self._unsaid:
            if instead is None:
                also = "no other replica is left, so it is waited for and asked again"
            elif kind == "hedge":
                also = f"{instead} is asked too"
            else:
                also = f"{instead} is read instead, after {waited_s:.2f} s"
            way_out = "; run millrace verify NAME --repair" if cause in {"Corrupt", "NotFound"} else ""
            self._sources.reports.say(kind, store, cause, f"{sentence}; {also}{way_out}", waited_s)
            source = self._sources.by_name[store]
            source.told |= source.standing.failures > 0
        self._unsaid.clear()

    def _nobody_left(self, now_s: float) -> StoreError:
        for attempt in self._live:
            self._reasons[attempt.source.name] = f"no answer in {now_s - attempt.asked_s:.1f} s"
        kind = Corrupt if self._rotten and self._rotten == set(self._reasons) else Unavailable
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self._reasons.items())
        return kind(
            f"no whole replica of {self._key} is left to read {bytes_of(self._extent)} of shard "
            f"{self._extent.shard[:12]} from ({reasons or 'no store is known to hold it'}); "
            "bring one of these stores back, then run millrace verify NAME --repair",
            key=self._key,
        )

    # --- waiting and ending -------------------------------------------------------------------------------------

    async def _news_within(self, seconds: float) -> None:
        until_s = self._loop.time() + seconds
        try:
            async with asyncio.timeout_at(until_s):
                await self._bell.wait()
        except TimeoutError:
            lag_s = self._loop.time() - until_s
            if lag_s > _LAG_S:
                for attempt in self._live:
                    # The first time a moment more, in which what came meanwhile gets here.
                    attempt.excused_s += lag_s if attempt.excused_s else lag_s + _LAG_S

    def _drop(self, attempt: Attempt) -> None:
        assert attempt.task is not None
        attempt.task.cancel()
        self._dropped.append(attempt.task)

    async def _end(self, won: Attempt | None, grace_s: float | None) -> None:
        """Cancel who is not needed any more, count it, and wait for it: ``grace_s`` at most, None to its end."""
        for attempt in self._live:
            self._count_left(attempt, won)
            self._drop(attempt)
        tasks: Collection[asyncio.Task[object]] = list(self._dropped)
        if grace_s is None and self._probe is not None:
            self._probe.cancel()
            tasks = [*tasks, self._probe]
        for source in self._sources.by_name.values():
            source.bells.discard(self._bell)
        pending = [task for task in tasks if not task.done()]
        for task in tasks:
            self._sources.keep(task)
        if pending:
            await asyncio.wait(pending, timeout=grace_s)

    def _count_left(self, attempt: Attempt, won: Attempt | None) -> None:
        failed = attempt.task is not None and attempt.task.done() and attempt.task.exception() is not None
        if attempt.began_s is None or failed:
            return
        source = attempt.source
        source.bytes_wasted += self._extent.length
        if won is None or not attempt.overdue or not attempt.waits:
            return
        waited_s = attempt.waited_s(self._loop.time())
        if attempt.quiet:  # not a word while another store did the whole read
            self._sources.leave(source, "late", attempt.episode, first_s=2 * waited_s)
        else:
            source.took(self._extent.length, waited_s)
