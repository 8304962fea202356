"""The coordination port in this process's memory: the strict small twin of the durable ones."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Hashable, Sequence
from dataclasses import replace

from millrace.coord.following import BATCH_CHANGES_MAX, Bell, Cursor, Look, follow
from millrace.coord.rules import (
    TOMBSTONES_MAX,
    LeaseState,
    check_commit,
    check_fence,
    check_key,
    check_lease_terms,
    check_limit,
    check_prefix,
    check_revision,
    granted,
    stands,
)
from millrace.core.errors import Conflict, CoordError
from millrace.core.ports import Change, Compare, Entry, Lease, Write

__all__ = ["MemoryCoordination"]


class MemoryCoordination:
    """Keeps everything in dictionaries, for one event loop at a time.

    It refuses all that the durable stores refuse, and gives way to other tasks at the start of each call, so
    that what races there races here. Between two such moments nothing else runs: that is its transaction.
    """

    def __init__(self, *, tombstones_max: int = TOMBSTONES_MAX) -> None:
        """Start empty, at revision 0.

        Args:
            tombstones_max: How many deletions are remembered; past that the older half is forgotten.
        """
        self._tombstones_max = tombstones_max
        self._entries: dict[str, Entry] = {}
        self._keys: list[str] = []
        self._tombstones: dict[str, int] = {}
        self._leases: dict[str, LeaseState] = {}
        self._revision = 0
        self._floor = 0
        self._bell = Bell()
        self._closed = False

    async def get(self, key: str) -> Entry | None:
        """The newest value of a key, or None."""
        await self._turn()
        check_key(key)
        return self._entries.get(key)

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> Sequence[Entry]:
        """Entries whose key starts with ``prefix`` and is greater than ``after``, in key order."""
        await self._turn()
        check_prefix(prefix)
        check_prefix(after, "key")
        wanted = check_limit(limit)
        found: list[Entry] = []
        # Nothing sorts between a key and that key with a zero character at its end.
        for index in range(bisect_left(self._keys, max(prefix, after + "\0")), len(self._keys)):
            key = self._keys[index]
            if len(found) == wanted or not key.startswith(prefix):
                break
            found.append(self._entries[key])
        return found

    async def commit(
        self, writes: Sequence[Write], *, compares: Sequence[Compare] = (), guard: Lease | None = None
    ) -> int:
        """All of it or nothing; gives the new revision, or the present one when there are no writes.

        Raises:
            Conflict: a compare did not hold; the message names the key.
            Fenced: ``guard`` is not the newest epoch of its lease name. It is looked at before the compares.
            CoordError: over a limit (see ``rules``).
        """
        await self._turn()
        check_commit(writes, compares)
        if guard is not None:
            check_fence(self._leases.get(guard.name), guard)
        for compare in compares:
            entry = self._entries.get(compare.key)
            found = entry.revision if entry else 0
            if found != compare.revision:
                raise Conflict(f"key {compare.key!r} is at revision {found}, not {compare.revision}; read it again")
        if writes:
            self._revision += 1
            for write in writes:
                self._apply(write)
            self._prune()
            self._bell.ring()
        return self._revision

    def watch(self, prefix: str, *, since_revision: int = 0) -> AsyncIterator[Change]:
        """Every key under ``prefix`` as it changes after ``since_revision``, in order, until closed.

        Raises:
            CoordError: while iterating, when deletions since then were forgotten.
        """
        check_prefix(prefix)

        async def look(cursor: Cursor) -> Look | None:
            return None if self._closed else self._look(prefix, cursor)

        return follow(prefix, check_revision(since_revision), look, self._wait)

    async def acquire(self, name: str, holder: str, ttl_ms: int, *, now_ms: int, steal: bool = False) -> Lease:
        """Take a lease: free, expired, already this holder's (then its epoch stays), or with ``steal``.

        Raises:
            LeaseHeld: somebody else has it and it has not expired.
        """
        await self._turn()
        check_lease_terms(name, holder, ttl_ms, now_ms)
        lease = granted(self._leases.get(name), name, holder, ttl_ms, now_ms=now_ms, steal=steal)
        self._leases[name] = LeaseState(lease)
        return lease

    async def renew(self, lease: Lease, ttl_ms: int, *, now_ms: int) -> Lease:
        """Extend it. Raises ``Fenced`` if it has a newer epoch or was released."""
        await self._turn()
        check_lease_terms(lease.name, lease.holder, ttl_ms, now_ms)
        check_fence(self._leases.get(lease.name), lease)
        renewed = replace(lease, expires_at_ms=now_ms + ttl_ms)
        self._leases[lease.name] = LeaseState(renewed)
        return renewed

    async def release(self, lease: Lease) -> None:
        """Give it back. A stale one is left alone, without an error."""
        await self._turn()
        state = self._leases.get(lease.name)
        if state is not None and stands(state, lease):
            self._leases[lease.name] = replace(state, released=True)

    async def holder(self, name: str) -> Lease | None:
        """Who holds it, expired or not; None if nobody ever did or it was released."""
        await self._turn()
        check_key(name, "lease name")
        state = self._leases.get(name)
        return None if state is None or state.released else state.lease

    async def aclose(self) -> None:
        """End every watch and refuse further calls. What was kept is gone with the object."""
        self._closed = True
        self._bell.ring()

    async def _turn(self) -> None:
        await asyncio.sleep(0)
        if self._closed:
            raise CoordError("the coordination store in memory was closed; open another")

    async def _wait(self, stamp: Hashable) -> bool:
        while self._bell.rings == stamp:
            await self._bell.wait(self._bell.rings)
        return not self._closed

    def _apply(self, write: Write) -> None:
        present = write.key in self._entries
        if write.value is not None:
            if not present:
                insort(self._keys, write.key)
            self._entries[write.key] = Entry(write.key, bytes(write.value), self._revision)
            self._tombstones.pop(write.key, None)
        elif present:
            del self._entries[write.key]
            del self._keys[bisect_left(self._keys, write.key)]
            self._tombstones[write.key] = self._revision

    def _prune(self) -> None:
        if len(self._tombstones) <= self._tombstones_max:
            return
        oldest = sorted((revision, key) for key, revision in self._tombstones.items())
        for revision, key in oldest[: len(oldest) - self._tombstones_max // 2]:
            del self._tombstones[key]
            self._floor = revision

    def _look(self, prefix: str, cursor: Cursor) -> Look:
        changes = [Change(entry) for entry in self._entries.values() if self._is_after(entry, prefix, cursor)]
        for key, revision in self._tombstones.items():
            gone = Entry(key, b"", revision)
            if self._is_after(gone, prefix, cursor):
                changes.append(Change(gone, deleted=True))
        changes.sort(key=lambda change: (change.entry.revision, change.entry.key))
        more = len(changes) > BATCH_CHANGES_MAX
        return Look(self._revision, self._floor, tuple(changes[:BATCH_CHANGES_MAX]), more, self._bell.rings)

    @staticmethod
    def _is_after(entry: Entry, prefix: str, cursor: Cursor) -> bool:
        if not entry.key.startswith(prefix):
            return False
        if entry.revision == cursor.revision:
            return cursor.key is not None and entry.key > cursor.key
        return entry.revision > cursor.revision
