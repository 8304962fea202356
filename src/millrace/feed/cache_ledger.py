"""How much a cache holds, and making room in it. One process at a time, behind one lock.

Who wants to write reserves first: the sum in the ledger is never less than what lies on the disk, so the limit holds at
every moment, however many processes add at once. What is reserved and then not written (a killed process, a failed
write) makes the sum too large, never too small; when it reaches the limit the folder is counted anew, and the truth
takes its place. So a count costs nothing until there is something to evict.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from millrace.feed.cache_files import TRAILER_BYTES, is_block_name
from millrace.feed.cache_folder import CacheFolder
from millrace.feed.cache_locks import drop_lock, locked, take_lock
from millrace.feed.eviction import CachedBlock, choose_victims

__all__ = ["Kept", "Ledger", "Reserved", "charge", "scan"]

_RECORD = struct.Struct("<8s16sQQ")
_MAGIC = b"mrledgr1"
_PAGE_BYTES = 4096
_BATCH = 64
"""An eviction frees a further ``limit / _BATCH``, so that the next comes only after that much was added."""
_PATIENCE_S = 20.0
_FREE_BYTES_MAX = 500 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """What lies in the cache, at most."""

    size_bytes: int = 0
    blocks: int = 0


@dataclass(frozen=True, slots=True)
class Reserved:
    """A file to write a block to, which counts already. It is locked, which tells it from a dead writer's."""

    handle: int
    path: str


def charge(size_bytes: int) -> int:
    """What a file of that length counts: whole pages of the disk."""
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def scan(folder: CacheFolder) -> Iterator[CachedBlock]:
    """Every block in the cache, in no order. One that disappears meanwhile is left out.

    Raises:
        OSError: as the system says.
    """
    with os.scandir(folder.root) as shelves:
        names = [shelf.path for shelf in shelves if len(shelf.name) == 2]
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(name) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if is_block_name(entry.name) and entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        yield CachedBlock(entry.name, charge(found.st_size), found.st_mtime)


