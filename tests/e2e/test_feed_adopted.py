"""Adopted files are fed like any other dataset: every row once, in an order of its own, through the cache or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import millrace

Cli = Callable[..., Any]

ROWS = 500


@pytest.fixture
def exported(folder: Path, cli: Cli) -> Callable[[str], Path]:
    """A folder of files of a format, written by other code than what adopts them."""
    with (folder / "data" / "rows.jsonl").open("w") as file:
        for i in range(ROWS):
            file.write(json.dumps({"id": i, "text": f"row {i} " * (i % 9 + 1)}) + "\n")
    (folder / "pipeline.yaml").write_text(
        json.dumps(
            {
                "dataset": "words",
                "sources": [{"url": "file://./data", "format": "jsonl"}],
                "transforms": [{"sql": "SELECT id, text FROM records"}],
            }
        )
    )
    assert cli("run", "pipeline.yaml").code == 0

    def export(form: str) -> Path:
        if form != "arrow":
            assert cli("export", "words", form, "--format", form, "--shard-size", "8KB").code == 0
            return folder / form
        (folder / "arrow").mkdir()
        for k in range(3):
            table = pa.table(
                {"id": range(k * 100, k * 100 + 100), "text": pa.array(["a", "b"] * 50).dictionary_encode()}
            )
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            with pa.ipc.new_file(folder / "arrow" / f"{k}.arrow", table.schema, options=options) as writer:
                writer.write_table(table, max_chunksize=30)
        return folder / "arrow"

    return export


@pytest.mark.parametrize("form", ["parquet", "arrow", "webdataset", "mds"])
def test_every_row_of_adopted_files_is_fed_once(
    folder: Path, exported: Callable[[str], Path], cli: Cli, form: str
) -> None:
    where = exported(form)
    before = {path: path.read_bytes() for path in where.rglob("*") if path.is_file()}
    adopted = cli("adopt", f"file://{where}", "--name", "found", "--json")
    assert adopted.code == 0, adopted.err
    proofs = set()
    for cache in (folder / "cache", folder / "cache", False):
        with (
            millrace.open("found", world=folder / "world.yaml", cache=cache) as dataset,
            dataset.loader(16, seed=5, format="numpy") as loader,
        ):
            batches = list(loader)
            receipt = loader.receipt()
            assert receipt.complete
            assert receipt.rows == len(dataset) == (300 if form == "arrow" else ROWS)
            proofs.add(receipt.proof)
            column = "id" if "id" in batches[0] else "json"
            if column == "id":
                seen = [int(i) for batch in batches for i in batch["id"]]
                assert sorted(seen) == list(range(len(dataset)))
                assert seen != sorted(seen)
        dataset.session.close()
    assert len(proofs) == 1
    assert {path: path.read_bytes() for path in where.rglob("*") if path.is_file()} == before


def test_adopted_files_that_changed_are_not_fed_wrong(folder: Path, exported: Callable[[str], Path], cli: Cli) -> None:
    where = exported("parquet")
    assert cli("adopt", f"file://{where}", "--name", "found").code == 0
    victim = sorted(where.rglob("*.parquet"))[0]
    data = bytearray(victim.read_bytes())
    data[10] ^= 1
    victim.write_bytes(data)
    said = cli("feed", "found", "--no-cache")
    assert said.code == 1
    assert "adopted-" in said.err
    assert "shard" in said.err
