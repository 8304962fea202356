"""Which checkpoints stay, and taking away the others with what only they name."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from millrace.catalog.checkpoint_depot import LOCAL, Depot, gripped
from millrace.catalog.checkpoint_manifest import parts_of
from millrace.catalog.checkpoint_survey import (
    Known,
    Survey,
    change_record,
    list_manifests,
    read_manifest,
    survey,
)
from millrace.catalog.checkpoint_whole import what_is_wrong
from millrace.catalog.crew import at_once
from millrace.core.errors import Corrupt, LeaseHeld, StoreError, UsageError
from millrace.core.facts import CheckpointManifest, CheckpointRecord
from millrace.core.keys import checkpoint_folder, checkpoint_object

__all__ = ["GRACE_MS", "Keep", "Plan", "Retained", "plan", "retain"]

GRACE_MS: Final = 3_600_000
"""An object of a store that no manifest names is left alone for so long: its manifest may be under way."""

_PATIENCE_S: Final = 60.0
_PAGE: Final = 64
_PAGE_S: Final = 40.0
"""Time for one page of deletes: well within the lease that was renewed just before it."""
_AT_ONCE: Final = 8


@dataclass(frozen=True, slots=True)
class Keep:
    """What to keep. A checkpoint goes when neither rule keeps it; with neither, none goes.

    Attributes:
        last: So many of the newest; at least 1, or None.
        for_ms: Those that are younger; or None.
    """

    last: int | None = None
    for_ms: int | None = None

    def __post_init__(self) -> None:
        if self.last is not None and (isinstance(self.last, bool) or self.last < 1):
            raise UsageError(f"keep_last={self.last} would keep no checkpoint; give at least 1, or None for no count")
        if self.for_ms is not None and self.for_ms < 0:
            raise UsageError("keep_for can't be negative; give a duration like 7d, or None for no age")


@dataclass(frozen=True, slots=True)
class Plan:
    """What retention would do.

    Attributes:
        kept: Stay.
        dropped: Go, everywhere.
        only_remote: Stay, but not in the local store.
    """

    kept: tuple[Known, ...]
    dropped: tuple[Known, ...]
    only_remote: tuple[Known, ...]


def plan(known: Sequence[Known], keep: Keep, now_ms: int) -> Plan:
    """Decide, without looking at anything. ``known`` is in the order of a survey: the newest step first.

    Always kept: what is pinned, the newest that was replicated, and the newest in the local store. While nothing is
    known to be replicated, only what lies in the local store alone may go. A checkpoint that was written over goes
    once the one in its place is replicated.
    """
    current: dict[int, Known] = {}
    for one in known:
        current.setdefault(one.step, one)
    newest = list(current.values())
    anchor = next((k for k in newest if k.replicated), None)
    newest_local = next((k for k in newest if LOCAL in k.stores), None)
    stay: list[Known] = []
    go: list[Known] = []
    for one in known:
        replaced = current[one.step] is not one
        if replaced:
            wanted = not current[one.step].replicated
        else:
            wanted = (
                one.pinned
                or one in (anchor, newest_local)
                or keep == Keep()
                or (keep.last is not None and newest.index(one) < keep.last)
                or (keep.for_ms is not None and one.at_ms + keep.for_ms > now_ms)
                or (anchor is None and set(one.stores) != {LOCAL})
            )
        (stay if wanted else go).append(one)
    only_remote = [k for k in stay if LOCAL in k.stores and k.replicated and k is not newest_local]
    return Plan(tuple(stay), tuple(go), tuple(only_remote))


@dataclass(slots=True)
class Retained:
    """What a retention did.

    Attributes:
        dropped: What went.
        deleted_objects, deleted_bytes: Of their content, in all stores.
        failed: Store to why it was passed over.
        postponed: Why content was not looked at this time; empty when it was.
    """

    dropped: list[Known] = field(default_factory=list)
    deleted_objects: int = 0
    deleted_bytes: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    postponed: str = ""


async def retain(depot: Depot, keep: Keep, manifests: dict[str, CheckpointManifest] | None = None) -> Retained:
    """Take away what ``keep`` doesn't keep: records, then manifests, then the objects that no manifest names.

    The lease of the name is held for one step of this at a time, so that saving waits for a page of deletes at most.

    Args:
        depot: Whose.
        keep: What stays.
        manifests: Manifests by key that were read before; those read now are added, and those gone taken out.

    Raises:
        LeaseHeld: another process has been saving for a minute.
        CoordError: records can't be read. Nothing was deleted.
    """
    return await _Retention(depot, keep, {} if manifests is None else manifests).run()


class _Retention:
    def __init__(self, depot: Depot, keep: Keep, manifests: dict[str, CheckpointManifest]) -> None:
        self._depot = depot
        self._keep = keep
        self._manifests = manifests
        self._done = Retained()

    async def run(self) -> Retained:
        found = await survey(self._depot)
        self._done.failed.update(found.failed)
        for known in found.known:
            await self._manifest(known)  # far ones are read before the lease is taken
        async with gripped(self._depot, patience_s=_PATIENCE_S):
            found = await self._again(found)
            kept, dropped, only_remote = await self._decide(found)
            doomed = await self._contents(dropped)
            for known in dropped:
                if not await self._drop(known):
                    kept.append(known)
            for known in only_remote:
                await self._delete(LOCAL, known.key)
        for key in self._manifests.keys() - {known.key for known in kept}:
            del self._manifests[key]
        if found.listed:
            await self._sweep(kept, doomed, found)
        return self._done

    async def _decide(self, found: Survey) -> tuple[list[Known], list[Known], list[Known]]:
        """What stays, what goes, and what goes from the local store alone."""
        rotten = [k for k in found.known if await self._manifest(k) is None and await self._is_beyond(k, found)]
        decided = plan([k for k in found.known if k not in rotten], self._keep, self._depot.clock.now_ms())
        kept, dropped = list(decided.kept), list(decided.dropped)
        anchor = max((k.step for k in kept if k.replicated), default=-1)
        if anchor < 0 and dropped and not await self._whole_here(kept):
            # Nothing was replicated yet, and the newest here is damaged: an older one may be all there is.
            kept, dropped = [*kept, *dropped], []
        for known in rotten:
            (dropped if known.step < anchor and not known.pinned else kept).append(known)
        return kept, dropped, list(decided.only_remote)

    async def _whole_here(self, kept: Sequence[Known]) -> bool:
        known = next((k for k in kept if LOCAL in k.stores), None)
        manifest = None if known is None else await self._manifest(known)
        return manifest is not None and not await what_is_wrong(self._depot, manifest, LOCAL)

    async def _again(self, before: Survey) -> Survey:
        """The survey with what may have changed since: records and the local store. Both are near."""
        now = await survey(self._depot, among={LOCAL})
        listed = {**before.listed, **now.listed}
        from_stores = {known.key: known for known in before.known}
        known = {k.key: k for k in now.known}
        for key, one in from_stores.items():
            others = tuple(name for name in one.stores if name != LOCAL)
            if key in known:
                known[key] = replace(known[key], stores=(*known[key].stores, *others))
            elif others:
                record = now.records.get(one.step)
                same = record is not None and record.digest[:8] == one.mark
                known[key] = replace(one, stores=others, record=record if same else None)
        order = sorted(known.values(), key=lambda k: (k.step, k.record is not None, k.at_ms, k.mark), reverse=True)
        return Survey(tuple(order), listed, now.records, before.failed)

    # --- checkpoints --------------------------------------------------------------------------------------

    async def _contents(self, dropped: Sequence[Known]) -> set[str]:
        """The objects of what goes, as far as that can be read."""
        keys: set[str] = set()
        for known in dropped:
            manifest = await self._manifest(known)
            if manifest is not None:
                keys.update(checkpoint_object(self._depot.name, digest) for digest in parts_of(manifest))
        return keys

    async def _manifest(self, known: Known) -> CheckpointManifest | None:
        if known.key not in self._manifests:
            try:
                self._manifests[known.key] = await read_manifest(self._depot, known)
            except StoreError:
                return None
        return self._manifests[known.key]

    async def _drop(self, known: Known) -> bool:
        """Take a checkpoint away; False if somebody replicates it, or wants it after all."""
        try:
            async with gripped(self._depot, known.step):
                gone = known.record is None or await self._forget(known, known.record)
                if gone:
                    for name in known.stores:
                        await self._delete(name, known.key)
                    self._done.dropped.append(known)
                return gone
        except LeaseHeld:
            return False

    async def _forget(self, known: Known, record: CheckpointRecord) -> bool:
        def gone(before: CheckpointRecord | None) -> CheckpointRecord | None:
            changed = before is not None and (before.pinned or before.digest != record.digest)
            return before if changed else None

        return await change_record(self._depot, known.step, gone) is None

    async def _delete(self, name: str, key: str) -> None:
        if name in self._done.failed:
            return
        try:
            async with asyncio.timeout(_PAGE_S):
                await self._depot.store(name).delete(key)
        except StoreError as error:
            self._done.failed[name] = f"{error.kind}: {error}"
        except TimeoutError:
            self._done.failed[name] = f"a delete took over {_PAGE_S:.0f} s"

    # --- their content ------------------------------------------------------------------------------------

    async def _sweep(self, kept: Sequence[Known], doomed: Collection[str], found: Survey) -> None:
        """Delete every object that nothing names, of every store."""
        named: set[str] = set()
        for known in kept:
            manifest = await self._manifest(known)
            if manifest is None:
                if await self._is_beyond(known, found):
                    continue
                # It may name anything. When in doubt, nothing is deleted.
                self._done.postponed = f"the manifest of step {known.step} can't be read"
                return
            named.update(checkpoint_object(self._depot.name, digest) for digest in parts_of(manifest))
        for name in found.listed:
            with contextlib.suppress(LeaseHeld):  # somebody saves: the next time
                await self._sweep_store(name, named, doomed)

    async def _is_beyond(self, known: Known, found: Survey) -> bool:
        """Whether every copy of a manifest is rotten, so that it names nothing any more."""
        if found.failed or not known.stores:
            return False
        try:
            await read_manifest(self._depot, known)
        except Corrupt:
            return True
        except StoreError:
            return False
        return False

    async def _sweep_store(self, name: str, named: set[str], doomed: Collection[str]) -> None:
        local = name == LOCAL
        old_ms = self._depot.clock.now_ms() - GRACE_MS
        keys: dict[str, int] = {}
        try:
            wanted = await self._named_locally() if local else named
            async for page in self._depot.store(name).list(f"{checkpoint_folder(self._depot.name)}objects/"):
                # Only who holds the lease writes into the local store: what nothing names there is nobody's.
                keys.update(
                    (info.key, info.size_bytes)
                    for info in page
                    if info.key not in wanted and (local or info.key in doomed or info.modified_ms < old_ms)
                )
        except StoreError as error:
            self._done.failed[name] = f"{error.kind}: {error}"
            return
        todo = list(keys)
        for i in range(0, len(todo), _PAGE):
            await self._page(name, todo[i : i + _PAGE], keys)

    async def _named_locally(self) -> set[str]:
        """What the manifests in the local store name, as it is now. Raises ``StoreError`` when that can't be told."""
        named: set[str] = set()
        for key, (said, at_ms) in (await list_manifests(self._depot, LOCAL)).items():
            manifest = await self._manifest(Known(said.step, key, (LOCAL,), at_ms, None))
            if manifest is None:
                continue  # rotten: what it names, it can't have
            named.update(checkpoint_object(self._depot.name, digest) for digest in parts_of(manifest))
        return named

    async def _page(self, name: str, keys: Sequence[str], sizes: Mapping[str, int]) -> None:
        """Delete these but for what was saved since: nothing can be saved while this goes on."""
        if name in self._done.failed:
            return
        async with gripped(self._depot, patience_s=_PATIENCE_S) as grip:
            try:
                async with asyncio.timeout(_PAGE_S):
                    named = await self._named_locally()
                    await grip.check()
                    todo = iter([key for key in keys if key not in named])
                    await at_once([self._some(name, todo, sizes) for _ in range(_AT_ONCE)])
            except StoreError as error:
                self._done.failed[name] = f"{error.kind}: {error}"
            except TimeoutError:
                self._done.failed[name] = f"deleting {len(keys)} objects took over {_PAGE_S:.0f} s"

    async def _some(self, name: str, todo: Iterator[str], sizes: Mapping[str, int]) -> None:
        for key in todo:
            await self._depot.store(name).delete(key)
            self._done.deleted_objects += 1
            self._done.deleted_bytes += sizes[key]
