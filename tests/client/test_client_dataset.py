"""``millrace.open`` and what hangs on it: sessions, claims, caches, processes, and options that can't be."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import millrace
from millrace.catalog.versions import resolve
from millrace.client.claim import claimed
from millrace.client.dataset import Dataset
from millrace.client.session import session_at, session_for
from millrace.coord.memory import MemoryCoordination
from millrace.core.errors import CoordError, MillraceError, UsageError
from millrace.core.facts import encode
from millrace.core.keys import dataset_version
from millrace.core.ports import Coordination, Write
from millrace.feed.events import FeedEvent
from millrace.wiring.clock import SystemClock
from millrace.wiring.surroundings import rank_and_world

PATIENCE_S = 30.0
ROWS = 120
WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
here: aws/us-east-1
"""
PIPELINE: dict[str, Any] = {
    "dataset": "rows",
    "sources": [{"url": "file://./data", "format": "parquet"}],
    "shards": {"size": "4KB", "block_rows": 8},
    "placement": {"replicas": 1, "min_clouds": 1},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "lz4": {"shards": {"size": "4KB", "block_rows": 8, "compression": "lz4"}},
    "zstd": {"shards": {"size": "4KB", "block_rows": 8, "compression": "zstd"}},
    "one": {"transforms": [{"sql": "SELECT * FROM records WHERE id = 7"}]},
    "none": {"transforms": [{"sql": "SELECT * FROM records WHERE false"}]},
}
RUN_ALL = """
import sys
from millrace.cli.app import main
for name in sys.argv[1:]:
    sys.argv = ["millrace", "run", name, "--workers", "1"]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (name, stop.code)
"""


def table() -> pa.Table:
    numbers = np.arange(ROWS)
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "blob": pa.array([bytes([i % 7]) * (i * 3) for i in range(ROWS)], pa.binary()),
            "text": pa.array([f"row {i} " * 20 if i % 5 else None for i in range(ROWS)]),
            "pair": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(numbers, 2), pa.int32()), 2),
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A world with a dataset for each of VARIANTS."""
    made = tmp_path_factory.mktemp("client")
    (made / "data").mkdir()
    pq.write_table(table(), made / "data" / "rows.parquet")
    (made / "world.yaml").write_text(WORLD)
    for name, more in VARIANTS.items():
        (made / f"{name}.yaml").write_text(json.dumps(PIPELINE | {"dataset": name} | more))
    command = [sys.executable, "-c", RUN_ALL, *(f"{name}.yaml" for name in VARIANTS)]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield made
    session_for(made / "world.yaml").close()


@pytest.fixture
def world(folder: Path) -> Path:
    return folder / "world.yaml"


@pytest.fixture
def rows(world: Path) -> Iterator[Dataset]:
    with millrace.open("rows", world=world, cache=False) as opened:
        yield opened


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


def claims(world: Path) -> int:
    """How many readers' claims stand."""
    session = session_for(world)
    found = session.call(session.world.coord.list("readers/", after="", limit=100))
    return len(found)


def content(loader: Any) -> list[tuple[Any, ...]]:
    """Every row of an epoch, by its id."""
    found = []
    for batch in loader:
        blobs = [batch["blob"].values[a:b].tobytes() for a, b in zip(*_edges(batch["blob"]), strict=True)]
        found += list(zip(batch["id"].tolist(), blobs, batch["text"], batch["pair"].tolist(), strict=True))
    return sorted(found)


def _edges(ragged: Any) -> tuple[list[int], list[int]]:
    offsets = ragged.offsets.tolist()
    return offsets[:-1], offsets[1:]


EXPECTED = [(r["id"], r["blob"], r["text"], r["pair"]) for r in table().to_pylist()]


# --- what is opened --------------------------------------------------------------------------------------------------


def test_a_version_by_each_of_its_names(world: Path, rows: Dataset) -> None:
    assert (rows.label, len(rows), rows.schema.names) == ("rows@1", ROWS, ["path", *table().column_names])
    assert repr(rows).startswith(f"<millrace dataset rows@1: {ROWS} rows, ")
    url = f"file://{world.parent}/world/aws/manifests/{rows.digest}.json"
    for reference in ("rows@1", f"rows@{rows.digest}", url):
        with millrace.open(reference, world=world, cache=False) as again:
            assert again.digest == rows.digest
            assert content(again.loader(16, format="numpy")) == EXPECTED


