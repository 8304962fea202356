"""Files into three stores on one disk, every replica read back and hashed: Millrace beside the least it can cost.

python bench/bench_copy.py                       # 1 GB, then 4 GB, in files of 100 MB, 5 rounds
python bench/bench_copy.py --gb 0.3 --rounds 1 --only millrace --only loop
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from bench.command import Command, chosen, parser, take
from bench.digests import Tally, tally_files
from bench.harness import Contestant, Entry, Plan, measure, own_interpreter
from bench.tables import Table, of_copies

FILE_BYTES = 100_000_000
LOOP = "bare loop"
DURABLE = "bare loop, fsync"


def contestants() -> list[Contestant]:
    """All of them; those whose library or program isn't there are skipped when they are measured."""
    own = own_interpreter()
    return [
        Contestant("Millrace, 3 replicas", "millrace_run", own, ("millrace", "pyarrow"), "3", copies=3, ours=True),
        Contestant(LOOP, "loop", own, copies=3),
        Contestant(DURABLE, "loop", own, (), "fsync", copies=3),
        Contestant("bare loop, fsync, two threads", "loop", own, (), "threads", copies=3),
        Contestant("obstore, ranged reads", "obstores", own, ("obstore",), copies=3),
        Contestant("cp and sha256sum", "commands", own, ("!cp", "!sha256sum"), "cp", copies=3),
        Contestant("rclone, checksums", "commands", own, ("!rclone",), "rclone", copies=3),
    ]


def make_files(folder: Path, total: int) -> Tally:
    """Files of 100 MB of random bytes, the last one shorter; or those that are there. Gives their tally."""
    note = folder / "tally.json"
    if note.exists():
        count, summed = json.loads(note.read_text())
        return Tally(count, int(summed, 16))
    inputs = folder / "files"
    inputs.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(100)
    for i, first in enumerate(range(0, total, FILE_BYTES)):
        (inputs / f"part-{i:05}.bin").write_bytes(rng.bytes(min(FILE_BYTES, total - first)))
    tally = tally_files(inputs)
    note.write_text(json.dumps(tally.plain()))
    return tally


def measure_copy(command: Command, gigabytes: float) -> tuple[Table, list[Entry]]:
    """One size."""
    total = round(gigabytes * 1e9)
    folder = command.folder / f"files-{total}"
    command.say(f"{gigabytes:g} GB of files: making the input")
    plan = Plan(
        source=folder / "files",
        expected=make_files(folder, total),
        layout="files",
        scratch=command.scratch,
        rounds=command.rounds,
        seed=command.seed,
    )
    entries = measure(chosen(contestants(), command.only), plan, command.say)
    title = f"{gigabytes:g} GB in files of 100 MB into three stores, each copy read back and hashed"
    return of_copies(f"copy-{gigabytes:g}gb", title, entries, total, (LOOP, DURABLE)), entries


def main() -> int:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--gb", type=float, action="append", help="may be given twice; 1 and 4 by default")
    given = options.parse_args()
    with take(given) as command:
        for gigabytes in given.gb or (1, 4):
            command.add(*measure_copy(command, gigabytes))
    return command.exit_code


if __name__ == "__main__":
    sys.exit(main())
