"""What the measuring commands have in common: their options, where they work, and what comes out."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import ROOT, Contestant, Entry
from bench.tables import Table, machine, show, write_page

__all__ = ["PAGE", "Command", "chosen", "parser", "take"]

PAGE = ROOT / "docs" / "benchmarks.md"


@dataclass(slots=True)
class Command:
    """One call of a command.

    Attributes:
        folder: Where inputs are kept; the disk that is measured.
        only: Names (or parts) of the contestants wanted; none means all.
        tables, results: What was measured so far.
        exit_code: 1 as soon as anything failed.
    """

    folder: Path
    rounds: int
    seed: int
    only: Sequence[str]
    console: Console
    tables: list[Table] = field(default_factory=list)
    results: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    exit_code: int = 0

    @property
    def scratch(self) -> Path:
        """Where outputs are written, and deleted again."""
        return self.folder / "scratch"

    def say(self, line: str) -> None:
        """A line of progress, to stderr."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def add(self, table: Table, entries: Sequence[Entry] = ()) -> None:
        """A table is done: draw it and keep it."""
        show(self.console, table)
        self.tables.append(table)
        self.results[table.name] = [entry.plain() for entry in entries]
        if any(entry.failed for entry in entries):
            self.exit_code = 1


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options all have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=5, help="runs of each contestant (default 5)")
    made.add_argument("--seed", type=int, default=1, help="of the order they run in (default 1)")
    made.add_argument(
        "--dir",
        type=Path,
        default=ROOT / "build" / "bench",
        help="where inputs are kept and outputs go; on the disk to measure (default build/bench)",
    )
    made.add_argument("--only", action="append", default=[], metavar="NAME", help="contestants whose name has this")
    made.add_argument("--json", action="store_true", help="everything as one JSON document on stdout")
    made.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    return made


@contextlib.contextmanager
def take(given: argparse.Namespace) -> Iterator[Command]:
    """Set up, and give the results out at the end. After Ctrl-C there is what was measured by then, but no page."""
    folder = given.dir.resolve() / "millrace-bench"  # ours: it may be deleted
    command = Command(folder, given.rounds, given.seed, given.only, Console(stderr=True, width=130))
    command.scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield command
    except KeyboardInterrupt:
        command.say("interrupted")
        command.exit_code, given.write = 130, False
    finally:
        shutil.rmtree(command.scratch, ignore_errors=True)
    where = machine()
    if given.json:
        tables = [table.plain() for table in (where, *command.tables)]
        print(json.dumps({"tables": tables, "results": command.results}, indent=1))
    if given.write and command.tables:
        for name in write_page(PAGE, [where, *command.tables]):
            command.say(f"{PAGE.name} has no place for the table {name}")


def chosen(contestants: Sequence[Contestant], only: Sequence[str]) -> list[Contestant]:
    """Those whose name or module has one of the words; all without words."""
    words = [word.lower() for word in only]
    return [c for c in contestants if not words or any(w in c.name.lower() or w in c.module for w in words)]
