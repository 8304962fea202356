"""When blocks come up again: as the next epoch's order says, at the rate the loop goes."""

from __future__ import annotations

import numpy as np
import pytest

from millrace.feed.foresight import Foresight
from millrace.feed.mixing import MixedOrder, Stage, Stream, plan_streams
from millrace.feed.order import EpochOrder, Order, Shuffle, plan_order
from millrace.feed.state import Place

ROWS = np.random.default_rng(1).integers(1, 60, 300).astype(np.int64)
TOTAL = int(ROWS.sum())


class Ticks:
    """A clock that is set."""

    def __init__(self) -> None:
        self.s = 100.0

    def now_ms(self) -> int:
        return 1_000_000 + int(self.s * 1000)

    def monotonic_s(self) -> float:
        return self.s


def order_of(shuffle: Shuffle, epoch: int) -> EpochOrder:
    plan = plan_order(ROWS, ROWS * 100, seed=3, shuffle=shuffle)
    return EpochOrder(plan, ROWS, manifest="m", epoch=epoch)


@pytest.mark.parametrize("shuffle", list(Shuffle))
def test_first_positions_are_never_late(shuffle: Shuffle) -> None:
    order = order_of(shuffle, 1)
    blocks = order.locate(np.arange(order.rows)).block
    first = np.full(len(ROWS), order.rows)
    np.minimum.at(first, blocks, np.arange(order.rows))
    assert (order.first_positions() <= first).all()
    if shuffle in {Shuffle.BLOCKS, Shuffle.NONE}:
        assert (order.first_positions() == first).all()


def test_needs_are_the_next_epoch_s_places_in_time() -> None:
    clock = Ticks()

    def order(epoch: int) -> Order:
        return order_of(Shuffle.BLOCKS, epoch)

    foresight = Foresight(order, clock)
    foresight.begin(Place(4, 1000), TOTAL)
    clock.s += 50.0
    foresight.at(Place(4, 2000))  # 0.05 s a row
    blocks = list(range(0, 300, 7))
    expected = clock.now_ms() / 1000 + 0.05 * (TOTAL - 2000 + order(5).first_positions()[blocks])
    np.testing.assert_allclose(foresight.needs(blocks), expected)


def test_streams_of_a_mixture_come_up_by_their_share() -> None:
    stages = (Stage(TOTAL, (3, 1)),)
    plans = plan_streams([(ROWS, ROWS * 100)] * 2, stages, seed=3, shuffle=Shuffle.BLOCKS)
    streams = [Stream(plan, ROWS, "m") for plan in plans]
    order = MixedOrder(streams, stages, seed=3, epoch=0)
    found = order.first_positions()
    assert len(found) == 600
    located = order.locate(np.arange(order.rows))
    first = np.full(600, order.rows)
    np.minimum.at(first, located.stream * 300 + located.block, np.arange(order.rows))
    seen = first < order.rows
    assert (found[~seen] > order.rows * 0.9).all()
    assert np.abs(found[seen] - first[seen]).max() < 0.1 * order.rows
