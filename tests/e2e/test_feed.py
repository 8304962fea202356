"""Feeding for real: replicas that go away in mid-epoch, ranks that share a cache, processes that are killed."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import millrace
from millrace.client.dataset import Dataset
from millrace.core.errors import MillraceError, Unavailable, UsageError

Cli = Callable[..., Any]
Spawn = Callable[..., "subprocess.Popen[str]"]

ROWS = 6000
OPTIONS: dict[str, Any] = {"batch_size": 32, "seed": 17, "format": "numpy", "window": 2, "lanes": 4}


@pytest.fixture
def corpus(folder: Path, cli: Cli) -> Path:
    """``words@1``: 6,000 rows in about 100 blocks, three replicas in four clouds; ``here`` is aws."""
    with (folder / "data" / "rows.jsonl").open("w") as file:
        for i in range(ROWS):
            file.write(json.dumps({"id": i, "text": hashlib.sha256(str(i).encode()).hexdigest() * 8}) + "\n")
    (folder / "pipeline.yaml").write_text(
        json.dumps(
            {
                "dataset": "words",
                "sources": [{"url": "file://./data", "format": "jsonl"}],
                "shards": {"size": "256KB", "block_rows": 64},
                "placement": {"replicas": 3, "min_clouds": 2},
            }
        )
    )
    world = folder / "world.yaml"
    world.write_text(world.read_text() + "here: aws/us-east-1\n")
    assert cli("run", "pipeline.yaml").code == 0
    return folder


@pytest.fixture
def opened(corpus: Path) -> Iterator[Dataset]:
    """It, without a cache on disk: every block comes from a store."""
    with millrace.open("words", world=corpus / "world.yaml", cache=False) as dataset:
        yield dataset
        dataset.session.close()


def drained(dataset: Any, **more: Any) -> tuple[list[tuple[list[int], list[str]]], Any, Any]:
    with dataset.loader(**{**OPTIONS, **more}) as loader:
        batches = [(batch["id"].tolist(), batch["text"]) for batch in loader]
        return batches, loader.receipt(), loader


def blocks_of(store: Path) -> list[Path]:
    return sorted((store / "shards").rglob("*.arrow"))


# --- what happens to a replica in mid-epoch ----------------------------------------------------------------------


def remove(store: Path) -> None:
    shutil.rmtree(store)


def corrupt(store: Path) -> None:
    for shard in blocks_of(store):
        data = bytearray(shard.read_bytes())
        data[len(data) // 4 :: 512] = bytes(b ^ 1 for b in data[len(data) // 4 :: 512])
        shard.write_bytes(data)


def truncate(store: Path) -> None:
    for shard in blocks_of(store):
        os.truncate(shard, 100)


@pytest.mark.parametrize(
    ("harm", "cause"),
    [(remove, "does not have shard"), (corrupt, "rotten"), (truncate, "rotten")],
    ids=["removed", "corrupt", "cut-off"],
)
def test_the_replica_in_use_goes_bad_in_mid_epoch(
    corpus: Path, opened: Dataset, harm: Callable[[Path], None], cause: str
) -> None:
    undisturbed, _, _ = drained(opened)
    with (
        millrace.open("words", world=corpus / "world.yaml", cache=False) as again,
        again.loader(**OPTIONS, memory="1MB") as loader,
    ):
        seen = []
        for step, batch in enumerate(loader):
            seen.append((batch["id"].tolist(), batch["text"]))
            if step == len(loader) // 3:
                used = max(again.traffic(), key=lambda t: t.bytes)
                assert used.cloud == "aws"
                before = loader.stats()["blocks_loaded"]
                harm(corpus / "world" / "aws")
        assert loader.stats()["blocks_loaded"] > before
        assert seen == undisturbed
        assert loader.receipt().complete
        told = [event.sentence for event in loader.events if event.kind == "failover"]
        assert any("aws-main" in sentence and cause in sentence for sentence in told), told


def test_a_store_that_stalls_costs_less_than_a_second(corpus: Path, cli: Cli) -> None:
    """The store in use is a server that stops answering (SIGSTOP); the others are folders."""
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True, env={**os.environ, **_KEYS}
    )
    try:
        assert server.stdout is not None
        endpoint = server.stdout.readline().strip()
        os.environ.update(_KEYS)
        world = (corpus / "world.yaml").read_text()
        s3 = f'{{url: "s3://bucket/aws", options: {{endpoint: "{endpoint}", region: us-east-1, path_style: true}}}}'
        (corpus / "world.yaml").write_text(world.replace('{url: "file://./world/aws"}', s3))
        assert cli("run", "pipeline.yaml", "--fresh").code == 0
        assert cli("verify", "words", "--repair").code == 0
        with millrace.open("words", world=corpus / "world.yaml", cache=False) as dataset:
            undisturbed, _, _ = drained(dataset)
            with dataset.loader(**OPTIONS, memory="1MB") as loader:
                seen = []
                for step, batch in enumerate(loader):
                    seen.append((batch["id"].tolist(), batch["text"]))
                    if step == len(loader) // 3:
                        server.send_signal(signal.SIGSTOP)
                assert seen == undisturbed
                assert (
                    loader.stats()["waited_max_s"] < 5.0
                )  # how much it is: bench; here, that it isn't a timeout's 30 s
                assert any("aws-main" in event.sentence for event in loader.events)
            dataset.session.close()
    finally:
        for name in _KEYS:
            os.environ.pop(name, None)
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.communicate()


_KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
_SERVER = """
import time, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT"), timeout=30).close()
print(f"http://{host}:{port}", flush=True)
time.sleep(600)
"""


def test_no_replica_left_is_an_error_with_the_way_out_and_it_can_come_back(corpus: Path, opened: Dataset) -> None:
    undisturbed, _, _ = drained(opened)
    with (
        millrace.open("words", world=corpus / "world.yaml", cache=False) as again,
        again.loader(**OPTIONS, memory="1MB") as loader,
    ):
        seen = []
        batches = iter(loader)
        seen += [(batch["id"].tolist(), batch["text"]) for batch in itertools.islice(batches, 40)]
        (corpus / "world").rename(corpus / "unplugged")
        with pytest.raises(MillraceError) as raised:
            seen.extend((batch["id"].tolist(), batch["text"]) for batch in batches)
        assert isinstance(raised.value, Unavailable)
        said = str(raised.value)
        assert "shard" in said
        assert all(store in said for store in ("aws-main", "gcp-main"))
        assert "millrace verify" in said
        shutil.rmtree(corpus / "world", ignore_errors=True)
        (corpus / "unplugged").rename(corpus / "world")
        seen += [(batch["id"].tolist(), batch["text"]) for batch in loader]
        assert seen == undisturbed
        assert loader.receipt().complete


# --- many processes, one cache -----------------------------------------------------------------------------------


def test_four_ranks_of_one_machine_fetch_each_block_once(corpus: Path, spawn: Spawn, opened: Dataset) -> None:
    ranks = [
        spawn(*("feed", "words", "--seed", "17", "--rank", str(r), "--world-size", "4", "--cache", "cache", "--json"))
        for r in range(4)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, said
    parts = [millrace.Receipt.from_plain(json.loads(out)["receipt"]) for out, _ in said]
    merged = millrace.merge_receipts(parts)
    assert merged.complete
    useful = sum(t.bytes - t.wasted for t in merged.traffic)  # on a busy machine a read may be late, and hedged
    assert useful == int(opened.index.lengths.sum())
    _, alone, _ = drained(opened, window=None, lanes=None)
    assert merged.proof == alone.proof


_READER = """
import hashlib, sys, millrace
with millrace.open("words", world="world.yaml", cache="cache") as dataset:
    loader = dataset.loader(batch_size=32, seed=int(sys.argv[1]), format="numpy", memory="1MB", window=1)
    rows = {}
    print("reading", flush=True)
    for batch in loader:
        rows.update(zip(batch["id"].tolist(), batch["text"]))
    assert loader.receipt().complete
    print(hashlib.sha256(repr(sorted(rows.items())).encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_never_make_a_wrong_byte(corpus: Path) -> None:
    """Ranks, which are the cache's writers, are killed at random; what is read from the cache afterwards is right."""
    rows = [(i, hashlib.sha256(str(i).encode()).hexdigest() * 8) for i in range(ROWS)]
    right = hashlib.sha256(repr(rows).encode()).hexdigest()
    dice = random.Random(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MILLRACE")}

    def reader(seed: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _READER, str(seed)],
            cwd=corpus,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    killed = 0
    for attempt in range(6):
        pair = [reader(attempt), reader(attempt + 100)]
        for victim in pair:
            assert victim.stdout is not None
            victim.stdout.readline()
        time.sleep(dice.uniform(0, 0.25))
        for victim in pair:
            killed += victim.poll() is None
            victim.kill()
            victim.communicate()
        if attempt % 2:
            shutil.rmtree(corpus / "cache", ignore_errors=attempt < 0)  # so that there is something to write again
    assert killed
    last = reader(17)
    out, err = last.communicate(timeout=100)
    assert last.returncode == 0, err
    assert out.split() == ["reading", right]


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_goes_on_from_its_state(corpus: Path, spawn: Spawn, cli: Cli) -> None:
    slow = ("feed", "words", "--batch-size", "1", "--cache", "cache", "--state", "state.json", "--json")
    place = (0, 0)
    for _ in range(3):
        running = spawn(*slow)
        assert running.stderr is not None
        assert f"from row {place[1]:,} of" in running.stderr.readline()
        time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
        state = json.loads((corpus / "state.json").read_text())
        place = (state["epoch"], state["position"])
        if place == (1, 0):  # it was quicker than the signal
            return
        assert running.returncode == 130, err
        assert "go on with the same command" in err
    done = cli(*slow)
    assert done.code == 0, done.err
    assert (done.json["receipt"]["begin"], done.json["receipt"]["end"]) == (place[1], ROWS)
    assert json.loads((corpus / "state.json").read_text())["epoch"] == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("nothing",), 2, "there is no dataset 'nothing'"),
        (("words@9",), 2, "no version 9"),
        (("words", "--rank", "4", "--world-size", "4"), 2, "ranks are 0 to 3"),
        (("words", "--batch-size", "2", "--world-size", "3"), 2, "make batch_size at least 3"),
        (("words", "--batch-size", "9999", "--drop-last"), 2, "make batch_size at most 6000"),
        (("words", "--column", "texts"), 2, "there is path, id, text"),
        (("words", "--cache", "world.yaml"), 2, "world.yaml"),
        (("words", "--state", "world.yaml"), 2, "can't be read as a loader's state"),
        (("words", "--receipt", "no/such/folder.json"), 2, "can't be written"),
        (("words", "--cache-limit", "much"), 2, "much"),
        (("file:///nowhere/manifests/abc.json",), 2, "not a manifest's URL"),
        ((f"file://./elsewhere/manifests/{'0' * 64}.json",), 1, "no whole replica"),
    ],
    ids=lambda v: " ".join(v)[:40] if isinstance(v, tuple) else "",
)
def test_bad_input_says_what_and_the_way_out(
    corpus: Path, cli: Cli, arguments: tuple[str, ...], code: int, words: str
) -> None:
    extra = () if "--cache" in arguments else ("--cache", "cache")
    said = cli("feed", *arguments, *extra)
    assert said.code == code, said
    assert words in said.err, said.err
    assert said.err.count("error:") == 1


