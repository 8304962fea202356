"""Keyed permutations of ``[0, n)`` that are computed, not stored: for any n, for many keys in one call.

A number x in ``[0, n)`` is a place (x // wide, x % wide) on a grid that is as square as can be; its last row may be
shorter, and so may the columns beyond that one's end. Eight rounds of an alternating Feistel network move the places:
the even ones along their column, by a hash of the column and the key, the odd ones along their row, by a hash of the
row and the key, each modulo the length of that column or row. Every step rotates columns or rows, which can be undone,
so the whole is a bijection of exactly n places: none has to be sent through again until it falls inside, as with a grid
of a power of two ("cycle walking").

Three sizes have three ways, and which of them is a function of n alone:

====================  =========================================================================================
n up to 64            the ranks of n hashes: uniform over all permutations, where so small a grid is not
n up to 2**24         the network in 32-bit words, which is what NumPy is fastest at
n up to 2**62         the same in 64-bit words, with the finaliser of splitmix64
====================  =========================================================================================

It is a shuffle, not a secret: statistics are tested (docs/design/feed-order.md), attackers are not thought of. Feistel
networks over numbers that are no power of two: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

__all__ = ["Domains", "derive_key", "derive_keys", "make_domains", "mix64", "permutation", "permute"]

Int64s = npt.NDArray[np.int64]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]
Words = npt.NDArray[Any]

SMALL_MAX: Final = 64
MEDIUM_MAX: Final = 1 << 24
SIZE_MAX: Final = 1 << 62
SPAN: Final = 8192
"""Elements worked on at once: a dozen arrays of 32-bit words of it fit into the L2 cache."""

_SMALL, _MEDIUM, _LARGE = 0, 1, 2
_MASK: Final = (1 << 64) - 1
_GOLDEN: Final = 0x9E3779B97F4A7C15
# Of splitmix64's finaliser: shift, multiplier, shift, multiplier, shift.
_MIX64: Final = (30, 0xBF58476D1CE4E5B9, 27, 0x94D049BB133111EB, 31)
# Shift, multiplier, shift, multiplier of 32-bit finalisers; their last shift changes only bits that are not used. The
# first is murmur3's; the others were found by a search for low bias (hash-prospector). Each serves both halves.
_ROUNDS32: Final = (
    (16, 0x85EBCA6B, 13, 0xC2B2AE35),
    (16, 0x7FEB352D, 15, 0x846CA68B),
    (16, 0x21F0AAAD, 15, 0xD35A2D97),
    (16, 0xA812D533, 15, 0xB278E4AD),
)
_ROUNDS: Final = 8


def derive_key(*words: int) -> int:
    """A 64-bit key from whole numbers in [0, 2**64), by hashing each into what came before.

    The order and the number of words count: (seed + 1, epoch) and (seed, epoch + 1) have nothing in common.
    """
    key = _mix_int(len(words) + _GOLDEN)
    for word in words:
        key = _mix_int((_mix_int(word ^ key) + _GOLDEN + key) & _MASK)
    return key


def derive_keys(key: int, *columns: npt.NDArray[np.integer[Any]]) -> UInt64s:
    """One key for each row of ``columns`` (whole numbers, all of shape (n,)), under ``key``; uint64, shape (n,)."""
    keys = np.full(columns[0].shape, key, np.uint64)
    golden = np.array(_GOLDEN, np.uint64)
    for start in range(0, len(keys), SPAN):
        span = slice(start, start + SPAN)
        for column in columns:
            keys[span] = mix64(mix64(column[span].astype(np.uint64) ^ keys[span]) + golden + keys[span])
    return keys


def mix64(words: UInt64s) -> UInt64s:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that mixes them well."""
    first, times, second, again, last = (np.array(c, np.uint64) for c in _MIX64)
    mixed = words >> first
    mixed ^= words
    mixed *= times
    mixed ^= mixed >> second
    mixed *= again
    mixed ^= mixed >> last
    return mixed


def _mix_int(word: int) -> int:
    first, times, second, again, last = _MIX64
    word &= _MASK
    word = (word ^ (word >> first)) * times & _MASK
    word = (word ^ (word >> second)) * again & _MASK
    return word ^ (word >> last)


