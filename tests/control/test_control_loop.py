"""The control loop: decide, make it durable, then send; whatever an operator, a thief or a fault does meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from millrace.control.ledger import Ledger
from millrace.control.loop import Ended, RunLoop, read_control
from millrace.coord.memory import MemoryCoordination
from millrace.core.errors import CoordError, Fenced
from millrace.core.facts import RunProgress, decode
from millrace.core.keys import run_control, run_lease, run_prefix, run_progress
from millrace.core.messages import Control, Failure, Grant, NodeEvent, Phase, TaskDone, TaskFacts, TaskFailed, TaskId
from millrace.core.model import digest_of
from millrace.core.ports import Change, Compare, Entry, Lease, Write
from millrace.decide.scheduler import SchedulerRules

RUN = 7
PHASES = (Phase("survey", 0, 3), Phase("resolve", 0, 1), Phase("main", 0, 5), Phase("persist", 0, 1))
SHORT = (Phase("main", 0, 4), Phase("persist", 0, 1))
Answer = Callable[[Grant], Awaitable[NodeEvent]]


class WatchedCoordination(MemoryCoordination):
    """Tells when a key was read, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: dict[str, int] = {}
        self.fail_commit_of = ""
        self.fail_watch = False

    async def get(self, key: str) -> Entry | None:
        found = await super().get(key)
        self.reads[key] = self.reads.get(key, 0) + 1
        return found

    async def commit(
        self, writes: Sequence[Write], *, compares: Sequence[Compare] = (), guard: Lease | None = None
    ) -> int:
        if self.fail_commit_of and any(self.fail_commit_of in w.key for w in writes):
            raise CoordError("the disk under the coordination store is full; make room")
        return await super().commit(writes, compares=compares, guard=guard)

    def watch(self, prefix: str, *, since_revision: int = 0) -> AsyncIterator[Change]:
        if self.fail_watch:
            raise CoordError("the coordination store can't be watched")
        return super().watch(prefix, since_revision=since_revision)


@dataclass
class Bench:
    """A loop with all that it stands on."""

    clock: Any
    fleet: Any
    coord: WatchedCoordination = field(default_factory=WatchedCoordination)
    seen: list[RunProgress] = field(default_factory=list)
    loop: RunLoop | None = None

    async def make(self, phases: Sequence[Phase] = SHORT, **rules: Any) -> RunLoop:
        """A loop that holds the run's lease, new or again."""
        lease = await self.coord.acquire(run_lease(RUN), "me", 10_000, now_ms=self.clock.now_ms())
        self.loop = RunLoop(
            RUN,
            phases,
            SchedulerRules(**rules),
            coord=self.coord,
            fleet=self.fleet,
            clock=self.clock,
            lease=lease,
            node="local",
            slots=2,
            observe=self.seen.append,
        )
        return self.loop

    async def until(self, holds: Callable[[], bool]) -> None:
        """Give way to the loop until something is so."""
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.001)

    async def tell(self, control: Control) -> None:
        """Ask as another terminal does."""
        await self.coord.commit([Write(run_control(RUN), control.encode())])

    async def ask(self, control: Control) -> None:
        """Ask, and wait until a loop that is held back has decided on it."""
        before = self.coord.reads.get(run_control(RUN), 0)
        await self.tell(control)
        await self.until(lambda: self.coord.reads.get(run_control(RUN), 0) > before)
        rounds = len(self.seen)
        await self.until(lambda: len(self.seen) > rounds)

    async def recorded(self, phases: Sequence[Phase] = SHORT) -> dict[str, list[int]]:
        """What the ledger holds, read as another process would."""
        lease = await self.coord.holder(run_lease(RUN)) or Lease("x", "x", 1, 1)
        found = await Ledger(RUN, self.coord, lease).load(phases)
        return {name: [i for i, _ in done.done] for name, done in found.items()}


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            await scenario()

    asyncio.run(main())


def failing(times: dict[TaskId, list[Failure]]) -> Answer:
    """Fails a task with these, one after the other, before it is done."""

    async def answer(grant: Grant) -> NodeEvent:
        left = times.get(grant.task)
        if left:
            return TaskFailed(grant, left.pop(0))
        return await _done(grant)

    return answer


async def _done(grant: Grant) -> NodeEvent:
    return TaskDone(grant, TaskFacts(digest_of(f"{grant.task}".encode()), rows_in=10, bytes_in=100))


