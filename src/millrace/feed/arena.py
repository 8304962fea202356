"""Memory that blocks are loaded into: one region, so that rows of any of its blocks are gathered in one call."""

from __future__ import annotations

import bisect
import mmap
import threading
import weakref
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Arena", "Room"]

_GRAIN: Final = 64 * 1024
"""Rooms begin and end at multiples of this: whole pages, and few distinct sizes."""

Bytes8 = npt.NDArray[np.uint8]


class Room:
    """A part of an arena. It goes back when nobody holds :attr:`bytes`, or a view of it, any more.

    Attributes:
        offset: Where it begins in the arena.
        bytes: uint8, exactly as long as was asked for.
    """

    __slots__ = ("__weakref__", "bytes", "offset")

    def __init__(self, offset: int, data: Bytes8) -> None:
        self.offset = offset
        self.bytes = data


class Arena:
    """One region of address space, handed out in rooms. Pages cost memory only once they are written.

    First fit from the low end, so that what is given back is used again before new pages are touched.

    Args:
        size_bytes: Of the address space; more than all rooms together will ever need at once.
    """

    def __init__(self, size_bytes: int) -> None:
        size = -(-size_bytes // _GRAIN) * _GRAIN
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(-1, size, flags=flags)
        self.bytes: Bytes8 = np.frombuffer(self._map, np.uint8)
        self.address: int = self.bytes.ctypes.data
        self._lock = threading.RLock()  # a room may be given back by the collector, inside of take()
        self._free: list[tuple[int, int]] = [(0, size)]  # (offset, length), by offset, never touching
        self._used = 0

    @property
    def used_bytes(self) -> int:
        """Bytes in rooms."""
        return self._used

    def take(self, size_bytes: int) -> Room:
        """A room of ``size_bytes``.

        Raises:
            MemoryError: the address space is used up.
        """
        length = max(-(-size_bytes // _GRAIN), 1) * _GRAIN
        with self._lock:
            i = next((i for i, (_, free) in enumerate(self._free) if free >= length), None)
            if i is None:
                raise MemoryError(
                    f"no room for a block of {size_bytes} bytes beside the {self._used} in use; give the loader more "
                    "with memory=, or pack smaller blocks (shards.block_size)"
                )
            offset, free = self._free[i]
            self._free[i : i + 1] = [(offset + length, free - length)] if free > length else []
            self._used += length
        data = np.frombuffer(memoryview(self._map)[offset : offset + size_bytes], np.uint8)
        room = Room(offset, data)
        # Views of the room's bytes keep this array alive, and so the room.
        weakref.finalize(data, _give_back, weakref.ref(self), offset, length).atexit = False
        return room

    def strided(self, item: np.dtype[Any]) -> npt.NDArray[Any]:
        """The whole region as items of ``item`` beginning at *every* byte: index it with byte offsets."""
        count = len(self.bytes) - item.itemsize + 1
        return np.ndarray((count,), item, buffer=self._map, strides=(1,))

    def _give(self, offset: int, length: int) -> None:
        with self._lock:
            self._used -= length
            i = bisect.bisect(self._free, (offset, length))
            if i < len(self._free) and self._free[i][0] == offset + length:
                length += self._free.pop(i)[1]
            if i and sum(self._free[i - 1]) == offset:
                offset, before = self._free.pop(i - 1)
                length += before
                i -= 1
            self._free.insert(i, (offset, length))


def _give_back(arena: weakref.ref[Arena], offset: int, length: int) -> None:
    found = arena()
    if found is not None:
        found._give(offset, length)
