"""One small dataset for all tests of the torch adapter, opened as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from millrace.client.dataset import Dataset, open_dataset
from millrace.client.session import session_for

ROWS = 203
WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
here: aws/us-east-1
"""
PIPELINE = {
    "dataset": "rows",
    "sources": [{"url": "file://./data", "format": "parquet"}],
    "shards": {"size": "4KB", "block_rows": 8},
    "placement": {"replicas": 2, "min_clouds": 2},
}
BROKEN = (17, 101, 150)
"""Rows whose ``note`` is no JSON."""


def rows() -> pa.Table:
    """Row ``i`` has ``id`` i; the others follow from it."""
    ids = np.arange(ROWS)
    return pa.table(
        {
            "id": pa.array(ids, pa.int64()),
            "x": pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(ids, 4) / 2, pa.float32()), 4),
            "tokens": pa.array([list(range(i % 5)) for i in ids.tolist()], pa.list_(pa.int32())),
            "text": pa.array([f"row {i}" for i in ids.tolist()]),
            "note": pa.array(["no" if i in BROKEN else json.dumps(i * 2) for i in ids.tolist()]),
        }
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A world file, beside which ``rows@1`` is."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "data").mkdir()
    pq.write_table(rows(), folder / "data" / "rows.parquet")
    (folder / "world.yaml").write_text(WORLD)
    (folder / "pipeline.yaml").write_text(json.dumps(PIPELINE))
    command = [sys.executable, "-m", "millrace", "run", "pipeline.yaml", "--workers", "1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield folder / "world.yaml"
    session_for(folder / "world.yaml").close()


@pytest.fixture(scope="session")
def ds(world: Path) -> Iterator[Dataset]:
    """``rows@1``, open."""
    with open_dataset("rows", world=world, cache=world.parent / "cache") as opened:
        yield opened


@pytest.fixture(scope="session")
def reference(ds: Dataset) -> dict[int, list[list[int]]]:
    """Epoch to its steps' ids, batches of 10 with seed 3, by the loader without torch."""
    with ds.loader(10, seed=3, format="numpy", rank=0, world_size=1) as loader:
        return {epoch: [batch["id"].tolist() for batch in loader] for epoch in range(4)}
