"""The numbers of the live view: bytes through every pass over the input, their rate, and when it will be done."""

from __future__ import annotations

import pytest

from millrace.control.progress import ProgressMeter
from millrace.core.messages import Grant, Phase, TaskDone, TaskFacts, TaskId
from millrace.core.model import digest_of
from millrace.decide.scheduler import Command, EnterPhase, NodeJoined, Restored, RunState, SchedulerRules, begin, step

D = digest_of(b"x")
PHASES = (Phase("survey", 0, 4), Phase("resolve", 0, 1), Phase("main", 0, 4), Phase("persist", 0, 1))


class HandClock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.at_s = 100.0

    def now_ms(self) -> int:
        return round(self.at_s * 1000)

    def monotonic_s(self) -> float:
        return self.at_s


class Bench:
    """A scheduler and a meter that hear of the same events."""

    def __init__(self, phases: tuple[Phase, ...] = PHASES, restored: tuple[Restored, ...] = ()) -> None:
        self.clock = HandClock()
        self.meter = ProgressMeter(phases, 400, 3, self.clock)
        self.state: RunState
        self.state, commands = begin(phases, SchedulerRules(bytes_total=400), epoch=1, restored=restored)
        self._hear(commands)
        self.state, commands = step(self.state, NodeJoined("n", 1), 0)
        self._hear(commands)

    def _hear(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, EnterPhase):
                self.meter.enter(command.phase)

    def done(self, phase: str, index: int, *, after_s: float = 1.0) -> None:
        self.clock.at_s += after_s
        facts = TaskFacts(D, rows_in=10, rows_out=8, bytes_in=100 if phase.startswith(("survey", "main")) else 0)
        event = TaskDone(Grant(TaskId(phase, index), "n", 1, 1), facts)
        self.meter.finished(event)
        self.state, commands = step(self.state, event, 0)
        self._hear(commands)


def test_every_pass_over_the_input_counts() -> None:
    bench = Bench()
    seen = [bench.meter.read(bench.state)]
    for phase in PHASES:
        for index in range(phase.tasks):
            bench.done(phase.name, index)
            seen.append(bench.meter.read(bench.state))
    assert [p.bytes_done for p in seen] == [0, 100, 200, 300, 400, 400, 500, 600, 700, 800, 800]
    assert {p.bytes_total for p in seen} == {800}
    assert [p.rows for p in seen][-6:] == [0, 8, 16, 24, 32, 32]
    assert [p.phase for p in seen][3:6] == ["survey-0", "resolve-0", "main"]
    assert seen[-1].workers == 3


def test_the_rate_gives_the_time_that_is_left() -> None:
    bench = Bench((Phase("main", 0, 4), Phase("persist", 0, 1)))
    first = bench.meter.read(bench.state)
    assert (first.bytes_per_s, first.eta_s) == (0.0, None)
    bench.done("main", 0, after_s=2)
    bench.done("main", 1, after_s=2)
    progress = bench.meter.read(bench.state)
    assert progress.bytes_per_s == pytest.approx(50)
    assert progress.eta_s == pytest.approx(4)
    assert (progress.done, progress.tasks) == (2, 4)


def test_the_rate_is_that_of_the_last_twenty_seconds() -> None:
    bench = Bench((Phase("main", 0, 40), Phase("persist", 0, 1)))
    bench.done("main", 0, after_s=100)
    for index in range(1, 30):
        bench.done("main", index, after_s=1)
    assert bench.meter.read(bench.state).bytes_per_s == pytest.approx(100, rel=0.06)


def test_a_run_that_goes_on_counts_what_was_done_but_not_as_its_own_speed() -> None:
    facts = TaskFacts(D, rows_in=10, rows_out=8, bytes_in=100)
    restored = (
        Restored("survey-0", tuple((i, TaskFacts(D)) for i in range(4))),
        Restored("resolve-0", ((0, TaskFacts(D)),)),
        Restored("main", ((0, facts), (1, facts))),
    )
    bench = Bench(restored=restored)
    progress = bench.meter.read(bench.state)
    assert (progress.phase, progress.bytes_done, progress.bytes_total, progress.done) == ("main", 600, 800, 2)
    assert (progress.bytes_per_s, progress.eta_s) == (0.0, None)
    bench.done("main", 2, after_s=2)
    assert bench.meter.read(bench.state).bytes_per_s == pytest.approx(50)


def test_other_terminals_are_told_once_in_a_while() -> None:
    bench = Bench()
    assert bench.meter.due(1.0)
    assert not bench.meter.due(1.0)
    bench.clock.at_s += 0.9
    assert not bench.meter.due(1.0)
    bench.clock.at_s += 0.2
    assert bench.meter.due(1.0)
