"""What is exported and read back with our own readers is what was there."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import FormatName, Source
from millrace.pipeline.export import open_exporter
from millrace.pipeline.formats.mds import MDS
from millrace.pipeline.formats.parquet import PARQUET
from millrace.pipeline.formats.webdataset import WEBDATASET
from millrace.pipeline.records import Format, ReadContext


class Folder:
    """Blocking reads of the files in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> tuple[SourceObject, ...]:
        files = sorted(p for p in self.path.rglob("*") if p.is_file())
        return tuple(SourceObject(str(p.relative_to(self.path)), p.stat().st_size, "1") for p in files)

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = (self.path / obj.path).read_bytes()
        return memoryview(data)[start : len(data) if length is None else start + length]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def export(name: str, directory: Path, table: pa.Table, rows_per_batch: int = 3, **options: Any) -> tuple[str, ...]:
    exporter = open_exporter(name, directory, table.schema, **options)
    try:
        for batch in table.to_batches(max_chunksize=rows_per_batch):
            exporter.write(batch)
        files = exporter.close()
    finally:
        exporter.abort()
    assert sorted(files) == sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    assert not list(directory.parent.glob("*.partial-*"))
    return files


def read_back(form: Format, directory: Path) -> list[dict[str, Any]]:
    reads = Folder(directory)
    name: FormatName = form.name  # type: ignore[assignment]
    source = Source(url="file://./x", format=name)
    schema = form.schema(reads, source, reads.all())
    context = ReadContext(source, schema, reads, lambda bad: pytest.fail(bad.reason), 64_000_000)
    chunk = Chunk(0, 0, reads.all(), 0, sum(o.size_bytes for o in reads.all()))
    return [row for records in form.read(chunk, context) for row in records.batch.to_pylist()]


TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "s": (pa.string(), st.text(st.characters(codec="utf-8"), max_size=20)),
    "b": (pa.binary(), st.binary(max_size=20)),
    "i": (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    "u": (pa.uint64(), st.integers(0, 2**64 - 1)),
    "f": (pa.float32(), st.floats(width=32, allow_nan=False)),
    "t": (pa.bool_(), st.booleans()),
    "n": (pa.list_(pa.uint16(), 2), st.lists(st.integers(0, 65535), min_size=2, max_size=2)),
    "m": (
        pa.list_(pa.list_(pa.int8(), 2), 1),
        st.lists(st.lists(st.integers(-9, 9), min_size=2, max_size=2), min_size=1, max_size=1),
    ),
    "l": (pa.list_(pa.string()), st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=3)),
    "r": (
        pa.struct([("x", pa.int8()), ("y", pa.string())]),
        st.fixed_dictionaries({"x": st.integers(0, 9), "y": st.text(st.characters(codec="utf-8"), max_size=3)}),
    ),
}


@st.composite
def tables(draw: st.DrawFn, *, nulls: bool) -> pa.Table:
    names = draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=5, unique=True))
    n = draw(st.integers(1, 12))
    columns: dict[str, pa.Array] = {"id": pa.array(range(n), pa.int64())}
    for name in names:
        kind, values = TYPES[name]
        one = st.none() | values if nulls else values
        columns[name] = pa.array(draw(st.lists(one, min_size=n, max_size=n)), kind)
    return pa.table(columns)


@given(table=tables(nulls=True), shard_bytes=st.sampled_from([1, 300, 10_000_000]))
@settings(max_examples=15, deadline=None)
def test_parquet(tmp_path_factory: pytest.TempPathFactory, table: pa.Table, shard_bytes: int) -> None:
    directory = tmp_path_factory.mktemp("x") / "out"
    files = export("parquet", directory, table, shard_bytes=shard_bytes)
    assert [{k: v for k, v in row.items() if k != "path"} for row in read_back(PARQUET, directory)] == table.to_pylist()
    assert pa.concat_tables([pq.read_table(directory / f) for f in files]).equals(table)


