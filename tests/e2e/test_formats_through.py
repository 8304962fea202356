"""Every format in, every export out, through the command line: the same rows, read with the formats' own libraries."""

from __future__ import annotations

import base64
import csv
import gc
import gzip
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.export import open_exporter
from millrace.pipeline.formats.mds import MDS
from millrace.pipeline.records import ReadContext

Cli = Callable[..., Any]
Write = Callable[..., str]
Row = dict[str, Any]

N = 300
TEXTS = [f"row {i} \u00e9\u4e2d " + "lorem " * (i % 40) for i in range(N)]
TABLE = pa.table(
    {
        "id": pa.array(range(N), pa.int64()),
        "text": TEXTS,
        "x": pa.array([i / 8 if i % 7 else None for i in range(N)], pa.float64()),
        "blob": [bytes([i % 256]) * (i % 50) for i in range(N)],
        "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(N * 4) % 60_000, pa.uint16()), 4),
        "tags": [[f"t{j}" for j in range(i % 3)] for i in range(N)],
    }
)
PLAIN = TABLE.select(["id", "text", "x"])


def zstd(data: bytes) -> bytes:
    squeezed: bytes = pa.Codec("zstd").compress(data, asbytes=True)
    return squeezed


SQUEEZE: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


def spread(folder: Path, ending: str, parts: list[bytes]) -> list[str]:
    """Each part as a file, in two folders."""
    names = []
    for i, data in enumerate(parts):
        path = folder / "data" / f"sub {i % 2}" / f"{i}{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        names.append(f"sub {i % 2}/{i}{ending}")
    return names


def split(table: pa.Table) -> list[pa.Table]:
    return [table.slice(0, 130), table.slice(130, 90), table.slice(220)]


def with_paths(names: list[str], tables: list[pa.Table]) -> list[Row]:
    """The rows in the order of the paths' bytes, each with its path."""
    found = sorted(zip(names, tables, strict=True), key=lambda pair: pair[0].encode())
    return [{"path": name, **row} for name, table in found for row in table.to_pylist()]


def text(folder: Path, squeeze: str) -> list[Row]:
    names = spread(folder, f".txt{squeeze}", [SQUEEZE[squeeze](t.encode()) for t in TEXTS[:40]])
    return [{"path": name, "text": t} for name, t in sorted(zip(names, TEXTS, strict=False), key=lambda p: p[0])]


def lines(folder: Path, squeeze: str) -> list[Row]:
    parts = [TEXTS[:130], TEXTS[130:220], TEXTS[220:]]
    names = spread(folder, f".txt{squeeze}", [SQUEEZE[squeeze]("\n".join(p).encode()) for p in parts])
    return [{"path": name, "text": t} for name, part in sorted(zip(names, parts, strict=True)) for t in part]


def jsonl(folder: Path, squeeze: str) -> list[Row]:
    parts = ["".join(json.dumps(r) + "\n" for r in t.to_pylist()).encode() for t in split(PLAIN)]
    return with_paths(spread(folder, f".jsonl{squeeze}", [SQUEEZE[squeeze](p) for p in parts]), split(PLAIN))


def csv_(folder: Path, squeeze: str) -> list[Row]:
    parts = []
    for table in split(PLAIN):
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(table.column_names)
        for row in table.to_pylist():
            writer.writerow(["" if v is None else v for v in row.values()])
        parts.append(SQUEEZE[squeeze](out.getvalue().encode()))
    return with_paths(spread(folder, f".csv{squeeze}", parts), split(PLAIN))


def parquet(folder: Path, squeeze: str) -> list[Row]:
    parts = []
    for table in split(TABLE):
        out = io.BytesIO()
        pq.write_table(table, out, row_group_size=50)
        parts.append(out.getvalue())
    return with_paths(spread(folder, ".parquet", parts), split(TABLE))


def arrow(folder: Path, squeeze: str) -> list[Row]:
    """A file, a stream, and a file with compressed buffers."""
    parts = []
    for i, table in enumerate(split(TABLE)):
        out = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd" if i == 2 else None)
        open_one = pa.ipc.new_stream if i == 1 else pa.ipc.new_file
        with open_one(out, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=40)
        parts.append(out.getvalue())
    return with_paths(spread(folder, ".arrow", parts), split(TABLE))