# --- to the end -----------------------------------------------------------------------------------------


def test_a_clean_run_goes_through_every_phase_and_is_all_in_the_ledger(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        loop = await bench.make(PHASES, bytes_total=500)
        ended = await loop.run()
        assert (ended.state, ended.failure, ended.interrupted, ended.set_aside) == ("done", None, False, ())
        assert (ended.totals.done, ended.totals.rows_out, ended.totals.replicas) == (5, 45, 15)
        assert ended.persisted is not None
        assert (ended.persisted.pages, ended.persisted.meta_pages) == ((b"page",), (b"meta",))
        assert ended.notes == ("a note",)
        assert [i.phase for i in bench.fleet.entered] == [p.name for p in PHASES]
        assert [len(i.of(name)) for i in bench.fleet.entered for name, _ in i.outputs] == [3, 1, 5]
        assert await bench.recorded(PHASES) == {p.name: list(range(p.tasks)) for p in PHASES}
        assert len(loop.stage_facts()) == 10
        assert bench.fleet.closed

    play(scenario)


def test_grants_go_out_only_after_what_they_follow_from_is_durable(clock: Any, make_fleet: Any) -> None:
    """When the fleet hears of a phase, a reader of the store finds every task of the one before."""

    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        complete: list[bool] = []
        enter = bench.fleet.enter

        async def checked(inputs: Any) -> None:
            names = [p.name for p in PHASES]
            earlier = names[: names.index(inputs.phase)]
            there = await bench.recorded(PHASES)
            complete.append(all(len(there[p.name]) == p.tasks for p in PHASES if p.name in earlier))
            await enter(inputs)

        bench.fleet.enter = checked
        await (await bench.make(PHASES)).run()
        assert complete == [True] * len(PHASES)

    play(scenario)


def test_failures_are_tried_again_and_set_aside_within_the_allowance(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        boom = Failure("TransformError", "boom", True, "work")
        gone = Failure("Unavailable", "store a: refused", True, "place")
        times = {TaskId("main", 1): [boom] * 3, TaskId("main", 2): [gone, boom, gone]}
        bench = Bench(clock, make_fleet(answer=failing(times)))
        ended = await (await bench.make(SHORT, attempts=3, quarantine_chunks=1)).run()
        assert ended.state == "done"
        assert ended.set_aside == ((1, boom),)
        assert "chunk 1 was set aside: boom" in ended.notes
        assert await bench.recorded() == {"main": [0, 2, 3], "persist": [0]}
        attempts = [g.attempt for g in bench.fleet.sent if g.task == TaskId("main", 2)]
        assert attempts == [1, 2, 3, 4]

    play(scenario)


def test_a_fatal_failure_ends_the_run_with_its_sentence(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        changed = Failure("SourceChanged", "a.txt changed", False, "work", 1)
        bench = Bench(clock, make_fleet(answer=failing({TaskId("main", 1): [changed]})))
        ended = await (await bench.make()).run()
        assert (ended.state, ended.failure, ended.persisted, ended.interrupted) == ("failed", changed, None, False)
        assert bench.fleet.closed

    play(scenario)


# --- operators ------------------------------------------------------------------------------------------


def test_pause_lets_what_is_in_flight_finish_and_grants_nothing_until_run(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.fleet.sent) == 2)
        await bench.ask(Control.PAUSE)
        bench.fleet.release()
        await bench.until(lambda: bench.seen[-1].done == 2)
        rounds = len(bench.seen)
        await bench.until(lambda: len(bench.seen) >= rounds + 2)
        assert len(bench.fleet.sent) == 2
        await bench.tell(Control.RUN)
        assert (await running).state == "done"

    play(scenario)


def test_a_run_that_was_paused_before_it_began_waits(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        await bench.coord.commit([Write(run_control(RUN), Control.PAUSE.encode())])
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.seen) >= 3)
        assert bench.fleet.sent == []
        await bench.tell(Control.RUN)
        assert (await running).state == "done"

    play(scenario)


def test_stop_drains_what_is_in_flight(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.fleet.sent) == 2)
        await bench.ask(Control.STOP)
        assert not running.done()
        bench.fleet.release()
        ended = await running
        assert (ended.state, ended.interrupted, ended.totals.done) == ("stopped", False, 2)
        assert (await bench.recorded())["main"] == [0, 1]
        assert bench.fleet.closed

    play(scenario)


