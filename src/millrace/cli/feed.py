"""feed: read a dataset as a trainer would, and say what was delivered."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from millrace.cli.app import app, perform_now
from millrace.cli.options import JsonOption, WorldOption
from millrace.cli.output import Output
from millrace.client.dataset import open_dataset
from millrace.core.errors import UsageError
from millrace.core.units import count, format_bytes, format_seconds
from millrace.feed.columns import Ragged
from millrace.feed.loader import Loader
from millrace.feed.receipt import Receipt

__all__ = ["receipt_lines"]

_TOLD_EVERY_S: Final = 0.25
_PLAIN_EVERY_S: Final = 5.0
_SHOWN: Final = 20

Told = Callable[[int, int], None]


class Shuffled(StrEnum):
    """How far rows move."""

    WINDOW = "window"
    FULL = "full"
    BLOCKS = "blocks"
    NONE = "none"


@app.command()
def feed(
    dataset: Annotated[str, typer.Argument(help="A dataset: name, name@3 or name@digest, or a manifest's URL.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a global batch, over all ranks.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    shuffle: Annotated[Shuffled, typer.Option(help="How far rows move.")] = Shuffled.WINDOW,
    epoch: Annotated[
        int | None, typer.Option(min=0, help="Which epoch, from 0. Default: 0, or what --state says.")
    ] = None,
    rank: Annotated[int, typer.Option(min=0, help="Read the share of this rank ...")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="... of so many.")] = 1,
    drop_last: Annotated[bool, typer.Option("--drop-last", help="Leave out a last batch that isn't full.")] = False,
    column: Annotated[list[str] | None, typer.Option(help="Read this column only; may be given again.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for blocks. Default: $MILLRACE_CACHE or ~/.cache/millrace.")
    ] = None,
    cache_limit: Annotated[str, typer.Option(help="How large it may grow.")] = "50GB",
    quarantine: Annotated[str, typer.Option(help="Share of rows that may be set aside before it is an error.")] = "1%",
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no blocks on disk.")] = False,
    state: Annotated[
        Path | None,
        typer.Option(help="Go on from the state in this file if it is there, and leave the new one in it."),
    ] = None,
    receipt: Annotated[Path | None, typer.Option(help="Write the receipt to this file, as JSON.")] = None,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read an epoch as a trainer would: its rate as it goes, its receipt at the end."""
    output = Output(as_json=as_json)

    def work() -> tuple[Receipt, dict[str, Any]]:
        for file in (state, receipt):
            if file is not None:
                _check_writable(file)  # before an epoch is read, not after
        chosen = False if no_cache else cache
        with (
            open_dataset(dataset, world=world, cache=chosen, cache_limit=cache_limit) as opened,
            opened.loader(
                batch_size,
                seed=seed,
                shuffle=shuffle.value,
                rank=rank,
                world_size=world_size,
                drop_last=drop_last,
                columns=column,
                quarantine=quarantine,
                format="numpy",
            ) as loader,
        ):
            _begin_at(loader, epoch, state)
            output.say(f"{opened.label}: epoch {loader.epoch} from row {loader.position:,} of {len(opened):,}")
            try:
                numbers = _drain(loader, batch_size, output)
            finally:
                if state is not None:
                    _write(state, loader.state_dict())
            found = loader.receipt()
            if receipt is not None:
                _write(receipt, found.plain())
            return found, numbers | loader.stats() | {"events": [e.sentence for e in loader.events]}

    hint = f"; what was read is in {state}, go on with the same command" if state is not None else ""
    found, numbers = perform_now(output, work, interrupted=f"interrupted{hint}")
    output.document({"receipt": found.plain(), "stats": numbers})
    first, *others = receipt_lines(found, numbers["events"])
    for line in (first, f"rate      {_rate_line(numbers)}", *others):
        output.line(line)
    if not found.whole and world_size == 1:
        raise typer.Exit(1)


