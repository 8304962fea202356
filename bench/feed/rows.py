"""The rows that loaders are measured with: three workloads, each row with its number inside.

- ``tokens``: 2,048 uint16 tokens, 4,096 bytes a row;
- ``blobs``: random bytes, 20,000 to 40,000 a row;
- ``mix``: one byte that says the kind, and a payload: a sparse embedding (768 wide, 77 places taken: their uint16
  indexes, then their float32 values), an image of 224 x 224 x 3 uint8, or a row of tokens.

Everything is random from a fixed seed, so that no compression pretends to be speed. The first bytes of a row are its
number (little-endian; four bytes for tokens, which are two tokens, eight for the others), so that what a loader
delivers can be counted and its shuffling measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.digests import Tally

__all__ = [
    "BATCH_ROWS",
    "KINDS",
    "ROWS",
    "ROW_TOKENS",
    "WORKLOADS",
    "Rows",
    "numbers",
    "pieces",
    "spread_of",
    "tally_rows",
    "uniform_spread",
]

WORKLOADS = ("tokens", "blobs", "mix")
ROWS = {"tokens": 200_000, "blobs": 50_000, "mix": 100_000}
BATCH_ROWS = 32
ROW_TOKENS = 2048
KINDS = ("embedding", "image", "tokens")

_PIECE_ROWS = 1000
_SEED = 2048
_VOCABULARY = 50_257
_BLOB_BYTES = (20_000, 40_000)
_WIDTH, _TAKEN = 768, 77
_KIND_SHARES = (0.45, 0.10, 0.45)
_KIND_BYTES = np.array([_TAKEN * 6, 224 * 224 * 3, 2 * ROW_TOKENS])

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows, end to end.

    Attributes:
        first: The number of the first.
        values: Their bytes.
        offsets: Row ``i`` is ``values[offsets[i]:offsets[i + 1]]``; one more than there are rows.
        kinds: For ``mix``: an index into ``KINDS`` for each row.
    """

    first: int
    values: Bytes
    offsets: Ints
    kinds: Bytes | None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def each(self) -> Iterator[tuple[int, memoryview]]:
        """Kind (0 where there are none) and bytes of each row."""
        view = self.values.data
        ends = self.offsets.tolist()
        kinds = [0] * len(self) if self.kinds is None else self.kinds.tolist()
        for i, kind in enumerate(kinds):
            yield kind, view[ends[i] : ends[i + 1]]

    def tokens(self) -> npt.NDArray[np.uint16]:
        """For ``tokens``: shape (rows, 2048)."""
        return self.values.view(np.uint16).reshape(len(self), ROW_TOKENS)


def pieces(workload: str, count: int) -> Iterator[Rows]:
    """All rows of a workload, up to 1,000 at a time."""
    for first in range(0, count, _PIECE_ROWS):
        rng = np.random.default_rng([_SEED, WORKLOADS.index(workload), first])
        yield _MAKERS[workload](rng, first, min(_PIECE_ROWS, count - first))


def _tokens(rng: np.random.Generator, first: int, count: int) -> Rows:
    tokens = rng.integers(0, _VOCABULARY, (count, ROW_TOKENS), dtype=np.uint16)
    tokens[:, :2] = np.arange(first, first + count, dtype="<u4").view("<u2").reshape(count, 2)
    offsets = np.arange(count + 1, dtype=np.int64) * (2 * ROW_TOKENS)
    return Rows(first, tokens.reshape(-1).view(np.uint8), offsets, None)


def _blobs(rng: np.random.Generator, first: int, count: int) -> Rows:
    low, high = _BLOB_BYTES
    return _numbered(rng, first, rng.integers(low, high + 1, count), None)


def _mix(rng: np.random.Generator, first: int, count: int) -> Rows:
    kinds = rng.choice(len(KINDS), count, p=_KIND_SHARES).astype(np.uint8)
    made = _numbered(rng, first, _KIND_BYTES[kinds], kinds)
    for i in np.flatnonzero(kinds == KINDS.index("embedding")).tolist():
        start = int(made.offsets[i])
        places = np.sort(rng.permutation(_WIDTH)[:_TAKEN]).astype("<u2")
        values = rng.standard_normal(_TAKEN).astype("<f4")
        whole = np.concatenate([places.view(np.uint8), values.view(np.uint8)])
        made.values[start + 8 : start + len(whole)] = whole[8:]
    return made


_MAKERS = {"tokens": _tokens, "blobs": _blobs, "mix": _mix}


def _numbered(rng: np.random.Generator, first: int, sizes: Ints, kinds: Bytes | None) -> Rows:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    values = np.frombuffer(bytearray(rng.bytes(int(offsets[-1]))), np.uint8)
    for i, start in enumerate(offsets[:-1].tolist()):
        values[start : start + 8] = np.frombuffer((first + i).to_bytes(8, "little"), np.uint8)
    return Rows(first, values, offsets, kinds)


def numbers(values: npt.NDArray[Any], offsets: npt.NDArray[Any] | None) -> Ints:
    """The row numbers inside a batch.

    Args:
        values: Tokens as uint16 of shape (rows, 2048), or bytes end to end.
        offsets: With bytes: where the rows are.
    """
    if offsets is None:
        return values[:, 0].astype(np.int64) + (values[:, 1].astype(np.int64) << 16)
    places = offsets[:-1, None] + np.arange(8)
    return np.ascontiguousarray(values[places]).view("<i8").reshape(-1)


def tally_rows(values: memoryview, offsets: list[int], kinds: list[int] | None) -> Tally:
    """Count rows and add up the digests of their bytes and kinds."""
    found = Tally()
    for i in range(len(offsets) - 1):
        digest = hashlib.blake2b(values[offsets[i] : offsets[i + 1]], digest_size=16)
        if kinds is not None:
            digest.update(b"%d" % kinds[i])
        found.add(Tally(1, int.from_bytes(digest.digest())))
    return found


def spread_of(numbers: Ints, batch_rows: int = BATCH_ROWS) -> float:
    """The mean standard deviation of row numbers inside a batch; a last batch that isn't full is left out."""
    whole = numbers[: len(numbers) // batch_rows * batch_rows].reshape(-1, batch_rows)
    return float(whole.std(axis=1, ddof=1).mean()) if len(whole) else 0.0


def uniform_spread(count: int, batch_rows: int = BATCH_ROWS) -> float:
    """The same for batches that are drawn from all rows: of 200,000 rows or more."""
    rng = np.random.default_rng(_SEED)
    draws = [spread_of(rng.permutation(count), batch_rows) for _ in range(max(1, -(-200_000 // count)))]
    return float(np.mean(draws))
