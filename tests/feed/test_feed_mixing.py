"""Mixtures: exact over each stage, every pass of a stream whole, and positions where they are without a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UsageError
from millrace.core.model import digest_of
from millrace.feed.mixing import MixedOrder, Stage, Stream, largest_epoch, plan_streams, quotas
from millrace.feed.order import Order, OrderPlan, Shuffle

Int64s = npt.NDArray[np.int64]

weights_of_two = st.floats(0, 100).map(lambda w: round(w, 3))
layouts = st.lists(st.sampled_from([1, 2, 9, 30, 90]), min_size=1, max_size=25).map(
    lambda rows: np.array(rows, np.int64)
)


def streams_of(
    layouts: Sequence[Int64s], stages: Sequence[Stage], shuffle: Shuffle = Shuffle.WINDOW, **options: Any
) -> list[Stream]:
    tables = [(rows, rows * 100) for rows in layouts]
    plans = plan_streams(tables, stages, seed=options.pop("seed", 3), shuffle=shuffle, **options)
    return [Stream(plan, rows, f"m{k}") for k, (plan, rows) in enumerate(zip(plans, layouts, strict=True))]


def mixed(streams: Sequence[Stream], stages: Sequence[Stage], epoch: int = 0, seed: int = 5) -> MixedOrder:
    order: Order = MixedOrder(streams, stages, seed=seed, epoch=epoch)
    assert isinstance(order, MixedOrder)
    return order


def deal(order: MixedOrder, streams: Sequence[Stream], positions: Int64s | None = None) -> tuple[Int64s, Int64s]:
    """Of each position the stream, and the row's number in it."""
    found = order.locate(np.arange(order.rows) if positions is None else positions)
    ids = np.empty(len(found.block), np.int64)
    for k, stream in enumerate(streams):
        of = found.stream == k
        first = np.cumsum(stream.rows_per_block) - stream.rows_per_block
        assert (found.row[of] < stream.rows_per_block[found.block[of]]).all()
        ids[of] = first[found.block[of]] + found.row[of]
    return found.stream.astype(np.int64), ids


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Stream], list[Stage]]:
    count = draw(st.integers(1, 4))
    # An order is made for each pass, so streams of few rows and long stages would make thousands.
    rows = [draw(layouts.filter(lambda of: of.sum() >= 9)) for _ in range(count)]
    stages = [
        Stage(draw(st.integers(1, 500)), tuple(weights))
        for weights in draw(
            st.lists(
                st.lists(st.sampled_from([0, 0.001, 0.1, 1, 2.5, 7]), min_size=count, max_size=count).filter(any),
                min_size=1,
                max_size=3,
            )
        )
    ]
    shuffle = draw(st.sampled_from(Shuffle))
    options = {} if shuffle in (Shuffle.BLOCKS, Shuffle.NONE) else {"lanes": draw(st.integers(1, 70))}
    if shuffle is Shuffle.WINDOW:
        options["window"] = draw(st.integers(1, 5))
    return streams_of(rows, stages, shuffle, **options), stages


# --- quotas ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 10**12), st.lists(weights_of_two, min_size=1, max_size=6).filter(any))
def test_a_quota_is_its_share_to_within_a_row(rows: int, weights: list[float]) -> None:
    given_rows = quotas(Stage(rows, tuple(weights)))
    exact = [Fraction(str(weight)) for weight in weights]
    assert sum(given_rows) == rows
    for got, weight in zip(given_rows, exact, strict=True):
        share = rows * weight / sum(exact)
        assert abs(got - share) < 1
        assert got == share or share.denominator > 1


def test_quotas_are_what_one_would_write() -> None:
    assert quotas(Stage(10**6, (0.7, 0.3))) == (700_000, 300_000)
    assert quotas(Stage(10**6, (70, 30))) == (700_000, 300_000)
    assert quotas(Stage(10, (0.1, 0.2, 0.7))) == (1, 2, 7)
    assert quotas(Stage(10, (1, 1, 1))) == (4, 3, 3)
    assert quotas(Stage(1, (1, 2))) == (0, 1)
    assert quotas(Stage(5, (0, 3))) == (0, 5)


