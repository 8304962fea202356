"""Saving: a folder becomes objects and a manifest in the local store, durably, or nothing at all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from millrace.catalog.checkpoint_depot import LOCAL, Budget, Depot, Grip, gripped
from millrace.catalog.checkpoint_files import Item, Tree, hash_file, read_span, scan, still_the_same
from millrace.catalog.checkpoint_manifest import check_step, encode_manifest, identity, key_of
from millrace.catalog.checkpoint_parts import each_within, is_true
from millrace.catalog.checkpoint_survey import change_record, read_manifest, survey
from millrace.catalog.checkpoint_whole import is_lost
from millrace.catalog.crew import at_once
from millrace.core.errors import CoordError, Fenced, StoreError, UsageError
from millrace.core.facts import CheckpointFile, CheckpointManifest, CheckpointPart, CheckpointRecord
from millrace.core.keys import checkpoint_object
from millrace.core.model import Digest, digest_of

__all__ = ["Saving", "save"]

_PATIENCE_S: Final = 900.0
"""How long to wait for another process that saves to the same name."""
_ATTEMPTS: Final = 3


@dataclass(frozen=True, slots=True)
class Saving:
    """What is to be saved.

    Attributes:
        step: Of the training run.
        folder: What lies in it.
        loader_state: As JSON holds it.
        kind: Who wrote the files.
        world_size: How many ranks did.
        overwrite: Whether another checkpoint of this step gives way.
    """

    step: int
    folder: Path
    loader_state: Any = None
    kind: Literal["files", "torch"] = "files"
    world_size: int = 1
    overwrite: bool = False


async def save(depot: Depot, saving: Saving) -> CheckpointManifest:
    """Make it durable in the local store; gives the manifest that stands there then.

    Raises:
        UsageError: the folder or the step can't be saved, or that step is there with other content.
        SourceChanged: a file changed meanwhile.
        StoreError: the local store can't hold it; ``NoSpace`` when it is full. Nothing of it is left.
        LeaseHeld: another process has saved to this name for a quarter of an hour.
    """
    check_step(saving.step)
    tree = await asyncio.to_thread(scan, saving.folder)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            async with gripped(depot, patience_s=_PATIENCE_S) as grip:
                return await _Save(depot, saving, tree, grip).run()
        except Fenced:
            # This process slept past its lease. What it found there may be gone: look at everything again.
            if attempt == _ATTEMPTS:
                raise
    raise AssertionError("unreachable")


class _Save:
    def __init__(self, depot: Depot, saving: Saving, tree: Tree, grip: Grip) -> None:
        self._depot = depot
        self._saving = saving
        self._tree = tree
        self._grip = grip
        self._fresh: list[str] = []
        self._under_way: dict[Digest, asyncio.Event] = {}

    async def run(self) -> CheckpointManifest:
        try:
            manifest = await self._stage()
            standing = await self._standing(manifest)
            await self._commit(manifest if standing is None else standing)
        except BaseException as error:
            await self._undo()
            if isinstance(error, StoreError):
                raise type(error)(
                    f"step {self._saving.step} of {self._depot.name} was not saved, and what was there before is as it "
                    f"was: {error}",
                    store=error.store,
                    key=error.key,
                ) from error
            raise
        return manifest if standing is None else standing

    # --- content ------------------------------------------------------------------------------------------

    async def _stage(self) -> CheckpointManifest:
        """Put every part that the local store lacks, and describe the whole."""
        budget = Budget()
        parts: dict[tuple[str, int], CheckpointPart] = {}
        digests: dict[str, Digest] = {}

        async def one(piece: tuple[Item, int, int]) -> None:
            item, start, length = piece
            async with budget.take(length):
                data, digest = await asyncio.to_thread(read_span, self._tree.root, item, start, length)
                await self._put(digest, data)
            parts[item.path, start] = CheckpointPart(digest=digest, size_bytes=length)

        async def whole(item: Item) -> None:
            path = self._tree.root / item.path
            try:
                digests[item.path] = (await asyncio.to_thread(hash_file, path))[0]
            except OSError as error:
                raise UsageError(f"{path} can't be read: {error.strerror}") from error

        large = [item for item in self._tree.files if item.size_bytes > self._depot.part_bytes]
        await at_once([each_within(budget, self._pieces(), one), each_within(Budget(pieces=1), large, whole)])
        await asyncio.to_thread(still_the_same, self._tree)
        files = []
        for item in self._tree.files:
            of_it = tuple(parts[item.path, start] for _, start, _ in self._cut(item))
            digest = digests.get(item.path) or (of_it[0].digest if of_it else digest_of())
            files.append(CheckpointFile(path=item.path, size_bytes=item.size_bytes, digest=digest, parts=of_it))
        saving = self._saving
        return CheckpointManifest(
            name=self._depot.name,
            step=saving.step,
            created_at_ms=self._depot.clock.now_ms(),
            kind=saving.kind,
            world_size=saving.world_size,
            files=tuple(files),
            folders=self._tree.folders,
            loader_state=saving.loader_state,
        )

    def _pieces(self) -> Iterator[tuple[Item, int, int]]:
        for item in self._tree.files:
            yield from self._cut(item)

    def _cut(self, item: Item) -> Iterator[tuple[Item, int, int]]:
        size = self._depot.part_bytes
        for start in range(0, item.size_bytes, size):
            yield item, start, min(size, item.size_bytes - start)

    async def _put(self, digest: Digest, data: memoryview) -> None:
        """Have these bytes in the local store. Two files of one content are put once."""
        first = self._under_way.get(digest)
        if first is not None:
            await first.wait()
            return
        done = self._under_way[digest] = asyncio.Event()
        try:
            key = checkpoint_object(self._depot.name, digest)
            if not await is_true(self._depot.local, key, digest, len(data)):
                self._fresh.append(key)
                await self._depot.local.put(key, [data])
        finally:
            # Who waits is cancelled together with whoever failed.
            done.set()

    async def _undo(self) -> None:
        """Take away what was put, if the lease still stands: then nobody else can count on it. Else retention may."""
        with contextlib.suppress(StoreError, CoordError):
            for key in self._fresh:
                await self._grip.check()
                await self._depot.local.delete(key)

    # --- the step -----------------------------------------------------------------------------------------

    async def _standing(self, manifest: CheckpointManifest) -> CheckpointManifest | None:
        """The manifest that this step has already, if it is of the same content and lies here.

        Raises:
            UsageError: it has another one, which may not be written over.
        """
        key = key_of(manifest)
        there = [k for k in (await survey(self._depot, among={LOCAL})).known if k.step == manifest.step]
        if there and there[0].key == key:
            with contextlib.suppress(StoreError):  # one that is rotten, or only recorded, is written anew
                return await read_manifest(self._depot, there[0])
            return manifest.model_copy(update={"created_at_ms": there[0].at_ms})
        # The first one counts; it was written over before if there are more.
        if there and not self._saving.overwrite and not await is_lost(self._depot, there[0]):
            raise UsageError(
                f"step {manifest.step} of {self._depot.name} was saved before with other content ({there[0].mark}); "
                "pass overwrite=True to have this one instead"
            )
        return None

    async def _commit(self, manifest: CheckpointManifest) -> None:
        """The manifest, last: from here on it is there. Then the record."""
        key, digest = key_of(manifest), identity(manifest)
        await self._grip.check()
        data = encode_manifest(manifest)
        if not await is_true(self._depot.local, key, digest_of(data), len(data)):
            await self._depot.local.put(key, [data])
        self._fresh.clear()  # they are a checkpoint's now

        def noted(before: CheckpointRecord | None) -> CheckpointRecord:
            if before is not None and before.digest == digest:
                return before
            return CheckpointRecord(
                name=manifest.name,
                step=manifest.step,
                digest=digest,
                created_at_ms=manifest.created_at_ms,
                size_bytes=manifest.size_bytes,
                files=len(manifest.files),
                pinned=before is not None and before.pinned,
                placement=self._depot.policy.model_dump(mode="json"),
            )

        await change_record(self._depot, manifest.step, noted, guard=self._grip.lease)
