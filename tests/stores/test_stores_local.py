"""What only a disk can get wrong: durability, crashes, permissions, full and read-only file systems."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from millrace.core.errors import (
    AccessDenied,
    AlreadyExists,
    NoSpace,
    NotFound,
    PreconditionFailed,
    ReadOnly,
    StoreError,
    Unavailable,
    Unsupported,
)
from millrace.core.ports import ObjectInfo
from millrace.stores.keys import HIDDEN_DIR
from millrace.stores.local import LocalStore

WRITER = """
import asyncio, sys
from millrace.stores.local import LocalStore

async def main(root, seed):
    store = LocalStore(root, name="disk")
    number = 0
    while True:
        byte = bytes([(seed + number) % 256])
        await store.put(f"{seed}/{number % 20}", [byte * 700_000, byte * 1_300_000])
        print(number, flush=True)
        number += 1

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""

SWAPPER = """
import asyncio, sys
from millrace.core.errors import PreconditionFailed
from millrace.stores.local import LocalStore

async def main(root, turns):
    store = LocalStore(root, name="disk")
    done = 0
    while done < turns:
        info = await store.head("counter")
        try:
            count = int(bytes(await store.get("counter", version=info.version))) + 1
            await store.put("counter", [b"%d" % count], if_version=info.version)
        except PreconditionFailed:
            continue
        done += 1
    await store.aclose()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""

CREATOR = """
import asyncio, sys
from millrace.core.errors import AlreadyExists
from millrace.stores.local import LocalStore

async def main(root, who):
    store = LocalStore(root, name="disk")
    won = []
    for number in range(40):
        try:
            await store.put(f"k/{number}", [who.encode()], mode="create")
        except AlreadyExists:
            continue
        won.append(number)
    print(*won)
    await store.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


