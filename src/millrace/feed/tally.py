"""A digest of the rows that were delivered, whoever delivered them and in whatever order.

Each row has a 128-bit hash of its position, its stream and its number in the dataset; the digest is their sum modulo
2**128. Sums of ranks and of runs before and after a resume add up, so that two epochs agree exactly when the same rows
came at the same positions, each as often. It tells accidents (lost, repeated, misplaced rows); it is no seal: whoever
wants to can make up rows with a given sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from millrace.core.errors import UsageError
from millrace.feed.cipher import derive_key, mix64

__all__ = ["RowTally"]

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

_MODULUS: Final = 1 << 128
_SPAN: Final = 8192
_SALTS: Final = np.array([derive_key(1), derive_key(2)], np.uint64)
_LOW: Final = np.array(0xFFFFFFFF, np.uint64)
_HALF: Final = np.array(32, np.uint64)
_STREAM_BITS: Final = np.array(50, np.uint64)


class RowTally:
    """Counts rows and sums their hashes. Not for two threads at once."""

    def __init__(self) -> None:
        self._rows = 0
        self._sum = 0

    @property
    def rows(self) -> int:
        """How many were added."""
        return self._rows

    def add(self, positions: Int64s, stream: npt.NDArray[np.int32], row_ids: Int64s) -> None:
        """Add rows.

        Args:
            positions: int64, shape (n,): where in the epoch.
            stream: int32, shape (n,): which dataset of a mixture.
            row_ids: int64, shape (n,): the row's number in its dataset, in dataset order.

        Raises:
            ValueError: the shapes differ.
        """
        if not positions.shape == stream.shape == row_ids.shape:
            raise ValueError(f"shapes differ: {positions.shape}, {stream.shape}, {row_ids.shape}")
        for start in range(0, len(positions), _SPAN):
            span = slice(start, start + _SPAN)
            self._sum += _sum_of_hashes(positions[span], stream[span], row_ids[span])
        self._sum %= _MODULUS
        self._rows += len(positions)

    def merge(self, other: RowTally) -> None:
        """Add what another tally has: of another rank, or from before a resume."""
        self._rows += other._rows
        self._sum = (self._sum + other._sum) % _MODULUS

    def hexdigest(self) -> str:
        """The sum: 32 hexadecimal letters."""
        return f"{self._sum:032x}"

    def plain(self) -> dict[str, Any]:
        """A JSON-safe form of it."""
        return {"rows": self._rows, "sum": self.hexdigest()}

    @classmethod
    def from_plain(cls, value: Mapping[str, Any]) -> RowTally:
        """What :meth:`plain` gave.

        Raises:
            UsageError: it is nothing that ``plain`` gives; names the field.
        """
        if not isinstance(value, Mapping):
            raise UsageError(f"a tally is an object with rows and sum, not {str(value)[:80]!r}")
        rows, text = value.get("rows"), value.get("sum")
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise UsageError(f"rows of a tally is a whole number from 0 up, not {rows!r}")
        if not isinstance(text, str) or len(text) != 32 or not set(text) <= set("0123456789abcdef"):
            raise UsageError(f"sum of a tally is 32 hexadecimal letters, not {str(text)[:80]!r}")
        return cls.from_hex(rows, text)

    @classmethod
    def from_hex(cls, rows: int, digest: str) -> RowTally:
        """A tally of ``rows`` rows whose :meth:`hexdigest` is ``digest``.

        Raises:
            ValueError: the digest isn't hexadecimal.
        """
        tally = cls()
        tally._rows, tally._sum = rows, int(digest, 16) % _MODULUS
        return tally

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowTally) and (self._rows, self._sum) == (other._rows, other._sum)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"RowTally(rows={self._rows}, sum={self.hexdigest()})"


def _sum_of_hashes(positions: Int64s, stream: npt.NDArray[np.int32], row_ids: Int64s) -> int:
    # A mixture has at most 2**50 positions, so that place names both. Each half mixes one number, then the other into
    # it: rows that differ in one number alone can't collide at all, others only by chance, and not in both halves.
    place = positions.astype(np.uint64) ^ (stream.astype(np.uint64) << _STREAM_BITS)
    row = row_ids.astype(np.uint64)
    one = mix64(mix64(place + _SALTS[0]) ^ row)
    two = mix64(mix64(row + _SALTS[1]) ^ place)
    # Words of 64 bits wrap around; halves of them, of fewer than 2**32 rows, don't.
    low = int((one & _LOW).sum()) + (int((one >> _HALF).sum()) << 32)
    high = int((two & _LOW).sum()) + (int((two >> _HALF).sum()) << 32)
    return low + (high << 64)
