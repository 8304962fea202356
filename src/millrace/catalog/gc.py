"""Garbage collection in two phases: mark what nobody names; later, delete what still nobody names.

``docs/design/garbage-collection.md`` says why each step is where it is.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

from millrace.catalog.collection import GcReport, Tally
from millrace.catalog.crew import at_once
from millrace.catalog.marks import load_marks, store_marks
from millrace.catalog.named import Named, census, runs_of
from millrace.catalog.versions import entries
from millrace.core.errors import LeaseHeld, StoreError, TimedOut
from millrace.core.keys import GC_LEASE, run_lease, run_prefix
from millrace.core.model import StoreSite
from millrace.core.ports import Clock, Coordination, Lease, ObjectInfo, Store, Write

__all__ = ["GRACE_MS", "SCRATCH", "collect", "mark", "sweep"]

GRACE_MS: Final = 3_600_000
"""How long an object stays marked before a sweep may delete it, unless said otherwise."""

SCRATCH: Final = "(work)"
"""What reports call the work store of runs."""

_LEASE_MS: Final = 120_000
_PAGE_S: Final = 40.0
"""Time for one page of deletes: well within the lease that was renewed just before it."""
_PAGE_DELETES: Final = 64
_DELETES_AT_ONCE: Final = 8
_WRITES_AT_ONCE: Final = 100

_KINDS: Final = (
    (b"s", re.compile(r"shards/([0-9a-f]{2})/(\1[0-9a-f]{62})\.arrow")),
    (b"g", re.compile(r"manifests/segments/()([0-9a-f]{64})\.arrow")),
    (b"m", re.compile(r"manifests/()([0-9a-f]{64})\.json")),
)
_PREFIXES: Final = ("shards/", "manifests/")
_SCRATCH: Final = re.compile(r"runs/\d{8}/(plan\.arrow|[a-z]+(-\d+)?/[0-9a-f]{64})")


async def mark(
    coord: Coordination, stores: Mapping[str, Store], sites: Sequence[StoreSite], work: Store, *, who: str, clock: Clock
) -> GcReport:
    """Note every object that nobody names. Deletes nothing; runs may be under way.

    Args:
        coord: Where versions, claims, runs and marks are.
        stores: Every store of the world by name.
        sites: Every store as decisions see it.
        work: The work store of runs.
        who: Names this process, uniquely.
        clock: For the lease and the marks.

    Raises:
        LeaseHeld: another collection is at work.
        Unavailable: something that may name objects can't be read.
    """
    async with _held(coord, who, clock) as keeper:
        return await _Pass(coord, stores, sites, work, keeper, clock, marking=True, grace_ms=None).run()


async def sweep(
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    work: Store,
    *,
    who: str,
    clock: Clock,
    grace_ms: int = GRACE_MS,
) -> GcReport:
    """Delete what was marked at least ``grace_ms`` ago, hasn't changed since, and still nobody names.

    Also deletes the scratch of finished runs, replica pages of removed versions and claims of dead readers.

    Raises:
        LeaseHeld: a run is alive, or another collection is at work.
        Unavailable: something that may name objects can't be read; nothing was deleted.
        Fenced: a run began meanwhile, as this collection had stalled; it stopped.
    """
    async with _held(coord, who, clock) as keeper:
        await _keep_runs_out(coord, who, clock.now_ms())
        return await _Pass(coord, stores, sites, work, keeper, clock, marking=False, grace_ms=grace_ms).run()


async def collect(
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    work: Store,
    *,
    who: str,
    clock: Clock,
    grace_ms: int = GRACE_MS,
) -> GcReport:
    """``sweep`` what was marked earlier and ``mark`` the rest, in one pass: what ``millrace gc`` does.

    Raises:
        LeaseHeld: a run is alive, or another collection is at work.
        Unavailable: something that may name objects can't be read; nothing was deleted.
        Fenced: a run began meanwhile, as this collection had stalled; it stopped.
    """
    async with _held(coord, who, clock) as keeper:
        await _keep_runs_out(coord, who, clock.now_ms())
        return await _Pass(coord, stores, sites, work, keeper, clock, marking=True, grace_ms=grace_ms).run()


class _Keeper:
    """The collection's lease, renewed as the work goes on."""

    def __init__(self, coord: Coordination, lease: Lease, clock: Clock) -> None:
        self.lease = lease
        self._coord = coord
        self._clock = clock
        self._renewed_s = clock.monotonic_s()

    async def beat(self) -> None:
        """Renew it if that is due. Raises ``Fenced`` when somebody took it."""
        if self._clock.monotonic_s() - self._renewed_s > _LEASE_MS / 4000:
            await self.check()

    async def check(self) -> None:
        """Renew it now. Raises ``Fenced`` when somebody took it."""
        self.lease = await self._coord.renew(self.lease, _LEASE_MS, now_ms=self._clock.now_ms())
        self._renewed_s = self._clock.monotonic_s()


