"""The coordination port on one SQLite file, shared by the processes of one machine: the embedded default."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

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
from millrace.coord.sqlite_file import SqliteFile
from millrace.core.errors import Conflict, CoordError
from millrace.core.ports import Change, Compare, Entry, Lease, Write

__all__ = ["SqliteCoordination"]

T = TypeVar("T")

_KEYS_END = b"\xff"  # Greater than the UTF-8 form of any key.
_LEASE_BYTES = 4096
_WRITE_BYTES = 8192  # What a small write costs in the log: its page and its index pages, shared with others.


@dataclass(frozen=True, slots=True)
class _Seat:
    """What belongs to one process: its only thread that touches the file, and the file."""

    pid: int
    executor: ThreadPoolExecutor
    file: SqliteFile


class SqliteCoordination:
    """Facts in one SQLite file, with write-ahead log and an fsync at each commit.

    Nothing is opened before the first call, and then in the process that makes it: an object made before a
    fork, or pickled to another process, opens the file anew there. For one event loop at a time. A cancelled
    ``commit`` may have happened, as with any store behind a wire.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        poll_interval_s: float = 0.1,
        busy_timeout_s: float = 1.0,
        attempts: int = 6,
        tombstones_max: int = TOMBSTONES_MAX,
    ) -> None:
        """Touch nothing yet.

        Args:
            path: The file, created at the first call; its directory must exist, on a local disk.
            poll_interval_s: How often a watch looks for other processes' commits. Our own are told at once.
            busy_timeout_s: How long one attempt waits for another process's transaction.
            attempts: How often a transaction that found the file locked is begun before ``CoordError``; the pauses
                in between double from 10 ms, and are at most ``busy_timeout_s``.
            tombstones_max: How many deletions are remembered; past that the older half is forgotten.
        """
        self._path = Path(path).absolute()
        self._poll_interval_s = poll_interval_s
        self._busy_timeout_s = busy_timeout_s
        self._attempts = max(1, attempts)
        self._tombstones_max = tombstones_max
        self._bell = Bell()
        self._closed = False
        self._seat: _Seat | None = None
        self._inherited: list[_Seat] = []

    def __reduce__(self) -> tuple[Callable[[], SqliteCoordination], tuple[()]]:
        build = partial(
            SqliteCoordination,
            self._path,
            poll_interval_s=self._poll_interval_s,
            busy_timeout_s=self._busy_timeout_s,
            attempts=self._attempts,
            tombstones_max=self._tombstones_max,
        )
        return build, ()

    async def get(self, key: str) -> Entry | None:
        """The newest value of a key, or None."""
        encoded = check_key(key)

        def read(db: sqlite3.Connection) -> Entry | None:
            row = db.execute(
                "SELECT value, revision FROM entries WHERE key = ? AND value IS NOT NULL", (encoded,)
            ).fetchone()
            return Entry(key, *row) if row else None

        return await self._read(read)

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> Sequence[Entry]:
        """Entries whose key starts with ``prefix`` and is greater than ``after``, in key order."""
        first = check_prefix(prefix)
        # Nothing sorts between a key and that key with a zero byte at its end.
        start = max(first, check_prefix(after, "key") + b"\0")
        bounds = (start, _prefix_end(first), check_limit(limit))

        def read(db: sqlite3.Connection) -> Sequence[Entry]:
            rows = db.execute(
                "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? AND value IS NOT NULL "
                "ORDER BY key LIMIT ?",
                bounds,
            )
            return [Entry(key.decode(), value, revision) for key, value, revision in rows]

        return await self._read(read)

    async def commit(
        self, writes: Sequence[Write], *, compares: Sequence[Compare] = (), guard: Lease | None = None
    ) -> int:
        """All of it or nothing; gives the new revision, or the present one when there are no writes.

        Raises:
            Conflict: a compare did not hold; the message names the key.
            Fenced: ``guard`` is not the newest epoch of its lease name. It is looked at before the compares.
            CoordError: over a limit (see ``rules``), or the file can't be used.
        """
        writes, compares = tuple(writes), tuple(compares)
        check_commit(writes, compares)

        def change(db: sqlite3.Connection) -> int:
            if guard is not None:
                check_fence(_lease_state(db, guard.name), guard)
            for compare in compares:
                _check_compare(db, compare)
            revision: int = db.execute("SELECT revision FROM store").fetchone()[0]
            if writes:
                revision += 1
                db.execute("UPDATE store SET revision = ?", (revision,))
                for write in writes:
                    _apply(db, write, revision)
                if any(write.value is None for write in writes):
                    _prune(db, self._tombstones_max)
            return revision

        size = sum(_WRITE_BYTES + len(write.value or b"") for write in writes)
        return await self._write(change, size)

    def watch(self, prefix: str, *, since_revision: int = 0) -> AsyncIterator[Change]:
        """Every key under ``prefix`` as it changes after ``since_revision``, in order, until closed.

        Raises:
            CoordError: while iterating, when deletions since then were forgotten.
        """
        first = check_prefix(prefix)

        async def look(cursor: Cursor) -> Look | None:
            return None if self._closed else await self._run(lambda file: _look(file, first, cursor))

        return follow(prefix, check_revision(since_revision), look, self._wait)

    async def acquire(self, name: str, holder: str, ttl_ms: int, *, now_ms: int, steal: bool = False) -> Lease:
        """Take a lease: free, expired, already this holder's (then its epoch stays), or with ``steal``.

        Raises:
            LeaseHeld: somebody else has it and it has not expired.
        """
        check_lease_terms(name, holder, ttl_ms, now_ms)

        def change(db: sqlite3.Connection) -> Lease:
            lease = granted(_lease_state(db, name), name, holder, ttl_ms, now_ms=now_ms, steal=steal)
            _put_lease(db, LeaseState(lease))
            return lease

        return await self._write(change, _LEASE_BYTES)

    async def renew(self, lease: Lease, ttl_ms: int, *, now_ms: int) -> Lease:
        """Extend it. Raises ``Fenced`` if it has a newer epoch or was released."""
        check_lease_terms(lease.name, lease.holder, ttl_ms, now_ms)
        renewed = replace(lease, expires_at_ms=now_ms + ttl_ms)

        def change(db: sqlite3.Connection) -> None:
            check_fence(_lease_state(db, lease.name), lease)
            _put_lease(db, LeaseState(renewed))

        await self._write(change, _LEASE_BYTES)
        return renewed

    async def release(self, lease: Lease) -> None:
        """Give it back. A stale one is left alone, without an error."""

        def change(db: sqlite3.Connection) -> None:
            state = _lease_state(db, lease.name)
            if state is not None and stands(state, lease):
                _put_lease(db, replace(state, released=True))

        await self._write(change, _LEASE_BYTES)

    async def holder(self, name: str) -> Lease | None:
        """Who holds it, expired or not; None if nobody ever did or it was released."""
        check_key(name, "lease name")
        state = await self._read(lambda db: _lease_state(db, name))
        return None if state is None or state.released else state.lease

    async def aclose(self) -> None:
        """End every watch, finish what was begun, and let go of the file and its thread."""
        self._closed = True
        self._bell.ring()
        seat, self._seat = self._seat, None
        if seat is None or seat.pid != os.getpid():
            return
        try:
            await asyncio.get_running_loop().run_in_executor(seat.executor, seat.file.close)
        finally:
            seat.executor.shutdown()  # Idle by now: its thread ends at once.

    async def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await self._run(lambda file: file.transact(work))

    async def _write(self, work: Callable[[sqlite3.Connection], T], size_bytes: int) -> T:
        result = await self._run(lambda file: file.transact(work, write_bytes=size_bytes))
        self._bell.ring()
        return result

    async def _run(self, job: Callable[[SqliteFile], T]) -> T:
        if self._closed:
            raise CoordError(f"coordination file {self._path} was closed by this process; open it again")
        seat = self._seated()
        return await asyncio.get_running_loop().run_in_executor(seat.executor, job, seat.file)

    def _seated(self) -> _Seat:
        pid = os.getpid()
        if self._seat is not None and self._seat.pid != pid:
            # SQLite forbids even closing a connection that came through a fork: it is kept, and left alone.
            self._inherited.append(self._seat)
            self._seat = None
        if self._seat is None:
            executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="millrace-coord")
            file = SqliteFile(self._path, busy_timeout_s=self._busy_timeout_s, attempts=self._attempts)
            self._seat = _Seat(pid, executor, file)
        return self._seat

    async def _wait(self, stamp: Hashable) -> bool:
        while not self._closed:
            rings = self._bell.rings
            if await self._run(SqliteFile.stamp) != stamp:
                return not self._closed
            await self._bell.wait(rings, self._poll_interval_s)
        return False


