"""The laws of the store port, held against every store. A new one is done when this is green."""

from __future__ import annotations

import asyncio
import random
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer

from millrace.core.errors import (
    AlreadyExists,
    NotFound,
    PreconditionFailed,
    StoreError,
    Unsupported,
)
from millrace.core.ports import Capabilities, ObjectInfo, RangeRequest, Store
from millrace.stores.cloud import CloudStore
from millrace.stores.keys import PutMode
from millrace.stores.layers import Fault, FaultPlan, FaultRates, RetryPlan
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryContents, MemoryStore
from millrace.stores.open import Layers, layered

Opener: TypeAlias = Callable[[], Store]
"""Gives a new client of one place; the place is empty when the test begins."""

BENIGN = FaultPlan(FaultRates(unavailable=0.15, delay=0.1, lost_response=0.15), delay_s=0.001)
ODD_NAMES = (
    "plain.txt",
    "with space/and another .txt",
    "ünïcödé/日本語.txt",
    "100%.txt",
    "%41%2F.txt",
    "a?b#c&d=e+f.txt",
    "quote'\"`.txt",
    "back\\slash",
    "{x}^~[y]*|<z>",
    ".dot/..two/...three",
    "ends.",
    "-dash",
    "long/" + "x" * 200,
)


def with_faults(store: Store) -> Store:
    """The whole stack, over a store that is away, slow or forgets to answer, but never wrong."""

    def faulty(inner: Store) -> Store:
        return Fault(inner, name="test", plan=BENIGN, rng=random.Random(7))

    layers = Layers(
        rng=random.Random(11),
        retry=RetryPlan(attempts=40, delay_s=0.001, delay_s_max=0.001),
        concurrent=8,
        inside=faulty,
    )
    return layered(store, name="test", layers=layers)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "local", "memory in layers", "local in layers", "s3"])
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    kind: str = request.param
    if kind == "s3":
        endpoint: str = request.getfixturevalue("s3_endpoint")
        bucket = f"test-{uuid4().hex}"
        made = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
        urllib.request.urlopen(made).close()
        return lambda: CloudStore(
            f"s3://{bucket}/some prefix",
            name="test",
            options={"endpoint": endpoint, "region": "us-east-1", "path_style": True},
            credentials={"access_key_id": "test", "secret_access_key": "test"},
        )
    contents = MemoryContents()

    def bare() -> Store:
        if kind.startswith("memory"):
            return MemoryStore("test", contents=contents)
        return LocalStore(tmp_path / "store", name="test")

    return (lambda: with_faults(bare())) if kind.endswith("layers") else bare


def run(opener: Opener, body: Callable[[Store], Awaitable[None]]) -> None:
    async def main() -> None:
        store = opener()
        try:
            await body(store)
        finally:
            await store.aclose()

    asyncio.run(main())


async def listing(store: Store, prefix: str = "") -> dict[str, ObjectInfo]:
    found: dict[str, ObjectInfo] = {}
    async for page in store.list(prefix):
        assert page, "an empty page"
        for info in page:
            assert info.key not in found, f"{info.key!r} was listed twice"
            found[info.key] = info
    return found


def content(view: memoryview) -> bytes:
    assert isinstance(view, memoryview)
    assert view.contiguous
    return bytes(view)


def same(view: memoryview, wanted: bytes) -> bool:
    """For large ones: a plain comparison would print both when it fails."""
    return content(view) == wanted


# --- reading back what was put ------------------------------------------------------------------------


def test_a_put_is_described_listed_and_read_back(opener: Opener) -> None:
    async def body(store: Store) -> None:
        put = await store.put("a/b.bin", [b"one", bytearray(b"two"), memoryview(b"three")])
        assert (put.key, put.size_bytes) == ("a/b.bin", 11)
        assert content(await store.get("a/b.bin")) == b"onetwothree"
        head = await store.head("a/b.bin")
        assert (head.key, head.size_bytes, head.version) == (put.key, put.size_bytes, put.version)
        assert abs(head.modified_ms - put.modified_ms) < 60_000
        listed = await listing(store)
        assert set(listed) == {"a/b.bin"}
        assert listed["a/b.bin"] == head

    run(opener, body)


@pytest.mark.parametrize("pieces", [[], [b""], [b"", b"", b""]])
def test_empty_objects(opener: Opener, pieces: list[bytes]) -> None:
    async def body(store: Store) -> None:
        put = await store.put("empty", pieces)
        assert put.size_bytes == 0
        assert content(await store.get("empty")) == b""
        assert content(await store.get("empty", version=put.version)) == b""
        assert content(await store.get_range("empty", 0, 10)) == b""
        assert content(await store.get_range("empty", 5)) == b""
        assert (await listing(store))["empty"].size_bytes == 0

    run(opener, body)


