"""A cache whose disk is full, read-only, gone or broken: the feed goes on, and it is said once."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from millrace.core.errors import UsageError
from millrace.core.ports import Bytes
from millrace.feed.cache import BlockCache
from millrace.feed.cache_locks import CacheThreads
from millrace.feed.cache_trouble import CacheTrouble
from millrace.feed.events import FeedEvent

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small file system")


class Watch:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def now_ms(self) -> int:
        return round(self.now * 1000)

    def monotonic_s(self) -> float:
        return self.now


def name_of(what: object) -> str:
    return hashlib.sha256(str(what).encode()).hexdigest()


def bytes_of(name: str) -> bytes:
    return hashlib.shake_128(name.encode()).digest(100_000)


def fill(cache: BlockCache, name: str) -> bool:
    """Whether the block was fetched here; what comes back is checked."""

    async def fetch() -> Sequence[Bytes]:
        return [bytes_of(name)]

    got = asyncio.run(cache.fill(name, fetch))
    assert got in (None, [bytes_of(name)])
    return got is not None


def has(cache: BlockCache, name: str) -> bool:
    got = bytearray(100_000)
    if not cache.read(name, lambda size: memoryview(got)[:size]):
        return False
    assert got == bytes_of(name), "a wrong byte was served"
    return True


class World:
    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.watch = Watch()
        self.events: list[FeedEvent] = []

    def cache(self, limit_bytes: int = 1 << 30) -> BlockCache:
        return BlockCache(
            self.disk / "cache",
            limit_bytes=limit_bytes,
            clock=self.watch,
            on_event=self.events.append,
            keep_free_bytes=0,
            boot=b"0123456789abcdef",
        )

    def fill_up(self) -> None:
        """Somebody else takes all the space there is."""
        with contextlib.suppress(OSError), open(self.disk / "others", "wb", buffering=0) as others:
            while others.write(bytes(4096)):
                pass

    def said(self) -> str:
        assert len(self.events) == 1, self.events
        assert self.events[0].kind == "cache"
        assert str(self.disk / "cache") in self.events[0].sentence
        return self.events.pop().sentence


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[World]:
    """A disk of 1 MiB that can be remounted and unmounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting isn't allowed here")
    yield World(disk)
    subprocess.run(["umount", "-l", disk], capture_output=True)


@needs_root
def test_a_disk_smaller_than_the_limit_is_used_as_far_as_it_goes(small: World) -> None:
    cache = small.cache()
    for i in range(30):
        small.watch.now += 1
        assert fill(cache, name_of(i))
        assert has(cache, name_of(i)), "older blocks made room"
    assert cache.stats().evicted >= 20
    assert not cache.stats().degraded
    assert small.events == []
    cache.close()


@needs_root
def test_a_disk_that_others_filled(small: World) -> None:
    cache = small.cache()
    fill(cache, name_of(0))
    small.fill_up()
    for i in range(1, 8):
        assert fill(cache, name_of(i))
        assert has(cache, name_of(i)), "it makes do with what it has"
    assert [p.name for d in ("tmp", "locks") for p in (small.disk / "cache/millrace-cache-1" / d).iterdir()] == []
    assert small.events == []
    cache.close()


@needs_root
def test_a_disk_that_is_full_at_the_start(small: World) -> None:
    small.cache().close()
    small.fill_up()
    cache = small.cache()
    for i in range(3):
        assert fill(cache, name_of(i))
    assert cache.stats().degraded
    assert "full" in small.said()
    (small.disk / "others").unlink()
    small.watch.now += 61
    fill(cache, name_of("after"))
    assert has(cache, name_of("after")), "once there is room it goes on"
    assert "again" in small.said()
    cache.close()


@needs_root
def test_a_disk_that_becomes_read_only_and_recovers(small: World) -> None:
    cache = small.cache()
    fill(cache, name_of("old"))
    subprocess.run(["mount", "-o", "remount,ro", small.disk], check=True)
    for i in range(5):
        assert fill(cache, name_of(i))
    assert "read-only" in small.said()
    assert has(cache, name_of("old")), "what is there can still be read"
    cache.needed(name_of("old"), small.watch.now + 5000)
    assert "read-only" in small.said()
    assert cache.stats().degraded
    subprocess.run(["mount", "-o", "remount,rw", small.disk], check=True)
    fill(cache, name_of("too early"))
    assert not has(cache, name_of("too early"))
    small.watch.now += 2
    fill(cache, name_of("in time"))
    assert has(cache, name_of("in time"))
    assert "again" in small.said()
    assert not cache.stats().degraded
    cache.close()


