"""One SQLite file, opened, checked and spoken to from one thread; every failure is a ``CoordError`` naming it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from millrace.core.errors import CoordError

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION", "SqliteFile"]

APPLICATION_ID = 0x4D494C4C
"""``MILL``: tells our files from other applications' SQLite files."""

SCHEMA_VERSION = 1

_SCHEMA = (
    # `floor`: deletions up to that revision may have been forgotten.
    "CREATE TABLE store (one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL, floor INTEGER NOT NULL)",
    "INSERT INTO store VALUES (1, 0, 0)",
    # Keys are UTF-8 as blobs, so that order and prefixes are those of bytes, whatever the characters.
    # A deleted key stays for a while with a NULL value: a tombstone, for watches.
    "CREATE TABLE entries (key BLOB NOT NULL PRIMARY KEY, value BLOB, revision INTEGER NOT NULL)",
    "CREATE INDEX entries_by_revision ON entries (revision, key)",
    "CREATE INDEX tombstones ON entries (revision, key) WHERE value IS NULL",
    # A released lease keeps its row, so that the epoch never goes back.
    "CREATE TABLE leases (name BLOB NOT NULL PRIMARY KEY, holder BLOB NOT NULL, epoch INTEGER NOT NULL, "
    "expires_at_ms INTEGER NOT NULL, released INTEGER NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {SCHEMA_VERSION}",
)

_CHECKPOINT_BYTES = 4 << 20
_RETRY_PAUSE_S = 0.01

_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
# After these, what the connection believes of the file can't be trusted: the next call opens it anew.
_BROKEN = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN}

T = TypeVar("T")