def receipt_lines(receipt: Receipt, events: Sequence[str] = ()) -> list[str]:
    """A receipt as a person reads it, and what went wrong meanwhile."""
    rank, world_size, _ = receipt.share or (0, 1, 1)
    of = "" if world_size == 1 else f" of rank {rank} of {world_size}"
    lines = [
        f"epoch {receipt.epoch}, rows {receipt.begin:,} to {receipt.end:,} of {receipt.total:,}{of}: "
        f"{count(receipt.rows, 'row')} delivered, {len(receipt.quarantined)} set aside"
    ]
    for t in receipt.traffic:
        if t.bytes:
            cost = "no list price" if t.dollars is None else f"${t.dollars:.4f} at list price"
            lines.append(f"read      {format_bytes(t.bytes)} from {t.store} ({t.cloud}/{t.region}), {cost}")
    if not any(t.bytes for t in receipt.traffic):
        lines.append("read      everything from the local cache")
    lines += [f"set aside row {q.row} of {q.dataset[:12]}: {q.reason}" for q in receipt.quarantined[:_SHOWN]]
    if len(receipt.quarantined) > _SHOWN:
        lines.append(f"          and {len(receipt.quarantined) - _SHOWN} more; --json has all")
    lines += [f"note      {sentence}" for sentence in events[:_SHOWN]]
    lines += [f"manifest  {digest}" for digest in receipt.datasets]
    lines.append(f"order     {receipt.order}")
    lines.append(f"proof     {receipt.proof}")
    return lines


def _rate_line(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['rows_per_s']:,.0f} rows/s, {numbers['batches_per_s']:,.0f} batches/s in "
        f"{format_seconds(numbers['seconds'])}; waited {format_seconds(numbers['waited_s'])} for blocks, "
        f"{format_seconds(numbers['waited_max_s'])} at most"
    )


def _begin_at(loader: Loader, epoch: int | None, state: Path | None) -> None:
    if state is None or not state.exists():
        loader.set_epoch(epoch or 0)
    elif epoch is None:
        loader.load_state_dict(_read_state(state))
    else:
        raise UsageError(f"--epoch {epoch}, and --state {state} says another place: leave one of them out")


def _drain(loader: Loader, batch_size: int, output: Output) -> dict[str, Any]:
    """Take every batch that is left of the epoch; gives the rates."""
    total = len(loader) * batch_size
    first = loader.position
    begun = said = time.perf_counter()
    rows = batches = 0
    with _view(output, total, first) as told:
        for batch in loader:
            first_column = next(iter(batch.values()))
            rows += len(first_column.offsets) - 1 if isinstance(first_column, Ragged) else len(first_column)
            batches += 1
            now = time.perf_counter()
            if now - said >= _TOLD_EVERY_S:
                said = now
                told(first + batches * batch_size, rows)
    seconds = time.perf_counter() - begun
    return {
        "seconds": round(seconds, 6),
        "rows": rows,
        "batches": batches,
        "rows_per_s": round(rows / seconds, 1) if seconds else 0.0,
        "batches_per_s": round(batches / seconds, 1) if seconds else 0.0,
    }


@contextlib.contextmanager
def _view(output: Output, total: int, first: int) -> Iterator[Told]:
    """A bar on a terminal, a line now and then elsewhere; call it with (position, rows so far)."""
    begun = time.perf_counter()
    if output.live:
        columns = (
            TextColumn("feed"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]:,.0f} rows/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=output.err, transient=True) as progress:
            bar = progress.add_task("feed", total=total, completed=first, rate=0.0)
            yield lambda position, rows: progress.update(
                bar, completed=min(position, total), rate=rows / (time.perf_counter() - begun)
            )
        return
    said = begun

    def tell(position: int, rows: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if not output.as_json and now - said >= _PLAIN_EVERY_S:
            said = now
            output.say(f"{min(position, total):,} of {total:,} rows, {rows / (now - begun):,.0f} rows/s")

    yield tell


def _read_state(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--state {file} can't be read as a loader's state: {error}") from error


def _check_writable(file: Path) -> None:
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{file} can't be written; name a file in a folder that is there and is yours")


def _write(file: Path, document: Any) -> None:
    """All or nothing: a state that is half there is none."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise UsageError(f"{file} can't be written: {error.strerror}; name a file in a folder that is there") from error
