"""What every contestant's module is: work that is timed, and a tally of what it left, in another process.

    python -m bench.contestants.NAME run   --source DIR --out DIR [--variant TEXT] [--layout TEXT] [--workers N]
    python -m bench.contestants.NAME tally ...

Each prints one line of JSON that begins with ``{"bench"``. Standard library only: this runs in every peer's own
environment.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.digests import Tally

__all__ = ["MARK", "Job", "enter", "lap"]

MARK = '{"bench"'


@dataclass(frozen=True, slots=True)
class Job:
    """What to do.

    Attributes:
        source: A folder with the input.
        out: An empty folder for the output. What isn't output goes into ``scratch``.
        variant: Which way of several.
        layout: For records: ``binary`` or ``list``.
        workers: Processes or threads, where the tool has them.
    """

    source: Path
    out: Path
    variant: str
    layout: str
    workers: int

    @property
    def inputs(self) -> list[Path]:
        """The files to read, in order."""
        return sorted(path for path in self.source.iterdir() if path.is_file())

    @property
    def scratch(self) -> Path:
        """A folder beside the output, for caches; it is deleted with it."""
        folder = self.out.with_name(f"{self.out.name}-scratch")
        folder.mkdir(exist_ok=True)
        return folder


def lap() -> Callable[[], float]:
    """Seconds since this call."""
    started = time.perf_counter()
    return lambda: time.perf_counter() - started


def enter(
    work: Callable[[Job], Mapping[str, Any] | None], tally: Callable[[Job], Sequence[Tally]], *, versions: str
) -> None:
    """Run one step of a contestant. Everything a module imports has been imported when the clock starts.

    Args:
        work: The conversion; returns when the output is complete. What it returns goes into the results.
        tally: Reads the output back, one tally a copy.
        versions: Which libraries, for the page.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=["run", "tally"])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--layout", default="binary")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    job = Job(options.source.resolve(), options.out.resolve(), options.variant, options.layout, options.workers)
    if options.step == "run":
        seconds = lap()
        extra = work(job)
        result = {"seconds": seconds(), "versions": versions, **(extra or {})}
    else:
        result = {"copies": [copy.plain() for copy in tally(job)]}
    print("\n" + json.dumps({"bench": options.step, **result}), flush=True)
