"""How random the feed's permutations are, as numbers that chance rarely passes: deviations from what it gives.

Every figure is a number of standard deviations, about normal with mean 0 and deviation 1 when the permutation is one
drawn at random; the largest of a row's many tests is shown. The same tests are run on what one might use instead, so
that one sees which of them would tell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bench.tables import Table
from millrace.feed.cipher import make_domains, permute
from millrace.feed.order import EpochOrder, OrderPlan, Shuffle

__all__ = ["RIVALS", "of_epochs", "of_rivals", "statistics"]

Int64s = npt.NDArray[np.int64]
Tables = Callable[[int, int], Int64s]
"""From a size and a count that many permutations of that size: int64, shape (count, size)."""

ROUNDS = ((0x85EBCA6B, 13, 0xC2B2AE35), (0x7FEB352D, 15, 0x846CA68B), (0x21F0AAAD, 15, 0xD35A2D97))


def _keys(count: int, seed: int) -> npt.NDArray[np.uint64]:
    return np.random.default_rng(seed).integers(0, 1 << 64, count, dtype=np.uint64)


def millrace(size: int, count: int) -> Int64s:
    domains = make_domains(np.full(count, size, np.int64), _keys(count, size))
    which = np.repeat(np.arange(count), size)
    return permute(np.tile(np.arange(size), count), which, domains).reshape(count, size)


def numpy_itself(size: int, count: int) -> Int64s:
    generator = np.random.default_rng(size)
    return np.array([generator.permutation(size) for _ in range(count)])


def affine(size: int, count: int) -> Int64s:
    """``(a * x + b) mod n``, a prime to n: a linear congruential generator's cycle, as some loaders use it."""
    keys = _keys(2 * count, size) % np.uint64(size)
    factors = [
        next(a for a in range(int(k) | 1, int(k) + 2 * size + 3, 2) if math.gcd(a, size) == 1) for k in keys[:count]
    ]
    return (np.array(factors)[:, None] * np.arange(size) + keys[count:, None].astype(np.int64)) % size


