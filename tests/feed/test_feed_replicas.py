"""Reading from replicas that fail, stall and lie: real stores, and small strict ones that misbehave in one way each."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import AccessDenied, Corrupt, StoreError, Unavailable
from millrace.core.model import StoreSite, block_digest, digest_of, shard_key
from millrace.core.ports import Store
from millrace.feed.events import FeedEvent
from millrace.feed.index import Extent
from millrace.feed.replicas import HedgePlan, ReplicaReader
from millrace.stores.layers import Fault, FaultPlan, FaultRates, RetryPlan
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryStore
from millrace.stores.open import Layers, layered

DATA = random.Random(5).randbytes(64_000)
SHARD = digest_of(DATA)
KEY = shard_key(SHARD)
FREE = HedgePlan(first_s=0.05, stall_s=0.1, burst=100)
"""Hedges at will and soon, so that tests don't wait."""
PATIENT = HedgePlan(first_s=20.0, stall_s=20.0)
"""Never hedges within a test."""


class Clock:
    """A clock that only the test moves. What a read waits for is timed by the event loop."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(1000 * self.ahead_s)

    def monotonic_s(self) -> float:
        return 1000.0 + self.ahead_s


class Scripted(MemoryStore):
    """A memory store whose reads do first what a test says; counts them, and what is in it."""

    def __init__(self, name: str, act: Callable[[], Awaitable[object]] | None = None) -> None:
        super().__init__(name)
        self.act = act
        self.calls = self.inside = self.most_inside = self.cancelled = 0
        self.spoil: Callable[[memoryview], memoryview] = lambda view: view

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        self.calls += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            if self.act is not None:
                await self.act()
            return self.spoil(await super().get_range(key, start, length, version=version))
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.inside -= 1


async def stalls() -> None:
    await asyncio.Event().wait()


def slow(seconds: float) -> Callable[[], Awaitable[object]]:
    return lambda: asyncio.sleep(seconds)


def failing(error: StoreError) -> Callable[[], Awaitable[object]]:
    async def act() -> None:
        raise error

    return act


def flipped(view: memoryview) -> memoryview:
    wrong = bytearray(view)
    wrong[len(wrong) // 2] ^= 4
    return memoryview(wrong).toreadonly()


def extent(start: int = 0, length: int = 1000) -> Extent:
    return Extent(SHARD, start, length, 1, block_digest(DATA[start : start + length]))


def site(name: str) -> StoreSite:
    cloud = name.partition("-")[0]
    return StoreSite(name, cloud, f"{cloud}-1", "us")


class Setup:
    """A reader over stores by name, what it told, and its clock."""

    def __init__(self, stores: Mapping[str, Store], plan: HedgePlan = FREE, **more: Any) -> None:
        self.told: list[FeedEvent] = []
        self.clock = Clock()
        self.names = list(stores)
        how: dict[str, Any] = {"here": "a/a-1", "price": lambda s: 0.0, "rng": random.Random(3), **more}
        self.reader = ReplicaReader(
            stores,
            [site(name) for name in stores],
            clock=self.clock,
            on_event=self.told.append,
            hedge=plan,
            **how,
        )

    async def read(self, wanted: Extent | None = None, names: Sequence[str] | None = None, **more: Any) -> bytes:
        wanted = wanted or extent()
        view = await self.reader.read(wanted, KEY, self.names if names is None else names, **more)
        assert view == DATA[wanted.offset : wanted.offset + wanted.length]
        return bytes(view)

    def told_of(self, store: str) -> list[str]:
        return [event.sentence for event in self.told if event.store == store]


def play(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it, and see that it left no task behind."""

    async def checked() -> None:
        await main()
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


async def scripted(*names: str) -> dict[str, Scripted]:
    made = {name: Scripted(name) for name in names}
    for store in made.values():
        await store.put(KEY, [DATA])
    return made


# --- the best one ---------------------------------------------------------------------------------------------------


def test_the_near_one_is_read_and_the_others_are_left_in_peace() -> None:
    async def main() -> None:
        stores = await scripted("c", "b", "a")
        async with Setup(stores, PATIENT).reader as reader:
            for start in range(0, 64_000, 1000):
                view = await reader.read(extent(start), KEY, ["c", "b", "a"])
                assert view == DATA[start : start + 1000]
        assert [store.calls for store in stores.values()] == [0, 0, 64]
        traffic = reader.traffic()["a"]
        assert (traffic.bytes_useful, traffic.bytes_wasted, traffic.reads, traffic.failures) == (64_000, 0, 64, 0)

    play(main)


