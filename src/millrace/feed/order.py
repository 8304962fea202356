"""The order of an epoch as a pure function: from a position to its row, without a list of either.

Permute the blocks; cut the rows, in that sequence, into a fixed number of *lanes* of equal length; in each lane permute
the rows inside each *window* of a few blocks. Position g lies in lane ``g % lanes``, at index ``g // lanes`` of it. So
rows that come together are from all over the dataset, while a reader needs only one window of each lane at a time.
What is kept is three numbers for each block and one row of a table for each window, whatever the number of rows.

Why it is made so, the alternatives, and the measured statistics: docs/design/feed-order.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from millrace.core.errors import UsageError
from millrace.core.model import digest_of
from millrace.feed.cipher import SPAN, Domains, derive_key, derive_keys, make_domains, permutation, permute

__all__ = [
    "ORDER_VERSION",
    "READ_AHEAD_BYTES",
    "EpochOrder",
    "Located",
    "Order",
    "OrderPlan",
    "Shuffle",
    "fingerprint_of",
    "lanes_of",
    "parse_shuffle",
    "plan_order",
    "reversed_bits",
]

Int64s = npt.NDArray[np.int64]

ORDER_VERSION: Final = 1
"""Raised whenever the same manifest, seed and epoch would give another order: a state names it."""

READ_AHEAD_BYTES: Final = 288_000_000
"""What the windows of all lanes together hold at most, where lanes and window are not given."""

_LANES_MAX: Final = 1024
_WINDOW_MAX: Final = 1 << 31
_LANES_DEFAULT: Final = 64
_LANES_FEW: Final = 8
_WINDOW_DEFAULT: Final = 64
_BLOCKS_A_LANE: Final = 8
_SEARCHED: Final = 3

# What a key is for, hashed into it.
_FOR_BLOCKS: Final = 1
_FOR_ROWS: Final = 2


class Shuffle(StrEnum):
    """How far rows move."""

    WINDOW = "window"
    FULL = "full"
    BLOCKS = "blocks"
    NONE = "none"


def parse_shuffle(value: bool | str | Shuffle) -> Shuffle:
    """True is ``window`` and False is ``none``; else one of the words.

    Raises:
        UsageError: it is none of them.
    """
    if isinstance(value, bool):
        return Shuffle.WINDOW if value else Shuffle.NONE
    try:
        return Shuffle(value)
    except ValueError:
        raise UsageError(
            f"shuffle={value!r} is unknown; it is True or 'window' (rows move in windows of blocks), "
            "'full' (rows move anywhere), 'blocks' (blocks move, their rows stay in order), or False or 'none'"
        ) from None


@dataclass(frozen=True, slots=True)
class OrderPlan:
    """What the order of a dataset is computed from, beside its blocks and the epoch.

    Attributes:
        seed: 0 to 2**64 - 1.
        shuffle: How far rows move.
        lanes: 1 to 1,024; 1 for ``blocks`` and ``none``.
        window: Consecutive permuted blocks that are mixed in a lane. 1 for ``blocks`` and ``none``, all for ``full``.
    """

    seed: int
    shuffle: Shuffle
    lanes: int
    window: int


def plan_order(
    rows: Int64s,
    lengths: Int64s,
    *,
    seed: int,
    shuffle: Shuffle,
    lanes: int | None = None,
    window: int | None = None,
    budget_bytes: int = READ_AHEAD_BYTES,
) -> OrderPlan:
    """Fill in lanes and window, which depend on the blocks alone where they are not given.

    By default there are 64 lanes, or fewer so that each has 8 blocks, or fewer (but 8) so that one block of each fits
    into ``budget_bytes``; and a window is up to 64 blocks, as many as fit. Both are powers of two.

    Args:
        rows: int64, shape (blocks,): rows of each block, at least 1.
        lengths: int64, shape (blocks,): bytes of each block.
        seed: 0 to 2**64 - 1.
        shuffle: How far rows move.
        lanes: Instead of the default.
        window: In blocks, instead of the default.
        budget_bytes: What one window of every lane may hold together.

    Raises:
        UsageError: the seed, lanes or window can't be; names which and says what can.
    """
    _whole("seed", seed, 0, (1 << 64) - 1)
    if lanes is not None:
        _whole("lanes", lanes, 1, _LANES_MAX)
    if window is not None:
        _whole("window", window, 1, _WINDOW_MAX)
    if shuffle in (Shuffle.BLOCKS, Shuffle.NONE):
        if (lanes or 1) != 1 or (window or 1) != 1:
            raise UsageError(f"lanes and window are for shuffle='window'; with {shuffle.value!r} leave them out")
        return OrderPlan(seed, shuffle, 1, 1)
    blocks, total_bytes = max(1, len(rows)), max(1, int(lengths.sum()))
    if lanes is None:
        lanes = _power_of_two(len(rows) // _BLOCKS_A_LANE, _LANES_DEFAULT)
        while lanes > _LANES_FEW and lanes * total_bytes > budget_bytes * blocks:
            lanes //= 2
    if shuffle is Shuffle.FULL:
        if window is not None:
            raise UsageError("window is for shuffle='window'; with 'full' rows move anywhere, so leave it out")
        return OrderPlan(seed, shuffle, lanes, blocks)
    if window is None:
        window = _power_of_two(budget_bytes * blocks // (lanes * total_bytes), _WINDOW_DEFAULT)
    return OrderPlan(seed, shuffle, lanes, window)


def _whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{name}={value!r} can't be: it is a whole number from {least} to {most}")


def _power_of_two(limit: int, most: int) -> int:
    power = 1
    while power * 2 <= min(limit, most):
        power *= 2
    return power


@dataclass(frozen=True, slots=True)
class Located:
    """Where the rows of some positions lie.

    Attributes:
        stream: int32, shape (n,): which dataset of a mixture; 0 where there is one.
        block: int64, shape (n,): in dataset order.
        row: int64, shape (n,): inside its block.
    """

    stream: npt.NDArray[np.int32]
    block: Int64s
    row: Int64s


class Order(Protocol):
    """The order of one epoch."""

    @property
    def rows(self) -> int:
        """Positions in the epoch: 0 to rows - 1."""

    @property
    def lanes(self) -> int:
        """Position g lies in lane ``g % lanes``."""

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the order but the epoch: 64 hexadecimal letters."""

    def locate(self, positions: Int64s) -> Located:
        """The rows at these positions (int64, shape (n,), in any order).

        Raises:
            IndexError: a position is not in [0, rows).
        """

    def first_positions(self) -> Int64s:
        """For each block, counted through all streams, about where it is first needed: int64, shape (blocks,).

        At or past ``rows`` if that is not in this epoch.
        """


