"""Retention: what is wanted stays whole, what is not wanted goes, and when in doubt nothing does."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from millrace.catalog.checkpoint_depot import LOCAL, gripped
from millrace.catalog.checkpoint_manifest import key_of, parts_of
from millrace.catalog.checkpoint_retention import GRACE_MS, Keep, plan, retain
from millrace.catalog.checkpoint_save import Saving
from millrace.catalog.checkpoint_survey import Known, read_manifest, survey
from millrace.catalog.checkpoints import list_checkpoints, pin
from millrace.core.errors import LeaseHeld, MillraceError, UsageError
from millrace.core.facts import CheckpointManifest, CheckpointRecord
from millrace.core.keys import checkpoint_manifest, checkpoint_object
from millrace.core.model import Digest
from millrace.core.ports import ObjectInfo

if TYPE_CHECKING:
    from tests.catalog.checkpoint_scene import Yard
    from tests.catalog.conftest import Scene, TestStore

DAY = 86_400_000


def make_yard(scene: Scene, folder: Path) -> Yard:
    yard: Yard = importlib.import_module("checkpoint_scene").Yard(scene, folder)
    return yard


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("checkpoint_scene", None)


@pytest.fixture
def yard(scenes: None, scene: Scene, tmp_path: Path) -> Yard:
    return make_yard(scene, tmp_path)


def files(step: int) -> dict[str, bytes]:
    """One file of its own, and one that it shares with the steps of its hundred."""
    return {"own": b"%06d" % step * 300, "shared": b"%06d" % (step // 100) * 300}


async def steps(yard: Yard) -> list[int]:
    return [line.step for line in (await list_checkpoints(yard.depot()))[0]]


async def objects(yard: Yard) -> dict[str, int]:
    return {name: len([key for key in keys if "/objects/" in key]) for name, keys in (await yard.everything()).items()}


# --- deciding -----------------------------------------------------------------------------------------------------


def known(step: int, mark: str, stores: tuple[str, ...], at_ms: int, *, state: str | None, pinned: bool) -> Known:
    digest = Digest(mark * 64)
    record = None
    if state is not None:
        record = CheckpointRecord(
            name="n",
            step=step,
            digest=digest,
            created_at_ms=at_ms,
            size_bytes=1,
            files=1,
            state="local" if state == "local" else "replicated",
            pinned=pinned,
            placement={},
        )
    return Known(step, checkpoint_manifest("n", step, digest), stores, at_ms, record)


Found = dict[int, list[tuple[tuple[str, ...], int, str | None, bool]]]
"""Step to its versions: stores, when it was made, state, pinned."""

places = st.sets(st.sampled_from([LOCAL, "a", "b"])).map(lambda s: tuple(sorted(s)))
facts = st.tuples(places, st.integers(0, 100), st.sampled_from([None, "local", "replicated"]), st.booleans())
several = st.dictionaries(st.integers(0, 12), st.lists(facts, min_size=1, max_size=2), max_size=8)
keeps = st.builds(Keep, last=st.none() | st.integers(1, 4), for_ms=st.none() | st.integers(0, 100))


@settings(max_examples=200)
@given(several, keeps)
def test_what_must_stay_stays(
    found: dict[int, list[tuple[tuple[str, ...], int, str | None, bool]]], keep: Keep
) -> None:
    everything = [
        known(step, "ab"[i], stores, at_ms, state=state if i == 0 else None, pinned=pinned)
        for step, versions in sorted(found.items(), reverse=True)
        for i, (stores, at_ms, state, pinned) in enumerate(versions)
    ]
    decided = plan(everything, keep, 100)
    assert sorted((*decided.kept, *decided.dropped), key=lambda k: k.key) == sorted(everything, key=lambda k: k.key)
    current = {k.step: k for k in reversed(everything)}  # the first of each step
    newest = [current[step] for step in sorted(current, reverse=True)]
    must = [k for k in newest if k.pinned]
    must += [k for k in newest if k.replicated][:1]
    must += [k for k in newest if LOCAL in k.stores][:1]
    must += newest[: keep.last or 0]
    must += [k for k in newest if keep.for_ms is not None and k.at_ms + keep.for_ms > 100]
    assert {k.key for k in must} <= {k.key for k in decided.kept}
    if not any(k.replicated for k in newest):
        assert all(k.stores == (LOCAL,) for k in decided.dropped)
    for gone in decided.dropped:
        assert gone in newest or current[gone.step].replicated
        assert gone not in newest or keep != Keep()
    local = [k for k in decided.kept if LOCAL in k.stores]
    assert all(k in local and k.replicated for k in decided.only_remote)
    assert not local or len(local) > len(decided.only_remote)


def test_rules_that_would_keep_nothing_are_refused() -> None:
    for wrong in ({"last": 0}, {"last": -1}, {"last": True}, {"for_ms": -1}):
        with pytest.raises(UsageError, match="keep_"):
            Keep(**wrong)


# --- doing --------------------------------------------------------------------------------------------------------


def test_by_count_the_newest_stay_and_here_only_the_newest(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=3)) as series:
            made = [await yard.replicated(series, step, files(step)) for step in (10, 20, 30, 40, 110)]
        assert await steps(yard) == [110, 40, 30]
        for manifest in made[2:]:
            holders = await yard.holders(manifest)
            assert len([n for n in holders if n != LOCAL]) == 2
            assert (LOCAL in holders) == (manifest is made[-1])
        # 30 and 40 share a file, in parts of which two are the same; 110 has its own: nothing else is left.
        counts = {n: c for n, c in (await objects(yard)).items() if c}
        assert counts.pop(LOCAL) == len(parts_of(made[-1]))
        assert set(counts.values()) == {len({d for m in made[2:] for d in parts_of(m)})}

    asyncio.run(scenario())


def test_by_age_those_that_are_younger_stay_too(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=1, for_ms=7 * DAY)) as series:
            for step in range(1, 12):
                await yard.replicated(series, step, files(step))
                yard.scene.clock.ms += DAY
        assert await steps(yard) == [11, 10, 9, 8, 7, 6, 5]
        async with yard.series(Keep(for_ms=DAY)) as series:
            yard.scene.clock.ms += 100 * DAY
            await series.retain()
        assert await steps(yard) == [11]

    asyncio.run(scenario())


def test_a_pin_holds_until_it_is_taken_away(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=1)) as series:
            first = await yard.replicated(series, 1, files(1))
            await pin(yard.depot(), 1)
            for step in (2, 3):
                await yard.replicated(series, step, files(step))
            assert await steps(yard) == [3, 1]
            assert len(await yard.holders(first)) == 2
            await pin(yard.depot(), 1, pinned=False)
            await series.retain()
            assert await steps(yard) == [3]
        with pytest.raises(UsageError, match=r"run-7 has no checkpoint of step 2; see 'millrace checkpoints run-7'"):
            await pin(yard.depot(), 2)

    asyncio.run(scenario())


def test_a_pin_can_be_set_when_the_records_are_lost(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            for step in (1, 2, 3):
                await yard.replicated(series, step, files(step))
        yard.forget()
        await pin(yard.depot(), 1)
        async with yard.series(Keep(last=1)) as series:
            await yard.replicated(series, 4, files(4))
        assert await steps(yard) == [4, 1]

    asyncio.run(scenario())


def test_who_only_reads_deletes_nothing(yard: Yard) -> None:
    async def scenario() -> None:
        for step in (1, 2, 3):
            await yard.save(step, files(step))
        async with yard.series(Keep(last=1)) as series:
            await series.wait()
        assert await steps(yard) == [3, 2, 1]

    asyncio.run(scenario())


def test_while_no_store_answers_the_older_of_this_machine_go_and_the_newest_stays(yard: Yard) -> None:
    async def scenario() -> None:
        for store in yard.scene.stores.values():
            store.down = True
        async with yard.series(Keep(last=2)) as series:
            for step in (1, 2, 3, 4):
                await series.save(Saving(step, yard.state(files(step))))
                with pytest.raises(MillraceError):
                    await series.wait(step)
            assert await steps(yard) == [4, 3]
            await yard.local.spoil(key := checkpoint_object("run-7", next(iter(await own(yard, 4)))), "flip")
            await series.save(Saving(5, yard.state(files(5))))
            with pytest.raises(MillraceError):
                await series.wait(5)
            assert await steps(yard) == [5, 4]
            assert key in await yard.local.keys()

    asyncio.run(scenario())


async def own(yard: Yard, step: int) -> list[Digest]:
    """The objects of a step's own file."""
    found = await survey(yard.depot(), among={LOCAL})
    one = next(k for k in found.known if k.step == step)
    manifest = await read_manifest(yard.depot(), one)
    return [Digest(part.digest) for file in manifest.files if file.path == "own" for part in file.parts]


