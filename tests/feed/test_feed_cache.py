"""One process and its cache: what is read, kept, evicted, refused and cleaned up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UsageError
from millrace.core.ports import Bytes
from millrace.feed.cache import BlockCache
from millrace.feed.cache_files import TRAILER_BYTES
from millrace.feed.cache_ledger import charge
from millrace.feed.events import FeedEvent
from millrace.feed.eviction import SOON_S

BOOT, LATER_BOOT = b"the first boot..", b"after power cut."


class Watch:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def now_ms(self) -> int:
        return round(self.now * 1000)

    def monotonic_s(self) -> float:
        return self.now


class Bench:
    """A folder, a clock, and what was reported."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.watch = Watch()
        self.events: list[FeedEvent] = []
        self.caches: list[BlockCache] = []

    def cache(self, limit_bytes: int = 1 << 30, **more: Any) -> BlockCache:
        options: dict[str, Any] = {"boot": BOOT, "keep_free_bytes": 0} | more
        made = BlockCache(
            self.folder, limit_bytes=limit_bytes, clock=self.watch, on_event=self.events.append, **options
        )
        self.caches.append(made)
        return made

    @property
    def root(self) -> Path:
        return self.folder / "millrace-cache-1"

    def file(self, name: str) -> Path:
        return self.root / name[:2] / name

    def said(self) -> list[str]:
        return [event.sentence for event in self.events]

    def left_over(self) -> list[str]:
        """Temporary and lock files."""
        return [f.name for d in ("tmp", "locks") for f in (self.root / d).iterdir()]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "cache")
    yield made
    for cache in made.caches:
        cache.close()