def run(root: Path | str, body: Callable[[LocalStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = LocalStore(root, name="disk")
        try:
            await body(store)
        finally:
            await store.aclose()

    asyncio.run(main())


async def listing(store: LocalStore, prefix: str = "") -> dict[str, ObjectInfo]:
    return {info.key: info async for page in store.list(prefix) for info in page}


def leftovers(root: Path) -> set[str]:
    return set(os.listdir(root / HIDDEN_DIR)) - {"lock"}


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that another user can reach, which pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="millrace-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """Permissions mean nothing to root, so root becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small tmpfs with the options given, where the machine lets us."""
    target = tmp_path / "mounted"
    target.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip("not allowed to mount here")
        return target

    yield mount
    subprocess.run(["umount", str(target)], capture_output=True, check=False)


# --- durability and atomicity -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["overwrite", "create"])
def test_data_then_name_then_directory_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The order is what makes a put durable, and a power cut is hard to come by in a test."""
    root = tmp_path / "new" / "store"
    seen: list[str] = []
    fsync, replace, link, mkdir = os.fsync, os.replace, os.link, os.mkdir

    def note_fsync(handle: int) -> None:
        fsync(handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        seen.append("fsync data" if path.endswith(".part") else f"fsync {os.path.relpath(path, tmp_path)}")

    def note_replace(source: str, target: str) -> None:
        replace(source, target)
        seen.append("name")

    def note_link(source: str, target: str) -> None:
        link(source, target)
        seen.append("name")

    def note_mkdir(path: str) -> None:
        mkdir(path)
        seen.append(f"mkdir {os.path.relpath(path, tmp_path)}")

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "link", note_link)
    monkeypatch.setattr(os, "mkdir", note_mkdir)

    async def body(store: LocalStore) -> None:
        await store.put("a/b/c", [b"x"], mode=mode)  # type: ignore[arg-type]

    run(root, body)
    assert seen.index("fsync data") < seen.index("name")
    assert seen[-2:] == ["name", "fsync new/store/a/b"]
    for made, parent in (("new", "."), ("new/store", "new"), ("new/store/a", "new/store"), ("new/store/a/b", None)):
        made_at = seen.index(f"mkdir {made}")
        assert made_at < seen.index(f"fsync {parent or 'new/store/a'}", made_at) < seen.index("name")


def test_killed_writers_leave_whole_objects_only(tmp_path: Path) -> None:
    dice = random.Random(2)
    for seed in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "s"), str(seed)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        for _ in range(dice.randrange(2, 25)):
            writer.stdout.readline()
        time.sleep(dice.random() * 0.01)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()

    async def body(store: LocalStore) -> None:
        found = await listing(store)
        assert found
        for key, info in found.items():
            assert info.size_bytes == 2_000_000
            whole = bytes(await store.get(key))
            assert whole == whole[:1] * 2_000_000

    run(tmp_path / "s", body)


def test_temporary_files_of_dead_writers_are_swept_and_those_of_living_ones_are_not(tmp_path: Path) -> None:
    hidden = tmp_path / HIDDEN_DIR
    hidden.mkdir()
    long_ago = time.time() - 3600
    for name in ("dead.part", "living.part", "young.part"):
        (hidden / name).write_bytes(b"half of it")
        if name != "young.part":
            os.utime(hidden / name, (long_ago, long_ago))

    async def body(store: LocalStore) -> None:
        await store.put("a", [b"x"])
        assert leftovers(tmp_path) == {"living.part", "young.part"}
        assert set(await listing(store)) == {"a"}

    with (hidden / "living.part").open("rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        run(tmp_path, body)


def test_a_cancelled_put_leaves_no_temporary_file_and_no_work(tmp_path: Path) -> None:
    piece = bytes(8 << 20)

    async def body(store: LocalStore) -> None:
        await store.put("first", [b"x"])
        for number in range(8):
            put = asyncio.ensure_future(store.put(f"k/{number}", [piece] * 4))
            await asyncio.sleep(0.004 * number)
            put.cancel()
            await asyncio.wait([put])
            assert leftovers(tmp_path) == set()

    run(tmp_path, body)


def test_a_put_that_waits_for_the_lock_can_be_cancelled(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        await store.put("a", [b"x"])
        with (tmp_path / HIDDEN_DIR / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            put = asyncio.ensure_future(store.put("a", [b"y"]))
            done, _ = await asyncio.wait([put], timeout=0.1)
            assert not done
            put.cancel()
            await asyncio.wait([put])
            assert put.cancelled()
        assert bytes(await store.get("a")) == b"x"
        assert leftovers(tmp_path) == set()

    run(tmp_path, body)


def test_compare_and_swap_holds_between_processes(tmp_path: Path) -> None:
    async def prepare(store: LocalStore) -> None:
        await store.put("counter", [b"0"])

    async def check(store: LocalStore) -> None:
        assert bytes(await store.get("counter")) == b"150"

    run(tmp_path, prepare)
    command = [sys.executable, "-c", SWAPPER, str(tmp_path), "50"]
    swappers = [subprocess.Popen(command) for _ in range(3)]
    assert [swapper.wait(60) for swapper in swappers] == [0, 0, 0]
    run(tmp_path, check)


def test_a_clock_that_stands_still_gives_every_write_its_own_version(tmp_path: Path) -> None:
    async def main() -> None:
        store = LocalStore(tmp_path, name="disk", now_ns=lambda: 1_700_000_000_000_000_000)
        versions = [(await store.put("k", [b"%d" % number])).version for number in range(5)]
        assert len(set(versions)) == 5
        assert (await store.head("k")).version == versions[-1]
        await store.aclose()

    asyncio.run(main())


def test_a_root_removed_in_between_is_made_again(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        await store.put("a/b", [b"1"])
        shutil.rmtree(tmp_path / "store")
        assert await listing(store) == {}
        with pytest.raises(NotFound):
            await store.get("a/b")
        await store.delete("a/b")
        await store.put("a/b", [b"2"], mode="create")
        assert bytes(await store.get("a/b")) == b"2"
        shutil.rmtree(tmp_path / "store" / "a")
        await store.put("a/b", [b"3"])
        assert bytes(await store.get("a/b")) == b"3"

    run(tmp_path / "store", body)


# --- files that others change -------------------------------------------------------------------------


def test_a_file_that_changed_is_named(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        path = tmp_path / "in.txt"
        path.write_bytes(b"before")
        planned = await store.head("in.txt")
        path.write_bytes(b"after!")
        os.utime(path, ns=(1, 1))
        with pytest.raises(PreconditionFailed, match=r"in\.txt"):
            await store.get("in.txt", version=planned.version)
        path.unlink()
        with pytest.raises(NotFound, match=r"in\.txt"):
            await store.get("in.txt", version=planned.version)

    run(tmp_path, body)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.bin"
    path.write_bytes(bytes(5 << 20))
    pread, preadv = os.pread, os.preadv

    def cut() -> None:
        os.truncate(path, 1000)

    def cutting_pread(handle: int, size: int, offset: int) -> bytes:
        cut()
        return pread(handle, size, offset)

    def cutting_preadv(handle: int, buffers: list[memoryview], offset: int) -> int:
        cut()
        return preadv(handle, buffers, offset)

    async def body(store: LocalStore) -> None:
        before = await store.head("in.bin")
        monkeypatch.setattr(os, "pread", cutting_pread)
        monkeypatch.setattr(os, "preadv", cutting_preadv)
        with pytest.raises(PreconditionFailed, match=r"in\.bin"):
            await store.get("in.bin", version=before.version)
        monkeypatch.undo()
        path.write_bytes(bytes(5000))
        monkeypatch.setattr(os, "pread", cutting_pread)
        with pytest.raises(Unavailable, match=r"in\.bin.*cut short"):
            await store.get("in.bin")

    run(tmp_path, body)


def test_a_named_pipe_is_no_object_and_nobody_waits_for_it(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(NotFound):
            await store.get("pipe")
        with pytest.raises(NotFound):
            await store.head("pipe")
        assert await listing(store) == {}

    run(tmp_path, body)


# --- what a disk can't or won't hold ------------------------------------------------------------------


def test_an_object_and_a_folder_of_one_name_do_not_fit_and_the_sentence_says_so(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        await store.put("a", [b"x"])
        for call in (store.put("a/b", [b"y"]), store.put("a/b", [b"y"], mode="create")):
            with pytest.raises(Unsupported, match="an object and a folder of one name"):
                await call
        await store.put("d/e", [b"x"])
        with pytest.raises(Unsupported, match="an object and a folder of one name"):
            await store.put("d", [b"y"])
        await store.delete("d")
        assert set(await listing(store)) == {"a", "d/e"}
        with pytest.raises(Unsupported, match="255 bytes"):
            await store.put("n" * 300, [b"x"])
        with pytest.raises(NotFound):
            await store.get("n" * 300)
        assert leftovers(tmp_path) == set()

    run(tmp_path, body)


def test_a_full_disk_is_named_and_keeps_what_was_there(mounted: Callable[[str], Path]) -> None:
    root = mounted("size=2m")

    async def body(store: LocalStore) -> None:
        await store.put("kept", [bytes(500_000)])
        with pytest.raises(NoSpace, match="store disk has no space left for 'big'") as full:
            await store.put("big", [bytes(1 << 20)] * 3)
        assert (full.value.store, full.value.key, full.value.retryable) == ("disk", "big", False)
        with pytest.raises(NoSpace):
            await store.put("kept", [bytes(1 << 20)] * 3)
        assert leftovers(root) == set()
        assert len(await store.get("kept")) == 500_000
        await store.put("small", [bytes(500_000)])
        assert set(await listing(store)) == {"kept", "small"}

    run(root, body)


def test_a_read_only_disk_is_named(mounted: Callable[[str], Path]) -> None:
    root = mounted("size=2m")

    async def prepare(store: LocalStore) -> None:
        await store.put("a", [b"x"])

    async def body(store: LocalStore) -> None:
        for call in (
            store.put("b", [b"y"]),
            store.put("a", [b"y"]),
            store.put("b", [b"y"], mode="create"),
            store.delete("a"),
        ):
            with pytest.raises(ReadOnly, match="store disk is read-only"):
                await call
        await store.delete("never/was")
        with pytest.raises(ReadOnly):
            await store.capabilities()
        assert bytes(await store.get("a")) == b"x"

    run(root, prepare)
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    run(root, body)


def test_permissions_are_named(open_dir: Path, as_nobody: None) -> None:
    async def body(store: LocalStore) -> None:
        with pytest.raises(AccessDenied, match="permission denied to write 'b'"):
            await store.put("b", [b"y"])
        with pytest.raises(AccessDenied, match="permission denied to read 'secret'"):
            await store.get("secret")
        with pytest.raises(AccessDenied):
            await store.capabilities()

    # Root made the directory and owns it; whoever runs this otherwise is kept out by the modes.
    if os.getuid() == 0:
        os.seteuid(0)
    (open_dir / "secret").write_bytes(b"x")
    (open_dir / "secret").chmod(0)
    open_dir.chmod(0o555)
    if os.getuid() == 0:
        os.seteuid(65534)
    run(open_dir, body)
    if os.getuid() == 0:
        os.seteuid(0)
    open_dir.chmod(0o755)


def test_one_file_is_a_store_to_read(tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(b"data")
    (tmp_path / "two.bin").write_bytes(b"other")

    async def main() -> None:
        store = LocalStore(tmp_path, name="disk", only="one.bin")
        assert store.url.endswith("/one.bin")
        assert set(await listing(store)) == {"one.bin"}
        assert set(await listing(store, "o")) == {"one.bin"}
        assert await listing(store, "two") == {}
        assert bytes(await store.get("one.bin")) == b"data"
        with pytest.raises(NotFound, match=r"one\.bin"):
            await store.get("two.bin")
        for call in (store.put("one.bin", [b"x"]), store.delete("one.bin"), store.capabilities()):
            with pytest.raises(ReadOnly):
                await call
        await store.aclose()

    asyncio.run(main())
    assert not (tmp_path / HIDDEN_DIR).exists()


def test_creators_in_several_processes_have_one_winner(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATOR, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(who)], stdout=subprocess.PIPE, text=True) for who in range(3)]
    won = [writer.communicate(timeout=60)[0].split() for writer in writers]
    assert sorted(int(number) for wins in won for number in wins) == list(range(40))
    for who, wins in enumerate(won):
        assert all((tmp_path / "k" / number).read_text() == str(who) for number in wins)


def test_errors_are_store_errors_with_the_store_named(tmp_path: Path) -> None:
    async def body(store: LocalStore) -> None:
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(StoreError, match="leads to itself") as looped:
            await store.get("loop")
        assert looped.value.store == "disk"
        assert not looped.value.retryable
        with pytest.raises(AlreadyExists):
            await store.put("loop", [b"x"], mode="create")

    run(tmp_path, body)
