"""The ledger: what is recorded comes back in another process, on bounded pages, and a stale writer writes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.control.ledger import PAGE_TASKS, Ledger, decode_facts, encode_facts
from millrace.coord.memory import MemoryCoordination
from millrace.core.errors import CoordError, Fenced
from millrace.core.keys import ledger_page, ledger_prefix
from millrace.core.messages import Failure, Phase, TaskFacts, TaskId
from millrace.core.model import StageTime, digest_of
from millrace.core.ports import Coordination, Lease, Write

Opened = Callable[[], AbstractAsyncContextManager[Coordination]]
MAIN = Phase("main", 0, 200)
PHASES = (
    Phase("survey", 0, 3),
    Phase("resolve", 0, 2),
    Phase("survey", 1, 3),
    Phase("resolve", 1, 2),
    Phase("main", 0, 3),
    Phase("persist", 0, 1),
)


def run(opened: Opened, scenario: Callable[[Coordination, Lease], Awaitable[None]]) -> None:
    async def main() -> None:
        async with opened() as coord:
            lease = await coord.acquire("run/00000007", "me", 10_000, now_ms=0)
            await scenario(coord, lease)

    asyncio.run(main())


def facts(index: int, phase: str = "main") -> TaskFacts:
    return TaskFacts(
        output=digest_of(f"{phase}/{index}".encode()),
        schema="id: int64",
        rows_in=index,
        bytes_in=index * 100,
        seconds=1.5,
        stages=(StageTime("ingest", 0.25, 10, 1000), StageTime("pack", 0.125)),
        notes=("gcp-main is left out",),
        first_quarantined="a.txt: utf-8",
        quarantined=index % 2,
    )


def test_what_is_recorded_comes_back_in_order(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        failure = Failure("SourceError", "b.gz is truncated", False, "work")
        for index in (150, 3, 40, 0):
            ledger.record(TaskId("main", index), facts(index))
        ledger.set_aside(TaskId("main", 77), failure)
        await ledger.commit()
        found = await Ledger(7, coord, lease).load([MAIN])
        assert [i for i, _ in found["main"].done] == [0, 3, 40, 150]
        assert dict(found["main"].done)[150] == facts(150)
        assert found["main"].set_aside == ((77, failure),)
        assert ledger.facts(MAIN) == found["main"].done
        assert ledger.set_aside_in(MAIN) == found["main"].set_aside

    run(opened, scenario)


def test_runs_and_phases_do_not_see_each_other(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        ledger.record(TaskId("survey-1", 0), facts(0))
        ledger.record(TaskId("survey-10", 0), facts(1))
        await ledger.commit()
        found = await Ledger(7, coord, lease).load([Phase("survey", 1, 1), Phase("survey", 10, 1), MAIN])
        assert [len(found[name].done) for name in ("survey-1", "survey-10", "main")] == [1, 1, 0]
        assert not (await Ledger(8, coord, lease).load([Phase("survey", 1, 1)]))["survey-1"].done

    run(opened, scenario)


def test_nothing_is_written_before_commit_and_nothing_twice(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        ledger.record(TaskId("main", 0), facts(0))
        assert not await coord.list(ledger_prefix(7, "main"))
        await ledger.commit()
        revision = (await coord.list(ledger_prefix(7, "main")))[0].revision
        await ledger.commit()
        assert (await coord.list(ledger_prefix(7, "main")))[0].revision == revision

    run(opened, scenario)


def test_a_large_phase_takes_many_pages_and_more_than_one_commit(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        tasks = PAGE_TASKS * 120
        for index in range(0, tasks, PAGE_TASKS):
            ledger.record(TaskId("main", index), facts(index))
        await ledger.commit()
        found = await Ledger(7, coord, lease).load([MAIN])
        assert len(found["main"].done) == 120

    run(opened, scenario)


@pytest.mark.parametrize("letter", ["x", "\u4e2d", "\U0001f600", '"'])
def test_a_page_stays_under_64_kb_whatever_the_tasks_have_to_say(letter: str) -> None:
    """Sentences are cut, and only they: digests and counts are whole."""

    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        big = 10**17
        sentence = letter * 10_000
        wordy = TaskFacts(
            output=digest_of(b"x"),
            schema="c: int64, " * 20,
            rows_in=big,
            rows_out=big,
            bytes_in=big,
            bytes_out=big,
            shards=big,
            replicas=big,
            duplicates=big,
            quarantined=big,
            seconds=1e9,
            stages=tuple(StageTime(s, 123456.123456, big, big) for s in ("ingest", "process", "pack", "distribute")),
            first_quarantined=sentence,
            notes=(sentence, sentence, "short", sentence),
        )
        for index in range(PAGE_TASKS):
            if index % 4:
                ledger.record(TaskId("main", index), wordy)
            else:
                ledger.set_aside(TaskId("main", index), Failure("TransformError", sentence, False, "work"))
        await ledger.commit()
        (page,) = await coord.list(ledger_prefix(7, "main"))
        assert len(page.value) < 64_000
        found = (await Ledger(7, coord, lease).load([MAIN]))["main"]
        kept = found.done[0][1]
        assert replace(kept, first_quarantined="", notes=()) == replace(wordy, first_quarantined="", notes=())
        assert kept.first_quarantined.startswith(letter * 20)
        assert kept.first_quarantined.endswith("...")
        assert found.set_aside[0][1].message.startswith(letter * 20)

    async def main() -> None:
        coord = MemoryCoordination()
        await scenario(coord, await coord.acquire("run/00000007", "me", 10_000, now_ms=0))

    asyncio.run(main())


def test_a_writer_whose_lease_was_taken_over_is_fenced(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        ledger.record(TaskId("main", 0), facts(0))
        await ledger.commit()
        await coord.acquire("run/00000007", "other", 10_000, now_ms=0, steal=True)
        ledger.record(TaskId("main", 1), facts(1))
        with pytest.raises(Fenced):
            await ledger.commit()
        found = await Ledger(7, coord, lease).load([MAIN])
        assert [i for i, _ in found["main"].done] == [0]

    run(opened, scenario)


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"[]", b"5", b'{"x": {}}', b'{"0": 5}', b'{"0": {"colour": 1}}', b'{"0": {"failure": {}}}', b"\xff"],
)
def test_a_damaged_page_is_named(value: bytes, opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        key = ledger_page(7, "main", 0)
        await coord.commit([Write(key, value)])
        with pytest.raises(CoordError, match=f"the ledger page {key} is damaged: .*; start a new run with --fresh"):
            await Ledger(7, coord, lease).load([MAIN])

    run(opened, scenario)


texts = st.text(st.characters(codec="utf-8"), max_size=20)
numbers = st.integers(0, 2**60)


@given(
    st.builds(
        TaskFacts,
        output=st.binary(min_size=32, max_size=32).map(bytes.hex),
        schema=texts,
        rows_in=numbers,
        rows_out=numbers,
        bytes_in=numbers,
        bytes_out=numbers,
        shards=numbers,
        replicas=numbers,
        duplicates=numbers,
        quarantined=numbers,
        seconds=st.floats(0, 1e9),
        stages=st.lists(st.builds(StageTime, texts, st.integers(0, 10**9).map(lambda n: n / 1000), numbers, numbers))
        .map(tuple),
        first_quarantined=texts,
        notes=st.lists(texts.filter(bool), max_size=2).map(tuple),
    )
)  # fmt: skip
def test_facts_come_back_as_they_were(task: TaskFacts) -> None:
    assert decode_facts(encode_facts(task)) == task


def test_pages_for_the_catalog_stay_out_of_the_ledger() -> None:
    kept = decode_facts(encode_facts(replace(facts(1), pages=(b"x",), meta_pages=(b"y",))))
    assert kept == facts(1)


# --- what a phase reads of those before ----------------------------------------------------------------


def test_each_phase_is_given_what_it_reads_and_no_more(opened: Opened) -> None:
    async def scenario(coord: Coordination, lease: Lease) -> None:
        ledger = Ledger(7, coord, lease)
        for phase in PHASES:
            for index in range(phase.tasks):
                if (phase.name, index) == ("main", 1):
                    ledger.set_aside(TaskId("main", 1), Failure("SourceError", "broken", False, "work"))
                else:
                    ledger.record(TaskId(phase.name, index), facts(index, phase.name))
        given_to = {p.name: [name for name, _ in ledger.inputs(p, PHASES).outputs] for p in PHASES}
        assert given_to == {
            "survey-0": [],
            "resolve-0": ["survey-0"],
            "survey-1": ["resolve-0"],
            "resolve-1": ["survey-1"],
            "main": ["resolve-0", "resolve-1"],
            "persist": ["main"],
        }
        inputs = ledger.inputs(PHASES[-1], PHASES)
        assert inputs.phase == "persist"
        assert inputs.of("main") == ((0, facts(0, "main").output), (2, facts(2, "main").output))
        assert len(inputs.outputs[0][1]) == 96

    run(opened, scenario)