def name_of(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


def bytes_of(name: str, size: int = 10_000) -> bytes:
    return hashlib.shake_128(name.encode()).digest(size)


def fill(cache: BlockCache, name: str, data: Sequence[Bytes] | None = None) -> Sequence[Bytes] | None:
    async def fetch() -> Sequence[Bytes]:
        return [bytes_of(name)] if data is None else data

    return asyncio.run(cache.fill(name, fetch))


def read(cache: BlockCache, name: str) -> bytes | None:
    got: list[bytearray] = []

    def alloc(size: int) -> memoryview:
        got.append(bytearray(b"?" * size))
        return memoryview(got[-1])

    if not cache.read(name, alloc):
        return None
    assert len(got) == 1
    return bytes(got[0])


async def never() -> Sequence[Bytes]:
    raise AssertionError("must not be fetched")


A, B, C = (name_of(x) for x in "abc")


# --- reading and filling ------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3_000_000), max_size=5), st.sampled_from([bytes, bytearray, memoryview]))
def test_what_was_filled_is_read(sizes: list[int], kind: Callable[[bytes], Bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        cache = bench.cache()
        pieces = [kind(bytes_of(f"{A}{i}", size)) for i, size in enumerate(sizes)]
        assert fill(cache, A, pieces) is pieces
        assert read(cache, A) == b"".join(pieces)
        assert bench.left_over() == []
        cache.close()


def test_many_small_pieces_take_several_system_calls(bench: Bench) -> None:
    pieces = [bytes([i % 256]) * (i % 7) for i in range(5000)]
    cache = bench.cache()
    fill(cache, A, pieces)
    assert read(cache, A) == b"".join(pieces)


def test_a_block_that_is_there_is_not_fetched(bench: Bench) -> None:
    cache, other = bench.cache(), bench.cache()
    assert read(cache, A) is None
    fill(cache, A)
    assert asyncio.run(other.fill(A, never)) is None
    assert read(other, A) == bytes_of(A)
    assert cache.stats().misses == 1
    assert other.stats().hits == 1
    assert other.stats().blocks == 1
    assert other.stats().size_bytes == charge(10_000 + TRAILER_BYTES)
    assert bench.left_over() == []


def test_everything_is_for_this_user_alone(bench: Bench) -> None:
    fill(bench.cache(), A)
    for found in [bench.folder, *bench.folder.rglob("*")]:
        assert stat.S_IMODE(found.stat().st_mode) & 0o077 == 0, found


@pytest.mark.parametrize(
    "name", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "/x", "../" + "a" * 64, "a" * 64 + "-x", "a" * 64 + "\n"]
)
def test_what_is_no_name_is_refused(bench: Bench, name: str) -> None:
    cache = bench.cache()
    with pytest.raises(ValueError, match="block's name"):
        read(cache, name)
    with pytest.raises(ValueError, match="block's name"):
        asyncio.run(cache.fill(name, never))
    with pytest.raises(ValueError, match="block's name"):
        cache.needed(name, 1.0)


def test_names_with_a_suffix_are_blocks_of_their_own(bench: Bench) -> None:
    cache = bench.cache()
    fill(cache, A, [b"one"])
    fill(cache, A + ".ipc.v2", [b"two"])
    assert (read(cache, A), read(cache, A + ".ipc.v2")) == (b"one", b"two")


def test_memory_of_another_length_is_refused(bench: Bench) -> None:
    cache = bench.cache()
    fill(cache, A)
    with pytest.raises(ValueError, match="9999 bytes for a block of 10000"):
        cache.read(A, lambda size: memoryview(bytearray(size - 1)))


def test_what_alloc_raises_is_the_callers_and_the_block_stays(bench: Bench) -> None:
    cache = bench.cache()
    fill(cache, A)

    def alloc(size: int) -> memoryview:
        raise OSError(12, "no memory")

    with pytest.raises(OSError, match="no memory"):
        cache.read(A, alloc)
    assert read(cache, A) == bytes_of(A)
    assert bench.events == []


# --- one fetch at a time ------------------------------------------------------------------------------------------


def test_tasks_of_one_process_fetch_once(bench: Bench) -> None:
    cache, other = bench.cache(), bench.cache()
    fetched = 0

    async def fetch() -> Sequence[Bytes]:
        nonlocal fetched
        fetched += 1
        await asyncio.sleep(0.01)
        return [bytes_of(A)]

    async def all_at_once() -> list[Sequence[Bytes] | None]:
        return await asyncio.gather(*((cache, other)[i % 2].fill(A, fetch) for i in range(20)))

    got = asyncio.run(all_at_once())
    assert fetched == 1
    assert [g for g in got if g is not None] == [[bytes_of(A)]]
    assert bench.left_over() == []


def test_a_fetch_may_fill_what_it_needs(bench: Bench) -> None:
    cache = bench.cache()

    async def outer() -> Sequence[Bytes]:
        async def inner() -> Sequence[Bytes]:
            return [b"footer"]

        await cache.fill(B, inner)
        return [b"block"]

    async def both() -> None:
        await asyncio.gather(cache.fill(A, outer), cache.fill(C, outer))

    asyncio.run(both())
    assert [read(cache, n) for n in (A, B, C)] == [b"block", b"footer", b"block"]


def test_a_fetch_that_fails_is_the_callers_and_the_next_one_fetches(bench: Bench) -> None:
    cache = bench.cache()
    failing = asyncio.Event()

    async def fails() -> Sequence[Bytes]:
        failing.set()
        await asyncio.sleep(0.01)
        raise RuntimeError("store is gone")

    async def works() -> Sequence[Bytes]:
        return [b"fine"]

    async def both() -> None:
        first = asyncio.create_task(cache.fill(A, fails))
        await failing.wait()
        second = asyncio.create_task(cache.fill(A, works))
        with pytest.raises(RuntimeError, match="store is gone"):
            await first
        assert await second == [b"fine"]

    asyncio.run(both())
    assert read(cache, A) == b"fine"
    assert bench.left_over() == []
    assert bench.events == []


@pytest.mark.parametrize("steps", range(12))
def test_a_cancelled_fill_leaves_nothing(bench: Bench, steps: int) -> None:
    """Cancelled after 0, 1, 2 ... turns of the loop: while it takes the lock, fetches, and writes."""
    cache = bench.cache()
    big = [bytes(1 << 20)] * 8

    async def fetch() -> Sequence[Bytes]:
        await asyncio.sleep(0)
        return big

    async def main() -> None:
        task = asyncio.create_task(cache.fill(A, fetch))
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 2 else 0.001)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert bench.left_over() == []
    assert read(cache, A) in (None, b"".join(big))
    assert fill(cache, A, big) in (big, None)
    assert read(cache, A) == b"".join(big)
    assert bench.events == []


def test_who_waits_can_be_cancelled_and_the_other_goes_on(bench: Bench) -> None:
    cache, other = bench.cache(), bench.cache()

    async def main() -> None:
        go = asyncio.Event()
        began = asyncio.Event()

        async def fetch() -> Sequence[Bytes]:
            began.set()
            await go.wait()
            return [b"x"]

        first = asyncio.create_task(cache.fill(A, fetch))
        await began.wait()
        waiting = [asyncio.create_task(other.fill(A, never)) for _ in range(5)]
        await asyncio.sleep(0.02)
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*waiting, return_exceptions=True)
        )
        go.set()
        assert await first == [b"x"]

    asyncio.run(main())
    assert bench.left_over() == []


