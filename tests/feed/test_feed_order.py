"""The order of an epoch, by law: every row once, the same from wherever one looks, in its window, and well mixed."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UsageError
from millrace.core.model import digest_of
from millrace.feed.order import (
    ORDER_VERSION,
    EpochOrder,
    Order,
    OrderPlan,
    Shuffle,
    fingerprint_of,
    parse_shuffle,
    plan_order,
)

Int64s = npt.NDArray[np.int64]
MB = 1_000_000


def order_of(plan: OrderPlan, rows: Int64s, epoch: int = 0, stream: int = 0, manifest: str = "m") -> EpochOrder:
    return EpochOrder(plan, rows, manifest=manifest, epoch=epoch, stream=stream)


def ids(order: Order, rows: Int64s, positions: Int64s | None = None) -> Int64s:
    """The rows' numbers in dataset order."""
    found = order.locate(np.arange(order.rows) if positions is None else positions)
    assert (found.row >= 0).all()
    assert (found.row < rows[found.block]).all()
    result: Int64s = (np.cumsum(rows) - rows)[found.block] + found.row
    return result


layouts = st.one_of(
    st.lists(st.integers(1, 60), max_size=40),
    st.lists(st.sampled_from([1, 1, 1, 2, 700]), max_size=40),
    st.integers(0, 120).map(lambda blocks: [1] * blocks),
    st.integers(1, 3000).map(lambda rows: [rows]),
    st.integers(1, 30).map(lambda blocks: [100] * blocks),
).map(lambda rows: np.array(rows, np.int64))


@st.composite
def plans(draw: st.DrawFn) -> OrderPlan:
    shuffle = draw(st.sampled_from(Shuffle))
    seed = draw(st.integers(0, 2**64 - 1))
    if shuffle in (Shuffle.BLOCKS, Shuffle.NONE):
        return OrderPlan(seed, shuffle, 1, 1)
    return OrderPlan(seed, shuffle, draw(st.integers(1, 90)), draw(st.integers(1, 12)))


# --- the law --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(plans(), layouts, st.integers(0, 2**40), st.integers(0, 5))
def test_an_epoch_has_every_row_once(plan: OrderPlan, rows: Int64s, epoch: int, stream: int) -> None:
    order = order_of(plan, rows, epoch, stream)
    assert order.rows == rows.sum()
    assert order.lanes == plan.lanes
    assert (np.sort(ids(order, rows)) == np.arange(order.rows)).all()
    assert (order.locate(np.arange(order.rows)).stream == stream).all()


@settings(deadline=None)
@given(plans(), layouts, st.integers(0, 2**32))
def test_a_position_has_its_row_whatever_is_asked_beside_it(plan: OrderPlan, rows: Int64s, seed: int) -> None:
    order = order_of(plan, rows)
    whole = ids(order, rows)
    some = np.random.default_rng(seed).integers(0, max(1, order.rows), 50 if order.rows else 0)
    assert (ids(order, rows, some) == whole[some]).all()
    assert (ids(order_of(plan, rows), rows, some[:1]) == whole[some[:1]]).all()


@settings(deadline=None)
@given(plans(), layouts)
def test_a_lane_and_an_index_name_the_same_row_as_the_position(plan: OrderPlan, rows: Int64s) -> None:
    order = order_of(plan, rows)
    lane, index = np.arange(order.rows) % order.lanes, np.arange(order.rows) // order.lanes
    found = order.locate(np.arange(order.rows))
    block, row = order.locate_in_lane(lane, index)
    assert (block == found.block).all()
    assert (row == found.row).all()
    assert (order.lane_rows(np.arange(order.lanes)) == np.bincount(lane, minlength=order.lanes)).all()


def sequence_of(order: EpochOrder, rows: Int64s, pi: Int64s) -> Int64s:
    """Of every position, in lane order: where in the sequence of permuted blocks its row lies."""
    start = np.empty(len(rows), np.int64)
    start[pi] = np.cumsum(rows[pi]) - rows[pi]
    by_lane = np.argsort(np.arange(order.rows) % order.lanes, kind="stable")
    found = order.locate(by_lane)
    return start[found.block] + found.row


def block_sequence(plan: OrderPlan, rows: Int64s, epoch: int) -> Int64s:
    """The permutation of the blocks, seen through an order that moves blocks alone."""
    order = order_of(replace(plan, shuffle=Shuffle.BLOCKS, lanes=1, window=1), rows, epoch)
    found = order.locate(np.arange(order.rows)).block
    return found[np.flatnonzero(np.diff(found, prepend=-1))]


