"""Results as tables: on a terminal, and as Markdown between markers of a page.

A page holds, for each table, ``<!-- table: NAME -->`` and ``<!-- end: NAME -->``; what stands between is replaced.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from bench.harness import Entry

__all__ = ["Table", "machine", "of_copies", "of_records", "show", "write_page"]


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows and columns.

    Attributes:
        name: Of its place in the page.
        title: What was measured.
        head: Column names; the first column is left, the others right.
        notes: Lines below it.
    """

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """With the title in bold above."""
        lines = [f"**{self.title}**", "", _line(self.head), _line(["---", *["---:"] * (len(self.head) - 1)])]
        lines += [_line(row) for row in self.rows]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def of_records(name: str, title: str, entries: Sequence[Entry], rows: int, against: str) -> Table:
    """Rows a second, fastest first.

    Args:
        against: The contestant that is 1.00.
    """
    base = _seconds_of(entries, against)

    def line(entry: Entry) -> tuple[str, ...]:
        rate = rows / entry.seconds
        low, high = (rows / seconds for seconds in reversed(entry.span))
        ratio = f"{base / entry.seconds:.2f}" if base else "-"
        return (f"{rate:,.0f}", f"{low:,.0f} to {high:,.0f}", f"{entry.seconds:.2f}", ratio, *_memory(entry))

    head = ("", "rows/s", "min to max", "s", f"x {against}", "peak MB", "anonymous", "mapped")
    return Table(name, title, head, _body(entries, line, len(head)), _notes(entries))


def of_copies(name: str, title: str, entries: Sequence[Entry], total_bytes: int, against: Sequence[str]) -> Table:
    """Seconds and GB of source a second, fastest first.

    Args:
        against: The contestants whose time is 1.00, a column each.
    """
    bases = [_seconds_of(entries, name) for name in against]

    def line(entry: Entry) -> tuple[str, ...]:
        ratios = [f"{entry.seconds / base:.2f}" if base else "-" for base in bases]
        low, high = entry.span
        gigabytes = total_bytes / entry.seconds / 1e9
        return (f"{entry.seconds:.2f}", f"{low:.2f} to {high:.2f}", f"{gigabytes:.2f}", *ratios, *_memory(entry))

    head = ("", "s", "min to max", "GB/s", *(f"x {name}" for name in against), "peak MB", "anonymous", "mapped")
    return Table(name, title, head, _body(entries, line, len(head)), _notes(entries))


def _seconds_of(entries: Sequence[Entry], name: str) -> float | None:
    return next((entry.seconds for entry in entries if entry.contestant.name == name and entry.runs), None)


def _memory(entry: Entry) -> tuple[str, str, str]:
    peak = entry.peak
    return f"{peak.pss_mb:,.0f}", f"{peak.anonymous_mb:,.0f}", f"{peak.mapped_mb:,.0f}"


def _body(
    entries: Sequence[Entry], line: Callable[[Entry], tuple[str, ...]], width: int
) -> tuple[tuple[str, ...], ...]:
    done = sorted((entry for entry in entries if entry.runs), key=lambda entry: entry.seconds)
    lines = [(_bold(entry), *line(entry)) for entry in done]
    without = [entry for entry in entries if not entry.runs]
    lines += [(_bold(e), "skipped" if e.skipped else "failed", *[""] * (width - 2)) for e in without]
    return tuple(lines)


def _bold(entry: Entry) -> str:
    return f"**{entry.contestant.name}**" if entry.contestant.ours else entry.contestant.name


def _notes(entries: Sequence[Entry]) -> tuple[str, ...]:
    done = [entry for entry in entries if entry.runs]
    notes = []
    if done:
        notes.append(f"Runs of each: {max(len(entry.runs) for entry in done)}.")
        versions = sorted({str(entry.runs[0].notes["versions"]) for entry in done})
        notes.append(f"Versions: {'; '.join(versions)}.")
    started = [(entry.contestant.name, entry.startup) for entry in done if entry.startup is not None]
    notes += [f"{name}: {seconds:.1f} s of it are starting up." for name, seconds in started]
    notes += [f"{entry.contestant.name}: skipped, {entry.skipped}." for entry in entries if entry.skipped]
    notes += [f"{entry.contestant.name}: failed, {entry.failed}" for entry in entries if entry.failed]
    return tuple(notes)


def show(console: Console, table: Table) -> None:
    """Draw it."""
    drawn = RichTable(title=table.title, title_justify="left", min_width=min(120, len(table.title)))
    for i, name in enumerate(table.head):
        drawn.add_column(name, justify="right" if i else "left")
    for row in table.rows:
        drawn.add_row(*(cell.replace("**", "") for cell in row), style="bold" if row[0].startswith("**") else None)
    console.print(drawn)
    for note in table.notes:
        console.print(note, style="dim", highlight=False, markup=False)


def write_page(page: Path, tables: Sequence[Table]) -> list[str]:
    """Put tables into their places; gives the names of those that have none in the page."""
    text = page.read_text(encoding="utf-8")
    lost = []
    for table in tables:
        place = re.compile(
            rf"(<!-- table: {re.escape(table.name)} -->\n).*?(<!-- end: {re.escape(table.name)} -->)", re.S
        )
        content = f"{table.markdown()}\n"
        text, found = place.subn(lambda match, content=content: match[1] + content + match[2], text)  # type: ignore[misc]
        if not found:
            lost.append(table.name)
    page.write_text(text, encoding="utf-8")
    return lost


def machine() -> Table:
    """What this is measured on."""
    cpu = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    rows = (
        ("date", datetime.datetime.now(datetime.UTC).date().isoformat()),
        ("processor", f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores"),
        ("memory", f"{memory:.0f} GiB"),
        ("system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
    )
    return Table("machine", "Machine", ("", "what"), rows)