def test_pieces_of_other_shapes_are_taken_as_their_bytes(opener: Opener) -> None:
    async def body(store: Store) -> None:
        whole = bytes(range(64))
        wide = memoryview(whole).cast("I")
        square = memoryview(whole).cast("B", (8, 8))
        await store.put("shapes", [wide, square, memoryview(whole)[::2]])
        assert content(await store.get("shapes")) == whole + whole + whole[::2]

    run(opener, body)


def test_a_20_mb_object_in_uneven_pieces(opener: Opener) -> None:
    async def body(store: Store) -> None:
        whole = random.Random(3).randbytes(20_000_003)
        pieces = [whole[:1], whole[1:9_000_000], b"", whole[9_000_000:17_000_001], whole[17_000_001:]]
        modes: tuple[PutMode, ...] = ("create", "overwrite")
        for mode in modes:
            put = await store.put("big", pieces, mode=mode)
            assert put.size_bytes == len(whole)
            assert same(await store.get("big"), whole)
            assert same(await store.get("big", version=put.version), whole)
            assert same(await store.get_range("big", 1, 18_000_000), whole[1:18_000_001])
            assert same(await store.get_range("big", 3_000_000), whole[3_000_000:])

    run(opener, body)


def test_thousands_of_pieces(opener: Opener) -> None:
    async def body(store: Store) -> None:
        pieces = [b"%05d" % number for number in range(5000)]
        await store.put("pieces", pieces)
        assert content(await store.get("pieces")) == b"".join(pieces)

    run(opener, body)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(opener: Opener, name: str) -> None:
    async def body(store: Store) -> None:
        await store.put(name, [name.encode()])
        assert content(await store.get(name)) == name.encode()
        assert set(await listing(store)) == {name}
        assert set(await listing(store, name)) == {name}
        await store.delete(name)
        assert await listing(store) == {}

    run(opener, body)


def test_a_newline_in_a_name_works_or_is_refused_by_name(opener: Opener) -> None:
    async def body(store: Store) -> None:
        try:
            await store.put("two\nlines", [b"x"])
        except Unsupported:
            with pytest.raises(Unsupported, match=r"two\\nlines"):
                await store.get("two\nlines")
            return
        assert content(await store.get("two\nlines")) == b"x"
        assert set(await listing(store)) == {"two\nlines"}

    run(opener, body)


@pytest.mark.parametrize(
    "key", ["", "/abs", "a//b", "a/", "..", "../a", "a/../b", "a/./b", "a\0b", "sur\udcffrogate", ".millrace-tmp/x"]
)
def test_what_is_no_key_is_refused_by_every_method(opener: Opener, key: str) -> None:
    async def body(store: Store) -> None:
        for call in (
            store.put(key, [b"x"]),
            store.get(key),
            store.get_range(key, 0, 1),
            store.read_many([RangeRequest(key)]),
            store.head(key),
            store.delete(key),
        ):
            with pytest.raises(Unsupported) as refused:
                await call
            assert refused.value.key == key
            assert refused.value.store == "test"

    run(opener, body)


# --- what isn't there ---------------------------------------------------------------------------------


def test_what_is_not_there_is_not_found_by_name(opener: Opener) -> None:
    async def body(store: Store) -> None:
        await store.put("there/is", [b"x"])
        for key in ("missing", "there", "there/is/not", "there/isn"):
            for call in (
                store.get(key),
                store.get(key, version="1-1"),
                store.get_range(key, 0, 5),
                store.get_range(key, 3, 0),
                store.head(key),
                store.read_many([RangeRequest("there/is"), RangeRequest(key)]),
            ):
                with pytest.raises(NotFound) as absent:
                    await call
                assert (absent.value.store, absent.value.key) == ("test", key)
                assert key in str(absent.value)

    run(opener, body)


def test_delete_is_idempotent(opener: Opener) -> None:
    async def body(store: Store) -> None:
        await store.delete("never/was")
        await store.put("a", [b"x"])
        await store.put("b", [b"y"])
        await store.delete("a")
        await store.delete("a")
        with pytest.raises(NotFound):
            await store.get("a")
        assert set(await listing(store)) == {"b"}
        await store.put("a", [b"again"], mode="create")
        assert content(await store.get("a")) == b"again"

    run(opener, body)


# --- conditional puts ---------------------------------------------------------------------------------


def test_conditional_puts_are_honest_here_and_the_probe_leaves_nothing(opener: Opener) -> None:
    async def body(store: Store) -> None:
        assert await store.capabilities() == Capabilities(create_only=True, compare_and_swap=True)
        assert await store.capabilities() == Capabilities(create_only=True, compare_and_swap=True)
        assert await listing(store) == {}

    run(opener, body)