@settings(deadline=None)
@given(layouts.filter(len), st.integers(1, 90), st.integers(1, 12), st.integers(0, 99))
def test_a_row_never_leaves_its_lane_nor_its_window(rows: Int64s, lanes: int, window: int, epoch: int) -> None:
    plan = OrderPlan(5, Shuffle.WINDOW, lanes, window)
    order = order_of(plan, rows, epoch)
    pi = block_sequence(plan, rows, epoch)
    to = sequence_of(order, rows, pi)
    edges = np.concatenate([[0], np.cumsum(rows[pi])])
    bits = (lanes - 1).bit_length()
    begin = 0
    for lane, length in enumerate(order.lane_rows(np.arange(lanes))):
        phase = int(f"{lane:b}".zfill(bits)[::-1], 2) * window >> bits if bits else 0
        place = np.arange(begin, begin + length)
        number = (np.searchsorted(edges, place, side="right") - 1 + phase) // window
        moved_to = (np.searchsorted(edges, to[place], side="right") - 1 + phase) // window
        assert (number == moved_to).all()
        assert (np.sort(to[place]) == place).all()
        begin += int(length)


@settings(deadline=None)
@given(layouts, st.integers(0, 99))
def test_only_blocks_move_in_blocks_and_nothing_in_none(rows: Int64s, epoch: int) -> None:
    order = order_of(OrderPlan(3, Shuffle.NONE, 1, 1), rows, epoch)
    assert (ids(order, rows) == np.arange(order.rows)).all()
    moved = ids(order_of(OrderPlan(3, Shuffle.BLOCKS, 1, 1), rows, epoch), rows)
    block = np.repeat(np.arange(len(rows)), rows)[moved]
    assert np.count_nonzero(np.diff(block)) == max(0, len(rows) - 1)
    assert (np.diff(moved)[np.diff(block) == 0] == 1).all()


def test_crowded_stretches_are_searched() -> None:
    # One block of a million rows between thousands of one row: a thousand edges in a stretch of the guide.
    rows = np.array([1] * 3000 + [1_000_000] + [1] * 3000, np.int64)
    order = order_of(OrderPlan(1, Shuffle.WINDOW, 4, 64), rows)
    assert (np.bincount(ids(order, rows), minlength=order.rows) == 1).all()


