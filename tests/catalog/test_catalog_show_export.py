"""Opening manifests, showing and comparing versions, exporting them."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.catalog.export import ExportProgress, export_dataset
from millrace.catalog.show import Change, Extent, diff, show
from millrace.core.errors import StoreError, Unavailable, UsageError
from millrace.core.keys import manifest_key, replica_page
from millrace.core.model import Digest, digest_of
from millrace.core.ports import Write
from millrace.pipeline.export import open_exporter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.catalog.conftest import Made, Scene


# --- manifests --------------------------------------------------------------------------------------------


def test_a_manifest_gives_shards_blocks_and_replicas_in_order(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([3, 1, 2])
        opened = await scene.open(made.record)
        shards = [s for o in made.outputs for s in o.shards]
        assert len(opened) == 1
        columns = [segment async for _, segment in opened.segments()]
        assert [columns[0].digest(i) for i in range(len(columns[0]))] == [s.digest for s in shards]
        assert columns[0].sizes.tolist() == [s.size_bytes for s in shards]
        assert await opened.blocks(0) == [s.blocks for s in shards]
        page = await opened.replicas(0)
        assert page is not None
        assert [e.digest for e in page.entries] == [s.digest for s in shards]
        data = await opened.shard(shards[0].digest, page.entries[0])
        assert digest_of(data) == shards[0].digest
        assert {e.digest for e in opened.own_objects()} >= {opened.digest}
        with pytest.raises(UsageError, match="no segment 1"):
            await opened.segment(1)

    asyncio.run(scenario())


def test_any_true_replica_will_do_known_or_not(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        root = manifest_key(Digest(made.record.digest))
        holders = [n for n, s in scene.stores.items() if root in await s.keys()]
        await scene.stores[holders[0]].spoil(root, "flip")
        scene.stores[holders[1]].down = True
        assert (await scene.open(made.record)).digest == made.record.digest
        await scene.coord.commit([Write(e.key, None) for e in await scene.coord.list("replicas/")])
        opened = await scene.open(made.record)
        assert await opened.replicas(0) is None
        await opened.shard(Digest(made.outputs[0].shards[0].digest))
        scene.stores[holders[2]].down = True
        with pytest.raises(Unavailable, match=r"no whole replica.*the bytes are not those.*millrace verify --repair"):
            await scene.open(made.record)

    asyncio.run(scenario())


def test_leaving_a_manifest_early_leaves_nothing_running(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1])
        opened = await scene.open(made.record)
        segments = opened.segments()
        await anext(segments)
        await segments.aclose()
        assert len(asyncio.all_tasks()) == 1
        for store in scene.stores.values():
            store.down = True
        assert [i async for i, _ in opened.segments()] == [0]  # what was read is kept

    asyncio.run(scenario())


# --- show and diff ----------------------------------------------------------------------------------------


def test_show_counts_replicas_by_store_and_cloud(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        shown = await show(made.record, await scene.open(made.record), scene.sites)
        assert (shown.rows, shown.shards) == (80, len(made.shards))
        assert shown.schema == "id: int64\ntext: string"
        assert sum(line.shards for line in shown.stores) == 3 * shown.shards
        assert sum(line.bytes for line in shown.stores) == 3 * shown.bytes
        assert {line.name for line in shown.clouds} == {line.cloud for line in shown.stores}
        assert shown.unknown_shards == 0
        fewer = await show(made.record, await scene.open(made.record), scene.sites[1:])
        assert [line.name for line in fewer.clouds][-1] == "(not in this world)"
        await scene.coord.commit([Write(replica_page(Digest(made.record.digest), 0), None)])
        assert (await show(made.record, await scene.open(made.record), scene.sites)).unknown_shards == shown.shards

    asyncio.run(scenario())


def test_diff_counts_shards_as_often_as_they_are_listed(scene: Scene) -> None:
    async def scenario() -> None:
        async def compare(a: Made, b: Made) -> tuple[Extent, Extent, Extent]:
            d = await diff(a.record, await scene.open(a.record), b.record, await scene.open(b.record))
            assert not d.schema
            return d.added, d.removed, d.kept

        a, b = await scene.make([1, 2, 2]), await scene.make([2, 3])
        each = len(a.outputs[0].shards)
        added, removed, kept = await compare(a, b)
        assert (added.shards, removed.shards, kept.shards) == (each, 2 * each, each)
        assert (added.rows, removed.rows, kept.rows) == (40, 80, 40)
        assert kept.bytes + removed.bytes == a.record.bytes
        assert kept.bytes + added.bytes == b.record.bytes
        empty = await scene.make([])
        assert [e.rows for e in await compare(b, b)] == [0, 0, 80]
        assert empty.record.shards == 0

    asyncio.run(scenario())


def test_diff_tells_what_changed_in_lineage_and_schema(scene: Scene) -> None:
    async def scenario() -> None:
        a = await scene.make([1])
        lineage = a.record.lineage.model_copy(
            update={
                "spec": {"transforms": [{"sql": "SELECT 2"}, {"dedup": ["text"]}]},
                "code": {"millrace": "0.2.0"},
                "sources": ({"url": "file:///data", "objects": 2},),
            }
        )
        b = a.record.model_copy(update={"lineage": lineage, "version": 2})
        opened = await scene.open(a.record)
        d = await diff(a.record, opened, b, opened)
        assert d.same
        assert d.lineage == (
            Change("spec.transforms.0.sql", "SELECT 1", "SELECT 2"),
            Change("spec.transforms.1", "(nothing)", "{'dedup': ['text']}"),
            Change("sources.0.objects", "1", "2"),
            Change("code.millrace", "0.1.0", "0.2.0"),
        )
        empty = await scene.make([])
        changed = await diff(a.record, opened, empty.record, await scene.open(empty.record))
        assert changed.schema == (Change("id", "int64", "(nothing)"), Change("text", "string", "(nothing)"))
        assert changed.removed.rows == 40

    asyncio.run(scenario())


# --- export -----------------------------------------------------------------------------------------------


def test_what_is_exported_is_what_went_in(scene: Scene, tmp_path: Path) -> None:
    async def scenario() -> None:
        made = await scene.make([2, 1])
        for key in made.shards:
            await scene.stores[scene.holders(made, key)[0]].spoil(key, "flip")
        seen: list[ExportProgress] = []
        report = await export_dataset(
            scene.coord,
            made.record,
            await scene.open(made.record),
            lambda schema: open_exporter("parquet", tmp_path / "out", schema),
            who="tester",
            clock=scene.clock,
            progress=seen.append,
        )
        table = pa.concat_tables([pq.read_table(tmp_path / "out" / f) for f in report.files])
        assert table.to_pylist() == [r for c in (2, 1) for r in scene.batch(c).to_pylist()]
        assert (report.rows, report.shards, report.bytes) == (80, made.record.shards, made.record.bytes)
        assert (seen[-1].rows_done, seen[-1].bytes_done) == (seen[-1].rows_total, seen[-1].bytes_total)
        assert await scene.coord.list("readers/") == []

    asyncio.run(scenario())


class Recorder:
    """An exporter that notes what happens to it, and can be told to wait or to fail."""

    def __init__(self, *, wait: threading.Event | None = None, fail: bool = False) -> None:
        self.started = threading.Event()
        self.calls: list[str] = []
        self.wait = wait
        self.fail = fail

    def write(self, batch: pa.RecordBatch) -> None:
        self.started.set()
        if self.wait is not None:
            self.wait.wait(30)
        if self.fail:
            raise StoreError("no space left in /out")
        self.calls.append("write")

    def close(self) -> Sequence[str]:
        self.calls.append("close")
        return ["a"]

    def abort(self) -> None:
        self.calls.append("abort")


def export_into(scene: Scene, made: Made, recorder: Recorder) -> asyncio.Task[object]:
    async def work() -> object:
        opened = await scene.open(made.record)
        return await export_dataset(
            scene.coord, made.record, opened, lambda _: recorder, who="tester", clock=scene.clock
        )

    return asyncio.create_task(work())


def test_cancelling_takes_back_what_was_written_once_the_thread_is_done(scene: Scene) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        recorder = Recorder(wait=threading.Event())
        task = export_into(scene, made, recorder)
        await asyncio.to_thread(recorder.started.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        assert recorder.calls == []
        assert recorder.wait is not None
        recorder.wait.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert recorder.calls == ["write", "abort"]
        assert await scene.coord.list("readers/") == []
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_a_failing_exporter_is_aborted_and_says_why(scene: Scene) -> None:
    async def scenario() -> None:
        recorder = Recorder(fail=True)
        with pytest.raises(StoreError, match="no space left"):
            await export_into(scene, await scene.make([1]), recorder)
        assert recorder.calls == ["abort"]

    asyncio.run(scenario())


def test_a_lost_shard_ends_the_export_without_a_half_directory(scene: Scene, tmp_path: Path) -> None:
    async def scenario() -> None:
        made = await scene.make([1, 2])
        last = made.shards[-1]
        for name in scene.holders(made, last):
            await scene.stores[name].spoil(last, "flip")
        with pytest.raises(StoreError, match=last):
            await export_dataset(
                scene.coord,
                made.record,
                await scene.open(made.record),
                lambda schema: open_exporter("jsonl", tmp_path / "out", schema),
                who="tester",
                clock=scene.clock,
            )
        assert list(tmp_path.iterdir()) == []

    asyncio.run(scenario())


def test_a_dataset_without_rows_has_nothing_to_export(scene: Scene) -> None:
    async def scenario() -> None:
        with pytest.raises(UsageError, match="has no rows"):
            await export_into(scene, await scene.make([]), Recorder())

    asyncio.run(scenario())
