"""Nested stages: each second is charged once, to the one that was at work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.agent.stopwatch import Stopwatch
from millrace.core.model import StageTime


class HandClock:
    """Seconds that pass only where the code says so."""

    def __init__(self) -> None:
        self.at_s = 5.0

    def __call__(self) -> float:
        return self.at_s


def test_time_goes_to_the_innermost_stage() -> None:
    clock = HandClock()
    watch = Stopwatch(clock)

    def ingest() -> Iterator[int]:
        for i in range(3):
            clock.at_s += 1
            yield i

    def process(items: Iterator[int]) -> Iterator[int]:
        for i in items:
            clock.at_s += 10
            yield i

    def pack(items: Iterator[int]) -> Iterator[int]:
        for i in items:
            clock.at_s += 100
            yield i

    for _ in watch.wrap("pack", pack(watch.wrap("process", process(watch.wrap("ingest", ingest()))))):
        clock.at_s += 1000  # the caller's own time is charged to nobody
    assert watch.times() == (StageTime("pack", 300), StageTime("process", 30), StageTime("ingest", 3))


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=6), st.integers(1, 4))
def test_stages_sum_up_to_the_time_that_passed(costs: list[list[int]], depth: int) -> None:
    clock = HandClock()
    watch = Stopwatch(clock)
    passed = 0

    def stage(level: int, items: Iterator[list[int]]) -> Iterator[list[int]]:
        nonlocal passed
        for cost in items:
            clock.at_s += cost[level % len(cost)]
            passed += cost[level % len(cost)]
            yield cost

    chain: Iterator[list[int]] = iter(costs)
    for level in range(depth):
        chain = watch.wrap(f"stage-{level}", stage(level, chain))
    assert list(chain) == costs
    assert sum(t.seconds for t in watch.times()) == pytest.approx(passed)


def test_an_error_belongs_to_the_stage_it_began_in() -> None:
    watch = Stopwatch(HandClock())

    def ingest() -> Iterator[int]:
        yield 1
        raise ValueError("bad")

    def through(items: Iterator[int]) -> Iterator[int]:
        yield from items

    chain = watch.wrap("pack", through(watch.wrap("process", through(watch.wrap("ingest", ingest())))))
    assert next(chain) == 1
    assert watch.current == "pack"
    with pytest.raises(ValueError, match="bad"):
        next(chain)
    assert watch.current == "ingest"


def test_a_stage_that_is_left_early_is_charged_nothing_more() -> None:
    clock = HandClock()
    watch = Stopwatch(clock)

    def endless() -> Iterator[int]:
        while True:
            clock.at_s += 1
            yield 0

    wrapped = watch.wrap("ingest", endless())
    next(wrapped)
    next(wrapped)
    del wrapped
    clock.at_s += 50
    assert watch.times() == (StageTime("ingest", 2),)


def test_what_went_through_is_counted_beside_the_time() -> None:
    watch = Stopwatch(HandClock())
    watch.add("ingest", rows=3, size_bytes=10)
    watch.add("distribute", seconds=1.5, size_bytes=5)
    watch.add("ingest", rows=4)
    assert watch.times() == (StageTime("ingest", 0, 7, 10), StageTime("distribute", 1.5, 0, 5))
    assert watch.current == ""
