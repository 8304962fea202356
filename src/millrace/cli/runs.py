"""run, plan, runs, status, pause, resume, stop: what works on pipelines and their runs."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from millrace.cli.app import INTERRUPTED, app, perform
from millrace.cli.live import RunView, listing_progress
from millrace.cli.options import JsonOption, PipelineArgument, RunArgument, WorldOption
from millrace.cli.output import Output
from millrace.control.runs import RunStatus, ask, list_runs, run_status
from millrace.core.facts import RunRecord, RunReport
from millrace.core.messages import Control
from millrace.core.units import count, format_bytes, format_seconds
from millrace.wiring.clock import holder_is_alive
from millrace.wiring.planning import Planned, make_plan
from millrace.wiring.running import RunOptions, RunResult, run_planned
from millrace.wiring.summary import summarise
from millrace.wiring.world import open_world

__all__ = ["when"]


@app.command()
def run(
    pipeline: PipelineArgument,
    world: WorldOption = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Tasks at once. Default: one per core.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew even if such a run is unfinished.")] = False,
    chunk_order: Annotated[
        int | None, typer.Option(metavar="SEED", help="Take chunks in a random order; the digest stays the same.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a pipeline, or go on with the unfinished run of it."""
    output = Output(as_json=as_json)
    options = RunOptions(workers or os.cpu_count() or 1, fresh=fresh, order_seed=chunk_order)

    async def work() -> RunResult:
        async with open_world(world) as opened:
            with listing_progress(output) as seen:
                planned = await make_plan(opened, pipeline, progress=seen)
            with RunView(output) as view:
                return await run_planned(opened, planned, options, begun=view.begun, observe=view.update)

    goes_on = f"interrupted; what was finished is kept, and millrace run {pipeline} goes on from there"
    result = perform(output, work, interrupted=goes_on)
    _show_report(output, result.report, f"millrace run {pipeline}")
    output.document(result.report.model_dump(mode="json") | {"stages": _stages(result.report)})
    code = INTERRUPTED if result.interrupted else result.exit_code
    if code:
        raise typer.Exit(code)