def test_nothing_older_goes_while_the_newest_here_is_all_there_is_and_damaged(yard: Yard) -> None:
    async def scenario() -> None:
        for store in yard.scene.stores.values():
            store.down = True
        for step in (1, 2):
            await yard.save(step, files(step))
        await yard.local.spoil(checkpoint_object("run-7", (await own(yard, 2))[0]), "flip")
        await retain(yard.depot(), Keep(last=1))
        assert await steps(yard) == [2, 1]
        await yard.save(3, files(3))
        await retain(yard.depot(), Keep(last=1))
        assert await steps(yard) == [3]

    asyncio.run(scenario())


def test_a_store_that_was_away_is_tidied_when_it_is_back(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=1)) as series:
            first = await yard.replicated(series, 1, files(1))
            away = next(n for n in await yard.holders(first) if n != LOCAL)
            yard.scene.stores[away].down = True
            second = await yard.replicated(series, 2, files(2))
            assert series.retained is not None
            assert set(series.retained.failed) == {away}
            yard.scene.stores[away].down = False
            assert away in await yard.holders(first)
            await yard.replicated(series, 3, files(3))
        assert await steps(yard) == [3]
        assert not await yard.holders(first)
        assert not await yard.holders(second)

    asyncio.run(scenario())


def test_objects_stay_while_a_manifest_that_may_name_them_cannot_be_read(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=2)) as series:
            for step in (1, 2):
                await yard.replicated(series, step, files(step))
            two = next(m for m in series._manifests.values() if m.step == 2)
        yard.local = type(yard.local)("local", yard.scene.clock)
        for name in await yard.holders(two):
            yard.scene.stores[name].down = True
        stray = "checkpoints/run-7/objects/00/" + "0" * 64
        free = next(s for s in yard.scene.stores.values() if not s.down)
        await free.put(stray, [b"x"])
        yard.scene.clock.ms += 2 * GRACE_MS
        done = await retain(yard.depot(), Keep(last=2))
        assert done.postponed == "the manifest of step 2 can't be read"
        assert stray in await free.keys()
        for store in yard.scene.stores.values():
            store.down = False
        done = await retain(yard.depot(), Keep(last=2))
        assert not done.postponed
        assert stray not in await free.keys()
        assert await steps(yard) == [2, 1]

    asyncio.run(scenario())


