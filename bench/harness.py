"""Runs contestants: each time a fresh process, all of them interleaved in random order, over several rounds.

Before each run, for everybody alike: the output folder is new, what earlier runs left to write is on the disk
(``sync``), and the input lies in the page cache (it is read once). Then the clock of the contestant itself counts,
from behind its imports to its output being complete. Afterwards the output is read back by another process, with
the format's own library, and every row of every copy must be there; then it is deleted.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.digests import Tally, files_in
from bench.entry import MARK
from bench.memory import MemoryPeak, TreeWatch, adopt_orphans, descendants

__all__ = [
    "ROOT",
    "Contestant",
    "Entry",
    "Failed",
    "Plan",
    "Run",
    "interpreter",
    "measure",
    "missing",
    "own_interpreter",
    "run_step",
    "settle",
]

ROOT = Path(__file__).resolve().parent.parent
_MB = 1_000_000
_ENVIRONMENT = {
    # Nobody asks a network, sends usage statistics or draws bars.
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "LITDATA_DISABLE_VERSION_CHECK": "1",
}


class Failed(Exception):
    """A contestant's process failed, or its output isn't whole."""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work.

    Attributes:
        name: As tables show it.
        module: Below ``bench.contestants``.
        python: The interpreter of the environment it needs.
        needs: Modules that must be there, and programs with a ``!`` before.
        variant: Which way of several the module has.
        copies: How many whole copies it leaves.
        ours: Whether it is Millrace.
    """

    name: str
    module: str
    python: Path
    needs: tuple[str, ...] = ()
    variant: str = ""
    copies: int = 1
    ours: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured.

    Attributes:
        source: The folder with the input.
        expected: What each copy must hold.
        layout: See ``bench.entry.Job``.
        scratch: A folder for outputs, on the disk to measure.
        rounds: Runs of each contestant.
        seed: For their order.
        timeout_s: For one run.
    """

    source: Path
    expected: Tally
    layout: str
    scratch: Path
    rounds: int
    seed: int
    workers: int = 2
    timeout_s: float = 1800.0


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        seconds: By the contestant's own clock.
        wall_s: Of the whole process, imports and teardown included.
        out_mb: What it left behind, all copies.
        notes: What else it told: versions, ``startup`` seconds, seconds by stage.
    """

    round: int
    seconds: float
    wall_s: float
    out_mb: float
    memory: MemoryPeak
    load_before: float
    notes: Mapping[str, Any]


@dataclass(slots=True)
class Entry:
    """A contestant with its runs, or why there are none."""

    contestant: Contestant
    runs: list[Run] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(run.seconds for run in self.runs)

    @property
    def span(self) -> tuple[float, float]:
        """The fastest and the slowest run, in seconds."""
        return min(run.seconds for run in self.runs), max(run.seconds for run in self.runs)

    @property
    def peak(self) -> MemoryPeak:
        """Of all runs the one that held most."""
        return max((run.memory for run in self.runs), key=lambda peak: peak.pss_mb)

    @property
    def startup(self) -> float | None:
        """The median of what starting took, where a contestant tells."""
        found = [run.notes["startup"] for run in self.runs if "startup" in run.notes]
        return statistics.median(found) if found else None

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.contestant.name,
            "skipped": self.skipped,
            "failed": self.failed,
            "runs": [asdict(run) for run in self.runs],
        }


def measure(contestants: Sequence[Contestant], plan: Plan, say: Callable[[str], None]) -> list[Entry]:
    """Run all of them; one that fails is out from then on.

    Args:
        contestants: In the order they are given back.
        plan: See there.
        say: Told of each run as it ends.
    """
    adopt_orphans()
    entries = [Entry(contestant, skipped=missing(contestant)) for contestant in contestants]
    for entry in entries:
        if entry.skipped:
            say(f"skipped {entry.contestant.name}: {entry.skipped}")
    dice = random.Random(plan.seed)
    for number in range(plan.rounds):
        order = [entry for entry in entries if not (entry.skipped or entry.failed)]
        dice.shuffle(order)
        for entry in order:
            try:
                run = _run(entry.contestant, plan, number)
            except Failed as error:
                entry.failed = str(error)
                entry.runs.clear()
                say(f"FAILED {entry.contestant.name}: {error}")
            else:
                entry.runs.append(run)
                say(
                    f"round {number + 1}/{plan.rounds}  {run.seconds:8.2f} s  {run.memory.pss_mb:6.0f} MB  "
                    f"{entry.contestant.name}"
                )
    return entries