def fewer_rounds(rounds: int) -> Tables:
    """The same network with fewer rounds, for sizes that fill their grid."""

    def tables(size: int, count: int) -> Int64s:
        keys = _keys(count, size)[:, None]
        halves = (keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32))
        side = np.uint64(math.isqrt(size))
        sides = [(np.arange(size) // int(side)).astype(np.uint64), (np.arange(size) % int(side)).astype(np.uint64)]
        sides = [np.tile(s, (count, 1)) for s in sides]
        low = np.uint64(0xFFFFFFFF)
        for number in range(rounds):
            first, shift, second = (np.uint64(c) for c in ROUNDS[number // 2])
            word = (sides[1 - number % 2] + halves[number % 2]) & low
            word = ((word ^ (word >> np.uint64(16))) * first) & low
            word = ((word ^ (word >> shift)) * second) & low
            sides[number % 2] = (sides[number % 2] + ((word >> np.uint64(16)) * side >> np.uint64(16))) % side
        return (sides[0] * side + sides[1]).astype(np.int64)

    return tables


RIVALS: tuple[tuple[str, Tables], ...] = (
    ("Millrace: 8 rounds", millrace),
    ("6 rounds", fewer_rounds(6)),
    ("4 rounds", fewer_rounds(4)),
    ("affine", affine),
    ("numpy's Generator.permutation", numpy_itself),
)


def _excess(counts: npt.NDArray[np.integer], expected: float) -> float:
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


def all_permutations(tables: Tables) -> tuple[float, int]:
    """Each of the n! permutations as often as any other, n from 2 to 7."""
    found = []
    for size in range(2, 8):
        count = 40 * math.factorial(size) + 20_000
        numbers = (tables(size, count) * size ** np.arange(size)).sum(axis=1)
        _, counts = np.unique(numbers, return_counts=True)
        counts = np.concatenate([counts, np.zeros(math.factorial(size) - len(counts), np.int64)])
        found.append(_excess(counts, count / math.factorial(size)))
    return max(found, key=abs), len(found)


def places(tables: Tables) -> tuple[float, int]:
    """Each place to anywhere as often: chi-square of a place over many keys."""
    found = []
    for size in (9, 64, 81, 144, 256, 1024):
        count = 60 * size
        some = tables(size, count)
        found += [_excess(np.bincount(some[:, at], minlength=size), count / size) for at in (0, 1, size // 2, size - 1)]
    return max(found, key=abs), len(found)


def distances(tables: Tables) -> tuple[float, int]:
    """Two places some distance apart at any distance as often."""
    found = []
    for size in (81, 256, 1024, 4096):
        some = tables(size, 2_000_000 // size)
        side = math.isqrt(size)
        for apart in (1, side, 2 * side, side + 1, size // 2):
            counts = np.bincount(((some[:, apart:] - some[:, :-apart]) % size).ravel(), minlength=size)[1:]
            found.append(_excess(counts, counts.sum() / (size - 1)))
    return max(found, key=abs), len(found)


def bits(tables: Tables) -> tuple[float, int]:
    """Each bit of a place's image as often set as it is in all numbers below n."""
    found = []
    for size in (256, 1024, 65_536):
        some = tables(size, 6_000_000 // size)
        for at in (0, 1, size // 3, size - 1):
            for bit in range((size - 1).bit_length()):
                mean = ((some[:, at] >> bit) & 1).mean()
                found.append((mean - 0.5) * 2 * math.sqrt(len(some)))
    return max(found, key=abs), len(found)


def avalanche(tables: Tables) -> tuple[float, int]:
    """Each bit of the image changes as often as not when one bit of the place does."""
    found = []
    for size in (256, 1024, 65_536):
        some = tables(size, 6_000_000 // size)
        chance = size / 2 / (size - 1)
        deviation = math.sqrt(chance * (1 - chance) / (len(some) * size / 2))
        width = (size - 1).bit_length()
        for flipped in range(width):
            changed = some ^ some[:, np.arange(size) ^ (1 << flipped)]
            found += [(float(((changed >> bit) & 1).mean()) - chance) / deviation for bit in range(width)]
    return max(found, key=abs), len(found)


def parity(tables: Tables) -> tuple[float, int]:
    """The image is as its place modulo 2, 4 and 8 as often as by chance."""
    found = []
    for size in (256, 1024, 65_536):
        some = tables(size, 6_000_000 // size)
        for modulus in (2, 4, 8):
            deviation = math.sqrt((1 / modulus) * (1 - 1 / modulus) / some.size)
            found.append((float((some % modulus == np.arange(size) % modulus).mean()) - 1 / modulus) / deviation)
    return max(found, key=abs), len(found)


def adjacency(tables: Tables) -> tuple[float, int]:
    """Neighbours stay 1, 2 and 3 apart as often as by chance."""
    found = []
    for size in (81, 256, 1024, 65_536):
        steps = np.abs(np.diff(tables(size, 6_000_000 // size), axis=1))
        for apart in (1, 2, 3):
            expected = steps.size * 2 * (size - apart) / (size * (size - 1))
            found.append(float((steps == apart).sum() - expected) / math.sqrt(expected))
    return max(found, key=abs), len(found)


def turns(tables: Tables) -> tuple[float, int]:
    """Turning points, of which a random sequence has 2 (n - 2) / 3 with the variance (16 n - 29) / 90."""
    found = []
    for size in (256, 1024, 65_536):
        rises = np.diff(tables(size, 6_000_000 // size), axis=1) > 0
        number = (rises[:, 1:] != rises[:, :-1]).sum(axis=1)
        deviation = math.sqrt((16 * size - 29) / 90 / len(rises))
        found.append(float(number.mean() - 2 * (size - 2) / 3) / deviation)
    return max(found, key=abs), len(found)


def keys(tables: Tables) -> tuple[float, int]:
    """Permutations of different keys: the correlation of every two."""
    found: list[float] = []
    for size in (256, 1024, 65_536):
        some = tables(size, 60)
        found += list(np.asarray(np.corrcoef(some))[np.triu_indices(60, 1)] * math.sqrt(size))
    return max(found, key=abs), len(found)


TESTS: tuple[tuple[str, Callable[[Tables], tuple[float, int]]], ...] = (
    ("all n! permutations equally often (n = 2 to 7)", all_permutations),
    ("place to anywhere (n = 9 to 1,024)", places),
    ("distance of two places (n = 81 to 4,096)", distances),
    ("bits of the image (n = 256 to 65,536)", bits),
    ("avalanche: bits changed by one bit of the place", avalanche),
    ("as its place modulo 2, 4, 8", parity),
    ("neighbours 1, 2, 3 apart", adjacency),
    ("turning points", turns),
    ("correlation of two keys", keys),
)


def of_rivals() -> Table:
    """Every test on every permutation. The network with fewer rounds has no way for sizes that aren't squares."""
    rows = []
    for name, test in TESTS:
        cells = [name]
        for rival, tables in RIVALS:
            if "rounds" in rival and tables is not millrace and test is all_permutations:
                cells.append("-")
                continue
            worst, number = test(tables)
            cells.append(f"{worst:+,.1f}")
        rows.append((*cells, f"{number:,}"))
    head = ("largest deviation", *(name for name, _ in RIVALS), "tests")
    return Table("order-statistics", "How random, in standard deviations", head, tuple(rows))


def _ids(order: EpochOrder, rows: Int64s) -> Int64s:
    found = order.locate(np.arange(order.rows))
    return (np.cumsum(rows) - rows)[found.block] + found.row


def of_epochs() -> Table:
    """Relations between epochs, seeds, streams and windows of whole orders."""
    blocks, each = 1024, 64
    rows = np.full(blocks, each, np.int64)
    plan = OrderPlan(1, Shuffle.WINDOW, 16, 8)

    def order(seed: int, epoch: int, stream: int) -> Int64s:
        of = OrderPlan(seed, plan.shuffle, plan.lanes, plan.window)
        return _ids(EpochOrder(of, rows, manifest="m", epoch=epoch, stream=stream), rows)

    def line(name: str, orders: Int64s) -> tuple[str, ...]:
        related = np.asarray(np.corrcoef(orders))[np.triu_indices(len(orders), 1)]
        same = np.array([(a == b).sum() for a, b in itertools.combinations(orders, 2)])
        return name, f"{max(related, key=abs):+.4f}", f"{related.std():.4f}", f"{same.mean():.2f}", f"{len(related):,}"

    # The windows of one epoch: 8 blocks of 64 rows each, as permutations of 512.
    single = EpochOrder(OrderPlan(1, Shuffle.WINDOW, 1, 8), rows, manifest="m", epoch=0)
    moves = EpochOrder(OrderPlan(1, Shuffle.BLOCKS, 1, 1), rows, manifest="m", epoch=0)
    start = np.empty(blocks, np.int64)
    start[moves.locate(np.arange(blocks) * each).block] = np.arange(blocks) * each
    found = single.locate(np.arange(blocks * each))
    table = [
        line("40 epochs of a seed", np.array([order(1, epoch, 0) for epoch in range(40)])),
        line("40 seeds in sequence", np.array([order(seed, 0, 0) for seed in range(40)])),
        line("seed s at epoch 40 - s", np.array([order(seed, 40 - seed, 0) for seed in range(40)])),
        line("40 streams", np.array([order(1, 0, stream) for stream in range(40)])),
        line("128 windows of an epoch", (start[found.block] + found.row).reshape(-1, 512) % 512),
    ]
    head = ("of every two", "largest correlation", "their deviation", "rows at the same place", "pairs")
    notes = (
        "Orders of 65,536 rows in 1,024 blocks; unrelated ones have correlations with a deviation between 0.0039 (rows "
        "move alone) and 0.0312 (blocks move whole); unrelated windows of 512 rows 0.0442. One row is at the same "
        "place by chance.",
    )
    return Table("order-relations", "Relations between orders", head, tuple(table), notes)


def statistics() -> list[Table]:
    return [of_rivals(), of_epochs()]
