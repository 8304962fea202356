"""The real scheduler in a world where everything goes wrong, in an order that one seed decides.

Answers are late, doubled or lost with their node; nodes die, come back under their names, and join; operators pause,
resume and stop; the control process is killed and begins again from nothing but what was recorded. Then the world
calms down, and the run must end as a quiet one does. Laws are checked at each step; a failure names its seed.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from millrace.core.messages import Control, Failure, Grant, Phase, TaskDone, TaskFacts, TaskFailed, TaskId
from millrace.core.model import digest_of
from millrace.decide import scheduler as real_scheduler

SEEDS = 1000
STEPS_WILD = 250
STEPS_MAX = 3000
ATTEMPTS = 3
PLACE_ATTEMPTS = 6


class LawBroken(AssertionError):
    """A law of the scheduler does not hold; says in which seed and at which step."""


def facts_of(task: TaskId) -> TaskFacts:
    """What a task comes to, whoever runs it and however often."""
    if not task.phase.startswith("main"):
        return TaskFacts(digest_of(repr(task).encode()))
    return TaskFacts(digest_of(repr(task).encode()), schema="id: int64", rows_in=10 + task.index, bytes_in=100)


@dataclass
class Ledger:
    """What survives the control process: exactly what it was told to record."""

    done: dict[TaskId, TaskFacts] = field(default_factory=dict)
    aside: dict[TaskId, Failure] = field(default_factory=dict)

    def settled(self, task: TaskId) -> bool:
        set_aside = {(t.index) for t in self.aside}
        return task in self.done or (task.phase.startswith(("main", "survey")) and task.index in set_aside)


@dataclass
class Node:
    """A life of a node: what it was granted and has not answered."""

    name: str
    slots: int
    holds: dict[TaskId, Grant] = field(default_factory=dict)


class World:
    """One run under one seed.

    Args:
        seed: Decides everything.
        scheduler: The module under test: the real one, or one that was broken on purpose.
    """

    def __init__(self, seed: int, scheduler: types.ModuleType) -> None:
        self._seed = seed
        self._s: Any = scheduler
        self._dice = random.Random(seed)
        chunks = self._dice.randint(1, 12)
        barriers = self._dice.randint(0, 2)
        self.phases = (
            *(
                phase
                for i in range(barriers)
                for phase in (Phase("survey", i, chunks), Phase("resolve", i, self._dice.randint(1, 3)))
            ),
            Phase("main", 0, chunks),
            Phase("persist", 0, 1),
        )
        self.hopeless = {i for i in range(chunks) if self._dice.random() < 0.1}
        self._rules = self._s.SchedulerRules(
            attempts=ATTEMPTS,
            place_attempts=PLACE_ATTEMPTS,
            quarantine_chunks=len(self.hopeless),
            order_seed=self._dice.choice([None, seed]),
        )
        self.ledger = Ledger()
        self.ended: str | None = None
        self._now_s = 0.0
        self._epoch = 0
        self._steps = 0
        self._nodes: dict[str, Node] = {}
        self._answers: list[TaskDone | TaskFailed] = []
        self._failures: dict[tuple[TaskId, str], int] = {}
        self._control = Control.RUN
        self._entered: list[str] = []
        self._state: Any = None

    # --- driving ------------------------------------------------------------------------------------------

    def run(self, *, quiet: bool = False) -> Ledger:
        """To the end; gives what was recorded."""
        self._restart()
        while self.ended != "done":
            self._steps += 1
            if self._steps > STEPS_MAX:
                self._broken(f"not finished after {STEPS_MAX} steps")
            wild = not quiet and self._steps < STEPS_WILD
            if self.ended == "stopped":
                self._restart()
            elif self.ended is not None:
                self._broken(f"the run ended as {self.ended}")
            elif wild:
                self._wild_step()
            else:
                self._calm_step()
        return self.ledger

    def _wild_step(self) -> None:
        dice = self._dice
        event = dice.choices(
            ["answer", "work", "time", "lose", "join", "rejoin", "pause", "resume", "stop", "kill"],
            [40, 30, 10, 3, 5, 2, 2, 4, 1, 1],
        )[0]
        names = sorted(self._nodes)
        if event == "answer" and self._answers:
            answer = self._answers[dice.randrange(len(self._answers))]
            if dice.random() < 0.8:  # otherwise it comes once more later
                self._answers.remove(answer)
            self._deliver(answer)
        elif event == "work":
            self._work(clean=False)
        elif event == "time":
            self._now_s += dice.expovariate(0.5)
            self._step(self._s.Tick())
        elif event == "lose" and names:
            self._lose(dice.choice(names))
        elif event == "join" and len(names) < 5:
            self._join(f"n{dice.randrange(8)}")
        elif event == "rejoin" and names:
            self._join(dice.choice(names))
        elif event in {"pause", "resume", "stop"}:
            self._ask({"pause": Control.PAUSE, "resume": Control.RUN, "stop": Control.STOP}[event])
        elif event == "kill":
            self._restart()

    def _calm_step(self) -> None:
        if self._control is not Control.RUN:
            self._ask(Control.RUN)
        elif not self._nodes:
            self._join("calm")
        elif self._answers:
            self._deliver(self._answers.pop(0))
        elif any(node.holds for node in self._nodes.values()):
            self._work(clean=True)
        else:
            self._now_s = max(self._now_s + 0.01, self._state.wake_at or 0.0)
            self._step(self._s.Tick())

    # --- what happens -------------------------------------------------------------------------------------

    def _restart(self) -> None:
        """The control process begins (again), in a new epoch, from what was recorded."""
        self._epoch += 1
        self._nodes = {}
        self._control = Control.RUN
        self._entered = []
        self.ended = None
        restored = [
            self._s.Restored(
                p.name,
                tuple((t.index, f) for t, f in self.ledger.done.items() if t.phase == p.name),
                tuple((t.index, f) for t, f in self.ledger.aside.items() if t.phase == p.name),
            )
            for p in self.phases
        ]
        self._state, commands = self._s.begin(self.phases, self._rules, epoch=self._epoch, restored=restored)
        self._obey(commands)
        for name in ["a", "b"][: self._dice.randint(0, 2)]:
            self._join(name)

    def _join(self, name: str) -> None:
        slots = self._dice.randint(1, 3)
        self._nodes[name] = Node(name, slots)
        self._step(self._s.NodeJoined(name, slots))

    def _lose(self, name: str) -> None:
        del self._nodes[name]
        self._step(self._s.NodeLost(name))

    def _ask(self, control: Control) -> None:
        self._control = control
        self._step(self._s.ControlChanged(control))

    def _work(self, *, clean: bool) -> None:
        """A node comes to an end with something it holds; the answer is on its way from then on."""
        held = [(n, g) for n in self._nodes.values() for g in n.holds.values() if not self._is_answered(g)]
        if held:
            _, grant = self._dice.choice(held)
            self._answers.append(self._outcome(grant, clean=clean))

    def _is_answered(self, grant: Grant) -> bool:
        return any(a.grant == grant for a in self._answers)

    def _outcome(self, grant: Grant, *, clean: bool) -> TaskDone | TaskFailed:
        task = grant.task
        if task.index in self.hopeless and task.phase.startswith(("main", "survey")):
            return TaskFailed(grant, Failure("TransformError", f"{task} is hopeless", False, "work"))
        roll = 1.0 if clean else self._dice.random()
        for blame, most, chance in (("work", ATTEMPTS - 1, 0.15), ("place", PLACE_ATTEMPTS - 1, 0.2)):
            if roll < chance and self._failures.get((task, blame), 0) < most:
                self._failures[task, blame] = self._failures.get((task, blame), 0) + 1
                return TaskFailed(grant, Failure("Unlucky", "not this time", True, blame))
            roll -= chance
        return TaskDone(grant, facts_of(task))

    def _deliver(self, answer: TaskDone | TaskFailed) -> None:
        node = self._nodes.get(answer.grant.node)
        if node is not None and node.holds.get(answer.grant.task) == answer.grant:
            del node.holds[answer.grant.task]
        self._step(answer)

    # --- the laws -----------------------------------------------------------------------------------------

    def _step(self, event: Any) -> None:
        if self.ended is None:
            self._state, commands = self._s.step(self._state, event, self._now_s)
            self._obey(commands)

    def _obey(self, commands: list[Any]) -> None:
        for command in commands:
            match type(command).__name__:
                case "Grant":
                    self._check_grant(command)
                    self._nodes[command.node].holds[command.task] = command
                case "Record":
                    if self.ledger.settled(command.task):
                        self._broken(f"{command.task} is recorded twice")
                    if self._entered[-1:] != [command.task.phase]:
                        self._broken(f"{command.task} is recorded in {self._entered[-1:]}")
                    self.ledger.done[command.task] = command.facts
                case "SetAside":
                    if self.ledger.settled(command.task):
                        self._broken(f"{command.task} is set aside though it is settled")
                    self.ledger.aside[command.task] = command.failure
                case "EnterPhase":
                    self._check_phase(command.phase)
                    self._entered.append(command.phase.name)
                case "Finish":
                    self.ended = command.state
                    if command.state == "done":
                        self._check_complete(self.phases)
                    if command.state == "stopped" and self._control is not Control.STOP:
                        self._broken("stopped though nobody asked for it")
                    if command.state == "stopped" and any(node.holds for node in self._nodes.values()):
                        self._broken("stopped though there is work in flight")

    def _check_grant(self, grant: Grant) -> None:
        node = self._nodes.get(grant.node)
        if self._control is not Control.RUN:
            self._broken(f"{grant} while the run is asked to {self._control}")
        if node is None:
            self._broken(f"{grant} to a node that is not there")
        elif len(node.holds) >= node.slots:
            self._broken(f"{grant} to a node that has {len(node.holds)} of {node.slots} slots in use")
        if self.ledger.settled(grant.task):
            self._broken(f"{grant} of a task that is settled")
        holders = [n.name for n in self._nodes.values() if grant.task in n.holds]
        if holders:
            self._broken(f"{grant} while {holders} work on it")
        if self._entered[-1:] != [grant.task.phase]:
            self._broken(f"{grant} in phase {self._entered[-1:]}")
        if grant.epoch != self._epoch:
            self._broken(f"{grant} in epoch {self._epoch}")

    def _check_phase(self, phase: Phase) -> None:
        number = len(self._entered)
        if number >= len(self.phases) or self.phases[number] != phase:
            self._broken(f"{phase} begins as number {number}")
        self._check_complete(self.phases[:number])

    def _check_complete(self, phases: tuple[Phase, ...]) -> None:
        for phase in phases:
            for index in range(phase.tasks):
                if not self.ledger.settled(TaskId(phase.name, index)):
                    self._broken(f"{phase.name}/{index} was left behind")

    def _broken(self, law: str) -> None:
        raise LawBroken(f"seed {self._seed}, step {self._steps}: {law}")


@pytest.mark.parametrize("first", range(0, SEEDS, 100))
def test_whatever_happens_the_run_ends_as_a_quiet_one(first: int) -> None:
    for seed in range(first, first + 100):
        wild = World(seed, real_scheduler)
        quiet = World(seed, real_scheduler)
        recorded, expected = wild.run(), quiet.run(quiet=True)
        assert recorded.done == expected.done, f"seed {seed}"
        assert {t.index for t in recorded.aside} == {t.index for t in expected.aside} == wild.hopeless, f"seed {seed}"


# --- would it notice? -----------------------------------------------------------------------------------


MUTANTS = {
    "every answer is taken": ("state._status[grant.task.index] in {_GRANTED, _PENDING}", "True"),
    "a phase ends one task early": (
        "state.done_in_phase == state.phase.tasks and",
        "state.done_in_phase >= state.phase.tasks - 1 and",
    ),
    "pausing is ignored": ("if state.control is Control.PAUSE:", "if False:"),
    "stopping is ignored": ("if state.control is Control.STOP:", "if False:"),
    "stopping does not wait": ("        if state.in_flight == 0:\n", "        if True:\n"),
    "any answer frees a slot": ("node.held.get(grant.task) != grant", "grant.task not in node.held"),
    "an old failure counts": (
        "if not _release(state, event.grant) or not _take_back",
        "_release(state, event.grant)\n    if not _take_back",
    ),
    "a slot too many": ("if len(n.held) < n.slots]", "if len(n.held) <= n.slots]"),
    "a lost node keeps its tasks": (
        "for task in sorted(lost.held, key=lambda t: t.index) if lost else ():",
        "for task in ():",
    ),
    "a node that joins again keeps its tasks": ("            _lose(state, node)  # one", "            pass  # one"),
    "waits never end": ("state._waiting[0][0] <= now_s:", "state._waiting[0][0] < 0:"),
    "the ledger is not read": ("for index, facts in earlier.done if earlier else ():", "for index, facts in ():"),
    "chunks set aside are forgotten": (
        "for index, failure in earlier.set_aside if earlier else ():",
        "for index, failure in ():",
    ),
    "a set-aside chunk is granted in the next phase": (
        "                state._status[index] = _SET_ASIDE\n",
        "                pass\n",
    ),
    "place failures count against the work": (
        'if failure.blame == "work":\n        tries.by_work += 1',
        "if True:\n        tries.by_work += 1",
    ),
}


@pytest.fixture
def broken(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """The scheduler with one thing broken."""
    old, new = MUTANTS[request.param]
    assert real_scheduler.__file__ is not None
    source = Path(real_scheduler.__file__).read_text()
    assert source.count(old) == 1, old
    name = "broken_scheduler"
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(source.replace(old, new), name, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name]


@pytest.mark.parametrize("broken", MUTANTS, indirect=True)
def test_a_broken_scheduler_is_found_out(broken: types.ModuleType) -> None:
    for seed in range(SEEDS):
        world = World(seed, broken)
        try:
            recorded = world.run()
        except Exception:  # a law that is broken, or the scheduler falling over its own feet
            return
        if recorded.done != World(seed, real_scheduler).run(quiet=True).done:
            return
    pytest.fail(f"{SEEDS} seeds did not notice")