@settings(max_examples=50, deadline=None)
@given(mixtures())
def test_each_stage_is_exact(mixture: tuple[list[Stream], list[Stage]]) -> None:
    streams, stages = mixture
    order = mixed(streams, stages)
    assert order.rows == sum(stage.rows for stage in stages)
    stream, _ = deal(order, streams)
    begin = 0
    for stage in stages:
        counts = np.bincount(stream[begin : begin + stage.rows], minlength=len(streams))
        assert tuple(counts) == quotas(stage)
        begin += stage.rows


def test_every_stretch_is_near_its_weights() -> None:
    stages = [Stage(300_000, (0.7, 0.2, 0.1))]
    streams = streams_of([np.full(400, 1000, np.int64)] * 3, stages, lanes=16)
    stream, _ = deal(mixed(streams, stages), streams)
    windows = stream[: 300_000 // 4096 * 4096].reshape(-1, 4096)
    for k, weight in enumerate((0.7, 0.2, 0.1)):
        counts = (windows == k).sum(axis=1)
        # 16 lanes with 256 places each are one block of each lane: its numbers are rounded, not drawn.
        assert abs(counts - 4096 * weight).max() <= 16 * 2
        # Single batches are as a draw without replacement from them: varied, not a fixed pattern.
        batches = (stream[:299_968].reshape(-1, 32) == k).sum(axis=1)
        assert abs(batches.var() / (32 * weight * (1 - weight)) - 1) < 0.1


# --- bijections and passes ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(1, 3))
def test_every_pass_has_every_row_once(mixture: tuple[list[Stream], list[Stage]], epochs: int) -> None:
    streams, stages = mixture
    dealt = [deal(mixed(streams, stages, epoch), streams) for epoch in range(epochs)]
    for k, of in enumerate(streams):
        rows = int(of.rows_per_block.sum())
        counts = np.bincount(np.concatenate([ids[stream == k] for stream, ids in dealt]), minlength=rows)
        # Each lane takes the same rows in each epoch, and ends its passes for itself.
        order = mixed(streams, stages)
        lane = np.arange(order.rows) % order.lanes
        taken = np.bincount(lane[dealt[0][0] == k], minlength=order.lanes) * epochs
        assert counts.sum() == taken.sum()
        cuts = order.lane_cuts(k)
        passes = [(n // r, -(-n // r)) for n, r in zip(taken, np.diff(cuts), strict=True) if r]
        assert counts.min() >= min(whole for whole, _ in passes)
        assert counts.max() <= max(begun for _, begun in passes)


@settings(max_examples=50, deadline=None)
@given(st.lists(layouts, min_size=1, max_size=4), st.integers(1, 70))
def test_shares_in_proportion_are_one_pass_of_all(rows: list[Int64s], lanes: int) -> None:
    sizes = [int(r.sum()) for r in rows]
    weights = tuple(float(size) for size in sizes)
    assert largest_epoch(sizes, weights) == sum(sizes)
    stages = [Stage(sum(sizes), weights)]
    streams = streams_of(rows, stages, lanes=lanes)
    for epoch in (0, 1, 5):
        stream, ids = deal(mixed(streams, stages, epoch), streams)
        for k, size in enumerate(sizes):
            assert (np.sort(ids[stream == k]) == np.arange(size)).all()


@settings(deadline=None)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=4), st.data())
def test_the_largest_epoch_is_where_a_share_is_all_of_a_stream(sizes: list[int], data: st.DataObject) -> None:
    weight = st.sampled_from([0.0, 0.1, 0.25, 1.0, 3.0])
    weights = tuple(0.0 if size == 0 else data.draw(weight) for size in sizes)
    if not any(weights):
        return
    rows = largest_epoch(sizes, weights)
    assert all(n <= size for n, size in zip(quotas(Stage(rows, weights)), sizes, strict=True))
    shares = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    assert any((rows + 1) * share > size for share, size in zip(shares, sizes, strict=True))


def test_the_largest_epoch_has_no_row_twice() -> None:
    rows = [np.full(70, 100, np.int64), np.full(31, 100, np.int64), np.full(9, 13, np.int64)]
    weights = (0.7, 0.3, 0.004)
    stages = [Stage(largest_epoch([int(r.sum()) for r in rows], weights), weights)]
    streams = streams_of(rows, stages, lanes=16)
    stream, ids = deal(mixed(streams, stages), streams)
    assert all(np.bincount(ids[stream == k]).max() == 1 for k in range(3))


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.integers(0, 2**32))
def test_a_position_has_its_row_whatever_is_asked_beside_it(
    mixture: tuple[list[Stream], list[Stage]], seed: int
) -> None:
    streams, stages = mixture
    whole_stream, whole_ids = deal(mixed(streams, stages, 2), streams)
    some = np.random.default_rng(seed).integers(0, len(whole_ids), 30)
    order = mixed(streams, stages, 2)
    for part in (some, some[:1], some[::-1]):
        stream, ids = deal(order, streams, part)
        assert (stream == whole_stream[part]).all()
        assert (ids == whole_ids[part]).all()


