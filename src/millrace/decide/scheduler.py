"""Which task runs where and when, and when a run is over: ``step(state, event, now) -> (state, commands)``.

The control loop, the tests and the simulator run this same function. It does no I/O and reads no clock; ``step``
takes the state over and gives it back (the caller keeps no other reference), so that a step costs O(log tasks)
instead of a copy.

A run is a sequence of phases; a phase is a number of tasks that may run in any order, on any node. A task's answer
is accepted once. Only failures the work itself is to blame for count against its attempts; a store or a node that
fails costs a wait. Every wait and every number of attempts has a bound.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from millrace.core.messages import Control, Failure, Grant, Phase, TaskDone, TaskFacts, TaskFailed, TaskId

__all__ = [
    "Cancel",
    "Command",
    "ControlChanged",
    "EnterPhase",
    "Event",
    "Finish",
    "NodeJoined",
    "NodeLost",
    "Record",
    "Restored",
    "RunState",
    "SchedulerRules",
    "SetAside",
    "Tick",
    "Totals",
    "begin",
    "step",
]

_FATAL: Final = frozenset({"SourceChanged", "Nondeterministic", "PolicyRefused", "SpecError", "Fenced"})
"""Failures that no other attempt and no other node would change, and that speak of the whole run."""

_PENDING, _GRANTED, _DONE, _SET_ASIDE = range(4)
_EARLY_CHUNKS: Final = 10


# --- what it is told ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeJoined:
    """A node is there, with room for that many tasks at once."""

    node: str
    slots: int


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node is gone; what it held is granted again."""

    node: str


@dataclass(frozen=True, slots=True)
class Restored:
    """The ledger of an earlier attempt at this run: what is done already."""

    phase: str
    done: tuple[tuple[int, TaskFacts], ...]
    set_aside: tuple[tuple[int, Failure], ...] = ()


@dataclass(frozen=True, slots=True)
class ControlChanged:
    """An operator asked for something."""

    control: Control


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; waits may be over."""


Event = NodeJoined | NodeLost | Restored | ControlChanged | Tick | TaskDone | TaskFailed


# --- what it says -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """Put this task's facts into the ledger."""

    task: TaskId
    facts: TaskFacts


@dataclass(frozen=True, slots=True)
class SetAside:
    """Put into the ledger that this chunk is quarantined, within what the spec allows."""

    task: TaskId
    failure: Failure


@dataclass(frozen=True, slots=True)
class EnterPhase:
    """The phase before is complete; its tasks' facts are all in the ledger."""

    phase: Phase


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop what is in flight: its answers no longer matter."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The run is over: ``done``, ``stopped`` or ``failed`` (then ``failure`` says of what)."""

    state: str
    failure: Failure | None = None


Command = Grant | Record | SetAside | EnterPhase | Cancel | Finish


# --- what it knows ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SchedulerRules:
    """The numbers a run is scheduled by.

    Attributes:
        attempts: Tries at a task before the work itself is blamed for good.
        place_attempts: Tries at a task that stores or nodes failed.
        quarantine_share: Share of records that may be bad, 0 to 1.
        quarantine_chunks: Chunks that may be set aside.
        bytes_total: Of input, for the early check of the share.
        backoff_s, backoff_max_s: First and longest wait before a task is tried again.
        order_seed: Grant tasks in this pseudo-random order instead of by index. The result must not differ.
    """

    attempts: int = 3
    place_attempts: int = 8
    quarantine_share: float = 0.0
    quarantine_chunks: int = 0
    bytes_total: int = 0
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    order_seed: int | None = None


@dataclass(slots=True)
class Totals:
    """Sums over the ``main`` phase, for the report."""

    rows_in: int = 0
    rows_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    shards: int = 0
    replicas: int = 0
    duplicates: int = 0
    quarantined: int = 0
    done: int = 0

    def add(self, facts: TaskFacts) -> None:
        """Count one finished chunk."""
        self.rows_in += facts.rows_in
        self.rows_out += facts.rows_out
        self.bytes_in += facts.bytes_in
        self.bytes_out += facts.bytes_out
        self.shards += facts.shards
        self.replicas += facts.replicas
        self.duplicates += facts.duplicates
        self.quarantined += facts.quarantined
        self.done += 1