def test_what_nobody_names_yet_has_its_time(yard: Yard) -> None:
    """Another machine with records of its own may be about to name it."""

    async def scenario() -> None:
        stray = "checkpoints/run-7/objects/00/" + "0" * 64
        await yard.scene.stores["aws"].put(stray, [b"x"])
        async with yard.series(Keep(last=1)) as series:
            yard.scene.clock.ms += GRACE_MS - 5000
            await yard.replicated(series, 1, files(1))
            assert stray in await yard.scene.stores["aws"].keys()
            yard.scene.clock.ms += GRACE_MS
            await yard.replicated(series, 2, files(2))
        assert stray not in await yard.scene.stores["aws"].keys()

    asyncio.run(scenario())


def test_one_that_somebody_replicates_is_left_to_them(yard: Yard) -> None:
    async def scenario() -> None:
        await yard.save(1, files(1))
        async with gripped(yard.depot("here:2:2"), 1):
            async with yard.series(Keep(last=1)) as series:
                await yard.replicated(series, 2, files(2))
            assert await steps(yard) == [2, 1]
        async with yard.series(Keep(last=1)) as series:
            await yard.replicated(series, 3, files(3))
        assert await steps(yard) == [3]

    asyncio.run(scenario())


class Listed:
    """Calls something once the wrapped store has listed the objects of checkpoints."""

    def __init__(self, store: TestStore, after: Callable[[], Awaitable[object]]) -> None:
        self._store = store
        self._after = after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        pages = [page async for page in self._store.list(prefix)]
        if prefix.endswith("objects/"):
            await self._after()
        for page in pages:
            yield page


@pytest.mark.parametrize("far", [True, False])
def test_what_a_save_finds_there_is_not_swept_away_under_it(yard: Yard, far: bool) -> None:
    """A save wants an object again that nothing named when the retention looked, just before it is deleted."""

    async def scenario() -> None:
        async with yard.series(Keep(last=1)) as series:
            first = await yard.replicated(series, 1, files(1))
        holders = [n for n in await yard.holders(first) if n != LOCAL]
        stale = {checkpoint_object("run-7", d): d for d in await own(yard, 1)}
        saved: list[CheckpointManifest] = []

        async def save_again() -> None:
            if not saved:
                saved.append(await yard.save(3, files(1), yard.depot("here:2:2")))

        await yard.save(2, files(2))
        depot = yard.depot()
        async with yard.series(Keep(last=1), depot) as series:
            await series.wait()
        watched: Any = Listed(yard.scene.stores[holders[0]] if far else yard.local, save_again)
        if far:
            depot = replace(depot, stores={**yard.scene.stores, holders[0]: watched})
        else:
            depot = replace(depot, local=watched)
        await retain(depot, Keep(last=1))
        assert saved
        swept = yard.scene.stores[holders[0]] if far else yard.local
        assert set(stale) <= await swept.keys()
        assert LOCAL in await yard.holders(saved[0])

    asyncio.run(scenario())


