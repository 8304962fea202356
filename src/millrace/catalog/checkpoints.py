"""The checkpoints of one name: saved here at once, replicated in the background, and kept as long as wanted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from millrace.catalog.checkpoint_depot import LOCAL, Depot, gripped
from millrace.catalog.checkpoint_manifest import check_step, identity, key_of
from millrace.catalog.checkpoint_replicate import Replication, note, replicate
from millrace.catalog.checkpoint_restore import folder_name, tidy
from millrace.catalog.checkpoint_retention import Keep, Retained, retain
from millrace.catalog.checkpoint_save import Saving, save
from millrace.catalog.checkpoint_survey import Known, change_record, read_manifest, records_of, survey
from millrace.catalog.checkpoint_whole import what_is_wrong
from millrace.core.errors import LeaseHeld, MillraceError, PolicyRefused, StoreError, TimedOut, Unavailable, UsageError
from millrace.core.facts import CheckpointManifest, CheckpointRecord
from millrace.core.model import StoreSite
from millrace.core.spec import Placement
from millrace.decide.placement import refusals

__all__ = ["CheckpointLine", "Series", "check_policy", "list_checkpoints", "pin", "verify_checkpoints"]

_BACKOFF_S: Final = 10.0
_BACKOFF_S_MAX: Final = 300.0
_ELSEWHERE_S: Final = 1.0
"""How often to look whether another process has done what it is at."""


@dataclass(frozen=True, slots=True)
class CheckpointLine:
    """One checkpoint in a list.

    Attributes:
        step: Of the training run.
        digest: What it is; its first 8 letters when nothing more can be read.
        created_at_ms: Milliseconds since 1970.
        size_bytes, files: What it holds; None when its manifest can't be read and it isn't recorded.
        stores: Stores of the world that list it: that means it was whole there once.
        local: Whether this machine has it.
        state: ``replicated`` once the policy's replicas were read back; ``local`` before; ``unrecorded`` when the
            coordination knows nothing of it.
        pinned: Whether retention leaves it alone.
    """

    step: int
    digest: str
    created_at_ms: int
    size_bytes: int | None
    files: int | None
    stores: tuple[str, ...]
    local: bool
    state: str
    pinned: bool


def check_policy(sites: tuple[StoreSite, ...], policy: Placement) -> None:
    """Whether the policy can be met with these stores.

    Raises:
        PolicyRefused: it can't; names the rule.
    """
    found = refusals(sites, policy)
    if found:
        raise PolicyRefused(found[0].sentence, rule=found[0].rule)


async def list_checkpoints(depot: Depot) -> tuple[tuple[CheckpointLine, ...], Mapping[str, str]]:
    """All there are, the newest first; and the stores that could not be asked, with why."""
    found = await survey(depot, tolerant=True)

    async def line(known: Known) -> CheckpointLine:
        digest, size_bytes, files = known.mark, None, None
        at_ms = known.at_ms
        if known.record is not None:
            digest, size_bytes, files = known.record.digest, known.record.size_bytes, known.record.files
        else:
            with contextlib.suppress(StoreError):  # then its key has to do
                manifest = await read_manifest(depot, known)
                digest, size_bytes, files = identity(manifest), manifest.size_bytes, len(manifest.files)
                at_ms = manifest.created_at_ms
        return CheckpointLine(
            step=known.step,
            digest=digest,
            created_at_ms=at_ms,
            size_bytes=size_bytes,
            files=files,
            stores=tuple(name for name in known.stores if name != LOCAL),
            local=LOCAL in known.stores,
            state=known.record.state if known.record is not None else "unrecorded",
            pinned=known.pinned,
        )

    return tuple([await line(known) for known in found.known]), found.failed


async def verify_checkpoints(depot: Depot) -> tuple[Mapping[tuple[int, str], Mapping[str, str]], Mapping[str, str]]:
    """Read every checkpoint back from every store that lists it.

    Returns:
        (step, first letters of the digest) to store to what is wrong there, empty when it is whole; and the stores
        that could not be asked, with why.
    """
    found = await survey(depot, tolerant=True)
    verdicts: dict[tuple[int, str], dict[str, str]] = {}
    for known in found.known:
        verdict = verdicts[known.step, known.mark] = {}
        for name in known.stores:
            try:
                one = Known(known.step, known.key, (name,), known.at_ms, known.record)
                verdict[name] = await what_is_wrong(depot, await read_manifest(depot, one), name)
            except StoreError as error:
                verdict[name] = f"{error.kind}: {error}"
        for name in known.record.stores if known.record is not None else ():
            if name not in verdict and name not in found.failed:
                verdict[name] = "it was replicated there and is not listed any more"
    return verdicts, found.failed


async def pin(depot: Depot, step: int, *, pinned: bool = True) -> None:
    """Have retention leave a checkpoint alone, or no longer.

    Raises:
        UsageError: there is none of that step.
    """
    check_step(step)
    async with gripped(depot, patience_s=60):
        record = (await records_of(depot)).get(step)
        if record is None:
            found = await survey(depot)
            known = next((k for k in found.known if k.step == step), None)
            if known is None:
                raise UsageError(
                    f"{depot.name} has no checkpoint of step {step}; see 'millrace checkpoints {depot.name}'"
                )
            record = _fresh_record(depot, await read_manifest(depot, known))
        fresh = record

        def change(before: CheckpointRecord | None) -> CheckpointRecord:
            return (before or fresh).model_copy(update={"pinned": pinned})

        await change_record(depot, step, change)


def _fresh_record(depot: Depot, manifest: CheckpointManifest) -> CheckpointRecord:
    return CheckpointRecord(
        name=manifest.name,
        step=manifest.step,
        digest=identity(manifest),
        created_at_ms=manifest.created_at_ms,
        size_bytes=manifest.size_bytes,
        files=len(manifest.files),
        placement=depot.policy.model_dump(mode="json"),
    )


@dataclass(slots=True)
class _Job:
    """A checkpoint that isn't replicated yet.

    Attributes:
        key: Its manifest's.
        tries: Attempts that ended.
        not_before_s: When the next one may begin, by the event loop's clock.
        last: What the last one came to.
    """

    key: str
    tries: int = 0
    not_before_s: float = 0.0
    last: Replication | MillraceError | None = None


class Series:
    """The checkpoints of one name in one process: open it, save, and close it.

    Args:
        depot: Where everything is.
        keep: What stays. Applied only after this object has saved something: who only reads deletes nothing.
        restored: Where restored folders are kept.
    """

    def __init__(self, depot: Depot, keep: Keep, restored: Path) -> None:
        self.depot = depot
        self.restored = restored
        self.retained: Retained | None = None
        """What the last retention did."""
        self.trouble = ""
        """Why the last retention failed; empty when it didn't."""
        self._keep = keep
        self._saved = False
        self._jobs: dict[int, _Job] = {}
        self._done: dict[int, Replication] = {}
        self._manifests: dict[str, CheckpointManifest] = {}
        self._changed = asyncio.Condition()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Go on with what an earlier process saved and didn't get to replicate."""
        found = await survey(self.depot, among={LOCAL})
        seen: set[int] = set()
        for known in found.known:
            # Of one step the first counts; the others were written over.
            if known.step not in seen and LOCAL in known.stores and not known.replicated:
                self._jobs[known.step] = _Job(known.key)
            seen.add(known.step)
        self._worker = asyncio.create_task(self._work())

    async def aclose(self) -> None:
        """Stop; what isn't replicated yet stays in the local store, for the next :meth:`open`."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    async def save(self, saving: Saving) -> CheckpointManifest:
        """See :func:`millrace.catalog.checkpoint_save.save`; replication begins in the background."""
        manifest = await save(self.depot, saving)
        self._saved = True
        record = (await records_of(self.depot)).get(manifest.step)
        if record is None or record.state == "local":
            self._done.pop(manifest.step, None)
            self._jobs[manifest.step] = _Job(key_of(manifest))
        for job in self._jobs.values():
            job.not_before_s = 0.0  # a save is a good moment to try the others again too
        self._wake.set()
        return manifest

    async def wait(self, step: int | None = None, *, timeout_s: float | None = None) -> tuple[Replication, ...]:
        """Until it is replicated as the policy wants.

        Args:
            step: Which; None for all that are not yet. Of these, what retention drops meanwhile is left out.
            timeout_s: How long to go on trying. None waits for the end of one attempt at each.

        Raises:
            StoreError: an attempt failed and no timeout was given; names the stores, and why.
            TimedOut: the time is up; names what is known to be in the way.
            UsageError: there is no such checkpoint.
        """
        steps = sorted(self._jobs) if step is None else [check_step(step)]
        before = {s: self._jobs[s].tries for s in steps if s in self._jobs}
        for s in before:
            self._jobs[s].not_before_s = 0.0
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_s):
                settled = [await self._settled(s, before.get(s), once=timeout_s is None) for s in steps]
        except TimeoutError as error:
            late = [s for s in steps if s in self._jobs]
            raise TimedOut(
                f"after {timeout_s:g} s {self._sentence(late)}", store=",".join(sorted(self._in_the_way(late)))
            ) from error
        if step is not None and settled == [None]:
            raise UsageError(f"{self.depot.name} has no checkpoint of step {step}, or retention has dropped it")
        return tuple(one for one in settled if one is not None)

    async def _settled(self, step: int, tries: int | None, *, once: bool) -> Replication | None:
        """What became of it; None when it is gone."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: step not in self._jobs or (once and self._jobs[step].tries > (tries or 0))
            )
        if step in self._jobs:
            last = self._jobs[step].last
            kind = type(last) if isinstance(last, StoreError) else Unavailable
            raise kind(self._sentence([step]), store=",".join(sorted(self._in_the_way([step]))))
        if step in self._done:
            return self._done[step]
        record = (await records_of(self.depot)).get(step)
        if record is None:
            return None
        return Replication(step, record.stores, {}, "" if record.state == "replicated" else "it was saved elsewhere")

    def _in_the_way(self, steps: list[int]) -> set[str]:
        lasts = [self._jobs[s].last for s in steps]
        return {name for last in lasts if isinstance(last, Replication) for name in last.failed}

    def _sentence(self, steps: list[int]) -> str:
        said = []
        for step in steps:
            last = self._jobs[step].last
            if isinstance(last, Replication):
                why = "; ".join((last.short, *(f"{name}: {error}" for name, error in last.failed.items())))
            else:
                why = str(last) if last is not None else "its replication is under way"
            said.append(f"step {step} of {self.depot.name} is not replicated: {why}")
        return f"{'; '.join(said)}. It is whole in the state folder of this machine and will be tried again"

    # --- in the background --------------------------------------------------------------------------------

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            ready = [step for step, job in self._jobs.items() if job.not_before_s <= loop.time()]
            if ready:
                attempt = asyncio.create_task(self._attempt(max(ready)))  # the newest is worth most
                try:
                    await asyncio.wait((attempt,))
                finally:
                    while not attempt.done():
                        # More than once: before Python 3.13 a task group whose child fails just then swallows it.
                        attempt.cancel()
                        await asyncio.wait((attempt,), timeout=_ELSEWHERE_S)
                continue
            soonest = min((job.not_before_s for job in self._jobs.values()), default=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(soonest):
                    await self._wake.wait()

    async def _attempt(self, step: int) -> None:
        job = self._jobs[step]
        try:
            job.last = await self._replicate(step, job)
        except LeaseHeld as error:
            job.last = error
            job.not_before_s = asyncio.get_running_loop().time() + _ELSEWHERE_S
            return
        except MillraceError as error:
            job.last = error
        except Exception as error:  # whatever it is: who waits hears it, and it is tried again
            job.last = StoreError(f"{type(error).__name__}: {error}")
        if isinstance(job.last, Replication) and not job.last.short:
            self._done[step] = job.last
        if self._saved:
            await self._retain()
        async with self._changed:
            if step in self._done and self._jobs.get(step) is job:
                del self._jobs[step]
            job.tries += 1
            pause_s = min(_BACKOFF_S * 2 ** min(job.tries - 1, 9), _BACKOFF_S_MAX)
            job.not_before_s = asyncio.get_running_loop().time() + pause_s
            self._changed.notify_all()

    async def _replicate(self, step: int, job: _Job) -> Replication:
        async with gripped(self.depot, step) as grip:
            record = (await records_of(self.depot)).get(step)
            if record is not None and record.state == "replicated" and record.digest[:8] == job.key[-13:-5]:
                return Replication(step, record.stores, {})  # another process did
            known = Known(step, job.key, (LOCAL,), 0, None)
            manifest = await read_manifest(self.depot, known, also=self.depot.readable())
            result = await replicate(self.depot, manifest, held=() if record is None else record.stores)
            await note(self.depot, manifest, result, grip.lease)
            return result

    async def _retain(self) -> None:
        self.trouble = ""
        try:
            await self.retain()
        except Exception as error:  # the next one does what this one didn't
            self.trouble = f"{type(error).__name__}: {error}"

    async def retain(self) -> Retained:
        """Take away what isn't to be kept, now. See :func:`millrace.catalog.checkpoint_retention.retain`."""
        self.retained = await retain(self.depot, self._keep, self._manifests)
        dropped = {known.key for known in self.retained.dropped}
        async with self._changed:
            self._jobs = {step: job for step, job in self._jobs.items() if job.key not in dropped}
            self._changed.notify_all()
        keep = {folder_name(m) for m in self._manifests.values()}
        await asyncio.to_thread(tidy, self.restored, keep, now_s=self.depot.clock.now_ms() / 1000)
        return self.retained
