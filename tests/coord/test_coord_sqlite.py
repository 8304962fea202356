"""The SQLite store between connections, threads and processes, and across kill -9."""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import Fenced
from millrace.core.ports import Change, Entry, Write

CHILD = """
import asyncio, sys
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import Conflict
from millrace.core.ports import Compare, Write

async def main():
    coord = SqliteCoordination(sys.argv[1], poll_interval_s=0.01)
{body}
    await coord.aclose()

asyncio.run(main())
"""


def child(path: Path, body: str, *args: str) -> subprocess.Popen[str]:
    """A process of its own that runs ``body`` with ``coord`` open on ``path``."""
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    command = [sys.executable, "-c", CHILD.format(body=lines), str(path), *args]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def play(path: Path, scenario: Callable[[SqliteCoordination], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        coord = SqliteCoordination(path, poll_interval_s=0.01)
        try:
            await scenario(coord)
        finally:
            await coord.aclose()

    asyncio.run(main())


def test_two_connections_see_each_others_writes_and_watches(tmp_path: Path) -> None:
    async def scenario(one: SqliteCoordination) -> None:
        two = SqliteCoordination(tmp_path / "coord.db", poll_interval_s=0.01)
        changes = two.watch("k")
        waiting = asyncio.ensure_future(anext(changes))
        revision = await one.commit([Write("k", b"1")])
        assert await waiting == Change(Entry("k", b"1", revision))
        assert await two.get("k") == Entry("k", b"1", revision)
        gone = await one.commit([Write("k", None)])
        assert await anext(changes) == Change(Entry("k", b"", gone), deleted=True)
        lease = await one.acquire("l", "a", 100, now_ms=0)
        await two.acquire("l", "b", 100, now_ms=0, steal=True)
        with pytest.raises(Fenced):
            await one.commit([Write("k", b"2")], guard=lease)
        await two.aclose()

    play(tmp_path / "coord.db", scenario)


def test_two_processes_answer_each_other_through_watches(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    answering = child(
        path,
        """
async for change in coord.watch("ask/"):
    if change.entry.value == b"stop":
        break
    await coord.commit([Write("answer", b"heard " + change.entry.value)])
""",
    )

    async def scenario(coord: SqliteCoordination) -> None:
        answers = coord.watch("answer")
        for word in (b"run", b"pause"):
            await coord.commit([Write("ask/1", word)])
            assert (await anext(answers)).entry.value == b"heard " + word
        await coord.commit([Write("ask/1", b"stop")])

    with answering:
        play(path, scenario)
        assert answering.wait(30) == 0


def test_increments_from_several_processes_lose_no_update(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    body = """
for _ in range(25):
    while True:
        entry = await coord.get("n")
        value, revision = (int(entry.value), entry.revision) if entry else (0, 0)
        try:
            await coord.commit([Write("n", b"%d" % (value + 1))], compares=[Compare("n", revision)])
            break
        except Conflict:
            pass
"""
    children = [child(path, body) for _ in range(4)]
    for process in children:
        with process:
            assert process.wait(60) == 0

    async def scenario(coord: SqliteCoordination) -> None:
        entry = await coord.get("n")
        assert entry is not None
        assert entry.value == b"100"

    play(path, scenario)


def test_many_may_lay_out_a_new_file_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        for turn in range(8):
            stores = [SqliteCoordination(tmp_path / f"{turn}.db") for _ in range(6)]
            done = await asyncio.gather(*(store.commit([Write("k", b"")]) for store in stores))
            assert sorted(done) == [1, 2, 3, 4, 5, 6]
            for store in stores:
                await store.aclose()

    asyncio.run(main())


def test_kill_9_loses_no_acknowledged_commit(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    body = """
value = bytes(int(sys.argv[3]))
for i in range(100_000):
    key = f"{sys.argv[2]}/{i:06}"
    revision = await coord.commit([Write(key, value), Write("last", key.encode())])
    print(key, revision, flush=True)
"""
    acknowledged: dict[str, int] = {}
    # The large values make checkpoints run in the middle of it.
    for turn, (commits, size) in enumerate([(1, 10), (40, 10), (25, 400_000), (90, 100_000), (60, 16_384)]):
        process = child(path, body, str(turn), str(size))
        with process:
            assert process.stdout is not None
            lines = list(itertools.islice(process.stdout, commits))
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
            assert process.wait(30) == -signal.SIGKILL
        # A line cut off by the kill was not read to its end: it acknowledges nothing.
        acknowledged |= {line.split()[0]: int(line.split()[1]) for line in lines if line.endswith("\n")}

    async def scenario(coord: SqliteCoordination) -> None:
        for key, revision in acknowledged.items():
            entry = await coord.get(key)
            assert entry is not None, key
            assert entry.revision == revision
        last = await coord.get("last")
        assert last is not None
        assert await coord.get(last.value.decode()) is not None, "half of a commit is there"
        assert await coord.commit([Write("after", b"")]) > max(acknowledged.values())

    assert len(acknowledged) >= 216
    play(path, scenario)
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


def test_the_log_stays_bounded(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    sizes: list[int] = []

    async def scenario(coord: SqliteCoordination) -> None:
        for _ in range(40):
            await coord.commit([Write("k", bytes(500_000))])
            sizes.append((tmp_path / "coord.db-wal").stat().st_size)

    play(path, scenario)
    assert max(sizes) < 8 << 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["coord.db"]


def test_closing_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())

    async def scenario(coord: SqliteCoordination) -> None:
        await coord.commit([Write("k", b"")])
        assert set(threading.enumerate()) > before

    play(tmp_path / "coord.db", scenario)
    assert set(threading.enumerate()) == before


def test_nothing_is_opened_before_it_is_used(tmp_path: Path) -> None:
    async def scenario(coord: SqliteCoordination) -> None:
        coord.watch("k")

    play(tmp_path / "coord.db", scenario)
    assert list(tmp_path.iterdir()) == []


def test_it_can_be_pickled_to_another_process(tmp_path: Path) -> None:
    async def scenario(coord: SqliteCoordination) -> None:
        revision = await coord.commit([Write("k", b"1")])
        copy = pickle.loads(pickle.dumps(coord))
        assert await copy.get("k") == Entry("k", b"1", revision)
        await copy.aclose()

    play(tmp_path / "coord.db", scenario)


def test_a_forked_child_opens_the_file_anew(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    coord = SqliteCoordination(path)
    asyncio.run(coord.commit([Write("parent", b"1")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # The store's thread is there: that is the point.
        pid = os.fork()
    if pid == 0:
        try:
            asyncio.run(coord.commit([Write("child", b"2")]))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)

    async def read() -> list[str]:
        await coord.commit([Write("parent", b"3")])
        found = [entry.key for entry in await coord.list("")]
        await coord.aclose()
        return found

    assert asyncio.run(read()) == ["child", "parent"]


def test_a_cancelled_call_leaves_the_store_usable(tmp_path: Path) -> None:
    async def scenario(coord: SqliteCoordination) -> None:
        tasks = [asyncio.create_task(coord.commit([Write(f"k{i}", b"")])) for i in range(10)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kept = {entry.key for entry in await coord.list("")}
        assert {f"k{i}" for i, result in enumerate(results) if isinstance(result, int)} <= kept
        assert await coord.commit([Write("k", b"")]) == len(kept) + 1

    play(tmp_path / "coord.db", scenario)
