"""When a block will next be needed: known, since the order is. A cache keeps what is needed first by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from millrace.core.ports import Clock
from millrace.feed.order import Order
from millrace.feed.state import Place

__all__ = ["Foresight"]

_SLOWEST_S: Final = 365 * 86_400.0


class Foresight:
    """Turns places in the order into wall time, by the rate at which this loop goes.

    The consumer tells how far it is; another thread asks. The next epoch's order is made when it is first asked for.

    Args:
        order: From an epoch to its order.
        clock: For the rate, and for what comes out.
    """

    def __init__(self, order: Callable[[int], Order], clock: Clock) -> None:
        self._order = order
        self._clock = clock
        self._lock = threading.Lock()
        self._begun = self._now = Place(0, 0)
        self._begun_s = 0.0
        self._rows = 0
        self._next: tuple[int, npt.NDArray[np.int64]] | None = None

    def begin(self, place: Place, rows: int) -> None:
        """A loop begins at ``place`` of an epoch of ``rows`` positions."""
        self._begun = self._now = place
        self._begun_s = self._clock.monotonic_s()
        self._rows = rows

    def at(self, place: Place) -> None:
        """The loop has come to ``place`` of the same epoch."""
        self._now = place

    def needs(self, blocks: Sequence[int]) -> list[float]:
        """Wall time, in seconds since 1970, at which blocks that this epoch is done with come up in the next one.

        Args:
            blocks: Counted through all streams.
        """
        now, begun = self._now, self._begun
        passed_s = self._clock.monotonic_s() - self._begun_s
        a_row_s = passed_s / max(now.position - begun.position, 1)
        first = self._first_positions(now.epoch + 1)
        rest = max(self._rows - now.position, 0)
        base_s = self._clock.now_ms() / 1000
        ahead = (rest + first[np.asarray(blocks, np.int64)].astype(np.float64)) * a_row_s
        found: list[float] = (base_s + np.minimum(ahead, _SLOWEST_S)).tolist()
        return found

    def _first_positions(self, epoch: int) -> npt.NDArray[np.int64]:
        with self._lock:
            if self._next is None or self._next[0] != epoch:
                self._next = epoch, self._order(epoch).first_positions()
            return self._next[1]