@dataclass(slots=True)
class _Node:
    slots: int
    held: dict[TaskId, Grant] = field(default_factory=dict)


@dataclass(slots=True)
class _Tries:
    attempt: int = 0
    by_work: int = 0
    by_place: int = 0


@dataclass(slots=True)
class RunState:
    """All the scheduler knows of one run. Owned by whoever calls ``step``; read it, never change it."""

    phases: tuple[Phase, ...]
    rules: SchedulerRules
    epoch: int
    phase_no: int = 0
    control: Control = Control.RUN
    totals: Totals = field(default_factory=Totals)
    done_in_phase: int = 0
    set_aside: dict[int, Failure] = field(default_factory=dict)
    finished: Finish | None = None
    schema: tuple[str, int] | None = None
    first_quarantined: str = ""
    _status: bytearray = field(default_factory=bytearray)
    _ready: list[tuple[int, int]] = field(default_factory=list)
    _waiting: list[tuple[float, int]] = field(default_factory=list)
    _tries: dict[int, _Tries] = field(default_factory=dict)
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _restored: dict[str, Restored] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        """The phase at hand."""
        return self.phases[self.phase_no]

    @property
    def in_flight(self) -> int:
        """Tasks granted and not yet answered."""
        return sum(len(n.held) for n in self._nodes.values())

    @property
    def wake_at(self) -> float | None:
        """When the next wait is over, by the caller's clock; None if nothing waits."""
        return self._waiting[0][0] if self._waiting else None


def begin(
    phases: Iterable[Phase], rules: SchedulerRules, *, epoch: int, restored: Iterable[Restored] = ()
) -> tuple[RunState, list[Command]]:
    """The state of a run that is about to start, or to go on from its ledger.

    Args:
        phases: In order.
        rules: See there.
        epoch: The run lease's fencing epoch; every grant carries it.
        restored: What the ledger of each phase holds.
    """
    state = RunState(tuple(phases), rules, epoch)
    for earlier in restored:
        state._restored[earlier.phase] = earlier
    commands: list[Command] = []
    _enter(state, 0, commands)
    return state, commands


def step(state: RunState, event: Event, now_s: float) -> tuple[RunState, list[Command]]:
    """Take in one event and decide.

    Args:
        state: From ``begin`` or the last ``step``; taken over.
        event: What happened.
        now_s: The time, on a clock that never goes back.

    Returns:
        The state to keep, and what to do, in order.
    """
    commands: list[Command] = []
    if state.finished is not None:
        return state, commands
    match event:
        case NodeJoined(node, slots):
            _lose(state, node)  # one that is known joins again: its process is another, and what it held is gone
            state._nodes[node] = _Node(slots)
        case NodeLost(node):
            _lose(state, node)
        case ControlChanged(control):
            state.control = control
        case TaskDone():
            _on_done(state, event, commands)
        case TaskFailed():
            _on_failed(state, event, now_s, commands)
        case Restored():
            raise ValueError("a ledger is restored by begin(), before the first step")
        case Tick():
            pass
    if state.finished is None:
        _grant(state, now_s, commands)
    return state, commands


def _lose(state: RunState, node: str) -> None:
    """What a node held is granted again; its answers may still come, and may still be good."""
    lost = state._nodes.pop(node, None)
    for task in sorted(lost.held, key=lambda t: t.index) if lost else ():
        if task.phase == state.phase.name and state._status[task.index] == _GRANTED:
            _again(state, task.index)


# --- phases -------------------------------------------------------------------------------------------


def _enter(state: RunState, number: int, commands: list[Command]) -> None:
    """Begin a phase; pass over it at once if the ledger says it is complete."""
    while True:
        state.phase_no = number
        phase = state.phase
        state._status = bytearray(phase.tasks)
        state._tries = {}
        state._waiting = []
        state.done_in_phase = 0
        earlier = state._restored.pop(phase.name, None)
        for index, failure in earlier.set_aside if earlier else ():
            state.set_aside[index] = failure
        if phase.kind in {"survey", "main"}:
            for index in state.set_aside:
                state._status[index] = _SET_ASIDE
                state.done_in_phase += 1
        for index, facts in earlier.done if earlier else ():
            if state._status[index] == _PENDING:
                state._status[index] = _DONE
                state.done_in_phase += 1
                _count(state, phase, facts, index)
        commands.append(EnterPhase(phase))
        state._ready = [(_rank(state, phase, i), i) for i in range(phase.tasks) if state._status[i] == _PENDING]
        heapq.heapify(state._ready)
        if state.done_in_phase < phase.tasks or state.finished is not None:
            return
        if not _leave(state, commands):
            return
        number += 1


