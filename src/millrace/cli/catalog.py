"""datasets, show, diff, verify, export, rm, gc: what works on datasets and their replicas."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from millrace.catalog.collection import GcReport
from millrace.catalog.export import ExportProgress, ExportReport, export_dataset
from millrace.catalog.findings import VerifyProgress, VerifyReport
from millrace.catalog.gc import collect, mark
from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.remove import remove
from millrace.catalog.show import Diff, Extent, Shown
from millrace.catalog.show import diff as diff_versions
from millrace.catalog.show import show as show_version
from millrace.catalog.verify import verify as verify_version
from millrace.catalog.versions import DatasetLine, list_datasets, resolve
from millrace.cli.app import app, perform
from millrace.cli.live import byte_progress
from millrace.cli.options import JsonOption, WorldOption
from millrace.cli.output import Output
from millrace.cli.runs import when
from millrace.core.errors import MillraceError
from millrace.core.facts import VersionRecord
from millrace.core.units import count, format_bytes, parse_duration_s, parse_size
from millrace.pipeline.export import open_exporter
from millrace.wiring.clock import this_holder
from millrace.wiring.world import OpenWorld, open_world

__all__: list[str] = []

_FINDINGS_SHOWN = 50

ReferenceArgument = Annotated[str, typer.Argument(help="A dataset: name, name@3 or name@digest.", metavar="DATASET")]


class ExportFormat(StrEnum):
    """What a dataset can be exported as."""

    PARQUET = "parquet"
    WEBDATASET = "webdataset"
    MDS = "mds"
    JSONL = "jsonl"
    FILES = "files"


@app.command()
def datasets(world: WorldOption = None, as_json: JsonOption = False) -> None:
    """List the datasets of this world."""
    output = Output(as_json=as_json)

    async def work() -> tuple[DatasetLine, ...]:
        async with open_world(world) as opened:
            return await list_datasets(opened.coord)

    found = perform(output, work)
    output.document(
        [{"dataset": d.name, "versions": d.versions, "newest": d.newest.model_dump(mode="json")} for d in found]
    )
    rows = [
        (
            d.name,
            d.newest.version,
            f"{d.newest.rows:,}",
            d.newest.shards,
            format_bytes(d.newest.bytes),
            when(d.newest.created_at_ms),
            d.newest.digest[:16],
        )
        for d in found
    ]
    if rows:
        columns = ("dataset", "newest", "rows", "shards", "bytes", "made", "digest")
        output.table(columns, rows, right=("newest", "rows", "shards", "bytes"))
    else:
        output.line("there is no dataset in this world yet; make one with: millrace run pipeline.yaml")


@app.command()
def show(dataset: ReferenceArgument, world: WorldOption = None, as_json: JsonOption = False) -> None:
    """Show one version: rows, shards, where its replicas lie, and what it was made of."""
    output = Output(as_json=as_json)

    async def work() -> Shown:
        async with open_world(world) as opened:
            record, manifest = await _opened(opened, dataset)
            return await show_version(record, manifest, (await opened.readable()).sites)

    found = perform(output, work)
    output.document(asdict(found) | {"lineage": found.lineage.model_dump(mode="json")})
    output.line(f"{found.dataset}@{found.version}  {found.digest}", style="bold")
    output.line(f"made      {when(found.created_at_ms)} by run {found.run}")
    output.line(
        f"content   {count(found.rows, 'row')}, {count(found.shards, 'shard')}, {format_bytes(found.bytes)}, "
        f"blocks of {found.block_rows} rows"
    )
    output.line(f"schema    {found.schema}".replace("\n", "\n          "))
    for source in found.lineage.sources:
        size = format_bytes(source["bytes"])
        output.line(f"source    {source['url']} as {source['format']}: {count(source['objects'], 'object')}, {size}")
    for transform in found.lineage.spec.get("transforms", []):
        output.line(f"transform {_brief(_told(transform))}")
    output.line("code      " + ", ".join(f"{name} {_brief(version)}" for name, version in found.lineage.code.items()))
    output.line("")
    columns = ("cloud", "store", "region", "jurisdiction", "shards", "bytes")
    rows = [(s.cloud, s.name, s.region, s.jurisdiction, s.shards, format_bytes(s.bytes)) for s in found.stores]
    output.table(columns, rows, right=("shards", "bytes"))
    if found.unknown_shards:
        output.line(f"of {found.unknown_shards} shards it is not known where they lie; run millrace verify --repair")


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="The one version.")],
    after: Annotated[str, typer.Argument(help="The other.")],
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: shards, rows, schema and lineage."""
    output = Output(as_json=as_json)

    async def work() -> Diff:
        async with open_world(world) as opened:
            one, first = await _opened(opened, before)
            two, second = await _opened(opened, after)
            return await diff_versions(one, first, two, second)

    found = perform(output, work)
    output.document(asdict(found))
    if found.same:
        output.line(f"{found.before} and {found.after} are the same data: one digest")
    for word, extent in (("kept", found.kept), ("added", found.added), ("removed", found.removed)):
        output.line(f"{word:8}{_extent(extent)}")
    for title, changes in (("schema", found.schema), ("lineage", found.lineage)):
        for change in changes:
            output.line(f"{title:8}{change.what}: {change.before or 'nothing'} -> {change.after or 'nothing'}")


