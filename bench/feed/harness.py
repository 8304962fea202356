"""Runs loaders: each figure in a fresh process, all of them interleaved in random order, over several rounds.

First each loader's own copy of the rows is made, and one whole epoch of each is read and counted; neither is timed.
Then, in every round, each gives its rate, with the time to its first batch, and its time to a first batch from each
kept state. Memory is watched in runs of its own, so that watching slows no rate down. Before each run nothing is left
to write, and the loader's files lie in the page cache.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.digests import Tally
from bench.feed.rows import pieces, tally_rows, uniform_spread
from bench.harness import Contestant, Failed, missing, run_step, settle
from bench.memory import MemoryPeak, TreeWatch, adopt_orphans

__all__ = ["FeedPlan", "Feeder", "Figures", "expected", "measure_feeds"]

_MEMORY_RUNS = 2


@dataclass(frozen=True, slots=True)
class Feeder:
    """A loader in one of its ways.

    Attributes:
        contestant: Its module is below ``bench.feed.contestants``; all ways of a module share its copy of the rows.
        workers: Processes; 0 for none.
        kind: ``ours``, ``library``, ``hand`` (what a person writes instead) or ``limit``.
        at: Shares of an epoch to resume at, if it can be.
    """

    contestant: Contestant
    kind: str = "library"
    workers: int = 0
    at: tuple[float, ...] = (0.5,)


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """What is measured.

    Attributes:
        rows: How many there are of the workload.
        folder: Where the loaders' copies of them lie, on the disk to measure.
        rounds: Runs of each figure.
        seed: For their order.
        seconds, warm_s: How long a rate is measured, and at most let run before that.
        at: Shares of an epoch to resume at.
        timeout_s: For one process.
    """

    workload: str
    rows: int
    folder: Path
    rounds: int
    seed: int
    seconds: float
    warm_s: float
    timeout_s: float = 1800.0


@dataclass(slots=True)
class Figures:
    """What was found of one, or why nothing was.

    Attributes:
        whole: Of the untimed epoch: ``lost``, ``repeated``, ``spread`` (1.0 is that of a uniform draw), ``states``.
        after: Of resuming at each share of an epoch: ``lost``, ``repeated``, ``same``.
        rates: Batches a second, with ``first_s`` and others; one each round.
        resumed: Seconds to the first batch from each share; None where nothing was left to give.
        memory: Peaks of the process tree while batches are read.
    """

    feeder: Feeder
    whole: Mapping[str, Any] = field(default_factory=dict)
    after: dict[float, Mapping[str, Any]] = field(default_factory=dict)
    rates: list[Mapping[str, Any]] = field(default_factory=list)
    resumed: dict[float, list[float | None]] = field(default_factory=dict)
    memory: list[MemoryPeak] = field(default_factory=list)
    skipped: str = ""
    failed: str = ""

    @property
    def name(self) -> str:
        """As tables show it."""
        return self.feeder.contestant.name

    @property
    def rate(self) -> float:
        """Batches a second: the median."""
        return statistics.median(self._each("rate"))

    @property
    def rate_span(self) -> tuple[float, float]:
        """The slowest and the fastest round."""
        return min(self._each("rate")), max(self._each("rate"))

    @property
    def first_s(self) -> list[float]:
        """Seconds to the first batch, each round."""
        return self._each("first_s")

    @property
    def peak(self) -> MemoryPeak | None:
        """The run that held most."""
        return max(self.memory, key=lambda peak: peak.pss_mb, default=None)

    def _each(self, what: str) -> list[float]:
        return [rate[what] for rate in self.rates]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "kind": self.feeder.kind, **{k: v for k, v in asdict(self).items() if k != "feeder"}}


def expected(plan: FeedPlan) -> Tally:
    """What an epoch of every loader must hold."""
    found = Tally()
    for piece in pieces(plan.workload, plan.rows):
        kinds = None if piece.kinds is None else piece.kinds.tolist()
        found.add(tally_rows(piece.values.data, piece.offsets.tolist(), kinds))
    return found


def measure_feeds(feeders: Sequence[Feeder], plan: FeedPlan, say: Callable[[str], None]) -> list[Figures]:
    """Run all of them; one that fails is out from then on.

    Args:
        feeders: In the order they are given back.
        plan: See there.
        say: Told of each run as it ends.
    """
    adopt_orphans()
    found = [Figures(feeder, skipped=missing(feeder.contestant)) for feeder in feeders]
    for figures in found:
        if figures.skipped:
            say(f"skipped {figures.name}: {figures.skipped}")
    tally, uniform = expected(plan), uniform_spread(plan.rows)
    for figures in _able(found):
        with _guarded(figures, say):
            _begin(figures, plan, tally, uniform, say)
    dice = random.Random(plan.seed)
    for number in range(plan.rounds):
        tasks = [(figures, task) for figures in _able(found) for task in _tasks(figures, plan, number)]
        dice.shuffle(tasks)
        for figures, task in tasks:
            if not figures.failed:
                with _guarded(figures, say):
                    say(f"round {number + 1}/{plan.rounds}  {task(figures)}  {figures.name}")
    return found


def _able(found: Sequence[Figures]) -> list[Figures]:
    return [figures for figures in found if not (figures.skipped or figures.failed)]


@contextlib.contextmanager
def _guarded(figures: Figures, say: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except Failed as error:
        figures.failed = str(error)
        say(f"FAILED {figures.name}: {error}")


def _begin(figures: Figures, plan: FeedPlan, tally: Tally, uniform: float, say: Callable[[str], None]) -> None:
    """Make its copy of the rows, unless another way of the same loader has, and read it whole."""
    data = _data(figures, plan)
    if not data.exists():
        making = data.with_name(f"{data.name}.making")
        shutil.rmtree(making, ignore_errors=True)
        data.mkdir(parents=True)
        try:
            _step("prepare", figures, plan)
        except BaseException:
            data.rename(making)
            shutil.rmtree(making)
            raise
    whole = dict(_step("whole", figures, plan, *_at(*figures.feeder.at)))
    whole["spread"] /= uniform
    figures.whole = whole
    if whole["tally"] != tally.plain() and not (whole["lost"] or whole["repeated"]):
        raise Failed(f"the rows aren't what was written: {whole['tally']} instead of {tally.plain()}")
    if whole["states"]:
        figures.resumed = {at: [] for at in figures.feeder.at}
        for at in figures.feeder.at:
            figures.after[at] = _step("after", figures, plan, *_at(at))
    say(f"an epoch of {figures.name}: {whole['lost']} lost, {whole['repeated']} repeated, spread {whole['spread']:.2f}")


def _tasks(figures: Figures, plan: FeedPlan, number: int) -> Iterator[Callable[[Figures], str]]:
    def rate(figures: Figures) -> str:
        found = _step("rate", figures, plan, "--seconds", plan.seconds, "--warm", plan.warm_s)
        figures.rates.append(found)
        return f"{found['rate']:10,.1f} batches/s"

    def memory(figures: Figures) -> str:
        watch = TreeWatch()
        try:
            _step("rate", figures, plan, "--seconds", plan.seconds, "--warm", plan.warm_s)
        finally:
            peak = watch.stop()
        figures.memory.append(peak)
        return f"{peak.pss_mb:10,.0f} MB"

    def resume(at: float) -> Callable[[Figures], str]:
        def run(figures: Figures) -> str:
            found = _step("resume", figures, plan, *_at(at))["first_s"]
            figures.resumed[at].append(found)
            return f"{1000 * (found or 0):10,.1f} ms to resume at {at:.0%}"

        return run

    yield rate
    if number < _MEMORY_RUNS:
        yield memory
    for at in figures.resumed:
        yield resume(at)


def _at(*shares: float) -> list[object]:
    return [part for at in shares for part in ("--at", f"{at:g}")]


def _data(figures: Figures, plan: FeedPlan) -> Path:
    return plan.folder / figures.feeder.contestant.module


def _step(step: str, figures: Figures, plan: FeedPlan, *more: object) -> Mapping[str, Any]:
    feeder, data = figures.feeder, _data(figures, plan)
    contestant = feeder.contestant
    notes = plan.folder / "notes" / f"{contestant.module}-{contestant.variant}-{feeder.workers}"
    command = [
        *(contestant.python, "-m", f"bench.feed.contestants.{contestant.module}", step),
        *("--data", data, "--workload", plan.workload, "--rows", plan.rows, "--notes", notes),
        *("--variant", contestant.variant, "--workers", feeder.workers, *more),
    ]
    settle(data)
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as temporary:
        return run_step(step, command, plan.folder, temporary, plan.timeout_s)
