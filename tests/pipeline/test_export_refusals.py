"""What an export refuses, and that it leaves nothing behind when it does."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from millrace.core.errors import AccessDenied, MillraceError, NoSpace, PolicyRefused, SourceError, UsageError
from millrace.pipeline.export import EXPORT_FORMATS, open_exporter

PIECES = pa.schema([("path", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("data", pa.binary())])


def export(name: str, directory: Path, table: pa.Table, **options: Any) -> tuple[str, ...]:
    exporter = open_exporter(name, directory, table.schema, **options)
    try:
        for batch in table.to_batches():
            exporter.write(batch)
        return exporter.close()
    finally:
        exporter.abort()


def refused(kind: type[MillraceError], sentence: str, name: str, directory: Path, table: pa.Table, **more: Any) -> None:
    with pytest.raises(kind, match=sentence) as caught:
        export(name, directory, table, **more)
    assert type(caught.value) is kind
    assert not directory.exists()
    assert not list(directory.parent.glob("*.partial-*"))


def some_rows(name: str) -> pa.Table:
    if name == "files":
        return pa.Table.from_pylist([{"path": "a", "offset": 0, "size": 1, "data": b"x"}], PIECES)
    return pa.table({"x": ["a"]})


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_the_target_must_be_absent_or_empty(tmp_path: Path, name: str) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thing").write_text("mine")
    with pytest.raises(UsageError, match="full is not empty"):
        open_exporter(name, full, some_rows(name).schema)
    with pytest.raises(UsageError, match="is no directory"):
        open_exporter(name, full / "thing", some_rows(name).schema)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "thing"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert export(name, empty, some_rows(name))
    assert export(name, tmp_path / "new" / "deep", some_rows(name))


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_nothing_has_the_final_name_before_the_end(tmp_path: Path, name: str) -> None:
    table = some_rows(name)
    for compression in ("zstd",) if name == "jsonl" else (None,):
        exporter = open_exporter(name, tmp_path / "out", table.schema, compression=compression)
        exporter.write(table.to_batches()[0])
        assert not (tmp_path / "out").exists()
        assert len(list(tmp_path.glob("out.partial-*"))) == 1
        exporter.abort()
        exporter.abort()
        assert list(tmp_path.iterdir()) == []


def test_somebody_took_the_name_meanwhile(tmp_path: Path) -> None:
    exporter = open_exporter("jsonl", tmp_path / "out", some_rows("jsonl").schema)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thing").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        exporter.close()
    exporter.abort()
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thing"]


def test_unknown_formats_and_compressions(tmp_path: Path) -> None:
    table = some_rows("jsonl")
    refused(UsageError, "no export format 'csv'; there are parquet", "csv", tmp_path / "x", table)
    refused(UsageError, "compression 'zstd'; it offers none", "mds", tmp_path / "x", table, compression="zstd")
    twice = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    refused(UsageError, "more than one column 'x'", "jsonl", tmp_path / "x", twice)


def test_mds_refuses_nulls_and_names_the_row(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3], "b": ["x", None, "z"]})
    refused(UsageError, "column 'b' has a null in row 1.*transform", "mds", tmp_path / "x", table)
    inner = pa.table({"n": pa.array([[1, None]], pa.list_(pa.int8(), 2))})
    refused(UsageError, "column 'n' has a null inside an array", "mds", tmp_path / "x", inner)
    refused(UsageError, "column 'n' has a null inside an array", "webdataset", tmp_path / "x", inner)


@pytest.mark.parametrize("key", ["", "a.b", "/abs", "../up", "a/../b", "folder/", ".hidden", None])
def test_webdataset_refuses_keys_that_are_none(tmp_path: Path, key: str | None) -> None:
    table = pa.table({"__key__": pa.array([key], pa.string()), "x": [b"1"]})
    refused(UsageError, "row 0: .* can't be the key", "webdataset", tmp_path / "x", table)


def test_webdataset_refuses_what_would_be_read_as_something_else(tmp_path: Path) -> None:
    same = pa.table({"__key__": ["a", "a"], "x": [b"1", b"2"]})
    refused(UsageError, "row 1: key 'a' is that of the row before", "webdataset", tmp_path / "x", same)
    nothing = pa.table({"x": pa.array([b"1", None])})
    refused(UsageError, "row 1 has no value in any column", "webdataset", tmp_path / "x", nothing)
    refused(UsageError, "column 'a/b' can't be", "webdataset", tmp_path / "x", pa.table({"a/b": [b"1"]}))
    both = pa.table({"a": ["1"], "A.txt": [b"2"]})
    refused(UsageError, "columns 'a' and 'A.txt' would both", "webdataset", tmp_path / "x", both)
    refused(UsageError, "keys of samples are strings", "webdataset", tmp_path / "x", pa.table({"__key__": [1]}))


@pytest.mark.parametrize("path", ["/etc/evil", "../evil", "a/../../evil", "a//b", ".", "a/./b", "", "nul\0"])
def test_files_refuses_paths_that_lead_out(tmp_path: Path, path: str) -> None:
    table = pa.Table.from_pylist([{"path": path, "offset": 0, "size": 1, "data": b"x"}], PIECES)
    refused(PolicyRefused, "not a relative path inside", "files", tmp_path / "out", table)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ([("a", 0, 4, b"xy")], "a: the bytes from 2 on are in no record, of 4 in all"),
        ([("a", 2, 4, b"xy")], "a: the bytes from 0 on are in no record"),
        ([("a", 0, 4, b"xy"), ("a", 1, 4, b"xyz")], "a: the same bytes are in two records"),
        ([("a", 0, 1, b"x"), ("a", 0, 1, b"x")], "a: the same bytes are in two records"),
        ([("a", 0, 0, b""), ("a", 0, 0, b"")], "a: the same bytes are in two records"),
        ([("a", 0, 4, b"xy"), ("a", 2, 5, b"xy")], "doesn't fit a file of 4"),
        ([("a", 3, 4, b"xy")], "doesn't fit a file of 4"),
        ([("a", 0, 1, b"x"), ("a/b", 0, 1, b"x")], "a/b: another file of the dataset is a folder"),
        ([("a/b", 0, 1, b"x"), ("a", 0, 1, b"x")], "a: another file of the dataset is a folder"),
        ([("a", None, 1, b"x")], "has a null"),
    ],
)
def test_files_must_be_whole(tmp_path: Path, pieces: list[tuple[Any, ...]], sentence: str) -> None:
    rows = [dict(zip(PIECES.names, piece, strict=True)) for piece in pieces]
    refused(SourceError, sentence, "files", tmp_path / "out", pa.Table.from_pylist(rows, PIECES))


def test_only_datasets_of_files_become_files(tmp_path: Path) -> None:
    refused(UsageError, "the columns x; only a dataset made from.*files", "files", tmp_path / "out", some_rows("jsonl"))


def test_jsonl_says_everything_json_can(tmp_path: Path) -> None:
    instant = datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=UTC)
    kinds = pa.schema(
        [
            ("ns", pa.timestamp("ns", "UTC")),
            ("us", pa.timestamp("us")),
            ("s", pa.timestamp("s")),
            ("day", pa.date32()),
            ("day64", pa.date64()),
            ("time", pa.time64("us")),
            ("took", pa.duration("ms")),
            ("exact", pa.decimal128(10, 2)),
            ("bin", pa.list_(pa.binary())),
            ("map", pa.map_(pa.string(), pa.timestamp("s"))),
            ("half", pa.float16()),
            ("nothing", pa.null()),
            ("floats", pa.list_(pa.float64())),
            ("deep", pa.struct([("at", pa.timestamp("ms")), ("gone", pa.date32())])),
        ]
    )
    naive = instant.replace(tzinfo=None)
    row = {
        "ns": pa.scalar(1709168523000004005, pa.timestamp("ns", "UTC")),
        "us": naive,
        "s": datetime(1901, 1, 1),
        "day": date(1, 1, 1),
        "day64": date(2024, 2, 29),
        "time": time(23, 59, 59, 7),
        "took": timedelta(seconds=1.5),
        "exact": Decimal("-0.10"),
        "bin": [b"\xff", None],
        "map": [("k", naive.replace(microsecond=0)), ("l", None)],
        "half": 0.5,
        "nothing": None,
        "floats": [float("nan"), float("inf"), float("-inf"), 1e300],
        "deep": {"at": naive.replace(microsecond=5000), "gone": None},
    }
    columns = [pa.array([row[f.name], None], f.type) for f in kinds]
    table = pa.Table.from_arrays(columns, schema=kinds).slice(0, 2)
    export("jsonl", tmp_path / "out", table)
    first, second = (json.loads(line) for line in (tmp_path / "out/part-00000.jsonl").read_text().splitlines())
    assert first == {
        "ns": "2024-02-29T01:02:03.000004005Z",
        "us": "2024-02-29T01:02:03.000004",
        "s": "1901-01-01T00:00:00",
        "day": "0001-01-01",
        "day64": "2024-02-29",
        "time": "23:59:59.000007",
        "took": 1500,
        "exact": "-0.10",
        "bin": [{"base64": "/w=="}, None],
        "map": [["k", "2024-02-29T01:02:03"], ["l", None]],
        "half": 0.5,
        "nothing": None,
        "floats": ["NaN", "Infinity", "-Infinity", 1e300],
        "deep": {"at": "2024-02-29T01:02:03.005", "gone": None},
    }
    assert second == dict.fromkeys(kinds.names)
    years = pa.table({"s": pa.array([10**14], pa.timestamp("s"))})
    refused(UsageError, "outside the years 1 to 9999", "jsonl", tmp_path / "x", years)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("name", EXPORT_FORMATS)
def test_a_full_disk_is_said_so_and_left_clean(tmp_path: Path, name: str) -> None:
    data = os.urandom(3_000_000)
    table = pa.table({"b": [data]})
    if name == "files":
        table = pa.Table.from_pylist([{"path": "a", "offset": 0, "size": len(data), "data": data}], PIECES)
    with small_disk(tmp_path / "disk"):
        with pytest.raises(NoSpace, match=r"export to .*/disk/out failed: No space left"):
            export(name, tmp_path / "disk" / "out", table)
        assert list((tmp_path / "disk").iterdir()) == []


def test_a_folder_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(AccessDenied, match="Permission denied"):
        open_exporter("jsonl", tmp_path / "out", some_rows("jsonl").schema)
