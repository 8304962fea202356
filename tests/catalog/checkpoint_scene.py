"""A scene with a local store and folders to save: what tests of checkpoints share."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from millrace.catalog.checkpoint_depot import LOCAL, Depot
from millrace.catalog.checkpoint_manifest import key_of, parts_of
from millrace.catalog.checkpoint_retention import Keep
from millrace.catalog.checkpoint_save import Saving
from millrace.catalog.checkpoint_save import save as save_locally
from millrace.catalog.checkpoint_whole import Whole, newest
from millrace.catalog.checkpoints import Series
from millrace.coord.memory import MemoryCoordination
from millrace.core.facts import CheckpointManifest
from millrace.core.keys import checkpoint_object
from millrace.core.ports import Store
from millrace.core.spec import Placement

if TYPE_CHECKING:
    from tests.catalog.conftest import Scene, TestStore

Files = Mapping[str, bytes]

ALL = Keep()
ONE: Files = {"model.bin": b"1" * 2500, "optim/a.bin": b"a" * 900, "optim/b.bin": b"", "same.txt": b"same"}
TWO: Files = {**ONE, "model.bin": b"2" * 2500}
"""Of several parts each, as parts are 1000 bytes here."""


class Yard:
    """Four clouds in memory, this machine's store, and folders on the disk."""

    def __init__(self, scene: Scene, folder: Path) -> None:
        self.scene = scene
        self.folder = folder
        self.local: TestStore = type(scene.work)("local", scene.clock)
        self.policy = Placement(replicas=2, min_clouds=2)
        self._numbers = itertools.count()

    def depot(
        self, who: str = "here:1:1", *, alive: Callable[[str], bool] = lambda _: True, local: Store | None = None
    ) -> Depot:
        return Depot(
            name="run-7",
            coord=self.scene.coord,
            stores=self.scene.stores,
            sites=self.scene.sites,
            local=local or self.local,
            policy=self.policy,
            near=None,
            clock=self.scene.clock,
            who=who,
            alive=alive,
            part_bytes=1000,
        )

    def state(self, files: Files) -> Path:
        """A new folder with these files."""
        root = self.folder / f"state-{next(self._numbers)}"
        root.mkdir()
        for path, data in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(data)
        return root

    async def save(self, step: int, files: Files, depot: Depot | None = None, **more: Any) -> CheckpointManifest:
        """Into the local store alone."""
        self.scene.clock.ms += 1000
        return await save_locally(depot or self.depot(), Saving(step, self.state(files), **more))

    @contextlib.asynccontextmanager
    async def series(self, keep: Keep = ALL, depot: Depot | None = None) -> AsyncIterator[Series]:
        series = Series(depot or self.depot(), keep, self.folder / "restored")
        await series.open()
        try:
            yield series
        finally:
            await series.aclose()

    async def replicated(self, series: Series, step: int, files: Files, **more: Any) -> CheckpointManifest:
        """Save and wait."""
        self.scene.clock.ms += 1000
        manifest = await series.save(Saving(step, self.state(files), **more))
        await series.wait(step)
        return manifest

    async def newest(self, depot: Depot | None = None) -> Whole | None:
        return await newest(depot or self.depot())

    def forget(self) -> None:
        """Lose the coordination."""
        self.scene.coord = MemoryCoordination()

    async def lose_machine(self) -> None:
        """Lose this machine: its store and the coordination."""
        self.forget()
        self.local = type(self.local)("local", self.scene.clock)

    async def holders(self, manifest: CheckpointManifest) -> list[str]:
        """The stores where every object of it is, and its manifest."""
        wanted = {checkpoint_object("run-7", d) for d in parts_of(manifest)} | {key_of(manifest)}
        found = {LOCAL: self.local, **self.scene.stores}
        return [name for name, store in found.items() if wanted <= await store.keys()]

    async def everything(self) -> dict[str, set[str]]:
        """The keys of every store."""
        found = {LOCAL: self.local, **self.scene.stores}
        return {name: await store.keys() for name, store in found.items()}


def held(manifest: CheckpointManifest) -> dict[str, int]:
    """Path to size: what it holds."""
    return {file.path: file.size_bytes for file in manifest.files}
