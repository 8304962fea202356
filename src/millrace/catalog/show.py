"""What a version is, and how two of them differ: values for the screen and for ``--json``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.catalog.manifests import OpenManifest
from millrace.catalog.versions import label
from millrace.core.facts import Lineage, VersionRecord
from millrace.core.model import StoreSite

__all__ = ["Change", "Diff", "Extent", "ReplicaLine", "Shown", "diff", "show"]

_ABSENT: Final = "(nothing)"


@dataclass(frozen=True, slots=True)
class ReplicaLine:
    """What lies in one store, or in all of one cloud.

    Attributes:
        name: The store's or the cloud's.
        cloud, region, jurisdiction: Of a store; the last two are empty for a cloud, all three for a store
            that is not in this world.
        shards: Replicas of shards; one listed twice in the manifest counts twice.
        bytes: Of them.
    """

    name: str
    cloud: str
    region: str
    jurisdiction: str
    shards: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Shown:
    """A version, as a person wants to see it.

    Attributes:
        dataset, version, digest, run, created_at_ms: Which.
        rows, bytes, shards: Of the data, one replica.
        block_rows: Rows in a block.
        schema: One line a column: name and type; empty when there are no rows.
        clouds, stores: Where replicas lie, as the last receipts say.
        unknown_shards: Shards whose replica page is gone; ``verify --repair`` finds them.
        lineage: Sources, spec and code.
        placement: The policy it was made under.
    """

    dataset: str
    version: int
    digest: str
    run: int
    created_at_ms: int
    rows: int
    bytes: int
    shards: int
    block_rows: int
    schema: str
    clouds: tuple[ReplicaLine, ...]
    stores: tuple[ReplicaLine, ...]
    unknown_shards: int
    lineage: Lineage
    placement: Mapping[str, Any]


async def show(record: VersionRecord, manifest: OpenManifest, sites: Sequence[StoreSite]) -> Shown:
    """All there is to say of a version.

    Args:
        record: The version.
        manifest: Its manifest.
        sites: Every store of the world.

    Raises:
        CoordError: a replica page can't be read.
    """
    shards: dict[str, int] = defaultdict(int)
    size: dict[str, int] = defaultdict(int)
    unknown = 0
    for i, ref in enumerate(manifest.root.segments):
        page = await manifest.replicas(i)
        if page is None:
            unknown += ref.shards
            continue
        for entry in page.entries:
            for name in entry.stores:
                shards[name] += 1
                size[name] += entry.size_bytes
    by_name = {site.name: site for site in sites}
    order = [*by_name, *sorted(set(shards) - set(by_name))]
    lines = tuple(
        ReplicaLine(name, site.cloud, site.region, site.jurisdiction, shards[name], size[name])
        if (site := by_name.get(name))
        else ReplicaLine(name, "", "", "", shards[name], size[name])
        for name in order
        if shards[name]
    )
    return Shown(
        dataset=record.dataset,
        version=record.version,
        digest=record.digest,
        run=record.run,
        created_at_ms=record.created_at_ms,
        rows=record.rows,
        bytes=record.bytes,
        shards=record.shards,
        block_rows=manifest.root.block_rows,
        schema=schema_text(manifest.schema),
        clouds=_by_cloud(lines),
        stores=lines,
        unknown_shards=unknown,
        lineage=record.lineage,
        placement=record.placement,
    )


def schema_text(schema: pa.Schema | None) -> str:
    """One line a column: ``name: type``, and ``not null`` where it is."""
    return "\n".join(f"{name}: {kind}" for name, kind in _columns_of(schema).items())


def _columns_of(schema: pa.Schema | None) -> dict[str, str]:
    return {f.name: f"{f.type}{'' if f.nullable else ' not null'}" for f in schema or ()}


def _by_cloud(lines: Sequence[ReplicaLine]) -> tuple[ReplicaLine, ...]:
    clouds = list(dict.fromkeys(line.cloud for line in lines))
    return tuple(
        ReplicaLine(
            cloud or "(not in this world)",
            cloud,
            "",
            "",
            sum(line.shards for line in lines if line.cloud == cloud),
            sum(line.bytes for line in lines if line.cloud == cloud),
        )
        for cloud in clouds
    )


# --- differences ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Extent:
    """Some shards, with their rows and bytes (one replica)."""

    shards: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs.

    Attributes:
        what: Its name: a column, ``spec.transforms.0.sql``, ``sources.0.objects``, ``code.duckdb``.
        before, after: In words.
    """

    what: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Diff:
    """How ``after`` differs from ``before``.

    Attributes:
        before, after: ``name@3``.
        same: Whether both are one manifest.
        added, removed, kept: Shards of the second only, of the first only, of both.
        schema: Columns that differ.
        lineage: Fields of the spec, sources and code that differ.
    """

    before: str
    after: str
    same: bool
    added: Extent
    removed: Extent
    kept: Extent
    schema: tuple[Change, ...]
    lineage: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class _Columns:
    digests: npt.NDArray[np.bytes_]
    counts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]


