"""distribute: no receipt without a true read-back, and a store that fails costs its place, not the run."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import (
    AccessDenied,
    Corrupt,
    NoSpace,
    NotFound,
    PolicyRefused,
    PreconditionFailed,
    ReadOnly,
    StoreError,
    TimedOut,
    Unavailable,
)
from millrace.core.model import Digest, Receipt, StoreSite, digest_of
from millrace.core.ports import Bytes, Content, ObjectInfo, Store
from millrace.core.spec import Placement
from millrace.decide.placement import place
from millrace.pipeline.distribute import Blob, Distributor, hash_object, put_verified
from millrace.stores.hashing import RANGE_BYTES, hash_by_ranges
from millrace.stores.keys import PutMode
from millrace.stores.layers import Fault, FaultPlan, FaultRates
from millrace.stores.memory import MemoryContents, MemoryStore

DATA = b"the bytes of a shard, in two pieces"
BLOB = Blob(digest_of(DATA), "shards/x", len(DATA), [DATA[:10], memoryview(DATA)[10:]])
CLOUDS = ("aws", "gcp", "azure", "ibm")
SITES = [StoreSite(f"s{i}", CLOUDS[i], "r", "us") for i in range(4)]


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.at_s = 1000.0

    def now_ms(self) -> int:
        return round(self.at_s * 1000)

    def monotonic_s(self) -> float:
        return self.at_s


class CountedStore(MemoryStore):
    """Counts what is written, and fails in the way it is told to, for as long as it is told to."""

    def __init__(self, name: str, *, fails: StoreError | None = None) -> None:
        self.held = MemoryContents()
        super().__init__(name, contents=self.held)
        self.puts: list[str] = []
        self.fails = fails

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        if self.fails is not None:
            raise self.fails
        self.puts.append(key)
        return await super().put(key, data, mode=mode, if_version=if_version)

    def content_of(self, key: str) -> bytes | None:
        found = self.held.objects.get(key)
        return None if found is None else found[0]


class Bench:
    """Four stores in four clouds under a policy."""

    def __init__(self, **policy: Any) -> None:
        self.clock = HandClock()
        self.policy = Placement(**{"replicas": 3, "min_clouds": 2, **policy})
        self.inner = {s.name: CountedStore(s.name) for s in SITES}
        self.stores: dict[str, Store] = dict(self.inner)
        self.distributor = Distributor(self.stores, self.place, self.clock)

    def place(self, digest: Digest, keep: Collection[str], without: Collection[str]) -> Sequence[str]:
        return [s.name for s in place(digest, SITES, self.policy, keep=keep, without=without)]

    def wrap(self, name: str, plan: FaultPlan, seed: int = 0) -> None:
        self.stores[name] = Fault(self.inner[name], name=name, plan=plan, rng=random.Random(seed))

    def wanted(self, digest: Digest = BLOB.digest) -> list[str]:
        return list(self.place(digest, (), ()))

    def holding(self, key: str = BLOB.key, data: bytes = DATA) -> set[str]:
        return {name for name, store in self.inner.items() if store.content_of(key) == data}


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario()

    asyncio.run(main())


# --- one store --------------------------------------------------------------------------------------------


class RangedStore(MemoryStore):
    """Reads back by ranges, as stores behind a wire do."""

    async def content(self, key: str) -> Content:
        return await hash_by_ranges(self, key)


@pytest.mark.parametrize("size", [0, 1, RANGE_BYTES - 1, RANGE_BYTES, RANGE_BYTES + 1, 2 * RANGE_BYTES])
def test_an_object_of_any_size_is_hashed_whole(size: int) -> None:
    async def scenario() -> None:
        data = bytes(size)
        store = RangedStore("a")
        await store.put("k", [data])
        assert await hash_object(store, "k", size) == digest_of(data)
        with pytest.raises(Corrupt, match=f"k in memory://a has {size} bytes where {size + 1} were written"):
            await hash_object(store, "k", size + 1)

    play(scenario)


def test_what_is_there_and_whole_is_not_written_again() -> None:
    async def scenario() -> None:
        store = CountedStore("a")
        await put_verified(store, BLOB)
        await put_verified(store, BLOB)
        assert store.puts == [BLOB.key]
        assert store.content_of(BLOB.key) == DATA

    play(scenario)


@pytest.mark.parametrize("rotten", [b"", DATA[:-1], DATA + b"x", b"X" + DATA[1:]])
def test_what_is_there_and_rotten_is_written_again(rotten: bytes) -> None:
    async def scenario() -> None:
        store = CountedStore("a")
        await MemoryStore("a", contents=store.held).put(BLOB.key, [rotten])
        await put_verified(store, BLOB)
        assert store.puts == [BLOB.key]
        assert store.content_of(BLOB.key) == DATA

    play(scenario)


def test_a_read_back_that_differs_is_written_again_and_then_given_up() -> None:
    async def scenario() -> None:
        inner = CountedStore("a")
        always = FaultPlan(per_op={"content": FaultRates(corrupt=1.0)})
        with pytest.raises(Corrupt) as caught:
            await put_verified(Fault(inner, name="a", plan=always, rng=random.Random(0)), BLOB)
        assert str(caught.value) == (
            "shards/x was written to memory://a 3 times and came back different each time; "
            "take the store out of the world and check its disk or service"
        )
        assert len(inner.puts) == 3

    play(scenario)


@pytest.mark.parametrize("rates", [FaultRates(corrupt=0.5), FaultRates(truncate=0.5)])
def test_a_store_that_lies_now_and_then_ends_with_the_truth_or_an_error(rates: FaultRates) -> None:
    async def scenario() -> None:
        ended = set()
        for seed in range(40):
            inner = CountedStore("a")
            faulty = Fault(inner, name="a", plan=FaultPlan(per_op={"content": rates}), rng=random.Random(seed))
            try:
                await put_verified(faulty, BLOB)
                ended.add("done")
            except Corrupt:
                ended.add("corrupt")
            assert inner.content_of(BLOB.key) == DATA
        assert ended == {"done", "corrupt"}

    play(scenario)


class ReplacedMeanwhile(RangedStore):
    """Another task writes the same object while it is read back, the first ``times`` times."""

    def __init__(self, times: int) -> None:
        super().__init__("a")
        self.times = times

    async def head(self, key: str) -> ObjectInfo:
        info = await super().head(key)
        if self.times:
            self.times -= 1
            await super().put(key, [DATA])
        return info


def test_two_tasks_that_write_one_shard_do_not_disturb_each_other() -> None:
    async def scenario() -> None:
        await put_verified(ReplacedMeanwhile(times=2), BLOB)
        with pytest.raises(PreconditionFailed):
            await put_verified(ReplacedMeanwhile(times=1000), BLOB)

    play(scenario)


@given(st.lists(st.binary(max_size=20), max_size=6))
def test_pieces_are_one_object(pieces: list[bytes]) -> None:
    async def scenario() -> None:
        data = b"".join(pieces)
        store = CountedStore("a")
        await put_verified(store, Blob(digest_of(data), "k", len(data), pieces))
        assert store.content_of("k") == data

    play(scenario)


# --- several stores -----------------------------------------------------------------------------------------


def test_every_replica_of_the_policy_gets_a_receipt_in_placement_order() -> None:
    async def scenario() -> None:
        bench = Bench()
        receipts = await bench.distributor.distribute(BLOB)
        assert receipts == tuple(Receipt(BLOB.digest, name, 1_000_000) for name in bench.wanted())
        assert bench.holding() == set(bench.wanted())
        assert bench.distributor.notes == []

    play(scenario)


@pytest.mark.parametrize(
    "error",
    [
        NoSpace("store is full", store="s", key="k"),
        ReadOnly("store takes no writes", store="s", key="k"),
        AccessDenied("no permission", store="s", key="k"),
        Unavailable("connection refused", store="s", key="k"),
        TimedOut("no answer in 30 s", store="s", key="k"),
    ],
    ids=lambda error: error.kind,
)
def test_a_store_that_fails_is_replaced_within_policy_and_noted(error: StoreError) -> None:
    async def scenario() -> None:
        bench = Bench()
        broken = bench.wanted()[1]
        bench.inner[broken].fails = error
        receipts = await bench.distributor.distribute(BLOB)
        names = {r.store for r in receipts}
        assert len(names) == 3
        assert broken not in names
        assert bench.holding() == names
        assert bench.distributor.notes == [f"{broken} is left out: {error}"]

    play(scenario)


def test_a_full_store_by_the_fault_layer() -> None:
    async def scenario() -> None:
        bench = Bench()
        full = bench.wanted()[0]
        bench.wrap(full, FaultPlan(no_space_after_bytes=3))
        names = {r.store for r in await bench.distributor.distribute(BLOB)}
        assert full not in names
        assert bench.holding() == names

    play(scenario)


def test_the_note_is_made_once_and_the_store_left_alone_for_a_while() -> None:
    async def scenario() -> None:
        bench = Bench()
        broken = bench.wanted()[0]
        bench.inner[broken].fails = NoSpace("full", store=broken)
        blobs = [Blob(digest_of(b"%d" % i), f"shards/{i}", 1, [b"%d" % i]) for i in range(9)]
        for blob in (BLOB, *blobs):
            await bench.distributor.distribute(blob)
        assert len(bench.distributor.notes) == 1
        bench.inner[broken].fails = None
        assert broken not in {r.store for r in await bench.distributor.distribute(BLOB)}
        bench.clock.at_s += 60
        again = await bench.distributor.distribute(BLOB)
        assert {r.store for r in again} == set(bench.wanted())

    play(scenario)


def test_a_store_that_was_left_alone_is_asked_again_before_giving_up() -> None:
    async def scenario() -> None:
        bench = Bench(replicas=4, min_clouds=4)
        broken = bench.wanted()[0]
        bench.inner[broken].fails = Unavailable("refused", store=broken)
        with pytest.raises(Unavailable):
            await bench.distributor.distribute(BLOB)
        bench.inner[broken].fails = None
        assert len(await bench.distributor.distribute(BLOB)) == 4

    play(scenario)


def test_a_policy_that_can_not_be_met_names_the_stores_and_why() -> None:
    async def scenario() -> None:
        bench = Bench()
        broken = bench.wanted()[:2]
        for name in broken:
            bench.inner[name].fails = NoSpace(f"store {name} is full", store=name)
        with pytest.raises(NoSpace) as caught:
            await bench.distributor.distribute(BLOB)
        message = str(caught.value)
        assert message.startswith("1 of the replicas of shards/x could be made and no legal place is left")
        assert all(f"{name}: store {name} is full" in message for name in broken)

    play(scenario)


def test_a_policy_that_no_store_could_meet_is_refused_as_policy() -> None:
    async def scenario() -> None:
        with pytest.raises(PolicyRefused) as caught:
            await Bench(allow=("eu",)).distributor.distribute(BLOB)
        assert caught.value.rule == "replicas"

    play(scenario)


def test_residency_holds_when_a_store_fails() -> None:
    """The store in another jurisdiction is free and works, and still gets nothing."""

    async def scenario() -> None:
        bench = Bench(replicas=3, min_clouds=3, allow=("us",))
        foreign = [StoreSite(s.name, s.cloud, s.region, "cn" if s.name == "s3" else "us") for s in SITES]

        def us_only(digest: Digest, keep: Collection[str], without: Collection[str]) -> Sequence[str]:
            return [s.name for s in place(digest, foreign, bench.policy, keep=keep, without=without)]

        bench.inner["s0"].fails = NoSpace("full", store="s0")
        with pytest.raises(NoSpace):
            await Distributor(bench.stores, us_only, bench.clock).distribute(BLOB)
        assert bench.inner["s3"].puts == []

    play(scenario)


@given(st.integers(0, 2**32))
def test_a_receipt_is_never_given_for_what_can_not_be_read_back_true(seed: int) -> None:
    """Any mix of lost answers, refusals, flipped bits and cut reads, in every store."""
    dice = random.Random(seed)

    def rates() -> FaultRates:
        return FaultRates(
            unavailable=dice.choice([0, 0.2]),
            lost_response=dice.choice([0, 0.2]),
            corrupt=dice.choice([0, 0.3]),
            truncate=dice.choice([0, 0.3]),
        )

    async def scenario() -> None:
        bench = Bench()
        for name in bench.inner:
            bench.wrap(name, FaultPlan(per_op={"put": rates(), "content": rates(), "head": rates()}), seed)
        try:
            receipts = await bench.distributor.distribute(BLOB)
        except StoreError:
            return
        names = [r.store for r in receipts]
        assert len(set(names)) == 3
        assert set(names) <= bench.holding()
        assert len({CLOUDS[int(name[1])] for name in names}) >= 2

    play(scenario)


def test_the_same_shard_from_many_tasks_at_once() -> None:
    async def scenario() -> None:
        bench = Bench()
        found = await asyncio.gather(*(bench.distributor.distribute(BLOB) for _ in range(8)))
        assert len(set(found)) == 1
        assert bench.holding() == set(bench.wanted())

    play(scenario)


def test_a_distribution_that_is_cancelled_leaves_no_task_behind() -> None:
    async def scenario() -> None:
        bench = Bench()

        class Stuck(CountedStore):
            async def content(self, key: str) -> Content:
                await asyncio.Event().wait()
                raise NotFound("never")

        for name in bench.inner:
            bench.stores[name] = Stuck(name)
        task = asyncio.create_task(bench.distributor.distribute(BLOB))
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scenario)
