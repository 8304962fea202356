from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import Corrupt, SourceError, UsageError
from millrace.core.model import SourceObject
from millrace.core.spec import Pipeline, Source
from millrace.pipeline.listing import Listing
from millrace.pipeline.plan import GROUP_OBJECTS, Cuts, Plan, cut, plan_sources
from millrace.stores.memory import MemoryStore

CHUNK = 4096
SCHEMA = pa.schema([("path", pa.string()), ("n", pa.int64())])


def pipeline(*sources: Source) -> Pipeline:
    return Pipeline(dataset="d", sources=sources or (Source(url="memory://s", format="text"),), chunk=CHUNK)


@st.composite
def sources(draw: st.DrawFn) -> tuple[list[list[SourceObject]], list[Cuts]]:
    listings: list[list[SourceObject]] = []
    cuts: list[Cuts] = []
    for _ in range(draw(st.integers(1, 3))):
        paths = draw(st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=12))
        sizes = [draw(st.integers(0, 3) | st.integers(0, CHUNK) | st.integers(0, 5 * CHUNK)) for _ in paths]
        objects = [SourceObject(p, n, f"v{n}") for p, n in sorted(zip(paths, sizes, strict=True))]
        where: dict[int, Sequence[int]] = {}
        for i, obj in enumerate(objects):
            if obj.size_bytes > CHUNK and draw(st.booleans()):
                inner = draw(st.sets(st.integers(1, obj.size_bytes - 1), max_size=12))
                where[i] = [0, *sorted(inner), obj.size_bytes]
        listings.append(objects)
        cuts.append(where)
    return listings, cuts


@given(sources(), st.randoms(use_true_random=False))
def test_every_byte_is_in_one_chunk_in_order_within_the_limit(
    given_: tuple[list[list[SourceObject]], list[Cuts]], dice: st.DataObject
) -> None:
    listings, cuts = given_
    plan = cut([Listing.of(objects) for objects in listings], pipeline(), cuts, [SCHEMA])
    pieces = [(c.source, o, 0, o.size_bytes) for c in plan if not c.is_range for o in c.objects]
    pieces += [(c.source, c.objects[0], c.start, c.end) for c in plan if c.is_range]
    pieces.sort(key=lambda p: (p[0], p[1].path, p[2]))
    merged = []
    for _, group in itertools.groupby(pieces, key=lambda p: (p[0], p[1])):
        run = list(group)
        assert all(a[3] == b[2] for a, b in itertools.pairwise(run))
        assert (run[0][2], run[-1][3]) == (0, run[0][1].size_bytes)
        merged.append(run[0][:2])
    assert merged == [(s, o) for s, objects in enumerate(listings) for o in objects]

    order = [(c.source, c.objects[0].path, c.start) for c in plan]
    assert order == sorted(order)
    assert [c.index for c in plan] == list(range(len(plan)))
    for chunk in plan:
        assert chunk.objects
        if chunk.size_bytes > CHUNK:
            (obj,) = chunk.objects
            known = cuts[chunk.source].get(listings[chunk.source].index(obj), (0, obj.size_bytes))
            assert not any(chunk.start < at < chunk.end for at in known)
    assert plan.total_bytes == sum(c.size_bytes for c in plan)
    assert plan.total_objects == sum(map(len, listings))

    for objects in listings:
        dice.shuffle(objects)  # type: ignore[attr-defined]
    again = cut([Listing.of(objects) for objects in listings], pipeline(), cuts, [SCHEMA])
    assert b"".join(again.encode()) == b"".join(plan.encode())
    assert again.digest == plan.digest


@given(sources())
def test_a_plan_comes_back_from_its_bytes(given_: tuple[list[list[SourceObject]], list[Cuts]]) -> None:
    listings, cuts = given_
    plan = cut([Listing.of(objects) for objects in listings], pipeline(), cuts, [SCHEMA, pa.schema([])])
    data = b"".join(plan.encode())
    back = Plan.decode(data)
    assert list(back) == list(plan)
    assert back.source_schemas == (SCHEMA, pa.schema([]))
    assert b"".join(back.encode()) == data
    assert back.digest == plan.digest