def test_the_loop_turns_while_one_waits(bench: Bench) -> None:
    cache, other = bench.cache(), bench.cache()

    async def main() -> int:
        turns = 0
        go = asyncio.Event()

        async def fetch() -> Sequence[Bytes]:
            await go.wait()
            return [b"x"]

        tasks = [asyncio.create_task(c.fill(A, fetch)) for c in (cache, other)]
        while turns < 50:
            await asyncio.sleep(0.001)
            turns += 1
        go.set()
        await asyncio.gather(*tasks)
        return turns

    assert asyncio.run(main()) == 50


def test_a_holder_that_stands_still_is_not_waited_for_forever(bench: Bench) -> None:
    cache, other = bench.cache(), bench.cache(wait_s=30.0)

    async def main() -> None:
        go = asyncio.Event()

        async def slow() -> Sequence[Bytes]:
            await go.wait()
            return [b"x"]

        async def quick() -> Sequence[Bytes]:
            return [b"x"]

        first = asyncio.create_task(cache.fill(A, slow))
        await asyncio.sleep(0.01)
        second = asyncio.create_task(other.fill(A, quick))
        await asyncio.sleep(0.01)
        assert not second.done()
        bench.watch.now += 31
        assert await second == [b"x"]
        go.set()
        assert await first == [b"x"]

    asyncio.run(main())
    assert len(bench.events) == 1
    assert "over 30 s" in bench.said()[0]
    assert read(cache, A) == b"x"
    assert bench.left_over() == []


# --- after a power cut --------------------------------------------------------------------------------------------