@pytest.mark.parametrize(
    "reference",
    [
        "file:///x/manifests/abc.json",
        f"file:///x/{'0' * 64}.json",
        f"file:///x/manifests/{'0' * 64}",
        f"file:///x/manifests/{'Z' * 64}.json",
        f"file:///x/manifests/{'0' * 64}.json/more",
    ],
)
def test_what_is_no_manifest_s_url(reference: str, world: Path) -> None:
    before = threading.active_count()
    with pytest.raises(UsageError, match=r"is not a manifest's URL; that ends in manifests/<64 letters"):
        millrace.open(reference, cache=False)
    assert threading.active_count() == before


def test_a_store_below_a_folder_called_manifests(folder: Path, rows: Dataset, tmp_path: Path) -> None:
    (tmp_path / "manifests").symlink_to(folder / "world" / "aws")
    with millrace.open(f"file://{tmp_path}/manifests/manifests/{rows.digest}.json", cache=False) as opened:
        assert len(opened) == ROWS


def test_a_relative_store_is_another_one_elsewhere(
    folder: Path, rows: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://./world/aws/manifests/{rows.digest}.json"
    monkeypatch.chdir(folder)
    with millrace.open(url, cache=False) as opened:
        assert len(opened) == ROWS
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MillraceError, match="no whole replica"):
        millrace.open(url, cache=False)


@pytest.mark.parametrize("name", ["rows", "lz4", "zstd"])
@pytest.mark.parametrize("cached", [True, False])
def test_compressed_shards_give_the_same_rows(name: str, cached: bool, world: Path, tmp_path: Path) -> None:
    with millrace.open(name, world=world, cache=tmp_path / "cache" if cached else False) as opened:
        for shuffle in (True, "full", "blocks", False):
            with opened.loader(16, format="numpy", shuffle=shuffle, memory=None) as loader:
                assert content(loader) == EXPECTED
                assert loader.receipt().proof == loader.expected(0).proof
                if cached and shuffle is not True:
                    assert loader.stats()["blocks_from_cache"] == len(opened.index)


@pytest.mark.parametrize("more", [{"memory": "1"}, {"prefetch": 0}, {"memory": 1, "prefetch": 1, "shuffle": False}])
def test_bounds_change_nothing_but_speed(more: dict[str, Any], world: Path, tmp_path: Path) -> None:
    for cache in (False, tmp_path / "cache"):
        with millrace.open("rows", world=world, cache=cache) as opened:
            assert content(opened.loader(16, format="numpy", **more)) == EXPECTED


def test_blocks_larger_than_the_cache_are_not_kept_and_that_is_said(world: Path, tmp_path: Path) -> None:
    with millrace.open("rows", world=world, cache=tmp_path / "cache", cache_limit=100) as opened:
        assert content(opened.loader(16, format="numpy")) == EXPECTED
        assert [e.kind for e in opened.events] == ["cache"]
        assert "raise the cache's limit" in opened.events[0].sentence
        assert sum(t.bytes for t in opened.traffic()) == int(opened.index.lengths.sum())


def test_a_dataset_of_one_row_and_one_of_none(world: Path) -> None:
    with millrace.open("one", world=world, cache=False) as one:
        for shuffle in (True, "full", "blocks", False):
            assert [b["id"].tolist() for b in one.loader(32, format="numpy", shuffle=shuffle)] == [[7]]
    with millrace.open("none", world=world, cache=False) as none:
        assert len(none) == 0
        with pytest.raises(UsageError, match="none@1 has no rows, so there is nothing to feed"):
            none.loader(format="numpy")
        with pytest.raises(UsageError):
            millrace.mix({"a": none}).loader(format="numpy")


# --- sessions and claims ---------------------------------------------------------------------------------------------


def test_one_session_for_a_world_until_it_is_closed(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = session_for(world)
    monkeypatch.chdir(world.parent)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    assert session_for(Path("world.yaml")) is first
    assert session_for(None) is first
    with millrace.open("rows", world=world, cache=False) as opened:
        assert opened.session is first
        loader = opened.loader(8, format="numpy", memory=1)
        batches = iter(loader)
        next(batches)
        first.close()
        assert opened.closed
        with pytest.raises(UsageError, match="closed"):
            list(batches)
        with pytest.raises(UsageError, match="rows@1 was closed; open it again"):
            opened.loader(format="numpy")
    first.close()
    second = session_for(world)
    assert second is not first
    with millrace.open("rows", world=world, cache=False) as opened:
        assert content(opened.loader(8, format="numpy")) == EXPECTED


def test_a_claim_stands_as_long_as_the_version_is_open(world: Path) -> None:
    before = claims(world)
    opened = millrace.open("rows", world=world, cache=False)
    also = millrace.open("rows@1", world=world, cache=False)
    assert claims(world) == before + 2
    opened.close()
    opened.close()
    assert claims(world) == before + 1
    also.close()
    assert claims(world) == before


def test_a_dataset_nobody_has_any_more_gives_up_its_claim_and_its_threads(world: Path, tmp_path: Path) -> None:
    before, threads = claims(world), set(threading.enumerate())
    opened = millrace.open("rows", world=world, cache=tmp_path / "cache")
    loader = opened.loader(8, format="numpy")
    gone = weakref.ref(opened)
    del opened
    gc.collect()
    assert content(loader) == EXPECTED  # a loader is enough to keep it open
    assert claims(world) == before + 1
    del loader
    gc.collect()
    assert gone() is None
    until(lambda: claims(world) == before)
    names = ("millrace-feed", "millrace-cache")
    until(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith(names)])


