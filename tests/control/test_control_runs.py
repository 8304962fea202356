"""A run's life: begun once, taken up again by whoever comes next, never driven by two."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from millrace.control.loop import LEASE_TTL_MS
from millrace.control.runs import Begun, ask, begin_run, end_run, list_runs, load_run, run_status
from millrace.core.errors import Fenced, LeaseHeld, UsageError
from millrace.core.facts import Lineage, RunProgress, encode
from millrace.core.keys import GC_LEASE, dataset_lease, run_control, run_lease, run_progress
from millrace.core.messages import Control, Phase
from millrace.core.ports import Coordination, Write

Opened = Callable[[], AbstractAsyncContextManager[Coordination]]
PHASES = (Phase("main", 0, 3), Phase("persist", 0, 1))
LINEAGE = Lineage(sources=({"url": "file://x"},), spec={"dataset": "d"}, spec_digest="s", plan_digest="p", code={})


def everyone_lives(_holder: str) -> bool:
    return True


def nobody_lives(_holder: str) -> bool:
    return False


class Office:
    """Begins and ends runs as several processes would."""

    def __init__(self, coord: Coordination, clock: Any) -> None:
        self.coord = coord
        self.clock = clock

    async def begin(
        self,
        holder: str = "host:1:1",
        *,
        dataset: str = "d",
        identity: str = "i",
        fresh: bool = False,
        is_alive: Callable[[str], bool] = everyone_lives,
    ) -> Begun:
        return await begin_run(
            self.coord,
            self.clock,
            dataset=dataset,
            identity=identity,
            phases=PHASES,
            lineage=LINEAGE,
            pipeline_file="p.yaml",
            placement={"replicas": 3},
            holder=holder,
            is_alive=is_alive,
            fresh=fresh,
        )

    async def end(self, begun: Begun, state: str) -> None:
        await end_run(self.coord, begun, begun.record.model_copy(update={"state": state, "ended_at_ms": 1}))

    async def states(self) -> list[str]:
        return [r.state for r in await list_runs(self.coord)]


@pytest.fixture
def play(opened: Opened, clock: Any) -> Callable[[Callable[[Office], Awaitable[None]]], None]:
    """Runs a scenario on a fresh store of each kind."""

    def run(scenario: Callable[[Office], Awaitable[None]]) -> None:
        async def main() -> None:
            async with opened() as coord:
                await scenario(Office(coord, clock))

        asyncio.run(main())

    return run


Play = Callable[[Callable[[Office], Awaitable[None]]], None]


def test_a_new_run_is_recorded_and_held(play: Play) -> None:
    async def scenario(office: Office) -> None:
        begun = await office.begin()
        assert (begun.record.run, begun.record.state, begun.resumed) == (1, "running", False)
        assert begun.record.phases == (("main", 0, 3), ("persist", 0, 1))
        assert begun.record.created_at_ms == office.clock.now_ms()
        assert await load_run(office.coord, 1) == begun.record
        assert await office.coord.holder(run_lease(1)) == begun.lease
        assert await office.coord.holder(dataset_lease("d")) == begun.dataset_lease
        status = await run_status(office.coord, office.clock, 1, everyone_lives)
        assert (status.state, status.alive, status.asked, status.progress) == ("running", True, Control.RUN, None)

    play(scenario)


def test_an_ended_run_lets_go_of_everything(play: Play) -> None:
    async def scenario(office: Office) -> None:
        begun = await office.begin()
        progress = RunProgress(
            phase="main",
            done=1,
            tasks=3,
            bytes_done=1,
            bytes_total=3,
            rows=1,
            quarantined=0,
            bytes_per_s=0.0,
            workers=1,
            at_ms=1,
        )
        await office.coord.commit([Write(run_progress(1), encode(progress))])
        assert (await run_status(office.coord, office.clock, 1, everyone_lives)).progress == progress
        await office.end(begun, "done")
        assert await office.coord.holder(run_lease(1)) is None
        assert await office.coord.holder(dataset_lease("d")) is None
        status = await run_status(office.coord, office.clock, 1, everyone_lives)
        assert (status.state, status.alive, status.progress) == ("done", False, None)
        assert (await office.begin("host:2:2")).record.run == 2

    play(scenario)


@pytest.mark.parametrize("state", ["running", "stopped", "failed", "paused"])
def test_an_unfinished_run_of_the_same_work_is_taken_up_again(state: str, play: Play) -> None:
    async def scenario(office: Office) -> None:
        first = await office.begin()
        await office.coord.commit([Write(run_control(1), Control.STOP.encode())])
        await office.end(first, state)
        again = await office.begin("host:2:2")
        assert (again.record.run, again.record.state, again.resumed) == (1, "running", True)
        assert (again.record.ended_at_ms, again.record.exit_code) == (None, None)
        assert again.lease.epoch > first.lease.epoch
        status = await run_status(office.coord, office.clock, 1, everyone_lives)
        assert status.asked is Control.RUN  # what was asked of the attempt before is no longer asked
        assert await office.states() == ["running"]

    play(scenario)


def test_other_work_supersedes_what_was_unfinished(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.end(await office.begin(identity="old"), "stopped")
        await office.end(await office.begin(identity="older", fresh=True), "failed")
        begun = await office.begin(identity="new")
        assert (begun.record.run, begun.resumed) == (3, False)
        assert await office.states() == ["superseded", "superseded", "running"]
        await office.end(begun, "stopped")
        assert (await office.begin(identity="old")).record.run == 4

    play(scenario)


def test_fresh_begins_anew_whatever_there_is(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.end(await office.begin(), "stopped")
        begun = await office.begin(fresh=True)
        assert (begun.record.run, begun.resumed) == (2, False)
        assert await office.states() == ["superseded", "running"]

    play(scenario)


def test_finished_runs_and_other_datasets_are_left_alone(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.end(await office.begin(), "done")
        await office.end(await office.begin(dataset="other"), "stopped")
        begun = await office.begin("host:2:2")
        assert (begun.record.run, begun.resumed) == (3, False)
        assert await office.states() == ["done", "stopped", "running"]

    play(scenario)


def test_a_second_run_of_a_dataset_is_refused_and_told_how_to_go_on(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.begin("host:1:1")
        with pytest.raises(LeaseHeld) as caught:
            await office.begin("host:2:2")
        assert str(caught.value) == (
            "run 1 (host:1:1) is writing dataset 'd'; wait until it is done, or stop it with: millrace stop 1"
        )
        assert (caught.value.holder, caught.value.exit_code) == ("host:1:1", 1)
        assert await office.states() == ["running"]
        assert (await office.begin("host:3:3", dataset="other")).record.run == 2

    play(scenario)


def test_a_dead_holder_is_taken_over_at_once_and_fenced(play: Play) -> None:
    async def scenario(office: Office) -> None:
        dead = await office.begin("host:1:1")
        begun = await office.begin("host:2:2", is_alive=nobody_lives)
        assert (begun.record.run, begun.resumed) == (1, True)
        assert begun.lease.epoch > dead.lease.epoch
        with pytest.raises(Fenced):
            await office.end(dead, "done")
        assert await office.states() == ["running"]
        assert await office.coord.holder(run_lease(1)) == begun.lease

    play(scenario)


def test_a_superseded_run_whose_process_only_slept_is_fenced(play: Play) -> None:
    async def scenario(office: Office) -> None:
        sleeping = await office.begin("host:1:1", identity="old")
        begun = await office.begin("host:2:2", identity="new", is_alive=nobody_lives)
        assert begun.record.run == 2
        with pytest.raises(Fenced):
            await office.coord.commit([Write("datasets/d/head", b"{}")], guard=sleeping.lease)

    play(scenario)


def test_an_expired_lease_of_a_holder_nobody_knows_of_is_taken_over(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.begin("elsewhere:1:1")
        office.clock.wall_ms += LEASE_TTL_MS
        status = await run_status(office.coord, office.clock, 1, everyone_lives)
        assert (status.state, status.alive) == ("interrupted", False)
        assert (await office.begin("host:2:2")).resumed

    play(scenario)


def test_a_run_does_not_start_under_a_garbage_collection_and_keeps_no_lease(play: Play) -> None:
    async def scenario(office: Office) -> None:
        gc = await office.coord.acquire(GC_LEASE, "host:9:9", 60_000, now_ms=office.clock.now_ms())
        with pytest.raises(LeaseHeld, match="collects garbage; wait until it is done"):
            await office.begin("host:1:1")
        assert await office.coord.holder(dataset_lease("d")) is None
        assert await office.coord.holder(run_lease(1)) is None
        await office.coord.release(gc)
        begun = await office.begin("host:2:2")
        assert (begun.record.run, begun.resumed) == (1, True)

    play(scenario)


def test_run_ids_are_unique_when_sixteen_begin_at_once(play: Play) -> None:
    async def scenario(office: Office) -> None:
        begun = await asyncio.gather(*(office.begin(f"host:{i}:1", dataset=f"d{i}") for i in range(16)))
        assert sorted(b.record.run for b in begun) == list(range(1, 17))
        assert len({b.lease.name for b in begun}) == 16

    play(scenario)


def test_of_sixteen_that_want_one_dataset_one_gets_it(play: Play) -> None:
    async def scenario(office: Office) -> None:
        answers = await asyncio.gather(*(office.begin(f"host:{i}:1") for i in range(16)), return_exceptions=True)
        assert sum(isinstance(a, Begun) for a in answers) == 1
        assert sum(isinstance(a, LeaseHeld) for a in answers) == 15
        assert await office.states() == ["running"]

    play(scenario)


# --- asking ---------------------------------------------------------------------------------------------


def test_asking_changes_what_a_living_run_is_told(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.begin()
        for control, state in ((Control.PAUSE, "paused"), (Control.RUN, "running"), (Control.STOP, "running")):
            await ask(office.coord, office.clock, 1, control, everyone_lives)
            status = await run_status(office.coord, office.clock, 1, everyone_lives)
            assert (status.asked, status.state) == (control, state)

    play(scenario)


def test_asking_a_run_nobody_drives_says_how_to_continue_it(play: Play) -> None:
    async def scenario(office: Office) -> None:
        await office.begin()
        with pytest.raises(UsageError) as caught:
            await ask(office.coord, office.clock, 1, Control.PAUSE, nobody_lives)
        assert str(caught.value) == ("run 1 is not running, it is interrupted; continue it with: millrace run p.yaml")
        await office.end(await office.begin(), "done")
        with pytest.raises(UsageError, match=r"run 1 is not running, it is done$"):
            await ask(office.coord, office.clock, 1, Control.STOP, everyone_lives)

    play(scenario)


def test_a_run_that_is_not_there_is_answered_with_those_that_are(play: Play) -> None:
    async def scenario(office: Office) -> None:
        with pytest.raises(UsageError, match="there is no run 5; none was made yet"):
            await load_run(office.coord, 5)
        await office.begin()
        await office.begin("host:2:2", dataset="other")
        with pytest.raises(UsageError, match="there is no run 5; the latest are 1, 2"):
            await run_status(office.coord, office.clock, 5, everyone_lives)

    play(scenario)