def damage(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    if how == "bit":
        raw[5000] ^= 1
    elif how == "zeros":
        raw[4096:8192] = bytes(4096)
    elif how == "all zeros":
        raw[:] = bytes(len(raw))
    elif how == "no trailer":
        raw[-TRAILER_BYTES:] = bytes(TRAILER_BYTES)
    elif how == "short":
        del raw[5000:]
    elif how == "long":
        raw += b"x"
    elif how == "empty":
        raw.clear()
    elif how == "another block":
        raw[:] = file.with_name(file.name + ".other").read_bytes()
    mtime = file.stat().st_mtime
    file.write_bytes(raw)
    os.utime(file, (mtime, mtime))


@pytest.mark.parametrize("how", ["bit", "zeros", "all zeros", "no trailer", "short", "long", "empty", "another block"])
def test_bytes_of_an_earlier_boot_are_not_believed(bench: Bench, how: str) -> None:
    before = bench.cache()
    fill(before, A)
    fill(before, A + ".other", [bytes_of("something else")])
    damage(bench.file(A), how)
    cache = bench.cache(boot=LATER_BOOT)
    cache.needed(A, bench.watch.now + 1000)  # changes the file's date, and must not make it trusted
    assert read(cache, A) is None
    assert not bench.file(A).exists()
    assert len(bench.events) == 1
    assert A[:12] in bench.said()[0]
    assert str(bench.folder) in bench.said()[0]
    assert fill(cache, A) == [bytes_of(A)]
    assert read(cache, A) == bytes_of(A)


@pytest.mark.parametrize("how", ["no trailer", "short", "long", "empty"])
def test_a_file_of_the_wrong_length_is_never_a_block(bench: Bench, how: str) -> None:
    cache = bench.cache()
    fill(cache, A)
    damage(bench.file(A), how)
    assert read(cache, A) is None
    assert fill(cache, A) is not None
    assert read(cache, A) == bytes_of(A)


def test_whole_bytes_of_an_earlier_boot_are_verified_once(bench: Bench) -> None:
    fill(bench.cache(), A)
    bench.caches[0].needed(A, bench.watch.now + 1234)
    needed_ns = bench.file(A).stat().st_mtime_ns
    assert bench.file(A).read_bytes()[-16:] == BOOT
    cache = bench.cache(boot=LATER_BOOT)
    assert read(cache, A) == bytes_of(A)
    assert bench.file(A).read_bytes()[-16:] == LATER_BOOT, "so that the next one need not"
    assert bench.file(A).stat().st_mtime_ns == needed_ns, "when it is needed is what it was"
    assert bench.file(A).read_bytes()[:-TRAILER_BYTES] == bytes_of(A)
    assert read(bench.cache(boot=b"yet another one."), A) == bytes_of(A)
    assert bench.events == []


def test_the_sum_of_an_earlier_boot_is_counted_anew(bench: Bench) -> None:
    fill(bench.cache(), A)
    shutil.copy(bench.file(A), bench.file(A).with_name(A + ".copy"))  # as if the ledger had lost it
    cache = bench.cache(boot=LATER_BOOT)
    fill(cache, B)
    assert cache.stats().blocks == 3


# --- room ---------------------------------------------------------------------------------------------------------

UNIT = charge(10_000 + TRAILER_BYTES)


def there(bench: Bench) -> set[str]:
    return {f.name for d in bench.root.iterdir() if len(d.name) == 2 for f in d.iterdir()}


def test_the_limit_holds_at_every_moment(bench: Bench) -> None:
    cache = bench.cache(limit_bytes=10 * UNIT)
    for i in range(40):
        bench.watch.now += 1
        fill(cache, name_of(i))
        assert read(cache, name_of(i)) == bytes_of(name_of(i)), "what was just filled is there"
        assert len(there(bench)) <= 10
    assert cache.stats().evicted >= 30
    assert cache.stats().size_bytes <= 10 * UNIT
    assert cache.stats().blocks == len(there(bench))


def test_what_is_needed_latest_leaves_first(bench: Bench) -> None:
    cache = bench.cache(limit_bytes=10 * UNIT)
    names = [name_of(i) for i in range(10)]
    for i, name in enumerate(names):
        fill(cache, name)
        cache.needed(name, bench.watch.now + 1000 + 100 * i)
    for i in range(5):
        fill(cache, name_of(f"new {i}"))
        cache.needed(name_of(f"new {i}"), bench.watch.now + 1)
        left = there(bench)
        assert left >= {name_of(f"new {k}") for k in range(i + 1)}, "nothing nearer has left"
        assert left & set(names) == set(names[: len(left) - i - 1]), "the furthest have"
        assert len(left) >= 9


def test_a_block_larger_than_the_limit_is_not_kept(bench: Bench) -> None:
    cache = bench.cache(limit_bytes=3 * UNIT)
    fill(cache, B)
    big = [bytes(4 * UNIT)]
    assert fill(cache, A, big) is big
    assert fill(cache, A, big) is big
    assert there(bench) == {B}
    assert len(bench.events) == 1
    assert "more than all of the cache" in bench.said()[0]
    assert not cache.stats().degraded
    assert bench.left_over() == []


def test_free_space_is_left_to_others(bench: Bench) -> None:
    disk = os.statvfs(bench.folder.parent)
    cache = bench.cache(keep_free_bytes=2 * disk.f_blocks * disk.f_frsize)
    assert fill(cache, A) == [bytes_of(A)]
    assert there(bench) == set()
    assert cache.stats().degraded
    assert len(bench.events) == 1
    assert "keeps free" in bench.said()[0]
    assert bench.left_over() == []


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(bench: Bench) -> None:
    cache = bench.cache()
    reserved = cache._ledger.reserve(A, 10_000, threading.Event())
    (bench.root / "tmp" / f"{B}-dead").write_bytes(bytes(100))
    (bench.root / "locks" / B).touch()
    bench.cache()
    assert bench.left_over() == [Path(reserved.path).name]
    os.close(reserved.handle)
    bench.cache()
    assert bench.left_over() == []


def test_what_living_writers_have_reserved_counts(bench: Bench) -> None:
    cache = bench.cache(limit_bytes=10 * UNIT)
    held = [cache._ledger.reserve(name_of(i), 10_000, threading.Event()) for i in range(9)]
    for i in range(5):
        fill(cache, name_of(f"x{i}"))
        assert len(there(bench)) <= 1
    for reserved in held:
        os.close(reserved.handle)
    for i in range(9):
        fill(cache, name_of(f"y{i}"))
    assert len(there(bench)) >= 8
    assert bench.events == []


def test_strange_files_in_the_folder_are_left_alone(bench: Bench) -> None:
    cache = bench.cache(limit_bytes=3 * UNIT)
    fill(cache, A)
    (bench.folder / "notes.txt").write_text("mine")
    (bench.root / "ab").mkdir(exist_ok=True)
    (bench.root / "ab" / "README").write_text("mine")
    (bench.root / "cd").write_text("no folder")
    (bench.root / "ab" / ("ab" * 32)).mkdir()
    for i in range(10):
        fill(cache, name_of(i))
    assert (bench.folder / "notes.txt").exists()
    assert (bench.root / "ab" / "README").exists()
    assert bench.events == []


# --- needs --------------------------------------------------------------------------------------------------------


def need(bench: Bench, name: str) -> float:
    return bench.file(name).stat().st_mtime - bench.watch.now


def test_the_earlier_need_counts(bench: Bench) -> None:
    cache = bench.cache()
    fill(cache, A)
    os.utime(bench.file(A), (0, 0))
    for at_s, counts in [(1000, 1000), (2000, 1000), (500, 500), (600, 500)]:
        cache.needed(A, bench.watch.now + at_s)
        assert need(bench, A) == counts
    bench.watch.now += 501
    cache.needed(A, bench.watch.now + 900)
    assert need(bench, A) == 900, "a need that has passed is nobody's"


def test_a_need_that_a_read_has_met_is_replaced(bench: Bench) -> None:
    cache = bench.cache()
    fill(cache, A)
    os.utime(bench.file(A), (bench.watch.now + SOON_S - 5,) * 2)
    cache.needed(A, bench.watch.now + 3600)
    assert need(bench, A) == SOON_S - 5, "somebody needs it soon"
    cache.needed(A, bench.watch.now + 3600, after_read=True)
    assert need(bench, A) == 3600, "that was this caller"
    cache.needed(A, bench.watch.now + 7200, after_read=True)
    assert need(bench, A) == 3600, "that is another one's"


def test_odd_needs(bench: Bench) -> None:
    cache = bench.cache()
    cache.needed(A, bench.watch.now + 5)  # not there: nothing happens
    fill(cache, A)
    fill(cache, B)
    os.utime(bench.file(A), (0, 0))
    cache.needed_many([(A, float("inf")), (C, 5.0), (B, -5.0)])
    assert 86_400 < need(bench, A) < float("inf")
    assert abs(need(bench, B)) <= 1 or bench.file(B).stat().st_mtime > bench.watch.now
    with pytest.raises(ValueError, match="not a number"):
        cache.needed(A, float("nan"))
    assert bench.events == []


# --- folders that won't do ----------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        BlockCache(folder, limit_bytes=1 << 20, clock=Watch(), on_event=lambda _: None)
    assert str(folder) in str(caught.value)
    assert "cache=" in str(caught.value)
    return str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "not a folder" in refusal(tmp_path / "file")
    assert "not a directory" in refusal(tmp_path / "file" / "below")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    assert "too long" in refusal(tmp_path / ("x" * 300))


@pytest.fixture
def nobody() -> Iterator[Callable[[], contextlib.AbstractContextManager[Path]]]:
    """As a user without rights, in a folder of everyone's that only root can make."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    folder = Path(tempfile.mkdtemp())

    @contextlib.contextmanager
    def being() -> Iterator[Path]:
        folder.chmod(0o1777)
        os.seteuid(65_534)
        try:
            yield folder
        finally:
            os.seteuid(0)

    yield being
    shutil.rmtree(folder)


As = Callable[[], contextlib.AbstractContextManager[Path]]


def test_a_folder_of_another_users_is_refused(nobody: As) -> None:
    with nobody() as folder:
        pass
    other = folder / "other"
    other.mkdir(mode=0o777)
    os.chown(other, 1234, 1234)
    other.chmod(0o777)
    with nobody():
        assert "another user (uid 1234" in refusal(other)
        assert list(other.iterdir()) == []


def test_a_folder_that_another_user_put_there_first_is_refused(nobody: As) -> None:
    with nobody() as folder:
        pass
    planted = folder / "millrace-cache-1"
    planted.mkdir()
    os.chown(planted, 1234, 1234)
    planted.chmod(0o777)
    with nobody():
        assert "another user (uid 1234" in refusal(folder)
    shutil.rmtree(planted)
    (folder / "elsewhere").mkdir(mode=0o777)
    planted.symlink_to(folder / "elsewhere")
    with nobody():
        assert "not a folder" in refusal(folder)


def test_a_folder_that_everyone_can_change_is_refused_unless_sticky(nobody: As) -> None:
    with nobody() as folder:
        mine = folder / "mine"
        mine.mkdir(mode=0o777)
        mine.chmod(0o777)
        assert "chmod o-w" in refusal(mine)
        BlockCache(folder, limit_bytes=1 << 20, clock=Watch(), on_event=lambda _: None).close()


def test_a_folder_without_permission_is_refused(nobody: As) -> None:
    with nobody() as folder:
        pass
    folder.chmod(0o755)
    os.seteuid(65_534)
    try:
        assert "may not write" in refusal(folder / "new")
        assert "may not write" in refusal(folder)
    finally:
        os.seteuid(0)


def test_root_may_use_anybodys(nobody: As) -> None:
    with nobody() as folder:
        mine = folder / "mine"
        mine.mkdir()
    BlockCache(mine, limit_bytes=1 << 20, clock=Watch(), on_event=lambda _: None).close()
