"""Where the records of a CSV end: at the newlines that are not inside quotes.

As in RFC 4180 a value is quoted when its first letter is a quote; a quote later in an unquoted value is a letter
like others, and so is what follows the closing quote.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from millrace.pipeline.formats.objects import BOM

__all__ = ["QuotedRecords", "closed_at_newlines"]

_QUOTE: Final = 34
_COMMA, _NEWLINE, _RETURN = 44, 10, 13


class QuotedRecords:
    """Boundaries of CSV records, a block at a time."""

    def __init__(self) -> None:
        self._inside = False
        self._half = False  # the last block ended right after a quote inside a value: closing, or half of a pair
        self._before = _NEWLINE
        self._begun = False

    @property
    def is_open(self) -> bool:
        """Whether the stream so far ends inside a quoted value."""
        return self._inside and not self._half

    def ends(self, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Indices one past the newline of each record that ends in this block."""
        if not self._begun and len(block):
            self._begun = True
            if bytes(block[: len(BOM)]) == BOM:  # the value right after it begins the record
                return self.ends(block[len(BOM) :]) + len(BOM)
        if not len(block):
            return np.zeros(0, np.int64)
        newlines = np.flatnonzero(block == _NEWLINE)
        quotes = np.flatnonzero(block == _QUOTE)
        inside = self._inside
        if self._half:
            if block[0] == _QUOTE:
                quotes = quotes[1:]  # the second half of a pair
            else:
                inside = False
            self._half = False
        if not len(quotes):
            self._inside, self._before = inside, int(block[-1])
            return np.zeros(0, np.int64) if inside else newlines + 1
        toggles = self._toggles(block, quotes, inside)
        count = np.searchsorted(toggles, newlines)
        outside = (count + int(inside)) % 2 == 0
        self._inside = (len(toggles) + int(inside)) % 2 == 1
        if not self._inside and len(toggles) and int(toggles[-1]) == len(block) - 1:
            self._inside = self._half = True  # the next block says whether this closed it
        self._before = int(block[-1])
        ends: npt.NDArray[np.int64] = newlines[outside] + 1
        return ends

    def _toggles(
        self, block: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], inside: bool
    ) -> npt.NDArray[np.int64]:
        """The quotes that open or close, in turn. A pair inside a value counts as closing and opening."""
        opening = quotes[1:] if inside else quotes
        opening = opening[::2]
        before = np.where(opening > 0, block[opening - 1], self._before)
        legal = (before == _COMMA) | (before == _NEWLINE) | (before == _RETURN)
        pair = np.zeros(len(opening), np.bool_)
        first = 0 if inside else 1  # an opening quote right after the one that closed is half of a pair
        pair[first:] = opening[first:] - 1 == (quotes[0::2] if inside else quotes[1::2])[: len(opening) - first]
        if (legal | pair).all():
            return quotes
        return self._one_by_one(block, quotes, inside)

    def _one_by_one(
        self, block: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64], inside: bool
    ) -> npt.NDArray[np.int64]:
        """The same, when there are quotes inside unquoted values."""
        toggles: list[int] = []
        closed = -2
        previous = np.where(quotes > 0, block[quotes - 1], self._before).tolist()
        for at, before in zip(quotes.tolist(), previous, strict=True):
            if inside or before in {_COMMA, _NEWLINE, _RETURN} or at - 1 == closed:
                closed = at if inside else -2
                inside = not inside
                toggles.append(at)
        return np.array(toggles, np.int64)


def closed_at_newlines(block: npt.NDArray[np.uint8]) -> bool:
    """Whether no quoted value in these whole lines holds a newline."""
    newlines = int(np.count_nonzero(block == _NEWLINE))
    return len(QuotedRecords().ends(block)) == newlines
