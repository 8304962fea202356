"""Several real processes and one cache: one fetch for all, a bound for all, and SIGKILL at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest

COMMON = """
import asyncio, hashlib, os, random, signal, sys, time
from pathlib import Path
from millrace.feed.cache import BlockCache

class Clock:
    def now_ms(self): return time.time_ns() // 1_000_000
    def monotonic_s(self): return time.monotonic()

def name_of(i): return hashlib.sha256(b"%d" % i).hexdigest()
def pieces_of(name, size):
    half = hashlib.shake_128(name.encode()).digest(size)
    return [half, half[::-1]]
def cache_at(folder, limit=1 << 30):
    return BlockCache(Path(folder), limit_bytes=limit, clock=Clock(), on_event=lambda e: print("EVENT", e.sentence),
                      keep_free_bytes=0)
def check(cache, name, size):
    got = bytearray(2 * size)
    if not cache.read(name, lambda n: memoryview(got)[:n]):
        return False
    if bytes(got) != b"".join(pieces_of(name, size)):
        print("WRONG", name, flush=True)
        os._exit(9)
    return True
"""


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    code = COMMON + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 100) -> list[str]:
    said, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, said
    assert "EVENT" not in said, said
    return said.split()


FILLER = """
folder, seed, blocks, size = sys.argv[1], *map(int, sys.argv[2:])
cache = cache_at(folder)
order = list(range(blocks))
random.Random(seed).shuffle(order)
print("READY", flush=True)
sys.stdin.readline()

async def one(i, slots):
    async def fetch():
        print(i, flush=True)
        await asyncio.sleep(0.01)
        return pieces_of(name_of(i), size)
    async with slots:
        while not check(cache, name_of(i), size):
            await cache.fill(name_of(i), fetch)

async def main():
    slots = asyncio.Semaphore(6)
    await asyncio.gather(*(one(i, slots) for i in order))

asyncio.run(main())
cache.close()
"""


def test_four_processes_fetch_every_block_once(tmp_path: Path) -> None:
    processes = [start(FILLER, tmp_path / "c", seed, 60, 50_000) for seed in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    fetched = Counter(name for process in processes for name in finish(process))
    assert fetched == {str(i): 1 for i in range(60)}
    assert [p for d in ("tmp", "locks") for p in (tmp_path / "c/millrace-cache-1" / d).iterdir()] == []


CROWD = """
import threading
from millrace.feed.cache_locks import locked
folder, seed, limit, size = sys.argv[1], *map(int, sys.argv[2:])
cache = cache_at(folder, limit)
dice = random.Random(seed)

def total():
    # Of one moment: nobody adds or removes under this lock, only renames go on.
    root, found = Path(folder, "millrace-cache-1"), {}
    with locked(str(root / "ledger"), threading.Event(), patience_s=60):
        for shelf in [root / "tmp", *root.glob("??")]:
            for f in os.scandir(shelf):
                try:
                    found[f.name[:64]] = f.stat().st_size
                except FileNotFoundError:
                    pass
    return sum(found.values())

async def one(i):
    async def fetch(): return pieces_of(name_of(i), size)
    if not check(cache, name_of(i), size):
        await cache.fill(name_of(i), fetch)
    cache.needed(name_of(i), time.time() + dice.choice([0, 20, 1000, 5000]))

async def main():
    for _ in range(25):
        await asyncio.gather(*(one(dice.randrange(60)) for _ in range(4)))
        print(total(), flush=True)

asyncio.run(main())
cache.close()
"""


def test_the_limit_holds_for_all_of_them(tmp_path: Path) -> None:
    limit = 2_000_000  # of 60 blocks of 100 kB
    processes = [start(CROWD, tmp_path / "c", seed, limit, 50_000) for seed in range(4)]
    seen = [int(total) for process in processes for total in finish(process)]
    assert limit // 2 < max(seen) <= limit


KILLS = """
folder, seed, rounds, limit = sys.argv[1], *map(int, sys.argv[2:])
SIZE = 400_000
dice = random.Random(seed)

def child(number):
    cache = cache_at(folder, limit)
    mine = random.Random(number)
    async def one(i):
        async def fetch(): return pieces_of(name_of(i), SIZE)
        await cache.fill(name_of(i), fetch)
        cache.needed(name_of(i), time.time() + mine.choice([-10, 5, 500]))
    async def main():
        while True:
            await asyncio.gather(*(one(mine.randrange(20)) for _ in range(3)))
    asyncio.run(main())

reader = cache_at(folder, limit)
good = 0
for number in range(rounds):
    pids = []
    for k in range(2):
        pid = os.fork()
        if not pid:
            child(1000 * number + k)
        pids.append(pid)
    until = time.monotonic() + dice.uniform(0.01, 0.08)
    while time.monotonic() < until:
        good += check(reader, name_of(dice.randrange(20)), SIZE)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    good += sum(check(reader, name_of(i), SIZE) for i in range(20))
    for shelf in Path(folder, "millrace-cache-1").glob("??"):
        for file in shelf.iterdir():
            if dice.random() < 0.5:
                file.unlink()  # so that there is something to write in the next round
    # Nobody is left who writes, so all that lies there must be whole, also by its digest.
    if number % 10 == 9:
        other_boot = BlockCache(Path(folder), limit_bytes=limit, clock=Clock(), boot=b"0123456789abcdef",
                                on_event=lambda e: print("EVENT", e.sentence))
        good += sum(check(other_boot, name_of(i), SIZE) for i in range(20))
assert good > rounds, good

async def last():
    for i in range(20):
        async def fetch(): return pieces_of(name_of(i), SIZE)
        while not check(reader, name_of(i), SIZE):
            await reader.fill(name_of(i), fetch)
asyncio.run(last())
reader._ledger.sweep()
left = [p.name for d in ("tmp", "locks") for p in Path(folder, "millrace-cache-1", d).iterdir()]
assert left == [], left
reader.close()
"""


@pytest.mark.parametrize(("seed", "limit"), [(1, 1 << 30), (2, 6_000_000)], ids=["roomy", "evicting"])
def test_writers_killed_at_any_moment_leave_no_wrong_byte(tmp_path: Path, seed: int, limit: int) -> None:
    finish(start(KILLS, tmp_path / "c", seed, 30, limit))


HOLDER = """
cache = cache_at(sys.argv[1])
async def fetch():
    print("HOLDING", flush=True)
    await asyncio.sleep(1000)
asyncio.run(cache.fill(name_of(1), fetch))
"""

WAITER = """
cache = cache_at(sys.argv[1])
async def fetch():
    return pieces_of(name_of(1), 1000)
async def main():
    task = asyncio.create_task(cache.fill(name_of(1), fetch))
    done, _ = await asyncio.wait((task,), timeout=0.05)
    print("DONE" if done else "WAITING", flush=True)
    assert await task
asyncio.run(main())
assert check(cache, name_of(1), 1000)
cache.close()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_one_that_fetches_dies_the_next_one_does_it(tmp_path: Path, how: signal.Signals) -> None:
    holder = start(HOLDER, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "HOLDING\n"
    waiter = start(WAITER, tmp_path)
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == "WAITING\n"
    os.kill(holder.pid, how)
    holder.communicate()
    finish(waiter)
    assert [p for d in ("tmp", "locks") for p in (tmp_path / "millrace-cache-1" / d).iterdir()] == []
