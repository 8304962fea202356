"""The nodes of one machine: slots in this process, or worker processes that may die without taking the run along.

Both keep the :class:`millrace.core.ports.Fleet` port: grants in, events out. Which one a run gets depends on its
work: without transforms everything that takes time lets go of the interpreter lock, and threads share memory; user
code and tokenisers run in processes, where they can be timed out, killed and replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from millrace.agent.tasks import TaskRunner
from millrace.agent.worker import Hello, UserCode, WorkerSetup, worker_main
from millrace.core.messages import Failure, Grant, NodeEvent, PhaseInputs, TaskFailed

__all__ = ["InlineFleet", "ProcessFleet"]

_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 2.0


class InlineFleet:
    """Tasks as coroutines of this process.

    Args:
        runner: Does the work; may be shared by any number of tasks at once.
    """

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner
        self._events = _Events()
        self._tasks: set[asyncio.Task[None]] = set()

    async def enter(self, inputs: PhaseInputs) -> None:
        """See the port."""
        self._runner.enter(inputs)

    async def send(self, grant: Grant) -> None:
        """See the port."""
        task = asyncio.create_task(self._work(grant), name=f"{grant.task.phase}/{grant.task.index}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def events(self) -> Sequence[NodeEvent]:
        """See the port."""
        return await self._events.drain()

    async def aclose(self) -> None:
        """See the port."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _work(self, grant: Grant) -> None:
        async with self._events.surfacing():
            self._events.put(await self._runner.run(grant))