def test_a_full_shuffle_of_more_rows_than_32_bits() -> None:
    rows = np.full(3000, 2_000_000, np.int64)
    order = order_of(OrderPlan(1, Shuffle.FULL, 64, 3000), rows)
    some = np.concatenate([np.arange(20_000), order.rows - 1 - np.arange(20_000), order.rows // 2 + np.arange(20_000)])
    found = ids(order, rows, some)
    assert len(np.unique(found)) == len(some)
    assert (order.locate(some[30_000:30_010]).row == order.locate(some).row[30_000:30_010]).all()


# --- seeds, epochs, streams, versions -------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [Shuffle.WINDOW, Shuffle.FULL, Shuffle.BLOCKS])
def test_every_word_of_the_key_makes_another_order(shuffle: Shuffle) -> None:
    rows = np.full(400, 5, np.int64)
    lanes = 1 if shuffle is Shuffle.BLOCKS else 4
    seen = {}
    for seed, epoch, stream in itertools.product((0, 1, 2, 2**64 - 1), range(3), range(3)):
        plan = OrderPlan(seed, shuffle, lanes, 4)
        seen[seed, epoch, stream] = tuple(ids(order_of(plan, rows, epoch, stream), rows))
    assert len(set(seen.values())) == len(seen)
    assert seen[1, 1, 0] != seen[2, 0, 0]
    orders = np.array(list(seen.values()))
    correlations = np.asarray(np.corrcoef(orders))[np.triu_indices(len(orders), 1)]
    # Rows of a block move together where only blocks do, which leaves 400 independent numbers.
    assert abs(correlations).max() < 5 / math.sqrt(400)


def test_the_order_stays_what_it_is() -> None:
    """These change with ORDER_VERSION alone: a state saved today goes on tomorrow at the same rows."""
    assert ORDER_VERSION == 1
    rows = np.array([100, 1, 64, 65, 1000, 3, 77] * 9, np.int64)
    found = {}
    for shuffle in Shuffle:
        lanes = 1 if shuffle in (Shuffle.BLOCKS, Shuffle.NONE) else 6
        order = order_of(OrderPlan(2**63 + 17, shuffle, lanes, 3), rows, epoch=4)
        found[shuffle.value] = digest_of(ids(order, rows).astype("<i8").tobytes())[:16]
    assert found == {
        "window": "70b8f303409cae1e",
        "full": "945f0e14ddfc5e8b",
        "blocks": "5a7de0bf7e440bb5",
        "none": "c46ee151f81f9f8d",
    }


def test_the_fingerprint_is_of_the_order_and_not_of_the_epoch() -> None:
    rows = np.full(10, 10, np.int64)
    plan = OrderPlan(1, Shuffle.WINDOW, 2, 3)
    first = order_of(plan, rows).fingerprint
    assert order_of(plan, rows, epoch=7).fingerprint == first
    assert len(first) == 64
    others = [
        order_of(replace(plan, seed=2), rows),
        order_of(replace(plan, shuffle=Shuffle.FULL), rows),
        order_of(replace(plan, lanes=3), rows),
        order_of(replace(plan, window=4), rows),
        order_of(plan, rows, stream=1),
        order_of(plan, rows, manifest="n"),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 7
    assert fingerprint_of(a=1) != fingerprint_of(a=2)


# --- planning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "block_bytes", "lanes", "window"),
    [
        (0, 1, 1, 64),
        (1, 8 * MB, 1, 32),
        (15, 8 * MB, 1, 32),
        (16, 8 * MB, 2, 16),
        (100, 1 * MB, 8, 32),
        (511, 1 * MB, 32, 8),
        (512, 1 * MB, 64, 4),
        (1_000_000, 4 * MB, 64, 1),
        (1_000_000, 5 * MB, 32, 1),
        (1_000_000, 30 * MB, 8, 1),
        (1_000_000, 900 * MB, 8, 1),
        (1_000_000, 10_000, 64, 64),
        (512, 4_500_000, 64, 1),
        (512, 4_500_001, 32, 1),
    ],
)
def test_defaults_come_from_the_blocks(blocks: int, block_bytes: int, lanes: int, window: int) -> None:
    rows = np.full(blocks, 1000, np.int64)
    plan = plan_order(rows, np.full(blocks, block_bytes, np.int64), seed=3, shuffle=Shuffle.WINDOW)
    assert (plan.lanes, plan.window) == (lanes, window)
    assert plan.lanes * plan.window * block_bytes <= 288 * MB or plan.window == 1


def test_lanes_and_window_can_be_given() -> None:
    rows = np.full(100, 10, np.int64)
    plan = plan_order(rows, rows * MB, seed=3, shuffle=Shuffle.WINDOW, lanes=5)
    assert plan == OrderPlan(3, Shuffle.WINDOW, 5, 4)
    assert plan_order(rows, rows, seed=3, shuffle=Shuffle.WINDOW, window=7) == OrderPlan(3, Shuffle.WINDOW, 8, 7)
    assert plan_order(rows, rows, seed=3, shuffle=Shuffle.FULL, lanes=5) == OrderPlan(3, Shuffle.FULL, 5, 100)
    assert plan_order(rows, rows, seed=3, shuffle=Shuffle.NONE, lanes=1) == OrderPlan(3, Shuffle.NONE, 1, 1)


@pytest.mark.parametrize(
    ("shuffle", "options", "word"),
    [
        ("window", {"seed": -1}, "seed=-1"),
        ("window", {"seed": 2**64}, "seed="),
        ("window", {"seed": 1.5}, "seed=1.5"),
        ("window", {"seed": True}, "seed=True"),
        ("window", {"seed": "7"}, "seed='7'"),
        ("window", {"lanes": 0}, "lanes=0"),
        ("window", {"lanes": 1 << 17}, "lanes="),
        ("window", {"window": 0}, "window=0"),
        ("full", {"window": 3}, "leave it out"),
        ("blocks", {"lanes": 2}, "leave them out"),
        ("none", {"window": 2}, "leave them out"),
    ],
)
def test_nonsense_is_refused_by_name(shuffle: str, options: dict[str, Any], word: str) -> None:
    rows = np.full(10, 10, np.int64)
    with pytest.raises(UsageError, match=word):
        plan_order(rows, rows, **{"seed": 1, "shuffle": parse_shuffle(shuffle), **options})


def test_shuffle_is_a_word_or_a_truth() -> None:
    assert parse_shuffle(True) is Shuffle.WINDOW
    assert parse_shuffle(False) is Shuffle.NONE
    assert [parse_shuffle(word) for word in ("window", "full", "blocks", "none")] == list(Shuffle)
    assert parse_shuffle(Shuffle.FULL) is Shuffle.FULL
    for wrong in ("Window", "", "random"):
        with pytest.raises(UsageError, match="'full'"):
            parse_shuffle(wrong)


def test_what_lies_outside_is_refused() -> None:
    rows = np.full(4, 5, np.int64)
    order = order_of(OrderPlan(1, Shuffle.WINDOW, 3, 2), rows)
    for wrong in (-1, 20, 2**62):
        with pytest.raises(IndexError, match="0 to 19"):
            order.locate(np.array([3, wrong]))
    for lane, index in ((2, 6), (0, 7), (0, -1)):
        with pytest.raises(IndexError, match="lane"):
            order.locate_in_lane(np.array([lane]), np.array([index]))
    with pytest.raises(UsageError, match="epoch=-1"):
        order_of(OrderPlan(1, Shuffle.WINDOW, 3, 2), rows, epoch=-1)
    with pytest.raises(ValueError, match="at least one row"):
        order_of(OrderPlan(1, Shuffle.WINDOW, 3, 2), np.array([3, 0, 1]))


@pytest.mark.parametrize("cut", [[0, 20], [0, 9, 8, 20], [1, 2, 3, 20], [0, 2, 3, 21]])
def test_another_cut_into_lanes_must_be_one(cut: list[int]) -> None:
    rows = np.full(4, 5, np.int64)
    with pytest.raises(ValueError, match="not cut so"):
        EpochOrder(OrderPlan(1, Shuffle.WINDOW, 3, 2), rows, manifest="m", epoch=0, lane_starts=np.array(cut))


@settings(deadline=None)
@given(layouts, st.lists(st.integers(0, 5000), max_size=8), st.integers(0, 9))
def test_lanes_of_any_length_have_every_row_once(rows: Int64s, cuts: list[int], seed: int) -> None:
    total = int(rows.sum())
    starts = np.array([0, *sorted(min(cut, total) for cut in cuts), total])
    plan = OrderPlan(seed, Shuffle.WINDOW, len(starts) - 1, 3)
    order = EpochOrder(plan, rows, manifest="m", epoch=2, lane_starts=starts)
    lengths = np.diff(starts)
    lane = np.repeat(np.arange(len(lengths)), lengths)
    block, row = order.locate_in_lane(lane, np.arange(total) - starts[lane])
    assert (np.sort((np.cumsum(rows) - rows)[block] + row) == np.arange(total)).all()
    with pytest.raises(ValueError, match="equal length"):
        order.locate(np.arange(total))


# --- how well it mixes ----------------------------------------------------------------------------------------------


def spread(order: EpochOrder, rows: Int64s, batch: int) -> float:
    """The standard deviation of the row ids in a batch over that of a uniform draw."""
    found = ids(order, rows)[: order.rows // batch * batch].reshape(-1, batch)
    return float(found.std(axis=1, ddof=1).mean() / (order.rows / math.sqrt(12)))


def test_a_batch_is_spread_as_a_uniform_draw_is() -> None:
    rows = np.full(1000, 200, np.int64)
    lengths = rows * 8192
    default = order_of(plan_order(rows, lengths, seed=1, shuffle=Shuffle.WINDOW), rows)
    everywhere = order_of(plan_order(rows, lengths, seed=1, shuffle=Shuffle.FULL), rows)
    nowhere = order_of(plan_order(rows, lengths, seed=1, shuffle=Shuffle.NONE), rows)
    assert spread(everywhere, rows, 32) > 0.98
    assert spread(default, rows, 32) > 0.95
    assert spread(nowhere, rows, 32) < 0.001


def test_epochs_and_windows_are_not_related() -> None:
    rows = np.full(512, 64, np.int64)
    plan = OrderPlan(1, Shuffle.WINDOW, 8, 8)
    epochs = np.array([ids(order_of(plan, rows, epoch), rows) for epoch in range(12)])
    correlations = np.asarray(np.corrcoef(epochs))[np.triu_indices(12, 1)]
    assert abs(correlations).max() < 5 / math.sqrt(512)
    # One lane without a phase: its windows are 8 blocks of 64 rows each, from the beginning on.
    single = replace(plan, lanes=1)
    moved = sequence_of(order_of(single, rows), rows, block_sequence(single, rows, 0)).reshape(64, 512)
    inside = moved - moved.min(axis=1, keepdims=True)
    correlations = np.asarray(np.corrcoef(inside))[np.triu_indices(64, 1)]
    assert abs(correlations).max() < 5 / math.sqrt(512)
    assert abs(correlations.mean()) < 5 / math.sqrt(512 * 2016)


@pytest.mark.parametrize("plan", [OrderPlan(1, Shuffle.WINDOW, 4, 2), OrderPlan(1, Shuffle.FULL, 3, 1)])
def test_a_row_is_at_any_position_equally_often(plan: OrderPlan) -> None:
    # Lanes begin with a block here. Where one begins inside a block, that is cut at the same row in every epoch.
    rows = np.full(8, 13, np.int64)
    epochs, count = 2000, int(rows.sum())
    some = np.array([0, 1, 44, count - 1])
    found = np.array([ids(order_of(plan, rows, epoch), rows, some) for epoch in range(epochs)])
    for column in found.T:
        chi_square = float(((np.bincount(column, minlength=count) - epochs / count) ** 2 / (epochs / count)).sum())
        assert abs(chi_square - (count - 1)) < 5 * math.sqrt(2 * (count - 1))
