"""A world in a temporary folder, and the command line in this process."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.cli.app import main
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.keys import run_prefix

PATIENCE_S = 90.0
"""How long a condition may take to come true; only a broken Millrace takes that long."""

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
  azure: {regions: {westeurope: {jurisdiction: eu, stores: {az-main: {url: "file://./world/azure"}}}}}
  ibm: {regions: {us-south: {jurisdiction: us, stores: {ibm-main: {url: "file://./world/ibm"}}}}}
"""


@dataclass(frozen=True)
class Said:
    """What a command printed and exited with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world with four clouds on this disk, and the working directory."""
    (tmp_path / "world.yaml").write_text(WORLD)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    return tmp_path


@pytest.fixture
def cli(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Said]]:
    """``cli("run", "pipeline.yaml")``: the command, in this process."""
    path = list(sys.path)

    def run(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["millrace", *args])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        for name, module in list(sys.modules.items()):  # a next command is a new process, in life
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        importlib.invalidate_caches()
        assert "Traceback" not in err, err
        return Said(code, out, err)

    yield run
    sys.path[:] = path


@pytest.fixture
def spawn(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """The command as a process of its own, in its own process group."""

    def run(*args: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "millrace", *args],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "200"},
            **more,
        )

    return run


def session_of(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of every process that lives in the session ``pid`` began, orphans and all."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] not in {"Z", "X"} and int(fields[3]) == pid:
                found.append((int(entry.name), (entry / "cmdline").read_text().replace("\0", " ")))
        except OSError:
            continue  # it ended between the two looks
    return found


class Run:
    """A ``millrace run`` in a session of its own, and what can be done to it."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def begun(self) -> str:
        """Wait for the sentence that says the run's id."""
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def finished_tasks(self, run: int, phase: str = "") -> int:
        """How many tasks the ledger of ``run`` holds."""

        async def count() -> int:
            coord = SqliteCoordination(file)
            try:
                pages = await coord.list(f"{run_prefix(run)}ledger/{phase}", limit=1000)
                return sum(len(json.loads(page.value)) for page in pages)
            finally:
                await coord.aclose()

        file = self.folder / ".millrace" / "coord.db"
        return asyncio.run(count()) if file.exists() else 0

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait until it is, or fail with what the process said."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if time.monotonic() > deadline or self.process.poll() not in {None, 0}:
                self.kill()
                out, err = self.process.communicate()
                pytest.fail(f"{what} did not happen: exit {self.process.returncode}\n{out}\n{err}")
            time.sleep(0.05)

    def until_tasks(self, count: int, run: int = 1, phase: str = "") -> None:
        """Wait until the ledger holds so many tasks."""
        self.until(
            lambda: self.process.poll() == 0 or self.finished_tasks(run, phase) >= count, f"task {count} of run {run}"
        )

    def processes(self) -> list[tuple[int, str]]:
        """(pid, command line) of all that it started and that lives."""
        return session_of(self.process.pid)

    def workers(self) -> list[int]:
        """The worker processes."""
        return [pid for pid, line in self.processes() if "multiprocessing-fork" in line]

    def until_workers(self, count: int) -> None:
        """Wait until so many worker processes are there."""
        self.until(lambda: len(self.workers()) >= count, f"{count} workers")

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to the whole process group, as a terminal sends it."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self.process.pid, number)

    def end(self, *, timeout: float = PATIENCE_S) -> Said:
        """Wait for the end; nothing it started may live on."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            pytest.fail(f"it went on for {timeout} s: {out}\n{err}")
        deadline = time.monotonic() + 10
        while (left := session_of(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not left, f"still running: {left}"
        return Said(self.process.returncode, out, err)


@pytest.fixture
def launch(spawn: Callable[..., subprocess.Popen[str]], folder: Path) -> Iterator[Callable[..., Run]]:
    """``launch("run", "pipeline.yaml")``: like ``spawn``, with what a test of survival needs; killed at the end."""
    started: list[Run] = []

    def start(*args: str, **more: Any) -> Run:
        started.append(Run(spawn(*args, **more), folder))
        return started[-1]

    yield start
    for run in started:
        run.kill()
        run.process.communicate()


@pytest.fixture
def pipeline(folder: Path) -> Callable[..., str]:
    """Write pipeline.yaml from keyword arguments on top of small defaults; gives its name."""

    def write(name: str = "pipeline.yaml", **fields: Any) -> str:
        spec = {
            "dataset": "d",
            "sources": [{"url": "file://./data", "format": "text"}],
            "placement": {"replicas": 2, "min_clouds": 2},
            **fields,
        }
        (folder / name).write_text(json.dumps(spec))
        return name

    return write
