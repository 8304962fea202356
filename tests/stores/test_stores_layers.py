"""The wrappers, one by one, with a clock and dice that the tests hold."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry

from millrace.core.errors import (
    AlreadyExists,
    NoSpace,
    NotFound,
    PreconditionFailed,
    StoreError,
    TimedOut,
    Unavailable,
)
from millrace.core.ports import Bytes, ObjectInfo, RangeRequest, Store
from millrace.stores.keys import PutMode
from millrace.stores.layers import (
    Fault,
    FaultPlan,
    FaultRates,
    Layer,
    Limit,
    Metrics,
    Retry,
    RetryPlan,
    Timeout,
    TimeoutPlan,
)
from millrace.stores.memory import MemoryContents, MemoryStore
from millrace.telemetry.metrics import StoreMetrics


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds


class Scripted(MemoryStore):
    """A memory store whose calls do what a script says first."""

    def __init__(self, script: Sequence[str | StoreError]) -> None:
        super().__init__("m")
        self.script = list(script)
        self.calls = 0

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        self.calls += 1
        step = self.script.pop(0) if self.script else "do"
        if isinstance(step, StoreError):
            raise step
        info = await super().put(key, data, mode=mode, if_version=if_version)
        if step == "lose":
            raise Unavailable("the response was lost")
        return info


class HalfListed(MemoryStore):
    """Its listings give one page more each time, then break off, until one gets through."""

    def __init__(self, contents: MemoryContents) -> None:
        super().__init__("m", contents=contents)
        self.listings = 0

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        self.listings += 1
        keys = sorted(self._contents.objects)
        for at, key in enumerate(keys):
            if at == self.listings:
                raise Unavailable("the listing broke off")
            yield [self._contents.objects[key][1]]


class Slow(MemoryStore):
    """Never answers a read; counts how many are waiting."""

    def __init__(self) -> None:
        super().__init__("m")
        self.inside = 0
        self.most_inside = 0

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        try:
            await asyncio.sleep(0.01 if key == "soon" else 3600)
        finally:
            self.inside -= 1
        return memoryview(b"")


def retrying(inner: Store, time: Time, plan: RetryPlan | None = None, told: list[str] | None = None) -> Retry:
    def tell(op_name: str, error: StoreError) -> None:
        if told is not None:
            told.append(f"{op_name} {error.kind}")

    return Retry(
        inner,
        name="m",
        rng=random.Random(1),
        plan=plan or RetryPlan(),
        sleep=time.sleep,
        monotonic_s=time.monotonic_s,
        on_retry=tell,
    )


# --- retry --------------------------------------------------------------------------------------------


def test_what_may_pass_is_tried_again_with_growing_jittered_waits() -> None:
    async def main() -> None:
        time, told = Time(), list[str]()
        inner = Scripted([Unavailable("1"), TimedOut("2"), Unavailable("3")])
        store = retrying(inner, time, RetryPlan(attempts=5, delay_s=1, delay_s_max=3), told)
        assert (await store.put("k", [b"x"])).size_bytes == 1
        assert told == ["put Unavailable", "put TimedOut", "put Unavailable"]
        assert all(0 <= wait <= bound for wait, bound in zip(time.slept, (1, 2, 3), strict=True))
        assert len(set(time.slept)) == 3

    asyncio.run(main())


def test_what_will_not_pass_is_not_tried_again() -> None:
    async def main() -> None:
        for error in (NotFound("x"), NoSpace("x"), StoreError("x")):
            time = Time()
            inner = Scripted([error])
            with pytest.raises(type(error)):
                await retrying(inner, time).put("k", [b"x"])
            assert (inner.calls, time.slept) == (1, [])

    asyncio.run(main())


def test_attempts_and_total_time_are_bounded() -> None:
    async def main() -> None:
        inner = Scripted([Unavailable(str(number)) for number in range(100)])
        with pytest.raises(Unavailable, match="3"):
            await retrying(inner, Time(), RetryPlan(attempts=4)).put("k", [b"x"])
        assert inner.calls == 4
        time = Time()
        inner = Scripted([Unavailable(str(number)) for number in range(100)])
        with pytest.raises(Unavailable):
            await retrying(inner, time, RetryPlan(attempts=1000, delay_s=10, delay_s_max=10, total_s=60)).put("k", [])
        assert time.now_s <= 60
        assert inner.calls < 60

    asyncio.run(main())


@pytest.mark.parametrize("conditional", ["create", "swap"])
def test_a_conditional_put_whose_response_was_lost_has_won(conditional: str) -> None:
    async def main() -> None:
        inner = Scripted([])
        version = (await inner.put("k", [b"before"])).version
        if conditional == "create":
            await inner.delete("k")
        inner.script = ["lose", Unavailable("again")]
        store = retrying(inner, Time())
        data: list[Bytes] = [b"mine ", memoryview(b"and mine"), bytearray(b"!") * 3_000_000]
        info = await (
            store.put("k", data, mode="create") if conditional == "create" else store.put("k", data, if_version=version)
        )
        assert info == await inner.head("k")
        assert bytes(await inner.get("k")) == b"".join(data)

    asyncio.run(main())


def test_a_conditional_put_that_really_lost_says_so() -> None:
    async def main() -> None:
        inner = Scripted([])
        old = await inner.put("k", [b"theirs"])
        new = await inner.put("k", [b"theirs too"])
        for data in ([b"theirs tow"], [b"theirs"], []):
            inner.script = [Unavailable("1")]
            with pytest.raises(AlreadyExists):
                await retrying(inner, Time()).put("k", data, mode="create")
            inner.script = [Unavailable("1")]
            with pytest.raises(PreconditionFailed):
                await retrying(inner, Time()).put("k", data, if_version=old.version)
        # Without a lost response before it, a conflict is one, even over the very same bytes.
        with pytest.raises(AlreadyExists):
            await retrying(inner, Time()).put("k", [b"theirs too"], mode="create")
        assert (await inner.head("k")).version == new.version

    asyncio.run(main())


def test_a_listing_that_breaks_off_goes_on_without_giving_anything_twice() -> None:
    async def main() -> None:
        contents = MemoryContents()
        filler = MemoryStore("m", contents=contents)
        keys = [f"k{number:02d}" for number in range(12)]
        for key in keys:
            await filler.put(key, [b"x"])
        inner = HalfListed(contents)
        store = retrying(inner, Time(), RetryPlan(attempts=3))
        assert [info.key async for page in store.list() for info in page] == keys
        assert inner.listings == 12
        with pytest.raises(StoreError, match="broke off after 3 objects") as given_up:
            async for _ in retrying(HalfListed(contents), Time(), RetryPlan(list_again_objects=2)).list():
                pass
        assert not given_up.value.retryable

    asyncio.run(main())


# --- timeout and limit ----------------------------------------------------------------------------------


def test_a_call_that_hangs_is_cancelled_and_named() -> None:
    async def main() -> None:
        inner = Slow()
        store = Timeout(inner, name="far", plan=TimeoutPlan(base_s=0.01, open_read_bytes=0))
        with pytest.raises(TimedOut, match=r"store far did not finish a get of 'k' in 0\.01 s") as late:
            await store.get("k")
        assert (late.value.store, late.value.key, late.value.retryable) == ("far", "k", True)
        assert inner.inside == 0

    asyncio.run(main())


def test_larger_transfers_get_more_time() -> None:
    async def main() -> None:
        seen: dict[str, float] = {}

        class Plan(TimeoutPlan):
            def seconds(self, op: object) -> float:
                seen[getattr(op, "name", "")] = super().seconds(op)  # type: ignore[arg-type]
                return seen[getattr(op, "name", "")]

        plan = Plan(base_s=1, bytes_per_s=100, open_read_bytes=500, total_s=7)
        store = Timeout(MemoryStore("m"), name="m", plan=plan)
        await store.put("k", [bytes(100), bytes(100)])
        await store.get("k")
        await store.get_range("k", 0, 50)
        await store.head("k")
        await store.put("k2", [bytes(100_000)])
        assert seen == {"put": 7.0, "get": 6.0, "get_range": 1.5, "head": 1.0}

    asyncio.run(main())


def test_the_limit_holds_and_waiting_calls_can_be_cancelled() -> None:
    async def main() -> None:
        inner = Slow()
        store = Limit(inner, name="m", concurrent=3)
        await asyncio.gather(*(store.get("soon") for _ in range(20)))
        assert inner.most_inside == 3
        stuck = [asyncio.ensure_future(store.get("k")) for _ in range(5)]
        await asyncio.sleep(0.01)
        for task in stuck:
            task.cancel()
        await asyncio.wait(stuck)
        await store.get("soon")
        assert inner.inside == 0

    asyncio.run(main())


# --- metrics --------------------------------------------------------------------------------------------


def test_calls_errors_and_bytes_are_counted_by_store_and_never_by_key() -> None:
    async def main() -> None:
        registry = CollectorRegistry()
        time = Time()
        store = Metrics(MemoryStore("m"), name="aws-main", metrics=StoreMetrics(registry), monotonic_s=time.monotonic_s)
        await store.put("secret/key", [b"12345", b"678"])
        await store.get("secret/key")
        await store.get_range("secret/key", 2, 3)
        assert [page async for page in store.list()]
        for _ in range(2):
            with pytest.raises(NotFound):
                await store.get("other")

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(name, {"store": "aws-main", **labels})

        assert value("millrace_store_seconds_count", op="put") == 1
        assert value("millrace_store_seconds_count", op="get") == 3
        assert value("millrace_store_errors_total", op="get", kind="NotFound") == 2
        assert value("millrace_store_errors_total", op="put", kind="NotFound") is None
        assert value("millrace_store_bytes_total", direction="written") == 8
        assert value("millrace_store_bytes_total", direction="read") == 11
        for metric in registry.collect():
            for sample in metric.samples:
                assert not any("key" in label or "other" in label for label in sample.labels.values())

    asyncio.run(main())


# --- fault ----------------------------------------------------------------------------------------------


def faulty(rates: FaultRates, seed: int = 1, no_space_after_bytes: int | None = None) -> Fault:
    plan = FaultPlan(rates, no_space_after_bytes=no_space_after_bytes)
    return Fault(MemoryStore("m"), name="m", plan=plan, rng=random.Random(seed))


def test_no_faults_are_made_where_none_are_planned() -> None:
    async def main() -> None:
        store = Fault(MemoryStore("m"), name="m", plan=FaultPlan(), rng=random.Random(1))
        for number in range(50):
            await store.put("k", [b"%d" % number])
            assert bytes(await store.get("k")) == b"%d" % number

    asyncio.run(main())


def test_unavailable_does_nothing_and_a_lost_response_does_it() -> None:
    async def main() -> None:
        for rates, there in ((FaultRates(unavailable=1), False), (FaultRates(lost_response=1), True)):
            store = Fault(MemoryStore("m"), name="m", plan=FaultPlan(per_op={"put": rates}), rng=random.Random(1))
            with pytest.raises(Unavailable, match="injected"):
                await store.put("k", [b"x"])
            if there:
                assert bytes(await store.get("k")) == b"x"
            else:
                with pytest.raises(NotFound):
                    await store.get("k")

    asyncio.run(main())


@pytest.mark.parametrize("read", ["get", "get_range", "read_many"])
def test_spoiled_reads_differ_by_one_bit_or_are_short(read: str) -> None:
    whole = bytes(range(200))

    async def one(store: Store) -> bytes:
        if read == "get":
            return bytes(await store.get("k"))
        if read == "get_range":
            return bytes(await store.get_range("k", 0, 200))
        return bytes((await store.read_many([RangeRequest("k")]))[0])

    async def main() -> None:
        store = faulty(FaultRates(corrupt=1))
        await store.put("k", [whole])
        for _ in range(20):
            spoiled = await one(store)
            assert sum((a ^ b).bit_count() for a, b in zip(spoiled, whole, strict=True)) == 1
        store = faulty(FaultRates(truncate=1))
        await store.put("k", [whole])
        for _ in range(20):
            spoiled = await one(store)
            assert len(spoiled) < 200
            assert whole.startswith(spoiled)
        await store.put("k", [])
        assert await one(store) == b""

    asyncio.run(main())


def test_space_runs_out() -> None:
    async def main() -> None:
        store = faulty(FaultRates(), no_space_after_bytes=100)
        await store.put("a", [bytes(60)])
        with pytest.raises(NoSpace, match="'b'"):
            await store.put("b", [bytes(41)])
        await store.put("b", [bytes(40)])

    asyncio.run(main())


def test_one_seed_makes_the_same_faults_again() -> None:
    async def outcomes(seed: int) -> list[str]:
        store = faulty(FaultRates(unavailable=0.3, lost_response=0.3, corrupt=0.5), seed)
        result = []
        for number in range(60):
            try:
                await store.put(f"k{number % 3}", [b"abc"])
                result.append(bytes(await store.get(f"k{number % 3}")).hex())
            except StoreError as error:
                result.append(f"{error.kind} {error}")
        return result

    assert asyncio.run(outcomes(5)) == asyncio.run(outcomes(5))
    assert asyncio.run(outcomes(5)) != asyncio.run(outcomes(6))


# --- all of them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: Layer(inner, name="m"),
        lambda inner: Timeout(inner, name="m"),
        lambda inner: Limit(inner, name="m", concurrent=1),
        lambda inner: Retry(inner, name="m", rng=random.Random(1)),
        lambda inner: Metrics(inner, name="m", metrics=StoreMetrics(CollectorRegistry())),
    ],
)
def test_a_layer_passes_on_its_url_and_its_end(wrap: Callable[[Store], Store]) -> None:
    async def main() -> None:
        inner = MemoryStore("deep")
        store = wrap(inner)
        assert store.url == "memory://deep"
        assert (await store.capabilities()).create_only
        await store.aclose()
        with pytest.raises(StoreError, match="closed"):
            await inner.get("k")

    asyncio.run(main())