def test_the_price_decides_between_clouds_and_knowing_comes_first() -> None:
    async def main() -> None:
        stores = await scripted("b", "c", "d")
        setup = Setup(stores, price=lambda s: {"b": 0.09, "c": 0.01, "d": 0.0}[s.cloud])
        await setup.read(names=["b", "c", "d"], holders=2)
        assert [stores[name].calls for name in "bcd"] == [0, 1, 0], "d is cheaper, but may not have it"

    play(main)


def test_the_faster_of_two_equals_is_found() -> None:
    async def main() -> None:
        stores = await scripted("b", "c")
        stores["b"].act = slow(0.02)
        setup = Setup(stores, PATIENT)
        for _ in range(12):
            await setup.read()
        assert stores["b"].calls == 1
        assert stores["c"].calls == 11

    play(main)


# --- one that fails ---------------------------------------------------------------------------------------------------


def test_one_that_fails_is_left_at_once_and_named() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(Unavailable("connection refused", store="a"))
        setup = Setup(stores, PATIENT)
        for start in range(0, 20_000, 1000):
            await setup.read(extent(start))
        assert (stores["a"].calls, stores["b"].calls) == (1, 20)
        (event,) = setup.told
        assert (event.kind, event.store) == ("failover", "a")
        assert f"store a failed on shard {SHARD[:12]}: connection refused; b is read instead, after" in event.sentence
        assert event.at_ms == setup.clock.now_ms()
        assert setup.reader.traffic()["a"].failures == 1

    play(main)


def test_one_that_was_left_is_tried_by_a_probe_that_nobody_waits_for() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(Unavailable("down", store="a"))
        setup = Setup(stores, PATIENT)
        await setup.read()
        setup.clock.ahead_s += 2.0
        gate = asyncio.Event()
        stores["a"].act = gate.wait
        for _ in range(5):
            await setup.read()
        assert stores["a"].calls == 2, "one probe at a time"
        assert stores["b"].calls == 6, "and no read waits for it"
        gate.set()
        while stores["a"].inside:
            await asyncio.sleep(0)
        await setup.read()
        await setup.read()
        assert stores["b"].calls == 6
        assert "store a answers again" in setup.told_of("a")[-1]
        await setup.reader.aclose()

    play(main)


def test_a_probe_that_fails_leaves_it_for_longer() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(Unavailable("down", store="a"))
        setup = Setup(stores, PATIENT)
        for ahead_s, calls in ((0.0, 1), (1.1, 2), (0.9, 2), (1.2, 3), (1.9, 3), (2.2, 4)):
            setup.clock.ahead_s += ahead_s
            await setup.read()
            await asyncio.sleep(0.01)
            assert stores["a"].calls == calls
        await setup.reader.aclose()

    play(main)


def test_a_probe_ends_with_its_time_its_read_or_its_reader() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(Unavailable("down", store="a"))
        setup = Setup(stores, HedgePlan(first_s=20.0, stall_s=0.2))
        await setup.read()
        stores["a"].act = stalls

        setup.clock.ahead_s += 2.0
        await setup.read()
        while stores["a"].inside or not stores["a"].cancelled:
            await asyncio.sleep(0.01)  # it stalled: given up after its time
        await setup.read()
        assert stores["a"].calls == 2

        setup.clock.ahead_s += 100.0
        stores["b"].act = stalls
        reading = asyncio.create_task(setup.read())
        while not stores["b"].inside:
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        assert (stores["a"].calls, stores["a"].inside, stores["b"].inside) == (3, 0, 0)

        setup.clock.ahead_s += 100.0
        stores["b"].act = None
        await setup.read()
        assert stores["a"].calls == 4
        await setup.reader.aclose()
        assert stores["a"].inside == 0

    play(main)


