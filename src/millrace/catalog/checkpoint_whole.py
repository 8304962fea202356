"""Finding a checkpoint that is whole: every byte of it read and hashed, from whichever stores have it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from millrace.catalog.checkpoint_depot import LOCAL, Budget, Depot
from millrace.catalog.checkpoint_manifest import encode_manifest, key_of, parts_of
from millrace.catalog.checkpoint_parts import each_within, is_true, read_part
from millrace.catalog.checkpoint_survey import COORDINATION, Known, Survey, read_manifest, survey
from millrace.core.errors import Corrupt, StoreError, Unavailable, UsageError
from millrace.core.facts import CheckpointManifest
from millrace.core.keys import checkpoint_object
from millrace.core.model import Digest

__all__ = ["Whole", "at_step", "is_lost", "newest", "what_is_wrong"]


@dataclass(frozen=True, slots=True)
class Whole:
    """A checkpoint of which every file was found true, in one store or another.

    Attributes:
        manifest: What it is.
        stores: Those that list it.
        notes: Sentences about what was passed over: newer ones that aren't whole, stores that don't answer.
    """

    manifest: CheckpointManifest
    stores: tuple[str, ...]
    notes: tuple[str, ...] = ()


async def newest(depot: Depot) -> Whole | None:
    """The newest checkpoint that is whole in what can be reached; afterwards the local store holds it, if it can.

    Returns:
        None when there is none, nor any sign of one.

    Raises:
        Corrupt: there are some, and none is whole.
        Unavailable: so many stores don't answer that all replicas of one may lie there, or none of those there are
            can be read. Starting anew then would throw away what may come back.
    """
    found = await survey(depot, tolerant=True)
    notes = [f"{name} was passed over: {why}" for name, why in found.failed.items()]
    kind: type[StoreError] = Corrupt
    passed: list[str] = []
    for known in found.known:
        try:
            return Whole(await _whole(depot, known), known.stores, (*passed, *notes))
        except StoreError as error:
            passed.append(f"step {known.step} was passed over: {error}")
            if not isinstance(error, Corrupt):
                kind = Unavailable
    if passed:
        if found.failed:
            kind = Unavailable
        raise kind(
            f"no checkpoint of {depot.name} is whole in what can be reached: {'; '.join((*passed, *notes))}; bring "
            "the stores back, or begin anew under another name"
        )
    if len(found.failed.keys() - {LOCAL, COORDINATION}) >= depot.policy.replicas:
        raise Unavailable(
            f"it can't be told whether there is a checkpoint of {depot.name}: {'; '.join(notes)}; bring the stores "
            "back, or begin anew under another name"
        )
    return None


async def at_step(depot: Depot, step: int) -> Whole:
    """The checkpoint of one step, found whole.

    Raises:
        UsageError: there is none; names the nearest that there are.
        StoreError: it is not whole in what can be reached.
    """
    found = await survey(depot, tolerant=True)
    known = next((k for k in found.known if k.step == step), None)
    if known is None:
        raise UsageError(_no_such(depot, found, step))
    notes = tuple(f"{name} was passed over: {why}" for name, why in found.failed.items())
    return Whole(await _whole(depot, known), known.stores, notes)


def _no_such(depot: Depot, found: Survey, step: int) -> str:
    steps = [str(k.step) for k in found.known]
    there = (
        f"there is {', '.join(steps[:12])}{' and older ones' if len(steps) > 12 else ''}" if steps else "nor any other"
    )
    failed = f"; {', '.join(found.failed)} could not be asked" if found.failed else ""
    return f"{depot.name} has no checkpoint of step {step}, {there}{failed}"


async def _whole(depot: Depot, known: Known) -> CheckpointManifest:
    """Its manifest, once all of it was found true. Raises ``StoreError`` when it isn't."""
    if not known.stores:
        raise Unavailable("it is only recorded: no store that answers has it")
    manifest = await read_manifest(depot, known, also=depot.readable())
    names = [name for name in dict.fromkeys((*known.stores, *depot.readable())) if name != LOCAL]
    pull = _Pull(depot, manifest, names)
    try:
        await each_within(Budget(), parts_of(manifest).items(), pull.part)
    except BaseException:
        await pull.undo()
        raise
    await pull.done(listed=LOCAL in known.stores)
    return manifest


class _Pull:
    """Checks every part, and has the local store hold what it can."""

    def __init__(self, depot: Depot, manifest: CheckpointManifest, names: Sequence[str]) -> None:
        self._depot = depot
        self._manifest = manifest
        self._names = names
        self._budget = Budget()
        self._writable = True
        self._fresh: list[str] = []

    async def part(self, part: tuple[Digest, int]) -> None:
        digest, size_bytes = part
        key = checkpoint_object(self._depot.name, digest)
        async with self._budget.take(size_bytes):
            with contextlib.suppress(StoreError):  # a local store in trouble is one that has nothing
                if await is_true(self._depot.local, key, digest, size_bytes):
                    return
            if self._writable:
                data, _ = await read_part(self._depot, digest, self._names)
                try:
                    await self._depot.local.put(key, [data])
                    self._fresh.append(key)
                except StoreError:
                    self._writable = False  # full, or not writable: then it is only checked where it lies
            elif not await _somewhere(self._depot, key, digest, size_bytes, self._names):
                await read_part(self._depot, digest, self._names)  # says why not

    async def done(self, *, listed: bool) -> None:
        if not self._writable:
            await self.undo()
        elif not listed or self._fresh:
            with contextlib.suppress(StoreError):
                await self._depot.local.put(key_of(self._manifest), [encode_manifest(self._manifest)])

    async def undo(self) -> None:
        for key in self._fresh:
            with contextlib.suppress(StoreError):  # retention finds what stays
                await self._depot.local.delete(key)


async def _somewhere(depot: Depot, key: str, digest: Digest, size_bytes: int, names: Sequence[str]) -> bool:
    for name in names:
        with contextlib.suppress(StoreError):  # then another store is asked
            if await is_true(depot.store(name), key, digest, size_bytes):
                return True
    return False


async def is_lost(depot: Depot, known: Known) -> bool:
    """Whether a checkpoint is beyond help: every store answers, and together they don't have all of it."""
    found = await survey(depot)
    if found.failed:
        return False
    there = next((k for k in found.known if k.key == known.key), known)
    try:
        manifest = await read_manifest(depot, there, also=depot.readable())
    except Unavailable:
        return False
    except Corrupt:
        return True
    for digest, size_bytes in parts_of(manifest).items():
        key = checkpoint_object(depot.name, digest)
        try:
            if not any([await is_true(depot.store(n), key, digest, size_bytes) for n in depot.readable()]):
                return True
        except StoreError:
            return False
    return False


async def what_is_wrong(depot: Depot, manifest: CheckpointManifest, name: str) -> str:
    """Why the checkpoint is not whole in one store, by reading all of it there; empty when it is."""
    budget = Budget()
    wrong: list[str] = []

    async def one(part: tuple[Digest, int]) -> None:
        digest, size_bytes = part
        key = checkpoint_object(depot.name, digest)
        async with budget.take(min(size_bytes, 1)):
            try:
                if not await is_true(depot.store(name), key, digest, size_bytes):
                    wrong.append(f"{key} is missing or rotten")
            except StoreError as error:
                wrong.append(f"{error.kind}: {error}")

    await each_within(budget, parts_of(manifest).items(), one)
    wrong.sort()
    return f"{wrong[0]}{f' and {len(wrong) - 1} more' if wrong[1:] else ''}" if wrong else ""
