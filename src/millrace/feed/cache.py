"""The block cache: a bounded folder of verified blocks that all ranks and jobs of a machine share.

There is no daemon and no shared memory; the file system is all that the processes have in common. What holds:

- A reader gets a whole block or none. A block appears by a rename, and the bytes of an earlier boot are hashed first.
- A block is fetched by one process at a time; a killed one's lock ends with it.
- The blocks take at most ``limit_bytes``, and what is needed latest leaves first.
- A cache that fails costs its advantage and nothing else: blocks are fetched, handed on and not kept.

Why it is so: ``docs/design/feed-cache.md``.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millrace.core.errors import UsageError
from millrace.core.ports import Bytes, Clock
from millrace.feed.cache_files import (
    BOOT_BYTES,
    Damaged,
    boot_id,
    check_name,
    open_block,
    read_exactly,
    read_trailer,
    stamp,
    verify,
    write_block,
)
from millrace.feed.cache_folder import CacheFolder, prepare_folder
from millrace.feed.cache_ledger import Ledger, Reserved
from millrace.feed.cache_locks import BlockLock, CacheThreads
from millrace.feed.cache_trouble import FULL, CacheTrouble
from millrace.feed.events import FeedEvent
from millrace.feed.eviction import SOON_S

__all__ = ["BlockCache", "CacheStats"]

_THREADS = 4
_PATIENCE_S = 20.0
_POLL_S_MIN = 0.002
_POLL_S_MAX = 0.025
_HORIZON_S = 365 * 86_400.0
"""Needed later than this is needed never, as far as a file's date can say it on every disk."""
_RESOLUTION_S = 1.0
_BAD_MAX = 65_536
_ROTTEN = frozenset({errno.EIO, errno.EBADMSG, errno.ELOOP})
"""What the file itself is to blame for. Others, too many open files for one, are no reason to remove it."""


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What a cache is worth.

    Attributes:
        size_bytes: What it takes on the disk, at most; of all processes. 0 before the first block of this boot.
        blocks: How many, at most; of all processes.
        hits, misses: Reads of this object that found their block, or not.
        evicted: Blocks this object removed to make room.
        degraded: Whether it takes no blocks for now.
    """

    size_bytes: int
    blocks: int
    hits: int
    misses: int
    evicted: int
    degraded: bool


class BlockCache:
    """A folder of blocks. See the module.

    Args:
        folder: Made if it isn't there, for this user alone.
        limit_bytes: What the blocks may take. Where several processes name several limits, each keeps to its own when
            it adds, so the smallest one counts.
        clock: Wall time is compared with the blocks' needs, monotonic time is for waiting.
        on_event: Told, once per cause, when the cache stops taking or giving blocks; called from any thread.
        keep_free_bytes: How much of the disk stays free. None is 1 % of it, at most 500 MiB.
        boot: Of the machine, 16 bytes; None asks the system.
        wait_s: How long one process waits for a block that another one fetches before it fetches it too.

    Raises:
        UsageError: The folder can't be made or written, is no folder, is another user's, or lies on a file system
            without locks. Names it, the cause and the way out.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit_bytes: int,
        clock: Clock,
        on_event: Callable[[FeedEvent], None],
        keep_free_bytes: int | None = None,
        boot: bytes | None = None,
        wait_s: float = 60.0,
    ) -> None:
        self._boot = boot_id() if boot is None else boot
        if len(self._boot) != BOOT_BYTES:
            raise ValueError(f"boot has {len(self._boot)} bytes instead of {BOOT_BYTES}")
        self._folder: CacheFolder = prepare_folder(folder)
        self._clock = clock
        self._wait_s = wait_s
        self._trouble = CacheTrouble(self._folder.folder, clock, on_event)
        self._ledger = Ledger(
            self._folder, limit_bytes=limit_bytes, keep_free_bytes=keep_free_bytes, boot=self._boot, now_s=self._now_s
        )
        self._threads = CacheThreads(_THREADS, patience_s=_PATIENCE_S)
        self._mutex = threading.Lock()
        self._hits = 0
        self._misses = 0
        self._bad: dict[str, int] = {}
        self._first_sweep()

    def _first_sweep(self) -> None:
        try:
            self._ledger.sweep()
        except OSError as problem:
            if problem.errno in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:
                raise UsageError(
                    f"the cache {str(self._folder.folder)!r} lies on a file system without locks; "
                    "name a folder on a local disk (cache=)"
                ) from problem
            if (ticket := self._trouble.attempt()) is not None:
                self._trouble.failed(ticket, problem)

    # --- reading --------------------------------------------------------------------------------------------------

    def read(self, name: str, alloc: Callable[[int], memoryview]) -> bool:
        """Copy a block into memory. Blocks; for threads. Does not hold the interpreter's lock while it copies.

        Args:
            name: The block's: 64 hexadecimal letters, then letters, digits and dots.
            alloc: Given the block's length in bytes, gives memory of exactly that length. Called at most once, and
                also for a block that then turns out to be damaged.

        Returns:
            Whether the block was there and the memory holds all of it. False also where the disk fails, which is
            reported; what the memory holds then means nothing.

        Raises:
            ValueError: That is no block's name, or the memory has another length.
        """
        check_name(name)
        path = self._folder.block(name)
        try:
            handle = open_block(path)
        except (FileNotFoundError, NotADirectoryError):
            return self._missed()
        except OSError as problem:
            self._set_aside(name, path, problem)
            return self._missed()
        try:
            found = self._read_open(name, path, handle, alloc)
        finally:
            os.close(handle)
        if not found:
            return self._missed()
        with self._mutex:
            self._hits += 1
            self._bad.pop(name, None)
        return True

    def _read_open(self, name: str, path: str, handle: int, alloc: Callable[[int], memoryview]) -> bool:
        try:
            trailer = read_trailer(handle)
        except (Damaged, OSError) as problem:
            self._set_aside(name, path, problem)
            return False
        memory = memoryview(alloc(trailer.length)).cast("B")
        if len(memory) != trailer.length:
            raise ValueError(f"alloc gave {len(memory)} bytes for a block of {trailer.length}")
        try:
            read_exactly(handle, memory)
            if trailer.boot != self._boot:
                verify(name, memory, trailer)
                with contextlib.suppress(OSError):  # a disk that takes no writes: verified again next time
                    stamp(path, handle, self._boot)
        except (Damaged, OSError) as problem:
            self._set_aside(name, path, problem)
            return False
        return True

    def _missed(self) -> bool:
        with self._mutex:
            self._misses += 1
        return False

    def _set_aside(self, name: str, path: str, problem: Damaged | OSError) -> None:
        """Remove a block that nobody can read; remember one that only this process can't, so that it is fetched."""
        if isinstance(problem, Damaged):
            self._trouble.report(
                "damaged",
                f"block {name[:12]} in the cache {str(self._folder.folder)!r} was damaged: {problem}; it is fetched "
                "again. After a power cut this may happen to many; otherwise look at the disk's log",
            )
        else:
            self._trouble.unreadable(name, problem)
        with contextlib.suppress(OSError):
            if isinstance(problem, Damaged) or problem.errno in _ROTTEN:
                os.unlink(path)
        with contextlib.suppress(OSError), self._mutex:
            if len(self._bad) >= _BAD_MAX:
                self._bad.clear()
            self._bad[name] = os.stat(path).st_ino

    def _is_there(self, name: str) -> bool:
        """Whether a block lies there that this process did not fail to read."""
        try:
            found = os.stat(self._folder.block(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return self._bad.get(name) != found.st_ino

    # --- filling --------------------------------------------------------------------------------------------------

    async def fill(self, name: str, fetch: Callable[[], Awaitable[Sequence[Bytes]]]) -> Sequence[Bytes] | None:
        """Fetch a block unless it is there, or another task or process is fetching it already.

        Args:
            name: As for :meth:`read`.
            fetch: Gives the block's pieces, verified. Called at most once. It may itself fill *other* blocks, as long
                as no two blocks need each other.

        Returns:
            The pieces, where this call fetched them: they are in the cache now, or could not be put there, which is
            reported. None where somebody else has put the block there: read it.

        Raises:
            ValueError: That is no block's name.
            Exception: whatever ``fetch`` raises. The next one who waits for this block fetches it.
        """
        check_name(name)
        ticket = self._trouble.attempt()
        if ticket is None or self._threads.hang():
            return await fetch()
        lock = BlockLock(self._folder.lock(name))
        try:
            entered = await self._enter(name, lock, ticket)
            if entered == "there":
                return None
            pieces = await fetch()
            if entered == "go":
                await self._keep(name, pieces, lock, ticket)
            return pieces
        finally:
            if self._threads.hang():
                self._threads.later(lock.release)
            elif not lock.over:
                with contextlib.suppress(OSError):
                    await self._threads.run(lambda stop: lock.release(), surely=True)

    async def _enter(self, name: str, lock: BlockLock, ticket: int) -> Literal["there", "go", "broken"]:
        """Wait until the block is there, or it is this call's to fetch; ``broken`` if there's no use in keeping it."""
        pause_s = _POLL_S_MIN
        since_s = self._clock.monotonic_s()
        while True:
            try:
                found = await self._threads.run(lambda stop: self._try_to_enter(name, lock))
            except OSError as problem:
                if problem.errno in FULL:
                    return "go"  # no room for a lock file; keeping the block makes some
                self._trouble.failed(ticket, problem)
                return "broken"
            if found != "busy":
                return found
            if self._clock.monotonic_s() - since_s > self._wait_s:
                self._trouble.report(
                    "held",
                    f"another process has been fetching block {name[:12]} into the cache "
                    f"{str(self._folder.folder)!r} for over {self._wait_s:.0f} s; it is fetched here too. "
                    "Look for a stopped process",
                )
                return "go"
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_S_MAX)

    def _try_to_enter(self, name: str, lock: BlockLock) -> Literal["there", "go", "busy"]:
        if self._is_there(name):
            return "there"
        try:
            taken = lock.take()
        except FileNotFoundError:
            self._folder.check()
            taken = lock.take()
        if not taken:
            return "busy"
        if self._is_there(name):
            lock.release()
            return "there"
        return "go"

    async def _keep(self, name: str, pieces: Sequence[Bytes], lock: BlockLock, ticket: int) -> None:
        size_bytes = sum(memoryview(piece).nbytes for piece in pieces)
        if not self._ledger.fits(size_bytes):
            self._trouble.report(
                "too large",
                f"block {name[:12]} has {size_bytes} bytes, more than all of the cache "
                f"{str(self._folder.folder)!r} may hold, so it is not kept; raise the cache's limit",
            )
            return
        try:
            await self._threads.run(lambda stop: self._store(name, pieces, size_bytes, lock, stop))
        except OSError as problem:
            self._trouble.failed(ticket, problem)
        else:
            self._trouble.worked(ticket)

    def _store(
        self, name: str, pieces: Sequence[Bytes], size_bytes: int, lock: BlockLock, stop: threading.Event
    ) -> None:
        try:
            self._write(self._ledger.reserve(name, size_bytes, stop), name, pieces, stop)
        except OSError as problem:
            if problem.errno not in FULL:
                raise
            self._write(self._ledger.reserve(name, size_bytes, stop, tight=True), name, pieces, stop)
        finally:
            lock.release()

    def _write(self, reserved: Reserved, name: str, pieces: Sequence[Bytes], stop: threading.Event) -> None:
        path = self._folder.block(name)
        renamed = False
        try:
            if write_block(reserved.handle, name, pieces, self._boot, stop):
                now_s = self._now_s()
                os.utime(reserved.handle, (now_s, now_s))
                try:
                    os.rename(reserved.path, path)
                except FileNotFoundError:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(os.path.dirname(path), 0o700)
                    os.rename(reserved.path, path)
                renamed = True
                self._bad.pop(name, None)
        finally:
            if not renamed:
                with contextlib.suppress(OSError):
                    os.unlink(reserved.path)
            os.close(reserved.handle)

    # --- needs ----------------------------------------------------------------------------------------------------

    def needed(self, name: str, at_s: float, *, after_read: bool = False) -> None:
        """Say when a block will next be needed, so that what is needed later leaves before it.

        The earliest need of all jobs counts: a need that lies ahead is only ever moved forward. One that has passed is
        replaced. Nothing happens if the block isn't there. Two system calls.

        Args:
            name: As for :meth:`read`.
            at_s: Wall time, seconds since 1970; infinity for "not again". The past counts as now.
            after_read: The caller has just read the block: a need that lies less than ``SOON_S`` ahead was this one,
                and is replaced as well.

        Raises:
            ValueError: That is no block's name, or ``at_s`` is not a time.
        """
        self.needed_many(((name, at_s),), after_read=after_read)

    def needed_many(self, needs: Iterable[tuple[str, float]], *, after_read: bool = False) -> None:
        """Say it of many blocks: pairs of (name, at_s). Blocks; see :meth:`needed`."""
        now_s = self._now_s()
        over_s = now_s + (SOON_S if after_read else 0.0)
        for name, at_s in needs:
            check_name(name)
            if math.isnan(at_s):
                raise ValueError(f"block {name[:12]}: when it is needed is not a number")
            wanted_s = min(max(at_s, now_s), now_s + _HORIZON_S)
            path = self._folder.block(name)
            try:
                found_s = os.stat(path).st_mtime
                if (found_s <= over_s or wanted_s < found_s) and abs(wanted_s - found_s) >= _RESOLUTION_S:
                    os.utime(path, (wanted_s, wanted_s))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as problem:
                self._trouble.unreadable(name, problem)
                return

    # --- the rest -------------------------------------------------------------------------------------------------

    def stats(self) -> CacheStats:
        """What there is and what it was worth. One small read of the disk."""
        kept = self._ledger.kept()
        with self._mutex:
            hits, misses = self._hits, self._misses
        return CacheStats(kept.size_bytes, kept.blocks, hits, misses, self._ledger.evicted, self._trouble.degraded())

    def close(self) -> None:
        """Let go of the threads. No call of :meth:`fill` may be under way; the folder stays."""
        self._threads.close()

    def _now_s(self) -> float:
        return self._clock.now_ms() / 1000
