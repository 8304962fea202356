"""A worker process: reads grants from its pipe, runs them, answers. It dies with its parent.

The pipe joins a process and its own child; pickles never come from anywhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Protocol

from millrace.agent.tasks import Deadline, TaskRunner
from millrace.core.errors import MillraceError
from millrace.core.messages import Failure, Grant, PhaseInputs

__all__ = ["Hello", "UserCode", "WorkerSetup", "worker_main"]


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker's first message: it is ready, or why it can't be."""

    refusal: Failure | None = None


@dataclass(frozen=True, slots=True)
class UserCode:
    """The worker enters user code (its name and time limit), or has left it (an empty name).

    The limit is kept by the parent: code that holds the interpreter lock would stop a timer in the worker too.
    """

    what: str = ""
    limit_s: float = 0.0


class WorkerSetup(Protocol):
    """Builds everything a worker needs, in the worker. Picklable."""

    def __call__(self, deadline: Deadline) -> AbstractContextManager[TaskRunner]:
        """The runner, and what to let go of at the end."""


def worker_main(pipe: Connection, setup: WorkerSetup) -> None:
    """The process's main function."""
    # Ctrl-C goes to the whole process group; the parent decides what becomes of the work.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a user's code prints must not end up among the results on stdout.
    os.dup2(2, 1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with_parent()
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    watch = _Watch(pipe)
    threading.Thread(target=_listen, args=(pipe, inbox), daemon=True).start()
    with contextlib.ExitStack() as stack:
        try:
            runner = stack.enter_context(setup(watch.deadline))
        except Exception as error:
            watch.say(Hello(_refusal(error)))
            return
        watch.say(Hello())
        asyncio.run(_serve(runner, inbox, watch))


def _refusal(error: Exception) -> Failure:
    if isinstance(error, MillraceError):
        return Failure.of(error, blame="work")
    kind = type(error).__name__
    return Failure(kind, f"a worker process can't be set up: {kind}: {error}", False, "work")


async def _serve(runner: TaskRunner, inbox: queue.SimpleQueue[object], watch: _Watch) -> None:
    while True:
        message = await asyncio.to_thread(inbox.get)
        match message:
            case PhaseInputs():
                runner.enter(message)
            case Grant():
                watch.say(await runner.run(message))


def _die_with_parent() -> None:
    """Have the kernel do it, where it can: user code that holds the interpreter lock stops the thread that listens."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # prctl(2)
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, int(signal.SIGKILL))


def _listen(pipe: Connection, inbox: queue.SimpleQueue[object]) -> None:
    """Pass messages on; when the parent is gone, so is this process, whatever it was doing."""
    while True:
        try:
            inbox.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)


class _Watch:
    """The worker's end of the pipe; tells the parent when user code is entered and left."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._sending = threading.Lock()

    def say(self, message: object) -> None:
        with self._sending, contextlib.suppress(BrokenPipeError):
            self._pipe.send(message)

    @contextlib.contextmanager
    def deadline(self, what: str, limit_s: float) -> Iterator[None]:
        self.say(UserCode(what, limit_s))
        try:
            yield
        finally:
            self.say(UserCode())
