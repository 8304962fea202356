"""Steps planned ahead: which rows they have, and in which blocks those lie."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from millrace.feed.blocks import BlockPool
from millrace.feed.order import Order
from millrace.feed.share import Sharing

__all__ = ["SPANS_A_WINDOW", "Planner", "Span"]

Int64s = npt.NDArray[np.int64]

SPANS_A_WINDOW: Final = 8
"""So that a span, whose blocks are in memory at once, doesn't need two of each window."""
_SPAN_ROWS: Final = 4096
_AHEAD_ROWS: Final = 65_536
"""Rows planned ahead of the one that is given: 40 bytes each."""


@dataclass(slots=True)
class Span:
    """Steps of one rank, one after the other; so many apart as the planner's ``stride`` says.

    Attributes:
        number: Grows from span to span, over epochs too.
        first_step: Its first step.
        bounds: int64, shape (steps + 1,): which rows each step has.
        positions, stream, row: Of each row: its place in the epoch, its stream, its place in its block.
        ids: Its number in its version.
        blocks: Its block, counted through all streams.
        given: Whether it can be given; what is found out later is noted here.
    """

    number: int
    first_step: int
    bounds: Int64s
    positions: Int64s
    stream: npt.NDArray[np.int32]
    row: Int64s
    ids: Int64s
    blocks: Int64s
    given: npt.NDArray[np.bool_]

    @property
    def steps(self) -> int:
        """How many steps it has."""
        return len(self.bounds) - 1


class Planner:
    """Plans spans of one epoch, in order: the first has one step, so that the first batch waits for nothing else.

    Args:
        order: Of the epoch.
        sharing: Which rows of each step are this rank's.
        pool: Is told which blocks come.
        first_step: Where to begin.
        stride: From each step that is planned to the next: more than 1 where several workers share a rank's steps.
        number: The first span's.
        window_rows: About how many consecutive rows need one set of blocks. A span has an eighth of them, and never
            over 4,096.
    """

    def __init__(
        self,
        order: Order,
        sharing: Sharing,
        pool: BlockPool,
        *,
        first_step: int,
        number: int,
        window_rows: int,
        stride: int = 1,
    ) -> None:
        self._order = order
        self._sharing = sharing
        self._pool = pool
        self._next = first_step
        self._stride = stride
        self._steps = sharing.steps(order.rows)
        self._number = number
        self._rows_a_step = max(-(-sharing.batch_size * sharing.replication // sharing.world_size), 1)
        self._span_steps_max = max(min(window_rows // SPANS_A_WINDOW, _SPAN_ROWS) // self._rows_a_step, 1)
        self._span_steps = 1
        self._planned: deque[Span] = deque()
        self._ahead = 0

    @property
    def ended(self) -> bool:
        """Whether every span was taken."""
        return not self._planned and self._next >= self._steps

    def take(self) -> Span:
        """The next span.

        Raises:
            IndexError: there is none.
        """
        if not self._planned:
            self._plan()
        span = self._planned.popleft()
        self._ahead -= len(span.positions)
        return span

    def look_ahead(self) -> None:
        """Plan two spans more, if they aren't planned far enough: called once a span, so that it costs little."""
        for _ in range(2):
            if self._ahead < _AHEAD_ROWS:
                self._plan()

    def _plan(self) -> None:
        steps = min(self._span_steps, -((self._next - self._steps) // self._stride))
        if steps <= 0:
            return
        self._span_steps = min(self._span_steps * 4, self._span_steps_max)
        positions, bounds = self._positions(steps)
        found = self._order.locate(positions)
        blocks = found.block if len(self._pool.first) == 2 else self._pool.first[found.stream] + found.block
        ids = self._pool.first_rows[blocks] + found.row
        span = Span(
            self._number,
            self._next,
            bounds,
            positions,
            found.stream,
            found.row,
            ids,
            blocks,
            np.ones(len(positions), np.bool_),
        )
        self._pool.want(blocks, span.number)
        self._planned.append(span)
        self._ahead += len(positions)
        self._next += steps * self._stride
        self._number += 1

    def _positions(self, steps: int) -> tuple[Int64s, Int64s]:
        """Of ``steps`` steps from the next one on; see ``Sharing.positions``."""
        all_steps = (steps - 1) * self._stride + 1
        positions, bounds = self._sharing.positions(
            self._next, all_steps, rows=self._order.rows, lanes=self._order.lanes
        )
        if self._stride == 1:
            return positions, bounds
        begins, ends = bounds[:-1][:: self._stride], bounds[1:][:: self._stride]
        kept = np.concatenate([[0], np.cumsum(ends - begins)]).astype(np.int64)
        return positions[np.arange(kept[-1]) + np.repeat(begins - kept[:-1], ends - begins)], kept
