"""adopt: give files that are there already a manifest, without rewriting a byte."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from types import TracebackType
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.cli.app import app, perform
from millrace.cli.options import JsonOption, WorldOption
from millrace.cli.output import Output
from millrace.core.errors import UsageError
from millrace.core.units import count, format_bytes, format_seconds
from millrace.wiring.adopting import Adopted, AdoptRequest
from millrace.wiring.adopting import adopt as adopt_files
from millrace.wiring.world import open_world

__all__: list[str] = []

_SLOTS_MAX: Final = 4
_PLAIN_EVERY_S: Final = 5.0


class AdoptFormat(StrEnum):
    """What files can be adopted as."""

    PARQUET = "parquet"
    ARROW = "arrow"
    WEBDATASET = "webdataset"
    MDS = "mds"


@app.command()
def adopt(
    url: Annotated[str, typer.Argument(help="A directory, a prefix of a bucket, or one file; a path or a URL.")],
    name: Annotated[str, typer.Option(help="The dataset's name.")],
    format: Annotated[
        AdoptFormat | None, typer.Option("--format", "-f", help="What the files are. Default: as they are named.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Take what matches this glob; may be given again.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave what matches this glob; may be given again.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the store; may be given again.")
    ] = None,
    site: Annotated[
        str | None, typer.Option(metavar="CLOUD/REGION", help="Where the files lie. Default: where this machine is.")
    ] = None,
    replicas: Annotated[int | None, typer.Option(min=1, max=16, help="Copies of the manifest. Default: 3.")] = None,
    no_decode: Annotated[bool, typer.Option("--no-decode", help="Hash blocks without decoding each once.")] = False,
    slots: Annotated[int | None, typer.Option(min=1, max=64, help="Files read at once. Default: one per core.")] = None,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Index Parquet, Arrow, WebDataset or MDS files where they lie, as a version of a dataset."""
    output = Output(as_json=as_json)

    async def work() -> Adopted:
        request = AdoptRequest(
            url=url,
            name=name,
            encoding=format.value if format else None,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            options=dict(_option(text) for text in option or ()),
            site=site,
            replicas=replicas,
            check=not no_decode,
            slots=slots or min(_SLOTS_MAX, os.cpu_count() or 1),
        )
        async with open_world(world) as opened:
            with _View(output) as view:
                return await adopt_files(opened, request, listed=view.listed, progress=view.hashed)

    done = perform(output, work, interrupted="interrupted; nothing was added, and the same command begins again")
    version = done.version
    output.document(_json(done))
    for note in done.notes:
        output.line(f"note: {note}", style="yellow")
    kept = "unchanged, already" if done.unchanged else "is"
    output.line(f"{version.dataset}@{version.version} {kept} {version.digest}", style="bold green")
    output.line(
        f"{count(version.rows, 'row')} in {count(version.shards, 'file')} and {count(done.blocks, 'block')}, "
        f"{format_bytes(version.bytes)} of {done.encoding} hashed where it lies; "
        f"{count(done.replicas, 'replica')} of the manifest read back; {format_seconds(done.seconds)}"
    )


class _View:
    """How far it is: a line that is redrawn on a terminal, a line now and then elsewhere. Told from any thread."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._said_at = time.monotonic()
        self._progress: Progress | None = None
        if output.live:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=output.err, transient=True)
            self._task = self._progress.add_task("listing", total=None, rate="")

    def __enter__(self) -> _View:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def listed(self, files: int) -> None:
        """So many files were seen."""
        if self._progress is not None:
            self._progress.update(self._task, description=f"listing: {count(files, 'file')}")

    def hashed(self, done: int, total: int) -> None:
        """So many bytes of so many were hashed."""
        if self._progress is not None:
            speed = self._progress.tasks[0].speed
            rate = f"{format_bytes(speed)}/s" if speed else ""
            self._progress.update(self._task, description="hashing", completed=done, total=total, rate=rate)
            return
        now = time.monotonic()
        if not self._output.as_json and now - self._said_at >= _PLAIN_EVERY_S:
            self._said_at = now
            self._output.say(f"hashed {format_bytes(done)} of {format_bytes(total)}")


def _option(text: str) -> tuple[str, str | int | float | bool]:
    """``path_style=true`` as the world file would have it."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UsageError(f"--option {key or '...'} has no value; write it like --option region=us-east-1")
    if value.lower() in {"true", "false"}:
        return key, value.lower() == "true"
    return key, int(value) if value.isdecimal() else value


def _json(done: Adopted) -> dict[str, Any]:
    version = done.version
    return {
        "dataset": version.dataset,
        "version": version.version,
        "digest": version.digest,
        "unchanged": done.unchanged,
        "format": done.encoding,
        "url": done.store.url,
        "store": done.store.name,
        "files": version.shards,
        "blocks": done.blocks,
        "rows": version.rows,
        "bytes": version.bytes,
        "replicas": done.replicas,
        "left_out": list(done.left_out),
        "notes": list(done.notes),
        "seconds": round(done.seconds, 3),
    }