@needs_root
def test_a_read_only_folder_is_refused_at_the_start(small: World) -> None:
    small.cache().close()
    subprocess.run(["mount", "-o", "remount,ro", small.disk], check=True)
    with pytest.raises(UsageError, match="read-only") as caught:
        small.cache()
    assert str(small.disk) in str(caught.value)


@needs_root
def test_damage_on_a_read_only_disk_is_fetched_every_time(small: World) -> None:
    cache = small.cache()
    fill(cache, name_of(0))
    file = small.disk / "cache/millrace-cache-1" / name_of(0)[:2] / name_of(0)
    os.truncate(file, 5000)
    subprocess.run(["mount", "-o", "remount,ro", small.disk], check=True)
    for _ in range(3):
        assert not has(cache, name_of(0))
        assert fill(cache, name_of(0)), "it is not said to be there"
        small.watch.now += 61
    subprocess.run(["mount", "-o", "remount,rw", small.disk], check=True)
    assert fill(cache, name_of(0))
    assert has(cache, name_of(0))
    cache.close()


@needs_root
def test_a_mount_that_vanishes_under_a_reader(small: World) -> None:
    cache = small.cache()
    for i in range(5):
        fill(cache, name_of(i))
    stop = threading.Event()
    seen = {True: 0, False: 0}
    missing = threading.Event()

    def look() -> None:
        while not stop.is_set():
            found = has(cache, name_of(seen[True] % 5))
            seen[found] += 1
            if not found:
                missing.set()

    reader = threading.Thread(target=look)
    reader.start()
    subprocess.run(["umount", "-l", small.disk], check=True)
    assert missing.wait(60)
    for i in range(5):
        assert fill(cache, name_of(i)), "the pieces are handed on"
    stop.set()
    reader.join()
    assert list(small.disk.iterdir()) == [], "nothing is written to what lay under the mount"
    assert "vanished" in small.said()
    small.watch.now += 61
    fill(cache, name_of("later"))
    assert list(small.disk.iterdir()) == []
    cache.close()


@pytest.mark.parametrize("what", ["cache", "cache/millrace-cache-1", "cache/millrace-cache-1/locks"])
def test_a_folder_that_somebody_removed_is_made_again(world: World, what: str) -> None:
    cache = world.cache()
    fill(cache, name_of(0))
    shutil.rmtree(world.disk / what)
    assert fill(cache, name_of(1))
    assert has(cache, name_of(1))
    assert not cache.stats().degraded
    assert world.events == []
    cache.close()


def test_a_folder_that_became_a_file(world: World) -> None:
    cache = world.cache()
    shutil.rmtree(world.disk / "cache")
    (world.disk / "cache").touch()
    for i in range(3):
        assert fill(cache, name_of(i))
        assert not has(cache, name_of(i))
    assert world.said()
    assert cache.stats().degraded
    cache.close()


def test_something_else_in_a_blocks_place(world: World) -> None:
    cache = world.cache()
    place = world.disk / "cache/millrace-cache-1" / name_of(0)[:2] / name_of(0)
    place.mkdir(parents=True)
    assert not has(cache, name_of(0))
    assert fill(cache, name_of(0))
    place.rmdir()
    place.symlink_to("/dev/zero")
    assert not has(cache, name_of(0))
    world.watch.now += 61
    assert fill(cache, name_of(0))
    assert has(cache, name_of(0))
    cache.close()


def failing(monkeypatch: pytest.MonkeyPatch, call: str, code: int, times: int) -> None:
    """The system refuses the next calls of one kind; a real disk can't be made to."""
    real = getattr(os, call)
    left = [times]

    def fails(*arguments: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, call, fails)


