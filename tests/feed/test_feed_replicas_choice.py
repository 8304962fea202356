"""The decisions of a replica reader, as laws: no clock, no store, no event loop."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.model import StoreSite
from millrace.feed.events import FeedEvent
from millrace.feed.sources_choice import (
    Budget,
    Candidate,
    Cause,
    HedgePlan,
    Standing,
    Usual,
    distance,
    in_order,
    patience,
    pause_s,
    probe_of,
    put_aside,
    reinstated,
    size_class,
)
from millrace.feed.sources_report import Reports

PLAN = HedgePlan()
seconds = st.floats(0.0001, 30.0)
causes = st.sampled_from(list[Cause](["error", "stall", "late", "rotten"]))
standings = st.one_of(
    st.just(Standing()),
    st.builds(
        Standing,
        episode=st.integers(1, 9),
        failures=st.integers(1, 40),
        cause=causes,
        since_s=st.floats(0, 50),
        until_s=st.floats(0, 200),
    ),
)


@st.composite
def worlds(draw: st.DrawFn) -> list[Candidate]:
    return [
        Candidate(
            f"s{place}",
            place,
            holder=draw(st.booleans()),
            missing=draw(st.integers(0, 5)) == 0,
            distance=draw(st.integers(0, 2)),
            price=draw(st.sampled_from([0.0, 0.02, 0.09])),
            bucket=draw(st.integers(-1, 4)),
            standing=draw(standings),
        )
        for place in range(draw(st.integers(0, 6)))
    ]


# --- the order ----------------------------------------------------------------------------------------------------


@given(worlds(), st.floats(0, 100), st.randoms(use_true_random=False))
def test_everybody_is_asked_once_and_the_order_depends_on_the_facts_alone(
    world: list[Candidate], now_s: float, dice: random.Random
) -> None:
    order = in_order(world, now_s)
    assert sorted(c.place for c in order) == list(range(len(world)))
    mixed = list(world)
    dice.shuffle(mixed)
    assert in_order(mixed, now_s) == order


@given(worlds(), st.floats(0, 100))
def test_who_works_is_asked_before_who_was_left_and_the_best_of_them_first(
    world: list[Candidate], now_s: float
) -> None:
    order = in_order(world, now_s)
    kinds = [(c.missing, c.standing.failures > 0) for c in order]
    assert kinds == sorted(kinds)
    working = [c for c in order if not c.missing and not c.standing.failures]
    for better, worse in itertools.pairwise(working):
        assert better.rank < worse.rank
    left = [c for c in order if not c.missing and c.standing.failures]
    waits = [max(0.0, c.standing.until_s - now_s) for c in left]
    assert waits == sorted(waits)


@given(worlds(), st.floats(0, 100))
def test_a_probe_goes_to_a_better_store_whose_time_is_up_and_never_when_nothing_works(
    world: list[Candidate], now_s: float
) -> None:
    probe = probe_of(world, now_s)
    first = next(iter(in_order(world, now_s)), None)
    if probe is None:
        return
    assert first is not None
    assert not first.standing.failures
    assert probe.standing.failures
    assert probe.standing.until_s <= now_s
    assert probe.rank < first.rank


def test_site_then_cloud_then_price_then_speed_then_the_callers_order() -> None:
    world = [
        Candidate("merely allowed", 0, holder=False, distance=0),
        Candidate("far, dear, fast", 1, price=0.09, bucket=0),
        Candidate("far, cheap, slow", 2, price=0.02, bucket=5),
        Candidate("far, cheap, fast, second", 4, price=0.02, bucket=1),
        Candidate("far, cheap, fast, first", 3, price=0.02, bucket=1),
        Candidate("same cloud", 5, distance=1, price=0.02, bucket=5),
        Candidate("same site", 6, distance=0, bucket=9),
    ]
    assert [c.name for c in in_order(world, 0.0)] == [
        "same site",
        "same cloud",
        "far, cheap, fast, first",
        "far, cheap, fast, second",
        "far, cheap, slow",
        "far, dear, fast",
        "merely allowed",
    ]


def test_how_far_a_store_is() -> None:
    site = StoreSite("a", "aws", "us-east-1", "us")
    assert distance(site, "aws/us-east-1") == 0
    assert distance(site, "aws/eu-west-1") == distance(site, "aws") == 1
    assert distance(site, "gcp/us-east-1") == distance(site, None) == distance(None, "aws/us-east-1") == 2


# --- how long to wait -----------------------------------------------------------------------------------------------


def usual(*recent_s: float) -> Usual:
    found = Usual()
    for one_s in recent_s:
        found = found.after(one_s)
    return found


@given(st.lists(seconds, max_size=100))
def test_late_comes_before_stalled_and_both_are_bounded(recent_s: list[float]) -> None:
    waits = patience(PLAN, usual(*recent_s))
    assert 0 < waits.late_s <= waits.stall_s
    assert waits.stall_s >= PLAN.stall_s
    if max(recent_s, default=0) * 1.5 <= PLAN.stall_s:
        assert waits.stall_s == PLAN.stall_s, "a quick store is left after half a second"
    if len(recent_s) < 8:
        assert waits.late_s >= PLAN.first_s


def test_a_store_that_is_slow_by_habit_is_given_its_time() -> None:
    waits = patience(PLAN, usual(*[2.0] * 20))
    assert waits.late_s == 2.0
    assert waits.stall_s == 3.0


@given(st.lists(seconds, min_size=1, max_size=150))
def test_the_percentile_is_of_the_newest_64(recent_s: list[float]) -> None:
    found = usual(*recent_s)
    assert found.recent_s == tuple(recent_s[-64:])
    over = sum(one_s > found.p95_s for one_s in found.recent_s)
    assert over <= len(found.recent_s) * 0.05
    assert found.p95_s in found.recent_s


@given(st.floats(0.0001, 10.0), st.lists(st.floats(0.85, 1.18), max_size=80))
def test_speed_that_wavers_does_not_change_the_order(mean_s: float, wavers: list[float]) -> None:
    found = usual(mean_s)
    for waver in wavers:
        found = found.after(mean_s * waver)
    assert found.bucket == usual(mean_s).bucket


@given(st.integers(0, 10), st.floats(10.0, 1000.0))
def test_speed_that_really_changes_does(power: int, factor: float) -> None:
    before_s = 0.0005 * 1.5**power
    slower = usual(before_s, *[before_s * factor] * 60)
    assert slower.bucket > usual(before_s).bucket
    assert usual(*slower.recent_s, *[before_s] * 60).bucket <= usual(before_s).bucket + 1


@given(st.integers(0, 1 << 34))
def test_sizes_are_compared_with_sizes_like_them(length: int) -> None:
    assert size_class(length) <= size_class(4 * length) <= size_class(length) + 1 + (length == 0)


@given(st.lists(st.booleans(), max_size=500), st.floats(0, 1), st.integers(0, 8))
def test_hedges_keep_to_their_budget(late: list[bool], share: float, burst: int) -> None:
    plan = HedgePlan(share=share, burst=burst)
    budget, hedges = Budget(plan.burst), 0
    for is_late in late:
        budget = budget.after_read(plan)
        assert budget.left <= burst
        if is_late and (left := budget.spent()) is not None:
            budget = left
            hedges += 1
    assert hedges <= burst + share * len(late) + 1e-6


# --- standing -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(causes, st.floats(0, 0.999)), min_size=1, max_size=40), st.floats(0, 1e6))
def test_a_store_that_keeps_failing_is_left_for_longer_up_to_a_bound(
    failures: list[tuple[Cause, float]], now_s: float
) -> None:
    standing = Standing()
    for n, (cause, dice) in enumerate(failures):
        standing = put_aside(standing, PLAN, cause, episode=standing.episode, now_s=now_s, dice=dice)
        whole_s = min(PLAN.aside_s_max, PLAN.aside_s * 2.0**n)
        assert whole_s / 2 - 1e-6 <= standing.until_s - now_s <= whole_s + 1e-6
        assert standing.failures == n + 1
    assert reinstated(standing, episode=standing.episode).failures == 0


@given(st.integers(1, 50), causes)
def test_calls_that_fail_together_are_one_failure(calls: int, cause: Cause) -> None:
    before = Standing()
    standing = before
    for _ in range(calls):
        standing = put_aside(standing, PLAN, cause, episode=before.episode, now_s=5.0, dice=0.5)
    assert standing.failures == 1
    assert standing.until_s <= 5.0 + PLAN.aside_s


@pytest.mark.parametrize(("cause", "back"), [("error", False), ("rotten", False), ("stall", True), ("late", True)])
def test_what_came_from_before_a_store_was_left_clears_it_of_silence_only(cause: Cause, back: bool) -> None:
    left = put_aside(Standing(), PLAN, cause, episode=0, now_s=0.0, dice=0.0)
    assert (reinstated(left, episode=0).failures == 0) == back
    assert reinstated(left, episode=left.episode).failures == 0


def test_a_lost_hedge_leaves_a_store_for_as_long_as_it_was_late() -> None:
    left = put_aside(Standing(), PLAN, "late", episode=0, now_s=10.0, dice=0.999, first_s=0.1)
    assert 10.0 < left.until_s <= 10.1


@given(st.integers(1, 10_000), st.floats(0, 0.999))
def test_the_pause_before_asking_again_is_bounded(tries: int, dice: float) -> None:
    assert 0.25 <= pause_s(tries, dice) <= 5.0


# --- reports --------------------------------------------------------------------------------------------------------


class Hands:
    """A clock that is set."""

    def __init__(self) -> None:
        self.at_s = 0.0

    def now_ms(self) -> int:
        return int(self.at_s * 1000)

    def monotonic_s(self) -> float:
        return self.at_s


def reporting() -> tuple[Hands, list[FeedEvent], Callable[[str, str, str], None], Reports]:
    clock, told = Hands(), list[FeedEvent]()
    reports = Reports(clock, told.append)
    return clock, told, lambda store, cause, text: reports.say("failover", store, cause, text, len(text) / 10), reports


def test_the_first_is_told_at_once_and_the_rest_is_counted() -> None:
    clock, told, say, reports = reporting()
    for n in range(1000):
        say("a", "stall", f"a stalled {n}")
    say("a", "rotten", "a is rotten")
    say("b", "stall", "b stalled")
    assert [e.sentence for e in told] == ["a stalled 0", "a is rotten", "b stalled"]
    clock.at_s = 1.5
    reports.due()
    assert told[3:] == [FeedEvent("failover", "a stalled 999 (and 998 more like it)", 1500, "a", 1.3)]
    say("a", "stall", "a stalled")
    reports.close()
    assert [e.sentence for e in told[4:]] == ["a stalled"]


@given(st.lists(st.tuples(st.floats(0, 0.4), st.sampled_from("ab"), st.sampled_from(["stall", "error"])), max_size=200))
def test_at_most_one_a_second_and_none_is_lost(said: list[tuple[float, str, str]]) -> None:
    clock, told, say, reports = reporting()
    for wait_s, store, cause in said:
        clock.at_s += wait_s
        say(store, cause, cause)
    reports.close()
    for store in "ab":
        for cause in ("stall", "error"):
            mine = [e for e in told if e.store == store and e.sentence.startswith(cause)]
            n = sum((s, c) == (store, cause) for _, s, c in said)
            counted = sum(
                1 + int(e.sentence.split("(and ")[1].split()[0]) if "(and " in e.sentence else 1 for e in mine
            )
            assert counted == n
            times = [e.at_ms for e in mine[:-1]]  # the last one is told by close
            assert all(later - sooner >= 999 for sooner, later in itertools.pairwise(times))