def test_a_damaged_plan_is_refused() -> None:
    plan = cut([Listing.of([SourceObject("a", 9, "1")])], pipeline(), [{}], [SCHEMA])
    data = b"".join(plan.encode())
    for damaged in (b"", data[:40], data[:-1], data + b"x", b"x" + data, data[:200] + b"\x99" + data[201:]):
        with pytest.raises(Corrupt, match=r"stored plan is .*start a new run"):
            Plan.decode(damaged)
    for i in range(0, len(data), 7):
        with pytest.raises(Corrupt):
            Plan.decode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])


def test_a_group_is_no_longer_than_ten_thousand_objects() -> None:
    objects = [SourceObject(f"{i:06}", 0, "") for i in range(2 * GROUP_OBJECTS + 5)]
    plan = cut([Listing.of(objects)], pipeline(), [{}])
    assert [len(c.objects) for c in plan] == [GROUP_OBJECTS, GROUP_OBJECTS, 5]


def test_offsets_that_are_not_cuts_are_a_mistake_of_the_format() -> None:
    listing = Listing.of([SourceObject("a", 9000, "")])
    for offsets in ([], [0], [1, 9000], [0, 8999], [0, 5, 5, 9000], [0, 6, 5, 9000]):
        with pytest.raises(ValueError, match="increase from 0 to 9000"):
            cut([listing], pipeline(), [{0: offsets}])


async def store_of(objects: dict[str, bytes]) -> MemoryStore:
    store = MemoryStore()
    for key, data in objects.items():
        await store.put(key, [data])
    return store


def planned(objects: Sequence[dict[str, bytes]], *specs: Source, seen: list[int] | None = None) -> Plan:
    async def go() -> Plan:
        stores = [await store_of(o) for o in objects]
        return await plan_sources(pipeline(*specs), stores, progress=None if seen is None else seen.append)

    return asyncio.run(go())


def test_sources_are_listed_looked_into_and_cut() -> None:
    rows = b'{"id": 1, "text": "x"}\n' * 1000
    seen: list[int] = []
    plan = planned(
        [{"b.jsonl": rows, "a.jsonl": b"", "c.jsonl.gz": b""}, {"x": b"1" * 5000, "y": b"2"}],
        Source(url="memory://s", format="jsonl", exclude=("*.gz",)),
        Source(url="memory://t", format="text"),
        seen=seen,
    )
    found = [c.describe() for c in plan]
    assert found[0] == "a.jsonl"
    assert found[1].startswith("b.jsonl bytes 0-")
    assert found[-2:] == ["x", "y"]
    assert all(c.size_bytes <= CHUNK for c in plan if c.source == 0)
    assert plan.source_schemas[0].names == ["path", "id", "text"]
    assert plan.source_schemas[1].names == ["path", "text"]
    assert seen == [3, 4]  # the second source goes on from what the first kept


def test_planning_many_large_objects() -> None:
    objects = {f"{i:04}": b"line\n" * 1000 for i in range(600)}
    plan = planned([objects], Source(url="memory://s", format="lines"))
    assert len(plan) == 1200


def test_errors_of_a_source_come_out_as_they_are() -> None:
    with pytest.raises(UsageError, match="has no objects"):
        planned([{}], Source(url="memory://s", format="text"))
    with pytest.raises(UsageError, match="no JSON object with a field"):
        planned([{"a": b"", "b": b"not json\n"}], Source(url="memory://s", format="jsonl"))
    with pytest.raises(SourceError, match=r"a\.csv\.gz is not a whole gzip stream"):
        planned([{"a.csv.gz": b"nonsense"}], Source(url="memory://s", format="csv"))
