"""What the workers of the fleet's tests build: a runner that does as its task's phase says. Imported by them."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from millrace.core.errors import SpecError
from millrace.core.messages import Grant, NodeEvent, PhaseInputs, TaskDone, TaskFacts
from millrace.core.model import digest_of

Deadline = Callable[[str, float], AbstractContextManager[None]]

LIMIT_S = 0.5
FUNCTION = "python: clean:normalise"


@dataclass(frozen=True)
class Setup:
    """Builds a ``Runner``, or fails in the way ``fails`` says."""

    fails: str = ""

    @contextlib.contextmanager
    def __call__(self, deadline: Deadline) -> Iterator[Any]:
        if self.fails == "refuse":
            raise SpecError("p.yaml:3: transforms.0.python: there is no module 'clean'")
        if self.fails == "raise":
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the traceback is for nobody
            raise RuntimeError("nobody foresaw this")
        yield Runner(deadline)


class Runner:
    """Each task's phase is the name of what it does."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._inputs: PhaseInputs | None = None

    def enter(self, inputs: PhaseInputs) -> None:
        self._inputs = inputs

    async def run(self, grant: Grant) -> NodeEvent:
        await {
            "work": self._work,
            "nap": self._nap,
            "exit": self._exit,
            "exit-in-user-code": self._exit_in_user_code,
            "kill": self._kill,
            "hang": self._hang,
            "hang-with-the-lock": self._hang_with_the_lock,
            "many-calls": self._many_calls,
            "wait": self._wait,
            "print": self._print,
        }[grant.task.phase]()
        phase = self._inputs.phase if self._inputs else ""
        return TaskDone(grant, TaskFacts(digest_of(b"x"), rows_in=os.getpid(), notes=(phase,)))

    async def _work(self) -> None:
        with self._deadline(FUNCTION, 60):
            pass

    async def _nap(self) -> None:
        await asyncio.sleep(0.3)  # long enough for the other worker to get the next task

    async def _exit(self) -> None:
        os._exit(3)

    async def _exit_in_user_code(self) -> None:
        with self._deadline(FUNCTION, 60):
            os._exit(3)

    async def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    async def _hang(self) -> None:
        with self._deadline(FUNCTION, LIMIT_S):
            await asyncio.to_thread(time.sleep, 600)

    async def _hang_with_the_lock(self) -> None:
        with self._deadline(FUNCTION, LIMIT_S):
            ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the interpreter's lock, as a bad regular expression does

    async def _many_calls(self) -> None:
        for _ in range(5):
            with self._deadline(FUNCTION, 2.0):
                await asyncio.sleep(0.5)

    async def _wait(self) -> None:
        await asyncio.Event().wait()

    async def _print(self) -> None:
        print("a user's function speaks")
