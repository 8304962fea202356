"""Fleets: whatever becomes of a worker process, its task is answered; whatever becomes of us, no process stays."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from millrace.agent.fleet import InlineFleet, ProcessFleet
from millrace.core.messages import Failure, Grant, NodeEvent, PhaseInputs, TaskDone, TaskFacts, TaskFailed, TaskId
from millrace.core.model import digest_of

HERE = Path(__file__).parent
FUNCTION = "python: clean:normalise"


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The class of a setup that spawned processes can import: they are given this process's ``sys.path``."""
    monkeypatch.syspath_prepend(str(HERE))
    yield importlib.import_module("fleet_setup").Setup
    sys.modules.pop("fleet_setup", None)


def grant(does: str, index: int = 0, attempt: int = 1) -> Grant:
    return Grant(TaskId(does, index), "local", attempt, 1)


@asynccontextmanager
async def working(setup: Any, slots: int = 1) -> Any:
    fleet = ProcessFleet("local", slots, setup)
    fleet.start()
    try:
        yield fleet
    finally:
        await fleet.aclose()


async def answer(fleet: Any, *grants: Grant) -> list[NodeEvent]:
    for one in grants:
        await fleet.send(one)
    found: list[NodeEvent] = []
    while len(found) < len(grants):
        found += await fleet.events()
    return found


def play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(100):
            await scenario()

    asyncio.run(main())


def pid_of(event: NodeEvent) -> int:
    assert isinstance(event, TaskDone)
    return event.facts.rows_in


def failure_of(event: NodeEvent) -> Failure:
    assert isinstance(event, TaskFailed)
    return event.failure


def is_gone(pid: int) -> bool:
    """Whether a process is no more, or only waits to be buried."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def wait_until_gone(pids: list[int]) -> None:
    """Returns when they are; the test's own time limit is the only one."""
    while not all(map(is_gone, pids)):
        time.sleep(0.02)


# --- a process that works -------------------------------------------------------------------------------


def test_workers_answer_and_know_the_phase(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup(), slots=2) as fleet:
            await fleet.enter(PhaseInputs("first", ()))
            events = await answer(fleet, *(grant("work", i) for i in range(6)))
            assert {e.grant.task.index for e in events} == set(range(6))
            pids = {pid_of(e) for e in events}
            assert os.getpid() not in pids
            assert 1 <= len(pids) <= 2
            assert {e.facts.notes for e in events if isinstance(e, TaskDone)} == {("first",)}
            await fleet.enter(PhaseInputs("second", (("first", bytes(32 * 50_000)),)))
            later = await answer(fleet, *(grant("work", i) for i in range(4)))
            assert {e.facts.notes for e in later if isinstance(e, TaskDone)} == {("second",)}
            assert {pid_of(e) for e in later} <= pids
        wait_until_gone(list(pids))

    play(scenario)