def webdataset(folder: Path, squeeze: str) -> list[Row]:
    """Written by the library; what comes back is bytes."""
    parts, rows = [], []
    for table in split(PLAIN):
        out = io.BytesIO()
        with wds.TarWriter(out, mtime=0) as writer:
            for row in table.to_pylist():
                key = f"in/{row['id']:05}"
                writer.write({"__key__": key, "txt": row["text"], "json": {"x": row["x"]}})
        with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as tar:
            found: dict[str, Row] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {"__key__": key})[extension] = content.read()
        rows.append(list(found.values()))
        parts.append(SQUEEZE[squeeze](out.getvalue()))
    names = spread(folder, f".tar{squeeze}", parts)
    return [{"path": n, **r} for n, part in sorted(zip(names, rows, strict=True)) for r in part]


def mds(folder: Path, squeeze: str) -> list[Row]:
    """Two folders of shards, each with its index, as our writer makes them; the peers' tests read those too."""
    columns = TABLE.drop_columns(["tags", "x"])
    tables = {"a": columns.slice(0, 200), "b": columns.slice(200)}
    rows = []
    for name, table in tables.items():
        exporter = open_exporter("mds", folder / "data" / name, columns.schema, shard_bytes=9000)
        for batch in table.to_batches(max_chunksize=33):
            exporter.write(batch)
        shards = [f for f in exporter.close() if f.endswith(".mds")]
        assert len(shards) > 1
        at = 0
        for shard in sorted(shards):
            count = int.from_bytes((folder / "data" / name / shard).read_bytes()[:4], "little")
            part = table.slice(at, count).to_pylist()
            rows += [{"path": f"{name}/{shard}", **row} for row in part]
            at += count
    return rows


@dataclass(frozen=True)
class Case:
    """One way in.

    Attributes:
        make: Writes the source; gives the rows it should become.
        squeeze: The ending that says how its files are compressed.
        source: What the spec says of it beside its format.
    """

    make: Callable[[Path, str], list[Row]]
    squeeze: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)


COLUMNS = {"columns": {"id": "int64", "text": "string", "x": "double"}}
CASES: dict[str, tuple[str, Case]] = {
    **{f"text{s}": ("text", Case(text, s)) for s in SQUEEZE},
    **{f"lines{s}": ("lines", Case(lines, s)) for s in SQUEEZE},
    **{f"jsonl{s}": ("jsonl", Case(jsonl, s)) for s in SQUEEZE},
    **{f"csv{s}": ("csv", Case(csv_, s, COLUMNS)) for s in SQUEEZE},
    "csv, cut in lines": ("csv", Case(csv_, "", {**COLUMNS, "multiline": False})),
    "parquet": ("parquet", Case(parquet)),
    "arrow": ("arrow", Case(arrow)),
    **{f"webdataset{s}": ("webdataset", Case(webdataset, s)) for s in SQUEEZE},
    "mds": ("mds", Case(mds)),
}


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """The webdataset library leaves closing its files to the garbage collector; here that is forgiven."""
    yield
    gc.collect()


def as_json(value: Any) -> Any:
    """A value as exports to formats without its type write it."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    return value


def exported(cli: Cli, folder: Path, format: str) -> Path:
    said = cli("export", "d", f"out-{format}", "--format", format, "--shard-size", "20KB", "--json")
    assert said.code == 0, said.err
    out = folder / f"out-{format}"
    assert sorted(said.json["files"]) == sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    return out


def from_parquet(cli: Cli, folder: Path, rows: list[Row]) -> None:
    files = sorted(exported(cli, folder, "parquet").glob("*.parquet"))
    assert [row for file in files for row in pq.read_table(file).to_pylist()] == rows


def from_jsonl(cli: Cli, folder: Path, rows: list[Row]) -> None:
    files = sorted(exported(cli, folder, "jsonl").glob("*.jsonl"))
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert found == [{name: as_json(value) for name, value in row.items()} for row in rows]


def decoded(name: str, value: bytes) -> tuple[str, Any]:
    """Column and value of a sample's member: what has no type of its own is bytes."""
    column, _, kind = name.rpartition(".")
    match kind if column else "":
        case "txt":
            return column, value.decode()
        case "json":
            return column, json.loads(value)
        case "npy":
            return column, np.load(io.BytesIO(value)).tolist()
    return name, value


def from_webdataset(cli: Cli, folder: Path, rows: list[Row]) -> None:
    files = sorted(str(p) for p in exported(cli, folder, "webdataset").glob("*.tar"))
    samples = list(wds.WebDataset(files, shardshuffle=False))
    keys = [row.get("__key__", f"{i:09}") for i, row in enumerate(rows)]
    assert [sample["__key__"] for sample in samples] == keys
    found = [dict(decoded(k, v) for k, v in sample.items() if not k.startswith("__")) for sample in samples]
    assert found == [{k: v for k, v in row.items() if k != "__key__" and v is not None} for row in rows]


