"""What a person writes by hand around a store with random access: an order, and a place in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.feed.entry import SEED
from bench.feed.rows import BATCH_ROWS

__all__ = ["Permuted"]


class Permuted:
    """Each epoch all row numbers in a random order, 32 at a time; the sampler of a ``DataLoader`` if need be.

    Args:
        rows: How many there are.
        lists: Whether the numbers come as lists instead of arrays.
    """

    def __init__(self, rows: int, *, lists: bool = False) -> None:
        self.rows = rows
        self._lists = lists
        self._epoch = 0
        self._start = 0
        self._given = 0

    def __len__(self) -> int:
        return -(-self.rows // BATCH_ROWS)

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng([SEED, self._epoch]).permutation(self.rows)
        start, self._start = self._start, 0
        for first in range(start, self.rows, BATCH_ROWS):
            self._given = first + BATCH_ROWS
            batch = order[first : first + BATCH_ROWS]
            yield batch.tolist() if self._lists else batch
        self._epoch += 1

    def state(self) -> dict[str, int]:
        """After the batch that was given last."""
        return {"epoch": self._epoch, "row": self._given}

    def load(self, state: dict[str, int]) -> None:
        """Let the next pass begin there."""
        self._epoch, self._start = state["epoch"], state["row"]
