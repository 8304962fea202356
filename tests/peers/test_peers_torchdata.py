"""FeedDataset in torchdata's StatefulDataLoader: its states resume exactly, with workers and without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("torchdata")

from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-not-found,unused-ignore]
from torchdata.stateful_dataloader.stateful import Stateful  # type: ignore[import-not-found,unused-ignore]

from millrace.client.dataset import Dataset, open_dataset
from millrace.client.session import session_for
from millrace.feed.torch import FeedDataLoader, FeedDataset

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore:.*set_vital.*")]

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
"""
PIPELINE = {
    "dataset": "rows",
    "sources": [{"url": "file://./data", "format": "jsonl"}],
    "shards": {"size": "4KB", "block_rows": 8},
    "placement": {"replicas": 2, "min_clouds": 2},
}
STEPS = 8  # 75 rows in batches of 10


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dataset]:
    folder = tmp_path_factory.mktemp("torchdata")
    (folder / "data").mkdir()
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps({"id": i}) + "\n" for i in range(75)))
    (folder / "world.yaml").write_text(WORLD)
    (folder / "pipeline.yaml").write_text(json.dumps(PIPELINE))
    command = [sys.executable, "-m", "millrace", "run", "pipeline.yaml", "--workers", "1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with open_dataset("rows", world=folder / "world.yaml", cache=folder / "cache") as opened:
        yield opened
    session_for(folder / "world.yaml").close()


@pytest.fixture(scope="module")
def reference(ds: Dataset) -> dict[int, list[list[int]]]:
    with ds.loader(10, seed=3, format="numpy") as loader:
        return {epoch: ids(loader) for epoch in range(3)}


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def dataset_of(ds: Dataset) -> FeedDataset:
    return FeedDataset(ds.loader, batch_size=10, seed=3)


def stateful(ds: Dataset, workers: int) -> StatefulDataLoader:
    more = {"multiprocessing_context": "spawn", "persistent_workers": True} if workers else {}
    return StatefulDataLoader(dataset_of(ds), batch_size=None, num_workers=workers, **more)


def test_our_classes_are_what_it_calls_stateful(ds: Dataset) -> None:
    assert isinstance(dataset_of(ds), Stateful)
    with FeedDataLoader(ds.loader, batch_size=10) as loader:
        assert isinstance(loader, Stateful)


def test_without_workers_it_resumes_at_every_batch(ds: Dataset, reference: dict[int, list[list[int]]]) -> None:
    for stop in range(STEPS + 1):
        first = stateful(ds, 0)
        assert ids(islice(first, stop)) == reference[0][:stop]
        second = stateful(ds, 0)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert ids(second) == reference[0][stop:]
        assert ids(second) == reference[1]


def test_from_between_two_epochs(ds: Dataset, reference: dict[int, list[list[int]]]) -> None:
    first = stateful(ds, 0)
    assert ids(first) == reference[0]
    second = stateful(ds, 0)
    second.load_state_dict(first.state_dict())
    assert ids(second) == reference[1]
    assert ids(second) == reference[2]


@pytest.mark.parametrize("stop", [0, 3, STEPS])
def test_with_workers_it_resumes(ds: Dataset, reference: dict[int, list[list[int]]], stop: int) -> None:
    first = stateful(ds, 2)
    loop = iter(first)
    assert ids(islice(loop, stop)) == reference[0][:stop]
    state = json.loads(json.dumps(first.state_dict()))
    del loop, first
    second = stateful(ds, 2)
    second.load_state_dict(state)
    assert ids(second) == reference[0][stop:]
    assert ids(second) == reference[1]


def test_another_number_of_workers_is_refused(ds: Dataset) -> None:
    """By a sentence of ours where torchdata's own check would not see it: a worker's state is not a loader's."""
    first = stateful(ds, 1)
    loop = iter(first)
    next(loop)
    state = first.state_dict()
    part = state["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]
    with pytest.raises(Exception, match="this is the state of worker 0 of 1: give it to a DataLoader with as many"):
        dataset_of(ds).load_state_dict(part)