class ProcessFleet:
    """Worker processes, one task at a time each, started by spawn.

    A worker that dies or overruns a transform's time limit is replaced; its task fails with a sentence that says in
    which transform it happened, and may be tried again.

    Args:
        node: The node's name in grants.
        slots: How many processes.
        setup: Builds a worker's ``TaskRunner`` in the new process; must be picklable.
    """

    def __init__(self, node: str, slots: int, setup: WorkerSetup) -> None:
        self._node = node
        self._setup = setup
        self._events = _Events()
        self._workers = [_Worker(f"{node}-{i}", setup) for i in range(slots)]
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._inputs: PhaseInputs | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Start the processes, side by side. One that can't set itself up says why with its first task."""
        for worker in self._workers:
            self._idle.put_nowait(worker)
            worker.spawn()

    async def enter(self, inputs: PhaseInputs) -> None:
        """See the port."""
        self._inputs = inputs

    async def send(self, grant: Grant) -> None:
        """See the port."""
        task = asyncio.create_task(self._work(grant), name=f"{grant.task.phase}/{grant.task.index}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def events(self) -> Sequence[NodeEvent]:
        """See the port."""
        return await self._events.drain()

    async def aclose(self) -> None:
        """See the port."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    async def _work(self, grant: Grant) -> None:
        worker = await self._idle.get()
        try:
            async with self._events.surfacing():
                self._events.put(await worker.work(grant, self._inputs))
        finally:
            self._idle.put_nowait(worker)


class _Events:
    """Answers on their way to whoever waits for them; an error of the fleet's own comes out there too."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[NodeEvent | Exception] = asyncio.Queue()

    def put(self, event: NodeEvent) -> None:
        self._queue.put_nowait(event)

    @contextlib.asynccontextmanager
    async def surfacing(self) -> AsyncIterator[None]:
        """A task that ends without an answer would be waited for without end."""
        try:
            yield
        except Exception as error:
            self._queue.put_nowait(error)

    async def drain(self) -> Sequence[NodeEvent]:
        found = [await self._queue.get()]
        while not self._queue.empty():
            found.append(self._queue.get_nowait())
        for event in found:
            if isinstance(event, Exception):
                raise event
        return [event for event in found if not isinstance(event, Exception)]


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process started in this block isn't hit by a Ctrl-C before it could say that it ignores it."""
    resource_tracker.ensure_running()  # starting it in the block would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One worker process and the pipe to it."""

    def __init__(self, name: str, setup: WorkerSetup) -> None:
        self._name = name
        self._setup = setup
        self._process: Any = None
        self._pipe: Connection | None = None
        self._entered: PhaseInputs | None = None
        self._ready = False
        self._user_code = UserCode()

    def spawn(self) -> None:
        """Start the process; it says hello when it is ready."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=worker_main, args=(theirs, self._setup), name=f"millrace-{self._name}", daemon=True
        )
        with _without_interrupts():
            self._process.start()
        theirs.close()
        self._pipe = ours
        self._entered = None
        self._ready = False

    async def work(self, grant: Grant, inputs: PhaseInputs | None) -> NodeEvent:
        """One task, from grant to answer, whatever happens to the process."""
        self._user_code = UserCode()
        try:
            if self._process is None or not self._process.is_alive():
                await self.stop()
                self.spawn()
            if not self._ready:
                refusal = await self._greet()
                if refusal is not None:
                    return TaskFailed(grant, refusal)
            if inputs is not None and inputs is not self._entered:
                self._send(inputs)
                self._entered = inputs
            self._send(grant)
            return await self._answer(grant)
        except asyncio.CancelledError:
            await self.stop()
            raise
        except (EOFError, OSError):
            return TaskFailed(grant, await self._post_mortem(grant))

    async def stop(self) -> None:
        """End the process: kindly, then not."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        self._ready = False
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.join, _STOP_TIMEOUT_S)
            if process.exitcode is not None:
                process.close()

    def _send(self, message: object) -> None:
        assert self._pipe is not None
        self._pipe.send(message)

    async def _receive(self) -> Any:
        """The next message, without a thread: the loop watches the pipe."""
        assert self._pipe is not None
        pipe = self._pipe
        loop = asyncio.get_running_loop()
        readable: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not readable.done():
                readable.set_result(None)

        loop.add_reader(pipe.fileno(), wake)
        try:
            await readable
        finally:
            loop.remove_reader(pipe.fileno())
        return pipe.recv()

    async def _greet(self) -> Failure | None:
        try:
            hello = await asyncio.wait_for(self._receive(), _START_TIMEOUT_S)
        except TimeoutError:
            await self.stop()
            sentence = f"a worker was not ready after {_START_TIMEOUT_S:g} s; importing the transforms takes too long"
            return Failure("TransformError", sentence, True, "work")
        assert isinstance(hello, Hello)
        if hello.refusal is not None:
            await self.stop()
            return hello.refusal
        self._ready = True
        return None

    async def _answer(self, grant: Grant) -> NodeEvent:
        while True:
            limit_s = self._user_code.limit_s if self._user_code.what else None
            try:
                message = await asyncio.wait_for(self._receive(), limit_s)
            except TimeoutError:
                await self.stop()
                sentence = (
                    f"{self._user_code.what} ran longer than its timeout of {limit_s:g} s on {_task(grant)}; "
                    "raise the transform's 'timeout' or mend it"
                )
                return TaskFailed(grant, Failure("TransformError", sentence, True, "work"))
            if isinstance(message, UserCode):
                self._user_code = message
            else:
                return message  # type: ignore[no-any-return]

    async def _post_mortem(self, grant: Grant) -> Failure:
        process = self._process
        code: int | None = None
        if process is not None:
            await asyncio.to_thread(process.join, _STOP_TIMEOUT_S)
            with contextlib.suppress(ValueError):
                code = process.exitcode
        await self.stop()
        if code is None:
            how = "gave no answer"
        else:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if self._user_code.what:
            sentence = f"{self._user_code.what} took its worker process down on {_task(grant)}: the process {how}"
            return Failure("TransformError", sentence, True, "work")
        return Failure("WorkerDied", f"the worker process {how} on {_task(grant)}", True, "place")


def _task(grant: Grant) -> str:
    noun = "chunk" if grant.task.phase.startswith(("main", "survey")) else f"{grant.task.phase} task"
    return f"{noun} {grant.task.index}"
