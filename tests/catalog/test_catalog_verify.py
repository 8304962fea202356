"""verify and repair: each way a replica can break, and each way it can be mended."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.catalog.findings import Fault, VerifyProgress
from millrace.catalog.remove import remove
from millrace.core.errors import UsageError
from millrace.core.keys import manifest_key, replica_page, segment_key
from millrace.core.model import Digest, StoreSite
from millrace.core.pages import read_page
from millrace.core.ports import Write
from millrace.core.spec import Placement

if TYPE_CHECKING:
    from tests.catalog.conftest import Made, Scene

HOW = {
    "flip": (Fault.ROTTEN, "the bytes differ"),
    "delete": (Fault.MISSING, "not there"),
    "truncate": (Fault.ROTTEN, "truncated to"),
    "grow": (Fault.ROTTEN, "grown to"),
}


def test_a_whole_version_is_whole(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2, 3])
        seen: list[VerifyProgress] = []
        report = await scene.verify(made.record, progress=seen.append)
        objects = len(made.shards) + 3
        assert (report.verdict, report.findings) == ("whole", ())
        assert (report.objects, report.replicas, report.whole) == (objects, 3 * objects, 3 * objects)
        last = seen[-1]
        assert last.objects_done == last.objects_total == 3 * objects
        assert last.bytes_done == last.bytes_total == report.bytes
        assert await scene.coord.list("readers/") == []

    asyncio.run(scenario())


@pytest.mark.parametrize("how", list(HOW))
@pytest.mark.parametrize("what", ["shard", "segment", "blocks", "root"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_broken_replica_is_named_and_restored_in_place(scene: Scene, how: str, what: str, which: int) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        opened = await scene.open(made.record)
        ref = opened.root.segments[0]
        key = {
            "shard": made.shards[1],
            "segment": segment_key(ref.digest),
            "blocks": segment_key(ref.blocks),
            "root": manifest_key(opened.digest),
        }[what]
        holders = [n for n, s in scene.stores.items() if key in await s.keys()]
        name = holders[which]
        await scene.stores[name].spoil(key, how)
        report = await scene.verify(made.record)
        fault, words = HOW[how]
        assert [(f.dataset, f.object, f.store, f.verdict) for f in report.findings] == [("set@1", key, name, fault)]
        assert words in report.findings[0].detail
        assert report.verdict == "damaged"
        assert (report.missing + report.rotten, report.under_replicated) == (1, 1)
        mended = await scene.verify(made.record, repair=True)
        assert (mended.verdict, mended.restored) == ("whole", 1)
        assert mended.findings[0].repair == "restored in place"
        assert (await scene.verify(made.record)).findings == ()

    asyncio.run(scenario())


def test_the_sentence_says_how_much_is_left(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        key = made.shards[0]
        name = scene.holders(made, key)[0]
        size = (await scene.stores[name].head(key)).size_bytes
        await scene.stores[name].spoil(key, "truncate")
        report = await scene.verify(made.record)
        assert report.findings[0].detail == f"truncated to {size - 7} of {size} bytes"

    asyncio.run(scenario())


def test_rotten_copies_are_never_read_from_and_whole_ones_never_written_over(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        key = made.shards[0]
        first, second, third = scene.holders(made, key)
        await scene.stores[first].spoil(key, "flip")
        await scene.stores[second].spoil(key, "flip")
        for store in scene.stores.values():
            store.puts.clear()
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "whole"
        assert scene.stores[first].puts == [key] == scene.stores[second].puts
        assert scene.stores[third].puts == []
        assert (await scene.verify(made.record)).verdict == "whole"

    asyncio.run(scenario())


def test_a_cloud_whose_objects_are_all_gone_is_filled_again(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make(range(6))
        gone = await scene.stores["gcp"].keys()
        for key in gone:
            await scene.stores["gcp"].spoil(key, "delete")
        report = await scene.verify(made.record, repair=True)
        assert (report.missing, report.restored, report.verdict) == (len(gone), len(gone), "whole")
        assert await scene.stores["gcp"].keys() == gone
        assert (await scene.verify(made.record)).findings == ()

    asyncio.run(scenario())


def test_what_a_dead_store_held_is_placed_elsewhere(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make(range(4))
        scene.stores["gcp"].down = True
        broken = await scene.verify(made.record)
        assert {f.verdict for f in broken.findings} == {Fault.UNREADABLE}
        assert "refused the connection" in broken.findings[0].detail
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "whole"
        assert all(f.repair.startswith("placed in ") for f in report.findings)
        assert (await scene.verify(made.record)).findings == ()

    asyncio.run(scenario())


def test_a_missing_replica_goes_elsewhere_when_its_store_takes_no_writes(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        key = made.shards[0]
        name = scene.holders(made, key)[1]
        await scene.stores[name].spoil(key, "delete")
        scene.stores[name].read_only = True
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "whole"
        assert "takes no writes" in report.findings[0].repair
        page = await read_page(scene.coord, replica_page(Digest(made.record.digest), 0))
        assert page is not None
        assert name not in next(e for e in page.entries if e.key == key).stores

    asyncio.run(scenario())


def test_repair_never_places_where_policy_forbids(scene: Scene) -> None:
    async def scenario() -> None:
        policy = Placement(replicas=2, min_clouds=2, deny=("eu",))
        made = await scene.make([1, 2, 3], policy=policy)
        assert await scene.stores["az"].keys() == set()
        for name in ("gcp", "ibm"):
            scene.stores[name].down = True
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "damaged"
        assert await scene.stores["az"].keys() == set()
        short = [f for f in report.findings if f.repair]
        assert short
        assert "placement.deny forbids" in short[0].repair
        scene.stores["ibm"].down = False
        assert (await scene.verify(made.record, repair=True)).verdict == "whole"
        assert await scene.stores["az"].keys() == set()

    asyncio.run(scenario())


def test_replicas_that_lie_where_policy_forbids_are_told_and_left(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1], policy=Placement(deny=("cn",)))
        az = await scene.stores["az"].keys()
        scene.sites = tuple(replace(s, jurisdiction="cn") if s.name == "az" else s for s in scene.sites)
        report = await scene.verify(made.record)
        assert {f.object for f in report.findings if f.verdict is Fault.FORBIDDEN} == az
        assert report.forbidden == len(az) > 0
        mended = await scene.verify(made.record, repair=True)
        assert await scene.stores["az"].keys() == az
        assert {f.store for f in mended.findings if not f.repaired} == {"az"}
        us = [await scene.stores[n].keys() for n in ("aws", "gcp", "ibm")]
        assert us[0] == us[1] == us[2]

    asyncio.run(scenario())


def test_fewer_copies_than_asked_for_are_better_than_fewer_still(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        key = made.shards[0]
        holders = scene.holders(made, key)
        spare = next(n for n in scene.stores if n not in holders)
        for name in holders[1:]:
            scene.stores[name].down = True
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "damaged"
        assert key in await scene.stores[spare].keys()
        assert any("2 of 3 replicas are whole" in f.repair for f in report.findings)
        for name in holders[1:]:
            scene.stores[name].down = False
        assert (await scene.verify(made.record, repair=True)).verdict == "whole"

    asyncio.run(scenario())


def test_what_is_lost_is_named_and_the_rest_is_repaired(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        lost, other = made.shards[0], made.shards[-1]
        for name in scene.holders(made, lost):
            await scene.stores[name].spoil(lost, "delete")
        await scene.stores[scene.holders(made, other)[0]].spoil(other, "flip")
        report = await scene.verify(made.record, repair=True)
        assert report.lost == 1
        assert [(f.object, f.repaired) for f in report.findings if f.object == other] == [(other, True)]
        sentence = next(f for f in report.findings if f.verdict is Fault.LOST)
        assert (sentence.object, sentence.repaired) == (lost, False)
        assert "--fresh" in sentence.detail
        # The way out works: the same data makes the same shard.
        again = await scene.make([1, 2])
        assert again.unchanged
        assert (await scene.verify(made.record)).verdict == "whole"

    asyncio.run(scenario())


def test_a_store_that_is_down_makes_nothing_lost(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        for store in scene.stores.values():
            store.down = True
        report = await scene.verify(made.record, repair=True)
        assert {f.verdict for f in report.findings if f.object.startswith("shards/")} == {Fault.UNREADABLE}
        assert report.verdict == "damaged"
        for store in scene.stores.values():
            store.down = False
        scene.clock.ms += 60_000
        assert (await scene.verify(made.record)).verdict == "whole"

    asyncio.run(scenario())


def test_a_store_that_keeps_failing_is_not_asked_for_each_object(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make(range(30))
        scene.stores["gcp"].down = True
        scene.stores["gcp"].reads = 0
        report = await scene.verify(made.record)
        assert report.unreadable > 20
        assert scene.stores["gcp"].reads < 16
        assert any("keeps failing" in f.detail for f in report.findings)

    asyncio.run(scenario())


def test_a_lost_manifest_still_has_its_shards_checked(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        root = manifest_key(Digest(made.record.digest))
        for store in scene.stores.values():
            if root in await store.keys():
                await store.spoil(root, "delete")
        broken = made.shards[0]
        await scene.stores[scene.holders(made, broken)[0]].spoil(broken, "flip")
        report = await scene.verify(made.record, repair=True)
        assert [f.object for f in report.findings if f.verdict is Fault.LOST] == [root]
        assert next(f for f in report.findings if f.object == broken).repaired

    asyncio.run(scenario())


def test_replica_pages_that_were_lost_are_written_again(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        pages = await scene.coord.list("replicas/")
        await scene.coord.commit([Write(e.key, None) for e in pages])
        assert (await scene.verify(made.record)).lost == 0
        report = await scene.verify(made.record, repair=True)
        assert report.verdict == "whole"
        assert (await scene.verify(made.record)).whole == 3 * (len(made.shards) + 3)

    asyncio.run(scenario())


def test_a_store_that_left_the_world_is_replaced(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        del scene.stores["gcp"]
        scene.sites = tuple(s for s in scene.sites if s.name != "gcp")
        report = await scene.verify(made.record)
        assert {f.detail for f in report.findings} == {"store gcp is not in this world file"}
        assert (await scene.verify(made.record, repair=True)).verdict == "whole"
        assert (await scene.verify(made.record)).findings == ()

    asyncio.run(scenario())


def test_a_stricter_world_shows_what_is_under_replicated(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        scene.sites = tuple(StoreSite(s.name, "one", s.region, s.jurisdiction) for s in scene.sites)
        report = await scene.verify(made.record)
        assert {f.verdict for f in report.findings} == {Fault.UNDER_REPLICATED}
        assert {f.detail for f in report.findings} == {"its replicas are in 1 of 2 clouds"}
        mended = await scene.verify(made.record, repair=True)
        assert "min_clouds is 2" in mended.findings[0].repair
        assert mended.restored == 0

    asyncio.run(scenario())


def test_a_removed_version_is_refused(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        await remove(scene.coord, "set")
        with pytest.raises(UsageError, match="set@1 was removed"):
            await scene.verify(made.record)
        assert await scene.coord.list("readers/") == []

    asyncio.run(scenario())


def test_cancelling_leaves_nothing_running_and_no_claim(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make(range(5))
        started = asyncio.Event()
        task = asyncio.create_task(scene.verify(made.record, repair=True, progress=lambda _: started.set()))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1
        assert await scene.coord.list("readers/") == []
        assert (await scene.verify(made.record)).verdict == "whole"

    asyncio.run(scenario())


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_one_whole_copy_is_enough(new_scene: type[Scene], data: st.DataObject) -> None:
    """Whatever happens to the replicas: where one copy of each object stays whole, repair makes all whole."""
    made_by = data.draw(st.sampled_from([Placement(), Placement(replicas=2), Placement(replicas=4, min_clouds=3)]))

    async def scenario() -> None:
        scene = new_scene()
        made: Made = await scene.make([1, 2], policy=made_by)
        objects = sorted(set().union(*[await s.keys() for s in scene.stores.values()]))
        for key in objects:
            holders = [n for n, s in scene.stores.items() if key in await s.keys()]
            spared = data.draw(st.sampled_from(holders))
            for name in holders:
                how = data.draw(st.sampled_from([None, *HOW]))
                if name != spared and how:
                    await scene.stores[name].spoil(key, how)
        await scene.verify(made.record, repair=True)
        report = await scene.verify(made.record)
        assert (report.verdict, report.findings) == ("whole", ())
        assert report.whole == made_by.replicas * len(objects)

    asyncio.run(scenario())