def test_a_probe_finds_rot_as_a_read_does() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(Unavailable("down", store="a"))
        setup = Setup(stores, PATIENT)
        await setup.read()
        stores["a"].act, stores["a"].spoil = None, flipped
        setup.clock.ahead_s += 2.0
        await setup.read()
        await setup.reader.aclose()
        assert f"store a holds shard {SHARD[:12]} rotten" in setup.told_of("a")[-1]
        setup.clock.ahead_s += 1000.0
        await setup.read()
        assert stores["a"].calls == 2

    play(main)


def test_all_of_them_left_are_tried_all_the_same() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        for store in stores.values():
            store.act = failing(AccessDenied("not yours"))
        setup = Setup(stores, PATIENT)
        for _ in range(3):
            with pytest.raises(Unavailable):
                await setup.read()
        stores["b"].act = None
        await setup.read()
        await setup.read()
        assert stores["a"].calls <= 5

    play(main)


def test_what_may_pass_is_asked_again_until_it_has() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = failing(AccessDenied("not yours"))
        stores["b"].act = failing(Unavailable("away"))
        setup = Setup(stores, PATIENT)
        reading = asyncio.create_task(setup.read())
        while stores["b"].calls < 2:
            await asyncio.sleep(0.01)
        stores["b"].act = None
        await reading
        assert stores["a"].calls == 1, "no permission does not pass by waiting"
        assert any("no other replica is left" in text for text in setup.told_of("b"))

    play(main)


def test_nothing_left_says_why_of_each_and_how_to_repair() -> None:
    async def main() -> None:
        stores = await scripted("a", "b", "c")
        stores["a"].spoil = flipped
        stores["b"].act = failing(Unavailable("away"))
        await stores["c"].delete(KEY)
        setup = Setup(stores, HedgePlan(give_up_s=0.0))
        with pytest.raises(Unavailable) as caught:
            await setup.read(names=["a", "b", "c", "d"])
        text = str(caught.value)
        assert text.startswith(f"no whole replica of {KEY} is left to read bytes 0-999 of shard {SHARD[:12]} from (")
        for part in ("a: the bytes are not those", "b: away", "c: store c has no object", "d: not in this world file"):
            assert part in text
        assert text.endswith("bring one of these stores back, then run millrace verify NAME --repair")
        assert caught.value.key == KEY
        with pytest.raises(Unavailable, match="no store is known to hold it"):
            await setup.read(names=[])

    play(main)


def test_stores_that_never_answer_end_in_an_error_too() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        for store in stores.values():
            store.act = stalls
        setup = Setup(stores, HedgePlan(first_s=0.02, stall_s=0.04, give_up_s=0.2))
        with pytest.raises(Unavailable, match=r"a: no answer in 0\.\d s; b: no answer in 0\.\d s"):
            await setup.read()

    play(main)


def test_an_error_that_is_none_of_a_stores_is_not_hidden() -> None:
    class Broken(MemoryStore):
        async def get_range(self, *_: Any, **__: Any) -> memoryview:
            raise ZeroDivisionError

    async def main() -> None:
        stores = {"a": Broken("a"), **await scripted("b")}
        with pytest.raises(ZeroDivisionError):
            await Setup(stores).read()

    play(main)


# --- one that lies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1000, 60_000, 300_000])
@pytest.mark.parametrize("lie", ["flip", "cut", "nothing"])
def test_one_that_lies_is_never_asked_again_for_that_shard(lie: str, length: int) -> None:
    spoils: dict[str, Callable[[memoryview], memoryview]] = {
        "flip": flipped,
        "cut": lambda view: view[:-1],
        "nothing": lambda view: view[:0],
    }
    data = random.Random(length).randbytes(length)
    wanted = Extent(SHARD, 0, length, 1, block_digest(data))

    async def main() -> None:
        stores = await scripted("a", "b")
        for store in stores.values():
            await store.put(KEY, [data])
        stores["a"].spoil = spoils[lie]
        setup = Setup(stores, PATIENT)
        for _ in range(3):
            assert await setup.reader.read(wanted, KEY, ["a", "b"]) == data
            setup.clock.ahead_s += 100.0
            stores["a"].spoil = lambda view: view  # too late: its word is not taken again
        assert stores["a"].calls == 1
        (event,) = setup.told
        assert f"store a holds shard {SHARD[:12]} rotten" in event.sentence
        assert "b is read instead" in event.sentence
        assert event.sentence.endswith("run millrace verify NAME --repair")
        traffic = setup.reader.traffic()["a"]
        assert traffic.bytes_useful == 0
        assert traffic.bytes_wasted == {"flip": length, "cut": length - 1, "nothing": 0}[lie]
        with pytest.raises(Corrupt, match="the bytes are not those the digest names"):
            await setup.reader.read(wanted, KEY, ["a"])

    play(main)