def _leave(state: RunState, commands: list[Command]) -> bool:
    """The phase is complete: may the next one begin? Otherwise the run is over."""
    if state.phase.kind == "main" and _too_many_bad(state, final=True):
        _fail(state, _exceeded(state), commands)
        return False
    if state.phase_no + 1 == len(state.phases):
        state.finished = Finish("done")
        commands.append(state.finished)
        return False
    return True


def _rank(state: RunState, phase: Phase, index: int) -> int:
    seed = state.rules.order_seed
    if seed is None:
        return index
    return int.from_bytes(hashlib.sha256(f"{seed}/{phase.name}/{index}".encode()).digest()[:8], "big")


# --- answers ------------------------------------------------------------------------------------------


def _on_done(state: RunState, event: TaskDone, commands: list[Command]) -> None:
    index = event.grant.task.index
    _release(state, event.grant)
    if not _take_back(state, event.grant):
        return
    conflict = _schema_conflict(state, event.facts, index)
    if conflict is not None:
        _fail(state, conflict, commands)
        return
    state._status[index] = _DONE
    state.done_in_phase += 1
    state._tries.pop(index, None)
    _count(state, state.phase, event.facts, index)
    commands.append(Record(event.grant.task, event.facts))
    if state.phase.kind == "main" and _too_many_bad(state, final=False):
        _fail(state, _exceeded(state), commands)
        return
    _advance(state, commands)


def _on_failed(state: RunState, event: TaskFailed, now_s: float, commands: list[Command]) -> None:
    index, failure = event.grant.task.index, event.failure
    # Work done under an older grant is as good as any. A failure under one says nothing of the attempt at hand.
    if not _release(state, event.grant) or not _take_back(state, event.grant):
        return
    tries = state._tries.setdefault(index, _Tries())
    if failure.blame == "work":
        tries.by_work += 1
    else:
        tries.by_place += 1
    if failure.kind in _FATAL:
        _fail(state, failure, commands)
    elif failure.blame != "work":
        if failure.retryable and tries.by_place < state.rules.place_attempts:
            _later(state, index, tries.by_place, now_s)
        else:
            _fail(state, failure, commands)
    elif failure.retryable and tries.by_work < state.rules.attempts:
        _later(state, index, tries.by_work, now_s)
    elif state.phase.kind not in {"survey", "main"}:
        _fail(state, failure, commands)
    else:
        _set_aside(state, event.grant.task, failure, commands)


def _set_aside(state: RunState, task: TaskId, failure: Failure, commands: list[Command]) -> None:
    if len(state.set_aside) >= state.rules.quarantine_chunks:
        allowed = state.rules.quarantine_chunks
        sentence = f"{failure.message} (quarantine.chunks allows {allowed} such chunk{'' if allowed == 1 else 's'})"
        _fail(state, Failure(failure.kind, sentence, False, "work", failure.exit_code), commands)
        return
    state.set_aside[task.index] = failure
    state._status[task.index] = _SET_ASIDE
    state.done_in_phase += 1
    commands.append(SetAside(task, failure))
    _advance(state, commands)


def _release(state: RunState, grant: Grant) -> bool:
    """Free the slot that ``grant`` holds. Says whether it held one: it doesn't if its node was lost meanwhile."""
    node = state._nodes.get(grant.node)
    if node is None or node.held.get(grant.task) != grant:
        return False
    del node.held[grant.task]
    return True


def _take_back(state: RunState, grant: Grant) -> bool:
    """Whether this answer counts: it is of this phase, and the first one for its task."""
    return grant.task.phase == state.phase.name and state._status[grant.task.index] in {_GRANTED, _PENDING}


def _advance(state: RunState, commands: list[Command]) -> None:
    if state.done_in_phase == state.phase.tasks and _leave(state, commands):
        _enter(state, state.phase_no + 1, commands)


