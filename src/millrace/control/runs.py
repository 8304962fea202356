"""A run's life in the coordination store: begun or taken up again, asked to pause or stop, ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from millrace.control.loop import LEASE_TTL_MS
from millrace.control.versions import keep_gc_out
from millrace.core.errors import Conflict, CoordError, LeaseHeld, UsageError
from millrace.core.facts import Lineage, RunProgress, RunRecord, decode, encode
from millrace.core.keys import (
    RUN_COUNTER,
    dataset_lease,
    run_control,
    run_lease,
    run_progress,
    run_record,
)
from millrace.core.messages import Control, Phase
from millrace.core.ports import Clock, Compare, Coordination, Lease, Write

__all__ = ["Begun", "RunStatus", "ask", "begin_run", "end_run", "list_runs", "load_run", "run_status"]

_TAKEN_UP = frozenset({"running", "paused", "stopped", "failed"})
_ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that this process may drive.

    Attributes:
        lease, dataset_lease: Held until ``end_run``.
        resumed: Whether it goes on from an earlier attempt's ledger.
    """

    record: RunRecord
    lease: Lease
    dataset_lease: Lease
    resumed: bool


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run as other terminals see it.

    Attributes:
        alive: Whether a process drives it now.
        asked: What an operator last asked of it.
    """

    record: RunRecord
    alive: bool
    asked: Control
    progress: RunProgress | None

    @property
    def state(self) -> str:
        """``running``, ``paused``, ``interrupted`` (its process is gone), or how it ended."""
        if self.record.state != "running":
            return self.record.state
        if not self.alive:
            return "interrupted"
        return "paused" if self.asked is Control.PAUSE else "running"


async def begin_run(
    coord: Coordination,
    clock: Clock,
    *,
    dataset: str,
    identity: str,
    phases: Sequence[Phase],
    lineage: Lineage,
    pipeline_file: str,
    placement: dict[str, object],
    holder: str,
    is_alive: Callable[[str], bool],
    fresh: bool = False,
) -> Begun:
    """Take up the dataset's unfinished run of the same work, or begin a new one.

    Args:
        coord: Where runs are recorded.
        clock: For the record and the leases.
        dataset: The dataset the run will add a version to.
        identity: Digest of spec, plan and code; an unfinished run with another one is superseded.
        phases: Of a new run.
        lineage: Of a new run.
        pipeline_file: As it was given, for sentences.
        placement: The policy, as it is written into the version.
        holder: Who this process is.
        is_alive: Whether the process behind a holder still runs; the leases of a dead one are taken over at once.
        fresh: Begin a new run whatever there is.

    Raises:
        LeaseHeld: another process writes this dataset, or garbage collection is under way.
    """
    now_ms = clock.now_ms()
    dataset_held = await _take(coord, dataset_lease(dataset), holder, now_ms, is_alive, dataset)
    lease: Lease | None = None
    try:
        record, resumed = await _continued(coord, dataset, identity, dataset_held, now_ms=now_ms, fresh=fresh)
        if record is None:
            record = RunRecord(
                run=await _next_id(coord),
                dataset=dataset,
                state="running",
                identity=identity,
                pipeline_file=pipeline_file,
                created_at_ms=now_ms,
                phases=tuple((p.kind, p.barrier, p.tasks) for p in phases),
                lineage=lineage,
                placement=placement,
            )
        lease = await _take(coord, run_lease(record.run), holder, now_ms, is_alive, dataset)
        writes = [
            Write(run_record(record.run), encode(record)),
            Write(run_control(record.run), Control.RUN.encode()),
        ]
        await coord.commit(writes, guard=lease)
        await keep_gc_out(coord, record.run, now_ms=clock.now_ms())
    except CoordError:
        # Whoever comes next would wait for this process, which has nothing to do with the dataset any more.
        for held in (lease, dataset_held):
            if held is not None:
                await coord.release(held)
        raise
    return Begun(record, lease, dataset_held, resumed=resumed)


async def _continued(
    coord: Coordination, dataset: str, identity: str, guard: Lease, *, now_ms: int, fresh: bool
) -> tuple[RunRecord | None, bool]:
    """The record of the unfinished run to take up, if there is one; every other unfinished run is superseded."""
    earlier = await _unfinished(coord, dataset)
    same = [r for r in earlier if r.identity == identity and not fresh]
    for other in earlier:
        if not same or other is not same[-1]:
            # Its lease is taken for a moment: should its process only sleep, it is fenced when it wakes.
            name = run_lease(other.run)
            await coord.release(await coord.acquire(name, guard.holder, 1000, now_ms=now_ms, steal=True))
            gone = other.model_copy(update={"state": "superseded", "ended_at_ms": now_ms})
            await coord.commit([Write(run_record(other.run), encode(gone))], guard=guard)
    if not same:
        return None, False
    again = {"state": "running", "ended_at_ms": None, "report": None, "exit_code": None}
    return same[-1].model_copy(update=again), True


async def end_run(coord: Coordination, begun: Begun, record: RunRecord) -> None:
    """Write how the run ended and give its leases back.

    Raises:
        Fenced: another process drives the run now; nothing is written.
    """
    await coord.commit(
        [Write(run_record(record.run), encode(record)), Write(run_progress(record.run), None)], guard=begun.lease
    )
    await coord.release(begun.lease)
    await coord.release(begun.dataset_lease)


async def ask(coord: Coordination, clock: Clock, run: int, control: Control, is_alive: Callable[[str], bool]) -> None:
    """Ask a running run to pause, go on or stop; it takes effect within a second.

    Raises:
        UsageError: there is no such run, or no process drives it.
    """
    status = await run_status(coord, clock, run, is_alive)
    if not status.alive:
        again = "" if status.state == "done" else f"; continue it with: millrace run {status.record.pipeline_file}"
        raise UsageError(f"run {run} is not running, it is {status.state}{again}")
    await coord.commit([Write(run_control(run), control.encode())])


async def list_runs(coord: Coordination) -> list[RunRecord]:
    """Every run there is a record of, oldest first."""
    counter = await coord.get(RUN_COUNTER)
    entries = [await coord.get(run_record(i)) for i in range(1, int(counter.value) + 1 if counter else 1)]
    return [decode(RunRecord, e.value, key=e.key) for e in entries if e is not None]


async def load_run(coord: Coordination, run: int) -> RunRecord:
    """One run's record.

    Raises:
        UsageError: there is no such run; says which there are.
    """
    key = run_record(run)
    entry = await coord.get(key)
    if entry is None:
        ids = [str(r.run) for r in await list_runs(coord)][-10:]
        raise UsageError(
            f"there is no run {run}; " + (f"the latest are {', '.join(ids)}" if ids else "none was made yet")
        )
    return decode(RunRecord, entry.value, key=key)


async def run_status(coord: Coordination, clock: Clock, run: int, is_alive: Callable[[str], bool]) -> RunStatus:
    """A run as it stands.

    Raises:
        UsageError: there is no such run.
    """
    record = await load_run(coord, run)
    lease = await coord.holder(run_lease(run))
    alive = lease is not None and lease.expires_at_ms > clock.now_ms() and is_alive(lease.holder)
    asked = await coord.get(run_control(run))
    progress = await coord.get(run_progress(run))
    return RunStatus(
        record=record,
        alive=alive and record.state == "running",
        asked=Control(asked.value.decode()) if asked else Control.RUN,
        progress=decode(RunProgress, progress.value, key=progress.key) if progress else None,
    )


async def _take(
    coord: Coordination, name: str, holder: str, now_ms: int, is_alive: Callable[[str], bool], dataset: str
) -> Lease:
    try:
        return await coord.acquire(name, holder, LEASE_TTL_MS, now_ms=now_ms)
    except LeaseHeld as error:
        if not is_alive(error.holder):
            return await coord.acquire(name, holder, LEASE_TTL_MS, now_ms=now_ms, steal=True)
        running = [r.run for r in await list_runs(coord) if r.dataset == dataset and r.state == "running"]
        which = f"run {running[-1]}" if running else "another run"
        stop = f", or stop it with: millrace stop {running[-1]}" if running else ""
        raise LeaseHeld(
            f"{which} ({error.holder}) is writing dataset {dataset!r}; wait until it is done{stop}",
            holder=error.holder,
            expires_at_ms=error.expires_at_ms,
        ) from error


async def _unfinished(coord: Coordination, dataset: str) -> list[RunRecord]:
    return [r for r in await list_runs(coord) if r.dataset == dataset and r.state in _TAKEN_UP]


async def _next_id(coord: Coordination) -> int:
    for _ in range(_ATTEMPTS):
        entry = await coord.get(RUN_COUNTER)
        number = int(entry.value) + 1 if entry else 1
        try:
            await coord.commit(
                [Write(RUN_COUNTER, str(number).encode())],
                compares=[Compare(RUN_COUNTER, entry.revision if entry else 0)],
            )
        except Conflict:
            continue
        return number
    raise Conflict("too many runs are being started at once; try again")
