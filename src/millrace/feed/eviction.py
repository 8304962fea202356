"""Which blocks leave a full cache: by when they will be needed next, where that is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["LATE_S", "SOON_S", "CachedBlock", "choose_victims", "eviction_order"]

SOON_S = 30.0
"""A block that is needed within this many seconds leaves only when nothing else is left."""
LATE_S = 300.0
"""A need that has been over for longer than this is nobody's any more: its job has died, ended or forgotten it."""


class CachedBlock(NamedTuple):
    """A block in the cache, as a scan of its folder finds it.

    Attributes:
        name: The file's name.
        size_bytes: What it takes on the disk.
        needed_s: When it will be needed next, or was needed last: wall time, seconds since 1970.
    """

    name: str
    size_bytes: int
    needed_s: float


def eviction_order(block: CachedBlock, now_s: float) -> tuple[int, float, str]:
    """A sort key: what is less leaves earlier.

    ========  ==============================================  ======================================
    first     late: needed over ``LATE_S`` ago                the longest ago first
    then      far: needed in over ``SOON_S``                  the latest first (Belady's rule)
    then      just over: needed at most ``LATE_S`` ago        the longest ago first
    at last   soon: needed within ``SOON_S``                  the latest first
    ========  ==============================================  ======================================

    Where nobody says when blocks are needed, a block's need is when it was written and this is "first in, first out".
    """
    since_s = now_s - block.needed_s
    if since_s > LATE_S:
        return 0, block.needed_s, block.name
    if since_s >= 0:
        return 2, block.needed_s, block.name
    return (1 if since_s < -SOON_S else 3), -block.needed_s, block.name


def choose_victims(blocks: Iterable[CachedBlock], *, free_bytes: int, now_s: float) -> list[CachedBlock]:
    """The blocks to remove, first to last, so that at least ``free_bytes`` come free, and not one more than that takes.

    Args:
        blocks: All that are in the cache, in any order.
        free_bytes: How much must go; 0 or less gives none.
        now_s: Wall time, seconds since 1970.

    Returns:
        A prefix of the order that :func:`eviction_order` gives; all blocks where even they are not enough.
    """
    victims: list[CachedBlock] = []
    if free_bytes <= 0:
        return victims
    freed = 0
    for block in sorted(blocks, key=lambda b: eviction_order(b, now_s)):
        victims.append(block)
        freed += block.size_bytes
        if freed >= free_bytes:
            break
    return victims