def left_over(world: World) -> list[str]:
    return [p.name for d in ("tmp", "locks") for p in (world.disk / "cache/millrace-cache-1" / d).iterdir()]


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.ENOSPC])
def test_a_quota_that_the_disk_does_not_tell_of(world: World, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    cache = world.cache()
    fill(cache, name_of(0))
    failing(monkeypatch, "pwritev", code, times=1)
    fill(cache, name_of(1))
    assert has(cache, name_of(1)), "an older block made room, at once"
    assert not has(cache, name_of(0))
    assert world.events == []
    failing(monkeypatch, "pwritev", code, times=2)
    assert fill(cache, name_of(2))
    assert not has(cache, name_of(2))
    assert "full" in world.said()
    assert left_over(world) == []
    cache.close()


@pytest.mark.parametrize("call", ["pwritev", "ftruncate", "rename", "pwrite", "scandir"])
def test_a_disk_that_fails_while_a_block_is_written(world: World, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    cache = world.cache()
    failing(monkeypatch, call, errno.EIO, times=1)
    assert fill(cache, name_of(0))
    assert not has(cache, name_of(0))
    assert "input/output error" in world.said()
    assert left_over(world) == []
    assert cache.stats().degraded
    world.watch.now += 2
    assert fill(cache, name_of(0))
    assert has(cache, name_of(0))
    assert "again" in world.said()
    cache.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES])
@pytest.mark.parametrize("call", ["preadv", "pread"])
def test_a_disk_that_fails_while_a_block_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    cache = world.cache()
    for i in range(3):
        fill(cache, name_of(i))
    failing(monkeypatch, call, code, times=2)
    assert not has(cache, name_of(0))
    assert not has(cache, name_of(1))
    assert name_of(0)[:12] in world.said(), "once for both"
    assert has(cache, name_of(2))
    assert fill(cache, name_of(0)), "it is fetched again"
    assert has(cache, name_of(0))
    cache.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_a_block_is_not_removed_for_a_fault_of_the_reader(
    world: World, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    cache, other = world.cache(), world.cache()
    fill(cache, name_of(0))
    failing(monkeypatch, "preadv", code, times=1)
    assert not has(cache, name_of(0))
    assert has(other, name_of(0))
    assert has(cache, name_of(0))
    assert not fill(cache, name_of(0))
    cache.close()
    other.close()


def test_a_call_that_hangs_is_given_up() -> None:
    threads = CacheThreads(2, patience_s=0.05)
    go = threading.Event()

    async def main() -> None:
        with pytest.raises(OSError, match="has not answered"):
            await threads.run(lambda stop: go.wait())
        assert threads.hang()
        assert await threads.run(lambda stop: 5) == 5
        go.set()
        while threads.hang():
            await asyncio.sleep(0.001)

    asyncio.run(main())
    threads.close()


def test_a_disk_that_fails_is_asked_less_and_less() -> None:
    watch, events = Watch(), list[FeedEvent]()
    trouble = CacheTrouble(Path("/c"), watch, events.append)
    asked_s: list[float] = []
    began = watch.now
    while watch.now < began + 600:
        ticket = trouble.attempt()
        if ticket is not None:
            asked_s.append(watch.now - began)
            trouble.failed(ticket, OSError(5, "Input/output error"))
        watch.now += 0.5
    waits = [b - a for a, b in itertools.pairwise(asked_s)]
    assert waits[:6] == [1, 2, 4, 8, 16, 32]
    assert set(waits[6:]) == {60}
    assert len(events) == 1
    assert "input/output error" in events[0].sentence


def test_of_many_that_fail_together_one_counts() -> None:
    watch, events = Watch(), list[FeedEvent]()
    trouble = CacheTrouble(Path("/c"), watch, events.append)
    tickets = [trouble.attempt() for _ in range(8)]
    late = trouble.attempt()
    for ticket in tickets:
        assert ticket is not None
        trouble.failed(ticket, OSError(28, "No space left on device"))
    assert late is not None
    trouble.worked(late)
    assert trouble.degraded(), "a write from before the failure proves nothing"
    assert trouble.attempt() is None
    watch.now += 1
    ticket = trouble.attempt()
    assert ticket is not None
    assert trouble.attempt() is None, "one tries for all"
    trouble.worked(ticket)
    assert not trouble.degraded()
    assert [e.sentence.rpartition(" ")[2] for e in events] == ["limit", "again"]