def test_every_replica_rotten_is_corrupt() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].spoil = flipped
        stores["b"].spoil = lambda view: view[:10]
        with pytest.raises(Corrupt, match="only 10 of 1000 bytes came"):
            await Setup(stores).read()

    play(main)


def test_other_shards_of_a_store_that_lied_are_read_again_later() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        other = digest_of(b"other")
        for store in stores.values():
            await store.put("other", [DATA])
        stores["a"].spoil = flipped
        setup = Setup(stores, PATIENT)
        await setup.read()
        stores["a"].spoil = lambda view: view
        wanted = Extent(other, 0, 1000, 1, extent().digest)
        await setup.reader.read(wanted, "other", ["a", "b"])
        assert stores["a"].calls == 1, "left for a while"
        setup.clock.ahead_s += 2.0
        await setup.reader.read(wanted, "other", ["a", "b"])
        await asyncio.sleep(0.01)
        await setup.reader.read(wanted, "other", ["a", "b"])
        assert stores["a"].calls == 3, "a probe, then a read"
        await setup.reader.aclose()

    play(main)


def test_a_shard_that_is_not_there_is_not_looked_for_with_each_block() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        await stores["a"].delete(KEY)
        setup = Setup(stores, PATIENT)
        for start in range(0, 5000, 1000):
            await setup.read(extent(start), ["b", "a"], holders=1)
            await setup.read(extent(start), ["a", "b"])
        assert (stores["a"].calls, stores["b"].calls) == (1, 10)
        assert setup.told_of("a") == [e.sentence for e in setup.told]
        setup.clock.ahead_s += 100.0
        await stores["a"].put(KEY, [DATA])
        await setup.read()
        assert stores["a"].calls == 2, "repair brought it back"

    play(main)


def test_a_store_that_merely_might_have_it_and_has_not_is_no_news() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        await stores["a"].delete(KEY)
        stores["b"].act = failing(AccessDenied("not yours"))
        setup = Setup(stores, PATIENT)
        with pytest.raises(Unavailable):
            await setup.read(names=["b", "a"], holders=1)
        assert setup.told_of("a") == []

    play(main)


# --- one that stalls ------------------------------------------------------------------------------------------------


def test_one_that_stalls_is_left_and_later_reads_go_elsewhere_at_once() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        setup = Setup(stores, HedgePlan(burst=0, share=0))
        for start in range(0, 10_000, 1000):
            await setup.read(extent(start))
        stores["a"].act = stalls
        await setup.read()
        assert stores["a"].cancelled == 1, "who lost was cancelled, and waited for"
        for start in range(0, 50_000, 1000):
            await setup.read(extent(start))
        assert (stores["a"].calls, stores["b"].calls) == (11, 51)
        (event,) = setup.told
        assert (event.kind, event.store) == ("failover", "a")
        assert f"store a stalled: nothing of shard {SHARD[:12]} came in 0.5" in event.sentence
        assert "b is read instead" in event.sentence
        assert event.waited_s > 0.4

    play(main)


def test_when_one_read_finds_the_stall_all_others_leave_too() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = stalls
        setup = Setup(stores, HedgePlan(burst=0, share=0, first_s=30, stall_s=0.2), per_store=4)
        async with asyncio.TaskGroup() as group:
            for start in range(0, 40_000, 1000):
                group.create_task(setup.read(extent(start)))
        assert stores["a"].calls == 4, "those in line never asked it"
        assert stores["b"].calls == 40
        assert stores["b"].most_inside <= 4
        assert len(setup.told) == 1, "one sentence, however many reads"
        setup.clock.ahead_s += 2.0
        await setup.reader.aclose()
        assert len(setup.told) == 2
        assert "more like it" in setup.told[-1].sentence

    play(main)


