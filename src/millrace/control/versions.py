"""Adding a version to a dataset: by one compare-and-swap on its head, after everything it names is durable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any, Final

from millrace.core.errors import Conflict, CoordError, LeaseHeld
from millrace.core.facts import Lineage, ReplicaEntry, ReplicaPage, VersionRecord, VersionRef, decode, encode
from millrace.core.keys import GC_LEASE, dataset_head, dataset_version, replica_page, run_lease
from millrace.core.model import Digest, shard_key
from millrace.core.pages import decode_page, encode_page, merge_pages, meta_keys, meta_parts, update_page
from millrace.core.ports import Compare, Coordination, Lease, Write

__all__ = ["commit_version", "keep_gc_out", "version_counter"]

_BATCH_WRITES: Final = 100
_BATCH_BYTES: Final = 1 << 20
"""Of values in one transaction: etcd takes requests of 1.5 MiB."""
_HEAD_ATTEMPTS: Final = 32
_LOOK_BACK: Final = 16
"""How many versions back a run that was killed while committing looks for the one it made."""


def version_counter(dataset: str) -> str:
    """Key of the highest version number a dataset ever had, so that a removed one is never given again."""
    return f"counters/datasets/{dataset}"


async def keep_gc_out(coord: Coordination, run: int, *, now_ms: int) -> None:
    """What a run does when it starts or continues, after its record and its lease are written, before any object.

    Garbage collection takes its lease and then looks for runs; a run takes its own and then looks for a
    collection: whichever comes second sees the other. Taking the lease for a moment also fences a collection
    that stalled past its time, so that it stops at its next page instead of deleting under this run.

    Raises:
        LeaseHeld: a collection is at work; says until when to wait.
    """
    try:
        lease = await coord.acquire(GC_LEASE, run_lease(run), 1000, now_ms=now_ms)
    except LeaseHeld as error:
        wait_s = max(0, error.expires_at_ms - now_ms) / 1000
        raise LeaseHeld(
            f"run {run} can't start while {error.holder} collects garbage; wait until it is done "
            f"(if it died, for {wait_s:.0f} s) and run again",
            holder=error.holder,
            expires_at_ms=error.expires_at_ms,
        ) from error
    await coord.release(lease)


async def commit_version(
    coord: Coordination,
    *,
    dataset: str,
    manifest: Digest,
    run: int,
    created_at_ms: int,
    rows: int,
    size_bytes: int,
    shards: int,
    placement: Mapping[str, Any],
    lineage: Lineage,
    pages: Iterable[ReplicaPage],
    meta: ReplicaPage,
    guard: Lease,
) -> tuple[VersionRecord, bool]:
    """Make ``manifest`` the dataset's newest version, once, however often this is called for one run.

    The replica pages are written first (merged with what is known of the same manifest), then the version's
    record and the head in one transaction.

    Args:
        coord: Where.
        dataset: Its name.
        manifest: The digest of a manifest that is durable already.
        run: Who made it.
        created_at_ms: Wall time.
        rows: Of the manifest.
        size_bytes: Of all shards, one replica each.
        shards: Of the manifest.
        placement: The policy it was made under.
        lineage: Where it came from.
        pages: Where each segment's shards lie, in order.
        meta: Where the manifest's own objects lie.
        guard: A lease that must stand in every transaction.

    Returns:
        The record, and whether the head named this digest before this run: then there is no new version.

    Raises:
        Fenced: ``guard`` does not stand; no version was added.
        CoordError: the facts at hand contradict those in the store.
    """
    await _write_pages(coord, manifest, pages, meta, guard)
    record = VersionRecord(
        dataset=dataset,
        version=0,
        digest=manifest,
        run=run,
        created_at_ms=created_at_ms,
        rows=rows,
        bytes=size_bytes,
        shards=shards,
        placement=dict(placement),
        lineage=lineage,
    )
    for _ in range(_HEAD_ATTEMPTS):
        try:
            return await _move_head(coord, record, guard)
        except Conflict:
            continue
    raise Conflict(f"the head of dataset {dataset} moved {_HEAD_ATTEMPTS} times while run {run} added a version")


async def _move_head(coord: Coordination, record: VersionRecord, guard: Lease) -> tuple[VersionRecord, bool]:
    """One attempt at giving ``record`` the next number and making it the head.

    Raises:
        Conflict: the head moved meanwhile.
    """
    head_key, counter_key = dataset_head(record.dataset), version_counter(record.dataset)
    head, counter = await coord.get(head_key), await coord.get(counter_key)
    ref = None if head is None else decode(VersionRef, head.value, key=head_key)
    if ref is not None:
        there = await _there_already(coord, record, ref)
        if there is not None:
            return there, there.run != record.run
        if ref.digest == record.digest:
            raise Conflict(f"{head_key} names a version that was removed between two looks")
    number = 1 + max(ref.version if ref else 0, _count(counter.value, counter_key) if counter else 0)
    numbered = record.model_copy(update={"version": number})
    version_key = dataset_version(record.dataset, number)
    writes = [
        Write(version_key, encode(numbered)),
        Write(head_key, encode(VersionRef(version=number, digest=record.digest))),
        Write(counter_key, str(number).encode()),
    ]
    compares = [
        Compare(version_key, 0),
        Compare(head_key, head.revision if head else 0),
        Compare(counter_key, counter.revision if counter else 0),
    ]
    await coord.commit(writes, compares=compares, guard=guard)
    return numbered, False


async def _there_already(coord: Coordination, wanted: VersionRecord, head: VersionRef) -> VersionRecord | None:
    """The head's record if it names the same manifest, else the one this run made before it was killed."""
    for number in range(head.version, max(0, head.version - _LOOK_BACK), -1):
        key = dataset_version(wanted.dataset, number)
        entry = await coord.get(key)
        if entry is None:
            continue
        record = decode(VersionRecord, entry.value, key=key)
        if record.digest == wanted.digest and (number == head.version or record.run == wanted.run):
            return record
    return None


