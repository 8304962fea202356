"""Checkpoints: whole or not there, whatever fails; saved here at once, and where policy wants them in the end."""

from __future__ import annotations

import asyncio
import importlib
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from millrace.catalog.checkpoint_depot import LOCAL, gripped
from millrace.catalog.checkpoint_manifest import encode_manifest, identity, key_of, parts_of
from millrace.catalog.checkpoint_restore import kept_folder, restore
from millrace.catalog.checkpoint_retention import Keep
from millrace.catalog.checkpoint_save import Saving
from millrace.catalog.checkpoint_whole import at_step
from millrace.catalog.checkpoints import check_policy, list_checkpoints, pin, verify_checkpoints
from millrace.catalog.gc import collect
from millrace.core.errors import (
    Corrupt,
    LeaseHeld,
    NoSpace,
    PolicyRefused,
    SourceChanged,
    TimedOut,
    Unavailable,
    UsageError,
)
from millrace.core.keys import checkpoint_lease, checkpoint_object
from millrace.core.ports import Bytes, ObjectInfo
from millrace.core.spec import Placement
from millrace.stores.layers.fault import Fault, FaultPlan, FaultRates

if TYPE_CHECKING:
    from tests.catalog.checkpoint_scene import Yard
    from tests.catalog.conftest import Scene, TestStore

ONE = {"model.bin": b"1" * 2500, "optim/a.bin": b"a" * 900, "optim/b.bin": b"", "same.txt": b"same"}
TWO = {**ONE, "model.bin": b"2" * 2500}


@pytest.fixture
def yard(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Yard]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield importlib.import_module("checkpoint_scene").Yard(scene, tmp_path)
    sys.modules.pop("checkpoint_scene", None)