def test_a_stall_that_a_hedge_hid_counts_as_well() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = stalls
        setup = Setup(stores, HedgePlan(first_s=0.05, stall_s=10.0))
        await setup.read()
        assert [e.kind for e in setup.told] == ["hedge"]
        assert "store a is late" in setup.told[0].sentence
        assert "b is asked too" in setup.told[0].sentence
        await setup.read()
        assert stores["a"].calls == 1
        traffic = setup.reader.traffic()
        assert (traffic["a"].hedges, traffic["b"].hedges) == (1, 0)
        assert traffic["a"].bytes_wasted == 1000

    play(main)


def test_late_reads_of_a_working_store_are_asked_for_twice_within_the_budget() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = slow(0.3)
        stores["b"].act = stalls
        setup = Setup(stores, HedgePlan(first_s=0.1, stall_s=20.0, burst=3, share=0.05), in_flight=40, per_store=40)
        async with asyncio.TaskGroup() as group:
            for start in range(0, 40_000, 1000):
                group.create_task(setup.read(extent(start)))
        assert setup.reader.traffic()["a"].hedges == stores["b"].calls == 3
        assert setup.reader.traffic()["a"].bytes_useful == 40_000
        assert {event.kind for event in setup.told} == {"hedge"}

    play(main)


def test_the_first_good_answer_wins_and_a_late_one_still_may() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = slow(0.15)
        stores["b"].act = stalls
        setup = Setup(stores)
        await setup.read()
        assert (stores["a"].calls, stores["b"].cancelled) == (1, 1)
        assert setup.reader.traffic()["a"].bytes_useful == 1000
        assert setup.reader.traffic()["b"].bytes_wasted == 1000

    play(main)


def test_a_lie_that_comes_first_does_not_win() -> None:
    async def main() -> None:
        stores = await scripted("a", "b", "c")
        stores["a"].act = slow(0.3)
        stores["b"].spoil = flipped
        stores["c"].act = failing(AccessDenied("not yours"))
        setup = Setup(stores, HedgePlan(first_s=0.03, stall_s=0.1))
        await setup.read()
        assert [store.calls for store in stores.values()] == [1, 1, 1]
        assert "a" not in {e.store for e in setup.told if "rotten" in e.sentence}

    play(main)


def test_an_event_loop_that_was_busy_blames_no_store() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        stores["a"].act = slow(0.05)
        setup = Setup(stores, HedgePlan(first_s=0.2, stall_s=0.25, burst=0))
        reading = asyncio.create_task(setup.read())
        await asyncio.sleep(0.02)
        time.sleep(0.5)  # nobody looked, so nobody knows
        await reading
        assert stores["b"].calls == 0
        assert setup.told == []

    play(main)


def test_retries_and_timeouts_inside_a_store_are_not_waited_for() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        faulty = layered(
            stores["a"],
            name="a",
            layers=Layers(
                rng=random.Random(1),
                retry=RetryPlan(attempts=50, delay_s=5.0),
                inside=lambda s: Fault(s, name="a", plan=FaultPlan(FaultRates(unavailable=1)), rng=random.Random(2)),
            ),
        )
        setup = Setup({"a": faulty, "b": stores["b"]}, HedgePlan(first_s=0.1, stall_s=0.2))
        began_s = time.monotonic()
        await setup.read()
        await setup.read()
        assert time.monotonic() - began_s < 5, "the layers alone would take minutes"
        assert stores["b"].calls == 2

    play(main)


# --- bounds and ends ------------------------------------------------------------------------------------------------


def test_reads_in_flight_are_bounded_overall_and_for_each_store() -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        for store in stores.values():
            store.act = slow(0.001)
        for limits, most in (({"in_flight": 3}, 3), ({"per_store": 5}, 5)):
            setup = Setup(stores, PATIENT, **limits)
            async with asyncio.TaskGroup() as group:
                for start in range(0, 40_000, 1000):
                    group.create_task(setup.read(extent(start)))
            assert stores["a"].most_inside == most
            stores["a"].most_inside = 0
        assert stores["b"].calls == 0

    play(main)


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.07, 0.15])
def test_cancelling_leaves_nothing_behind(after_s: float) -> None:
    async def main() -> None:
        stores = await scripted("a", "b")
        for store in stores.values():
            store.act = stalls
        setup = Setup(stores)
        reading = [asyncio.create_task(setup.read(extent(start))) for start in range(0, 30_000, 1000)]
        await asyncio.sleep(after_s)
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)
        assert all(task.cancelled() for task in reading)
        assert stores["a"].inside == stores["b"].inside == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        for store in stores.values():
            store.act = None
        await setup.read()

    play(main)


