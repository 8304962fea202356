"""Memory that blocks are loaded into: one region, so that rows of any of its blocks are gathered in one call."""

from __future__ import annotations

import bisect
import contextlib
import mmap
import threading
import weakref
from collections import deque
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from millrace.core.errors import UsageError
from millrace.core.units import format_bytes

__all__ = ["Arena", "Room", "room_bytes"]

_GRAIN: Final = 64 * 1024
"""Rooms begin and end at multiples of this: whole pages, and few distinct sizes."""

Bytes8 = npt.NDArray[np.uint8]


def room_bytes(size_bytes: int) -> int:
    """What a room for so many bytes takes of an arena."""
    return max(-(-size_bytes // _GRAIN), 1) * _GRAIN


class Room:
    """A part of an arena. It goes back when nobody holds :attr:`bytes`, or a view of it, any more.

    Attributes:
        offset: Where it begins in the arena.
        bytes: uint8, exactly as long as was asked for.
        taken: What it takes of the arena.
    """

    __slots__ = ("__weakref__", "bytes", "offset", "taken")

    def __init__(self, offset: int, data: Bytes8, taken: int) -> None:
        self.offset = offset
        self.bytes = data
        self.taken = taken


class Arena:
    """One region of address space, handed out in rooms. Pages cost memory only once they are written.

    First fit from the low end, so that what is given back is used again before new pages are touched. Threads may
    share it.

    Args:
        size_bytes: Of the address space; more than all rooms together will ever need at once.
        least_bytes: Where the system grants no more (``ulimit -v``), this is enough to go on with.

    Raises:
        UsageError: the system doesn't grant that much address space either.
    """

    def __init__(self, size_bytes: int, least_bytes: int | None = None) -> None:
        self._map = _reserve(size_bytes, size_bytes if least_bytes is None else least_bytes)
        self.bytes: Bytes8 = np.frombuffer(self._map, np.uint8)
        self.address: int = self.bytes.ctypes.data
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(0, len(self.bytes))]  # (offset, length), by offset, never touching
        self._used = 0
        # Rooms are given back wherever their last view is let go of: also by the collector, in the middle of take().
        self._back: deque[tuple[int, int]] = deque()

    @property
    def used_bytes(self) -> int:
        """Bytes in rooms."""
        with self._lock:
            self._settle()
            return self._used

    def take(self, size_bytes: int) -> Room:
        """A room of ``size_bytes``.

        Raises:
            UsageError: the address space is used up.
        """
        length = room_bytes(size_bytes)
        with self._lock:
            self._settle()
            i = next((i for i, (_, free) in enumerate(self._free) if free >= length), None)
            if i is None:
                raise UsageError(
                    f"there is no room for a block of {format_bytes(size_bytes)} beside the {format_bytes(self._used)} "
                    "in use; give the loader more with memory=, pack smaller blocks (shards.block_size), and with "
                    "shuffle='blocks' or False copy batches that are kept: they are views of their block"
                )
            offset, free = self._free[i]
            self._free[i : i + 1] = [(offset + length, free - length)] if free > length else []
            self._used += length
        data = np.frombuffer(memoryview(self._map)[offset : offset + size_bytes], np.uint8)
        # Views of the room's bytes keep this array alive, and so the room.
        weakref.finalize(data, self._back.append, (offset, length)).atexit = False
        return Room(offset, data, length)

    def strided(self, item: np.dtype[Any]) -> npt.NDArray[Any]:
        """The whole region as items of ``item`` beginning at *every* byte: index it with byte offsets."""
        count = len(self.bytes) - item.itemsize + 1
        return np.ndarray((count,), item, buffer=self._map, strides=(1,))

    def trim(self) -> None:
        """Give the memory of what is free back to the system."""
        with self._lock:
            self._settle()
            for offset, length in self._free:
                _advise(self._map, "MADV_DONTNEED", offset, length)

    def _settle(self) -> None:
        while self._back:
            offset, length = self._back.popleft()
            self._used -= length
            i = bisect.bisect(self._free, (offset, length))
            if i < len(self._free) and self._free[i][0] == offset + length:
                length += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == offset:
                i -= 1
                offset, before = self._free.pop(i)
                length += before
            self._free.insert(i, (offset, length))


def _reserve(size_bytes: int, least_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    size = size_bytes
    while True:
        try:
            found = mmap.mmap(-1, -(-size // _GRAIN) * _GRAIN, flags=flags)
        except (OSError, OverflowError) as error:
            if size <= least_bytes:
                raise UsageError(
                    f"the system grants no {format_bytes(least_bytes)} of address space for blocks ({error}); give the "
                    "loader less with memory=, or raise the limit (ulimit -v)"
                ) from error
            size = max(size // 2, least_bytes)
        else:
            # Batches take rows from all over the region: with pages of 2 MB that is a fifth faster.
            _advise(found, "MADV_HUGEPAGE", 0, len(found))
            return found


def _advise(region: mmap.mmap, advice: str, offset: int, length: int) -> None:
    if hasattr(mmap, advice):
        with contextlib.suppress(OSError):  # a kernel without it: as well, only slower or larger
            region.madvise(getattr(mmap, advice), offset, length)
