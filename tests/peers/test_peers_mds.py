"""MDS written here, read by mosaicml-streaming, and the other way round."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.export import open_exporter
from millrace.pipeline.formats.mds import MDS
from millrace.pipeline.records import ReadContext

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
SOURCE = Source(url="file://./x", format="mds")


@pytest.fixture(scope="module")
def streaming() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        # streaming pulls in a torchvision built for another torch; it only needs these two names to be there.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        yield pytest.importorskip("streaming")


class Folder:
    """Blocking reads of the files in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(p.name, p.stat().st_size, "1") for p in sorted(self.path.iterdir()))

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = (self.path / obj.path).read_bytes()
        return memoryview(data)[start : len(data) if length is None else start + length]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def read_back(directory: Path) -> list[dict[str, Any]]:
    reads = Folder(directory)
    schema = MDS.schema(reads, SOURCE, reads.all())
    context = ReadContext(SOURCE, schema, reads, lambda bad: pytest.fail(bad.reason), 64_000_000)
    chunk = Chunk(0, 0, reads.all(), 0, sum(o.size_bytes for o in reads.all()))
    return [row for records in MDS.read(chunk, context) for row in records.batch.to_pylist()]


def exported(directory: Path, n: int = 300) -> pa.Table:
    table = pa.table(
        {
            "text": [f"row {i} \u00e9\u4e2d" * (i % 9) for i in range(n)],
            "blob": [bytes([i % 256]) * (i % 50) for i in range(n)],
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(n * 16) % 60000, pa.uint16()), 16),
            "grid": pa.FixedSizeListArray.from_arrays(
                pa.FixedSizeListArray.from_arrays(pa.array(np.arange(n * 6), pa.float32()), 3), 2
            ),
            "i8": pa.array([i % 100 for i in range(n)], pa.int8()),
            "u64": pa.array([2**63 + i for i in range(n)], pa.uint64()),
            "half": pa.array([i / 2 for i in range(n)], pa.float16()),
            "yes": [i % 2 == 0 for i in range(n)],
            "tags": [[f"t{j}" for j in range(i % 3)] for i in range(n)],
            "more": [{"a": i, "b": None} for i in range(n)],
        }
    )
    exporter = open_exporter("mds", directory, table.schema, shard_bytes=8_000)
    for batch in table.to_batches(max_chunksize=64):
        exporter.write(batch)
    assert len(exporter.close()) > 3
    return table


def same(sample: dict[str, Any], row: dict[str, Any]) -> None:
    assert sorted(sample) == sorted(row)
    for name in ("tokens", "grid"):
        assert sample[name].tolist() == row[name]
    assert sample["tokens"].dtype == np.uint16
    for name in ("text", "blob", "i8", "u64", "half", "tags", "more"):
        assert sample[name] == row[name]
    assert bool(sample["yes"]) is row["yes"]


def test_local_dataset_reads_what_is_exported(streaming: Any, tmp_path: Path) -> None:
    table = exported(tmp_path / "out")
    found = streaming.LocalDataset(str(tmp_path / "out"))
    assert len(found) == table.num_rows
    for i, row in enumerate(table.to_pylist()):
        same(found[i], row)


def test_streaming_dataset_reads_what_is_exported(streaming: Any, tmp_path: Path) -> None:
    table = exported(tmp_path / "out", 100)
    streaming.base.util.clean_stale_shared_memory()
    found = streaming.StreamingDataset(local=str(tmp_path / "out"), shuffle=False, batch_size=1)
    for sample, row in zip(found, table.to_pylist(), strict=True):
        same(sample, row)


@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_what_the_library_writes_is_read(streaming: Any, tmp_path: Path, compression: str | None) -> None:
    scalars = [
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
    ]
    columns = {name: name for name in scalars} | {
        "n": "int",
        "text": "str",
        "blob": "bytes",
        "doc": "json",
        "big": "str_int",
        "fixed": "ndarray:uint16:2,3",
        "shaped": "ndarray:float32",
        "free": "ndarray",
    }
    rows = [
        {
            **{name: np.dtype(name).type(i) for name in scalars},
            "n": -i,
            "text": f"\u00e9{i}" * (i % 7),
            "blob": bytes([i]) * i,
            "doc": {"z": i, "a": [1.5, None]},
            "big": 10**30 + i,
            "fixed": np.full((2, 3), i, np.uint16),
            "shaped": np.arange(i % 400 + 1, dtype=np.float32),
            "free": np.full((i % 3 + 1, 2), i, np.int64),
        }
        for i in range(100)
    ]
    out = str(tmp_path / "data")
    with streaming.MDSWriter(out=out, columns=columns, compression=compression, size_limit=20_000) as writer:
        for row in rows:
            writer.write(row)
    found = read_back(tmp_path / "data")
    assert len(found) == len(rows)
    for got, row in zip(found, rows, strict=True):
        expected = {name: v.tolist() if isinstance(v, np.ndarray | np.generic) else v for name, v in row.items()}
        expected["doc"] = json.dumps(row["doc"], sort_keys=True, separators=(",", ":"))
        expected["big"] = str(row["big"])
        assert {name: v for name, v in got.items() if name != "path"} == expected