@app.command()
def verify(
    dataset: ReferenceArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Restore what is missing or rotten.")] = False,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Replicas read at once.")] = 4,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read back and hash every replica. Exits 1 while anything is missing or rotten."""
    output = Output(as_json=as_json)

    async def work() -> VerifyReport:
        async with open_world(world) as opened:
            record = await resolve(opened.coord, dataset)
            readable = await opened.readable()
            with byte_progress(output, "verifying") as shown:

                def progress(at: VerifyProgress) -> None:
                    shown(at.bytes_done, at.bytes_total)

                return await verify_version(
                    opened.coord,
                    readable.stores,
                    readable.sites,
                    record,
                    who=this_holder(),
                    clock=opened.clock,
                    repair=repair,
                    slots=slots,
                    adopted=readable.adopted,
                    progress=progress if output.live else None,
                )

    report = perform(output, work)
    output.document(asdict(report) | {"verdict": report.verdict})
    show_verify(output, report)
    if not report.is_whole:
        if not repair and not report.lost:
            output.say(f"restore what can be with: millrace verify {dataset} --repair")
        raise typer.Exit(1)


@app.command()
def export(
    dataset: ReferenceArgument,
    directory: Annotated[Path, typer.Argument(help="Where to; must be empty or absent.")],
    format: Annotated[ExportFormat, typer.Option("--format", "-f", help="What to write.")] = ExportFormat.PARQUET,
    shard_size: Annotated[str, typer.Option(help="Size of one file of the export.")] = "64MB",
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version to a directory, in another tool's format or as the original files."""
    output = Output(as_json=as_json)

    async def work() -> ExportReport:
        async with open_world(world) as opened:
            record, manifest = await _opened(opened, dataset)
            with byte_progress(output, "exporting") as shown:

                def progress(at: ExportProgress) -> None:
                    shown(at.bytes_done, at.bytes_total)

                return await export_dataset(
                    opened.coord,
                    record,
                    manifest,
                    lambda schema: open_exporter(
                        format.value, directory, schema, shard_bytes=_option(parse_size, shard_size, "--shard-size")
                    ),
                    who=this_holder(),
                    clock=opened.clock,
                    progress=progress,
                )

    report = perform(output, work)
    output.document(asdict(report) | {"directory": str(directory), "format": format.value})
    files = count(len(report.files), "file")
    output.line(f"{count(report.rows, 'row')} of {count(report.shards, 'shard')} in {files} under {directory}")


