"""Which replica a read goes to, how long it is waited for, and when a store is left: pure, time and dice as arguments.

The numbers of a read that is late come from the store itself (its recent reads of about that size). What a store did
wrong is its standing: it is left for a while that doubles, then tried by one probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from millrace.core.model import StoreSite

__all__ = [
    "Budget",
    "Candidate",
    "Cause",
    "HedgePlan",
    "Patience",
    "Standing",
    "Usual",
    "distance",
    "in_order",
    "patience",
    "pause_s",
    "probe_of",
    "put_aside",
    "reinstated",
    "size_class",
]

Cause = Literal["error", "stall", "late", "rotten"]
"""Why a store was left: it raised, it went quiet, it lost a hedge without a word, or its bytes were wrong."""

_ENOUGH: Final = 8
"""Reads after which the 95th percentile is believed."""
_REMEMBERED: Final = 64
_LATE_S_MIN: Final = 0.05
"""Nothing is gained by asking twice for what is 50 ms late: blocks are fetched well ahead."""
_STALL_FACTOR: Final = 1.5
_WEIGHT: Final = 0.2
"""Of the newest read in the mean."""
_BUCKET_S: Final = 0.001
"""The first bucket ends here; each is four times as wide as the one before."""
_SLACK: Final = 1.5
"""How far beyond its bucket a mean must be before it counts as in another."""
_PAUSE_S: Final = 0.5
_PAUSE_S_MAX: Final = 5.0
_ALIVE_BYTES_PER_S: Final = 1e6
"""The slowest rate that still counts as alive: as in the stores' own timeouts."""


@dataclass(frozen=True, slots=True)
class HedgePlan:
    """How long to wait for a store, and what may be spent on not waiting.

    Attributes:
        first_s: A read is late after this at the earliest, while too few were measured to know better.
        factor: Later, it is late after this times the store's own 95th percentile for reads of its size.
        share: Late reads that may be asked for twice, of all reads. For stores that are slow but work: leaving one
            that failed, stalled or lied costs nothing of it.
        burst: How many of them may come at once.
        stall_s: A read that waited this long is asked for elsewhere, whatever the budget; where reads usually take
            longer than two thirds of it, after 1.5 times their 95th percentile.
        aside_s, aside_s_max: How long a store is left after its first failure, and at most. It doubles in between.
        give_up_s: How long a read goes on asking stores whose faults may pass, plus a second for each MB.
    """

    first_s: float = 0.25
    factor: float = 3.0
    share: float = 0.05
    burst: float = 4.0
    stall_s: float = 0.5
    aside_s: float = 1.0
    aside_s_max: float = 60.0
    give_up_s: float = 30.0

    def patience_s(self, length: int) -> float:
        """How long a read of so many bytes goes on before it fails."""
        return self.give_up_s + length / _ALIVE_BYTES_PER_S


# --- what is usual ------------------------------------------------------------------------------------------------


def size_class(length: int) -> int:
    """Reads of one class differ at most fourfold in bytes, and are compared with each other only."""
    return max(length, 1).bit_length() // 2


@dataclass(frozen=True, slots=True)
class Usual:
    """How long one store takes for reads of one size class.

    Attributes:
        recent_s: The newest 64, oldest first.
        p95_s: Their 95th percentile; 0 before the first.
        mean_s: Moving mean of all.
        bucket: Its coarse rank, -1 before the first: stores of one bucket count as equally fast. It changes
            only when the mean is well outside of it, so that two stores at an edge don't take turns.
    """

    recent_s: tuple[float, ...] = ()
    p95_s: float = 0.0
    mean_s: float = 0.0
    bucket: int = -1

    def after(self, seconds: float) -> Usual:
        """With one more read."""
        recent_s = (*self.recent_s[1 - _REMEMBERED :], seconds)
        mean_s = seconds if not self.recent_s else self.mean_s + _WEIGHT * (seconds - self.mean_s)
        p95_s = sorted(recent_s)[math.ceil(0.95 * len(recent_s)) - 1]
        return Usual(recent_s, p95_s, mean_s, _bucket(self.bucket, mean_s))