async def _write_pages(
    coord: Coordination, manifest: Digest, pages: Iterable[ReplicaPage], meta: ReplicaPage, guard: Lease
) -> None:
    known = bool(await coord.list(f"replicas/{manifest}/", limit=1))
    parts = meta_parts(meta)
    batch: dict[str, bytes] = {}
    size = 0

    async def flush() -> None:
        nonlocal size
        if batch:
            await _create_or_merge(coord, batch, guard)
        batch.clear()
        size = 0

    keyed = [*zip(meta_keys(manifest, len(parts)), parts, strict=True)]
    for key, page in chain(((replica_page(manifest, i), page) for i, page in enumerate(pages)), keyed):
        if known:
            await _merge(coord, key, page, guard)
            continue
        value = encode_page(page)
        if len(batch) == _BATCH_WRITES or size + len(value) > _BATCH_BYTES:
            await flush()
        batch[key] = value
        size += len(value)
    await flush()


async def _create_or_merge(coord: Coordination, batch: Mapping[str, bytes], guard: Lease) -> None:
    try:
        await coord.commit(
            [Write(key, value) for key, value in batch.items()],
            compares=[Compare(key, 0) for key in batch],
            guard=guard,
        )
    except Conflict:
        for key, value in batch.items():
            await _merge(coord, key, decode_page(value, key=key), guard)


async def _merge(coord: Coordination, key: str, page: ReplicaPage, guard: Lease) -> None:
    def change(before: ReplicaPage | None) -> ReplicaPage:
        return page if before is None else merge_pages(*_under_one_key(before, page), key=key)

    await update_page(coord, key, change, guard=guard)


def _under_one_key(before: ReplicaPage, page: ReplicaPage) -> tuple[ReplicaPage, ReplicaPage]:
    """Both pages, with each object under one key: an entry has only one, and adopted files lie under any.

    Copies that Millrace made stay what is known; of files that were adopted, the newest place is.
    """
    pairs = list(zip(before.entries, page.entries, strict=False))
    if len(before.entries) != len(page.entries) or all(a.key == b.key for a, b in pairs):
        return before, page
    entries = [_one_key(a, b) for a, b in pairs]
    old, new = (ReplicaPage.model_construct(entries=tuple(part)) for part in zip(*entries, strict=True))
    return old, new


def _one_key(before: ReplicaEntry, now: ReplicaEntry) -> tuple[ReplicaEntry, ReplicaEntry]:
    if before.key == now.key or before.digest != now.digest:
        return before, now
    if before.key == shard_key(Digest(before.digest)):
        return before, before
    return now, now


def _count(value: bytes, key: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise CoordError(f"the record at {key} is not a number") from None