def test_a_rotten_manifest_goes_in_the_end(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series(Keep(last=3)) as series:
            first = await yard.replicated(series, 1, files(1))
            for store in (yard.local, *yard.scene.stores.values()):
                if key_of(first) in await store.keys():
                    await store.spoil(key_of(first), "flip")
            series._manifests.clear()  # as a new process
            await yard.replicated(series, 2, files(2))
        assert await steps(yard) == [2]

    asyncio.run(scenario())


def test_a_holder_of_the_lease_is_waited_for_and_then_left_alone(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            await yard.replicated(series, 1, files(1))
            async with gripped(yard.depot("here:2:2")):
                with pytest.raises(LeaseHeld):
                    async with gripped(yard.depot("here:3:3"), patience_s=0.1):
                        pass
            await series.retain()

    asyncio.run(scenario())


# --- whatever comes -----------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Saves, losses, pins and retention in any order: the newest that was replicated, and every pin, stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    @initialize(last=st.integers(1, 3))
    def begin(self, last: int) -> None:
        scene_type, folder = BEGIN
        self.yard = make_yard(scene_type(), folder)
        self.yard._numbers = COUNT
        self.keep = Keep(last=last)
        self.pinned: set[int] = set()
        self.replicated: dict[int, CheckpointManifest] = {}

    @rule(up=st.sets(st.sampled_from(["aws", "gcp", "az", "ibm"]), min_size=1), same=st.booleans())
    def save(self, up: set[str], same: bool) -> None:
        self.step += 1
        content = {"own": b"%d" % (0 if same else self.step) * 700, "s": b"s"}
        for name, store in self.yard.scene.stores.items():
            store.down = name not in up

        async def work() -> None:
            async with self.yard.series(self.keep) as series:
                self.yard.scene.clock.ms += GRACE_MS
                manifest = await series.save(Saving(self.step, self.yard.state(content)))
                try:
                    (done,) = await series.wait(self.step)
                except MillraceError:
                    return
                if not done.short:
                    self.replicated[self.step] = manifest

        asyncio.run(work())

    @precondition(lambda self: self.replicated)
    @rule(which=st.integers(0, 5))
    def pin(self, which: int) -> None:
        there = sorted(asyncio.run(self._there()) & set(self.replicated))
        if there:
            step = there[which % len(there)]
            asyncio.run(pin(self.yard.depot(), step))
            self.pinned.add(step)

    @precondition(lambda self: self.pinned)
    @rule()
    def unpin(self) -> None:
        asyncio.run(pin(self.yard.depot(), self.pinned.pop(), pinned=False))

    @rule()
    def retain(self) -> None:
        self.yard.scene.clock.ms += GRACE_MS
        asyncio.run(retain(self.yard.depot(), self.keep))

    @rule()
    def lose_here(self) -> None:
        self.yard.local = type(self.yard.local)("local", self.yard.scene.clock)

    @rule()
    def lose_records(self) -> None:
        self.yard.forget()
        self.pinned.clear()

    async def _there(self) -> set[int]:
        return set(await steps(self.yard))

    @invariant()
    def what_must_be_whole_is(self) -> None:
        if not getattr(self, "replicated", None):
            return

        async def look() -> None:
            for store in self.yard.scene.stores.values():
                store.down = False
            for step in {max(self.replicated), *self.pinned}:
                assert len([n for n in await self.yard.holders(self.replicated[step]) if n != LOCAL]) >= 2, step
            found = await self.yard.newest()
            assert found is not None
            assert found.manifest.step >= max(self.replicated)

        asyncio.run(look())


BEGIN: tuple[type[Scene], Path]
COUNT: itertools.count[int]


def test_a_life_of_checkpoints(scenes: None, new_scene: type[Scene], tmp_path: Path) -> None:
    global BEGIN, COUNT
    BEGIN, COUNT = (new_scene, tmp_path), itertools.count()
    run_state_machine_as_test(Life, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))
