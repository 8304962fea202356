"""Garbage collection: what is named stays, what nobody names goes, and when in doubt nothing does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millrace.catalog.collection import GcReport
from millrace.catalog.gc import SCRATCH, collect, mark, sweep
from millrace.catalog.marks import load_marks, store_marks
from millrace.catalog.readers import reading
from millrace.catalog.remove import remove
from millrace.core.errors import CoordError, Fenced, LeaseHeld, Unavailable, UsageError
from millrace.core.facts import ReaderClaim, encode
from millrace.core.keys import GC_LEASE, GC_MARKS, ledger_page, manifest_key, reader, run_lease
from millrace.core.model import Digest
from millrace.core.ports import Write

if TYPE_CHECKING:
    from tests.catalog.conftest import Made, Scene

HOUR = 3_600_000


async def call(what: Any, scene: Scene, **options: Any) -> GcReport:
    report: GcReport = await what(
        scene.coord, scene.stores, scene.sites, scene.work, who="tester", clock=scene.clock, **options
    )
    return report


async def everything(scene: Scene) -> set[str]:
    return set().union(*[await store.keys() for store in scene.stores.values()])


def test_what_was_removed_goes_after_its_grace_and_not_before(scene: Scene) -> None:
    async def scenario() -> None:
        kept, gone = await scene.make([1, 2]), await scene.make([2, 3])
        before = await everything(scene)
        await remove(scene.coord, "set@2")
        scene.clock.ms += 1
        first = await call(collect, scene)
        assert (first.deleted_objects, first.marked_objects, first.replica_pages) == (0, 3 * 5, 2)
        scene.clock.ms += HOUR - 1
        second = await call(sweep, scene)
        assert second.deleted_objects == 0
        assert {k.why for s in second.stores for k in s.kept} == {"within its grace"}
        scene.clock.ms += 1
        third = await call(collect, scene)
        after = await everything(scene)
        assert set(kept.shards) <= after
        assert not (set(gone.shards) - set(kept.shards)) & after
        assert third.deleted_objects == 3 * len(before - after)
        assert (await scene.verify(kept.record)).verdict == "whole"
        assert (await call(collect, scene)).marked_objects == 0

    asyncio.run(scenario())


def test_a_mark_keeps_its_time_over_later_passes(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await remove(scene.coord, "set")
        scene.clock.ms += 1
        for _ in range(4):
            assert (await call(collect, scene)).deleted_objects == 0
            scene.clock.ms += HOUR // 4
        report = await call(collect, scene)
        assert report.deleted_objects > 0
        assert await everything(scene) == set()
        assert report.deleted_bytes > 0

    asyncio.run(scenario())


def test_an_object_written_again_after_its_mark_is_left(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        await remove(scene.coord, "set")
        scene.clock.ms += 1
        await call(mark, scene)
        scene.clock.ms += 10
        key = made.shards[0]
        name = scene.holders(made, key)[0]
        await scene.stores[name].put(key, [await scene.stores[name].get(key)])
        scene.clock.ms += HOUR
        report = await call(sweep, scene)
        assert key in await scene.stores[name].keys()
        assert [(s.store, k.why, k.objects) for s in report.stores for k in s.kept] == [
            (name, "newer than its mark", 1)
        ]

    asyncio.run(scenario())


def test_files_of_others_are_never_touched(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await remove(scene.coord, "set")
        mine = [
            "shards/readme.txt",
            "shards/ab/" + "ab" * 31 + ".arrow",
            "shards/00/" + "ab" * 32 + ".arrow",
            "manifests/" + "AB" * 32 + ".json",
            "photos/cat.jpg",
        ]
        for key in mine:
            await scene.stores["aws"].put(key, [b"mine"])
        scene.clock.ms += 1
        await call(collect, scene)
        scene.clock.ms += HOUR
        report = await call(collect, scene)
        assert await everything(scene) == set(mine)
        assert next(s for s in report.stores if s.store == "aws").unknown_objects == 4

    asyncio.run(scenario())


def test_what_a_reader_claims_stays_until_the_claim_is_over(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        async with reading(scene.coord, made.record, "trainer", scene.clock):
            await remove(scene.coord, "set")
            for _ in range(2):
                scene.clock.ms += 1
                await call(collect, scene, grace_ms=0)
            assert set(made.shards) <= await everything(scene)
            assert len(await scene.coord.list("replicas/")) == 2
        for _ in range(2):
            scene.clock.ms += 1
            await call(collect, scene, grace_ms=0)
        assert await everything(scene) == set()

    asyncio.run(scenario())


def test_the_claim_of_a_reader_that_was_killed_ends_by_itself(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        fact = ReaderClaim(who="dead", until_ms=scene.clock.ms + 1000)
        await scene.coord.commit([Write(reader(Digest(made.record.digest), "dead"), encode(fact))])
        await remove(scene.coord, "set")
        scene.clock.ms += 30_000
        assert (await call(collect, scene, grace_ms=0)).claims == 0
        scene.clock.ms += 60_000
        assert (await call(collect, scene, grace_ms=0)).claims == 1
        scene.clock.ms += 1
        await call(collect, scene, grace_ms=0)
        assert await everything(scene) == set()
        assert await scene.coord.list("readers/") == []

    asyncio.run(scenario())


def test_a_claim_that_is_no_longer_renewed_stops_the_reader(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        real = scene.coord.commit

        async def broken(*args: Any, **options: Any) -> int:
            raise CoordError("the coordination store is gone")

        async def read() -> None:
            async with reading(scene.coord, made.record, "trainer", scene.clock, ttl_ms=60):
                scene.coord.commit = broken  # type: ignore[method-assign]
                await asyncio.sleep(30)

        with pytest.raises(CoordError, match=r"claim of trainer on set@1 could not be renewed.*store is gone"):
            await read()
        scene.coord.commit = real  # type: ignore[method-assign]

    asyncio.run(scenario())


def test_a_claim_is_renewed_while_it_is_needed(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        async with reading(scene.coord, made.record, "trainer", scene.clock, ttl_ms=3000):
            first = await scene.coord.list("readers/")
            scene.clock.ms += 5
            while (await scene.coord.list("readers/"))[0].value == first[0].value:
                await asyncio.sleep(0.01)
        assert await scene.coord.list("readers/") == []

    asyncio.run(scenario())


# --- runs ------------------------------------------------------------------------------------------------


def test_nothing_is_collected_under_a_living_run(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await remove(scene.coord, "set")
        await scene.start_run(7, [2])
        assert (await call(mark, scene)).marked_objects > 0
        scene.clock.ms += 1
        for what in (sweep, collect):
            with pytest.raises(LeaseHeld, match=r"while run 7 is under way \(process 7\).*millrace stop 7"):
                await call(what, scene)
        assert await scene.coord.holder(GC_LEASE) is None

    asyncio.run(scenario())


@pytest.mark.parametrize("state", ["running", "paused", "stopped", "failed"])
def test_what_an_unfinished_run_made_stays_and_its_process_is_fenced(scene: Scene, state: str) -> None:
    async def scenario() -> None:
        keys = set(await scene.start_run(7, [1, 2], state=state))
        stalled = await scene.coord.holder(run_lease(7))
        assert stalled is not None
        scene.clock.ms += 20_000  # its lease is over; perhaps its process only sleeps
        for _ in range(2):
            await call(collect, scene, grace_ms=0)
            scene.clock.ms += 1
        assert await everything(scene) == keys
        with pytest.raises(Fenced):
            await scene.coord.commit([Write("runs/00000007/record", b"{}")], guard=stalled)

    asyncio.run(scenario())


@pytest.mark.parametrize("state", ["done", "superseded"])
def test_a_finished_run_names_nothing_and_its_scratch_goes(scene: Scene, state: str) -> None:
    async def scenario() -> None:
        await scene.start_run(7, [1, 2])
        await scene.work.put("runs/00000007/notes.txt", [b"mine"])
        await scene.start_run(8, [3], alive=False)
        await scene.end_run(7, state)
        scene.clock.ms += 1
        first = await call(collect, scene)
        assert first.stores[-1].deleted_objects == 0
        scene.clock.ms += HOUR
        report = await call(collect, scene)
        assert report.stores[-1].store == SCRATCH
        assert report.stores[-1].deleted_objects == 3  # the plan and two outputs
        left = await scene.work.keys()
        assert "runs/00000007/notes.txt" in left
        assert len([k for k in left if k.startswith("runs/00000008/")]) == 2
        assert len(await everything(scene)) > 0

    asyncio.run(scenario())


def test_an_output_that_cannot_be_read_stops_the_collection(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.start_run(7, [1], state="failed", alive=False)
        output = next(k for k in await scene.work.keys() if "/main/" in k)
        await scene.work.spoil(output, "flip")
        with pytest.raises(Unavailable, match=r"nothing is collected.*run 7, which isn't finished.*--fresh"):
            await call(collect, scene)
        await scene.coord.commit([Write(ledger_page(7, "main", 0), b"[1]")])
        with pytest.raises(CoordError, match="ledger page at runs/00000007/ledger/main/000000"):
            await call(collect, scene)

    asyncio.run(scenario())


# --- doubt -----------------------------------------------------------------------------------------------


def test_a_manifest_that_cannot_be_read_stops_everything(scene: Scene) -> None:
    async def scenario() -> None:
        keep = await scene.make([1])
        await scene.make([2], "other")
        await remove(scene.coord, "other")
        await call(mark, scene)
        scene.clock.ms += 2 * HOUR
        before = await everything(scene)
        root = manifest_key(Digest(keep.record.digest))
        holders = [s for s in scene.stores.values() if root in await s.keys()]
        for store in holders:
            store.down = True
        with pytest.raises(Unavailable, match="the manifest of set@1 can't be read"):
            await call(collect, scene)
        assert await everything(scene) == before
        for store in holders:
            store.down = False
            await store.spoil(root, "flip")
        with pytest.raises(Unavailable, match="set@1"):
            await call(mark, scene)

    asyncio.run(scenario())


def test_a_store_that_is_down_is_left_for_later(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await remove(scene.coord, "set")
        scene.clock.ms += 1
        await call(collect, scene, grace_ms=0)
        scene.stores["gcp"].down = True
        scene.clock.ms += 1
        report = await call(collect, scene, grace_ms=0)
        assert list(report.failed) == ["gcp"]
        assert report.deleted_objects > 0
        scene.stores["gcp"].down = False
        for _ in range(2):
            scene.clock.ms += 1
            await call(collect, scene, grace_ms=0)
        assert await everything(scene) == set()

    asyncio.run(scenario())


def test_a_collection_that_lost_its_lease_stops_before_the_next_delete(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await remove(scene.coord, "set")
        scene.clock.ms += 1
        await call(collect, scene, grace_ms=0)
        before = await everything(scene)
        scene.clock.ms += 1
        store = scene.stores["aws"]
        real = store.list

        def taken_over(prefix: str = "") -> Any:
            async def pages() -> Any:
                await scene.coord.acquire(GC_LEASE, "a run", 1000, now_ms=scene.clock.ms, steal=True)
                async for page in real(prefix):
                    yield page

            return pages()

        store.list = taken_over  # type: ignore[method-assign]
        with pytest.raises(Fenced):
            await call(collect, scene, grace_ms=0)
        assert await everything(scene) == before

    asyncio.run(scenario())


def test_two_collections_at_once_are_one(scene: Scene) -> None:
    async def scenario() -> None:
        await scene.make([1])
        results = await asyncio.gather(call(collect, scene), call(mark, scene), return_exceptions=True)
        assert sorted(isinstance(r, GcReport) for r in results) == [False, True]
        assert any("collects garbage already" in str(r) for r in results)

    asyncio.run(scenario())


def test_marks_of_any_number_come_back(scene: Scene) -> None:
    async def scenario() -> None:
        lease = await scene.coord.acquire(GC_LEASE, "gc", 1000, now_ms=1)
        many = {b"s" + i.to_bytes(32, "big"): 5 + i % 2 for i in range(40_000)}
        await store_marks(scene.coord, many, at_ms=9, guard=lease)
        assert await load_marks(scene.coord) == many
        few = {b"m" + bytes(32): 7}
        await store_marks(scene.coord, few, at_ms=10, guard=lease)
        assert await load_marks(scene.coord) == few
        assert len(await scene.coord.list(f"{GC_MARKS}/")) == 1
        await scene.coord.commit([Write(GC_MARKS, None)])
        assert await load_marks(scene.coord) == {}  # a collection died while it wrote them

    asyncio.run(scenario())


# --- any order of things -----------------------------------------------------------------------------------


class Collecting(RuleBasedStateMachine):
    """Versions come and go, runs live, die and go on, readers read, collections run: nothing named is ever lost."""

    scene_type: type[Scene]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.versions: dict[int, Made] = {}
        self.claims: dict[int, tuple[str, set[str]]] = {}
        self.living: dict[int, set[str]] = {}
        self.dead: dict[int, set[str]] = {}
        self.count = 0

    @initialize()
    def begin(self) -> None:
        self.scene = self.scene_type()

    def do(self, work: Any) -> Any:
        self.scene.clock.ms += 1
        return self.runner.run(work)

    def teardown(self) -> None:
        if hasattr(self, "scene"):
            self.everything_unnamed_goes_in_the_end()
        self.runner.close()

    @rule(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=3, unique=True))
    def version(self, chunks: list[int]) -> None:
        made = self.do(self.scene.make(chunks))
        self.versions[made.record.version] = made

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def rm(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.versions)))
        self.do(remove(self.scene.coord, f"set@{number}"))
        del self.versions[number]

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        self.claim_of(self.versions[data.draw(st.sampled_from(sorted(self.versions)))])

    def claim_of(self, made: Made) -> None:
        self.count += 1
        key = reader(Digest(made.record.digest), f"reader-{self.count}")
        fact = ReaderClaim(who="reader", until_ms=self.scene.clock.ms + 100 * HOUR)
        self.do(self.scene.coord.commit([Write(key, encode(fact))]))
        self.claims[self.count] = (key, self.objects(made))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def unclaim(self, data: st.DataObject) -> None:
        key, _ = self.claims.pop(data.draw(st.sampled_from(sorted(self.claims))))
        self.do(self.scene.coord.commit([Write(key, None)]))

    @rule(chunks=st.lists(st.integers(4, 9), min_size=1, max_size=2, unique=True))
    def run_starts(self, chunks: list[int]) -> None:
        self.scene.runs += 1
        self.living[self.scene.runs] = set(self.do(self.scene.start_run(self.scene.runs, chunks)))

    @rule(chunks=st.lists(st.integers(4, 9), min_size=1, max_size=2, unique=True))
    def run_fails(self, chunks: list[int]) -> None:
        self.run_starts(chunks)
        self.dead[self.scene.runs] = self.living.pop(self.scene.runs)
        self.do(self.scene.end_run(self.scene.runs, "failed"))

    @rule(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=2, unique=True))
    def version_is_removed_while_it_is_read(self, chunks: list[int]) -> None:
        made = self.do(self.scene.make(chunks))
        self.claim_of(made)
        self.versions.pop(made.record.version, None)
        if not made.unchanged:
            self.do(remove(self.scene.coord, f"set@{made.record.version}"))
        else:
            self.versions[made.record.version] = made

    @precondition(lambda self: self.living)
    @rule(state=st.sampled_from(["stopped", "failed", "superseded", "killed"]))
    def run_ends(self, state: str) -> None:
        number, shards = self.living.popitem()
        if state == "killed":
            self.scene.clock.ms += 20_000
            self.kill_leases()
        else:
            self.do(self.scene.end_run(number, state))
        if state != "superseded":
            self.dead[number] = shards

    def kill_leases(self) -> None:
        """The other runs' processes live on: they renew."""
        for number in self.living:
            held = self.do(self.scene.coord.holder(run_lease(number)))
            self.do(self.scene.coord.renew(held, 10_000, now_ms=self.scene.clock.ms))

    @precondition(lambda self: self.dead)
    @rule()
    def run_is_given_up(self) -> None:
        number, _ = self.dead.popitem()
        self.do(self.scene.end_run(number, "superseded"))

    @rule(hours=st.sampled_from([0, 1, 2]))
    def time_passes(self, hours: int) -> None:
        self.scene.clock.ms += hours * HOUR
        self.kill_leases()

    @rule(what=st.sampled_from([mark, sweep, collect]), grace_ms=st.sampled_from([0, HOUR]))
    def gc(self, what: Any, grace_ms: int) -> None:
        options = {} if what is mark else {"grace_ms": grace_ms}
        try:
            self.do(call(what, self.scene, **options))
        except LeaseHeld:
            assert self.living
        else:
            assert what is mark or not self.living

    @precondition(lambda self: not self.living)
    @rule()
    def gc_in_earnest(self) -> None:
        """Whatever isn't named by now goes."""
        for _ in range(2):
            self.do(call(collect, self.scene, grace_ms=0))

    @invariant()
    def nothing_named_is_ever_deleted(self) -> None:
        if hasattr(self, "scene"):
            there = [self.do(store.keys()) for store in self.scene.stores.values()]
            for key in self.named():
                assert sum(key in keys for keys in there) >= 3, key

    def objects(self, made: Made) -> set[str]:
        return {*made.shards, manifest_key(Digest(made.record.digest))}

    def named(self) -> set[str]:
        groups = [self.objects(made) for made in self.versions.values()]
        groups += [objects for _, objects in self.claims.values()]
        return set().union(*groups, *self.living.values(), *self.dead.values())

    def everything_unnamed_goes_in_the_end(self) -> None:
        for number in [*self.living, *self.dead]:
            self.do(self.scene.end_run(number, "superseded"))
        for key, _ in self.claims.values():
            self.do(self.scene.coord.commit([Write(key, None)]))
        if self.versions:
            self.do(remove(self.scene.coord, "set"))
        for _ in range(2):
            self.do(call(collect, self.scene))
            self.scene.clock.ms += 2 * HOUR
        assert self.do(everything(self.scene)) == set()
        assert self.do(self.scene.coord.list("replicas/")) == []
        assert self.do(self.scene.work.keys()) == set()


def test_any_order_of_things(new_scene: type[Scene]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    class Machine(Collecting):
        scene_type = new_scene

    run_state_machine_as_test(Machine, settings=settings(max_examples=50, stateful_step_count=20, deadline=None))


def test_a_reader_that_comes_too_late_is_refused(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        await remove(scene.coord, "set@1")
        with pytest.raises(UsageError, match="was removed"):
            async with reading(scene.coord, made.record, "late", scene.clock):
                raise AssertionError("it must not begin")

    asyncio.run(scenario())
