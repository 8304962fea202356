"""Stop anywhere, resume on another number of ranks and workers: the same rows at the same steps in the same order.

In this process, over datasets in memory, so that Hypothesis can try many layouts; real worker processes are in
``tests/torch``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.feed.background import Background
from millrace.feed.columns import columns_of
from millrace.feed.loader import Loader
from millrace.feed.order import ORDER_VERSION, EpochOrder, Order, Shuffle, parse_shuffle, plan_order
from millrace.feed.receipt import merge_receipts
from millrace.feed.recipe import Recipe
from millrace.feed.share import Sharing
from millrace.feed.tally import RowTally

WORLDS = 9
STEPS = 9

SourceOf = Callable[[Sequence[pa.RecordBatch]], Any]


class StillClock:
    """A clock that stands."""

    def now_ms(self) -> int:
        return 0

    def monotonic_s(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Feed:
    """A dataset's layout, and how it is fed.

    Attributes:
        blocks: Rows of each block.
        lanes, window: Of the order; None for what the layout asks for.
    """

    blocks: tuple[int, ...]
    batch_size: int
    seed: int
    shuffle: str
    lanes: int | None
    window: int | None
    drop_last: bool
    epoch: int

    @property
    def rows(self) -> int:
        return sum(self.blocks)


@st.composite
def feeds(draw: st.DrawFn) -> Feed:
    blocks = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=12)))
    rows = sum(blocks)
    batch_size = draw(st.integers(-(-rows // STEPS), rows + 3))
    shuffle = draw(st.sampled_from(["window", "full", "blocks", "none"]))
    laned = shuffle in {"window", "full"}
    return Feed(
        blocks,
        batch_size,
        seed=draw(st.integers(0, 2**64 - 1)),
        shuffle=shuffle,
        lanes=draw(st.none() | st.sampled_from([1, 2, 4, 16])) if laned else None,
        window=draw(st.none() | st.sampled_from([1, 2, 8])) if shuffle == "window" else None,
        drop_last=draw(st.booleans()) and rows >= batch_size,
        epoch=draw(st.integers(0, 3)),
    )


@dataclass(frozen=True)
class World:
    """How many ranks there are, and how many of them share rows."""

    size: int
    replication: int = 1


def worlds(feed: Feed) -> st.SearchStrategy[World]:
    """Those in which each group of ranks gets a row of a whole batch."""
    possible = [
        World(size, k)
        for size in range(1, WORLDS + 1)
        for k in range(1, size + 1)
        if size % k == 0 and size // k <= feed.batch_size
    ]
    return st.sampled_from(possible)


class Bench:
    """Loaders of one feed, in any world."""

    def __init__(self, feed: Feed, source: Any, background: Background) -> None:
        self.feed = feed
        self.source = source
        self.background = background
        index = source.index
        self.plan = plan_order(
            index.rows,
            index.lengths,
            seed=feed.seed,
            shuffle=parse_shuffle(feed.shuffle),
            lanes=feed.lanes,
            window=feed.window,
        )
        self._made: list[Loader] = []

    def order(self, epoch: int) -> Order:
        index = self.source.index
        return EpochOrder(self.plan, index.rows, manifest=index.manifest, epoch=epoch)

    def loader(self, rank: int, world: World) -> Loader:
        index, plan = self.source.index, self.plan
        recipe = Recipe(
            sources=(self.source,),
            labels=("memory@1",),
            schema=index.schema,
            columns=columns_of(index.schema, None),
            decode={},
            order=self.order,
            identity={
                "datasets": [index.manifest],
                "seed": plan.seed,
                "shuffle": plan.shuffle.value,
                "lanes": plan.lanes,
                "window": [plan.window],
                "order": ORDER_VERSION,
                "mix": None,
            },
            sharing=Sharing(self.feed.batch_size, rank, world.size, world.replication, self.feed.drop_last),
            finish=lambda batch: batch,
            in_place=plan.shuffle in {Shuffle.BLOCKS, Shuffle.NONE},
            window_rows=64,
            memory_bytes=1_000_000,
            ahead_bytes=0,
            quarantine=0.0,
        )
        loader = Loader(
            recipe, cache=None, background=self.background, clock=StillClock(), traffic=lambda: (), events=[]
        )
        self._made.append(loader)
        return loader

    def ranks(self, world: World) -> list[Loader]:
        return [self.loader(rank, world) for rank in range(world.size)]

    def steps(self) -> list[list[int]]:
        """The ids of each step, in the global order: from the order alone."""
        order = self.order(self.feed.epoch)
        size = self.feed.batch_size
        end = order.rows // size * size if self.feed.drop_last else order.rows
        found = order.locate(np.arange(end))
        ids = (self.source.index.first_rows[found.block] + found.row).tolist()
        return [ids[a : a + size] for a in range(0, end, size)]

    def close(self) -> None:
        for loader in self._made:
            loader.close()


@contextlib.contextmanager
def bench(feed: Feed, source_of: SourceOf, background: Background) -> Iterator[Bench]:
    edges = np.cumsum([0, *feed.blocks])
    batches = [
        pa.record_batch({"id": pa.array(np.arange(a, b), pa.int64())}) for a, b in itertools.pairwise(edges.tolist())
    ]
    made = Bench(feed, source_of(batches), background)
    try:
        yield made
    finally:
        made.close()


def in_order(shares: Sequence[Sequence[int]], step: Sequence[int], world: World) -> list[int]:
    """The rows that ranks were given of one step, in the global order.

    Each rank has its rows in that order, and ranks of a group have the same.
    """
    place = {row: i for i, row in enumerate(step)}
    for rank, share in enumerate(shares):
        assert list(share) == sorted(share, key=place.__getitem__)
        assert list(share) == list(shares[rank // world.replication * world.replication])
    return sorted(itertools.chain(*shares[:: world.replication]), key=place.__getitem__)


def rest_of(ranks: Sequence[Loader], steps: Sequence[Sequence[int]], world: World) -> list[list[int]]:
    """What is left of the epoch, in the global order; ``steps`` says what that is."""
    rest = [[batch["id"].tolist() for batch in step] for step in zip(*ranks, strict=True)]
    return [in_order(shares, step, world) for shares, step in zip(rest, steps, strict=True)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feed=feeds(), data=st.data())
def test_stopped_at_every_step_and_resumed_in_another_world(
    feed: Feed, data: st.DataObject, source_of: SourceOf, background: Background
) -> None:
    before, after = data.draw(worlds(feed), "before"), data.draw(worlds(feed), "after")
    with bench(feed, source_of, background) as made:
        steps = made.steps()
        firsts, seconds = made.ranks(before), made.ranks(after)
        for loader in firsts:
            loader.set_epoch(feed.epoch)
        loops = [iter(loader) for loader in firsts]
        expected = firsts[0].expected(feed.epoch)
        for stop, step in enumerate(steps):
            states = [json.loads(json.dumps(loader.state_dict())) for loader in firsts]
            assert all(state == states[0] for state in states)
            parts = [loader.receipt() for loader in firsts]
            for loader in seconds:
                loader.load_state_dict(states[0])
            assert rest_of(seconds, steps[stop:], after) == steps[stop:]
            assert merge_receipts([*parts, *(loader.receipt() for loader in seconds)]).proof == expected.proof
            assert in_order([next(loop)["id"].tolist() for loop in loops], step, before) == step
        assert all(next(loop, None) is None for loop in loops)
        assert merge_receipts([loader.receipt() for loader in firsts]).complete
        assert {(loader.epoch, loader.position) for loader in firsts} == {(feed.epoch + 1, 0)}


def test_from_each_world_to_each_other_at_every_step(source_of: SourceOf, background: Background) -> None:
    """Every world has the same states, and goes on from each of them with the same rows: so any two fit together."""
    feed = Feed((8, 3, 8, 8, 1, 8, 8), 9, 11, "window", 4, 2, drop_last=False, epoch=1)
    with bench(feed, source_of, background) as made:
        steps = made.steps()
        states: list[Any] = []
        for size in range(1, WORLDS + 1):
            ranks = made.ranks(World(size))
            for rank in ranks:
                rank.set_epoch(feed.epoch)
            found = [[ranks[0].state_dict()] * size]
            for step in zip(steps, *ranks, strict=True):
                assert in_order([batch["id"].tolist() for batch in step[1:]], step[0], World(size)) == step[0]
                found.append([rank.state_dict() for rank in ranks])
            assert all(of_a_step == [of_a_step[0]] * size for of_a_step in found)
            states = states or [of_a_step[0] for of_a_step in found]
            assert [of_a_step[0] for of_a_step in found] == states
            for stop, state in enumerate(states[:-1]):
                for rank in ranks:
                    rank.load_state_dict(state)
                assert rest_of(ranks, steps[stop:], World(size)) == steps[stop:]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feed=feeds(), workers=st.integers(1, 5), data=st.data())
def test_workers_share_a_ranks_steps(
    feed: Feed, workers: int, data: st.DataObject, source_of: SourceOf, background: Background
) -> None:
    """Worker ``w`` of ``N`` makes every ``N``-th step from wherever the rank stands; their account adds up."""
    world = data.draw(worlds(feed), "world")
    rank = data.draw(st.integers(0, world.size - 1), "rank")
    with bench(feed, source_of, background) as made:
        alone = made.loader(rank, world)
        alone.set_epoch(feed.epoch)
        stop = data.draw(st.integers(0, len(alone) - 1), "stop")
        loop = iter(alone)
        for _ in range(stop):
            next(loop)
        shared = [made.loader(rank, world) for _ in range(workers)]
        for loader in shared:
            loader.load_state_dict(alone.state_dict())
        before = alone.receipt()
        parts = [loader.part_of(w, workers) for w, loader in enumerate(shared)]
        tally = RowTally.from_hex(before.rows, before.digest)
        for n in range(len(alone) - stop):
            assert next(parts[n % workers])["id"].tolist() == next(loop)["id"].tolist()
            part = shared[n % workers].take_part()
            tally.merge(RowTally.from_hex(part.rows, part.digest))
            assert (tally.rows, tally.hexdigest()) == (alone.receipt().rows, alone.receipt().digest)
        for loader, rest in zip(shared, parts, strict=True):
            assert next(rest, None) is None
            assert (loader.epoch, loader.position) == (alone.epoch, alone.position) == (feed.epoch + 1, 0)
