"""Rows of tokens from Parquet into shards: Millrace beside what people write such shards with.

    python bench/bench_records.py                          # 200,000 rows, both layouts, 5 rounds
    python bench/bench_records.py --rows 20000 --rounds 1 --layout list --only millrace --only mds

Every contestant hashes its output with SHA-256 inside the time; Millrace's three replicas are read back and hashed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.command import Command, chosen, parser, take
from bench.harness import Contestant, Entry, Plan, interpreter, measure, own_interpreter
from bench.tables import Table, of_records
from bench.tokens import LAYOUTS, ROW_BYTES, make_rows

MDS = "MDSWriter"


def contestants() -> list[Contestant]:
    """All of them; those whose environment isn't there are skipped when they are measured."""
    own, torch = own_interpreter(), interpreter(".venv-peers")
    grain, ray = interpreter(".venv-peers2"), interpreter(".venv-peers3")
    pool = "MDSWriter, two processes"
    ours = ("millrace", "pyarrow")
    return [
        Contestant("Millrace, 1 replica", "millrace_run", own, ours, "1", ours=True),
        Contestant("Millrace, 3 replicas, each read back", "millrace_run", own, ours, "3", copies=3, ours=True),
        Contestant("memmap by hand", "memmap", own, ("pyarrow", "numpy")),
        Contestant(MDS, "mds", torch, ("streaming", "torch", "pyarrow")),
        Contestant(pool, "mds", torch, ("streaming", "torch", "pyarrow"), "pool"),
        Contestant("litdata.optimize", "lit", torch, ("litdata", "torch", "pyarrow")),
        Contestant("WebDataset ShardWriter", "wds", torch, ("webdataset", "pyarrow")),
        Contestant("HF datasets, from_parquet", "hf", torch, ("datasets", "pyarrow"), "parquet"),
        Contestant("HF datasets, from_generator", "hf", torch, ("datasets", "pyarrow"), "generator"),
        Contestant("Grain ArrayRecord", "arrayrecord", grain, ("array_record", "pyarrow")),
        Contestant("Ray Data", "raydata", ray, ("ray", "pyarrow")),
    ]


def measure_records(command: Command, rows: int, layout: str) -> tuple[Table, list[Entry]]:
    """One layout."""
    folder = command.folder / f"{layout}-{rows}"
    command.say(f"{rows:,} rows, layout {layout}: making the input")
    plan = Plan(
        source=folder / "rows",
        expected=make_rows(folder, layout, rows),
        layout=layout,
        scratch=command.scratch,
        rounds=command.rounds,
        seed=command.seed,
    )
    entries = measure(chosen(contestants(), command.only), plan, command.say)
    title = f"{rows:,} rows of 2,048 uint16 tokens ({rows * ROW_BYTES / 1e9:.2f} GB), Parquet layout {layout}"
    return of_records(f"records-{layout}", title, entries, rows, MDS), entries


def main() -> int:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--rows", type=int, default=200_000)
    options.add_argument("--layout", choices=LAYOUTS, action="append", help="may be given twice; both by default")
    given = options.parse_args()
    with take(given) as command:
        for layout in given.layout or LAYOUTS:
            command.add(*measure_records(command, given.rows, layout))
    return command.exit_code


if __name__ == "__main__":
    sys.exit(main())
