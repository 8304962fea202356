"""Plays a scenario: a script of events, with what the scheduler said to each written under it.

::

    rules attempts=2 chunks=1            the numbers of the run; share=0.1% bytes=1000 place_attempts=3 seed=7
    phases survey-0:2 resolve-0:1 main:2 persist:1
    begin                                epoch 1; ``restart`` begins again from what was recorded, in the next epoch
    join a 2                             node a, with room for two tasks
    lose a
    done main/0 by a rows=10 bad=1       the answer to the newest grant of main/0 to a; ``#1`` and ``epoch=1`` for an
                                         older one; schema=int64 bytes=100
    fail main/0 by a work TransformError boom
    fail main/0 by a place StoreError full       (``for-good`` before the kind: no other attempt would help)
    pause, run, stop
    at 2.5                               the time, which is also told by a tick

Lines that begin with ``>`` are what came out; the rest is kept as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from millrace.core.messages import Control, Failure, Grant, Phase, TaskDone, TaskFacts, TaskFailed, TaskId
from millrace.core.model import digest_of
from millrace.core.units import parse_share
from millrace.decide.scheduler import (
    Cancel,
    Command,
    ControlChanged,
    EnterPhase,
    Event,
    Finish,
    NodeJoined,
    NodeLost,
    Record,
    Restored,
    RunState,
    SchedulerRules,
    SetAside,
    Tick,
    begin,
    step,
)

Play = Callable[[str], str]


@pytest.fixture
def play() -> Play:
    """Plays a script; gives it back with what came out."""
    return _play


@dataclass
class _Stage:
    """What a script has set up so far."""

    rules: SchedulerRules = field(default_factory=SchedulerRules)
    phases: tuple[Phase, ...] = ()
    epoch: int = 0
    now_s: float = 0.0
    state: RunState | None = None
    grants: dict[tuple[TaskId, str], Grant] = field(default_factory=dict)
    done: dict[str, dict[int, TaskFacts]] = field(default_factory=dict)
    aside: dict[str, dict[int, Failure]] = field(default_factory=dict)


def _play(script: str) -> str:
    """The script with what came out, in place of what stood there."""
    stage = _Stage()
    lines: list[str] = []
    for line in script.splitlines():
        if line.startswith(">"):
            continue
        lines.append(line)
        words = line.partition("--")[0].split()
        if words:
            lines += [f"> {said}" for said in _react(stage, words)]
    return "\n".join(lines) + "\n"


def _tell(command: Command) -> str:
    """One command, so that it can be read aloud."""
    match command:
        case Grant(task, node, attempt):
            return f"grant {_name(task)} #{attempt} to {node}"
        case Record(task, facts):
            return f"record {_name(task)}" + (f", {facts.rows_in} rows" if facts.rows_in else "")
        case SetAside(task, failure):
            return f"set aside {_name(task)}: {failure.message}"
        case EnterPhase(phase):
            return f"enter {phase.name}, {phase.tasks} task{'' if phase.tasks == 1 else 's'}"
        case Cancel():
            return "cancel what is in flight"
        case Finish(state, failure):
            return f"finish: {state}" + (f", {failure.kind}: {failure.message}" if failure else "")


def _name(task: TaskId) -> str:
    return f"{task.phase}/{task.index}"


def _react(stage: _Stage, words: list[str]) -> Iterator[str]:
    match words:
        case ["rules", *numbers]:
            stage.rules = _rules(numbers)
            return
        case ["phases", *names]:
            stage.phases = tuple(_phase(n) for n in names)
            return
        case ["begin" | "restart"]:
            commands = _begin(stage)
        case ["at", seconds]:
            stage.now_s = float(seconds)
            commands = _step(stage, Tick())
        case _:
            commands = _step(stage, _event(stage, words))
    for command in commands:
        if isinstance(command, Grant):
            stage.grants[command.task, command.node] = command
        elif isinstance(command, Record):
            stage.done.setdefault(command.task.phase, {})[command.task.index] = command.facts
        elif isinstance(command, SetAside):
            stage.aside.setdefault(command.task.phase, {})[command.task.index] = command.failure
        yield _tell(command)
    if not commands:
        yield "nothing"
    if stage.state is not None and stage.state.wake_at is not None and stage.state.finished is None:
        yield f"(waiting until {stage.state.wake_at:.2f})"


def _begin(stage: _Stage) -> list[Command]:
    stage.epoch += 1
    restored = [
        Restored(p.name, tuple(stage.done.get(p.name, {}).items()), tuple(stage.aside.get(p.name, {}).items()))
        for p in stage.phases
    ]
    stage.state, commands = begin(stage.phases, stage.rules, epoch=stage.epoch, restored=restored)
    return commands


def _step(stage: _Stage, event: Event) -> list[Command]:
    assert stage.state is not None, "the script has not begun yet"
    stage.state, commands = step(stage.state, event, stage.now_s)
    return commands


def _event(stage: _Stage, words: list[str]) -> Event:
    match words:
        case ["join", node, slots]:
            return NodeJoined(node, int(slots))
        case ["lose", node]:
            return NodeLost(node)
        case ["pause" | "run" | "stop" as control]:
            return ControlChanged(Control(control))
        case ["done", task, "by", node, *details]:
            values = dict(d.split("=") for d in details if "=" in d)
            facts = TaskFacts(
                output=digest_of(task.encode()),
                schema=values.get("schema", ""),
                rows_in=int(values.get("rows", 0)),
                bytes_in=int(values.get("bytes", 0)),
                quarantined=int(values.get("bad", 0)),
                first_quarantined=values.get("first", ""),
            )
            return TaskDone(_grant(stage, task, node, details), facts)
        case ["fail", task, "by", node, *details]:
            grant = _grant(stage, task, node, details)
            blame, *rest = [d for d in details if not d.startswith(("#", "epoch="))]
            retryable = rest[0] != "for-good"
            kind, *message = rest if retryable else rest[1:]
            return TaskFailed(grant, Failure(kind, " ".join(message), retryable, blame))
        case _:
            raise ValueError(f"no such event: {' '.join(words)}")


def _grant(stage: _Stage, task: str, node: str, details: list[str]) -> Grant:
    phase, _, index = task.rpartition("/")
    grant = stage.grants[TaskId(phase, int(index)), node]
    for detail in details:
        if detail.startswith("#"):
            grant = dataclasses.replace(grant, attempt=int(detail[1:]))
        elif detail.startswith("epoch="):
            grant = dataclasses.replace(grant, epoch=int(detail.removeprefix("epoch=")))
    return grant


def _rules(numbers: list[str]) -> SchedulerRules:
    values = dict(n.split("=") for n in numbers)
    rules = SchedulerRules(
        attempts=int(values.pop("attempts", 3)),
        place_attempts=int(values.pop("place_attempts", 8)),
        quarantine_share=parse_share(values.pop("share", "0")),
        quarantine_chunks=int(values.pop("chunks", 0)),
        bytes_total=int(values.pop("bytes", 0)),
        order_seed=int(seed) if (seed := values.pop("seed", None)) else None,
    )
    assert not values, f"no such rules: {values}"
    return rules


def _phase(name: str) -> Phase:
    kind, _, tasks = name.partition(":")
    kind, _, barrier = kind.partition("-")
    return Phase(kind, int(barrier or 0), int(tasks))