@asynccontextmanager
async def _held(coord: Coordination, who: str, clock: Clock) -> AsyncIterator[_Keeper]:
    one = object()
    try:
        # Its id makes two collections of one process two holders: the lease goes by the holder's name.
        lease = await coord.acquire(GC_LEASE, f"{who} gc-{id(one):x}", _LEASE_MS, now_ms=clock.now_ms())
    except LeaseHeld as error:
        raise LeaseHeld(
            f"{error.holder} collects garbage already; wait until it is done",
            holder=error.holder,
            expires_at_ms=error.expires_at_ms,
        ) from error
    try:
        keeper = _Keeper(coord, lease, clock)
        yield keeper
    finally:
        await coord.release(lease)


async def _keep_runs_out(coord: Coordination, who: str, now_ms: int) -> None:
    """Refuse while a process drives a run, and fence those that stalled past their lease.

    A run that comes later finds the collection's lease. One whose process stands still and wakes up again can't
    write to its ledger any more, so nothing it counted on having found here gets into a version.
    """
    async for run in runs_of(coord):
        name = run_lease(run.run)
        holder = await coord.holder(name)
        if holder is None:
            continue
        try:
            await coord.release(await coord.acquire(name, f"gc of {who}", 1000, now_ms=now_ms))
        except LeaseHeld as error:
            raise LeaseHeld(
                f"nothing is collected while run {run.run} is under way ({error.holder}), as it may count on objects "
                f"that it found in a store; wait until it is done, or stop it with 'millrace stop {run.run}'",
                holder=error.holder,
                expires_at_ms=error.expires_at_ms,
            ) from error