def test_a_call_that_can_not_be_cancelled_holds_no_read_up() -> None:
    class Stuck(Scripted):
        gate: asyncio.Event

        async def get_range(self, *args: Any, **how: Any) -> memoryview:
            self.calls += 1
            while not self.gate.is_set():
                try:
                    await self.gate.wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
            raise Unavailable("the disk is dead")

    async def main() -> None:
        stuck = Stuck("a")
        stuck.gate = asyncio.Event()
        setup = Setup({"a": stuck, **await scripted("b")})
        await setup.read()
        await setup.read()
        assert (stuck.calls, stuck.cancelled) == (1, 1)
        closing = asyncio.create_task(setup.reader.aclose())
        await asyncio.sleep(0.01)
        assert not closing.done(), "its end is waited for when all is closed"
        stuck.gate.set()
        await closing

    play(main)


# --- laws -----------------------------------------------------------------------------------------------------------

habits = st.sampled_from(["whole", "slow", "flaky", "dead", "lies", "cut", "stalls", "lost"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(habits, min_size=1, max_size=4), st.integers(0, 1000), st.integers(1, 12))
def test_whatever_the_stores_do_the_bytes_are_right_or_it_is_an_error(worlds: list[str], seed: int, reads: int) -> None:
    """With one store that works, every read works; and never does a wrong byte come out."""

    async def main() -> None:
        dice = random.Random(seed)
        works = bool({"whole", "slow"} & set(worlds))
        rates = {
            "flaky": FaultRates(unavailable=0.3, corrupt=0.1),
            "dead": FaultRates(unavailable=1.0),
            "lies": FaultRates(corrupt=1.0),
            "cut": FaultRates(truncate=1.0),
            "slow": FaultRates(delay=0.5),
        }
        stores: dict[str, Store] = {}
        for i, habit in enumerate(worlds):
            inner = (await scripted(f"{'abcd'[i]}"))["abcd"[i]]
            if habit == "stalls":
                inner.act = stalls
            if habit == "lost":
                await inner.delete(KEY)
            plan = FaultPlan(rates.get(habit, FaultRates()), delay_s=0.01)
            stores["abcd"[i]] = Fault(inner, name="abcd"[i], plan=plan, rng=dice)
        setup = Setup(stores, HedgePlan(first_s=0.005, stall_s=0.01, give_up_s=20.0 if works else 0.05))
        wanted = [extent(1000 * dice.randrange(64)) for _ in range(reads)]
        done = await asyncio.gather(*(setup.read(one) for one in wanted), return_exceptions=True)
        await setup.reader.aclose()
        if works:
            assert not [one for one in done if isinstance(one, BaseException)]
        assert all(isinstance(one, bytes | Corrupt | Unavailable) for one in done)
        traffic = setup.reader.traffic().values()
        assert sum(t.bytes_useful for t in traffic) == 1000 * sum(isinstance(one, bytes) for one in done)

    play(main)


# --- real disks -----------------------------------------------------------------------------------------------------


def test_files_that_vanish_rot_or_shrink_on_a_disk(tmp_path: Path) -> None:
    async def main() -> None:
        stores = {name: LocalStore(tmp_path / name, name=name) for name in "abcd"}
        for store in stores.values():
            await store.put(KEY, [DATA])
        setup = Setup(stores, PATIENT)
        await setup.read()
        (tmp_path / "a" / KEY).unlink()
        with (tmp_path / "b" / KEY).open("r+b") as file:
            file.truncate(500)
        rot = bytearray(DATA)
        rot[7] ^= 1
        (tmp_path / "c" / KEY).write_bytes(rot)
        for start in range(0, 20_000, 1000):
            await setup.read(extent(start))
        texts = " ".join(e.sentence for e in setup.told)
        assert "store a does not have shard" in texts
        assert f"store b holds shard {SHARD[:12]} rotten: of bytes 0-999, only 500 of 1000 bytes came" in texts
        assert f"store c holds shard {SHARD[:12]} rotten: of bytes 0-999, the bytes are not those" in texts
        assert setup.reader.traffic()["d"].bytes_useful == 20_000
        for store in stores.values():
            await store.aclose()

    play(main)
