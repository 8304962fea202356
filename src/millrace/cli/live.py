"""The live views on stderr: one redrawn line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from millrace.cli.output import Output
from millrace.control.runs import Begun
from millrace.core.facts import RunProgress
from millrace.core.units import count, format_bytes
from millrace.wiring.planning import Planned

__all__ = ["RunView", "byte_progress", "listing_progress"]

_PLAIN_EVERY_S = 5.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.fields.get("rate", task.speed) or 0.0
        return Text(f"{format_bytes(rate)}/s")


@contextlib.contextmanager
def listing_progress(output: Output) -> Iterator[Callable[[int], None]]:
    """While sources are listed: how many objects were seen."""
    if not output.live:
        yield lambda _count: None
        return
    columns = (SpinnerColumn(), TextColumn("listing sources"), TextColumn("{task.completed:,.0f} objects"))
    with Progress(*columns, console=output.err, transient=True) as progress:
        bar = progress.add_task("list", total=None)
        yield lambda count: progress.update(bar, completed=count)


@contextlib.contextmanager
def byte_progress(output: Output, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes: call it with (done, total)."""
    if not output.live:
        yield lambda _done, _total: None
        return
    columns = (TextColumn(what), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=output.err, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


class RunView:
    """A run as it goes: phase, tasks, rate, time left, quarantine."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._progress: Progress | None = None
        self._said_at = time.monotonic()
        if output.live:
            self._progress = Progress(
                TextColumn("[bold]{task.description}[/bold]"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                _Rate(),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=output.err,
                transient=True,
            )

    def __enter__(self) -> RunView:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begun(self, begun: Begun, planned: Planned) -> None:
        """The run is ours: say its id, which pause and stop want."""
        record = begun.record
        how = "goes on" if begun.resumed else "begins"
        self._output.say(
            f"run {record.run} of dataset {record.dataset} {how}: {count(len(planned.plan), 'chunk')}, "
            f"{format_bytes(planned.plan.total_bytes)}"
        )
        if self._progress is not None:
            self._progress.add_task(record.dataset, total=None, detail="", rate=0.0)

    def update(self, progress: RunProgress) -> None:
        """Show where it is."""
        detail = f"{progress.phase} {progress.done}/{progress.tasks}, {progress.rows:,} rows"
        if progress.quarantined:
            detail += f", {progress.quarantined} quarantined"
        if self._progress is not None:
            for bar in self._progress.task_ids:
                self._progress.update(
                    bar,
                    completed=progress.bytes_done,
                    total=progress.bytes_total or 1,
                    detail=detail,
                    rate=progress.bytes_per_s,
                )
            return
        now = time.monotonic()
        if not self._output.as_json and now - self._said_at >= _PLAIN_EVERY_S:
            self._said_at = now
            self._output.say(
                f"{detail}: {format_bytes(progress.bytes_done)} of {format_bytes(progress.bytes_total)} "
                f"at {format_bytes(progress.bytes_per_s)}/s"
            )
