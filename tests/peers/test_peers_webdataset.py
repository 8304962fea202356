"""Tars written here, read by the webdataset library, and the other way round."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.export import open_exporter
from millrace.pipeline.formats.webdataset import WEBDATASET
from millrace.pipeline.records import ReadContext

wds = pytest.importorskip("webdataset")
# The library leaves closing its files to the garbage collector; they are collected here, where it is forgiven.
pytestmark = pytest.mark.filterwarnings("ignore")
SOURCE = Source(url="file://./x", format="webdataset")


class Folder:
    """Blocking reads of the files in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(p.name, p.stat().st_size, "1") for p in sorted(self.path.glob("*.tar")))

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = (self.path / obj.path).read_bytes()
        return memoryview(data)[start : len(data) if length is None else start + length]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


def read_back(directory: Path) -> list[dict[str, Any]]:
    reads = Folder(directory)
    schema = WEBDATASET.schema(reads, SOURCE, reads.all())
    context = ReadContext(SOURCE, schema, reads, lambda bad: pytest.fail(bad.reason), 64_000_000)
    chunk = Chunk(0, 0, reads.all(), 0, sum(o.size_bytes for o in reads.all()))
    return [row for records in WEBDATASET.read(chunk, context) for row in records.batch.to_pylist()]


@pytest.mark.parametrize("keyed", [False, True])
def test_the_library_reads_what_is_exported(tmp_path: Path, keyed: bool) -> None:
    n = 200
    table = pa.table(
        {
            "text": [f"row {i} \u00e9\u4e2d" if i % 5 else None for i in range(n)],
            "blob": [bytes([i]) * i for i in range(n)],
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(n * 16), pa.uint16()), 16),
            "label": pa.array(range(n), pa.int64()),
            "tags": [[f"t{j}" for j in range(i % 3)] for i in range(n)],
        }
    )
    keys = [f"part {i // 50}/{'long name ' * (i % 20)}{i}" if keyed else f"{i:09}" for i in range(n)]
    if keyed:
        table = table.append_column("__key__", pa.array(keys))
    exporter = open_exporter("webdataset", tmp_path / "out", table.schema, shard_bytes=100_000)
    for batch in table.to_batches(max_chunksize=33):
        exporter.write(batch)
    files = [str(tmp_path / "out" / name) for name in exporter.close()]
    assert len(files) > 1

    samples = list(wds.WebDataset(files, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == keys
    for sample, row in zip(samples, table.to_pylist(), strict=True):
        assert sample.get("text.txt") == row["text"]
        assert sample["blob"] == row["blob"]
        assert sample["tokens.npy"].dtype == np.uint16
        assert sample["tokens.npy"].tolist() == row["tokens"]
        assert sample["label.json"] == row["label"]
        assert sample["tags.json"] == row["tags"]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    rows = [
        {"__key__": f"s{i:05}", "cls": str(i % 10).encode(), "bin": bytes(i % 700), "seg.npy": np.arange(i % 5)}
        for i in range(150)
    ]
    with wds.ShardWriter(str(tmp_path / "data-%05d.tar"), maxcount=40, verbose=0) as sink:
        for row in rows:
            sink.write(row)
    found = read_back(tmp_path)
    assert [row["__key__"] for row in found] == [row["__key__"] for row in rows]
    assert [row["bin"] for row in found] == [row["bin"] for row in rows]
    assert [row["cls"] for row in found] == [row["cls"] for row in rows]
    assert {row["path"] for row in found} == {f"data-{i:05}.tar" for i in range(4)}