def test_interrupt_abandons_what_is_in_flight_and_keeps_the_ledger(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        loop = await bench.make()

        async def first_two_only(grant: Grant) -> NodeEvent:
            if len(bench.fleet.sent) >= 3:
                await asyncio.Event().wait()  # hangs
            return await _done(grant)

        bench.fleet._answer = first_two_only
        running = asyncio.create_task(loop.run())
        await bench.until(lambda: len(bench.fleet.sent) >= 3 and bench.fleet.in_flight == 2)
        loop.interrupt()
        ended = await running
        assert (ended.state, ended.interrupted) == ("stopped", True)
        assert bench.fleet.closed
        assert bench.fleet.in_flight == 0
        done = (await bench.recorded())["main"]
        assert len(done) == ended.totals.done > 0

        bench.fleet = make_fleet()
        again = await (await bench.make()).run()
        assert again.state == "done"
        assert again.totals.done == 4
        assert {g.task.index for g in bench.fleet.sent if g.task.phase == "main"} == set(range(4)) - set(done)

    play(scenario)


def test_a_control_key_that_says_nothing_known_is_an_error(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        await bench.coord.commit([Write(run_control(RUN), b"dance")])
        with pytest.raises(CoordError, match="holds 'dance', which is not run, pause or stop"):
            await (await bench.make()).run()
        assert bench.fleet.closed
        assert await read_control(bench.coord, 8) is Control.RUN

    play(scenario)


# --- thieves and faults ---------------------------------------------------------------------------------


def _run_keys(entries: Sequence[Entry]) -> dict[str, int]:
    return {e.key: e.revision for e in entries}


@pytest.mark.parametrize("idle", [False, True])
def test_a_loop_whose_lease_was_taken_over_is_fenced_and_writes_nothing_more(
    idle: bool, clock: Any, make_fleet: Any
) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.fleet.sent) == 2)
        await bench.coord.acquire(run_lease(RUN), "thief", 10_000, now_ms=clock.now_ms(), steal=True)
        before = _run_keys(await bench.coord.list(run_prefix(RUN)))
        if not idle:
            bench.fleet.release()
        with pytest.raises(Fenced):
            await running
        assert _run_keys(await bench.coord.list(run_prefix(RUN))) == before
        assert bench.fleet.closed

    play(scenario)


def test_a_store_that_fails_under_the_ledger_ends_the_run(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        bench.coord.fail_commit_of = "/ledger/"
        with pytest.raises(CoordError, match="make room"):
            await (await bench.make()).run()
        assert bench.fleet.closed
        assert len(bench.fleet.sent) == 2  # nothing follows from what is not durable

    play(scenario)


def test_a_watch_that_fails_ends_the_run(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        bench.coord.fail_watch = True
        with pytest.raises(CoordError, match="can't be watched"):
            await (await bench.make()).run()
        assert bench.fleet.closed

    play(scenario)


def test_a_fleet_that_fails_ends_the_run(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.fleet.sent) == 2)
        bench.fleet.fail(RuntimeError("the fleet's own fault"))
        with pytest.raises(RuntimeError, match="own fault"):
            await running
        assert bench.fleet.closed

    play(scenario)


def test_a_loop_that_is_cancelled_leaves_no_task_behind(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet(held=True))
        running = asyncio.create_task((await bench.make()).run())
        await bench.until(lambda: len(bench.fleet.sent) == 2)
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert bench.fleet.closed
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scenario)


# --- what others see ------------------------------------------------------------------------------------


def test_progress_is_published_and_shown(clock: Any, make_fleet: Any) -> None:
    async def scenario() -> None:
        bench = Bench(clock, make_fleet())
        ended: Ended = await (await bench.make(SHORT, bytes_total=400)).run()
        assert ended.state == "done"
        entry = await bench.coord.get(run_progress(RUN))
        assert entry is not None
        published = decode(RunProgress, entry.value, key=entry.key)
        assert (published.bytes_total, published.workers) == (400, 2)
        assert (bench.seen[0].done, bench.seen[-1].phase) == (0, "persist")
        assert [p.bytes_done for p in bench.seen] == sorted(p.bytes_done for p in bench.seen)
        assert bench.seen[-1].bytes_done == 400

    play(scenario)