@dataclass(frozen=True, slots=True)
class Domains:
    """Permutations that are asked for together: for each its size, its key and its grid. 37 bytes each.

    Attributes:
        sizes: int64, shape (domains,): n of each, 1 to 2**62.
        keys: uint64, shape (domains,).
        kinds: uint8: which of the three ways.
        kind: The way of all of them, or -1 where they differ.
        tall, wide: The sides of the grids: uint32, or uint64 where a domain is large.
        edge: The last place of each grid's last row, of the same type.
        low, high: The halves of the keys, uint32.
        whole: No grid has a shorter last row.
    """

    sizes: Int64s
    keys: UInt64s
    kinds: npt.NDArray[np.uint8]
    kind: int
    tall: Words
    wide: Words
    edge: Words
    low: UInt32s
    high: UInt32s
    whole: bool

    def __len__(self) -> int:
        return len(self.sizes)


def make_domains(sizes: Int64s, keys: UInt64s) -> Domains:
    """The domains of these sizes and keys (both of shape (domains,)).

    Raises:
        ValueError: a size is below 1 or above 2**62.
    """
    if len(sizes) and (int(sizes.min()) < 1 or int(sizes.max()) > SIZE_MAX):
        raise ValueError(f"a domain has 1 to 2**62 places, not {int(sizes.min())} to {int(sizes.max())}")
    kinds = (sizes > SMALL_MAX).view(np.uint8) + (sizes > MEDIUM_MAX).view(np.uint8)
    kind = int(kinds[0]) if len(kinds) and (kinds == kinds[0]).all() else -1
    word = np.uint64 if (kinds == _LARGE).any() else np.uint32
    tall, wide, edge = (np.empty(len(sizes), word) for _ in range(3))
    whole = True
    for start in range(0, len(sizes), SPAN):
        span = slice(start, start + SPAN)
        tall[span], across, last = _grid(sizes[span])
        wide[span], edge[span] = across, last
        whole = whole and bool((last == across - 1).all())
    low, high = keys.astype(np.uint32), (keys >> np.uint64(32)).astype(np.uint32)
    return Domains(sizes, keys, kinds, kind, tall, wide, edge, low, high, whole)


