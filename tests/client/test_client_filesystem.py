"""``millrace://``: what reads it through fsspec gets a version's verified bytes, whatever became of some replicas."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.feather as feather
import pyarrow.fs as pafs
import pytest

from millrace.client.checkpoints import checkpoints
from millrace.client.filesystem import MillraceFile, MillraceFileSystem
from millrace.client.session import session_for
from millrace.client.tree import Part, Shelf
from millrace.core.errors import MillraceError, ReadOnly, Unavailable, UsageError

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
here: aws/us-east-1
"""
PIPELINE = {
    "dataset": "rivers",
    "sources": [{"url": "file://./data", "format": "lines"}],
    "chunk": 4096,
    "shards": {"size": 2048, "block_rows": 16},
    "placement": {"replicas": 2, "min_clouds": 2},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with two versions of ``rivers`` and one of ``empty``."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    (folder / "world.yaml").write_text(WORLD)
    for version in (1, 2):
        (folder / "data" / f"{version}.txt").write_text("".join(f"river {version}.{i}\n" for i in range(700)))
        run(folder, PIPELINE)
    nothing = [{"sql": "SELECT * FROM records WHERE false"}]
    run(folder, PIPELINE | {"dataset": "empty", "transforms": nothing})
    return folder


def run(folder: Path, pipeline: dict[str, Any]) -> None:
    (folder / "pipeline.yaml").write_text(json.dumps(pipeline))
    command = [sys.executable, "-m", "millrace", "run", "pipeline.yaml", "--workers", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that world, to be damaged."""
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    yield copy
    session_for(copy / "world.yaml").close()


@pytest.fixture
def fs(folder: Path) -> MillraceFileSystem:
    return MillraceFileSystem(world=folder / "world.yaml", skip_instance_cache=True)


def replicas(folder: Path, digest: str) -> list[Path]:
    return sorted(folder.glob(f"world/*/shards/*/{digest}.arrow"))


def lines(*versions: int) -> list[str]:
    return [f"river {version}.{i}" for version in versions for i in range(700)]


# --- the tree -----------------------------------------------------------------------------------------


def test_the_root_lists_datasets_and_a_version_its_shards_in_order(fs: MillraceFileSystem) -> None:
    assert fs.ls("millrace://", detail=False) == ["empty", "rivers"]
    assert [(i["type"], i["version"], i["rows"]) for i in fs.ls("")] == [("directory", 1, 0), ("directory", 2, 1400)]
    shards = fs.ls("millrace://rivers@1/")
    assert [i["name"] for i in shards] == [f"rivers@1/{k:06}.arrow" for k in range(len(shards))]
    assert len(shards) > 3
    assert sum(i["rows"] for i in shards) == 700
    assert fs.ls("empty") == []
    assert fs.ls("rivers@1/000001.arrow") == [shards[1]] == [fs.info("millrace://rivers@1/000001.arrow")]
    assert fs.du("rivers@1") == sum(i["size"] for i in shards)


def test_a_version_has_its_number_its_digest_and_no_number(fs: MillraceFileSystem) -> None:
    digest = fs.info("rivers@2")["digest"]
    assert [fs.info(f"rivers{which}")["digest"] for which in ("", f"@{digest}", f"@{digest[:10]}")] == [digest] * 3
    assert fs.info("rivers@1")["digest"] != digest
    assert fs.info(f"rivers@{digest}") == {
        "name": f"rivers@{digest}",
        "size": 0,
        "type": "directory",
        "version": 2,
        "digest": digest,
        "rows": 1400,
    }


def test_globs_and_walks_find_what_is_there(fs: MillraceFileSystem) -> None:
    shards = fs.ls("rivers@1", detail=False)
    assert fs.glob("millrace://rivers@1/*.arrow") == shards
    assert fs.glob("rivers@1/00000[01].*") == shards[:2]
    assert fs.glob("riv*") == ["rivers"]
    assert fs.find("") == fs.ls("rivers", detail=False)
    assert [(root, dirs) for root, dirs, _ in fs.walk("")] == [("", ["empty", "rivers"]), ("empty", []), ("rivers", [])]


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("rivesr", "there is no dataset 'rivesr'; did you mean 'rivers'?"),
        ("rivers@7/000000.arrow", "dataset rivers has no version 7; there is rivers@1"),
        ("rivers@", "'rivers@' names no version"),
        (
            "rivers@1/999999.arrow",
            "there is no file 'rivers@1/999999.arrow'; in rivers@1 there is 000000.arrow to 0000",
        ),
        ("rivers@1/0.arrow", "there is no file"),
        ("rivers@1/00000\u0660.arrow", "there is no file"),
        ("rivers@1/000000.arrow/x", "there is no file"),
        ("empty/000000.arrow", "in empty@1 there is nothing: it has no rows"),
    ],
)
def test_what_is_missing_is_not_found_in_a_sentence(fs: MillraceFileSystem, path: str, sentence: str) -> None:
    for ask in (fs.info, fs.ls, fs.open, fs.cat_file):
        with pytest.raises(FileNotFoundError) as caught:
            ask(path)
        assert sentence in str(caught.value)
    assert [fs.exists(path), fs.isfile(path), fs.isdir(path)] == [False] * 3


def test_a_directory_is_not_a_file(fs: MillraceFileSystem) -> None:
    assert [fs.isdir(""), fs.isdir("rivers"), fs.isfile("rivers@1")] == [True, True, False]
    for path in ("", "rivers@1"):
        with pytest.raises(IsADirectoryError, match="is a directory"):
            fs.open(path)


@pytest.mark.parametrize(
    "url",
    [
        "millrace://rivers@1/000000.arrow",
        "rivers@1/000000.arrow",
        "/rivers@1//000000.arrow/",
        "millrace:///rivers@1/000000.arrow",
    ],
)
def test_paths_have_one_spelling(url: str) -> None:
    assert MillraceFileSystem._strip_protocol(url) == "rivers@1/000000.arrow"
    assert MillraceFileSystem._strip_protocol([url, "millrace://"]) == ["rivers@1/000000.arrow", ""]


def test_a_name_stays_the_version_it_was_until_told_to_look_again(folder: Path, fs: MillraceFileSystem) -> None:
    before = fs.info("rivers")["digest"]
    (folder / "data" / "3.txt").write_text("river 3.0\n")
    run(folder, PIPELINE)
    assert fs.info("rivers")["digest"] == before
    assert len(fs.find("rivers")) == len(fs.find("rivers@2"))
    fs.invalidate_cache()
    assert fs.info("rivers")["digest"] == fs.info("rivers@3")["digest"] != before


# --- bytes --------------------------------------------------------------------------------------------


def test_a_file_is_the_shard_its_digest_names(folder: Path, fs: MillraceFileSystem) -> None:
    for info in fs.ls("rivers@2"):
        data = fs.cat_file(info["name"])
        assert hashlib.sha256(data).hexdigest() == info["digest"]
        assert len(data) == info["size"]
    path = fs.ls("rivers@2", detail=False)[0]
    data = fs.cat_file(path)
    for start, end in [(None, None), (0, 0), (8, 100), (-10, None), (5, -5), (100, 50), (0, 10**9), (10**9, None)]:
        assert fs.cat_file(path, start, end) == data[start:end]
    assert fs.cat_ranges([path, path], [0, 8], [8, 30]) == [data[:8], data[8:30]]
    assert fs.cat("rivers@2/00000[0]*") == {path: data}
    fs.get(path, str(folder / "out.arrow"))
    assert (folder / "out.arrow").read_bytes() == data


def test_a_file_reads_and_seeks_like_any_other(fs: MillraceFileSystem) -> None:
    path = "rivers@1/000000.arrow"
    plain = io.BytesIO(fs.cat_file(path))
    with fs.open(path) as file:
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        assert file.size == len(plain.getvalue())
        room = bytearray(50)
        for step in (
            lambda f: f.read(10),
            lambda f: f.readline(),
            lambda f: f.seek(-20, io.SEEK_END),
            lambda f: f.read(100),
            lambda f: f.seek(3),
            lambda f: f.seek(4, io.SEEK_CUR),
            lambda f: (f.readinto(room), bytes(room)),
            lambda f: f.seek(10**9) and f.read(),
            lambda f: f.seek(0) or f.readlines(),
            lambda f: f.tell(),
        ):
            assert step(file) == step(plain)
        with pytest.raises(ValueError, match="can't be positioned"):
            file.seek(-1)
    with pytest.raises(ValueError, match="is closed"):
        file.read()


def test_a_file_of_several_parts_is_one_file(fs: MillraceFileSystem) -> None:
    fs.info("")  # opens the session
    data = bytes(range(250)) * 4
    parts = tuple(in_memory(data[i : i + 300]) for i in range(0, len(data), 300))
    file, plain = MillraceFile(fs, "x", parts), io.BytesIO(data)
    assert file.size == len(data)
    for start in (0, 299, 300, 301, 650, 999, 1000):
        for size in (0, 1, 2, 301, 700, -1):
            assert file.seek(start) == plain.seek(start)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()


def in_memory(data: bytes) -> Part:
    async def fetch() -> memoryview:
        return memoryview(data)

    return Part(hashlib.sha256(data).hexdigest(), len(data), fetch)


def test_arrow_reads_a_version_as_one_dataset(fs: MillraceFileSystem) -> None:
    arrow = pafs.PyFileSystem(pafs.FSSpecHandler(fs))
    for filesystem in (arrow, fs):
        dataset = pads.dataset("rivers@1", filesystem=filesystem, format="arrow")
        assert dataset.count_rows() == 700
        assert dataset.to_table().column("text").to_pylist() == lines(1)
    assert pads.dataset("rivers", filesystem=arrow, format="arrow").to_table().column("text").to_pylist() == lines(1, 2)
    assert feather.read_table(fs.open("rivers@1/000000.arrow")).num_rows == fs.info("rivers@1/000000.arrow")["rows"]
    assert arrow.get_file_info("rivers@9").type == pafs.FileType.NotFound


def test_arrow_reads_without_copying(fs: MillraceFileSystem) -> None:
    with fs.open("rivers@1/000000.arrow") as file:
        whole = pa.py_buffer(file.read_buffer())
        file.seek(0)
        batch = pa.ipc.open_file(pa.PythonFile(file, mode="r")).get_batch(0)
        values = batch.column("text").buffers()[2]
        assert whole.address <= values.address < whole.address + whole.size
        assert not values.is_mutable


def test_urls_are_opened_by_their_protocol(folder: Path) -> None:
    options = {"world": str(folder / "world.yaml")}
    with fsspec.open("millrace://rivers@1/000000.arrow", **options) as file:
        assert file.read(6) == b"ARROW1"
    fs, path = fsspec.url_to_fs("millrace://rivers@1/000000.arrow", **options)
    assert (type(fs), path) == (MillraceFileSystem, "rivers@1/000000.arrow")
    assert fs is fsspec.filesystem("millrace", **options)


def test_pandas_reads_a_shard(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_feather(
        "millrace://rivers@1/000000.arrow", storage_options={"world": str(folder / "world.yaml")}
    )
    assert frame["text"].tolist() == lines(1)[: len(frame)]


# --- checkpoints --------------------------------------------------------------------------------------


def test_checkpoints_are_files_too(folder: Path, fs: MillraceFileSystem) -> None:
    assert fs.ls("checkpoints") == []
    (folder / "state" / "deep").mkdir(parents=True)
    (folder / "state" / "deep" / "model.bin").write_bytes(b"weights")
    (folder / "state" / "empty").write_bytes(b"")
    with checkpoints("run-7", world=folder / "world.yaml", placement={"replicas": 2, "min_clouds": 2}) as series:
        series.save(1200, folder / "state")
    base = "checkpoints/run-7/1200"
    assert fs.ls("", detail=False) == ["empty", "rivers", "checkpoints"]
    assert fs.find("millrace://checkpoints") == [f"{base}/deep/model.bin", f"{base}/empty"]
    assert fs.glob(f"{base}/**/*.bin") == [f"{base}/deep/model.bin"]
    assert fs.cat(fs.find(base)) == {f"{base}/deep/model.bin": b"weights", f"{base}/empty": b""}
    fs.get(base, str(folder / "restored"), recursive=True)
    assert (folder / "restored" / "deep" / "model.bin").read_bytes() == b"weights"
    with pytest.raises(FileNotFoundError, match="run-7 has no checkpoint of step 7"):
        fs.info("checkpoints/run-7/7/empty")
    with pytest.raises(FileNotFoundError, match="there are no checkpoints of 'run-8'"):
        fs.ls("checkpoints/run-8")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_a_checkpoint_where_it_lies(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    reader = pytest.importorskip("torch.distributed.checkpoint._fsspec_filesystem").FsspecReader
    saved = {"w": torch.arange(100_000, dtype=torch.float32), "step": 7}
    with checkpoints("run-7", world=folder / "world.yaml", placement={"replicas": 2, "min_clouds": 2}) as series:
        series.save(7, dict(saved))
    for path in (folder / ".millrace").rglob("checkpoints/run-7/objects/*/*"):
        path.unlink()  # another machine has only the replicas
    loaded = {"w": torch.zeros(100_000), "step": 0}
    url = "millrace://checkpoints/run-7/7"
    dcp.load(loaded, storage_reader=reader(url, world=str(folder / "world.yaml")), no_dist=True)
    assert torch.equal(loaded["w"], saved["w"])
    assert loaded["step"] == 7


# --- faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["deleted", "rotten", "cut", "store gone"])
def test_another_replica_takes_over(folder: Path, fs: MillraceFileSystem, damage: str) -> None:
    digests = [i["digest"] for i in fs.ls("rivers@2")]
    if damage == "store gone":
        shutil.rmtree(folder / "world" / "aws")
    for i, digest in enumerate(digests):
        if damage == "store gone":
            continue
        path = replicas(folder, digest)[i % 2]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.unlink()
        if damage != "deleted":
            path.write_bytes(data if damage == "rotten" else data[:-1])
    table = pads.dataset("rivers@2", filesystem=fs, format="arrow").to_table()
    assert table.column("text").to_pylist() == lines(1, 2)


def test_a_shard_without_a_true_replica_is_an_error_that_names_its_stores(folder: Path, fs: MillraceFileSystem) -> None:
    info = fs.info("rivers@1/000001.arrow")
    rotten, gone = replicas(folder, info["digest"])
    rotten.write_bytes(bytes(info["size"]))
    gone.unlink()
    with fs.open(info["name"]) as file, pytest.raises(Unavailable) as caught:
        file.read(1)
    assert "aws-main: the bytes are not those the digest names" in str(caught.value)
    assert "gcp-main" in str(caught.value)
    assert "verify --repair" in str(caught.value)
    with pytest.raises(Unavailable):
        pads.dataset("rivers@1", filesystem=fs, format="arrow").to_table()
    assert fs.cat_file("rivers@1/000000.arrow")[:6] == b"ARROW1"


def test_what_was_verified_is_kept(folder: Path, fs: MillraceFileSystem) -> None:
    data = fs.cat_file("rivers@1/000000.arrow")
    shutil.rmtree(folder / "world")
    assert fs.cat_file("rivers@1/000000.arrow") == data
    other = MillraceFileSystem(world=folder / "world.yaml", skip_instance_cache=True)
    assert other.cat_file("rivers@1/000000.arrow", 0, 6) == b"ARROW1"
    with pytest.raises(MillraceError):
        fs.cat_file("rivers@1/000001.arrow")


def test_the_shelf_holds_no_more_than_it_may(fs: MillraceFileSystem) -> None:
    fs.info("")  # opens the session
    asked: list[str] = []
    shelf = Shelf(100)

    def part(name: str, size: int) -> Part:
        async def fetch() -> memoryview:
            asked.append(name)
            return memoryview(name.encode() * size)

        return Part(name, size, fetch)

    def get(name: str, size: int) -> None:
        assert fs._call(shelf.get(part(name, size))) == name.encode() * size

    for name, size in [("a", 40), ("b", 40), ("a", 40), ("c", 40), ("a", 40), ("b", 40)]:
        get(name, size)
    assert asked == ["a", "b", "c", "b"]
    get("d", 500)  # larger than all: alone
    get("d", 500)
    get("a", 40)
    assert asked[4:] == ["d", "a"]


def test_threads_that_want_one_shard_fetch_it_once(folder: Path, fs: MillraceFileSystem) -> None:
    path = "rivers@1/000000.arrow"
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fs.cat_file(path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 8


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda fs, path: fs.open(path, "wb"),
        lambda fs, path: fs.open(path, "w"),
        lambda fs, path: fs.open(path, "ab"),
        lambda fs, path: fs.pipe_file(path, b"x"),
        lambda fs, path: fs.pipe(path, b"x"),
        lambda fs, path: fs.put_file(__file__, path),
        lambda fs, path: fs.touch(path),
        lambda fs, path: fs.mkdir("x"),
        lambda fs, path: fs.makedirs("x"),
        lambda fs, path: fs.rm(path),
        lambda fs, path: fs.rm("rivers@1", recursive=True),
        lambda fs, path: fs.rmdir("rivers@1"),
        lambda fs, path: fs.cp_file(path, "x"),
        lambda fs, path: fs.mv(path, "rivers@1/x"),
    ],
)
def test_nothing_can_be_written(fs: MillraceFileSystem, write: Callable[[MillraceFileSystem, str], object]) -> None:
    before = fs.find("")
    with pytest.raises(ReadOnly, match=r"^millrace://.* can't be written: millrace:// is for reading; "):
        write(fs, "rivers@1/000000.arrow")
    assert fs.find("") == before


def test_a_world_that_is_not_there_is_an_error_and_not_an_absence(tmp_path: Path) -> None:
    fs = MillraceFileSystem(world=tmp_path / "world.yaml", skip_instance_cache=True)
    for ask in (fs.exists, fs.isfile, fs.isdir, fs.ls):
        with pytest.raises(UsageError, match="there is no world file"):
            ask("rivers")


# --- processes ----------------------------------------------------------------------------------------


def test_a_pickled_one_reads_the_same_world_elsewhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    for where in ({"world": "world.yaml"}, {}):
        monkeypatch.chdir(folder)
        fs = MillraceFileSystem(**where, skip_instance_cache=True)
        fs.info("")
        pickled = pickle.dumps(fs)
        monkeypatch.chdir(tmp_path)
        script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).cat_file('rivers@1/000000.arrow', 0, 6))"
        done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, cwd=tmp_path)
        assert done.stdout == b"b'ARROW1'\n", done.stderr
        assert pickle.loads(pickled).ls("rivers@1") == fs.ls("rivers@1")


_FORKS = """
import multiprocessing, sys, warnings
from millrace.client.filesystem import MillraceFileSystem
from millrace.core.errors import UsageError

fs = MillraceFileSystem(world=sys.argv[1])
fs.info("rivers@1/000000.arrow")

def child():
    try:
        fs.cat_file("rivers@1/000000.arrow")
    except UsageError as error:
        print(error)
    print(MillraceFileSystem(world=sys.argv[1]).cat_file("rivers@1/000000.arrow", 0, 6), flush=True)

warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of forking beside threads
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
sys.exit(process.exitcode)
"""


def test_a_forked_child_is_told_and_may_open_its_own(folder: Path) -> None:
    """In a process of its own: what else runs here may hold any lock when it is forked."""
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, str(folder / "world.yaml")], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "this process was forked" in done.stdout
    assert "b'ARROW1'" in done.stdout
