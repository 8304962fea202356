"""What every loader delivers in the end: the same torch tensors, copied once by the same code.

Rows that a loader hands out one by one are copied here, into buffers that are used again for the next batch: the page
faults of fresh ones can cost more than the copy. A loader that hands out whole batches, contiguous, is not made to
copy them again: they are wrapped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from bench.feed.rows import ROW_TOKENS

__all__ = ["Batch", "Output", "as_array", "touch", "wrapped"]

_ROW_BYTES = 2 * ROW_TOKENS
_TOUCH_EVERY = 64
_FIRST_BYTES = 1 << 22


class Batch(NamedTuple):
    """Up to 32 rows.

    Attributes:
        values: For tokens: uint16 of shape (rows, 2048). For others: uint8, all rows end to end.
        offsets: For others: int64, one more than there are rows.
        kinds: For ``mix``: uint8, one a row.
    """

    values: Any
    offsets: Any = None
    kinds: Any = None


def as_array(values: Any) -> npt.NDArray[Any]:
    """A tensor or an array as an array, without a copy."""
    array: npt.NDArray[Any] = values if isinstance(values, np.ndarray) else values.numpy()
    return array


def touch(batch: Batch) -> int:
    """Read something in each 64 bytes, as a consumer would at least; else lazily mapped batches look free."""
    data = as_array(batch.values)
    return int(np.bitwise_xor.reduce(data[..., :: _TOUCH_EVERY // data.itemsize], axis=None))


def wrapped(array: npt.NDArray[Any]) -> torch.Tensor:
    """A tensor over an array's memory, also where that is read-only."""
    return torch.from_numpy(array) if array.flags.writeable else torch.frombuffer(array, dtype=_dtype(array))


def _dtype(array: npt.NDArray[Any]) -> Any:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype


class Output:
    """Makes batches of rows, one copy each.

    Args:
        workload: Which.
        again: Whether the buffers may be used for the next batch: not where batches wait in a queue.
    """

    def __init__(self, workload: str, *, again: bool = True) -> None:
        self._tokens = workload == "tokens"
        self._again = again
        self._pid = os.getpid()
        self._room = np.zeros(0, np.uint8)
        self._view = self._room.data
        self._tensor = torch.zeros(0, dtype=torch.uint8)

    def rows(self, rows: Sequence[Any], kinds: Any = None) -> Batch:
        """Copy rows, each something with bytes of its own (``bytes`` or a view of bytes)."""
        sizes = [len(row) for row in rows]
        self.reserve(sum(sizes))
        view = self._view
        start = 0
        ends = [0]
        for row, size in zip(rows, sizes, strict=True):
            end = start + size
            view[start:end] = row
            ends.append(end)
            start = end
        return self.made(len(rows), ends, kinds)

    def reserve(self, size: int) -> npt.NDArray[np.uint8]:
        """Room for ``size`` bytes, to be filled before ``made``."""
        if not self._again or self._pid != os.getpid():
            self._hold(size)  # a worker process: its batches wait in a queue, in memory that is shared
        elif size > len(self._room):
            self._hold(max(size + size // 2, _FIRST_BYTES))
        return self._room[:size]

    def _hold(self, size: int) -> None:
        self._tensor = torch.empty(size, dtype=torch.uint8)
        self._room = self._tensor.numpy()
        self._view = self._room.data

    def made(self, count: int, ends: Any, kinds: Any = None) -> Batch:
        """The batch that was put into the room.

        Args:
            count: Of rows.
            ends: For others than tokens: the offsets.
        """
        if self._tokens:
            return Batch(self._tensor[: count * _ROW_BYTES].view(torch.uint16).view(count, ROW_TOKENS))
        offsets = torch.tensor(ends, dtype=torch.int64)
        given = None if kinds is None else torch.as_tensor(kinds, dtype=torch.uint8)
        return Batch(self._tensor[: ends[-1]], offsets, given)