def _bucket(before: int, mean_s: float) -> int:
    now = 0 if mean_s < _BUCKET_S else math.floor(math.log(mean_s / _BUCKET_S, 4)) + 1
    if before < 0 or now == before:
        return now
    edge_s = _BUCKET_S * 4.0 ** (before if now > before else before - 1)
    beyond = mean_s > edge_s * _SLACK if now > before else mean_s < edge_s / _SLACK
    return now if beyond else before


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds until a read is late (another store may be asked, within the budget) and stalled (it is asked)."""

    late_s: float
    stall_s: float


def patience(plan: HedgePlan, usual: Usual) -> Patience:
    """How long to wait for one read of a store.

    It is late after ``factor`` times the 95th percentile, though never later than ``stall_s`` unless that is usual
    there: then at the percentile itself, beyond which one read in twenty is.
    """
    late_s = max(_LATE_S_MIN, plan.factor * usual.p95_s)
    if len(usual.recent_s) < _ENOUGH:
        late_s = max(late_s, plan.first_s)
    stall_s = max(plan.stall_s, _STALL_FACTOR * usual.p95_s)
    return Patience(min(late_s, max(plan.stall_s, usual.p95_s)), stall_s)


@dataclass(frozen=True, slots=True)
class Budget:
    """Reads that may still be asked for twice: at most ``burst``, and ``share`` more with each read."""

    left: float

    def after_read(self, plan: HedgePlan) -> Budget:
        """One more read was asked for."""
        return Budget(min(plan.burst, self.left + plan.share))

    def spent(self) -> Budget | None:
        """One hedge less; None when there is none."""
        return Budget(self.left - 1) if self.left >= 1 else None


# --- a store's standing -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """What a store did wrong lately.

    Attributes:
        episode: How often it was left so far. A call remembers the one it began in: many calls that fail together
            are one failure, not many.
        failures: How often in a row, since it was last good. 0 means nothing is held against it.
        cause: Of the last one.
        since_s, until_s: From when and until when it is left, by the monotonic clock.
    """

    episode: int = 0
    failures: int = 0
    cause: Cause | None = None
    since_s: float = 0.0
    until_s: float = 0.0


def put_aside(
    standing: Standing,
    plan: HedgePlan,
    cause: Cause,
    *,
    episode: int,
    now_s: float,
    dice: float,
    first_s: float | None = None,
) -> Standing:
    """The store failed in a call that began in ``episode``.

    Left for between half of and all of ``first_s`` (``plan.aside_s`` when None), doubled with each failure in a row,
    at most ``plan.aside_s_max``.

    Args:
        standing: Before.
        plan: How long.
        cause: Why.
        episode: ``standing.episode`` when the call began.
        now_s: The monotonic clock.
        dice: In [0, 1): so that those who left together don't come back together.
        first_s: The first time, in seconds.
    """
    if episode != standing.episode:
        return standing
    base_s = plan.aside_s if first_s is None else min(first_s, plan.aside_s)
    whole_s = min(plan.aside_s_max, base_s * 2.0 ** min(standing.failures, 30))
    return Standing(
        episode=standing.episode + 1,
        failures=standing.failures + 1,
        cause=cause,
        since_s=now_s if standing.failures == 0 else standing.since_s,
        until_s=now_s + whole_s * (0.5 + 0.5 * dice),
    )


def pause_s(tries: int, dice: float) -> float:
    """How long one read waits before it asks a store again that failed it ``tries`` times, when no other is left.

    Half of to all of 0.5 s, doubled each time up to 5 s: what may pass is noticed soon after it has.
    """
    return min(_PAUSE_S_MAX, _PAUSE_S * 2.0 ** min(tries - 1, 30)) * (0.5 + 0.5 * dice)


def reinstated(standing: Standing, *, episode: int) -> Standing:
    """The store gave what it was asked for in a call that began in ``episode``.

    A call from before it was left says nothing of one that fails since; of a silent one it says that it is not.
    """
    if standing.failures == 0 or (episode != standing.episode and standing.cause not in {"stall", "late"}):
        return standing
    return replace(standing, failures=0, cause=None, since_s=0.0, until_s=0.0)


# --- the order --------------------------------------------------------------------------------------------------------


def distance(site: StoreSite | None, here: str | None) -> int:
    """0 in the same site as ``here`` (``cloud/region``), 1 in the same cloud, 2 elsewhere or when not known."""
    if site is None or here is None:
        return 2
    cloud, _, region = here.partition("/")
    if site.cloud != cloud:
        return 2
    return 0 if site.region == region else 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A store that may have the bytes.

    Attributes:
        name: The store.
        place: In the caller's order, from 0.
        holder: Whether it is known to hold the shard; otherwise it merely may.
        missing: It said lately that it has no such shard.
        distance, price: From here; see :func:`distance`; dollars a GB.
        bucket: How fast; see :class:`Usual`.
        standing: What is held against it.
    """

    name: str
    place: int
    holder: bool = True
    missing: bool = False
    distance: int = 2
    price: float = 0.0
    bucket: int = -1
    standing: Standing = field(default_factory=Standing)

    @property
    def rank(self) -> tuple[bool, int, float, int, int]:
        """Its place among those that work: smaller is better."""
        return (not self.holder, self.distance, self.price, self.bucket, self.place)


def in_order(candidates: Sequence[Candidate], now_s: float) -> list[Candidate]:
    """In which order to ask: those that work by rank, those left (first whose time is up), those without the shard."""

    def key(c: Candidate) -> tuple[bool, bool, float, tuple[bool, int, float, int, int]]:
        left = c.standing.failures > 0
        return (c.missing, left, max(c.standing.until_s, now_s) if left else 0.0, c.rank)

    return sorted(candidates, key=key)


def probe_of(candidates: Sequence[Candidate], now_s: float) -> Candidate | None:
    """The store to try again beside a read: left, its time is up, and better than all that work; the best of those.

    None when nothing works: then those that were left are asked in any case.
    """
    working = [c.rank for c in candidates if not c.standing.failures and not c.missing]
    if not working:
        return None
    best = min(working)
    due = [c for c in candidates if c.standing.failures and not c.missing and c.standing.until_s <= now_s]
    return min((c for c in due if c.rank < best), key=lambda c: c.rank, default=None)