def test_a_stream_keeps_to_its_lanes() -> None:
    # What a lane of the mixture has of a stream is the beginning of that stream's own lane.
    stages = [Stage(3000, (0.5, 0.5)), Stage(3000, (0.9, 0.1))]
    streams = streams_of([np.full(100, 100, np.int64)] * 2, stages, lanes=8, window=2)
    order = mixed(streams, stages)
    stream, ids = deal(order, streams)
    lane = np.arange(6000) % 8
    for k, number in ((0, 1500 + 2700), (1, 1500 + 300)):
        blocks = [set(ids[(stream == k) & (lane == own)] // 100) for own in range(8)]
        shared = sum(map(len, blocks)) - len(set().union(*blocks))
        assert shared <= 8
        # Every lane has read about its part of the blocks and a window more.
        assert sum(map(len, blocks)) <= number / 100 + 8 * 3


def test_two_streams_of_one_dataset_are_ordered_differently() -> None:
    stages = [Stage(2000, (1, 1))]
    rows = np.full(20, 50, np.int64)
    streams = [Stream(s.plan, rows, "same") for s in streams_of([rows, rows], stages, lanes=2)]
    stream, ids = deal(mixed(streams, stages), streams)
    assert (np.sort(ids[stream == 0]) == np.sort(ids[stream == 1])).all()
    assert (ids[stream == 0] != ids[stream == 1]).mean() > 0.9


def test_seeds_and_epochs_mix_differently() -> None:
    stages = [Stage(2000, (1, 1))]
    streams = streams_of([np.full(20, 50, np.int64)] * 2, stages, lanes=4)
    patterns = {tuple(deal(mixed(streams, stages, epoch, seed), streams)[0]) for seed in range(3) for epoch in range(3)}
    assert len(patterns) == 9


def test_the_mixture_stays_what_it_is() -> None:
    """This changes with ORDER_VERSION alone."""
    stages = [Stage(700, (0.7, 0.3)), Stage(900, (0.5, 0.5))]
    streams = streams_of([np.full(20, 33, np.int64), np.array([1, 99, 65] * 4)], stages, lanes=4, window=2)
    stream, ids = deal(mixed(streams, stages, epoch=1), streams)
    assert digest_of((stream * 10**6 + ids).astype("<i8").tobytes())[:16] == "a1b5fd0e4322f30c"


def test_the_fingerprint_is_of_what_decides() -> None:
    rows = [np.full(20, 50, np.int64)] * 2
    stages = [Stage(1000, (0.7, 0.3))]
    streams = streams_of(rows, stages, lanes=4)
    first = mixed(streams, stages).fingerprint
    assert mixed(streams, stages, epoch=9).fingerprint == first
    assert mixed(streams, [Stage(1000, (7, 3))]).fingerprint == first
    others = [
        mixed(streams, stages, seed=6),
        mixed(streams, [Stage(1000, (0.6, 0.4))]),
        mixed(streams, [Stage(999, (0.7, 0.3))]),
        mixed(streams, [Stage(500, (0.7, 0.3))] * 2),
        mixed([streams[0], Stream(streams[1].plan, rows[1], "other")], stages),
        mixed(streams_of(rows, stages, lanes=2), stages),
        mixed(streams_of(rows, stages, lanes=4, seed=4), stages),
    ]
    assert len({first, *(other.fingerprint for other in others)}) == 8


# --- planning and refusals ------------------------------------------------------------------------------------------


def test_streams_are_planned_with_one_number_of_lanes() -> None:
    large, small = np.full(1000, 100, np.int64), np.full(9, 100, np.int64)
    tables = [(large, large * 10_000), (small, small * 10_000)]
    plans = plan_streams(tables, [Stage(1000, (1, 1))], seed=1, shuffle=Shuffle.WINDOW)
    assert [plan.lanes for plan in plans] == [64, 64]
    # Both windows together are within what one dataset's may take.
    assert sum(64 * plan.window * 10**6 for plan in plans) <= 288_000_000
    # 10 rows in 64 lanes would leave some of them empty.
    tiny = np.full(2, 5, np.int64)
    tables[1] = (tiny, tiny)
    plans = plan_streams(tables, [Stage(1000, (1, 1))], seed=1, shuffle=Shuffle.WINDOW)
    assert plans[0].lanes == plans[1].lanes <= 8
    assert plan_streams(tables, [Stage(9, (1, 1))], seed=1, shuffle=Shuffle.NONE) == (
        OrderPlan(1, Shuffle.NONE, 1, 1),
        OrderPlan(1, Shuffle.NONE, 1, 1),
    )


@pytest.mark.parametrize(
    ("rows", "weights", "words"),
    [
        (0, (1,), "rows=0"),
        (1.5, (1,), "rows=1.5"),
        (True, (1,), "rows=True"),
        (1 << 51, (1,), "rows="),
        (5, (1, -0.5), r"weights\[1\]=-0.5"),
        (5, (float("nan"), 1), r"weights\[0\]=nan"),
        (5, (1, 2, float("inf")), r"weights\[2\]=inf"),
        (5, (True, 1), r"weights\[0\]=True"),
        (5, ("1", 1), r"weights\[0\]='1'"),
        (5, (0, 0.0), "all weights of a stage are 0"),
        (5, (), "all weights of a stage are 0"),
    ],
)
def test_a_stage_that_cant_be_is_refused_by_name(rows: Any, weights: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Stage(rows, weights)


def test_a_mixture_that_cant_be_is_refused_by_name() -> None:
    rows = [np.full(20, 50, np.int64)] * 2
    stages = [Stage(1000, (0.7, 0.3))]
    streams = streams_of(rows, stages, lanes=4)
    with pytest.raises(UsageError, match="2 weights in each stage, not 3"):
        mixed(streams, [Stage(10, (1, 1, 1))])
    with pytest.raises(UsageError, match="2 weights in each stage, not 1"):
        largest_epoch([5, 5], (1,))
    with pytest.raises(UsageError, match="at least one stage"):
        mixed(streams, [])
    with pytest.raises(UsageError, match="at least one stream"):
        mixed([], stages)
    with pytest.raises(UsageError, match="plan them together"):
        mixed([streams[0], streams_of(rows, stages, lanes=2)[1]], stages)
    nothing = np.empty(0, np.int64)
    with pytest.raises(UsageError, match=r"stream 1 has a weight of 0\.3 but no rows"):
        plan_streams([(rows[0], rows[0]), (nothing, nothing)], stages, seed=1, shuffle=Shuffle.WINDOW)
    with pytest.raises(UsageError, match="stream 0 has a weight of 1 but no rows"):
        largest_epoch([0, 5], (1, 1))
    with pytest.raises(UsageError, match="seed=-1"):
        mixed(streams, stages, seed=-1)
    with pytest.raises(UsageError, match="too few rows for 4 lanes"):
        mixed([streams[0], Stream(streams[1].plan, np.array([2]), "m")], stages)
    with pytest.raises(IndexError, match="0 to 999"):
        mixed(streams, stages).locate(np.array([1000]))
