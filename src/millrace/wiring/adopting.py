"""One adoption, from a URL to a version: listed, hashed and cut where it lies, then given a manifest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from millrace.control.loop import LEASE_TTL_MS
from millrace.control.runs import Begun, begin_run, end_run
from millrace.control.versions import commit_version
from millrace.core.errors import CoordError, MillraceError, PolicyRefused, RunStopped, UsageError
from millrace.core.facts import AdoptedStore, Lineage, RunReport, VersionRecord, encode
from millrace.core.keys import adopted_store
from millrace.core.manifest import Encoding
from millrace.core.messages import Phase
from millrace.core.model import StoreSite, digest_of
from millrace.core.ports import Store, Write
from millrace.core.spec import Name, Placement, Source, StoreSpec
from millrace.core.units import format_bytes
from millrace.decide.placement import refusals
from millrace.pipeline.adopted.files import index_files
from millrace.pipeline.adopted.manifest import Draft
from millrace.pipeline.adopted.naming import Chosen, choose
from millrace.pipeline.adopted.sentences import changed
from millrace.pipeline.distribute import Distributor
from millrace.pipeline.listing import list_source
from millrace.pipeline.persist import Persisted
from millrace.wiring.adopted import load_adopted
from millrace.wiring.clock import holder_is_alive, this_holder
from millrace.wiring.lineage import identity_of
from millrace.wiring.workers import placer
from millrace.wiring.world import OpenWorld, open_source

__all__ = ["AdoptRequest", "Adopted", "adopt"]

_REPLICAS: Final = 3
_CLOUDS: Final = 2
_LARGE_BLOCK_BYTES: Final = 256_000_000
_ADOPTED_NAME_LETTERS: Final = (8, 16, 50)


@dataclass(frozen=True, slots=True)
class AdoptRequest:
    """What to adopt, and how.

    Attributes:
        url: A directory, a prefix or one file; a path without a scheme is one of this machine.
        name: The dataset's.
        encoding: What the files are; None finds it from their names.
        include, exclude: As in a pipeline's source.
        options: What the store's adapter takes; never a secret.
        site: ``cloud/region`` the files lie in; None means where this machine is, or the world's first.
        replicas: Copies of the manifest; None means 3, or as many as there are stores.
        check: Decode each block once.
        slots: Files at once.
    """

    url: str
    name: str
    encoding: Encoding | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: Mapping[str, str | int | float | bool] | None = None
    site: str | None = None
    replicas: int | None = None
    check: bool = True
    slots: int = 2


@dataclass(frozen=True, slots=True)
class Adopted:
    """What an adoption came to.

    Attributes:
        version: The dataset's newest.
        unchanged: Whether it was that already.
        store: What the place is called.
        encoding: What the files are.
        blocks: That can be read alone.
        replicas: Of the manifest's own objects.
        left_out: Paths that were seen and not taken.
        notes: Sentences for people.
        seconds: It took.
    """

    version: VersionRecord
    unchanged: bool
    store: AdoptedStore
    encoding: Encoding
    blocks: int
    replicas: int
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float


async def adopt(
    world: OpenWorld,
    request: AdoptRequest,
    *,
    listed: Callable[[int], None] = lambda _objects: None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Adopted:
    """Index the files at a URL, where they lie, as a new version of a dataset.

    Nothing is written before every file was hashed: an adoption that is interrupted leaves nothing. The same files give
    the same digest, and then there is no new version.

    Args:
        world: Opened.
        request: See there.
        listed: Told of files as they are seen.
        progress: Told of bytes hashed, and of all there are, from any thread.

    Raises:
        UsageError, SpecError: the request is wrong, or there is nothing to adopt.
        PolicyRefused: the manifest can't have so many copies; nothing was read.
        SourceError: a file can't be adopted; names it.
        LeaseHeld: another process writes the dataset, or collects garbage.
        StoreError: the manifest can't be made durable.
    """
    started = world.clock.monotonic_s()
    source, policy, site = _checked(world, request)
    store = open_source(source, Path.cwd(), name="the files to adopt")
    try:
        place = await _place(world, store, source, site)
        seen = await list_source(store, source, progress=listed)
        chosen = choose(seen, url=source.url, encoding=request.encoding, included=bool(request.include))
        draft = await _drafted(world, request, store, place.name, chosen, progress)
        again = await list_source(store, source)
        _require_same(chosen, {obj.path: obj.version for obj in again})
    finally:
        await store.aclose()
    if not draft.rows:
        raise UsageError(
            f"{source.url} holds no rows in {draft.files} {chosen.encoding} files; there is nothing to adopt"
        )
    lineage = _lineage(request, place, source, chosen, draft)
    report = _report(request, chosen, draft)
    version, unchanged, persisted = await _written(world, request, place, draft, policy, lineage, report, started)
    return Adopted(
        version=version,
        unchanged=unchanged,
        store=place,
        encoding=chosen.encoding,
        blocks=draft.blocks,
        replicas=sum(len(entry.stores) for entry in persisted.meta.entries),
        left_out=chosen.left_out,
        notes=_notes(chosen, draft),
        seconds=world.clock.monotonic_s() - started,
    )


# --- before anything is read -------------------------------------------------------------------------------------


def _checked(world: OpenWorld, request: AdoptRequest) -> tuple[Source, Placement, StoreSite]:
    """The source, the policy of the manifest, and the site of the files.

    Raises:
        UsageError: a part of the request is wrong.
        PolicyRefused: the policy can't be met.
    """
    url = request.url if "://" in request.url else f"file://{quote(str(Path(request.url).absolute()))}"
    if url.startswith("memory://"):
        raise UsageError("memory:// is gone with this process, so nothing there can be adopted")
    try:
        TypeAdapter(Name).validate_python(request.name)
        place = StoreSpec(url=url, options=dict(request.options or {}))
        source = Source(
            url=url,
            include=request.include,
            exclude=request.exclude,
            format=request.encoding or "files",
            options=place.options,
        )
    except ValidationError as error:
        raise UsageError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
    replicas = request.replicas or min(_REPLICAS, len(world.sites))
    clouds = len({site.cloud for site in world.sites})
    policy = Placement(replicas=replicas, min_clouds=min(_CLOUDS, clouds, replicas))
    refused = refusals(world.sites, policy)
    if refused:
        raise PolicyRefused("\n".join(r.sentence for r in refused), rule=refused[0].rule)
    return source, policy, _site(world, request.site)


def _site(world: OpenWorld, wanted: str | None) -> StoreSite:
    """A site of the world, as that of a store without a name."""
    sites = {
        f"{cloud_name}/{region_name}": StoreSite("", cloud_name, region_name, region.jurisdiction)
        for cloud_name, cloud in world.spec.clouds.items()
        for region_name, region in cloud.regions.items()
    }
    name = wanted or world.spec.here or next(iter(sites))
    if name not in sites:
        raise UsageError(f"{name!r} is not a site of this world; there are {', '.join(sorted(sites))}")
    return sites[name]


async def _place(world: OpenWorld, store: Store, source: Source, site: StoreSite) -> AdoptedStore:
    """The place as it is recorded. One place has one name; two places never share one."""
    url = store.url
    where = "\n".join([url, *(str(source.options[key]) for key in ("endpoint", "account") if key in source.options)])
    known = await load_adopted(world.coord)
    for letters in _ADOPTED_NAME_LETTERS:
        name = f"adopted-{digest_of(where.encode())[:letters]}"
        other = known.get(name)
        if name not in world.stores and (other is None or _same_place(other, url, source.options)):
            break
    return AdoptedStore(
        name=name,
        url=url,
        options=dict(source.options),
        cloud=site.cloud,
        region=site.region,
        jurisdiction=site.jurisdiction,
    )


def _same_place(known: AdoptedStore, url: str, options: Mapping[str, Any]) -> bool:
    return known.url == url and all(known.options.get(key) == options.get(key) for key in ("endpoint", "account"))


# --- reading -----------------------------------------------------------------------------------------------------


async def _drafted(
    world: OpenWorld,
    request: AdoptRequest,
    store: Store,
    name: str,
    chosen: Chosen,
    progress: Callable[[int, int], None],
) -> Draft:
    draft = Draft(chosen.encoding, name)
    total = sum(obj.size_bytes for obj in chosen.files)
    indexed = index_files(
        store,
        chosen.files,
        chosen.encoding,
        check=request.check,
        slots=request.slots,
        told=lambda done: progress(done, total),
    )
    async with contextlib.aclosing(indexed):
        async for obj, shard, schema in indexed:
            draft.add(obj.path, shard, schema, at_ms=world.clock.now_ms())
    return draft


def _require_same(chosen: Chosen, versions: Mapping[str, str]) -> None:
    """Every file is still the one that was hashed, once all of them were.

    Raises:
        SourceChanged: one isn't; names it.
    """
    for obj in chosen.files:
        if versions.get(obj.path) != obj.version:
            raise changed(obj.path)


# --- writing -----------------------------------------------------------------------------------------------------


def _lineage(request: AdoptRequest, place: AdoptedStore, source: Source, chosen: Chosen, draft: Draft) -> Lineage:
    spec = {
        "dataset": request.name,
        "adopt": {
            "url": place.url,
            "format": chosen.encoding,
            "include": list(source.include),
            "exclude": list(source.exclude),
            "options": dict(source.options),
            "store": place.name,
        },
    }
    plan = [[obj.path, obj.size_bytes, obj.version] for obj in chosen.files]
    return Lineage(
        sources=({"url": place.url, "format": chosen.encoding, "objects": draft.files, "bytes": draft.bytes},),
        spec=spec,
        spec_digest=digest_of(_json(spec)),
        plan_digest=digest_of(_json(plan)),
        code={name: installed(name) for name in ("millrace", "pyarrow")},
    )


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


async def _written(
    world: OpenWorld,
    request: AdoptRequest,
    place: AdoptedStore,
    draft: Draft,
    policy: Placement,
    lineage: Lineage,
    report: RunReport,
    started_s: float,
) -> tuple[VersionRecord, bool, Persisted]:
    """Replicate the manifest and add the version, as a run: so that nothing is collected meanwhile, nor added twice."""
    mine = await begin_run(
        world.coord,
        world.clock,
        dataset=request.name,
        identity=identity_of(lineage),
        phases=[Phase("adopt", 0, draft.files)],
        lineage=lineage,
        pipeline_file=f"adopt {shlex.quote(request.url)} --name {request.name}",
        placement=policy.model_dump(mode="json"),
        holder=this_holder(),
        is_alive=holder_is_alive,
    )
    try:
        async with _kept(world, mine):
            distributor = Distributor(world.stores, placer(world.sites, policy, world.near), world.clock)
            persisted = await draft.persist(distributor)
            await world.coord.commit([Write(adopted_store(place.name), encode(place))], guard=mine.lease)
            version, unchanged = await commit_version(
                world.coord,
                dataset=request.name,
                manifest=persisted.manifest,
                run=mine.record.run,
                created_at_ms=world.clock.now_ms(),
                rows=persisted.rows,
                size_bytes=persisted.bytes,
                shards=persisted.shards,
                placement=mine.record.placement,
                lineage=lineage,
                pages=persisted.pages,
                meta=persisted.meta,
                guard=mine.lease,
            )
    except BaseException as error:
        failed = error if isinstance(error, MillraceError) else RunStopped("it was interrupted")
        await _end(world, mine, report.model_copy(update={"error": str(failed)}), started_s, failed)
        raise
    done = {"version": version.version, "digest": version.digest, "unchanged": unchanged}
    await _end(world, mine, report.model_copy(update=done), started_s, None)
    return version, unchanged, persisted


async def _end(world: OpenWorld, mine: Begun, report: RunReport, started_s: float, error: MillraceError | None) -> None:
    state = "done" if error is None else "stopped" if isinstance(error, RunStopped) else "failed"
    seconds = world.clock.monotonic_s() - started_s
    record = mine.record.model_copy(
        update={
            "state": state,
            "ended_at_ms": world.clock.now_ms(),
            "report": report.model_copy(update={"run": mine.record.run, "state": state, "seconds": seconds}),
            "exit_code": 0 if error is None else error.exit_code,
        }
    )
    if error is None:
        await end_run(world.coord, mine, record)
        return
    with contextlib.suppress(CoordError):  # the error that ended it says more than one in saying so
        await end_run(world.coord, mine, record)


@contextlib.asynccontextmanager
async def _kept(world: OpenWorld, mine: Begun) -> AsyncIterator[None]:
    """Renew the leases meanwhile. Should one be lost, the guard of the next write says so."""

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_TTL_MS / 3000)
            for lease in (mine.lease, mine.dataset_lease):
                await world.coord.renew(lease, LEASE_TTL_MS, now_ms=world.clock.now_ms())

    keeper = asyncio.create_task(renew())
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)


# --- what is said ------------------------------------------------------------------------------------------------


def _report(request: AdoptRequest, chosen: Chosen, draft: Draft) -> RunReport:
    return RunReport(
        run=0,
        state="running",
        dataset=request.name,
        chunks=draft.files,
        chunks_done=draft.files,
        rows=draft.rows,
        rows_in=draft.rows,
        shards=draft.files,
        bytes_in=draft.bytes,
        notes=_notes(chosen, draft),
    )


def _notes(chosen: Chosen, draft: Draft) -> tuple[str, ...]:
    notes = []
    if chosen.left_out:
        notes.append(f"left out: {_some(chosen.left_out)}")
    if draft.largest_block_bytes > _LARGE_BLOCK_BYTES:
        notes.append(
            f"the largest block has {format_bytes(draft.largest_block_bytes)}, and a loader holds several in memory; "
            "write smaller row groups or record batches to read with less"
        )
    return tuple(notes)


def _some(paths: Sequence[str]) -> str:
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more"