def missing(contestant: Contestant) -> str:
    """What it lacks to run here, in words; nothing if it can."""
    for program in (need[1:] for need in contestant.needs if need.startswith("!")):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if not contestant.python.exists():
        return f"there is no {os.path.relpath(contestant.python, ROOT)}; make it as bench/README.md says"
    modules = [need for need in contestant.needs if not need.startswith("!")]
    ask = f"import importlib.util as u; print(*(m for m in {modules!r} if u.find_spec(m) is None))"
    done = subprocess.run([contestant.python, "-c", ask], capture_output=True, text=True, env=_environment())
    lacking = done.stdout.split()
    if done.returncode or lacking:
        return f"{os.path.relpath(contestant.python, ROOT)} lacks {', '.join(lacking) or 'what it needs'}"
    return ""


def _run(contestant: Contestant, plan: Plan, number: int) -> Run:
    out = plan.scratch / "out"
    _delete(out)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as temporary:
        return _timed(contestant, plan, number, out, temporary)


def _timed(contestant: Contestant, plan: Plan, number: int, out: Path, temporary: str) -> Run:
    try:
        settle(plan.source)
        load = os.getloadavg()[0]
        watch = TreeWatch()
        started = time.perf_counter()
        try:
            notes = dict(_step("run", contestant, plan, out, temporary))
        finally:
            wall_s = time.perf_counter() - started
            memory = watch.stop()
        size = sum(path.stat().st_size for path in files_in(out))
        copies = _step("tally", contestant, plan, out, temporary)["copies"]
        if copies != [plan.expected.plain()] * contestant.copies:
            wanted = f"{contestant.copies} x {plan.expected.count}"
            raise Failed(f"the output isn't whole: {[count for count, _ in copies]} items instead of {wanted}")
        return Run(number, notes.pop("seconds"), wall_s, size / _MB, memory, load, notes)
    finally:
        _delete(out)


def settle(source: Path) -> None:
    """The same ground for everybody: nothing left to write, the input in the page cache."""
    os.sync()
    for path in files_in(source):
        with path.open("rb", buffering=0) as file:
            while file.read(16 * _MB):
                pass


def _step(step: str, contestant: Contestant, plan: Plan, out: Path, temporary: str) -> Mapping[str, Any]:
    command = [
        *(contestant.python, "-m", f"bench.contestants.{contestant.module}", step),
        *("--source", plan.source, "--out", out, "--layout", plan.layout),
        *("--variant", contestant.variant, "--workers", plan.workers),
    ]
    return run_step(step, command, plan.scratch, temporary, plan.timeout_s)


def run_step(step: str, command: Sequence[object], folder: Path, temporary: str, timeout_s: float) -> Mapping[str, Any]:
    """Run one step of a contestant in a process of its own; gives what it printed.

    Args:
        step: Its name, for errors.
        folder: The working directory.
        temporary: The directory for temporary files.

    Raises:
        Failed: It took too long or didn't end well.
    """
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=folder,
        env={**_environment(), "TMPDIR": temporary},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{step} took more than {timeout_s:.0f} s") from error
        finally:
            _end_descendants()
    found = [line for line in stdout.splitlines() if line.startswith(MARK)]
    if process.returncode or len(found) != 1:
        last = [line for line in (stderr or stdout).splitlines() if line.strip()][-1:]
        raise Failed(f"{step} exited with {process.returncode}: {''.join(last)[:500]}")
    result: Mapping[str, Any] = json.loads(found[0])
    return {key: value for key, value in result.items() if key != "bench"}


def _end_descendants() -> None:
    """Whatever a contestant started and left, by id."""
    for _ in range(50):
        left = descendants()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left:
            return
        time.sleep(0.02)


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MILLRACE", "VIRTUAL"))}
    return {**kept, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}


def _delete(out: Path) -> None:
    for folder in (out, out.with_name(f"{out.name}-scratch")):
        if folder.exists():
            shutil.rmtree(folder)


def interpreter(environment: str) -> Path:
    """The Python of one of the peers' environments, beside the project's."""
    return ROOT / environment / "bin" / "python"


def own_interpreter() -> Path:
    """The one that runs this."""
    return Path(sys.executable)
