"""All measurements in one go, and the tables they make. See bench/README.md.

python bench/run_all.py --quick        # small sizes, one round: does everything work here?
python bench/run_all.py --write        # the real ones, into docs/benchmarks.md: three hours and 35 GB of disk
python bench/run_all.py --part copy    # some of them: plan, manifest, records, copy, memory, feed
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import bench_feed
from bench.bench_copy import measure_copy
from bench.bench_records import measure_records
from bench.command import Command, parser, take
from bench.feed.rows import WORKLOADS
from bench.harness import Entry
from bench.scripts import measure_script
from bench.tables import Table
from bench.tokens import LAYOUTS, ROW_BYTES

PARTS = ("plan", "manifest", "records", "copy", "memory", "feed")


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything.

    Attributes:
        gigabytes: Of the copies, small and large; the records that show how memory grows are as large.
    """

    objects: int
    shards: int
    rows: int
    gigabytes: tuple[float, float]


FULL = Sizes(1_000_000, 500_000, 200_000, (1, 4))
QUICK = Sizes(50_000, 20_000, 20_000, (0.1, 0.3))


def main() -> int:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="small sizes and one round; never written to the page")
    options.add_argument("--part", choices=PARTS, action="append", help="may be given several times; all by default")
    options.add_argument("--keep", action="store_true", help="keep the inputs for the next time")
    given = options.parse_args()
    if given.quick and given.write:
        options.error("--quick measures too little to be written to the page; leave one of the two out")
    if given.quick:
        given.rounds = 1
    parts = given.part or PARTS
    sizes = QUICK if given.quick else FULL
    with take(given) as command:
        if "plan" in parts:
            title = f"Planning {sizes.objects:,} source objects"
            command.add(measure_script(command, "plan", title, ["--objects", str(sizes.objects)], command.rounds))
        if "manifest" in parts:
            title = f"Opening a manifest of {sizes.shards:,} shards in a fresh process"
            arguments = ["--shards", str(sizes.shards), "--repeat", str(command.rounds)]
            command.add(measure_script(command, "manifest", title, arguments, 1))
        if "records" in parts:
            for layout in LAYOUTS:
                command.add(*measure_records(command, sizes.rows, layout))
        copies = [_copy(command, gigabytes) for gigabytes in sizes.gigabytes] if "copy" in parts else []
        if "memory" in parts:
            command.add(_memory(command, sizes, copies))
        if "feed" in parts:
            lengths = bench_feed.QUICK if given.quick else bench_feed.FULL
            found = {w: bench_feed.measure_feed(command, w, lengths, keep=given.keep) for w in WORKLOADS}
            bench_feed.add_aims(command, found)
        if not given.keep:
            shutil.rmtree(command.folder, ignore_errors=True)
    return command.exit_code


def _copy(command: Command, gigabytes: float) -> list[Entry]:
    table, entries = measure_copy(command, gigabytes)
    command.add(table, entries)
    return entries


def _memory(command: Command, sizes: Sizes, copies: list[list[Entry]]) -> Table:
    """How Millrace's peak grows with the input: a table of its own, since its point is another."""
    ours = dataclasses.replace(command, only=["millrace, 3"], rounds=min(command.rounds, 2))
    lines: list[tuple[str, ...]] = []
    for layout in LAYOUTS:
        peaks = []
        for gigabytes in sizes.gigabytes:
            _, entries = measure_records(ours, round(gigabytes * 1e9 / ROW_BYTES), layout)
            peaks.append(entries)
        lines.append(_growth(f"records, layout {layout}", peaks))
    lines.append(_growth("copy", copies or [measure_copy(ours, gigabytes)[1] for gigabytes in sizes.gigabytes]))
    if any("failed" in line for line in lines):
        command.exit_code = 1
    head = ("3 replicas", *(f"{gigabytes:g} GB in" for gigabytes in sizes.gigabytes), "ratio")
    note = "Peak MB of the whole process tree (proportional set size), then its anonymous part."
    return Table("memory", "Peak memory as the input grows", head, tuple(lines), (note,))


def _growth(name: str, sizes: list[list[Entry]]) -> tuple[str, ...]:
    found = [next((entry for entry in entries if entry.contestant.ours), None) for entries in sizes]
    peaks = [entry.peak for entry in found if entry is not None and entry.runs]
    if len(peaks) != len(sizes):
        return (name, *["failed"] * len(sizes), "")
    ratio = f"{peaks[-1].pss_mb / peaks[0].pss_mb:.2f}"
    return (name, *(f"{peak.pss_mb:,.0f} ({peak.anonymous_mb:,.0f})" for peak in peaks), ratio)


if __name__ == "__main__":
    sys.exit(main())
