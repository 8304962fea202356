"""The control loop of one run: take in events, decide, commit, send. In that order, always.

What ``decide.scheduler`` says is done becomes durable in the ledger before anything that follows from it is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from millrace.control.ledger import Ledger
from millrace.control.progress import ProgressMeter
from millrace.core.errors import CoordError, Fenced
from millrace.core.facts import RunProgress, encode
from millrace.core.keys import run_control, run_progress
from millrace.core.messages import Control, Failure, Grant, Phase, TaskDone, TaskFacts
from millrace.core.ports import Clock, Coordination, Fleet, Lease, Write
from millrace.decide.scheduler import (
    Command,
    ControlChanged,
    EnterPhase,
    Event,
    Finish,
    NodeJoined,
    Record,
    Restored,
    RunState,
    SchedulerRules,
    SetAside,
    Tick,
    Totals,
    begin,
    step,
)

__all__ = ["LEASE_TTL_MS", "Ended", "RunLoop", "read_control"]

LEASE_TTL_MS = 10_000
_RENEW_S = 2.0
_TICK_S = 0.2
_PUBLISH_S = 1.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run's loop ended.

    Attributes:
        state: ``done``, ``stopped`` or ``failed``.
        persisted: Of a run that is done: what ``persist`` came back with, replica pages and all.
        set_aside: Chunks within what ``quarantine.chunks`` allows, and why.
        notes: What went wrong on the way without stopping it, each once.
        interrupted: Whether a signal ended it.
    """

    state: str
    failure: Failure | None
    totals: Totals
    persisted: TaskFacts | None
    set_aside: tuple[tuple[int, Failure], ...]
    notes: tuple[str, ...]
    interrupted: bool


async def read_control(coord: Coordination, run: int) -> Control:
    """What an operator last asked of a run.

    Raises:
        CoordError: the key holds something else.
    """
    entry = await coord.get(run_control(run))
    asked = entry.value.decode(errors="replace") if entry else Control.RUN
    try:
        return Control(asked)
    except ValueError as error:
        raise CoordError(f"{run_control(run)} holds {asked!r}, which is not run, pause or stop") from error


class RunLoop:
    """Drives one run to its end.

    Args:
        run: Its id.
        phases: In order.
        rules: What the scheduler goes by.
        bytes_total: Of input, for the progress.
        lease: The run's lease, already held; renewed here.
        also_renew: Other leases to keep alive: that of the dataset.
        observe: Called with every new progress, several times a second.
    """

    def __init__(
        self,
        run: int,
        phases: Sequence[Phase],
        rules: SchedulerRules,
        *,
        coord: Coordination,
        fleet: Fleet,
        clock: Clock,
        lease: Lease,
        node: str,
        slots: int,
        observe: Callable[[RunProgress], None],
        also_renew: Sequence[Lease] = (),
    ) -> None:
        self._run = run
        self._phases = tuple(phases)
        self._rules = rules
        self._coord = coord
        self._fleet = fleet
        self._clock = clock
        self._lease = lease
        self._others = list(also_renew)
        self._node = NodeJoined(node, slots)
        self._ledger = Ledger(run, coord, lease)
        self._meter = ProgressMeter(self._phases, rules.bytes_total, slots, clock)
        self._observe = observe
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._interrupted = False
        self._persisted: TaskFacts | None = None
        self._notes: dict[str, None] = {}

    def interrupt(self) -> None:
        """Stop now: what is in flight is abandoned, what is in the ledger stays. May be called from a signal."""
        self._interrupted = True
        self._inbox.put_nowait(Tick())

    async def run(self) -> Ended:
        """Until the work is done, stopped or failed.

        Raises:
            Fenced: another process took the run over.
            CoordError: the coordination store failed.
        """
        try:
            async with _tasks(self._renew(), self._watch_control(), self._listen()) as background:
                state = await self._start()
                while state.finished is None and not self._interrupted:
                    events = await self._next(state, background)
                    commands: list[Command] = []
                    for event in events:
                        state, more = step(state, event, self._clock.monotonic_s())
                        commands += more
                    await self._obey(commands)
                    await self._publish(state)
        finally:
            await self._fleet.aclose()
        finished = state.finished or Finish("stopped")
        return Ended(
            state=finished.state,
            failure=finished.failure,
            totals=state.totals,
            persisted=self._persisted,
            set_aside=tuple(sorted(state.set_aside.items())),
            notes=tuple(self._notes),
            interrupted=state.finished is None,
        )

    def stage_facts(self) -> list[TaskFacts]:
        """The facts of every finished task of every phase: what reports sum up."""
        return [facts for phase in self._phases for _, facts in self._ledger.facts(phase)]

    # --- the loop's parts -----------------------------------------------------------------------------

    async def _start(self) -> RunState:
        found = await self._ledger.load(self._phases)
        # persist is quick and gives back more than the ledger keeps, so it is always done again.
        restored = [Restored(name, d.done, d.set_aside) for name, d in found.items() if name != "persist"]
        state, commands = begin(self._phases, self._rules, epoch=self._lease.epoch, restored=restored)
        control = await read_control(self._coord, self._run)
        for event in (ControlChanged(control), self._node):
            state, more = step(state, event, self._clock.monotonic_s())
            commands += more
        await self._obey(commands)
        await self._publish(state)
        return state

    async def _next(self, state: RunState, background: Sequence[asyncio.Task[None]]) -> list[Event]:
        """Wait for something to happen, or for the time when something is due."""
        now = self._clock.monotonic_s()
        wait_s = _TICK_S if state.wake_at is None else max(0.0, min(_TICK_S, state.wake_at - now))
        try:
            events = [await asyncio.wait_for(self._inbox.get(), wait_s)]
        except TimeoutError:
            events = [Tick()]
        while not self._inbox.empty():
            events.append(self._inbox.get_nowait())
        for task in background:
            if task.done():
                task.result()
        return events

    async def _obey(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Record(task, facts):
                    self._ledger.record(task, replace(facts, pages=(), meta_pages=()))
                    if task.phase == "persist":
                        self._persisted = facts
                    self._notes.update(dict.fromkeys(facts.notes))
                case SetAside(task, failure):
                    self._ledger.set_aside(task, failure)
                    self._notes[f"chunk {task.index} was set aside: {failure.message}"] = None
        await self._ledger.commit()
        for command in commands:
            match command:
                case EnterPhase(phase):
                    self._meter.enter(phase)
                    await self._fleet.enter(self._ledger.inputs(phase, self._phases))
                case Grant():
                    await self._fleet.send(command)

    async def _publish(self, state: RunState) -> None:
        progress = self._meter.read(state)
        self._observe(progress)
        if self._meter.due(_PUBLISH_S):
            await self._coord.commit([Write(run_progress(self._run), encode(progress))], guard=self._lease)

    # --- beside the loop ------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            for event in await self._fleet.events():
                if isinstance(event, TaskDone):
                    self._meter.finished(event)
                self._inbox.put_nowait(event)

    async def _watch_control(self) -> None:
        async for _ in self._coord.watch(run_control(self._run)):
            self._inbox.put_nowait(ControlChanged(await read_control(self._coord, self._run)))

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                for lease in (self._lease, *self._others):
                    await self._coord.renew(lease, LEASE_TTL_MS, now_ms=self._clock.now_ms())
            except Fenced as error:
                raise Fenced(
                    f"run {self._run} was taken over by another process; this one stops without changing anything"
                ) from error


@contextlib.asynccontextmanager
async def _tasks(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Background tasks that end with the block; the caller looks at them for errors."""
    tasks = [asyncio.create_task(c) for c in coroutines]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