@app.command()
def rm(
    dataset: ReferenceArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a version, or a dataset with all of them. Its shards go later, with `millrace gc`."""
    output = Output(as_json=as_json)

    async def work() -> tuple[tuple[VersionRecord, ...], GcReport | None]:
        async with open_world(world) as opened:
            record = await resolve(opened.coord, dataset)
            what = dataset if "@" in dataset else f"all versions of {record.dataset}"
            if not yes and not as_json:
                typer.confirm(f"remove {what}?", abort=True, err=True)
            gone = await remove(opened.coord, dataset)
            try:
                marked = await mark(
                    opened.coord, opened.stores, opened.sites, opened.work, who=this_holder(), clock=opened.clock
                )
            except MillraceError as error:  # it is removed all the same; the next gc marks
                output.say(f"note: its objects were not marked yet: {error}")
                return gone, None
            return gone, marked

    gone, marked = perform(output, work)
    output.document(
        {"removed": [r.model_dump(mode="json") for r in gone], "marked": _gc_json(marked) if marked else None}
    )
    for record in gone:
        output.line(f"removed {record.dataset}@{record.version} {record.digest[:16]}")
    if marked is not None:
        output.line(
            f"{marked.marked_objects} objects are no longer named by anything; "
            "millrace gc deletes them after its grace time"
        )


@app.command()
def gc(
    grace: Annotated[str, typer.Option(help="How long an object must have been marked before it goes.")] = "1h",
    world: WorldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what no version, run or reader names any more: mark now, delete what was marked a grace time ago."""
    output = Output(as_json=as_json)

    async def work() -> GcReport:
        grace_ms = round(_option(parse_duration_s, grace, "--grace") * 1000)
        async with open_world(world) as opened:
            return await collect(
                opened.coord,
                opened.stores,
                opened.sites,
                opened.work,
                who=this_holder(),
                clock=opened.clock,
                grace_ms=grace_ms,
            )

    report = perform(output, work)
    output.document(_gc_json(report))
    rows = [
        (
            s.store,
            s.named_objects,
            s.marked_objects,
            s.deleted_objects,
            format_bytes(s.deleted_bytes),
            s.unknown_objects,
        )
        for s in report.stores
    ]
    columns = ("store", "named", "marked", "deleted", "freed", "not ours")
    output.table(columns, rows, right=columns[1:])
    for store in report.stores:
        for kept in store.kept:
            output.line(f"{store.store}: {kept.objects} objects kept: {kept.why}")
    for name, why in report.failed.items():
        output.say(f"{name} was passed over: {why}")
    if report.failed:
        raise typer.Exit(1)


def show_verify(output: Output, report: VerifyReport) -> None:
    """A verify report for people."""
    for finding in report.findings[:_FINDINGS_SHOWN]:
        mended = " (repaired)" if finding.repaired else ""
        style = "yellow" if finding.repaired else "red"
        store = f" in {finding.store}" if finding.store else ""
        output.line(f"{finding.verdict.value:17}{finding.object}{store}: {finding.detail}{mended}", style=style)
    if len(report.findings) > _FINDINGS_SHOWN:
        output.line(f"and {len(report.findings) - _FINDINGS_SHOWN} more; --json names each")
    counts = f"{report.whole} of {report.replicas} replicas of {report.objects} objects whole"
    broken = [
        f"{n} {word}"
        for n, word in (
            (report.missing, "missing"),
            (report.rotten, "rotten"),
            (report.unreadable, "unreadable"),
            (report.lost, "lost"),
            (report.restored, "restored"),
        )
        if n
    ]
    said = f"{counts}{', ' if broken else ''}{', '.join(broken)} ({format_bytes(report.bytes)})"
    output.line(f"{report.dataset} {report.verdict}: {said}", style="bold green" if report.is_whole else "bold red")


async def _opened(world: OpenWorld, reference: str) -> tuple[VersionRecord, OpenManifest]:
    record = await resolve(world.coord, reference)
    readable = await world.readable()
    return record, await open_manifest(world.coord, readable.stores, readable.sites, record, near=world.near)


def _option(parse: Any, text: str, name: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=name) from None


def _extent(extent: Extent) -> str:
    return f"{count(extent.shards, 'shard')}, {count(extent.rows, 'row')}, {format_bytes(extent.bytes)}"


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _told(value: Any) -> Any:
    """Without what was not said."""
    if isinstance(value, dict):
        return {k: _told(v) for k, v in value.items() if v not in (None, [], ())}
    return value


def _gc_json(report: GcReport) -> dict[str, Any]:
    return {
        "marked_objects": report.marked_objects,
        "deleted_objects": report.deleted_objects,
        "deleted_bytes": report.deleted_bytes,
        **asdict(report),
    }
