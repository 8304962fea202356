"""Shares: every world size takes the same batches apart, each row to one rank, each rank to its own lanes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UsageError
from millrace.feed.order import EpochOrder, Shuffle, plan_order
from millrace.feed.share import Sharing

Int64s = npt.NDArray[np.int64]


def shares(sharing: Sharing, first: int, steps: int, rows: int, lanes: int) -> list[list[int]]:
    positions, bounds = sharing.positions(first, steps, rows=rows, lanes=lanes)
    assert positions.dtype == bounds.dtype == np.int64
    assert bounds.shape == (steps + 1,)
    assert (bounds[0], bounds[-1]) == (0, len(positions))
    return [positions[a:b].tolist() for a, b in itertools.pairwise(bounds)]


def plainly(sharing: Sharing, step: int, rows: int, lanes: int) -> list[int]:
    """The rule as it is told: sort a batch by the reversed bits of the lane, cut it into equal parts, keep one."""
    whole = rows // sharing.batch_size * sharing.batch_size
    limit = whole if sharing.drop_last else rows
    batch = range(min(step * sharing.batch_size, limit), min((step + 1) * sharing.batch_size, limit))
    width = len(f"{lanes - 1:b}")
    by_lane = sorted(batch, key=lambda position: f"{position % lanes:0{width}b}"[::-1])
    group, groups = sharing.rank // sharing.replication, sharing.world_size // sharing.replication
    return sorted(by_lane[group * len(batch) // groups : (group + 1) * len(batch) // groups])


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(0, 40),
    st.integers(0, 300),
    st.integers(1, 70),
    st.booleans(),
    st.data(),
)
def test_it_is_the_rule(
    groups: int, replication: int, more: int, rows: int, lanes: int, drop_last: bool, data: st.DataObject
) -> None:
    world = groups * replication
    sharing = Sharing(groups + more, data.draw(st.integers(0, world - 1)), world, replication, drop_last)
    if drop_last and 0 < rows < sharing.batch_size:
        return
    steps = sharing.steps(rows)
    first = data.draw(st.integers(0, steps + 1))
    asked = data.draw(st.integers(0, steps + 2))
    got = shares(sharing, first, asked, rows, lanes)
    assert got == [plainly(sharing, first + step, rows, lanes) for step in range(asked)]


@pytest.mark.parametrize("world", range(1, 10))
@pytest.mark.parametrize(("batch", "rows", "lanes"), [(9, 100, 8), (32, 1000, 64), (64, 1000, 16), (50, 333, 7)])
def test_every_world_has_the_same_batches(world: int, batch: int, rows: int, lanes: int) -> None:
    for replication in (r for r in (1, 2, 3) if world % r == 0):
        of = [
            shares(Sharing(batch, rank, world, replication), 0, -(-rows // batch), rows, lanes) for rank in range(world)
        ]
        for step in range(-(-rows // batch)):
            groups = [of[rank][step] for rank in range(0, world, replication)]
            expected = list(range(step * batch, min(rows, (step + 1) * batch)))
            assert sorted(position for group in groups for position in group) == expected
            assert max(map(len, groups)) - min(map(len, groups)) <= 1
            assert all(of[rank][step] == groups[rank // replication] for rank in range(world))
            assert all(group == sorted(group) for group in groups)


def test_steps_are_counted_with_and_without_the_last() -> None:
    assert [Sharing(10).steps(rows) for rows in (0, 1, 10, 11, 20)] == [0, 1, 1, 2, 2]
    assert [Sharing(10, drop_last=True).steps(rows) for rows in (0, 10, 11, 20)] == [0, 1, 1, 2]
    with pytest.raises(UsageError, match="make batch_size at most 9"):
        Sharing(10, drop_last=True).steps(9)


def test_a_rank_keeps_to_its_lanes() -> None:
    # Batches of whole rounds through the lanes: each rank has its lanes and no others, at any step.
    for world in (2, 4, 8, 64):
        for rank in (0, world - 1):
            positions, _ = Sharing(128, rank, world).positions(3, 50, rows=10**6, lanes=64)
            lanes = {int(f"{n:06b}"[::-1], 2) for n in range(rank * 64 // world, (rank + 1) * 64 // world)}
            assert set((positions % 64).tolist()) == lanes


@pytest.mark.parametrize(("batch", "world", "most"), [(96, 3, 1.04), (1000, 8, 1.0), (84, 12, 1.25), (500, 4, 1.0)])
def test_borders_between_ranks_stay_where_they_are(batch: int, world: int, most: float) -> None:
    # Sorted by the number of the lane these were 1.5, 1.22, 3.0 and 1.13.
    lanes = 0
    for rank in range(world):
        positions, _ = Sharing(batch, rank, world).positions(0, 64, rows=10**6, lanes=64)
        lanes += len(np.unique(positions % 64))
    assert lanes / 64 <= most


def test_nodes_read_about_their_share_once() -> None:
    rows = np.full(2000, 50, np.int64)
    plan = plan_order(rows, rows * 4096, seed=1, shuffle=Shuffle.WINDOW)
    order = EpochOrder(plan, rows, manifest="m", epoch=0)
    block = order.locate(np.arange(order.rows)).block
    read: dict[int, float] = {}
    for world in (1, 2, 4, 8, 64):
        touched = 0
        for rank in range(world):
            positions, _ = Sharing(1024, rank, world).positions(0, 10**3, rows=order.rows, lanes=order.lanes)
            touched += len(np.unique(block[positions]))
        read[world] = touched / len(rows)
    # Lanes end inside blocks: one more block for each border between ranks. The last, short step isn't cut at lanes.
    assert read[1] == 1.0
    assert read[8] < 1.05
    assert read[64] < 1.3
    assert list(read.values()) == sorted(read.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"world_size": 0}, "world_size=0"),
        ({"world_size": -2}, "world_size=-2"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": 4, "world_size": 4}, "ranks are 0 to 3"),
        ({"replication": 0}, "replication=0"),
        ({"world_size": 6, "replication": 4}, "isn't a multiple of replication=4"),
        ({"batch_size": 7, "world_size": 8}, "make batch_size at least 8"),
        ({"batch_size": 3, "world_size": 8, "replication": 2}, "make batch_size at least 4"),
    ],
)
def test_what_cant_be_shared_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sharing(**{"batch_size": 32, **options})
