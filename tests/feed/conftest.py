"""Datasets in memory: a strict small implementation of what a feed reads from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.errors import MillraceError
from millrace.core.manifest import BlockTable, Segment
from millrace.core.model import Digest, block_digest, digest_of
from millrace.core.ports import Bytes
from millrace.feed.background import Background
from millrace.feed.blocks import LocalBlocks
from millrace.feed.columns import columns_of
from millrace.feed.index import build_index
from millrace.feed.loader import Loader
from millrace.feed.order import ORDER_VERSION, EpochOrder, Order, Shuffle, parse_shuffle, plan_order
from millrace.feed.receipt import Traffic
from millrace.feed.recipe import Recipe
from millrace.feed.share import Sharing


class MemorySource:
    """Blocks in memory, as plain Arrow messages; each fetch is counted, and can be made to fail.

    Attributes:
        fetched: Blocks, in the order they were asked for.
        broken: Block to the error it raises.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = list(batches)
        self.messages = [bytes(memoryview(b.serialize())) for b in batches]
        self.fetched: list[int] = []
        self.broken: dict[int, MillraceError] = {}
        rows = np.array([b.num_rows for b in batches], np.int64)
        lengths = np.array([len(m) for m in self.messages], np.int64)
        digests = np.array([list(bytes.fromhex(block_digest(m))) for m in self.messages], np.uint8).reshape(-1, 32)
        shard = digest_of(*self.messages)
        table = BlockTable(
            shards=np.zeros(len(batches), np.int32),
            offsets=np.concatenate([[0], np.cumsum(lengths)])[:-1].astype(np.int64),
            lengths=lengths,
            rows=rows,
            digests=digests,
        )
        segment = Segment(
            np.frombuffer(bytes.fromhex(shard), np.uint8).reshape(1, 32),
            lengths.sum(keepdims=True),
            rows.sum(keepdims=True),
        )
        schema = batches[0].schema if batches else pa.schema([])
        self.index = build_index(Digest(digest_of(b"manifest", *self.messages)), schema, "arrow", [(segment, table)])

    def name(self, block: int) -> str:
        return str(self.index.digests[block].tobytes().hex())

    async def fetch(self, block: int) -> Sequence[Bytes]:
        self.fetched.append(block)
        if block in self.broken:
            raise self.broken[block]
        return [self.messages[block]]


class StillClock:
    """A clock that stands."""

    def now_ms(self) -> int:
        return 1_700_000_000_000

    def monotonic_s(self) -> float:
        return 0.0


@pytest.fixture(scope="session")
def background() -> Iterator[Background]:
    made = Background("test-feed")
    yield made
    made.close()


@pytest.fixture
def source_of() -> Callable[[Sequence[pa.RecordBatch]], MemorySource]:
    return MemorySource


MakeLoader = Callable[..., Loader]


@pytest.fixture
def make_loader(background: Background) -> Iterator[MakeLoader]:
    """Loaders over a :class:`MemorySource`; they are closed at the end."""
    made: list[Loader] = []

    def make(
        source: MemorySource,
        batch_size: int = 4,
        *,
        seed: int = 1,
        shuffle: bool | str = True,
        rank: int = 0,
        world_size: int = 1,
        replication: int = 1,
        drop_last: bool = False,
        columns: Sequence[str] | None = None,
        decode: Mapping[str, Callable[[Any], Any]] | None = None,
        arrow: bool = False,
        lanes: int | None = None,
        window: int | None = None,
        window_rows: int = 1024,
        memory: int = 10_000_000,
        ahead: int = 1_000_000,
        cache: LocalBlocks | None = None,
        quarantine: float = 1.0,
        traffic: Callable[[], Sequence[Traffic]] = tuple,
        keep: bool = True,
    ) -> Loader:
        index = source.index
        mode = parse_shuffle(shuffle)
        plan = plan_order(index.rows, index.lengths, seed=seed, shuffle=mode, lanes=lanes, window=window)

        def order(epoch: int) -> Order:
            return EpochOrder(plan, index.rows, manifest=index.manifest, epoch=epoch)

        recipe = Recipe(
            sources=(source,),
            labels=("memory@1",),
            schema=index.schema,
            columns=columns_of(index.schema, columns, as_arrow=arrow),
            decode=decode or {},
            order=order,
            identity={
                "datasets": [index.manifest],
                "seed": seed,
                "shuffle": mode.value,
                "lanes": plan.lanes,
                "window": [plan.window],
                "order": ORDER_VERSION,
                "mix": None,
            },
            sharing=Sharing(batch_size, rank, world_size, replication, drop_last),
            finish=None if arrow else (lambda batch: batch),
            in_place=mode in {Shuffle.BLOCKS, Shuffle.NONE},
            window_rows=window_rows,
            memory_bytes=memory,
            ahead_bytes=ahead,
            quarantine=quarantine,
        )
        loader = Loader(recipe, cache=cache, background=background, clock=StillClock(), traffic=traffic, events=[])
        if keep:
            made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()