def test_a_manifest_s_url_needs_no_world(corpus: Path, cli: Cli, opened: Dataset) -> None:
    _, expected, _ = drained(opened, window=None, lanes=None)
    store = next(s for s in (corpus / "world").iterdir() if len(blocks_of(s)) == len(set(opened.index.shards.tolist())))
    assert (store / "manifests" / f"{opened.digest}.json").exists()
    (corpus / "world.yaml").unlink()
    said = cli("feed", f"file://{store}/manifests/{opened.digest}.json", "--seed", "17", "--no-cache", "--json")
    assert said.code == 0, said.err
    assert said.json["receipt"]["proof"] == expected.proof


def test_launcher_variables_say_the_rank(opened: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    sharing = opened.loader(format="numpy").recipe.sharing
    assert (sharing.rank, sharing.world_size) == (2, 3)
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match=r"\$WORLD_SIZE is set and \$RANK isn't"):
        opened.loader(format="numpy")
    with pytest.raises(UsageError, match="rank= is given and world_size= isn't"):
        opened.loader(format="numpy", rank=0)


def test_mixtures_are_exact_and_share_alike(opened: Dataset) -> None:
    mix = millrace.mix({"a": opened, "b": opened}, stages=[(700, {"a": 7, "b": 3}), (300, {"a": 0, "b": 1})])
    given: dict[int, list[int]] = {}
    for world_size in (1, 3):
        receipts = []
        steps: list[list[int]] = []
        for rank in range(world_size):
            with mix.loader(50, seed=3, format="numpy", rank=rank, world_size=world_size, columns=["id"]) as loader:
                for step, batch in enumerate(loader):
                    if rank == 0:
                        steps.append([])
                    steps[step] += batch["id"].tolist()
                receipts.append(loader.receipt())
        merged = millrace.merge_receipts(receipts)
        assert merged.complete
        assert merged.rows == 1000
        given[world_size] = [hash(tuple(sorted(step))) for step in steps]
    assert given[1] == given[3]
    with pytest.raises(UsageError, match="'c' is among the weights only"):
        millrace.mix({"a": opened}, weights={"a": 1, "c": 2})