@app.command()
def plan(pipeline: PipelineArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Say what a run would do: chunks, placement, bytes per cloud, refusals. Moves nothing."""
    output = Output(as_json=as_json)

    async def work() -> Planned:
        async with open_world(world) as opened:
            with listing_progress(output) as seen:
                planned = await make_plan(opened, pipeline, progress=seen)
            summary = summarise(opened, planned)
            output.document(summary.as_json())
            for source in summary.sources:
                output.line(f"source   {source}")
            output.line(f"chunks   {summary.chunks}, up to {format_bytes(planned.pipeline.chunk)} each")
            output.line(f"input    {count(summary.objects, 'object')}, {format_bytes(summary.bytes_in)}")
            output.line(f"phases   {', '.join(summary.phases)}")
            output.line("")
            if summary.stores:
                output.table(
                    ("cloud", "store", "jurisdiction", "share of replicas", "about"),
                    [
                        (s.cloud, s.store, s.jurisdiction, f"{s.share:.0%}", format_bytes(s.bytes))
                        for s in summary.stores
                    ],
                    right=("share of replicas", "about"),
                )
                output.line(f"replicas are sized as if output were as large as input: {summary.note}")
            for refusal in summary.refused:
                output.say(f"refused  {refusal.rule}: {refusal.sentence}")
            return planned

    if perform(output, work).refused:
        raise typer.Exit(3)


@app.command()
def runs(world: WorldOption = None, as_json: JsonOption = False) -> None:
    """List the runs of this world."""
    output = Output(as_json=as_json)

    async def work() -> list[RunStatus]:
        async with open_world(world) as opened:
            found = await list_runs(opened.coord)
            return [await run_status(opened.coord, opened.clock, r.run, holder_is_alive) for r in found]

    found = perform(output, work)
    output.document([_status_json(s) for s in found])
    rows = [
        (s.record.run, s.record.dataset, s.state, when(s.record.created_at_ms), s.record.pipeline_file) for s in found
    ]
    if rows:
        output.table(("run", "dataset", "state", "begun", "pipeline"), rows, right=("run",))
    else:
        output.line("no run was made in this world yet")


@app.command()
def status(run: RunArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Say how far a run is, or how it ended."""
    output = Output(as_json=as_json)

    async def work() -> RunStatus:
        async with open_world(world) as opened:
            return await run_status(opened.coord, opened.clock, run, holder_is_alive)

    found = perform(output, work)
    output.document(_status_json(found))
    output.line(f"run {run} of dataset {found.record.dataset}: {found.state}")
    if found.progress is not None:
        p = found.progress
        eta = f", {format_seconds(p.eta_s)} to go" if p.eta_s is not None else ""
        output.line(
            f"{p.phase}: {p.done} of {p.tasks} tasks, {format_bytes(p.bytes_done)} of {format_bytes(p.bytes_total)} "
            f"at {format_bytes(p.bytes_per_s)}/s{eta}; {p.rows} rows, {p.quarantined} quarantined"
        )
    if found.record.report is not None:
        _show_report(output, found.record.report, _command(found.record))
    elif found.state == "interrupted":
        output.line(f"its process is gone; continue it with: {_command(found.record)}")


@app.command()
def pause(run: RunArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Let a running run finish what is in flight and grant nothing new until it is resumed."""
    _ask(run, Control.PAUSE, "is pausing", world, as_json)


@app.command()
def resume(run: RunArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Let a paused run go on."""
    _ask(run, Control.RUN, "goes on", world, as_json)


@app.command()
def stop(run: RunArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Let a running run finish what is in flight and end; `millrace run` continues it."""
    _ask(run, Control.STOP, "is stopping", world, as_json)


def _ask(run: int, control: Control, does: str, world: WorldOption, as_json: bool) -> None:
    output = Output(as_json=as_json)

    async def work() -> None:
        async with open_world(world) as opened:
            await ask(opened.coord, opened.clock, run, control, holder_is_alive)

    perform(output, work)
    output.document({"run": run, "asked": control.value})
    output.line(f"run {run} {does}")


def when(at_ms: int) -> str:
    """A time as people read it, in this machine's zone."""
    return datetime.fromtimestamp(at_ms / 1000, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _status_json(found: RunStatus) -> dict[str, Any]:
    return {
        "run": found.record.run,
        "dataset": found.record.dataset,
        "state": found.state,
        "asked": found.asked.value,
        "created_at_ms": found.record.created_at_ms,
        "ended_at_ms": found.record.ended_at_ms,
        "pipeline_file": found.record.pipeline_file,
        "progress": found.progress.model_dump(mode="json") if found.progress else None,
        "report": found.record.report.model_dump(mode="json") if found.record.report else None,
    }


def _stages(report: RunReport) -> list[dict[str, Any]]:
    return [s.model_dump(mode="json") | {"mb_per_s": round(s.mb_per_s, 3)} for s in report.stages]


def _command(record: RunRecord) -> str:
    """What takes a run up again. An adoption is recorded as its whole command, and a pipeline as its file."""
    return f"millrace {'' if 'adopt' in record.lineage.spec else 'run '}{record.pipeline_file}"


def _show_report(output: Output, report: RunReport, command: str) -> None:
    if output.as_json:
        return
    if report.stages:
        rows = [
            (s.stage, format_seconds(s.seconds), s.rows, format_bytes(s.bytes), f"{s.mb_per_s:,.0f}")
            for s in report.stages
        ]
        output.table(("stage", "work", "rows", "bytes", "MB/s"), rows, right=("work", "rows", "bytes", "MB/s"))
        output.line("")
    for line in report.quarantine[:10]:
        where = f" {line.position}" if line.position else ""
        output.line(f"quarantined {line.path}{where}: {line.rule}: {line.reason}", style="yellow")
    more = report.quarantined + report.quarantined_chunks - 10
    if more > 0 and report.quarantine:
        output.line(f"and {more} more", style="yellow")
    for note in report.notes:
        output.line(f"note: {note}", style="yellow")
    seconds = format_seconds(report.seconds)
    if report.state == "done":
        kept = "unchanged, already" if report.unchanged else "is"
        output.line(f"{report.dataset}@{report.version} {kept} {report.digest}", style="bold green")
        output.line(
            f"{count(report.rows, 'row')} in {count(report.shards, 'shard')}, "
            f"{count(report.replicas, 'replica')} read back and hashed; "
            f"{format_bytes(report.bytes_in)} in, {format_bytes(report.bytes_out)} out, "
            f"{report.quarantined} quarantined, {count(report.duplicates, 'duplicate')} left out; {seconds}"
        )
        return
    done = f"{report.chunks_done} of {count(report.chunks, 'chunk')} done and kept"
    if report.state == "failed":
        output.say(f"error: run {report.run} failed: {report.error}")
    else:
        output.say(f"run {report.run} was stopped")
    output.say(f"{done}; {command} goes on from there")
