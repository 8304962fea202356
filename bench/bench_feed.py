"""Loaders of training data: Millrace beside what people feed training loops with.

    python bench/bench_feed.py --write                       # three workloads, 5 rounds: two hours, 14 GB of disk
    python bench/bench_feed.py --quick                       # small, one round: does every loader work here?
    python bench/bench_feed.py --workload tokens --only millrace --only memmap

Batches of 32 rows, as the same torch tensors from every loader, of which the consumer reads something in each 64
bytes. Each loader's own copy of the rows is deleted after its workload, unless ``--keep`` is given.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Command, parser, take
from bench.feed.harness import Feeder, FeedPlan, Figures, measure_feeds
from bench.feed.rows import BATCH_ROWS, ROWS, WORKLOADS
from bench.feed.tables import of_aims, of_rates, of_resuming
from bench.harness import Contestant, interpreter
from bench.tables import Table

Shares = tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """How many rows of each workload, and how long rates are measured and let run before."""

    rows: Mapping[str, int]
    seconds: float
    warm_s: float


FULL = Lengths(ROWS, 5.0, 4.0)
QUICK = Lengths({"tokens": 20_000, "blobs": 4_000, "mix": 8_000}, 1.0, 0.5)


def feeders() -> list[Feeder]:
    """All of them; those whose environment isn't there are skipped when they are measured."""
    torch, grain = interpreter(".venv-peers"), interpreter(".venv-peers2")

    def of(name: str, module: str, variant: str, *needs: str, kind: str = "library", at: Shares = (0.5,)) -> Feeder:
        python = grain if module == "grain_records" else torch
        contestant = Contestant(name, module, python, ("torch", *needs), variant, ours=kind == "ours")
        return Feeder(contestant, kind, at=at)

    return [
        of("Millrace", "millrace_feed", "window", "millrace", kind="ours", at=(0.1, 0.5, 0.9)),
        of("Millrace, NumPy arrays", "millrace_feed", "numpy", "millrace", kind="ours", at=()),
        of("Millrace, shuffle=full", "millrace_feed", "full", "millrace", kind="ours", at=()),
        of("Millrace, shuffle=blocks", "millrace_feed", "blocks", "millrace", kind="ours", at=()),
        of("gather from memory (the limit)", "memmap", "limit", kind="limit", at=()),
        of("memmap, bare loop", "memmap", "bare", kind="hand"),
        of("memmap, DataLoader", "memmap", "loader", kind="hand"),
        of("HF datasets, map", "hf", "map", "datasets"),
        of("HF datasets, iterable", "hf", "iterable", "datasets"),
        of("litdata", "lit", "", "litdata"),
        of("litdata, whole chunks", "lit", "full", "litdata"),
        of("grain, 16 threads", "grain_records", "16", "grain", "array_record"),
        of("grain, no threads", "grain_records", "0", "grain", "array_record"),
        of("webdataset", "wds", "", "webdataset"),
        of("mosaicml-streaming", "mds", "", "streaming"),
        of("mosaicml-streaming, epoch ahead", "mds", "ahead", "streaming"),
    ]


def with_workers() -> list[Feeder]:
    """Those that have worker processes, with two."""
    alone = {"limit", "bare", "numpy", "full", "blocks", "16"}
    changes = {"window": "loader"}
    found = []
    for feeder in feeders():
        one = feeder.contestant
        if one.variant not in alone:
            name = f"{one.name.removesuffix(', no threads')}, 2 workers"
            changed = dataclasses.replace(one, name=name, variant=changes.get(one.variant, one.variant))
            found.append(Feeder(changed, feeder.kind, workers=2))
    return found


def measure_feed(
    command: Command, workload: str, lengths: Lengths, *, workers: bool = False, keep: bool = False
) -> list[Figures]:
    """One workload: two tables, or three with worker processes."""
    rows = lengths.rows[workload]
    folder = command.folder / f"feed-{workload}-{rows}"
    folder.mkdir(parents=True, exist_ok=True)
    plan = FeedPlan(workload, rows, folder, command.rounds, command.seed, lengths.seconds, lengths.warm_s)
    command.say(f"{rows:,} rows, workload {workload}: making each loader's copy")
    title = f"{rows:,} rows, workload {workload}, batches of {BATCH_ROWS}"
    try:
        found = measure_feeds(_only(feeders(), command.only), plan, command.say)
        _add(command, of_rates(f"feed-{workload}", f"{title}, no workers", found), found)
        command.add(of_resuming(f"feed-{workload}-resume", f"{title}: time to a batch", found))
        if workers:
            more = measure_feeds(_only(with_workers(), command.only), plan, command.say)
            _add(command, of_rates(f"feed-{workload}-workers", f"{title}, two worker processes", more), more)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return found


def add_aims(command: Command, found: Mapping[str, Sequence[Figures]]) -> None:
    """The table that sums up."""
    command.add(of_aims("feed", f"Batches of {BATCH_ROWS} a second, no workers", found))


def _only(all_of_them: Sequence[Feeder], only: Sequence[str]) -> list[Feeder]:
    words = [word.lower() for word in only]
    return [
        f
        for f in all_of_them
        if not words or any(w in f.contestant.name.lower() or w in f.contestant.module for w in words)
    ]


def _add(command: Command, table: Table, found: Sequence[Figures]) -> None:
    command.add(table)
    command.results[table.name] = [figures.plain() for figures in found]
    if any(figures.failed for figures in found):
        command.exit_code = 1


def main() -> int:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="small sizes and one round; never written to the page")
    options.add_argument("--workload", choices=WORKLOADS, action="append", help="may be given again; all by default")
    options.add_argument("--rows", type=int, help="instead of the workload's own number")
    options.add_argument("--seconds", type=float, help=f"of a rate (default {FULL.seconds:g})")
    options.add_argument("--workers", action="store_true", help="also with two worker processes")
    options.add_argument("--keep", action="store_true", help="keep the loaders' copies for the next time")
    given = options.parse_args()
    if given.quick and given.write:
        options.error("--quick measures too little to be written to the page; leave one of the two out")
    if given.quick:
        given.rounds = 1
    lengths = QUICK if given.quick else FULL
    if given.rows:
        lengths = dataclasses.replace(lengths, rows=dict.fromkeys(WORKLOADS, given.rows))
    if given.seconds:
        lengths = dataclasses.replace(lengths, seconds=given.seconds)
    found: dict[str, Sequence[Figures]] = {}
    with take(given) as command:
        for workload in given.workload or WORKLOADS:
            found[workload] = measure_feed(command, workload, lengths, workers=given.workers, keep=given.keep)
        add_aims(command, found)
    return command.exit_code


if __name__ == "__main__":
    sys.exit(main())