def tree_of(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- saving and finding -------------------------------------------------------------------------------------------


def test_what_was_saved_is_found_and_comes_back_as_files(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE, loader_state={"epoch": 1, "rows": [1, None]})
        assert [len(f.parts) for f in manifest.files] == [3, 1, 0, 1]
        assert len(await yard.holders(manifest)) == 3  # here and in two clouds
        found = await yard.newest()
        assert found is not None
        assert found.manifest == manifest
        assert found.manifest.loader_state == {"epoch": 1, "rows": [1, None]}
        assert found.notes == ()
        await restore(yard.depot(), manifest, yard.folder / "out" / "deep")
        assert tree_of(yard.folder / "out" / "deep") == ONE

    asyncio.run(scenario())


def test_it_is_found_after_the_machine_and_the_records_are_lost(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            await yard.replicated(series, 5, ONE)
            manifest = await yard.replicated(series, 6, TWO)
        await yard.lose_machine()
        found = await yard.newest()
        assert found is not None
        assert found.manifest == manifest
        # Having been looked for, it lies here too: restoring reads nothing from afar.
        for store in yard.scene.stores.values():
            store.down = True
        await restore(yard.depot(), manifest, yard.folder / "out")
        assert tree_of(yard.folder / "out") == TWO
        lines, failed = await list_checkpoints(yard.depot())
        assert [(line.step, line.state, line.local) for line in lines] == [(6, "unrecorded", True)]
        assert len(failed) == 4

    asyncio.run(scenario())


def test_a_file_of_two_checkpoints_is_kept_once(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            await yard.replicated(series, 1, {"a": b"x" * 3000, "copy": b"x" * 3000, "b": b"1"})
            stores = [yard.local, *yard.scene.stores.values()]
            before = [len(store.puts) for store in stores]
            await yard.replicated(series, 2, {"a": b"x" * 3000, "copy": b"x" * 3000, "b": b"2"})
            # One part (three of a thousand equal bytes are one too) and one manifest more, in three stores.
            assert sorted(len(s.puts) - n for s, n in zip(stores, before, strict=True)) == [0, 0, 2, 2, 2]
        assert all(s.puts == sorted(set(s.puts), key=s.puts.index) for s in stores)

    asyncio.run(scenario())


def test_nothing_is_found_where_nothing_was_saved(yard: Yard) -> None:
    async def scenario() -> None:
        assert await yard.newest() is None
        yard.scene.stores["aws"].down = True
        # One replica at least would be where it can be seen.
        assert await yard.newest() is None
        yard.scene.stores["gcp"].down = True
        with pytest.raises(Unavailable, match=r"can't be told .*aws .*gcp"):
            await yard.newest()
        with pytest.raises(UsageError, match="run-7 has no checkpoint of step 3, nor any other; aws, gcp could not"):
            await at_step(yard.depot(), 3)

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["flip", "delete", "truncate", "grow"])
def test_what_one_store_lost_comes_from_another_file_by_file(yard: Yard, how: str) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE)
        holders = [n for n in await yard.holders(manifest) if n != LOCAL]
        await yard.lose_machine()
        keys = [checkpoint_object("run-7", d) for d in parts_of(manifest)]
        for i, key in enumerate([*keys, key_of(manifest)]):
            await yard.scene.stores[holders[i % 2]].spoil(key, how)
        found = await yard.newest()
        assert found is not None
        await restore(yard.depot(), found.manifest, yard.folder / "out")
        assert tree_of(yard.folder / "out") == ONE

    asyncio.run(scenario())


def test_one_that_is_whole_nowhere_gives_way_to_an_older_one_and_says_so(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            old = await yard.replicated(series, 5, ONE)
            new = await yard.replicated(series, 6, TWO)
        await yard.lose_machine()
        key = checkpoint_object("run-7", next(iter(parts_of(new))))
        for store in yard.scene.stores.values():
            if key in await store.keys():
                await store.spoil(key, "flip")
        found = await yard.newest()
        assert found is not None
        assert found.manifest == old
        assert "step 6 was passed over: no store has" in found.notes[0]
        with pytest.raises(Corrupt, match="its bytes are not those its digest names"):
            await at_step(yard.depot(), 6)
        for store in yard.scene.stores.values():
            for each in await store.keys("checkpoints/run-7/objects"):
                await store.spoil(each, "flip")
        await yard.lose_machine()
        with pytest.raises(Corrupt, match=r"no checkpoint of run-7 is whole .*step 6 .*step 5 "):
            await yard.newest()

    asyncio.run(scenario())


def test_a_store_that_is_down_hides_what_is_newer_and_that_is_said(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            await yard.replicated(series, 5, ONE)
            yard.policy = Placement(replicas=1, min_clouds=1)
        async with yard.series() as series:
            new = await yard.replicated(series, 6, TWO)
        (only,) = [n for n in await yard.holders(new) if n != LOCAL]
        yard.local.down = yard.scene.stores[only].down = True
        found = await yard.newest()
        assert found is not None
        assert found.manifest.step == 5
        assert any(only in note for note in found.notes)
        assert any("step 6 was passed over: it is only recorded" in note for note in found.notes)

    asyncio.run(scenario())


def test_a_full_local_store_does_not_keep_a_checkpoint_from_being_found(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE)
        await yard.lose_machine()
        full = Fault(yard.local, name="local", plan=FaultPlan(no_space_after_bytes=1500), rng=random.Random(1))
        depot = yard.depot(local=full)
        found = await yard.newest(depot)
        assert found is not None
        assert found.manifest == manifest
        assert await yard.local.keys() == set()
        await restore(depot, manifest, yard.folder / "out")
        assert tree_of(yard.folder / "out") == ONE

    asyncio.run(scenario())


# --- half written -------------------------------------------------------------------------------------------------


def test_a_full_disk_while_staging_leaves_nothing_of_it_and_all_of_the_others(yard: Yard) -> None:
    async def scenario() -> None:
        await yard.save(5, ONE)
        before = await yard.local.keys()
        full = Fault(yard.local, name="local", plan=FaultPlan(no_space_after_bytes=1500), rng=random.Random(1))
        with pytest.raises(
            NoSpace, match=r"step 6 of run-7 was not saved, and what was there before is as it was: .*no space"
        ):
            await yard.save(6, {"a": random.Random(2).randbytes(9000)}, yard.depot(local=full))
        assert await yard.local.keys() == before
        found = await yard.newest()
        assert found is not None
        assert found.manifest.step == 5

    asyncio.run(scenario())


def test_what_a_killed_save_left_is_never_seen_and_goes(yard: Yard) -> None:
    async def scenario() -> None:
        left = checkpoint_object("run-7", identity(await yard.save(5, ONE)))
        for store in (yard.local, *yard.scene.stores.values()):
            await store.put(left, [b"half of it"])
        await yard.local.put("checkpoints/run-7/000000000009-0123abcd.json", [b'{"sha256":"'])  # no disk does this
        found = await yard.newest()
        assert found is not None
        assert found.manifest.step == 5
        async with yard.series() as series:
            yard.scene.clock.ms += 3_600_001
            await yard.replicated(series, 10, TWO)
        assert not any(left in keys for keys in (await yard.everything()).values())
        assert len(await yard.local.keys("checkpoints/run-7/0")) == 1

    asyncio.run(scenario())


class Watched:
    """Calls something before the n-th put of the wrapped store."""

    def __init__(self, store: TestStore, number: int, before: Any) -> None:
        self._store = store
        self._left = number
        self._before = before

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: Literal["overwrite", "create"] = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        self._left -= 1
        if not self._left:
            await self._before()
        return await self._store.put(key, data, mode=mode, if_version=if_version)


def test_a_save_that_is_cancelled_anywhere_is_there_whole_or_not_at_all(yard: Yard) -> None:
    async def scenario() -> None:
        for number in range(1, 9):
            step = 10 + number
            files = {"a": b"%d" % number * 3500, "b": b"%d" % -number}

            reached = asyncio.Event()

            async def wait(reached: asyncio.Event = reached) -> None:
                reached.set()
                await asyncio.Event().wait()

            watched: Any = Watched(yard.local, number, wait)
            task = asyncio.create_task(yard.save(step, files, yard.depot(local=watched)))
            there = asyncio.create_task(reached.wait())
            await asyncio.wait((task, there), return_when=asyncio.FIRST_COMPLETED)
            there.cancel()
            if reached.is_set():
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            found = await yard.newest()
            if reached.is_set():
                assert found is None or found.manifest.step < step
            else:
                assert found is not None
                done = await task
                assert found.manifest == done
        keys = await yard.local.keys()
        named = {checkpoint_object("run-7", d) for d in parts_of(done)} | {key_of(done)}
        assert named <= keys

    asyncio.run(scenario())


def test_a_file_that_is_written_to_meanwhile_is_refused(yard: Yard) -> None:
    async def scenario() -> None:
        async def grow() -> None:
            for file in yard.folder.rglob("model.bin"):
                file.write_bytes(b"other bytes")

        watched: Any = Watched(yard.local, 2, grow)
        with pytest.raises(SourceChanged, match=r"model\.bin changed while it was being saved"):
            await yard.save(5, ONE, yard.depot(local=watched))
        assert await yard.local.keys() == set()

    asyncio.run(scenario())


# --- one step twice -----------------------------------------------------------------------------------------------


def test_the_same_again_is_fine_and_something_else_is_refused(yard: Yard) -> None:
    async def scenario() -> None:
        first = await yard.save(5, ONE)
        assert await yard.save(5, ONE) == first
        others: list[tuple[dict[str, bytes], dict[str, Any]]] = [(TWO, {}), (ONE, {"loader_state": {"at": 1}})]
        for files, more in others:
            with pytest.raises(UsageError, match=r"step 5 of run-7 was saved before .*overwrite=True"):
                await yard.save(5, files, **more)
        assert len(await yard.local.keys("checkpoints/run-7/objects")) == 4
        second = await yard.save(5, TWO, overwrite=True)
        found = await yard.newest()
        assert found is not None
        assert found.manifest == second
        yard.forget()
        found = await yard.newest()
        assert found is not None
        assert found.manifest == second

    asyncio.run(scenario())


def test_what_was_written_over_goes_once_the_new_one_is_replicated(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            first = await yard.replicated(series, 5, ONE)
            await pin(yard.depot(), 5)
            second = await yard.replicated(series, 5, TWO, overwrite=True)
        keys = await yard.everything()
        assert not any(key_of(first) in found for found in keys.values())
        assert sum(key_of(second) in found for found in keys.values()) == 3
        (line,) = (await list_checkpoints(yard.depot()))[0]
        assert (line.digest, line.pinned, line.state) == (identity(second), True, "replicated")

    asyncio.run(scenario())


def test_one_that_is_damaged_beyond_help_is_in_nobodys_way(yard: Yard) -> None:
    async def scenario() -> None:
        first = await yard.save(5, ONE)
        await yard.local.spoil(checkpoint_object("run-7", next(iter(parts_of(first)))), "flip")
        yard.scene.stores["ibm"].down = True
        with pytest.raises(UsageError, match="overwrite=True"):  # who knows what lies there
            await yard.save(5, TWO)
        yard.scene.stores["ibm"].down = False
        second = await yard.save(5, TWO)
        found = await yard.newest()
        assert found is not None
        assert found.manifest == second

    asyncio.run(scenario())


def test_saving_the_same_again_mends_what_rotted_here(yard: Yard) -> None:
    async def scenario() -> None:
        first = await yard.save(5, ONE)
        for key in await yard.local.keys():
            await yard.local.spoil(key, "flip")
        again = await yard.save(5, ONE)
        assert again == first
        found = await yard.newest()
        assert found is not None
        assert found.manifest == first

    asyncio.run(scenario())


# --- replication --------------------------------------------------------------------------------------------------


def test_saving_goes_on_while_no_store_answers_and_wait_names_them(yard: Yard) -> None:
    async def scenario() -> None:
        for store in yard.scene.stores.values():
            store.down = True
        async with yard.series() as series:
            manifest = await yard.save(5, ONE)
            await series.save(Saving(5, yard.state(ONE)))
            with pytest.raises(Unavailable) as caught:
                await series.wait()
            assert caught.value.store == "aws,az,gcp,ibm"
            assert all(f"{name}: Unavailable: " in str(caught.value) for name in yard.scene.stores)
            assert "0 of 2 replicas" in str(caught.value)
            with pytest.raises(TimedOut, match=r"after 0.05 s step 5 of run-7 is not replicated: .*aws"):
                await series.wait(5, timeout_s=0.05)
            for store in yard.scene.stores.values():
                store.down = False
            (done,) = await series.wait(5)
        assert len(done.stores) == 2
        assert not done.short
        assert sorted([LOCAL, *done.stores]) == sorted(await yard.holders(manifest))

    asyncio.run(scenario())


def test_where_a_store_fails_another_takes_its_place(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            usual = [n for n in await yard.holders(await yard.replicated(series, 1, ONE)) if n != LOCAL]
            yard.scene.stores[usual[0]].read_only = True
            manifest = await yard.save(2, TWO)
            await series.save(Saving(2, yard.state(TWO)))
            (done,) = await series.wait(2)
        assert set(done.failed) == {usual[0]}
        assert "ReadOnly" in done.failed[usual[0]]
        assert len(done.stores) == 2
        assert usual[1] in done.stores
        assert set(await yard.holders(manifest)) == {LOCAL, *done.stores}

    asyncio.run(scenario())


def test_a_policy_that_cannot_be_met_now_is_met_as_far_as_it_can(yard: Yard) -> None:
    async def scenario() -> None:
        for name in ("aws", "gcp", "az"):
            yard.scene.stores[name].down = True
        async with yard.series() as series:
            await series.save(Saving(5, yard.state(ONE)))
            with pytest.raises(Unavailable, match="1 of 2 replicas are made"):
                await series.wait()
        await yard.lose_machine()
        for store in yard.scene.stores.values():
            store.down = False
        found = await yard.newest()
        assert found is not None
        assert found.stores == ("ibm",)

    asyncio.run(scenario())


def test_what_a_killed_process_did_not_replicate_the_next_one_does(yard: Yard) -> None:
    async def scenario() -> None:
        manifests = [await yard.save(step, {"a": b"%d" % step}) for step in (5, 6)]
        depot = yard.depot("here:2:2", alive=lambda who: who != "here:1:1")
        # The first process was killed while it replicated: its lease stands for a while.
        await yard.scene.coord.acquire(checkpoint_lease("run-7", 6), "here:1:1 x", 60_000, now_ms=yard.scene.clock.ms)
        async with yard.series(depot=depot) as series:
            done = await series.wait()
        assert [d.step for d in done] == [5, 6]
        for manifest in manifests:
            assert len(await yard.holders(manifest)) == 3
        async with yard.series(depot=depot) as series:
            assert await series.wait() == ()

    asyncio.run(scenario())


def test_two_processes_do_not_replicate_one_checkpoint_twice(yard: Yard) -> None:
    async def scenario() -> None:
        await yard.save(5, ONE)
        async with yard.series(depot=yard.depot("here:1:1")) as one, yard.series(depot=yard.depot("here:2:2")) as two:
            await one.wait(timeout_s=60)
            await two.wait(timeout_s=60)
        for store in yard.scene.stores.values():
            assert len(store.puts) == len(set(store.puts))

    asyncio.run(scenario())


def test_policy_is_a_wall(yard: Yard) -> None:
    async def scenario() -> None:
        yard.policy = Placement(replicas=3, min_clouds=2, deny=("eu",))
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE)
        assert await yard.holders(manifest) == [LOCAL, "aws", "gcp", "ibm"]
        yard.scene.stores["az"].reads = 0
        yard.scene.stores["ibm"].down = True
        async with yard.series() as series:
            with pytest.raises(Unavailable, match=r"placement.replicas is 3 .*az lies in eu"):
                await yard.replicated(series, 6, TWO)
        assert yard.scene.stores["az"].reads == 0
        with pytest.raises(PolicyRefused, match=r"placement\.replicas is 5"):
            check_policy(yard.scene.sites, Placement(replicas=5))

    asyncio.run(scenario())


# --- several at once ----------------------------------------------------------------------------------------------


def test_two_savers_of_one_step_get_one_of_them(yard: Yard) -> None:
    async def scenario() -> None:
        outcomes = await asyncio.gather(
            yard.save(5, ONE, yard.depot("here:1:1")),
            yard.save(5, TWO, yard.depot("here:2:2")),
            return_exceptions=True,
        )
        refused = [o for o in outcomes if isinstance(o, BaseException)]
        assert len(refused) == 1
        assert isinstance(refused[0], UsageError)
        found = await yard.newest()
        assert found is not None
        assert found.manifest in outcomes

    asyncio.run(scenario())


def test_a_dead_saver_is_not_waited_for_and_a_living_one_is(yard: Yard) -> None:
    async def scenario() -> None:
        lease = checkpoint_lease("run-7")
        await yard.scene.coord.acquire(lease, "here:1:1 x", 60_000, now_ms=yard.scene.clock.ms)
        with pytest.raises(LeaseHeld, match="here:1:1 x is at work on the checkpoints of run-7"):
            async with gripped(yard.depot("here:2:2")):
                pass
        await yard.save(5, ONE, yard.depot("here:2:2", alive=lambda who: who != "here:1:1"))
        assert await yard.newest() is not None

    asyncio.run(scenario())


def test_a_saver_that_slept_past_its_lease_looks_at_everything_again(yard: Yard) -> None:
    async def scenario() -> None:
        async def replaced() -> None:
            """Another process takes over, and what was put so far is gone."""
            now_ms = yard.scene.clock.ms
            other = await yard.scene.coord.acquire(checkpoint_lease("run-7"), "other", 1000, now_ms=now_ms, steal=True)
            for key in await yard.local.keys():
                await yard.local.spoil(key, "delete")
            await yard.scene.coord.release(other)

        watched: Any = Watched(yard.local, 5, replaced)
        manifest = await yard.save(5, ONE, yard.depot(local=watched))
        assert LOCAL in await yard.holders(manifest)

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(8))
def test_under_faults_of_every_kind_what_is_found_is_true(yard: Yard, seed: int) -> None:
    """Stores that fail, forget that they did what they did, and lie: a found checkpoint is what was saved."""

    async def scenario() -> None:
        dice = random.Random(seed)
        rates = FaultRates(unavailable=0.15, lost_response=0.1, corrupt=0.1, truncate=0.05)
        clean = dict(yard.scene.stores)
        wild: Any = {n: Fault(s, name=n, plan=FaultPlan(rates), rng=dice) for n, s in clean.items()}
        saved: dict[int, dict[str, bytes]] = {}
        yard.scene.stores = wild
        async with yard.series(Keep(last=2)) as series:
            for step in range(1, 6):
                saved[step] = {"a": dice.randbytes(2500), "b": b"same"}
                await series.save(Saving(step, yard.state(saved[step])))
                for _ in range(3):
                    await asyncio.gather(series.wait(), return_exceptions=True)
        yard.scene.stores = clean
        found = await yard.newest()
        assert found is not None
        assert found.manifest.step == 5
        await restore(yard.depot(), found.manifest, yard.folder / "out")
        assert tree_of(yard.folder / "out") == saved[5]
        records = {line.step: line for line in (await list_checkpoints(yard.depot()))[0]}
        verdicts, _ = await verify_checkpoints(yard.depot())
        for (step, _), verdict in verdicts.items():
            if records[step].state == "replicated":
                assert sum(not why for name, why in verdict.items() if name != LOCAL) >= 2, (step, verdict)

    asyncio.run(scenario())


# --- and the rest -------------------------------------------------------------------------------------------------


def test_verifying_says_what_is_wrong_where(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE)
        one, two = [n for n in await yard.holders(manifest) if n != LOCAL]
        keys = sorted(checkpoint_object("run-7", d) for d in parts_of(manifest))
        await yard.scene.stores[one].spoil(keys[0], "flip")
        await yard.scene.stores[one].spoil(keys[1], "delete")
        await yard.scene.stores[two].spoil(key_of(manifest), "delete")
        verdicts, failed = await verify_checkpoints(yard.depot())
        (verdict,) = verdicts.values()
        assert verdict[LOCAL] == ""
        assert verdict[one] == f"{keys[0]} is missing or rotten and 1 more"
        assert verdict[two] == "it was replicated there and is not listed any more"
        assert failed == {}

    asyncio.run(scenario())


def test_collecting_garbage_leaves_checkpoints_alone(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            await yard.replicated(series, 5, ONE)
        before = await yard.everything()
        scene = yard.scene
        for _ in range(2):
            scene.clock.ms += 7_200_000
            await collect(scene.coord, scene.stores, scene.sites, scene.work, who="t", clock=scene.clock, grace_ms=0)
        assert await yard.everything() == before
        assert await yard.newest() is not None

    asyncio.run(scenario())


def test_a_kept_folder_is_made_anew_when_it_was_touched(yard: Yard) -> None:
    async def scenario() -> None:
        manifest = await yard.save(5, ONE)
        base = yard.folder / "restored"
        paths = await asyncio.gather(*[kept_folder(yard.depot(), manifest, base) for _ in range(3)])
        assert len(set(paths)) == 1
        path = paths[0]
        inode = path.stat().st_ino
        assert await kept_folder(yard.depot(), manifest, base) == path
        assert path.stat().st_ino == inode
        for change in (
            lambda: (path / "model.bin").write_bytes(b"1" * 2499 + b"x"),
            lambda: (path / "more").write_bytes(b""),
            lambda: (path / "same.txt").unlink(),
            lambda: (base / f".{path.name}.part").mkdir(),
        ):
            change()
            assert tree_of(await kept_folder(yard.depot(), manifest, base)) == ONE

    asyncio.run(scenario())


def test_restoring_writes_over_nothing_and_leaves_nothing_half_done(yard: Yard) -> None:
    async def scenario() -> None:
        manifest = await yard.save(5, ONE)
        out = yard.folder / "out"
        out.mkdir()
        await restore(yard.depot(), manifest, out)  # an empty folder is as good as none
        with pytest.raises(UsageError, match="out is there already and not an empty folder"):
            await restore(yard.depot(), manifest, out)
        await yard.local.spoil(checkpoint_object("run-7", next(iter(parts_of(manifest)))), "flip")
        with pytest.raises(Corrupt, match="no store has checkpoints/run-7/objects/"):
            await restore(yard.depot(), manifest, yard.folder / "two")
        assert {p.name for p in yard.folder.iterdir()} == {"out", "state-0"}

    asyncio.run(scenario())


def test_a_manifest_is_the_same_bytes_everywhere(yard: Yard) -> None:
    async def scenario() -> None:
        async with yard.series() as series:
            manifest = await yard.replicated(series, 5, ONE)
            yard.local.down = False
            for key in await yard.local.keys("checkpoints/run-7/0"):
                await yard.local.spoil(key, "delete")
            await yard.replicated(series, 5, ONE)
        for name in await yard.holders(manifest):
            store = yard.local if name == LOCAL else yard.scene.stores[name]
            assert bytes(await store.get(key_of(manifest))) == encode_manifest(manifest)

    asyncio.run(scenario())