def from_mds(cli: Cli, folder: Path, rows: list[Row]) -> None:
    out = exported(cli, folder, "mds")
    index = json.loads((out / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["shards"]) == len(rows)
    objects = tuple(SourceObject(p.name, p.stat().st_size, "1") for p in sorted(out.glob("*.mds")))
    reads = Folder(out)
    source = Source(url="file://./x", format="mds")
    context = ReadContext(
        source, MDS.schema(reads, source, objects), reads, lambda bad: pytest.fail(bad.reason), 64_000_000
    )
    chunk = Chunk(0, 0, objects, 0, sum(o.size_bytes for o in objects))
    found = [row for records in MDS.read(chunk, context) for row in records.batch.to_pylist()]
    assert len(found) == len(rows)
    for row, wanted in zip(found, rows, strict=True):
        as_list = {k for k, v in wanted.items() if isinstance(v, list)}
        assert {k: json.loads(v) if k in as_list and isinstance(v, str) else v for k, v in row.items()} == wanted


class Folder:
    """Blocking reads of the files in a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = (self.path / obj.path).read_bytes()
        return memoryview(data)[start : len(data) if length is None else start + length]

    def read_whole(self, objects: Any) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CASES)
def test_in_and_out_again(cli: Cli, folder: Path, pipeline: Write, name: str) -> None:
    format, case = CASES[name]
    rows = case.make(folder, case.squeeze)
    spec = {"sources": [{"url": "file://./data", "format": format, **case.source}]}
    said = cli("run", pipeline(**spec, chunk=4096, shards={"size": 4096, "block_rows": 16}), "--json")
    assert said.code == 0, said.err
    assert (said.json["rows"], said.json["quarantined"]) == (len(rows), 0)
    assert said.json["shards"] > 1
    assert cli("verify", "d").code == 0
    from_parquet(cli, folder, rows)
    from_jsonl(cli, folder, rows)
    from_webdataset(cli, folder, rows)
    if not any(value is None for row in rows for value in row.values()):
        from_mds(cli, folder, rows)
    refused = cli("export", "d", "out-files", "--format", "files")
    assert refused.code == 2
    assert "format: files" in refused.err


def test_files_come_back_byte_for_byte(cli: Cli, folder: Path, pipeline: Write) -> None:
    dice = random.Random(1)
    names = [
        "plain.bin",
        "em pty",
        "deep/er/and deeper/x",
        "ünï/日本.dat",
        "new\nline",
        ".hidden",
        "a.tar.gz",
        "%41?#&",
    ]
    wanted: dict[str, bytes] = {name: dice.randbytes(dice.randrange(1, 3000)) for name in names}
    wanted["em pty"] = b""
    wanted["deep/also empty"] = b""
    wanted["large"] = dice.randbytes(20_000_123)
    wanted["exactly a piece"] = dice.randbytes(8_000_000)
    wanted["zeros"] = bytes(9_000_000)
    wanted["twin of zeros"] = bytes(9_000_000)
    for name, data in wanted.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    spec = {"sources": [{"url": "file://./data", "format": "files"}], "chunk": "10MB"}
    said = cli("run", pipeline(**spec), "--workers", "4", "--chunk-order", "1", "--json")
    assert said.code == 0, said.err
    assert said.json["bytes_in"] == sum(map(len, wanted.values()))
    assert said.json["chunks"] > 4
    out = exported(cli, folder, "files")
    found = {os.fsdecode(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == wanted
    parts = sorted(exported(cli, folder, "parquet").glob("*.parquet"))
    pieces = [row for part in parts for row in pq.read_table(part).to_pylist()]
    large = sorted((p["offset"], p["data"]) for p in pieces if p["path"] == "large")
    assert len(large) == 3
    assert b"".join(data for _, data in large) == wanted["large"]


def test_sources_of_two_formats_in_one_dataset(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "data" / "b.csv").write_text("text\nthree\n")
    (folder / "data" / "c.txt").write_text("four")
    sources = [
        {"url": "file://./data", "include": ["*.jsonl"], "format": "jsonl"},
        {"url": "file://./data", "include": ["*.csv"], "format": "csv"},
        {"url": "file://./data/c.txt", "format": "text"},
    ]
    said = cli("run", pipeline(sources=sources), "--json")
    assert said.code == 0, said.err
    from_jsonl(
        cli,
        folder,
        [
            {"path": "a.jsonl", "text": "one"},
            {"path": "a.jsonl", "text": "two"},
            {"path": "b.csv", "text": "three"},
            {"path": "c.txt", "text": "four"},
        ],
    )