class Ledger:
    """The sum and the evictor.

    Args:
        folder: Of the cache.
        limit_bytes: What may lie in it.
        keep_free_bytes: How much of the disk stays free; None for 1 % of it, at most 500 MiB.
        boot: Of the machine, 16 bytes. A sum from another boot is not believed.
        now_s: Wall time, seconds since 1970.
    """

    def __init__(
        self,
        folder: CacheFolder,
        *,
        limit_bytes: int,
        keep_free_bytes: int | None,
        boot: bytes,
        now_s: Callable[[], float],
    ) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._keep_free = keep_free_bytes
        self._boot = boot
        self._now_s = now_s
        self.evicted = 0

    def fits(self, size_bytes: int) -> bool:
        """Whether a block of so many bytes may ever lie in this cache."""
        return charge(size_bytes + TRAILER_BYTES) <= self._limit

    def kept(self) -> Kept:
        """What the ledger says now; nothing where it can't be read."""
        try:
            handle = os.open(self._folder.ledger, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return Kept()
        try:
            return self._read(handle) or Kept()
        finally:
            os.close(handle)

    def sweep(self) -> None:
        """Remove what killed writers left, unless another process makes room just now.

        Raises:
            OSError: as the system says.
        """
        handle = take_lock(self._folder.ledger)
        if handle is not None:
            try:
                self._clean()
            finally:
                drop_lock(handle)

    def reserve(self, name: str, size_bytes: int, stop: threading.Event, *, tight: bool = False) -> Reserved:
        """Make room for a block, and a file for it.

        Args:
            name: The block's.
            size_bytes: Its payload.
            stop: Ends the wait for the lock.
            tight: The disk turned out to be full: count anew and make room whatever the sums say.

        Returns:
            A locked, sparse file of the block's final length. The caller writes it, renames or removes it, closes it.

        Raises:
            OSError: ENOSPC if there is no room even after all was evicted that may be; otherwise as the system says.
        """
        self._folder.check()
        wanted = charge(size_bytes + TRAILER_BYTES)
        with locked(self._folder.ledger, stop, patience_s=_PATIENCE_S) as handle:
            kept = self._read(handle)
            if kept is None or tight or self._short(kept, wanted) > 0:
                kept, short = self._make_room(wanted, tight=tight)
                self._write(handle, kept)
                if short > 0:
                    words = f"no more than the {self._floor()[1] >> 20} MiB are left that a cache keeps free"
                    raise OSError(errno.ENOSPC, words, str(self._folder.folder))
            self._write(handle, Kept(kept.size_bytes + wanted, kept.blocks + 1))
            return self._open(name, size_bytes + TRAILER_BYTES)

    # --- under the lock -------------------------------------------------------------------------------------------

    def _open(self, name: str, length: int) -> Reserved:
        path = os.path.join(self._folder.tmp, f"{name}-{secrets.token_hex(6)}")
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, length)  # so that whoever counts the folder counts all of it
        except BaseException:
            os.unlink(path)
            os.close(handle)
            raise
        return Reserved(handle, path)

    def _floor(self) -> tuple[int, int]:
        """Free bytes of the disk, and how many are to stay so."""
        disk = os.statvfs(self._folder.root)
        keep = self._keep_free
        if keep is None:
            keep = min(disk.f_blocks * disk.f_frsize // 100, _FREE_BYTES_MAX)
        return disk.f_bavail * disk.f_frsize, keep

    def _short(self, kept: Kept, wanted: int) -> int:
        """How many bytes must go before so many more may come."""
        free, keep = self._floor()
        return max(kept.size_bytes + wanted - self._limit, wanted + keep - free)

    def _make_room(self, wanted: int, *, tight: bool) -> tuple[Kept, int]:
        """Count the folder, remove dead writers' files and as many blocks as it takes.

        Returns:
            What is left, and how many bytes too few were freed: 0 or less is enough. This is counted rather than asked
            of the disk, which may free space later than it removes files.
        """
        writing = self._clean()
        blocks = list(scan(self._folder))
        there = {block.name for block in blocks}
        # A file that was renamed between the two looks was seen in both.
        counted = [size for name, size in writing if name not in there] + [block.size_bytes for block in blocks]
        kept = Kept(sum(counted), len(counted))
        short = self._short(kept, wanted)
        if tight:
            short = max(short, wanted)
        spare = self._limit // _BATCH if short > 0 else 0
        for victim in choose_victims(blocks, free_bytes=short + spare, now_s=self._now_s()):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._folder.block(victim.name))
            self.evicted += 1
            short -= victim.size_bytes
            kept = Kept(kept.size_bytes - victim.size_bytes, kept.blocks - 1)
        return kept, short

    def _clean(self) -> list[tuple[str, int]]:
        """Remove the files of dead writers and the locks of dead fetchers; gives living writers' (name, size).

        A writer's file is made and locked under the ledger's lock, so one that is not locked has no writer.
        """
        writing: list[tuple[str, int]] = []
        with os.scandir(self._folder.tmp) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if (handle := _unlocked(entry.path)) is None:
                        writing.append((entry.name.rpartition("-")[0], charge(entry.stat().st_size)))
                    else:
                        os.unlink(entry.path)
                        os.close(handle)
        with os.scandir(self._folder.locks) as entries:
            for entry in entries:
                if (handle := take_lock(entry.path)) is not None:
                    os.unlink(entry.path)
                    drop_lock(handle)
        return writing

    def _read(self, handle: int) -> Kept | None:
        raw = os.pread(handle, _RECORD.size, 0)
        if len(raw) != _RECORD.size:
            return None
        magic, boot, size_bytes, blocks = _RECORD.unpack(raw)
        return Kept(size_bytes, blocks) if magic == _MAGIC and boot == self._boot else None

    def _write(self, handle: int, kept: Kept) -> None:
        os.pwrite(handle, _RECORD.pack(_MAGIC, self._boot, max(kept.size_bytes, 0), max(kept.blocks, 0)), 0)


def _unlocked(path: str) -> int | None:
    """Open a file whose writer is dead; None if it lives."""
    handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