class SqliteFile:
    """A coordination file: opened at the first use, in write-ahead-log mode, durable at each commit.

    Not for two threads at once. Several processes may have the file open; one writes at a time.

    Attributes:
        path: Absolute.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float, attempts: int) -> None:
        """Touch nothing yet.

        Args:
            path: The file; its directory must exist.
            busy_timeout_s: How long one attempt waits for another process's transaction to end.
            attempts: How often a transaction that found the file busy is begun, at least 1.
        """
        self.path = path.absolute()
        self._busy_timeout_s = busy_timeout_s
        self._attempts = attempts
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._opened = 0
        self._writes = 0
        self._log_bytes = 0

    def transact(self, work: Callable[[sqlite3.Connection], T], *, write_bytes: int | None = None) -> T:
        """Run ``work`` in one transaction: all of it, or, when it raises, nothing.

        Args:
            work: May be run again from the start when the file was busy.
            write_bytes: About how much it writes; None for a transaction that only reads.

        Raises:
            CoordError: The file can't be used; the message names it. What ``work`` raises goes through.
        """
        begin = "BEGIN" if write_bytes is None else "BEGIN IMMEDIATE"

        def attempt(connection: sqlite3.Connection) -> T:
            connection.execute(begin)
            try:
                result = work(connection)
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself after some failures.
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                raise
            return result

        result = self._attempt(attempt)
        if write_bytes is not None:
            self._writes += 1
            self._log_bytes += write_bytes
            self._checkpoint()
        return result

    def stamp(self) -> tuple[int, int, int]:
        """Differs from an earlier one when anybody, in this or another process, has committed since."""

        def look(connection: sqlite3.Connection) -> int:
            return int(connection.execute("PRAGMA data_version").fetchone()[0])

        version = self._attempt(look)
        return self._opened, self._writes, version

    def close(self) -> None:
        """Let go of the file. The last one to do so folds the log into it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._named():
                connection.close()

    def _attempt(self, work: Callable[[sqlite3.Connection], T]) -> T:
        for attempt in range(self._attempts - 1):
            try:
                return work(self._connected())
            except sqlite3.Error as error:
                if _code(error) not in _BUSY:
                    raise self._failure(error) from error
            # Some locks are refused at once, without the busy timeout: those of a file being laid out or recovered.
            time.sleep(min(_RETRY_PAUSE_S * 2**attempt, max(_RETRY_PAUSE_S, self._busy_timeout_s)))
        with self._named():
            return work(self._connected())

    def _connected(self) -> sqlite3.Connection:
        """The connection, opened and checked if there is none. Raises ``sqlite3.Error`` and ``CoordError``."""
        # Going on with a file that has lost its name would acknowledge what nobody can read again.
        if self._opened and self._identify() != self._identity:
            raise CoordError(
                f"coordination file {self.path} was removed or replaced while in use; "
                "stop every process that uses it and put the file back"
            )
        if self._connection is not None:
            return self._connection
        try:
            connection = sqlite3.connect(self.path, timeout=self._busy_timeout_s, isolation_level=None)
        except ValueError as error:
            raise CoordError(f"coordination file {str(self.path)!r} has a name no file can have; rename it") from error
        try:
            fresh = self._check(connection)
            self._configure(connection, fresh=fresh)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._identity = self._identify()
        self._opened += 1
        with contextlib.suppress(OSError):  # No log yet.
            # What others left in the log counts, or a run that is killed again and again would let it grow.
            self._log_bytes = os.stat(f"{self.path}-wal").st_size
        return connection

    def _check(self, connection: sqlite3.Connection) -> bool:
        """Look, without changing anything, whether the file is nobody's yet (True) or ours (False)."""
        connection.execute("BEGIN")  # One snapshot: another process may be laying out the new file right now.
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        connection.execute("COMMIT")
        if application != APPLICATION_ID and (application or version or tables):
            raise CoordError(f"{self.path} is another program's SQLite file; name another file for the coordination")
        if version > SCHEMA_VERSION:
            raise CoordError(
                f"coordination file {self.path} was written by a newer Millrace (layout {version}, this one knows "
                f"{SCHEMA_VERSION}); upgrade Millrace or name another file"
            )
        return bool(application != APPLICATION_ID)

    def _configure(self, connection: sqlite3.Connection, *, fresh: bool) -> None:
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise CoordError(
                f"coordination file {self.path} can't have a write-ahead log where it is (SQLite stays in {mode} "
                "mode); put it on a local disk"
            )
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")  # On macOS a plain fsync stops at the drive's cache.
        connection.execute("PRAGMA wal_autocheckpoint = 0")  # See _checkpoint.
        connection.execute(f"PRAGMA journal_size_limit = {4 * _CHECKPOINT_BYTES}")  # After one very large commit.
        if not fresh:  # A reader needs no lock that a writer may hold.
            return
        connection.execute("BEGIN IMMEDIATE")
        # Asked again inside the transaction: another process may have been faster.
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            for statement in _SCHEMA:
                connection.execute(statement)
        connection.execute("COMMIT")

    def _checkpoint(self) -> None:
        """Fold the log into the file once it has grown enough.

        SQLite before 3.51.3 (and 3.50.7, 3.44.6) can lose committed pages when a checkpoint runs while another
        connection restarts the log. A FULL checkpoint holds the writer's lock, so that none does; the automatic
        ones do not, and are off.
        """
        if self._log_bytes < _CHECKPOINT_BYTES or self._connection is None:
            return
        self._log_bytes = 0
        # The commit before it stands, whatever happens here; a full or failing disk is told by the next write.
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(FULL)").fetchone()

    def _identify(self) -> tuple[int, int]:
        try:
            status = os.stat(self.path)
        except OSError:
            return (0, 0)
        return status.st_dev, status.st_ino

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> CoordError:
        """What SQLite said, as a sentence with the file and the way out."""
        code, name = _code(error), getattr(error, "sqlite_errorname", type(error).__name__)
        if code in _BROKEN and self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None
        file = f"coordination file {self.path}"
        if code in _BUSY:
            return CoordError(
                f"{file} stayed locked through {self._attempts} attempts of {self._busy_timeout_s:g} s; another "
                "Millrace process, or a tool such as sqlite3 with an open transaction, holds it: let it finish, "
                "or end it, and try again"
            )
        if code == sqlite3.SQLITE_CANTOPEN:
            return CoordError(f"{file} can't be opened: {self._obstacle()}")
        sentences = {
            sqlite3.SQLITE_NOTADB: "is not an SQLite file; name another file",
            sqlite3.SQLITE_FULL: "can't grow: its disk is full; free some space (this call changed nothing)",
            sqlite3.SQLITE_READONLY: "can't be written: it, its directory or its disk is read-only; "
            "change the permissions or name another file",
            sqlite3.SQLITE_PERM: "can't be used: permission is denied; change the permissions or name another file",
            sqlite3.SQLITE_CORRUPT: f"is damaged ({error}); put back a copy, or move it and its -wal file aside",
            sqlite3.SQLITE_IOERR: f"can't be read or written ({name}); check its disk, and read again what the last "
            "call wrote, as it may have happened",
        }
        return CoordError(f"{file} {sentences.get(code, f'failed ({name}: {error}); check the file and its disk')}")

    def _obstacle(self) -> str:
        directory = self.path.parent
        if not directory.exists():
            return f"directory {directory} does not exist; create it"
        if not directory.is_dir():
            return f"{directory} is not a directory; name another file"
        if self.path.is_dir():
            return "it is a directory; name a file"
        if os.statvfs(directory).f_flag & os.ST_RDONLY:
            return f"the disk of {directory} is read-only; name a file elsewhere"
        if not os.access(directory, os.W_OK | os.X_OK):
            return f"directory {directory} is not writable; change its permissions or name another file"
        return "it can't be created or written there; check its permissions and its disk"


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary result code, or 255, which is none, for what Python's module raised by itself."""
    return int(getattr(error, "sqlite_errorcode", -1)) & 0xFF
