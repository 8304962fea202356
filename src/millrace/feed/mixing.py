"""The order of a mixture: streams (datasets) by weight, in stages, exact over each stage.

The shares are laid out, not drawn. A stage gives each stream a whole number of its rows; that number is dealt to the
lanes, and in a lane to blocks of 256 indexes, by one rounded line, so that the numbers of any stretch differ from the
weights by a few rows at most and those of the stage not at all. Inside such a block a keyed permutation says which
index has which row of which stream. Position g still lies in lane ``g % lanes`` at index ``g // lanes``, and the lane
of each stream is read from its beginning on, so a mixture reads as locally as its parts.

A stream whose lane is at its end goes on with its next pass, which is ordered as the epoch of that number; the next
epoch of the mixture goes on where the last one left the streams. So every pass of a stream gives each of its rows
exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from numbers import Real
from typing import Final

import numpy as np
import numpy.typing as npt

from millrace.core.errors import UsageError
from millrace.feed.cipher import SPAN, derive_key, derive_keys, make_domains, permute
from millrace.feed.order import (
    READ_AHEAD_BYTES,
    EpochOrder,
    Located,
    OrderPlan,
    Shuffle,
    fingerprint_of,
    lanes_of,
    plan_order,
)

__all__ = ["MixedOrder", "Stage", "Stream", "largest_epoch", "plan_streams", "quotas"]

Int64s = npt.NDArray[np.int64]

_BLOCK_BITS: Final = 8
_ROWS_MAX: Final = 1 << 50
_FOR_MIX: Final = 3
_KEPT_BLOCKS: Final = 1 << 20
_KEPT_PASSES: Final = 256


@dataclass(frozen=True, slots=True)
class Stage:
    """So many rows of a mixture with the same weights.

    Attributes:
        rows: 1 and up.
        weights: One for each stream: finite numbers from 0 up, not all 0; 70 and 30 are the same as 0.7 and 0.3.

    Raises:
        UsageError: one of them can't be; names it.
    """

    rows: int
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if isinstance(self.rows, bool) or not isinstance(self.rows, int) or not 1 <= self.rows <= _ROWS_MAX:
            raise UsageError(f"rows={self.rows!r} of a stage can't be: it is a whole number from 1 to 2**50")
        _shares(self.weights)


@dataclass(frozen=True, slots=True)
class Stream:
    """One dataset of a mixture.

    Attributes:
        plan: From :func:`plan_streams`, together with the others.
        rows_per_block: int64, shape (blocks,): at least 1 each, in dataset order.
        manifest: The digest of the dataset version.
    """

    plan: OrderPlan
    rows_per_block: Int64s
    manifest: str


def quotas(stage: Stage) -> tuple[int, ...]:
    """Rows of each stream in a stage: its exact share rounded down, and the rows left over to the largest remainders.

    Weights are taken as they are written (0.7 is seven tenths), so where rows times a share is whole it is just that.
    """
    exact = [stage.rows * share for share in _shares(stage.weights)]
    given = [math.floor(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (given[k] - exact[k], k))
    for k in by_remainder[: stage.rows - sum(given)]:
        given[k] += 1
    return tuple(given)


def largest_epoch(stream_rows: Sequence[int], weights: tuple[float, ...]) -> int:
    """Rows of the largest epoch with these weights in which no stream's share is more than its rows.

    So none repeats a row; and with weights in proportion to the rows it is one pass of every stream.

    Raises:
        UsageError: a stream with a weight has no rows, or a weight can't be.
    """
    shares = _shares(weights)
    _same_number(len(stream_rows), weights)
    for k, (rows, share) in enumerate(zip(stream_rows, shares, strict=True)):
        if share and not rows:
            raise UsageError(_no_rows(k, weights[k]))
    return math.floor(min(rows / share for rows, share in zip(stream_rows, shares, strict=True) if share))


def plan_streams(
    tables: Sequence[tuple[Int64s, Int64s]],
    stages: Sequence[Stage],
    *,
    seed: int,
    shuffle: Shuffle,
    lanes: int | None = None,
    window: int | None = None,
) -> tuple[OrderPlan, ...]:
    """Plan the streams of a mixture together, with one number of lanes.

    That number is the largest that a stream would have by itself, or ``lanes``; it is halved while a stream has too few
    rows to have one in each lane that reads it. The windows of all streams share what one dataset's may hold.

    Args:
        tables: Of each stream the rows and the bytes of its blocks: int64, shape (blocks,) each.
        stages: Of the mixture.
        seed: 0 to 2**64 - 1.
        shuffle: Of every stream.
        lanes: Instead of the default.
        window: In blocks, of every stream, instead of the default.

    Raises:
        UsageError: as :func:`~millrace.feed.order.plan_order`, or the stages don't fit the streams.
    """
    rows = [int(table_rows.sum()) for table_rows, _ in tables]
    _check(rows, stages)
    budget = READ_AHEAD_BYTES // len(tables)
    alone = [
        plan_order(r, b, seed=seed, shuffle=shuffle, lanes=lanes, window=window, budget_bytes=budget) for r, b in tables
    ]
    common = max(plan.lanes for plan in alone)
    while not _Layout.of(stages, rows, common).fits():
        common //= 2
    if shuffle in (Shuffle.BLOCKS, Shuffle.NONE):
        return tuple(alone)
    return tuple(
        plan_order(r, b, seed=seed, shuffle=shuffle, lanes=common, window=window, budget_bytes=budget)
        for r, b in tables
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which rows of which stream go to which lane in which stage, for every epoch the same.

    Attributes:
        stage_starts: int64, shape (stages + 1,): positions.
        begins: int64, shape (stages + 1, lanes): the index in each lane at which a stage begins.
        slots: int64, shape (stages, lanes + 1): positions of the stage in the lanes before.
        lines: int64, shape (streams + 1, stages): rows of a stage that the streams before take together.
        taken: int64, shape (streams, stages + 1, lanes): rows of the stream's lane that the stages before take.
        cuts: int64, shape (streams, lanes + 1): how the stream's rows are cut into lanes: in proportion to what the
            lanes take, so that all lanes come to the end of a pass together, and at once if the epoch is just one pass.
    """

    stage_starts: Int64s
    begins: Int64s
    slots: Int64s
    lines: Int64s
    taken: Int64s
    cuts: Int64s

    @classmethod
    def of(cls, stages: Sequence[Stage], stream_rows: Sequence[int], lanes: int) -> _Layout:
        streams = len(stream_rows)
        stage_starts = np.array([0, *accumulate(stage.rows for stage in stages)], np.int64)
        begins = (stage_starts[:, None] + (lanes - 1 - np.arange(lanes, dtype=np.int64))) // lanes
        slots = np.zeros((len(stages), lanes + 1), np.int64)
        np.cumsum(np.diff(begins, axis=0), axis=1, out=slots[:, 1:])
        lines = np.array([[0, *accumulate(quotas(stage))] for stage in stages], np.int64).T
        numbers = np.repeat(np.arange(len(stages)), lanes + 1)
        before = _on_lines(lines[:, numbers], slots.ravel()).reshape(streams + 1, len(stages), lanes + 1)
        given = np.diff(np.diff(before, axis=0), axis=2)
        taken = np.zeros((streams, len(stages) + 1, lanes), np.int64)
        np.cumsum(given, axis=1, out=taken[:, 1:])
        cuts = np.zeros((streams, lanes + 1), np.int64)
        for k, rows in enumerate(stream_rows):
            sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(taken[k, -1])])
            total = np.full(lanes + 1, sums[-1])
            cuts[k] = _scaled(sums, np.full(lanes + 1, rows), total) if sums[-1] else np.minimum(sums + rows, rows)
            cuts[k, 0] = 0
        return cls(stage_starts, begins, slots, lines, taken, cuts)

    def fits(self) -> bool:
        """Whether a stream has rows in every lane that takes some."""
        return not ((np.diff(self.cuts, axis=1) == 0) & (self.taken[:, -1] > 0)).any()


