"""What can be wrong with the file of the SQLite store: each a ``CoordError`` that names it and the way out."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sqlite3
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import CoordError
from millrace.core.ports import Entry, Write

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, which only root may")


def commit(path: Path, key: str = "k", value: bytes = b"v", **options: float) -> int:
    """One commit by a store of its own, as a command of the CLI would make it."""

    async def main() -> int:
        coord = SqliteCoordination(path, busy_timeout_s=options.get("busy_timeout_s", 0.02), attempts=2)
        try:
            return await coord.commit([Write(key, value)])
        finally:
            await coord.aclose()

    return asyncio.run(main())


def refusal(path: Path) -> str:
    """The sentence with which a commit is refused; it names the file."""
    with pytest.raises(CoordError) as refused:
        commit(path)
    sentence = str(refused.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    return sentence


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB in memory."""
    where = tmp_path / "small"
    where.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(where)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no'} does not exist; create it" in refusal(tmp_path / "no" / "coord.db")


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "not a directory" in refusal(tmp_path / "file" / "coord.db")


def test_a_file_that_is_a_directory(tmp_path: Path) -> None:
    assert "it is a directory" in refusal(tmp_path)


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CoordError, match="name no file can have"):
        commit(tmp_path / "coord\0.db")


def test_a_name_that_sqlite_would_take_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (":memory:", "file:x?mode=memory", "%41 ?#é"):
        assert commit(Path(name)) == 1
        assert commit(Path(name)) == 2
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize("garbage", [b"{}\n", b"x" * 100, b"not a database " * 1000])
def test_a_file_that_is_not_sqlite(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(garbage)
    assert "is not an SQLite file" in refusal(path)
    assert path.read_bytes() == garbage


def test_an_empty_file_is_a_new_store(tmp_path: Path) -> None:
    (tmp_path / "coord.db").write_bytes(b"")
    assert commit(tmp_path / "coord.db") == 1


def test_the_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "theirs.db"
    theirs = sqlite3.connect(path)
    theirs.execute("CREATE TABLE entries (key TEXT)")
    theirs.commit()
    theirs.close()
    before = path.read_bytes()
    assert "another program's" in refusal(path)
    assert path.read_bytes() == before


def test_the_layout_of_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    commit(path)
    newer = sqlite3.connect(path)
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    assert "newer Millrace (layout 7" in refusal(path)


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    for i in range(20):
        commit(path, f"k{i}", bytes(5000))
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    assert "is damaged" in refusal(path)


def test_a_file_that_is_locked_by_another_tool(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    commit(path)
    holding = sqlite3.connect(path, isolation_level=None)
    holding.execute("BEGIN IMMEDIATE")
    sentence = refusal(path)
    assert "locked" in sentence
    assert "another Millrace process, or a tool such as sqlite3" in sentence
    holding.execute("ROLLBACK")
    holding.close()
    assert commit(path) == 2


def test_reading_goes_on_while_another_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "coord.db"
    commit(path)
    holding = sqlite3.connect(path, isolation_level=None)
    holding.execute("BEGIN IMMEDIATE")

    async def read() -> Entry | None:
        coord = SqliteCoordination(path, busy_timeout_s=0, attempts=1)
        coord_again = SqliteCoordination(path, busy_timeout_s=0, attempts=1)
        try:
            with pytest.raises(CoordError, match="locked"):
                await coord_again.commit([Write("k", b"")])
            return await coord.get("k")
        finally:
            await coord.aclose()
            await coord_again.aclose()

    assert asyncio.run(read()) == Entry("k", b"v", 1)
    holding.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_removed_while_in_use(tmp_path: Path, replaced: bool) -> None:
    path = tmp_path / "coord.db"

    async def main() -> None:
        coord = SqliteCoordination(path)
        await coord.commit([Write("k", b"1")])
        path.unlink()
        if replaced:
            shutil.copy(__file__, path)
        for _ in range(2):
            with pytest.raises(CoordError, match="removed or replaced while in use"):
                await coord.commit([Write("k", b"2")])
        with pytest.raises(CoordError, match="removed or replaced"):
            await coord.get("k")
        await coord.aclose()

    asyncio.run(main())
    assert path.exists() == replaced


@as_root
def test_a_full_disk(mount: Path) -> None:
    path = mount / "coord.db"

    async def main() -> None:
        coord = SqliteCoordination(path)
        kept = await coord.commit([Write("kept", b"1")])
        (mount / "ballast").write_bytes(bytes(200_000))
        with pytest.raises(CoordError, match="its disk is full; free some space") as full:
            await coord.commit([Write("kept", b"2"), Write("large", bytes(400_000))])
        assert str(path) in str(full.value)
        assert await coord.get("kept") == Entry("kept", b"1", kept)
        assert await coord.get("large") is None
        (mount / "ballast").unlink()
        await coord.commit([Write("kept", b"3")])
        await coord.aclose()

    asyncio.run(main())
    assert commit(path) == 3


@as_root
def test_a_disk_that_is_full_from_the_start(mount: Path) -> None:
    with (mount / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    assert "its disk is full" in refusal(mount / "coord.db")
    (mount / "ballast").unlink()
    assert commit(mount / "coord.db") == 1


@as_root
def test_a_disk_that_is_read_only(mount: Path) -> None:
    path = mount / "coord.db"
    commit(path)
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    assert "read-only" in refusal(path)
    assert "read-only" in refusal(mount / "other.db")


def test_permissions_that_forbid_it() -> None:
    where = Path(tempfile.mkdtemp())
    where.chmod(0o755)
    (where / "shut").mkdir(mode=0o755)
    commit(where / "shut" / "coord.db")
    (where / "shut" / "coord.db").chmod(0o444)
    (where / "shut").chmod(0o555)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # No thread of ours is running.
        pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            for name in ("coord.db", "other.db"):
                os.write(writer, f"{refusal(where / 'shut' / name)}\n".encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as sentences:
        existing, new = sentences.readlines()
    assert "change the permissions" in existing
    assert "shut is not writable; change its permissions" in new
    (where / "shut").chmod(0o755)
    shutil.rmtree(where)