def test_create_only_refuses_the_second(opener: Opener) -> None:
    async def body(store: Store) -> None:
        await store.put("once", [b"first"], mode="create")
        with pytest.raises(AlreadyExists) as lost:
            await store.put("once", [b"second"], mode="create")
        assert (lost.value.store, lost.value.key) == ("test", "once")
        assert content(await store.get("once")) == b"first"

    run(opener, body)


def test_of_32_creators_one_wins(opener: Opener) -> None:
    async def body(store: Store) -> None:
        async def create(number: int) -> bool:
            try:
                await store.put("race", [b"writer %d" % number], mode="create")
            except AlreadyExists:
                return False
            return True

        for _ in range(3):
            won = await asyncio.gather(*(create(number) for number in range(32)))
            assert won.count(True) == 1
            assert content(await store.get("race")) == b"writer %d" % won.index(True)
            await store.delete("race")

    run(opener, body)


def test_compare_and_swap(opener: Opener) -> None:
    async def body(store: Store) -> None:
        with pytest.raises(PreconditionFailed):
            await store.put("head", [b"x"], if_version="1-1")
        first = await store.put("head", [b"1"])
        second = await store.put("head", [b"2"], if_version=first.version)
        assert second.version != first.version
        with pytest.raises(PreconditionFailed) as lost:
            await store.put("head", [b"3"], if_version=first.version)
        assert (lost.value.store, lost.value.key) == ("test", "head")
        assert content(await store.get("head")) == b"2"
        await store.delete("head")
        with pytest.raises(PreconditionFailed):
            await store.put("head", [b"4"], if_version=second.version)
        with pytest.raises(Unsupported):
            await store.put("head", [b"5"], mode="create", if_version=second.version)
        assert await listing(store) == {}

    run(opener, body)


def test_nothing_is_lost_or_applied_twice_among_swappers(opener: Opener) -> None:
    async def body(store: Store) -> None:
        await store.put("log", [b""])

        async def append(mine: bytes) -> None:
            while True:
                info = await store.head("log")
                try:
                    before = content(await store.get("log", version=info.version))
                    # A swap whose response was lost, and which was then built upon, looks like a lost race.
                    if mine in before.split():
                        return
                    await store.put("log", [before, mine, b"\n"], if_version=info.version)
                except PreconditionFailed:
                    continue
                else:
                    return

        async def work(who: int) -> None:
            for turn in range(5):
                await append(b"%d/%d" % (who, turn))

        await asyncio.gather(*(work(who) for who in range(6)))
        entries = content(await store.get("log")).split()
        assert sorted(entries) == sorted(b"%d/%d" % (who, turn) for who in range(6) for turn in range(5))

    run(opener, body)


def test_a_version_changes_with_every_change(opener: Opener) -> None:
    async def body(store: Store) -> None:
        versions = [(await store.put("v", [b"same size %d" % (number % 10)])).version for number in range(20)]
        assert all(old != new for old, new in pairwise(versions))

    run(opener, body)


# --- ranges and versions ------------------------------------------------------------------------------


def test_ranges(opener: Opener) -> None:
    async def body(store: Store) -> None:
        whole = bytes(range(100))
        await store.put("r", [whole])
        for start in (0, 1, 50, 99, 100, 101, 1000):
            for length in (None, 0, 1, 50, 100, 1000):
                end = None if length is None else start + length
                assert content(await store.get_range("r", start, length)) == whole[start:end]
        for start, length in ((-1, 1), (0, -1)):
            with pytest.raises(Unsupported):
                await store.get_range("r", start, length)

    run(opener, body)


def test_a_read_of_another_version_fails_and_names_the_object(opener: Opener) -> None:
    async def body(store: Store) -> None:
        old = await store.put("f", [b"old bytes"])
        new = await store.put("f", [b"new bytes"])
        for call in (
            store.get("f", version=old.version),
            store.get_range("f", 1, 3, version=old.version),
            store.get_range("f", 1, 0, version=old.version),
            store.get_range("f", 100, 3, version=old.version),
            store.read_many([RangeRequest("f", version=new.version), RangeRequest("f", 0, 2, old.version)]),
        ):
            with pytest.raises(PreconditionFailed, match="f") as changed:
                await call
            assert changed.value.key == "f"
        assert content(await store.get("f", version=new.version)) == b"new bytes"
        assert content(await store.get_range("f", 4, version=new.version)) == b"bytes"
        assert content(await store.get_range("f", 100, version=new.version)) == b""

    run(opener, body)


def test_a_listed_version_can_be_read(opener: Opener) -> None:
    async def body(store: Store) -> None:
        for number in range(3):
            await store.put(f"k{number}", [b"x" * number])
        for key, info in (await listing(store)).items():
            assert len(await store.get(key, version=info.version)) == info.size_bytes

    run(opener, body)