def _prefix_end(prefix: bytes) -> bytes:
    """The least byte string greater than all that start with ``prefix``; UTF-8 has no byte 0xFF to carry over."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix else _KEYS_END


def _check_compare(db: sqlite3.Connection, compare: Compare) -> None:
    row = db.execute(
        "SELECT revision FROM entries WHERE key = ? AND value IS NOT NULL", (compare.key.encode(),)
    ).fetchone()
    found = row[0] if row else 0
    if found != compare.revision:
        raise Conflict(f"key {compare.key!r} is at revision {found}, not {compare.revision}; read it again")


def _apply(db: sqlite3.Connection, write: Write, revision: int) -> None:
    key = write.key.encode()
    if write.value is None:
        db.execute("UPDATE entries SET value = NULL, revision = ? WHERE key = ? AND value IS NOT NULL", (revision, key))
    else:
        db.execute(
            "INSERT INTO entries VALUES (?, ?, ?) "
            "ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
            (key, write.value, revision),
        )


def _prune(db: sqlite3.Connection, tombstones_max: int) -> None:
    count: int = db.execute("SELECT count(*) FROM entries WHERE value IS NULL").fetchone()[0]
    if count <= tombstones_max:
        return
    oldest = db.execute(
        "SELECT revision, key FROM entries WHERE value IS NULL ORDER BY revision, key LIMIT ?",
        (count - tombstones_max // 2,),
    ).fetchall()
    db.executemany("DELETE FROM entries WHERE key = ?", [(key,) for _, key in oldest])
    db.execute("UPDATE store SET floor = ?", (oldest[-1][0],))


def _lease_state(db: sqlite3.Connection, name: str) -> LeaseState | None:
    row = db.execute(
        "SELECT holder, epoch, expires_at_ms, released FROM leases WHERE name = ?", (check_key(name, "lease name"),)
    ).fetchone()
    if row is None:
        return None
    holder, epoch, expires_at_ms, released = row
    return LeaseState(Lease(name, holder.decode(), epoch, expires_at_ms), bool(released))


def _put_lease(db: sqlite3.Connection, state: LeaseState) -> None:
    lease = state.lease
    db.execute(
        "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)",
        (lease.name.encode(), lease.holder.encode(), lease.epoch, lease.expires_at_ms, state.released),
    )


def _look(file: SqliteFile, prefix: bytes, cursor: Cursor) -> Look:
    stamp = file.stamp()  # Before the look: what is committed in between shows as a newer stamp.
    told = cursor.key.encode() if cursor.key is not None else _KEYS_END
    bounds = (cursor.revision, told, prefix, _prefix_end(prefix), BATCH_CHANGES_MAX)

    def read(db: sqlite3.Connection) -> Look:
        revision, floor = db.execute("SELECT revision, floor FROM store").fetchone()
        # The index by revision holds what is new; the one by key would be read from the prefix's start each time.
        rows = db.execute(
            "SELECT key, value, revision FROM entries INDEXED BY entries_by_revision "
            "WHERE (revision, key) > (?, ?) AND key >= ? AND key < ? ORDER BY revision, key LIMIT ?",
            bounds,
        ).fetchall()
        changes = tuple(
            Change(Entry(key.decode(), b"" if value is None else value, at), deleted=value is None)
            for key, value, at in rows
        )
        return Look(revision, floor, changes, len(changes) == BATCH_CHANGES_MAX, stamp)

    return file.transact(read)
