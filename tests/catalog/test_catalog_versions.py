"""Committing, listing, resolving and removing versions; replica pages as values."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.catalog.remove import remove
from millrace.catalog.versions import list_datasets, newest, resolve
from millrace.control.versions import keep_gc_out
from millrace.core.errors import CoordError, Fenced, LeaseHeld, UsageError
from millrace.core.facts import ReplicaEntry, ReplicaPage
from millrace.core.keys import GC_LEASE, dataset_lease, replica_page
from millrace.core.model import Digest, shard_key
from millrace.core.pages import (
    PART_ENTRIES,
    decode_page,
    encode_page,
    meta_keys,
    meta_parts,
    read_meta,
    read_page,
    update_page,
)
from millrace.core.ports import Write
from millrace.core.spec import Placement

if TYPE_CHECKING:
    from tests.catalog.conftest import Scene


def hexes(rng: random.Random) -> Digest:
    return Digest(rng.randbytes(32).hex())


# --- replica pages ---------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.binary(min_size=32, max_size=32),
            st.sampled_from(["shard", "odd/key"]),
            st.integers(0, 2**40),
            st.dictionaries(st.sampled_from(["aws-main", "gcp", "az.1"]), st.integers(0, 2**45)),
        ),
        max_size=6,
    )
)
def test_a_page_comes_back_as_it_was(rows: list[tuple[bytes, str, int, dict[str, int]]]) -> None:
    entries = tuple(
        ReplicaEntry(
            digest=d.hex(), key=shard_key(Digest(d.hex())) if kind == "shard" else kind, size_bytes=n, stores=stores
        )
        for d, kind, n, stores in rows
    )
    page = ReplicaPage(entries=entries)
    assert decode_page(encode_page(page), key="k") == page


def test_the_worst_page_there_is_fits_into_a_value() -> None:
    rng = random.Random(1)
    names = ["".join(rng.choices("abcdefghij0123456789", k=63)) for _ in range(16)]
    entries = tuple(
        ReplicaEntry(
            digest=(d := hexes(rng)),
            key=shard_key(d),
            size_bytes=rng.randrange(2**31),
            stores={n: rng.randrange(10**13) for n in names},
        )
        for _ in range(PART_ENTRIES)
    )
    page = ReplicaPage(entries=entries)
    assert len(encode_page(page)) < 2**20
    with pytest.raises(CoordError, match="4097 entries"):
        encode_page(ReplicaPage(entries=(*entries, entries[0])))


def test_a_long_meta_page_gets_parts(scene: Scene) -> None:
    rng = random.Random(2)
    entries = tuple(
        ReplicaEntry(digest=(d := hexes(rng)), key=shard_key(d), size_bytes=1, stores={"aws": 5})
        for _ in range(PART_ENTRIES + 3)
    )
    manifest = hexes(rng)

    async def scenario() -> None:
        parts = meta_parts(ReplicaPage(entries=entries))
        for key, part in zip(meta_keys(manifest, len(parts)), parts, strict=True):
            await scene.coord.commit([Write(key, encode_page(part))])
        assert [e for part in await read_meta(scene.coord, manifest) for e in part.entries] == list(entries)
        assert await read_meta(scene.coord, hexes(rng)) == ()

    asyncio.run(scenario())


@pytest.mark.parametrize("value", [b"", b"{}", b"x\x9c nonsense"])
def test_a_damaged_page_is_named(value: bytes) -> None:
    with pytest.raises(CoordError, match="replicas/a/000001"):
        decode_page(value, key="replicas/a/000001")


def test_two_changes_of_one_page_at_once_both_happen(scene: Scene) -> None:
    key = replica_page(Digest("ab"), 0)
    entry = ReplicaEntry(digest="cd", key="k", size_bytes=1)

    async def add(name: str) -> None:
        def change(before: ReplicaPage | None) -> ReplicaPage:
            stores = {**(before.entries[0].stores if before else {}), name: 1}
            return ReplicaPage(entries=(entry.model_copy(update={"stores": stores}),))

        await update_page(scene.coord, key, change)

    async def scenario() -> None:
        await asyncio.gather(*(add(name) for name in "abcdefgh"))
        page = await read_page(scene.coord, key)
        assert page is not None
        assert set(page.entries[0].stores) == set("abcdefgh")

    asyncio.run(scenario())


# --- committing -----------------------------------------------------------------------------------------


def test_the_same_data_makes_no_new_version_but_its_replicas_are_noted(scene: Scene) -> None:
    async def scenario() -> None:
        scene.stores["aws"].down = True
        first = await scene.make([1, 2])
        scene.stores["aws"].down = False
        scene.stores["gcp"].down = True
        scene.clock.ms += 40_000
        second = await scene.make([1, 2])
        assert (first.unchanged, second.unchanged) == (False, True)
        assert second.record == first.record
        page = await read_page(scene.coord, replica_page(Digest(first.record.digest), 0))
        assert page is not None
        assert all(set(e.stores) == {"aws", "gcp", "az", "ibm"} for e in page.entries)
        third = await scene.make([3])
        assert third.record.version == 2
        assert [line.versions for line in await list_datasets(scene.coord)] == [2]

    asyncio.run(scenario())


def test_a_commit_that_was_killed_after_it_took_effect_is_not_made_twice(scene: Scene) -> None:
    async def scenario() -> None:
        policy = Placement()
        distributor = scene.distributor(policy)
        made = await scene.persist([await scene.chunk(1, distributor)], distributor)
        first = await scene.commit(made, "set", policy, run=7)
        assert await scene.commit(made, "set", policy, run=7) == first == (first[0], False)
        await scene.make([2])
        assert await scene.commit(made, "set", policy, run=7) == (first[0], False)
        later, unchanged = await scene.commit(made, "set", policy, run=8)
        assert (later.version, unchanged) == (3, False)

    asyncio.run(scenario())


def test_two_runs_that_commit_at_once_both_get_a_version(scene: Scene) -> None:
    async def scenario() -> None:
        made = await asyncio.gather(*(scene.make([i]) for i in range(5)))
        assert sorted(m.record.version for m in made) == [1, 2, 3, 4, 5]
        head = await newest(scene.coord, "set")
        assert head is not None
        assert head.version == 5

    asyncio.run(scenario())


def test_a_stale_lease_adds_nothing(scene: Scene) -> None:
    async def scenario() -> None:
        policy = Placement()
        distributor = scene.distributor(policy)
        made = await scene.persist([await scene.chunk(1, distributor)], distributor)
        stale = await scene.lease("set")
        await scene.coord.acquire(dataset_lease("set"), "other", 10_000, now_ms=scene.clock.ms, steal=True)
        with pytest.raises(Fenced):
            await scene.commit(made, "set", policy, run=1, guard=stale)
        assert await list_datasets(scene.coord) == ()

    asyncio.run(scenario())


def test_a_run_that_starts_fences_a_collection_that_stalled(scene: Scene) -> None:
    async def scenario() -> None:
        lease = await scene.coord.acquire(GC_LEASE, "gc", 1000, now_ms=scene.clock.ms)
        with pytest.raises(LeaseHeld, match="run 3 can't start while gc collects garbage"):
            await keep_gc_out(scene.coord, 3, now_ms=scene.clock.ms)
        scene.clock.ms += 2000
        await keep_gc_out(scene.coord, 3, now_ms=scene.clock.ms)
        with pytest.raises(Fenced):
            await scene.coord.renew(lease, 1000, now_ms=scene.clock.ms)

    asyncio.run(scenario())


# --- what people mean --------------------------------------------------------------------------------------


def test_versions_are_found_by_name_number_and_digest(scene: Scene) -> None:
    async def scenario() -> None:
        a, b = await scene.make([1]), await scene.make([2])
        await scene.make([1])  # version 3 has the digest of version 1
        assert (await resolve(scene.coord, "set")).version == 3
        assert await resolve(scene.coord, "set@1") == a.record
        assert await resolve(scene.coord, f"set@{b.record.digest}") == b.record
        assert await resolve(scene.coord, f"set@{b.record.digest[:8].upper()}") == b.record
        assert (await resolve(scene.coord, f"set@{a.record.digest[:8]}")).version == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("sett", "did you mean 'set'"),
        ("wholly-other", "there is set, words; see 'millrace datasets'"),
        ("set@9", r"has no version 9; there is set@1 \("),
        ("set@abcd", "neither a version's number nor at least 8 letters"),
        ("set@00000000ff", "has no version 00000000ff; there is set@1"),
        ("set@", "names no version"),
        ("@1", "names no version"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(scene: Scene, reference: str, sentence: str) -> None:
    async def scenario() -> None:
        await scene.make([1])
        await scene.make([1], "words")
        with pytest.raises(UsageError, match=sentence):
            await resolve(scene.coord, reference)

    asyncio.run(scenario())


def test_names_that_begin_alike_are_kept_apart(scene: Scene) -> None:
    async def scenario() -> None:
        names = ["a", "a-b", "a.b", "a0", "ab"]
        for name in names:
            await scene.make([1], name)
        assert [line.name for line in await list_datasets(scene.coord)] == sorted(names)
        with pytest.raises(UsageError, match="nor any other"):
            await resolve(type(scene)().coord, "a")

    asyncio.run(scenario())


# --- removing ---------------------------------------------------------------------------------------------


def test_removing_the_newest_moves_the_head_and_its_number_stays_used(scene: Scene) -> None:
    async def scenario() -> None:
        for chunk in (1, 2, 3):
            await scene.make([chunk])
        assert [r.version for r in await remove(scene.coord, "set@3")] == [3]
        assert (await resolve(scene.coord, "set")).version == 2
        assert [r.version for r in await remove(scene.coord, "set@1")] == [1]
        assert (await resolve(scene.coord, "set")).version == 2
        assert (await scene.make([4])).record.version == 4
        assert [r.version for r in await remove(scene.coord, "set")] == [2, 4]
        with pytest.raises(UsageError):
            await remove(scene.coord, "set")
        assert (await scene.make([5])).record.version == 5

    asyncio.run(scenario())


@settings(max_examples=3, deadline=None)
@given(st.integers(91, 185))
def test_a_dataset_of_many_versions_goes_whole(make: int) -> None:
    from millrace.coord.memory import MemoryCoordination
    from millrace.core.facts import VersionRecord, VersionRef, encode
    from millrace.core.keys import dataset_head, dataset_version

    async def scenario() -> None:
        coord = MemoryCoordination()
        for number in range(1, make + 1):
            record = VersionRecord.model_validate(
                {
                    "dataset": "d",
                    "version": number,
                    "digest": "ab" * 32,
                    "run": 1,
                    "created_at_ms": 1,
                    "rows": 0,
                    "bytes": 0,
                    "shards": 0,
                    "placement": {},
                    "lineage": {"sources": [], "spec": {}, "spec_digest": "", "plan_digest": "", "code": {}},
                }
            )
            await coord.commit(
                [
                    Write(dataset_version("d", number), encode(record)),
                    Write(dataset_head("d"), encode(VersionRef(version=number, digest="ab" * 32))),
                ]
            )
        assert len(await remove(coord, "d")) == make
        assert await list_datasets(coord) == ()
        assert await coord.list("datasets/") == []

    asyncio.run(scenario())