class _Pass:
    """One walk through all stores.

    Args:
        marking: Whether objects that were not marked yet are marked.
        grace_ms: How old a mark must be for its object to be deleted; None deletes nothing.
    """

    def __init__(
        self,
        coord: Coordination,
        stores: Mapping[str, Store],
        sites: Sequence[StoreSite],
        work: Store,
        keeper: _Keeper,
        clock: Clock,
        *,
        marking: bool,
        grace_ms: int | None,
    ) -> None:
        self._coord = coord
        self._stores = stores
        self._sites = sites
        self._work = work
        self._keeper = keeper
        self._clock = clock
        self._marking = marking
        self._grace_ms = grace_ms
        self._now_ms = clock.now_ms()
        self._old: dict[bytes, int] = {}
        self._new: dict[bytes, int] = {}
        self._failed: dict[str, str] = {}

    async def run(self) -> GcReport:
        """Take the census, walk, and write the marks."""
        named = await census(
            self._coord, self._stores, self._sites, self._work, now_ms=self._now_ms, beat=self._keeper.beat
        )
        self._old = await load_marks(self._coord)
        tallies = [await self._store(name, store, named) for name, store in self._stores.items()]
        pages = 0
        if self._grace_ms is not None:
            tallies.append(await self._scratch(self._grace_ms))
            pages = await self._orphan_pages(named)
            await self._delete_keys(named.expired_claims)
        await store_marks(self._coord, self._new, at_ms=self._now_ms, guard=self._keeper.lease)
        return GcReport(
            stores=tuple(tally.done() for tally in tallies),
            replica_pages=pages,
            claims=len(named.expired_claims) if self._grace_ms is not None else 0,
            failed=self._failed,
        )

    # --- objects -------------------------------------------------------------------------------------

    async def _store(self, name: str, store: Store, named: Named) -> Tally:
        tally = Tally(name)
        try:
            for prefix in _PREFIXES:
                async for page in store.list(prefix):
                    await self._keeper.beat()
                    doomed = [info for info in page if self._doomed(info, named, tally)]
                    await self._delete(store, doomed, tally)
        except StoreError as error:
            self._failed[name] = f"{error.kind}: {error}"
        return tally

    def _doomed(self, info: ObjectInfo, named: Named, tally: Tally) -> bool:
        """Whether to delete it now; else it is counted, and marked if it should be."""
        kind, digest = _parse(info.key)
        if not kind:
            tally.unknown.add(info.size_bytes)
            return False
        if digest in named.digests:
            tally.named.add(info.size_bytes)
            return False
        since = self._old.get(kind + digest)
        fresh = since is None or info.modified_ms >= since
        if self._grace_ms is not None and since is not None and not fresh and since + self._grace_ms <= self._now_ms:
            return True
        self._remark(kind + digest, since, fresh, info.size_bytes, tally)
        if self._grace_ms is not None:
            why = "not marked before" if since is None else "newer than its mark" if fresh else "within its grace"
            tally.keep(why, info.size_bytes)
        return False

    def _remark(self, mark: bytes, since: int | None, fresh: bool, size_bytes: int, tally: Tally) -> None:
        if self._marking:
            # Replicas of one object share a mark; if one of them is newer, all of them wait for it.
            at = self._now_ms if fresh or since is None else since
            self._new[mark] = max(at, self._new.get(mark, 0))
            tally.marked.add(size_bytes)
        elif since is not None:
            self._new[mark] = since

    async def _delete(self, store: Store, doomed: Sequence[ObjectInfo], tally: Tally) -> None:
        """Delete a page at a time, each under a lease renewed just before and done well before that ends."""
        for i in range(0, len(doomed), _PAGE_DELETES):
            page = doomed[i : i + _PAGE_DELETES]
            await self._keeper.check()
            todo = iter(page)
            try:
                async with asyncio.timeout(_PAGE_S):
                    await at_once([self._delete_some(store, todo, tally) for _ in range(_DELETES_AT_ONCE)])
            except TimeoutError as error:
                raise TimedOut(
                    f"deleting {len(page)} objects took over {_PAGE_S:.0f} s; the rest of it is left alone",
                    store=store.url,
                ) from error

    async def _delete_some(self, store: Store, todo: Iterator[ObjectInfo], tally: Tally) -> None:
        for info in todo:
            try:
                await store.delete(info.key)
            except StoreError as error:
                tally.keep(f"it could not be deleted: {error.kind}", info.size_bytes)
                self._failed.setdefault(tally.store, str(error))
            else:
                tally.deleted.add(info.size_bytes)

    # --- what belongs to runs, versions and readers that are gone --------------------------------------

    async def _scratch(self, grace_ms: int) -> Tally:
        tally = Tally(SCRATCH)
        try:
            async for run in runs_of(self._coord):
                record = run.record
                if record is None or not run.finished:
                    continue
                if (record.ended_at_ms or record.created_at_ms) + grace_ms > self._now_ms:
                    continue
                async for page in self._work.list(run_prefix(run.run)):
                    doomed = [info for info in page if _SCRATCH.fullmatch(info.key)]
                    tally.unknown.objects += len(page) - len(doomed)
                    await self._delete(self._work, doomed, tally)
        except StoreError as error:
            self._failed[SCRATCH] = f"{error.kind}: {error}"
        return tally

    async def _orphan_pages(self, named: Named) -> int:
        deleted = 0
        after = ""
        while found := await self._coord.list("replicas/", after=after, limit=1):
            digest = found[0].key.split("/")[1]
            after = f"replicas/{digest}0"  # "0" follows "/": past all pages of this manifest
            if digest not in named.manifests:
                keys = [entry.key async for entry in entries(self._coord, f"replicas/{digest}/", page=8)]
                await self._delete_keys(keys)
                deleted += len(keys)
        return deleted

    async def _delete_keys(self, keys: Sequence[str]) -> None:
        for i in range(0, len(keys), _WRITES_AT_ONCE):
            await self._keeper.check()
            writes = [Write(key, None) for key in keys[i : i + _WRITES_AT_ONCE]]
            await self._coord.commit(writes, guard=self._keeper.lease)


def _parse(key: str) -> tuple[bytes, bytes]:
    """An object's kind, one letter, and its digest; both empty when it isn't one of ours."""
    for kind, pattern in _KINDS:
        match = pattern.fullmatch(key)
        if match:
            return kind, bytes.fromhex(match[2])
    return b"", b""
