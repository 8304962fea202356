"""Which rows of each global batch a rank takes.

Global batch s is the positions ``[s * B, (s + 1) * B)``, for every world size. Its rows are sorted by lane, and rank r
of R takes the part from ``r * n // R`` to ``(r + 1) * n // R``: so each rank keeps to its own lanes, and a node reads
about its share of the dataset's bytes and no more. Shares differ by a row at most, so any world size will do.

The lanes are sorted by their bits in reverse. Where a batch isn't a whole number of rounds through the lanes, some of
them have one row more than others: a stretch of lanes, another one at each step. In the order of lanes it would push
the borders between ranks back and forth, and two or three ranks would read every lane; in reverse it is spread evenly
over all ranks, and the borders stay (measured in docs/design/feed-order.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from millrace.core.errors import UsageError
from millrace.feed.order import reversed_bits

__all__ = ["Sharing"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the rows of an epoch are dealt to the ranks.

    Attributes:
        batch_size: Rows of one step, over all ranks; 1 and up.
        rank: 0 to world_size - 1.
        world_size: 1 and up.
        replication: So many ranks, in sequence, get the same rows (a tensor-parallel group); divides world_size.
        drop_last: Whether a last step with fewer rows is left out.

    Raises:
        UsageError: one of them can't be; names it, its bounds and the way out.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    replication: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "world_size", "replication"):
            _at_least(name, getattr(self, name), 1)
        _at_least("rank", self.rank, 0)
        if self.rank >= self.world_size:
            raise UsageError(
                f"rank={self.rank} can't be with world_size={self.world_size}: ranks are 0 to {self.world_size - 1}"
            )
        if self.world_size % self.replication:
            raise UsageError(
                f"world_size={self.world_size} isn't a multiple of replication={self.replication}, "
                "so the last group would lack ranks; change one of them"
            )
        if self.batch_size < self.groups:
            raise UsageError(
                f"batch_size={self.batch_size} is for all ranks together, and {self.groups} of them take different "
                f"rows, so some would get none; make batch_size at least {self.groups} (rows a rank times ranks), "
                "or raise replication if ranks are to share rows"
            )

    @property
    def groups(self) -> int:
        """Ranks that take different rows."""
        return self.world_size // self.replication

    def steps(self, rows: int) -> int:
        """Steps of an epoch of ``rows`` rows, the same for all ranks.

        Raises:
            UsageError: ``drop_last`` would drop everything.
        """
        if not self.drop_last:
            return -(-rows // self.batch_size)
        if 0 < rows < self.batch_size:
            raise UsageError(
                f"batch_size={self.batch_size} is more than the {rows} rows of an epoch, so drop_last=True would give "
                f"nothing; make batch_size at most {rows}, or leave drop_last out"
            )
        return rows // self.batch_size

    def positions(self, first_step: int, steps: int, *, rows: int, lanes: int) -> tuple[Int64s, Int64s]:
        """This rank's positions of the steps ``first_step`` to ``first_step + steps - 1``.

        Args:
            first_step: 0 and up.
            steps: How many; those beyond the end of the epoch are empty.
            rows: Of the epoch.
            lanes: Of the order.

        Returns:
            The positions of all these steps, each step's ascending (int64), and where each step begins and ends among
            them (int64, shape (steps + 1,)). A rank may get nothing of a last step that has fewer rows than ranks.
        """
        last = self.steps(rows)
        limit = min(rows, last * self.batch_size)
        begin = min(first_step, last)
        whole = min(begin + steps, limit // self.batch_size)
        parts = [self._whole_steps(begin, max(0, whole - begin), lanes)]
        bounds = np.full(steps + 1, parts[0].size, np.int64)
        if parts[0].size:
            bounds[: whole - begin + 1] = np.arange(whole - begin + 1) * parts[0].shape[1]
        if whole < begin + steps and (left := limit - max(whole, begin) * self.batch_size) > 0:
            parts.append(self._share(np.array([limit - left], np.int64), left, lanes))
            bounds[max(whole, begin) - begin + 1 :] += parts[1].size
        return np.concatenate([part.ravel() for part in parts]), bounds

    def _whole_steps(self, first: int, steps: int, lanes: int) -> Int64s:
        starts = np.arange(first, first + steps, dtype=np.int64) * self.batch_size
        return self._share(starts, self.batch_size, lanes)

    def _share(self, starts: Int64s, count: int, lanes: int) -> Int64s:
        """int64, shape (steps, share): this rank's part of the ``count`` positions from each start."""
        group = self.rank // self.replication
        begin, end = (g * count // self.groups for g in (group, group + 1))
        if self.groups == 1 or lanes == 1:
            return starts[:, None] + np.arange(begin, end, dtype=np.int64)
        # Which of a batch's rows depends on the lane it begins in alone, and these recur.
        origins, which = np.unique(starts % lanes, return_inverse=True)
        taken = _by_lane(origins[:, None], np.arange(begin, end, dtype=np.int64), count, lanes)
        taken.sort(axis=1)
        return starts[:, None] + taken[which]


def _by_lane(origin: Int64s, nth: Int64s, count: int, lanes: int) -> Int64s:
    """The nth of ``count`` positions from a start in the lane ``origin``, when they are sorted by lane.

    Args:
        origin: int64, shape (origins, 1).
        nth: int64, shape (n,), below ``count``.
        count: Of these each lane has ``count // lanes``, and those from ``origin`` on one more, while any are left.
        lanes: Of the order.

    Returns:
        int64, shape (origins, n): counted from the start.
    """
    each, more = divmod(count, lanes)
    distance = (np.argsort(reversed_bits(lanes)) - origin) % lanes
    ends = np.cumsum(each + (distance < more), axis=1)
    # One search for all origins: each has numbers of its own.
    apart = np.arange(len(origin), dtype=np.int64)[:, None] * count
    found = np.searchsorted((ends + apart).ravel(), nth + apart, side="right")
    lane, begin = distance.ravel()[found], (ends - each - (distance < more)).ravel()[found]
    taken: Int64s = np.add(lane, (nth - begin) * lanes)
    return taken


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name}={value!r} can't be: it is a whole number from {least} up")
