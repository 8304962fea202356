"""CheckpointTree as files: the tree shows what was saved, and every part of a file comes verified from some store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from millrace.catalog.checkpoint_depot import Depot
from millrace.catalog.checkpoint_replicate import replicate
from millrace.catalog.checkpoint_save import Saving, save
from millrace.client.checkpoint_tree import CheckpointTree
from millrace.client.tree import Datasets, Tree
from millrace.core.errors import Corrupt, StoreError
from millrace.core.spec import Placement
from millrace.stores.local import LocalStore
from millrace.wiring.world import OpenWorld, open_world

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
"""
FILES = {"model/a.bin": b"a" * 2500, "model/deep/b.bin": bytes(range(256)) * 10, ".metadata": b"m", "empty": b""}

Scene = Callable[[CheckpointTree, Depot, OpenWorld], Awaitable[None]]


def within(tmp_path: Path, scene: Scene) -> None:
    """A world with steps 5 and 1200 of ``run-7``, of which 1200 is replicated."""

    async def work() -> None:
        async with open_world(tmp_path / "world.yaml") as world:
            local = LocalStore(tmp_path / "local", name="local")

            def depot(name: str) -> Depot:
                return Depot(
                    name=name,
                    coord=world.coord,
                    stores=world.stores,
                    sites=world.sites,
                    local=local,
                    policy=Placement(replicas=2, min_clouds=2),
                    near=None,
                    clock=world.clock,
                    who="here:1:1",
                    alive=lambda _: True,
                    part_bytes=1000,
                )

            try:
                for step in (5, 1200):
                    manifest = await save(depot("run-7"), Saving(step, tmp_path / f"state-{step}"))
                result = await replicate(depot("run-7"), manifest)
                assert not result.short
                await scene(CheckpointTree(depot("any")), depot("run-7"), world)
            finally:
                await local.aclose()

    (tmp_path / "world.yaml").write_text(WORLD)
    for step in (5, 1200):
        for name, data in FILES.items():
            path = tmp_path / f"state-{step}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data + b"!" * (step == 1200 and len(data) > 100))
        (tmp_path / f"state-{step}" / "nothing").mkdir()
    asyncio.run(work())


async def content(tree: CheckpointTree, path: str) -> bytes:
    return b"".join([bytes(await part.fetch()) for part in await tree.parts(path)])


async def names(tree: CheckpointTree | Tree, path: str) -> list[str]:
    return [info["name"] for info in await tree.children(path)]


def test_series_steps_and_files_are_listed(tmp_path: Path) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        assert await names(tree, "checkpoints") == ["checkpoints/run-7"]
        assert await names(tree, "checkpoints/run-7") == ["checkpoints/run-7/5", "checkpoints/run-7/1200"]
        base = "checkpoints/run-7/1200"
        assert await names(tree, base) == [f"{base}/{n}" for n in (".metadata", "empty", "model", "nothing")]
        assert await names(tree, f"{base}/model") == [f"{base}/model/a.bin", f"{base}/model/deep"]
        assert await names(tree, f"{base}/model/a.bin") == [f"{base}/model/a.bin"]
        assert await names(tree, f"{base}/nothing") == []
        info = await tree.info(f"{base}/model/a.bin")
        assert (info["size"], info["type"], len(info["digest"])) == (2501, "file", 64)
        assert [(await tree.info(p))["type"] for p in ("checkpoints", base, f"{base}/model/deep")] == ["directory"] * 3
        whole = Tree(Datasets(world), {"checkpoints": tree})
        assert await names(whole, "") == ["checkpoints"]
        assert await names(whole, "checkpoints") == ["checkpoints/run-7"]

    within(tmp_path, scene)


@pytest.mark.parametrize("lost", ["nothing", "local", "a part of the local", "rot in the near store"])
def test_a_file_comes_from_whichever_store_has_it(tmp_path: Path, lost: str) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        damage(tmp_path, lost)
        for name, data in FILES.items():
            expected = data + b"!" * (len(data) > 100)
            assert await content(tree, f"checkpoints/run-7/1200/{name}") == expected
        parts = await tree.parts("checkpoints/run-7/1200/model/a.bin")
        assert [part.size_bytes for part in parts] == [1000, 1000, 501]

    within(tmp_path, scene)


def damage(folder: Path, lost: str) -> None:
    local = sorted((folder / "local").rglob("checkpoints/*/objects/*/*"))
    if lost == "local":
        for path in [*local, *(folder / "local").rglob("*.json")]:
            path.unlink()
    elif lost == "a part of the local":
        local[0].unlink()
        local[1].write_bytes(b"x")
    elif lost == "rot in the near store":
        for path in [*local, *(folder / "world" / "aws").rglob("checkpoints/*/objects/*/*")]:
            path.write_bytes(b"rotten")


def test_a_file_that_no_store_has_is_an_error_that_names_them(tmp_path: Path) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        for path in tmp_path.glob("*/**/checkpoints/*/objects/*/*"):
            path.write_bytes(b"rotten")
        with pytest.raises(Corrupt, match=r"aws-main.*gcp-main"):
            await content(tree, "checkpoints/run-7/1200/.metadata")

    within(tmp_path, scene)


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("checkpoints/run-8", "there are no checkpoints of 'run-8'"),
        ("checkpoints/..", "'..'"),
        ("checkpoints/run-7/6", "run-7 has no checkpoint of step 6; the newest are 1200, 5"),
        ("checkpoints/run-7/05", "run-7 has no checkpoint of step 05"),
        ("checkpoints/run-7/5/model/c.bin", "there is no file 'model/c.bin' in the checkpoint of step 5 of run-7"),
        ("checkpoints/run-7/5/model/a.bin/x", "there is no file"),
    ],
)
def test_what_is_missing_is_not_found_in_a_sentence(tmp_path: Path, path: str, sentence: str) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        for ask in (tree.info, tree.children, tree.parts):
            with pytest.raises(FileNotFoundError) as caught:
                await ask(path)
            assert sentence in str(caught.value)

    within(tmp_path, scene)


def test_stores_that_are_gone_are_no_absence(tmp_path: Path) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        for path in (tmp_path / "local", tmp_path / "world" / "aws", tmp_path / "world" / "gcp"):
            path.rename(path.with_suffix(".away"))
        assert len(await tree.children("checkpoints/run-7")) == 2
        with pytest.raises(StoreError, match=r"no manifest of step 5 can be read.*local.*aws-main.*gcp-main"):
            await tree.info("checkpoints/run-7/5")

    within(tmp_path, scene)


def test_a_step_stays_what_it_was_until_told_to_look_again(tmp_path: Path) -> None:
    async def scene(tree: CheckpointTree, depot: Depot, world: OpenWorld) -> None:
        before = await content(tree, "checkpoints/run-7/5/model/a.bin")
        (tmp_path / "state-5" / "model" / "a.bin").write_bytes(b"other")
        await save(depot, Saving(5, tmp_path / "state-5", overwrite=True))
        assert (await tree.info("checkpoints/run-7/5/model/a.bin"))["size"] == len(before)
        tree.forget()
        assert await content(tree, "checkpoints/run-7/5/model/a.bin") == b"other"

    within(tmp_path, scene)