def _count(state: RunState, phase: Phase, facts: TaskFacts, index: int) -> None:
    if phase.kind != "main":
        return
    state.totals.add(facts)
    if facts.schema and state.schema is None:
        state.schema = (facts.schema, index)
    if facts.first_quarantined and not state.first_quarantined:
        state.first_quarantined = facts.first_quarantined


def _schema_conflict(state: RunState, facts: TaskFacts, index: int) -> Failure | None:
    if state.phase.kind != "main" or not facts.schema or state.schema is None or facts.schema == state.schema[0]:
        return None
    return Failure(
        "TransformError",
        f"chunks {state.schema[1]} and {index} came out with different columns or types: {state.schema[0]} against "
        f"{facts.schema}; make the transforms give every batch the same ones (a CAST in sql does)",
        False,
        "work",
    )


# --- quarantine ---------------------------------------------------------------------------------------


def _too_many_bad(state: RunState, *, final: bool) -> bool:
    totals = state.totals
    share = state.rules.quarantine_share * (1 + 1e-9)  # 29 of 100 are not more than 29 %, whatever floats say
    if totals.quarantined == 0 or final:
        return totals.quarantined > share * totals.rows_in
    if share == 0:
        return True
    if totals.done < _EARLY_CHUNKS or totals.bytes_in == 0:
        return False
    # Twice what the whole run would bear if the rest were as long as what was seen: no need to go on.
    rows_expected = totals.rows_in * max(1.0, state.rules.bytes_total / totals.bytes_in)
    return totals.quarantined > 2 * share * rows_expected


def _exceeded(state: RunState) -> Failure:
    totals = state.totals
    part = totals.quarantined / totals.rows_in if totals.rows_in else 1.0
    first = f"; the first: {state.first_quarantined}" if state.first_quarantined else ""
    return Failure(
        "QuarantineExceeded",
        f"{totals.quarantined} of {totals.rows_in} records ({part:.3%}) are bad and quarantine.limit allows "
        f"{state.rules.quarantine_share:.3%}{first}",
        False,
        "work",
    )


# --- grants -------------------------------------------------------------------------------------------


def _grant(state: RunState, now_s: float, commands: list[Command]) -> None:
    while state._waiting and state._waiting[0][0] <= now_s:
        index = heapq.heappop(state._waiting)[1]
        if state._status[index] == _PENDING:
            _again(state, index)
    if state.control is Control.STOP:
        if state.in_flight == 0:
            state.finished = Finish("stopped")
            commands.append(state.finished)
        return
    if state.control is Control.PAUSE:
        return
    free = [(len(n.held) - n.slots, name) for name, n in state._nodes.items() if len(n.held) < n.slots]
    heapq.heapify(free)
    while free and state._ready:
        _, index = heapq.heappop(state._ready)
        if state._status[index] != _PENDING:
            continue  # answered in the meantime by a node that was thought lost
        name = free[0][1]
        node = state._nodes[name]
        task = TaskId(state.phase.name, index)
        tries = state._tries.setdefault(index, _Tries())
        tries.attempt += 1
        state._status[index] = _GRANTED
        node.held[task] = Grant(task, name, tries.attempt, state.epoch)
        commands.append(node.held[task])
        if len(node.held) < node.slots:
            heapq.heapreplace(free, (len(node.held) - node.slots, name))
        else:
            heapq.heappop(free)


def _again(state: RunState, index: int) -> None:
    state._status[index] = _PENDING
    heapq.heappush(state._ready, (_rank(state, state.phase, index), index))


def _later(state: RunState, index: int, tries: int, now_s: float) -> None:
    """Wait with exponential backoff; the jitter is a hash, so that the same history waits the same."""
    longest = min(state.rules.backoff_max_s, state.rules.backoff_s * 2 ** (tries - 1))
    jitter = int.from_bytes(hashlib.sha256(f"{index}/{tries}".encode()).digest()[:4], "big") / 2**32
    state._status[index] = _PENDING
    heapq.heappush(state._waiting, (now_s + longest * (0.5 + jitter / 2), index))


def _fail(state: RunState, failure: Failure, commands: list[Command]) -> None:
    state.finished = Finish("failed", failure)
    commands += [Cancel(), state.finished]