def fingerprint_of(**parts: object) -> str:
    """A digest of named JSON-safe values and the version of the order: 64 hexadecimal letters."""
    return digest_of(json.dumps({"order": ORDER_VERSION, **parts}, sort_keys=True).encode())


def lanes_of(positions: Int64s, rows: int, lanes: int) -> tuple[Int64s, Int64s]:
    """Index in its lane, and lane, of each position: int64, shape (n,) each.

    Raises:
        IndexError: a position is not in [0, rows).
    """
    # As unsigned words negative positions are beyond every end.
    if len(positions) and int(positions.view(np.uint64).max()) >= rows:
        raise IndexError(f"positions are 0 to {rows - 1}, not {int(positions.min())} to {int(positions.max())}")
    if lanes & (lanes - 1) == 0:
        return positions >> (lanes.bit_length() - 1), positions & (lanes - 1)
    index = positions // lanes
    return index, positions - index * lanes


@dataclass(frozen=True, slots=True)
class _Steps:
    """Finds the interval that a number lies in, among many sorted ones, in about constant time.

    Attributes:
        edges: int64, shape (intervals + 1,): strictly increasing from 0.
        guide: int64: for each stretch of ``2**shift`` numbers the interval at its beginning.
        shift: So that a stretch is no longer than an interval is on average.
        most: Edges inside the most crowded stretch.
    """

    edges: Int64s
    guide: Int64s
    shift: int
    most: int

    @classmethod
    def over(cls, edges: Int64s) -> _Steps:
        intervals, end = len(edges) - 1, int(edges[-1])
        shift = max(0, (end // max(1, intervals)).bit_length() - 1)
        stretches = (end >> shift) + 2
        first_after = (edges[1:] + ((1 << shift) - 1)) >> shift
        guide = np.cumsum(np.bincount(first_after, minlength=stretches))[:stretches]
        return cls(edges, guide, shift, int(np.diff(guide).max(initial=0)))

    def find(self, numbers: Int64s) -> Int64s:
        """int64, shape (n,): the greatest i with ``edges[i] <= number``, for numbers in [0, last edge)."""
        found = self.guide.take(numbers >> self.shift)
        ends = self.edges[1:]
        for _ in range(min(self.most, _SEARCHED)):
            found += ends.take(found) <= numbers
        if self.most > _SEARCHED and (late := np.flatnonzero(ends.take(found) <= numbers)).size:
            found[late] = np.searchsorted(self.edges, numbers[late], side="right") - 1
        return found


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of all lanes, in sequence: where each begins, and its permutation."""

    steps: _Steps
    domains: Domains


class EpochOrder:
    """The order of one epoch of one dataset. Immutable, so threads may share it."""

    def __init__(
        self,
        plan: OrderPlan,
        rows_per_block: Int64s,
        *,
        manifest: str,
        epoch: int,
        stream: int = 0,
        lane_starts: Int64s | None = None,
    ) -> None:
        """Permute the blocks and lay out the windows: O(blocks), about a tenth of a second for a million.

        Args:
            plan: From :func:`plan_order`.
            rows_per_block: int64, shape (blocks,): at least 1 each, in dataset order.
            manifest: The digest of the dataset version; it is in the fingerprint and nowhere else.
            epoch: 0 and up.
            stream: Which dataset of a mixture.
            lane_starts: int64, shape (lanes + 1,), from 0 to the number of rows, not decreasing: another cut into
                lanes. :meth:`locate` is of the equal cut alone; :meth:`locate_in_lane` works with any.

        Raises:
            UsageError: the epoch is negative.
            ValueError: a block has no rows, or ``lane_starts`` is not such a cut.
        """
        _whole("epoch", epoch, 0, (1 << 63) - 1)
        if len(rows_per_block) and int(rows_per_block.min()) < 1:
            raise ValueError("every block of an order has at least one row; leave empty ones out")
        self._plan, self._manifest, self._stream = plan, manifest, stream
        words = (plan.seed, epoch, stream)
        blocks = len(rows_per_block)
        self._blocks: Int64s | None = None
        if plan.shuffle in (Shuffle.WINDOW, Shuffle.BLOCKS):
            self._blocks = permutation(blocks, derive_key(*words, _FOR_BLOCKS))
        edges = np.zeros(blocks + 1, np.int64)
        np.cumsum(rows_per_block if self._blocks is None else rows_per_block.take(self._blocks), out=edges[1:])
        self._rows = int(edges[-1])
        self._even = lane_starts is None
        self._lane_starts = _even_cut(self._rows, plan.lanes) if lane_starts is None else lane_starts
        if (
            len(self._lane_starts) != plan.lanes + 1
            or (self._lane_starts[0], self._lane_starts[-1]) != (0, self._rows)
            or (np.diff(self._lane_starts) < 0).any()
        ):
            raise ValueError(f"{plan.lanes} lanes of {self._rows} rows are not cut so")
        self._steps = _Steps.over(edges) if self._rows else None
        self._windows = self._lay_windows(edges, derive_key(*words, _FOR_ROWS)) if self._rows else None

    @property
    def rows(self) -> int:
        """Positions in the epoch."""
        return self._rows

    @property
    def lanes(self) -> int:
        """Position g lies in lane ``g % lanes``."""
        return self._plan.lanes

    @property
    def fingerprint(self) -> str:
        """Of manifest, seed, shuffle, lanes, window, stream and the version of the order: the same for all epochs."""
        return fingerprint_of(
            manifest=self._manifest,
            seed=self._plan.seed,
            shuffle=self._plan.shuffle.value,
            lanes=self._plan.lanes,
            window=self._plan.window,
            stream=self._stream,
        )

    def lane_rows(self, lane: Int64s) -> Int64s:
        """How many rows these lanes have: int64, shape (n,) from int64, shape (n,)."""
        return self._lane_starts.take(lane + 1) - self._lane_starts.take(lane)

    def locate(self, positions: Int64s) -> Located:
        """The rows at these positions (int64, shape (n,), in any order).

        Raises:
            IndexError: a position is not in [0, rows).
            ValueError: the lanes are cut unequally, so that positions mean nothing.
        """
        if not self._even:
            raise ValueError("positions count through lanes of equal length; these are cut otherwise")
        blocks, rows = np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        lanes = self._plan.lanes
        for start in range(0, len(positions), SPAN):
            span = slice(start, start + SPAN)
            index, lane = lanes_of(positions[span], self._rows, self._plan.lanes)
            blocks[span], rows[span] = self._find(index if lanes == 1 else self._lane_starts.take(lane) + index)
        return Located(np.full(len(positions), self._stream, np.int32), blocks, rows)

    def locate_in_lane(self, lane: Int64s, index: Int64s) -> tuple[Int64s, Int64s]:
        """Block and row (int64, shape (n,) each) at these indexes of these lanes (int64, shape (n,) each).

        Raises:
            IndexError: an index is not in [0, rows of its lane).
        """
        if len(lane) and ((index < 0) | (index >= self.lane_rows(lane))).any():
            raise IndexError("an index lies outside its lane")
        sequence = self._lane_starts.take(lane) + index
        blocks, rows = np.empty(len(lane), np.int64), np.empty(len(lane), np.int64)
        for start in range(0, len(lane), SPAN):
            span = slice(start, start + SPAN)
            blocks[span], rows[span] = self._find(sequence[span])
        return blocks, rows

    def first_positions(self) -> Int64s:
        """For each block, in dataset order, about where in the epoch it is first needed: int64, shape (blocks,).

        That is where the first window begins that has rows of it: never later than they come.
        """
        if self._steps is None:
            return np.zeros(0, np.int64)
        begins = self._steps.edges[:-1]
        if self._windows is not None:
            begins = self._windows.steps.edges.take(self._windows.steps.find(begins))
        lane = np.searchsorted(self._lane_starts, begins, side="right") - 1
        positions = (begins - self._lane_starts.take(lane)) * self._plan.lanes + lane
        # A lane that begins inside of a block needs it at once, though the lane before may need it at its very end.
        lanes = np.flatnonzero(np.diff(self._lane_starts))
        np.minimum.at(positions, self._steps.find(self._lane_starts.take(lanes)), lanes)
        if self._blocks is None:
            return positions
        found = np.empty_like(positions)
        found[self._blocks] = positions
        return found

    def _find(self, sequence: Int64s) -> tuple[Int64s, Int64s]:
        """Block and row at these places in the sequence of rows of the permuted blocks."""
        assert self._steps is not None
        if self._windows is not None:
            sequence = self._moved(sequence, self._windows)
        place = self._steps.find(sequence)
        return place if self._blocks is None else self._blocks.take(place), sequence - self._steps.edges.take(place)

    def _moved(self, sequence: Int64s, windows: _Windows) -> Int64s:
        if len(windows.domains) == 1:
            return permute(sequence, None, windows.domains)
        which = windows.steps.find(sequence)
        start = windows.steps.edges.take(which)
        return permute(sequence - start, which, windows.domains) + start

    def _lay_windows(self, edges: Int64s, key: int) -> _Windows | None:
        """Windows begin at blocks and end with their lane. A phase for each lane keeps them from ending all at once."""
        if self._plan.shuffle is Shuffle.FULL:
            whole, zero = np.array([0, self._rows], np.int64), np.zeros(1, np.int64)
            return _Windows(_Steps.over(whole), make_domains(whole[1:], derive_keys(key, zero, zero)))
        if self._plan.shuffle is not Shuffle.WINDOW:
            return None
        size = self._plan.window
        lanes = np.flatnonzero(np.diff(self._lane_starts))
        lane_start, lane_end = self._lane_starts[lanes], self._lane_starts[lanes + 1]
        phase = reversed_bits(self._plan.lanes)[lanes] * size >> (self._plan.lanes - 1).bit_length()
        first = (np.searchsorted(edges, lane_start, side="right") - 1 + phase) // size
        last = (np.searchsorted(edges, lane_end - 1, side="right") - 1 + phase) // size
        counts = last - first + 1
        leading = np.cumsum(counts) - counts
        total = int(counts.sum())
        # Each window but the first of its lane begins at every `size`-th edge.
        block = np.arange(total, dtype=np.int64) * size + np.repeat((first - leading) * size - phase, counts)
        block[leading] = 0
        starts = np.append(edges.take(block), self._rows)
        starts[leading] = lane_start
        number = np.arange(total, dtype=np.int64) + np.repeat(first - leading, counts)
        keys = derive_keys(key, np.repeat(lanes, counts), number)
        return _Windows(_Steps.over(starts), make_domains(np.diff(starts), keys))


def _even_cut(rows: int, lanes: int) -> Int64s:
    each, more = divmod(rows, lanes)
    lane = np.arange(lanes + 1, dtype=np.int64)
    return lane * each + np.minimum(lane, more)


def reversed_bits(lanes: int) -> Int64s:
    """Of each lane the bits of its number in reverse: int64, shape (lanes,), different numbers below a power of two.

    Any stretch of lanes comes out spread evenly (van der Corput 1935).
    """
    bits = (lanes - 1).bit_length()
    number, found = np.arange(lanes, dtype=np.int64), np.zeros(lanes, np.int64)
    for bit in range(bits):
        found |= ((number >> bit) & 1) << (bits - 1 - bit)
    return found
