"""checkpoints: what training runs saved, where it is whole, and how to have it back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from millrace.catalog.checkpoint_depot import LOCAL, Depot
from millrace.catalog.checkpoint_manifest import identity
from millrace.catalog.checkpoint_restore import restore as restore_to
from millrace.catalog.checkpoint_survey import records_of
from millrace.catalog.checkpoint_whole import Whole, at_step, newest
from millrace.catalog.checkpoints import CheckpointLine, list_checkpoints, pin, verify_checkpoints
from millrace.cli.app import app, perform
from millrace.cli.options import JsonOption, WorldOption
from millrace.cli.output import Output
from millrace.client.checkpoints import open_depot
from millrace.core.errors import CoordError, UsageError
from millrace.core.spec import Placement
from millrace.core.units import count, format_bytes, format_seconds
from millrace.wiring.world import OpenWorld, open_world

__all__: list[str] = []

NameArgument = Annotated[str, typer.Argument(help="The name that millrace.checkpoints was given.", metavar="NAME")]


@app.command()
def checkpoints(
    name: NameArgument,
    pin_step: Annotated[int | None, typer.Option("--pin", help="Keep this step, whatever retention says.")] = None,
    unpin_step: Annotated[int | None, typer.Option("--unpin", help="Treat this step as any other again.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read all of them back from every store.")] = False,
    restore: Annotated[str | None, typer.Option("--restore", help="A step, or latest; needs --into.")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="Where to; must be empty or absent.")] = None,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the checkpoints of a training run; verify them, keep one for good, or have one back as files."""
    output = Output(as_json=as_json)
    asked = [pin_step is not None, unpin_step is not None, verify, restore is not None]
    if sum(asked) > 1:
        raise typer.BadParameter("--pin, --unpin, --verify and --restore are four different things; give one")
    if (restore is None) != (into is None):
        raise typer.BadParameter("--restore STEP and --into DIR belong together")
    if verify:
        _verify(output, name, world)
    elif restore is not None and into is not None:
        _restore(output, name, restore, into, world)
    else:
        step = pin_step if pin_step is not None else unpin_step
        _list(output, name, world, step, pinned=pin_step is not None)


@contextlib.asynccontextmanager
async def _depot(world: OpenWorld, name: str) -> AsyncIterator[Depot]:
    """Under the policy that the newest recorded one was saved under: a command has none of its own."""
    plain = open_depot(world, name, Placement())
    try:
        placement = Placement()
        with contextlib.suppress(CoordError):  # without records the stores are asked all the same
            records = await records_of(plain)
            if records:
                placement = Placement.model_validate(records[max(records)].placement)
    finally:
        await plain.local.aclose()
    depot = open_depot(world, name, placement)
    try:
        yield depot
    finally:
        await depot.local.aclose()


def _list(output: Output, name: str, world: Path | None, step: int | None, *, pinned: bool) -> None:
    async def work() -> tuple[tuple[CheckpointLine, ...], Mapping[str, str], int]:
        async with open_world(world) as opened, _depot(opened, name) as depot:
            if step is not None:
                await pin(depot, step, pinned=pinned)
            lines, failed = await list_checkpoints(depot)
            return lines, failed, opened.clock.now_ms()

    lines, failed, now_ms = perform(output, work)
    output.document({"name": name, "checkpoints": [asdict(line) for line in lines], "failed": dict(failed)})
    rows = [
        (
            line.step,
            "?" if line.size_bytes is None else format_bytes(line.size_bytes),
            "?" if line.files is None else line.files,
            format_seconds(max(now_ms - line.created_at_ms, 0) / 1000),
            ", ".join((*line.stores, *(["this machine"] if line.local else []))) or "nowhere that answers",
            line.state,
            "yes" if line.pinned else "",
            line.digest[:16],
        )
        for line in lines
    ]
    if rows:
        columns = ("step", "size", "files", "age", "stores", "state", "pinned", "digest")
        output.table(columns, rows, right=("step", "size", "files", "age"))
    else:
        output.line(f"there is no checkpoint of {name} in what can be reached")
    _passed_over(output, failed)


def _verify(output: Output, name: str, world: Path | None) -> None:
    async def work() -> tuple[Mapping[tuple[int, str], Mapping[str, str]], Mapping[str, str]]:
        async with open_world(world) as opened, _depot(opened, name) as depot:
            return await verify_checkpoints(depot)

    verdicts, failed = perform(output, work)
    output.document(
        {
            "name": name,
            "checkpoints": [
                {"step": step, "digest": mark, "stores": {store: why or "whole" for store, why in verdict.items()}}
                for (step, mark), verdict in verdicts.items()
            ],
            "failed": dict(failed),
        }
    )
    bad = 0
    for (step, _), verdict in verdicts.items():
        whole = [_called(store) for store, why in verdict.items() if not why]
        output.line(f"step {step}: whole in {', '.join(whole) or 'no store'}", style="" if whole else "bold red")
        for store, why in verdict.items():
            if why:
                bad += 1
                output.line(f"step {step} in {_called(store)}: {why}", style="red")
        bad += not verdict
    if not verdicts:
        output.line(f"there is no checkpoint of {name} in what can be reached")
    _passed_over(output, failed)
    if bad or failed:
        raise typer.Exit(1)


def _restore(output: Output, name: str, wanted: str, into: Path, world: Path | None) -> None:
    async def work() -> Whole:
        async with open_world(world) as opened, _depot(opened, name) as depot:
            whole = await _wanted(depot, wanted)
            await restore_to(depot, whole.manifest, into)
            return whole

    whole = perform(output, work)
    manifest = whole.manifest
    output.document(
        {
            "name": name,
            "step": manifest.step,
            "digest": identity(manifest),
            "directory": str(into),
            "files": len(manifest.files),
            "bytes": manifest.size_bytes,
            "loader_state": manifest.loader_state,
            "notes": list(whole.notes),
        }
    )
    for sentence in whole.notes:
        output.say(f"note: {sentence}")
    size = format_bytes(manifest.size_bytes)
    output.line(f"step {manifest.step} of {name}: {count(len(manifest.files), 'file')}, {size}, under {into}")


async def _wanted(depot: Depot, wanted: str) -> Whole:
    if wanted.isdecimal():
        return await at_step(depot, int(wanted))
    if wanted != "latest":
        raise UsageError(f"--restore takes a step or latest, not {wanted!r}")
    found = await newest(depot)
    if found is None:
        raise UsageError(f"there is no checkpoint of {depot.name} in what can be reached")
    return found


def _called(store: str) -> str:
    return "this machine" if store == LOCAL else store


def _passed_over(output: Output, failed: Mapping[str, str]) -> None:
    for store, why in failed.items():
        output.say(f"{_called(store)} was passed over: {why}")
