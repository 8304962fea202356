"""persist: the manifest's digest is that of the shards in chunk order, and receipts lie on pages beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import NoSpace, PolicyRefused
from millrace.core.keys import manifest_key, segment_key
from millrace.core.manifest import SEGMENT_SHARDS, decode_blocks, decode_root, decode_segment
from millrace.core.model import Block, ChunkOutput, Digest, Receipt, Shard, block_digest, digest_of, shard_key
from millrace.core.ports import Bytes, ObjectInfo, Store
from millrace.pipeline.distribute import Distributor
from millrace.pipeline.persist import Persisted, persist
from millrace.stores.keys import PutMode
from millrace.stores.memory import MemoryStore

SCHEMA = pa.schema([("path", pa.string())])
SCHEMA_BYTES = bytes(memoryview(SCHEMA.serialize()))


class StillClock:
    """Always the same time."""

    def now_ms(self) -> int:
        return 1_700_000_000_000

    def monotonic_s(self) -> float:
        return 0.0


def everywhere(_digest: Digest, _keep: Collection[str], without: Collection[str]) -> Sequence[str]:
    return [name for name in ("a", "b", "c") if name not in without]


def a_shard(number: int) -> Shard:
    blocks = (Block(8, 100, 10, block_digest(b"%d/0" % number)), Block(108, 90, 7, block_digest(b"%d/1" % number)))
    return Shard(digest_of(b"%d" % number), 400 + number, 17, blocks)


def output(chunk: int, shards: Sequence[Shard], *, stores: Sequence[str] = ("a", "b"), at_ms: int = 5) -> ChunkOutput:
    receipts = tuple(Receipt(s.digest, store, at_ms + chunk) for s in shards for store in stores)
    return ChunkOutput(chunk, SCHEMA_BYTES if shards else b"", tuple(shards), receipts, 17 * len(shards), 100, 0, 0)


async def in_order(outputs: Sequence[ChunkOutput]) -> AsyncIterator[ChunkOutput]:
    for one in outputs:
        yield one


def persisted(outputs: Sequence[ChunkOutput], stores: dict[str, Store] | None = None) -> tuple[Persisted, Store]:
    held: dict[str, Store] = stores or {name: MemoryStore(name) for name in ("a", "b", "c")}

    async def main() -> Persisted:
        return await persist(in_order(outputs), 1024, Distributor(held, everywhere, StillClock()))

    return asyncio.run(main()), next(iter(held.values()))


def read(store: Store, key: str) -> memoryview:
    return asyncio.run(store.get(key))


def shards_of(made: Persisted, store: Store) -> list[Shard]:
    """Every shard of a manifest, read from one store as a reader would."""
    root = decode_root(read(store, manifest_key(made.manifest)))
    found: list[Shard] = []
    for ref in root.segments:
        segment = decode_segment(read(store, segment_key(ref.digest)))
        blocks = decode_blocks(read(store, segment_key(ref.blocks)), ref.shards)
        found += [
            Shard(segment.digest(i), int(segment.sizes[i]), int(segment.rows[i]), blocks[i])
            for i in range(len(segment))
        ]
    return found


def test_a_manifest_names_every_shard_in_chunk_order() -> None:
    outputs = [output(0, [a_shard(3), a_shard(1)]), output(1, []), output(2, [a_shard(2)])]
    made, store = persisted(outputs)
    assert shards_of(made, store) == [a_shard(3), a_shard(1), a_shard(2)]
    root = decode_root(read(store, manifest_key(made.manifest)))
    assert (root.schema, root.block_rows) == (SCHEMA, 1024)
    assert (root.rows, root.shards, root.bytes) == (51, 3, 403 + 401 + 402)
    assert (made.rows, made.shards, made.bytes) == (51, 3, 403 + 401 + 402)


def test_receipts_go_onto_the_page_of_their_segment() -> None:
    made, _ = persisted([output(0, [a_shard(0)], stores=("a", "c")), output(1, [a_shard(1)], stores=("b",))])
    (page,) = made.pages
    assert [(e.digest, e.key, e.size_bytes, e.stores) for e in page.entries] == [
        (a_shard(0).digest, shard_key(a_shard(0).digest), 400, {"a": 5, "c": 5}),
        (a_shard(1).digest, shard_key(a_shard(1).digest), 401, {"b": 6}),
    ]


def test_the_manifests_own_objects_are_replicated_and_on_the_meta_page() -> None:
    stores: dict[str, Store] = {name: MemoryStore(name) for name in ("a", "b", "c")}
    made, _ = persisted([output(0, [a_shard(0)])], stores)
    assert [e.key for e in made.meta.entries][-1] == manifest_key(made.manifest)
    assert len(made.meta.entries) == 3
    for entry in made.meta.entries:
        assert entry.stores == {"a": 1_700_000_000_000, "b": 1_700_000_000_000, "c": 1_700_000_000_000}
        for store in stores.values():
            data = read(store, entry.key)
            assert (digest_of(data), len(data)) == (entry.digest, entry.size_bytes)


@pytest.mark.parametrize("count", [SEGMENT_SHARDS - 1, SEGMENT_SHARDS, SEGMENT_SHARDS + 1, 2 * SEGMENT_SHARDS + 5])
def test_a_segment_holds_so_many_shards_and_no_more(count: int) -> None:
    every = [a_shard(i) for i in range(count)]
    outputs = [output(i, every[at : at + 500]) for i, at in enumerate(range(0, count, 500))]
    made, store = persisted(outputs)
    root = decode_root(read(store, manifest_key(made.manifest)))
    full, rest = divmod(count, SEGMENT_SHARDS)
    assert [s.shards for s in root.segments] == [SEGMENT_SHARDS] * full + [rest] * bool(rest)
    assert [len(p.entries) for p in made.pages] == [s.shards for s in root.segments]
    assert shards_of(made, store) == every
    assert len(made.meta.entries) == 2 * len(root.segments) + 1


def test_no_shards_are_a_dataset_too() -> None:
    for outputs in ([], [output(0, []), output(1, [])]):
        made, store = persisted(outputs)
        root = decode_root(read(store, manifest_key(made.manifest)))
        assert (root.schema, root.segments, root.rows, root.shards) == (None, (), 0, 0)
        assert made.pages == ()
        assert len(made.meta.entries) == 1
    assert persisted([])[0].manifest == persisted([output(0, [])])[0].manifest


def test_a_shard_two_chunks_made_alike_is_listed_twice_with_all_its_receipts() -> None:
    same = a_shard(0)
    made, store = persisted([output(0, [same], stores=("a", "b")), output(1, [same], stores=("b", "c"))])
    assert shards_of(made, store) == [same, same]
    assert [e.stores for e in made.pages[0].entries] == [{"a": 5, "b": 6, "c": 6}] * 2


@given(st.lists(st.lists(st.integers(0, 50), max_size=4), max_size=6), st.integers(0, 10**6))
def test_the_digest_depends_on_the_shards_alone(numbers: list[list[int]], at_ms: int) -> None:
    """Not on where replicas lie, when they were read back, or how the shards fall on chunks."""
    outputs = [output(i, [a_shard(n) for n in chunk]) for i, chunk in enumerate(numbers)]
    expected = persisted(outputs)[0].manifest
    elsewhere = [output(o.chunk, o.shards, stores=("c",), at_ms=at_ms) for o in outputs]
    assert persisted(elsewhere)[0].manifest == expected
    one_chunk = [output(0, [a_shard(n) for chunk in numbers for n in chunk])]
    assert persisted(one_chunk)[0].manifest == expected
    counted = [replace(o, rows_in=99, bytes_in=99, duplicates=3, quarantined=1) for o in outputs]
    assert persisted(counted)[0].manifest == expected


def test_another_order_is_another_dataset() -> None:
    one, _ = persisted([output(0, [a_shard(0), a_shard(1)])])
    other, _ = persisted([output(0, [a_shard(1), a_shard(0)])])
    assert one.manifest != other.manifest


def test_a_manifest_that_can_not_be_made_durable_is_an_error() -> None:
    class Full(MemoryStore):
        async def put(
            self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
        ) -> ObjectInfo:
            raise NoSpace("store a is full", store="a", key=key)

    stores: dict[str, Store] = {"a": Full("a"), "b": MemoryStore("b"), "c": MemoryStore("c")}

    def all_three(_digest: Digest, _keep: Collection[str], without: Collection[str]) -> Sequence[str]:
        if without:
            raise PolicyRefused("there is no other store", rule="replicas")
        return ["a", "b", "c"]

    async def main() -> None:
        await persist(in_order([output(0, [a_shard(0)])]), 1024, Distributor(stores, all_three, StillClock()))

    with pytest.raises(NoSpace, match="store a is full"):
        asyncio.run(main())