async def diff(
    before: VersionRecord, before_manifest: OpenManifest, after: VersionRecord, after_manifest: OpenManifest
) -> Diff:
    """Compare two versions, of one dataset or of two. Takes about 100 bytes of memory a shard.

    Raises:
        StoreError: a segment of either can't be read.
    """
    a, b = await _columns(before_manifest), await _columns(after_manifest)
    in_b = _matching(a, b)
    in_a = _matching(b, a)
    kept = np.minimum(a.counts, in_b)
    return Diff(
        before=label(before),
        after=label(after),
        same=before.digest == after.digest,
        added=_extent(b, b.counts - np.minimum(b.counts, in_a)),
        removed=_extent(a, a.counts - kept),
        kept=_extent(a, kept),
        schema=_schema_changes(before_manifest.schema, after_manifest.schema),
        lineage=_lineage_changes(before.lineage, after.lineage),
    )


async def _columns(manifest: OpenManifest) -> _Columns:
    parts = [segment async for _, segment in manifest.segments()]
    if not parts:
        nothing = np.zeros(0, np.int64)
        return _Columns(np.zeros(0, "S32"), nothing, nothing, nothing)
    digests = np.ascontiguousarray(np.concatenate([p.digests for p in parts])).view("S32").reshape(-1)
    unique, first, counts = np.unique(digests, return_index=True, return_counts=True)
    rows = np.concatenate([p.rows for p in parts])[first]
    sizes = np.concatenate([p.sizes for p in parts])[first]
    return _Columns(unique, counts.astype(np.int64), rows, sizes)


def _matching(a: _Columns, b: _Columns) -> npt.NDArray[np.int64]:
    """How often each shard of ``a`` occurs in ``b``."""
    if not len(b.digests):
        return np.zeros(len(a.digests), np.int64)
    at = np.minimum(np.searchsorted(b.digests, a.digests), len(b.digests) - 1)
    return np.where(b.digests[at] == a.digests, b.counts[at], 0)


def _extent(columns: _Columns, counts: npt.NDArray[np.int64]) -> Extent:
    return Extent(int(counts.sum()), int((counts * columns.rows).sum()), int((counts * columns.sizes).sum()))


def _schema_changes(before: pa.Schema | None, after: pa.Schema | None) -> tuple[Change, ...]:
    a, b = _columns_of(before), _columns_of(after)
    changes = list(_changes("", a, b))
    if not changes and list(a) != list(b):
        changes.append(Change("order of columns", ", ".join(a), ", ".join(b)))
    return tuple(changes)


def _lineage_changes(before: Lineage, after: Lineage) -> tuple[Change, ...]:
    return (
        *_changes("spec", before.spec, after.spec),
        *_changes("sources", list(before.sources), list(after.sources)),
        *_changes("code", before.code, after.code),
    )


def _changes(path: str, a: Any, b: Any) -> list[Change]:
    """The leaves in which two JSON values differ."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [
            change
            for key in keys
            for change in _changes(f"{path}.{key}" if path else str(key), a.get(key, _ABSENT), b.get(key, _ABSENT))
        ]
    return [] if a == b else [Change(path, str(a), str(b))]