def test_what_a_worker_prints_is_not_a_result(setup: Any, capfd: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            assert isinstance((await answer(fleet, grant("print")))[0], TaskDone)

    play(scenario)
    assert "speaks" not in capfd.readouterr().out


# --- a process that doesn't -----------------------------------------------------------------------------


def test_a_worker_that_can_not_be_set_up_says_why(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup("refuse")) as fleet:
            (event,) = await answer(fleet, grant("work"))
            failure = failure_of(event)
            assert failure == Failure(
                "SpecError", "p.yaml:3: transforms.0.python: there is no module 'clean'", False, "work", 2
            )
        async with working(setup("raise")) as fleet:
            (event,) = await answer(fleet, grant("work"))
            assert failure_of(event) == Failure(
                "RuntimeError", "a worker process can't be set up: RuntimeError: nobody foresaw this", False, "work"
            )

    play(scenario)


def test_a_worker_that_dies_is_replaced_and_blamed_on_the_place(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            await fleet.enter(PhaseInputs("first", ()))
            first = pid_of((await answer(fleet, grant("work")))[0])
            failure = failure_of((await answer(fleet, grant("exit", 4)))[0])
            assert failure == Failure(
                "WorkerDied", "the worker process ended with exit code 3 on exit task 4", True, "place"
            )
            failure = failure_of((await answer(fleet, grant("kill")))[0])
            assert (failure.blame, failure.message) == (
                "place",
                "the worker process was killed by signal 9 on kill task 0",
            )
            (after,) = await answer(fleet, grant("work"))
            assert pid_of(after) != first
            assert isinstance(after, TaskDone)
            assert after.facts.notes == ("first",)  # the new process was told of the phase too

    play(scenario)


def test_a_worker_that_dies_between_tasks_is_replaced(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            first = pid_of((await answer(fleet, grant("work")))[0])
            os.kill(first, signal.SIGKILL)
            wait_until_gone([first])
            (event,) = await answer(fleet, grant("work"))
            if isinstance(event, TaskFailed):  # its end was not known yet when the task was sent
                assert event.failure.blame == "place"
                (event,) = await answer(fleet, grant("work"))
            assert pid_of(event) != first

    play(scenario)


def test_user_code_that_takes_its_process_down_is_to_blame(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            failure = failure_of((await answer(fleet, grant("exit-in-user-code", 7)))[0])
            assert failure == Failure(
                "TransformError",
                f"{FUNCTION} took its worker process down on exit-in-user-code task 7: "
                "the process ended with exit code 3",
                True,
                "work",
            )

    play(scenario)


@pytest.mark.parametrize("how", ["hang", "hang-with-the-lock"])
def test_user_code_that_hangs_is_stopped_at_its_limit(how: str, setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            first = pid_of((await answer(fleet, grant("work")))[0])
            failure = failure_of((await answer(fleet, grant(how, 2)))[0])
            assert failure == Failure(
                "TransformError",
                f"{FUNCTION} ran longer than its timeout of 0.5 s on {how} task 2; "
                "raise the transform's 'timeout' or mend it",
                True,
                "work",
            )
            wait_until_gone([first])
            assert pid_of((await answer(fleet, grant("work")))[0]) != first

    play(scenario)


def test_the_limit_is_of_each_call_and_not_of_the_task(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup()) as fleet:
            assert isinstance((await answer(fleet, grant("many-calls")))[0], TaskDone)

    play(scenario)


# --- the end --------------------------------------------------------------------------------------------


def test_closing_ends_what_is_in_flight_and_every_process(setup: Any) -> None:
    async def scenario() -> None:
        fleet = ProcessFleet("local", 2, setup())
        fleet.start()
        pids = [pid_of(e) for e in await answer(fleet, grant("work", 0), grant("work", 1))]
        for i in range(4):  # two are at work, two wait for a worker
            await fleet.send(grant("wait", i))
        await asyncio.sleep(0.05)
        await fleet.aclose()
        assert all(is_gone(pid) for pid in pids)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scenario)


def test_closing_right_after_the_start_leaves_nothing(setup: Any) -> None:
    async def scenario() -> None:
        async with working(setup(), slots=2) as fleet:
            await fleet.send(grant("work"))
        assert children() == []

    def children() -> list[int]:
        found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        workers = [p for p in map(int, found) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        return [p for p in workers if not is_gone(p)]

    if Path("/proc/self/task").exists():
        play(scenario)


PARENT = """
    import asyncio, signal, sys
    sys.path.insert(0, sys.argv[1])
    from fleet_setup import Setup
    from millrace.agent.fleet import ProcessFleet
    from millrace.core.messages import Grant, TaskId

    async def main():
        fleet = ProcessFleet("local", 2, Setup())
        fleet.start()
        print("started", flush=True)
        pids = set()
        index = 0
        while len(pids) < 2:
            await fleet.send(Grant(TaskId("nap", index), "local", 1, 1))
            await fleet.send(Grant(TaskId("nap", index + 1), "local", 1, 1))
            index += 2
            found = []
            while len(found) < 2:
                found += await fleet.events()
            pids |= {event.facts.rows_in for event in found}
        if "hang" in sys.argv:
            await fleet.send(Grant(TaskId("hang-with-the-lock", 0), "local", 1, 1))
            await asyncio.sleep(0.1)
            print(*pids, flush=True)
            await asyncio.sleep(600)
        print(*pids, flush=True)
        await fleet.aclose()

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, lambda *_: None)
        asyncio.run(main())
"""


def parent(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    return subprocess.Popen(
        [sys.executable, str(script), str(HERE), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_workers_die_with_their_parent_even_while_they_hold_the_lock(tmp_path: Path) -> None:
    process = parent(tmp_path, "hang")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "started\n"
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    wait_until_gone(pids)
    process.communicate()


def test_ctrl_c_in_the_terminal_leaves_the_workers_to_the_parent(tmp_path: Path) -> None:
    """It is sent to the whole group, also while the workers are just coming up; no traceback, no lost task."""
    process = parent(tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    for _ in range(20):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.02)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    wait_until_gone([int(pid) for pid in out.split()])


# --- tasks as coroutines --------------------------------------------------------------------------------


class InlineRunner:
    """Done, or broken, or never."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.cancelled = 0

    def enter(self, inputs: PhaseInputs) -> None:
        self.entered.append(inputs.phase)

    async def run(self, one: Grant) -> NodeEvent:
        if one.task.phase == "broken":
            raise RuntimeError("a fault of our own")
        try:
            if one.task.phase == "wait":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return TaskDone(one, TaskFacts(digest_of(b"x")))


def inline(runner: InlineRunner) -> InlineFleet:
    return InlineFleet(runner)  # type: ignore[arg-type]


def test_inline_tasks_run_side_by_side() -> None:
    async def scenario() -> None:
        runner = InlineRunner()
        fleet = inline(runner)
        await fleet.enter(PhaseInputs("main", ()))
        await fleet.send(grant("wait"))
        events = await answer(fleet, grant("work", 1), grant("work", 2))
        assert {e.grant.task.index for e in events} == {1, 2}
        assert runner.entered == ["main"]
        await fleet.aclose()
        assert runner.cancelled == 1
        assert asyncio.all_tasks() == {asyncio.current_task()}

    play(scenario)


def test_a_fault_of_our_own_is_raised_instead_of_waited_for() -> None:
    async def scenario() -> None:
        fleet = inline(InlineRunner())
        await fleet.send(grant("broken"))
        with pytest.raises(RuntimeError, match="a fault of our own"):
            await fleet.events()
        await fleet.aclose()

    play(scenario)