def as_mds(row: dict[str, Any]) -> dict[str, Any]:
    out = dict(row)
    for name in ("l", "r"):
        if name in out:
            out[name] = json.dumps(out[name], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if "t" in out:
        out["t"] = int(out["t"])
    return out


@given(table=tables(nulls=False), shard_bytes=st.sampled_from([1, 700, 10_000_000]))
@settings(max_examples=15, deadline=None)
def test_mds(tmp_path_factory: pytest.TempPathFactory, table: pa.Table, shard_bytes: int) -> None:
    directory = tmp_path_factory.mktemp("x") / "out"
    files = export("mds", directory, table, shard_bytes=shard_bytes)
    assert files[-1] == "index.json"
    rows = [{k: v for k, v in row.items() if k != "path"} for row in read_back(MDS, directory)]
    assert rows == [as_mds(row) for row in table.to_pylist()]
    index = json.loads((directory / "index.json").read_text())
    assert sum(s["samples"] for s in index["shards"]) == table.num_rows
    assert [s["raw_data"]["bytes"] for s in index["shards"]] == [(directory / f).stat().st_size for f in files[:-1]]


def decoded(name: str, value: bytes) -> Any:
    if name.endswith(".npy"):
        return np.load(io.BytesIO(value)).tolist()
    if name.endswith(".json"):
        return json.loads(value)
    return value.decode() if name.endswith(".txt") else value


def infinite(value: Any) -> Any:
    return {"Infinity": float("inf"), "-Infinity": float("-inf")}.get(value, value) if isinstance(value, str) else value


@given(table=tables(nulls=True), shard_bytes=st.sampled_from([1, 5_000, 10_000_000]), keyed=st.booleans())
@settings(max_examples=15, deadline=None)
def test_webdataset(tmp_path_factory: pytest.TempPathFactory, table: pa.Table, shard_bytes: int, keyed: bool) -> None:
    directory = tmp_path_factory.mktemp("x") / "out"
    keys = [f"a folder/{'k' * i}\u00e9" if keyed else f"{i:09}" for i in range(table.num_rows)]
    export(
        "webdataset",
        directory,
        table.append_column("__key__", pa.array(keys)) if keyed else table,
        shard_bytes=shard_bytes,
    )
    rows = read_back(WEBDATASET, directory)
    assert [row["__key__"] for row in rows] == keys
    for row, expected in zip(rows, table.to_pylist(), strict=True):
        members = {
            name: decoded(name, v) for name, v in row.items() if name not in ("path", "__key__") and v is not None
        }
        found = {name.split(".")[0]: infinite(v) if name.startswith("f") else v for name, v in members.items()}
        assert found == {name: v for name, v in expected.items() if v is not None}


@given(
    table=tables(nulls=True),
    shard_bytes=st.sampled_from([1, 200, 10_000_000]),
    codec=st.sampled_from(["none", "gzip", "zstd"]),
)
@settings(max_examples=15, deadline=None)
def test_jsonl(tmp_path_factory: pytest.TempPathFactory, table: pa.Table, shard_bytes: int, codec: str) -> None:
    directory = tmp_path_factory.mktemp("x") / "out"
    files = export("jsonl", directory, table, shard_bytes=shard_bytes, compression=codec)
    text = b"".join(pa.input_stream(str(directory / f)).read() for f in files).decode()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    for line in lines:
        if line.get("b") is not None:
            line["b"] = base64.b64decode(line["b"]["base64"])
        if "f" in line:
            line["f"] = infinite(line["f"])
    assert lines == table.to_pylist()


@given(
    st.dictionaries(
        st.text("ab/", min_size=1, max_size=4).filter(lambda p: all(p.split("/"))), st.binary(max_size=40), max_size=6
    ),
    st.randoms(),
    st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
def test_files(tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], random: Any, piece: int) -> None:
    names = {p for p in contents if not any(other.startswith(p + "/") for other in contents)}
    pieces = [
        {"path": p, "offset": at, "size": len(contents[p]), "data": contents[p][at : at + piece]}
        for p in names
        for at in range(0, max(1, len(contents[p])), piece)
    ]
    random.shuffle(pieces)
    schema = pa.schema([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("data", pa.binary())])
    directory = tmp_path_factory.mktemp("x") / "out"
    export("files", directory, pa.Table.from_pylist(pieces, schema))
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert found == {p: contents[p] for p in names}


@pytest.mark.parametrize("name", ["parquet", "webdataset", "mds", "jsonl"])
def test_the_same_rows_make_the_same_bytes(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {"s": [f"row {i}" for i in range(50)], "n": pa.FixedSizeListArray.from_arrays(pa.array(range(100)), 2)}
    )
    one, two = export(name, tmp_path / "a", table), export(name, tmp_path / "b", table)
    assert one == two
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in one)


def test_dictionaries_and_views_are_written_as_plain_columns(tmp_path: Path) -> None:
    table = pa.table(
        {"s": pa.array(["a", "b", "a"]).dictionary_encode(), "v": pa.array(["x", "y", "z"], pa.string_view())}
    )
    for name in ("jsonl", "mds", "webdataset", "parquet"):
        export(name, tmp_path / name, table)
    assert [json.loads(line)["s"] for line in (tmp_path / "jsonl/part-00000.jsonl").read_text().splitlines()] == [
        "a",
        "b",
        "a",
    ]
    assert [row["v"] for row in read_back(MDS, tmp_path / "mds")] == ["x", "y", "z"]