class MixedOrder:
    """The order of one epoch of a mixture. What it keeps is a cache, so threads may share it."""

    def __init__(self, streams: Sequence[Stream], stages: Sequence[Stage], *, seed: int, epoch: int) -> None:
        """Lay out the mixture; the orders of the streams are made when they are first needed.

        Args:
            streams: Planned together by :func:`plan_streams`.
            stages: They follow each other; their rows together are the epoch's.
            seed: Of the mixture, 0 to 2**64 - 1.
            epoch: 0 and up.

        Raises:
            UsageError: the streams have different lanes, the stages don't fit the streams, or the seed or the epoch
                can't be; says which.
        """
        if not 0 <= seed < 1 << 64 or epoch < 0:
            raise UsageError(f"seed={seed!r}, epoch={epoch!r} can't be: seeds are 0 to 2**64 - 1, epochs 0 and up")
        self._rows_per_stream = [int(stream.rows_per_block.sum()) for stream in streams]
        _check(self._rows_per_stream, stages)
        if len(lanes := {stream.plan.lanes for stream in streams}) != 1:
            raise UsageError(
                f"the streams of a mixture have {sorted(lanes)} lanes; plan them together, with one number"
            )
        self._lanes = lanes.pop()
        self._streams, self._stages, self._seed, self._epoch = tuple(streams), tuple(stages), seed, epoch
        self._layout = _Layout.of(stages, self._rows_per_stream, self._lanes)
        if not self._layout.fits():
            raise UsageError(f"a stream of the mixture has too few rows for {self._lanes} lanes; give fewer")
        self._passes: list[dict[int, EpochOrder]] = [{} for _ in streams]

    @property
    def rows(self) -> int:
        """Positions in the epoch."""
        return int(self._layout.stage_starts[-1])

    @property
    def lanes(self) -> int:
        """Position g lies in lane ``g % lanes``, whichever stream it is of."""
        return self._lanes

    @property
    def fingerprint(self) -> str:
        """Of every stream's manifest and plan, the rows that each stage gives it, the seed and the order's version."""
        return fingerprint_of(
            streams=[
                [s.manifest, s.plan.seed, s.plan.shuffle.value, s.plan.lanes, s.plan.window] for s in self._streams
            ],
            stages=[quotas(stage) for stage in self._stages],
            seed=self._seed,
        )

    def lane_cuts(self, stream: int) -> Int64s:
        """How a stream's rows are cut into lanes: int64, shape (lanes + 1,), from 0 to its rows."""
        cuts: Int64s = self._layout.cuts[stream]
        return cuts

    def locate(self, positions: Int64s) -> Located:
        """The rows at these positions (int64, shape (n,), in any order).

        Raises:
            IndexError: a position is not in [0, rows).
        """
        found = Located(
            np.empty(len(positions), np.int32), np.empty(len(positions), np.int64), np.empty(len(positions), np.int64)
        )
        for start in range(0, len(positions), SPAN):
            span = slice(start, start + SPAN)
            index, lane = lanes_of(positions[span], self.rows, self._lanes)
            stream, own = self._deal(positions[span], index, lane)
            found.stream[span] = stream
            for k in np.flatnonzero(np.bincount(stream, minlength=len(self._streams))):
                there = np.flatnonzero(stream == k)
                found.block[start + there], found.row[start + there] = self._read(int(k), lane[there], own[there])
        return found

    def first_positions(self) -> Int64s:
        """For each block, counted through all streams, about where it is first needed: int64, shape (blocks,).

        At or past ``rows`` if that is not in this epoch. It is reckoned by the stream's share of the whole epoch.
        """
        found: list[Int64s] = []
        for k, stream in enumerate(self._streams):
            total, taken = self._rows_per_stream[k], int(self._layout.taken[k, -1].sum())
            if not taken:
                found.append(np.full(len(stream.rows_per_block), _ROWS_MAX, np.int64))
                continue
            number, done = divmod(self._epoch * taken, total)
            at = self._pass(k, number).first_positions()
            ahead = np.where(at >= done, at - done, at - done + total)
            found.append((ahead * (self.rows / taken)).astype(np.int64))
        return np.concatenate(found)

    def _deal(self, positions: Int64s, index: Int64s, lane: Int64s) -> tuple[Int64s, Int64s]:
        """The stream of each place in a lane, and the index in that stream's own lane, through all its passes."""
        if len(self._stages) == 1:
            return self._deal_stage(0, index, lane)
        stage = np.searchsorted(self._layout.stage_starts, positions, side="right") - 1
        stream, own = np.empty(len(index), np.int64), np.empty(len(index), np.int64)
        for number in np.unique(stage):
            there = np.flatnonzero(stage == number)
            stream[there], own[there] = self._deal_stage(int(number), index[there], lane[there])
        return stream, own

    def _deal_stage(self, stage: int, index: Int64s, lane: Int64s) -> tuple[Int64s, Int64s]:
        inside = index - self._layout.begins[stage].take(lane)
        block = inside >> _BLOCK_BITS
        first, last = int(block.min()), int(block.max())
        # Positions near each other are in few blocks of each lane: those are all laid out, which saves sorting.
        if (last - first + 1) * self._lanes <= 2 * len(index) + self._lanes:
            which = (block - first) * self._lanes + lane
            blocks, lanes = np.divmod(np.arange((last - first + 1) * self._lanes, dtype=np.int64), self._lanes)
            blocks += first
        else:
            used, which = np.unique(block * self._lanes + lane, return_inverse=True)
            blocks, lanes = np.divmod(used, self._lanes)
        sizes, lines, begins = self._blocks(stage, blocks, lanes)
        keys = derive_keys(derive_key(self._seed, self._epoch, stage, _FOR_MIX), lanes, blocks)
        # Of the blocks laid out some are behind the end of a shorter lane; nothing asks for them.
        place = permute(inside - (block << _BLOCK_BITS), which, make_domains(np.maximum(sizes, 1), keys))
        stream = np.zeros(len(index), np.int64)
        for line in lines[1:-1]:
            stream += line.take(which) <= place
        own = place + (begins - lines[:-1]).ravel().take(stream * len(sizes) + which)
        return stream, own

    def _blocks(self, stage: int, block: Int64s, lane: Int64s) -> tuple[Int64s, Int64s, Int64s]:
        """Of these blocks the places, the lines between the streams, and where in its lane each stream goes on.

        Returns:
            int64, of the shapes (blocks,), (streams + 1, blocks) and (streams, blocks).
        """
        layout = self._layout
        lane_start, lane_end = layout.slots[stage].take(lane), layout.slots[stage].take(lane + 1)
        start = np.minimum(lane_start + (block << _BLOCK_BITS), lane_end)
        end = np.minimum(start + (1 << _BLOCK_BITS), lane_end)
        lines = np.repeat(layout.lines[:, stage, None], len(block), axis=1)
        at_start = _on_lines(lines, start)
        taken_in_lane = np.diff(at_start - _on_lines(lines, lane_start), axis=0)
        before = layout.taken[:, stage] + self._epoch * layout.taken[:, -1]
        return end - start, _on_lines(lines, end) - at_start, before[:, lane] + taken_in_lane

    def _read(self, stream: int, lane: Int64s, own: Int64s) -> tuple[Int64s, Int64s]:
        """Block and row in a stream, in that pass that each index has come to."""
        cuts = self._layout.cuts[stream]
        length = cuts.take(lane + 1) - cuts.take(lane)
        number = own // length
        first, last = int(number.min()), int(number.max())
        if first == last:
            return self._pass(stream, first).locate_in_lane(lane, own - first * length)
        block, row = np.empty(len(lane), np.int64), np.empty(len(lane), np.int64)
        for n in np.unique(number):
            there = np.flatnonzero(number == n)
            block[there], row[there] = self._pass(stream, int(n)).locate_in_lane(
                lane[there], own[there] - n * length[there]
            )
        return block, row

    def _pass(self, stream: int, number: int) -> EpochOrder:
        kept = self._passes[stream]
        if (order := kept.get(number)) is None:
            of = self._streams[stream]
            order = EpochOrder(
                of.plan,
                of.rows_per_block,
                manifest=of.manifest,
                epoch=number,
                stream=stream,
                lane_starts=self._layout.cuts[stream],
            )
            most = min(_KEPT_PASSES, max(2, _KEPT_BLOCKS // len(of.rows_per_block)))
            # A new dict instead of a changed one: another thread may be looking something up.
            self._passes[stream] = dict([*list(kept.items())[1 - most :], (number, order)])
        return order


def _check(stream_rows: Sequence[int], stages: Sequence[Stage]) -> None:
    if not stream_rows:
        raise UsageError("a mixture has at least one stream")
    if not stages:
        raise UsageError("a mixture has at least one stage: rows and a weight for each stream")
    for stage in stages:
        _same_number(len(stream_rows), stage.weights)
        for k, (rows, given) in enumerate(zip(stream_rows, quotas(stage), strict=True)):
            if given and not rows:
                raise UsageError(_no_rows(k, stage.weights[k]))
    if sum(stage.rows for stage in stages) > _ROWS_MAX:
        raise UsageError("the stages of a mixture have more than 2**50 rows together; make the epoch shorter")


def _no_rows(stream: int, weight: float) -> str:
    return f"stream {stream} has a weight of {weight} but no rows; leave it out or give it weight 0"


def _same_number(streams: int, weights: tuple[float, ...]) -> None:
    if len(weights) != streams:
        raise UsageError(f"a mixture of {streams} streams has {streams} weights in each stage, not {len(weights)}")


def _shares(weights: Sequence[object]) -> list[Fraction]:
    """Each weight's part of their sum, exactly as they are written in decimal."""
    exact: list[Fraction] = []
    for k, weight in enumerate(weights):
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight) or weight < 0:
            raise UsageError(f"weights[{k}]={weight!r} can't be: a weight is a finite number from 0 up")
        exact.append(Fraction(str(float(weight))))
    if not any(exact):
        raise UsageError("all weights of a stage are 0; give at least one stream a weight above 0")
    return [weight / sum(exact) for weight in exact]


def _on_lines(lines: Int64s, slots: Int64s) -> Int64s:
    """How many of the first ``slots`` places the streams before each stream take together.

    The places that all streams but the last take are the whole multiples on one line; of those places what all but the
    last two take are on another line, and so on. A line rises by one at most from place to place, so no stream ever
    takes a number below zero, and at the end of the stage each line is at its quota.

    Args:
        lines: int64, shape (streams + 1, n): the same at the end of the stage.
        slots: int64, shape (n,).

    Returns:
        int64, shape (streams + 1, n): from 0 to ``slots``.
    """
    taken = np.empty_like(lines)
    taken[-1] = slots
    for k in range(len(lines) - 2, -1, -1):
        taken[k] = _scaled(taken[k + 1], lines[k], np.maximum(lines[k + 1], 1))
    return taken


def _scaled(numbers: Int64s, times: Int64s, over: Int64s) -> Int64s:
    """``numbers * times // over``, exactly, though the product may be beyond 64 bits: all, and the result, to 2**50.

    A float gives the quotient to within one; the remainder, of wrapping products, is small enough to be right.
    """
    quotient: Int64s = (numbers.astype(np.float64) * times / over).astype(np.int64)
    rest: Int64s = numbers * times - quotient * over
    return quotient + np.floor_divide(rest, over)