def _grid(sizes: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Tall, wide and edge of the squarest grids."""
    wide = np.sqrt((sizes - 1).astype(np.float64)).astype(np.int64)
    # Beyond 2**52 the root may be off by one.
    wide += ((wide + 1) ** 2 <= sizes - 1).astype(np.int64) - (wide**2 > sizes - 1).astype(np.int64) + 1
    tall: Int64s = (sizes + wide - 1) // wide
    return tall, wide, sizes - 1 - (tall - 1) * wide


def permutation(size: int, key: int) -> Int64s:
    """The whole permutation of ``[0, size)`` under ``key`` as an array: int64, shape (size,)."""
    if size == 0:
        return np.empty(0, np.int64)
    domains = make_domains(np.array([size], np.int64), np.array([key], np.uint64))
    return permute(np.arange(size, dtype=np.int64), None, domains)


def permute(places: Int64s, which: Int64s | None, domains: Domains) -> Int64s:
    """Where each place goes in its domain.

    Args:
        places: int64, shape (n,), each in [0, size of its domain).
        which: int64, shape (n,): the domain of each place; None where there is only one domain.
        domains: From :func:`make_domains`.

    Returns:
        int64, shape (n,). What becomes of a place depends on its domain alone, not on the places beside it.
    """
    if len(places) <= SPAN:
        return _permute_span(places, which, domains)
    moved = np.empty(len(places), np.int64)
    for start in range(0, len(places), SPAN):
        span = slice(start, start + SPAN)
        moved[span] = _permute_span(places[span], None if which is None else which[span], domains)
    return moved


def _permute_span(places: Int64s, which: Int64s | None, domains: Domains) -> Int64s:
    if domains.kind >= 0 or which is None:
        return _WAYS[domains.kind](places, which, domains)
    kinds = domains.kinds.take(which)
    present = np.flatnonzero(np.bincount(kinds, minlength=3))
    if len(present) == 1:
        return _WAYS[int(present[0])](places, which, domains)
    moved = np.empty(len(places), np.int64)
    for kind in present:
        there = np.flatnonzero(kinds == kind)
        moved[there] = _WAYS[int(kind)](places[there], which[there], domains)
    return moved


def _permute_small(places: Int64s, which: Int64s | None, domains: Domains) -> Int64s:
    used, row = (np.zeros(1, np.int64), 0) if which is None else np.unique(which, return_inverse=True)
    sizes = domains.sizes.take(used)
    columns = np.arange(1, int(sizes.max(initial=0)) + 1, dtype=np.uint64)
    hashes = mix64(domains.keys.take(used)[:, None] + columns * np.uint64(_GOLDEN))
    hashes[columns > sizes[:, None].astype(np.uint64)] = np.uint64(_MASK)
    orders: Int64s = np.argsort(hashes, axis=1, kind="stable")
    moved: Int64s = orders[row, places]
    return moved


def _permute_medium(places: Int64s, which: Int64s | None, domains: Domains) -> Int64s:
    words = places.astype(np.uint32)
    _network32(words, *_grids(which, domains, np.uint32), _column(domains.low, which), _column(domains.high, which))
    return words.astype(np.int64)


def _permute_large(places: Int64s, which: Int64s | None, domains: Domains) -> Int64s:
    words = places.astype(np.uint64)
    _network64(words, *_grids(which, domains, np.uint64), _column(domains.keys, which))
    return words.view(np.int64)


_WAYS: Final = (_permute_small, _permute_medium, _permute_large)


def _column(column: Words, which: Int64s | None) -> Words:
    return column[0:1] if which is None else column.take(which)


def _grids(which: Int64s | None, domains: Domains, word: type) -> tuple[Words, Words, Words | None]:
    """Of each place its grid's tall, wide and edge; edge is None if none of these grids has a shorter last row."""
    tall: Words = _column(domains.tall, which).astype(word, copy=False)
    wide: Words = _column(domains.wide, which).astype(word, copy=False)
    if domains.whole:
        return tall, wide, None
    edge: Words = _column(domains.edge, which).astype(word, copy=False)
    return tall, wide, None if (edge + _ONE == wide).all() else edge


def _network32(words: UInt32s, tall: UInt32s, wide: UInt32s, edge: UInt32s | None, low: UInt32s, high: UInt32s) -> None:
    """Eight rounds over each word, in place: 13 passes of 32-bit words a round, 16 or 17 with an edge.

    The upper 16 bits of a 32-bit hash times a length below 2**13 give a number below that length in the next 16 bits.
    The sum of two numbers below a length, less that length, wraps around if the sum was below it: the lesser of the two
    is the sum modulo the length.
    """
    row = words // wide
    column = words - row * wide
    mixed, spare, shorter = np.empty_like(words), np.empty_like(words), np.empty_like(words)
    # Columns beyond `edge` are shorter by one; rows beyond `above`, which is the last row alone, by `gap`.
    above, gap = (None, None) if edge is None else (tall - _TWO, wide - _ONE - edge)
    for shift, times, then, again in _ROUND_WORDS32:
        for source, moved, length, key, limit, less in (
            (column, row, tall, low, edge, None),
            (row, column, wide, high, above, gap),
        ):
            if limit is not None:
                np.subtract(limit, source, shorter)
                np.right_shift(shorter, _TOP, shorter)  # 1 where the difference was below zero
                if less is not None:
                    np.multiply(shorter, less, shorter)
                length = np.subtract(length, shorter, shorter)
            np.add(source, key, mixed)
            np.right_shift(mixed, shift, spare)
            np.bitwise_xor(mixed, spare, mixed)
            np.multiply(mixed, times, mixed)
            np.right_shift(mixed, then, spare)
            np.bitwise_xor(mixed, spare, mixed)
            np.multiply(mixed, again, mixed)
            np.right_shift(mixed, _SIXTEEN, mixed)
            np.multiply(mixed, length, mixed)
            np.right_shift(mixed, _SIXTEEN, mixed)
            np.add(mixed, moved, mixed)
            np.subtract(mixed, length, spare)
            np.minimum(mixed, spare, out=moved)
    np.multiply(row, wide, words)
    np.add(words, column, words)


def _network64(words: UInt64s, tall: UInt64s, wide: UInt64s, edge: UInt64s | None, keys: UInt64s) -> None:
    """The same in 64-bit words: each round has splitmix64's finaliser and the next key of its sequence."""
    row = words // wide
    column = words - row * wide
    golden, half = np.array(_GOLDEN, np.uint64), np.array(32, np.uint64)
    for number in range(_ROUNDS):
        keys = keys + golden
        if number % 2 == 0:
            source, moved = column, row
            side = tall if edge is None else tall - (column > edge)
        else:
            source, moved = row, column
            side = wide if edge is None else np.where(row == tall - 1, edge + 1, wide)
        mixed = mix64(source + keys)
        mixed >>= half
        mixed *= side
        mixed >>= half
        mixed += moved
        np.minimum(mixed, mixed - side, out=moved)
    np.multiply(row, wide, words)
    np.add(words, column, words)


# Arrays of no dimension: a plain number would be converted anew at each of the hundred calls of a span.
_ONE, _TWO, _SIXTEEN, _TOP = (np.array(c, np.uint32) for c in (1, 2, 16, 31))
_ROUND_WORDS32: Final[Sequence[tuple[UInt32s, ...]]] = tuple(
    tuple(np.array(c, np.uint32) for c in constants) for constants in _ROUNDS32
)
