"""A clock that goes on when it is read, a strict small fleet, and both coordination stores."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from millrace.coord.memory import MemoryCoordination
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.messages import Grant, NodeEvent, PhaseInputs, TaskDone, TaskFacts
from millrace.core.model import digest_of
from millrace.core.ports import Coordination

OpenCoordination = Callable[[], Coordination]


class SteppingClock:
    """Goes on by 50 ms whenever somebody looks at it, so that no test waits for a backoff."""

    def __init__(self) -> None:
        self._monotonic_s = 0.0
        self.wall_ms = 1_700_000_000_000

    def now_ms(self) -> int:
        """Wall time; moved by hand."""
        return self.wall_ms

    def monotonic_s(self) -> float:
        """A little later each time."""
        self._monotonic_s += 0.05
        return self._monotonic_s


class StrictFleet:
    """A fleet of coroutines that checks what it is told, and can be held back.

    Args:
        slots: More grants at once than this are refused.
        answer: What a grant comes to. By default every task is done.
    """

    def __init__(
        self, *, slots: int = 2, answer: Callable[[Grant], Awaitable[NodeEvent]] | None = None, held: bool = False
    ) -> None:
        self._slots = slots
        self._answer = answer or self.done
        self._events: asyncio.Queue[NodeEvent | Exception] = asyncio.Queue()
        self._tasks: dict[asyncio.Task[None], Grant] = {}
        self._gate = asyncio.Event()
        if not held:
            self._gate.set()
        self.entered: list[PhaseInputs] = []
        self.sent: list[Grant] = []
        self.closed = False

    @staticmethod
    async def done(grant: Grant) -> NodeEvent:
        """The plain outcome of a task: deterministic, whoever asks."""
        output = digest_of(f"{grant.task}".encode())
        if grant.task.phase == "persist":
            return TaskDone(grant, TaskFacts(output, rows_out=5, pages=(b"page",), meta_pages=(b"meta",)))
        if grant.task.phase == "main":
            return TaskDone(
                grant, TaskFacts(output, rows_in=10, rows_out=9, bytes_in=100, shards=1, replicas=3, notes=("a note",))
            )
        return TaskDone(grant, TaskFacts(output, bytes_in=100))

    def release(self) -> None:
        """Let what is held back come to its end, and all that follows."""
        self._gate.set()

    def hold(self) -> None:
        """Hold back what is granted from now on."""
        self._gate.clear()

    def fail(self, error: Exception) -> None:
        """The fleet itself fails."""
        self._events.put_nowait(error)

    @property
    def in_flight(self) -> int:
        """Grants without an answer."""
        return len(self._tasks)

    async def enter(self, inputs: PhaseInputs) -> None:
        """See the port."""
        assert not self.closed
        assert not self._tasks, "a phase begins while tasks of the one before are at work"
        self.entered.append(inputs)

    async def send(self, grant: Grant) -> None:
        """See the port."""
        assert not self.closed
        assert grant.task.phase == self.entered[-1].phase
        assert len(self._tasks) < self._slots
        assert grant.task not in {g.task for g in self._tasks.values()}
        self.sent.append(grant)
        task = asyncio.create_task(self._work(grant))
        self._tasks[task] = grant

    async def events(self) -> Sequence[NodeEvent]:
        """See the port."""
        found = [await self._events.get()]
        while not self._events.empty():
            found.append(self._events.get_nowait())
        for event in found:
            if isinstance(event, Exception):
                raise event
        return [event for event in found if not isinstance(event, Exception)]

    async def aclose(self) -> None:
        """See the port."""
        self.closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, grant: Grant) -> None:
        try:
            await self._gate.wait()
            event = await self._answer(grant)
        finally:
            self._tasks = {t: g for t, g in self._tasks.items() if g != grant}
        self._events.put_nowait(event)


@pytest.fixture
def clock() -> SteppingClock:
    """A fresh one."""
    return SteppingClock()


@pytest.fixture
def make_fleet() -> type[StrictFleet]:
    """The fleet's class: it is made inside of an event loop."""
    return StrictFleet


@pytest.fixture(params=["memory", "sqlite"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], object]:
    """Opens a coordination store for the time of a block; the same facts each time only with sqlite."""

    @asynccontextmanager
    async def open_one() -> AsyncIterator[Coordination]:
        coord: Coordination = (
            MemoryCoordination() if request.param == "memory" else SqliteCoordination(tmp_path / "coord.db")
        )
        try:
            yield coord
        finally:
            await coord.aclose()

    return open_one