def test_closing_a_dataset_closes_its_loaders(world: Path, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    opened = millrace.open("rows", world=world, cache=tmp_path / "cache")
    loader = opened.loader(8, format="numpy")
    batches = iter(loader)
    next(batches)
    opened.close()
    with pytest.raises(UsageError, match="overtaken by another one, or by load_state_dict, set_epoch or close"):
        next(batches)
    with pytest.raises(UsageError, match="rows@1 was closed"):
        opened.loader(format="numpy")
    assert loader.receipt().rows == 8
    gc.collect()
    names = ("millrace-feed", "millrace-cache")
    until(lambda: not [t for t in set(threading.enumerate()) - threads if t.name.startswith(names)])


def test_a_version_that_can_t_be_opened_leaves_no_claim(world: Path) -> None:
    before = claims(world)
    for reference in ("rows@9", "nothing", f"rows@{'0' * 64}"):
        with pytest.raises(UsageError):
            millrace.open(reference, world=world, cache=False)
    moved = world.parent / "elsewhere"
    (world.parent / "world").rename(moved)
    try:
        with pytest.raises(MillraceError, match="no whole replica"):
            millrace.open("rows", world=world, cache=False)
    finally:
        moved.rename(world.parent / "world")
    until(lambda: claims(world) == before)


END = """
import sys, threading
import millrace
ds = millrace.open("rows", world="world.yaml", cache=sys.argv[1])
loader = ds.loader(8, format="numpy", memory=1)
batches = iter(loader)
next(batches)
if sys.argv[2] == "error":
    raise SystemExit(3)
if sys.argv[2] == "thread":
    threading.Thread(target=lambda: [list(loader) for _ in range(10**6)], daemon=True).start()
print("done")
"""


@pytest.mark.parametrize("how", ["end", "error", "thread"])
def test_a_program_that_closes_nothing_ends_in_peace(how: str, world: Path, tmp_path: Path) -> None:
    before = claims(world)
    command = [sys.executable, "-c", END, str(tmp_path / "cache"), how]
    done = subprocess.run(command, cwd=world.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == (3 if how == "error" else 0)
    if how != "thread":  # one that is in the middle of a batch then may say so
        assert done.stderr == ""
    assert claims(world) == before


# --- caches ----------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_t_be_a_cache(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = claims(world)
    with pytest.raises(UsageError, match="file"):
        millrace.open("rows", world=world, cache=tmp_path / "file")
    with pytest.raises(UsageError, match="cache_limit='much'"):
        millrace.open("rows", world=world, cache=tmp_path / "cache", cache_limit="much")
    assert claims(world) == before


def test_the_default_cache_is_where_the_environment_says(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path / "named"))
    for cache in (None, True):
        with millrace.open("rows", world=world, cache=cache) as opened:
            assert content(opened.loader(8, format="numpy")) == EXPECTED
            assert opened.cache is not None
            assert opened.cache.stats().blocks == len(opened.index)
    monkeypatch.delenv("MILLRACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with millrace.open("rows", world=world):
        assert (tmp_path / "millrace").is_dir()


# --- other processes -------------------------------------------------------------------------------------------------


READ = """
import pickle, sys
dataset = pickle.load(sys.stdin.buffer)
with dataset.loader(8, format="numpy", rank=0, world_size=1) as loader:
    print(getattr(dataset, "digest", "-"), sorted(i for batch in loader for i in batch["id"].tolist()))
"""


def test_a_dataset_and_a_mix_go_to_another_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have another working directory."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def read_there(what: Any) -> str:
        command = [sys.executable, "-c", READ]
        done = subprocess.run(command, cwd=tmp_path / "there", input=pickle.dumps(what), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode().strip()

    with millrace.open("rows", world=world, cache="cache") as opened:
        assert read_there(opened) == f"{opened.digest} {list(range(ROWS))}"
        mix = millrace.mix({"a": opened, "b": opened}, rows=100)
        assert len(read_there(mix).split()) == 101
        with pickle.loads(pickle.dumps(opened)) as again:
            assert again.digest == opened.digest
    assert not list((tmp_path / "there").iterdir())


def in_fork(work: Callable[[], Any]) -> str:
    """What ``work`` raised in a forked child; it hangs nowhere."""
    out, into = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads: that is the point
        pid = os.fork()
    if pid == 0:
        said = "nothing"
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(into, said.encode())
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.timeout(60)
def test_forked_children(world: Path, rows: Dataset) -> None:
    loader = rows.loader(8, format="numpy")
    before = claims(world)

    def reopened() -> None:
        with millrace.open("rows", world=world, cache=False) as again:
            assert content(again.loader(8, format="numpy")) == EXPECTED

    assert in_fork(lambda: list(loader)).startswith("UsageError: this process was forked")
    assert in_fork(lambda: rows.loader(8, format="numpy").state_dict()) == "nothing"
    assert in_fork(rows.close) == "nothing"
    assert in_fork(rows.session.close) == "nothing"
    assert in_fork(reopened) == "nothing"
    assert claims(world) == before
    assert content(loader) == EXPECTED


@pytest.mark.timeout(60)
def test_a_child_forked_beside_cloud_stores_is_told_before_it_hangs(world: Path) -> None:
    session = session_at("s3://bucket/root")  # nothing is contacted yet
    try:
        said = in_fork(lambda: millrace.open("rows", world=world))
        assert said.startswith("UsageError: this process was forked from one that has Millrace open on cloud stores")
        assert "spawn" in said
    finally:
        session.close()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 can't be"),
        ({"batch_size": "32"}, "batch_size='32' can't be"),
        ({"seed": -1}, "seed=-1 can't be"),
        ({"seed": 2**64}, "seed="),
        ({"seed": "x"}, "seed='x' can't be"),
        ({"shuffle": "well"}, "shuffle='well' is unknown"),
        ({"rank": 0}, "rank= is given and world_size= isn't"),
        ({"world_size": 2}, "world_size= is given and rank= isn't"),
        ({"rank": 2, "world_size": 2}, "ranks are 0 to 1"),
        ({"replication": 3, "rank": 0, "world_size": 4}, "isn't a multiple of replication=3"),
        ({"batch_size": 1000, "drop_last": True}, "make batch_size at most 120"),
        ({"columns": "id"}, r"columns='id' is a text; name columns in a list: columns=\['id'\]"),
        ({"columns": ["ids"]}, "column 'ids'; there is "),
        ({"columns": []}, "names no column"),
        ({"format": "pandas"}, "format='pandas' is none of torch, numpy, jax, arrow"),
        ({"format": "numpy", "pin_memory": True}, "pin_memory is for format='torch'"),
        ({"decode": {"ids": len}}, "decode= names 'ids', which is not a column that is read"),
        ({"decode": {"id": 3}}, r"decode\['id'\] is 3, which is no function"),
        ({"decode": {"id": abs}, "format": "arrow"}, "decode= is not for format='arrow'"),
        ({"lanes": 0}, "lanes=0 can't be"),
        ({"window": 2, "shuffle": False}, "lanes and window are for shuffle='window'"),
        ({"prefetch": -1}, "prefetch=-1"),
        ({"prefetch": "lots"}, "prefetch='lots'"),
        ({"memory": "lots"}, "memory='lots'"),
        ({"memory": "1000TB"}, "the system grants no .* of address space for blocks"),
        (
            {"memory": "1MB", "shuffle": "full"},
            r"keeps the dataset in memory, .* and memory= is 1 MB; .* or memory=\d+",
        ),
        ({"quarantine": 2}, "quarantine=2: 2 is more than everything"),
        ({"quarantine": "few"}, "quarantine='few'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_options_that_can_t_be(options: dict[str, Any], words: str, rows: Dataset) -> None:
    with pytest.raises(UsageError, match=words):
        rows.loader(**{"format": "numpy", **options})
    with pytest.raises(UsageError, match=words.replace("120", "240")):
        millrace.mix({"a": rows, "b": rows}).loader(**{"format": "numpy", **options})


def test_decoders(rows: Dataset) -> None:
    def decode(blob: Any) -> Any:
        return np.array([len(blob)])

    with rows.loader(16, format="numpy", columns=["id", "blob"], decode={"blob": decode}) as loader:
        for batch in loader:
            assert batch["blob"].tolist() == [[i * 3] for i in batch["id"].tolist()]


def test_a_mixture_tells_of_all_its_datasets(world: Path) -> None:
    with (
        millrace.open("rows", world=world, cache=False) as first,
        millrace.open("zstd", world=world, cache=False) as second,
    ):
        loader = millrace.mix({"a": first, "b": second, "c": first}).loader(16, format="numpy")
        rows = sum(len(batch["id"]) for batch in loader)
        assert rows == loader.receipt().rows == 3 * ROWS
        (traffic,) = loader.receipt().traffic
        assert traffic.bytes == 2 * int(first.index.lengths.sum()) + int(second.index.lengths.sum())
        for number, dataset in enumerate((second, first, second)):
            dataset.sink.append(FeedEvent("failover", f"event {number}", number))
        assert [e.sentence for e in loader.events] == ["event 0", "event 1", "event 2"]
        assert loader.stats()["events"] == 3
        second.close()
        with pytest.raises(UsageError, match="this loader was closed"):
            iter(loader)


def test_events_are_bounded(rows: Dataset) -> None:
    for number in range(5000):
        rows.sink.append(FeedEvent("hedge", "late", number))
    assert [e.at_ms for e in rows.events] == list(range(4000, 5000))
    assert len(rows.sink) < 2000


# --- what launchers say ----------------------------------------------------------------------------------------------

NAMES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3"}, (2, 3)),
        ({"RANK": "2", "WORLD_SIZE": "3", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "9"}, (2, 3)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, (1, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # the batch script itself: one process, not 1 of 8
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"}, (5, 6)),
        ({"RANK": "2"}, r"\$RANK is set and \$WORLD_SIZE isn't"),
        ({"RANK": "", "WORLD_SIZE": "3"}, "are not two numbers; give rank= and world_size="),
    ],
    ids=lambda v: " ".join(f"{k}={w}" for k, w in v.items()) if isinstance(v, dict) else "",
)
def test_rank_and_world(
    variables: dict[str, str], expected: tuple[int, int] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*NAMES, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected):
            rank_and_world()
    else:
        assert rank_and_world() == expected


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_counts_rows_whatever_the_first_column_is(world: Path) -> None:
    for column in ("blob", "pair"):
        command = [sys.executable, "-m", "millrace", "feed", "rows", "--column", column, "--no-cache", "--json"]
        done = subprocess.run(command, cwd=world.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["stats"]["rows"] == ROWS


def test_what_can_t_be_written_is_said_before_an_epoch_is_read(world: Path, tmp_path: Path) -> None:
    for option, file in (("--state", tmp_path), ("--receipt", tmp_path / "no" / "file.json")):
        command = [sys.executable, "-m", "millrace", "feed", "rows", "--no-cache", option, str(file)]
        done = subprocess.run(command, cwd=world.parent, capture_output=True, text=True)
        assert done.returncode == 2
        assert "can't be written" in done.stderr
        assert "from row" not in done.stderr


# --- coordination that is away ---------------------------------------------------------------------------------------


class Away:
    """Coordination that can't be reached while ``gone``."""

    def __init__(self) -> None:
        self.real = MemoryCoordination()
        self.gone = False

    def __getattr__(self, name: str) -> Any:
        if self.gone:
            raise CoordError("nobody answers")
        return getattr(self.real, name)


def test_a_claim_that_was_lost_is_made_again(rows: Dataset) -> None:
    version = rows.session.call(resolve(rows.session.world.coord, "rows"))

    async def live() -> None:
        coord, clock = Away(), SystemClock()

        async def standing() -> int:
            return len(await coord.real.list("readers/", after="", limit=10))

        await coord.real.commit([Write(dataset_version("rows", 1), encode(version))])
        coord.gone = True
        with pytest.raises(CoordError, match="nobody answers"):
            async with claimed(cast(Coordination, coord), version, clock, ttl_ms=100):
                pass
        coord.gone = False
        async with claimed(cast(Coordination, coord), version, clock, ttl_ms=100):
            assert await standing() == 1
            coord.gone = True
            await asyncio.sleep(0.3)  # longer than it stands
            await coord.real.commit([Write(e.key, None) for e in await coord.real.list("readers/", after="", limit=10)])
            coord.gone = False
            while not await standing():
                await asyncio.sleep(0.01)
        assert await standing() == 0

    asyncio.run(asyncio.wait_for(live(), PATIENCE_S))