def test_read_many_answers_in_the_order_asked(opener: Opener) -> None:
    async def body(store: Store) -> None:
        bodies = {f"m/{number}": random.Random(number).randbytes(1000 + number) for number in range(40)}
        infos = {key: await store.put(key, [value]) for key, value in bodies.items()}
        dice = random.Random(1)
        requests = []
        for _ in range(300):
            key = dice.choice(list(bodies))
            length = dice.choice([None, 0, 1, 500, 5000])
            requests.append(RangeRequest(key, dice.randrange(1100), length, dice.choice([None, infos[key].version])))
        views = await store.read_many(requests)
        for request, view in zip(requests, views, strict=True):
            end = None if request.length is None else request.start + request.length
            assert content(view) == bodies[request.key][request.start : end]
        assert await store.read_many([]) == []

    run(opener, body)


# --- atomicity and listing ----------------------------------------------------------------------------


def test_readers_see_the_old_or_the_new_bytes_and_never_a_mix(opener: Opener) -> None:
    size_bytes = 300_000

    async def body(store: Store) -> None:
        await store.put("swap", [b"\0" * size_bytes])
        done = False

        async def write() -> None:
            nonlocal done
            for number in range(1, 12):
                await store.put("swap", [bytes([number]) * (size_bytes // 3)] * 3)
            done = True

        async def read() -> None:
            while not done:
                seen = content(await store.get("swap"))
                assert len(seen) == size_bytes
                assert seen == seen[:1] * size_bytes

        await asyncio.gather(write(), read(), read())

    run(opener, body)


def test_list_by_prefix(opener: Opener) -> None:
    keys = ["a", "ab", "abc/d", "abc/de/f", "abc/x", "abd/d", "b/abc", "z/.hidden"]

    async def body(store: Store) -> None:
        for key in keys:
            if key != "ab/":
                await store.put(key, [b"x"])
        for prefix in ("", "a", "ab", "abc", "abc/", "abc/d", "abc/de/", "abc/de/f", "b", "c", "nothing/here", "z/."):
            assert set(await listing(store, prefix)) == {key for key in keys if key.startswith(prefix)}
        for prefix in ("/", "/a", "a//", "../", "a/../"):
            with pytest.raises(Unsupported):
                await listing(store, prefix)

    run(opener, body)


def test_a_listing_can_be_left_early(opener: Opener) -> None:
    async def body(store: Store) -> None:
        for number in range(5):
            await store.put(f"k/{number}", [b"x"])
        async for page in store.list("k/"):
            assert page
            break
        assert len(await listing(store)) == 5

    run(opener, body)


def test_cancelled_puts_leave_all_or_nothing(opener: Opener) -> None:
    async def body(store: Store) -> None:
        piece = random.Random(5).randbytes(1 << 20)
        for number in range(12):
            put = asyncio.ensure_future(store.put(f"c/{number}", [piece] * 4))
            await asyncio.sleep(0.002 * number)
            put.cancel()
            await asyncio.wait([put])
            if not put.cancelled():
                assert put.result().size_bytes == 4 << 20
        for key, info in (await listing(store)).items():
            assert info.size_bytes == 4 << 20
            assert same(await store.get(key), piece * 4)

    run(opener, body)


def test_a_closed_store_says_so(opener: Opener) -> None:
    async def body(store: Store) -> None:
        await store.put("a", [b"x"])
        await store.aclose()
        with pytest.raises(StoreError, match="closed"):
            await store.get("a")
        with pytest.raises(StoreError, match="closed"):
            await listing(store)

    run(opener, body)


def test_two_clients_see_one_place(opener: Opener) -> None:
    async def body(store: Store) -> None:
        other = opener()
        info = await store.put("shared", [b"x"])
        assert (await other.head("shared")).version == info.version
        with pytest.raises(AlreadyExists):
            await other.put("shared", [b"y"], mode="create")
        await other.delete("shared")
        with pytest.raises(NotFound):
            await store.head("shared")
        await other.aclose()

    run(opener, body)


# --- laws over random data ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "local"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(st.binary(max_size=400), max_size=12),
    ranges=st.lists(st.tuples(st.integers(0, 3000), st.none() | st.integers(0, 3000)), max_size=8),
)
def test_any_pieces_and_any_ranges(
    kind: str, tmp_path: Path, pieces: list[bytes], ranges: list[tuple[int, int | None]]
) -> None:
    whole = b"".join(pieces)

    async def body(store: Store) -> None:
        info = await store.put("k", pieces)
        assert info.size_bytes == len(whole)
        assert content(await store.get("k", version=info.version)) == whole
        requests = [RangeRequest("k", start, length, info.version) for start, length in ranges]
        for request, view in zip(requests, await store.read_many(requests), strict=True):
            end = None if request.length is None else request.start + request.length
            assert content(view) == whole[request.start : end]

    run(lambda: MemoryStore("test") if kind == "memory" else LocalStore(tmp_path / "h", name="test"), body)
