"""Scripts that measure Millrace alone and print what they found: run in fresh processes, and read.

What counts in their output is every ``WHAT[:] NUMBER s`` and ``WHAT[:] NUMBER MB`` at the start of a line.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence

from bench.command import Command
from bench.harness import ROOT
from bench.tables import Table

__all__ = ["measure_script"]

_FOUND = re.compile(r"^([a-z0-9][a-z0-9 ]*?):?\s+([\d.]+) (s|MB)\b", re.MULTILINE)


def measure_script(command: Command, name: str, title: str, arguments: Sequence[str], rounds: int) -> Table:
    """Run ``bench/bench_NAME.py`` ``rounds`` times; one line of the table for each thing it measures.

    Args:
        rounds: 1 for a script that repeats itself and gives medians.
    """
    head = ("", "median", "min to max")
    script = ROOT / "bench" / f"bench_{name}.py"
    if not script.exists():
        return Table(name, title, head, (), (f"Skipped: there is no {script.name}.",))
    found: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds):
        os.sync()
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        if done.returncode:
            command.exit_code = 1
            last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            return Table(name, title, head, (), (f"Failed: {''.join(last)[:500]}",))
        for what, value, unit in _FOUND.findall(done.stdout):
            found.setdefault((what, unit), []).append(float(value))
        command.say(f"round {number + 1}/{rounds}  {script.name}")
    rows = [
        (
            what,
            f"{_text(statistics.median(values), unit)} {unit}",
            " to ".join(_text(f(values), unit) for f in (min, max)),
        )
        for (what, unit), values in found.items()
        if not what.startswith("made ")
    ]
    width = 2 if rounds == 1 else 3
    return Table(name, title, head[:width], tuple(row[:width] for row in rows))


def _text(value: float, unit: str) -> str:
    return f"{value:,.0f}" if unit == "MB" else f"{value:.2f}"
