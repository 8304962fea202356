from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import FormatName, Source
from millrace.pipeline.formats.arrow import ARROW
from millrace.pipeline.formats.ipc_footer import record_batches
from millrace.pipeline.formats.parquet import PARQUET
from millrace.pipeline.records import Format, ReadContext, Records


class Objects:
    """Blocking reads over a dictionary; counts them, and checks versions."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self.data = data
        self.longest = 0
        self.count = 0

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(path, len(data), str(hash(data))) for path, data in self.data.items())

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = self.data.get(obj.path)
        if data is None or str(hash(data)) != obj.version:
            raise SourceChanged(f"{obj.path} changed since the plan was made")
        end = len(data) if length is None else start + length
        self.longest, self.count = max(self.longest, min(end, len(data)) - start), self.count + 1
        return memoryview(data)[start:end]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def source(name: FormatName) -> Source:
    return Source(url="file://./data", format=name)


def chunks_of(form: Format, objects: Objects, src: Source, chunk_bytes: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    for obj in objects.all():
        cuts = form.cut(objects, src, obj, chunk_bytes) if obj.size_bytes > chunk_bytes else (0, obj.size_bytes)
        assert cuts[0] == 0
        assert cuts[-1] == obj.size_bytes
        assert list(cuts) == sorted(set(cuts))
        chunks += [Chunk(len(chunks), 0, (obj,), a, b) for a, b in itertools.pairwise(cuts)]
    return chunks


def read(
    form: Format,
    objects: Objects,
    chunks: Sequence[Chunk] | None = None,
    rejects: list[Quarantined] | None = None,
    **limits: int,
) -> list[Records]:
    name: Any = form.name
    src = source(name)
    schema = form.schema(objects, src, objects.all()[:1])
    assert schema.metadata is None
    if chunks is None:
        chunks = [Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))]
    put = (rejects if rejects is not None else []).append
    context = ReadContext(src, schema, objects, put, **{"max_record_bytes": 1_000_000, **limits})
    out = [r for chunk in chunks for r in form.read(chunk, context)]
    for r in out:
        assert r.batch.schema.equals(schema, check_metadata=True)
        assert r.batch.num_rows == len(r.objects) == len(r.positions) > 0
        r.batch.validate(full=True)
    if rejects is None:
        assert put.__self__ == []  # type: ignore[attr-defined]
    return out


def rows(records: list[Records]) -> list[dict[str, Any]]:
    return [row for r in records for row in r.batch.to_pylist()]


def positions(records: list[Records]) -> list[int]:
    return [int(p) for r in records for p in r.positions]


def parquet_bytes(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def file_bytes(table: pa.Table, rows_per_batch: int = 100, codec: str | None = None) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return out.getvalue()


def stream_bytes(table: pa.Table, rows_per_batch: int = 100, *, legacy: bool = False) -> bytes:
    out = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(use_legacy_format=legacy)
    with pa.ipc.new_stream(out, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)
    return out.getvalue()


def some_table(n: int = 1000) -> pa.Table:
    return pa.table(
        {
            "id": pa.array(range(n), pa.int64()),
            "text": pa.array([f"row {i}" * (i % 7) if i % 11 else None for i in range(n)], pa.string()),
            "tokens": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(n * 8) % 999, pa.uint16()), 8),
            "tags": pa.array([[str(j) for j in range(i % 4)] for i in range(n)], pa.list_(pa.string())),
        }
    )


def small_groups(table: pa.Table) -> bytes:
    return parquet_bytes(table, row_group_size=37)


WRITERS: list[tuple[Format, Callable[[pa.Table], bytes]]] = [
    (PARQUET, small_groups),
    (ARROW, file_bytes),
    (ARROW, stream_bytes),
]
EACH = pytest.mark.parametrize(("form", "write"), WRITERS, ids=["parquet", "arrow-file", "arrow-stream"])


@EACH
def test_rows_come_with_path_origin_and_row_number(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    table = some_table()
    objects = Objects({"a/x": write(table), "b y\n\u00e9": write(table.slice(0, 10))})
    records = read(form, objects)
    expected = [{"path": "a/x", **row} for row in table.to_pylist()]
    expected += [{"path": "b y\n\u00e9", **row} for row in table.slice(0, 10).to_pylist()]
    assert rows(records) == expected
    assert positions(records) == [*range(1000), *range(10)]
    assert [int(i) for r in records for i in r.objects] == [0] * 1000 + [1] * 10


@EACH
@given(chunk_bytes=st.integers(100, 80_000))
@settings(max_examples=25, deadline=None)
def test_any_chunk_size_gives_the_same_records(
    form: Format, write: Callable[[pa.Table], bytes], chunk_bytes: int
) -> None:
    table = some_table(300)
    objects = Objects({"a": write(table), "b": write(table.slice(100, 50))})
    name: Any = form.name
    records = read(form, objects, chunks_of(form, objects, source(name), chunk_bytes))
    assert [row["id"] for row in rows(records)] == [*range(300), *range(100, 150)]
    assert positions(records) == [*range(300), *range(50)]


@EACH
def test_batches_keep_the_bounds(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    records = read(form, Objects({"a": write(some_table())}), batch_rows=64, batch_bytes=2_000)
    assert max(r.batch.num_rows for r in records) <= 64
    assert max(r.batch.drop_columns("path").nbytes for r in records) <= 2_000
    assert [row["id"] for row in rows(records)] == list(range(1000))


@EACH
def test_the_data_s_own_path_column_stays(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    table = pa.table({"n": [1, 2], "path": ["p", "q"]})
    assert rows(read(form, Objects({"a": write(table)}))) == table.to_pylist()


@EACH
def test_encodings_do_not_show(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    plain = pa.table({"s": ["a", "b", "a"], "b": [b"x", None, b"z"], "l": [["u"], [], ["v", "u"]]})
    encoded = pa.table(
        {
            "s": plain["s"].combine_chunks().dictionary_encode(),
            "b": plain["b"].cast(pa.binary_view()),
            "l": plain["l"].cast(pa.list_(pa.field("other", pa.dictionary(pa.int32(), pa.string())))),
        }
    ).replace_schema_metadata({"pandas": "{}"})
    not_null = pa.schema([plain.schema.field(0).with_nullable(False), plain.schema.field(1), plain.schema.field(2)])
    objects = Objects({"a": write(plain), "b": write(encoded), "c": write(plain.cast(not_null))})
    records = read(form, objects)
    assert rows(records) == [{"path": p, **row} for p in "abc" for row in plain.to_pylist()]
    encoded_first = Objects({"b": objects.data["b"], "a": objects.data["a"]})
    assert [r["s"] for r in rows(read(form, encoded_first))] == ["a", "b", "a"] * 2


@EACH
@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        (
            {"id": pa.array([1], pa.int32()), "x": ["a"]},
            "b: column 'id' is int32, but int64 in the source's first file",
        ),
        ({"x": ["a"]}, "b: column 'id' is missing, but it is int64"),
        ({"id": [1], "x": ["a"], "y": [1.0]}, "b: column 'y' (double) is not in the source's first file"),
        ({"x": ["a"], "id": [1]}, "b: column 2 is 'x', but 'id' in the source's first file"),
    ],
)
def test_another_schema_is_named(
    form: Format, write: Callable[[pa.Table], bytes], second: dict[str, Any], sentence: str
) -> None:
    objects = Objects({"a": write(pa.table({"id": [1], "x": ["a"]})), "b": write(pa.table(second))})
    with pytest.raises(SourceError) as caught:
        read(form, objects)
    assert sentence in str(caught.value)
    assert "two sources" in str(caught.value)


@EACH
def test_truncated_anywhere_is_an_error_that_names_the_object(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    whole = write(some_table(200))
    for keep in {0, 1, 7, 100, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 5, len(whole) - 1}:
        objects = Objects({"good": whole, "bad.file": whole[:keep]})
        with pytest.raises(SourceError, match=r"^bad\.file.*(truncated|empty)"):
            read(form, objects)


@EACH
def test_garbage_and_broken_bytes_never_raise_anything_else(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    whole = write(some_table(200))
    with pytest.raises(SourceError, match=r"^junk"):
        read(form, Objects({"junk": b"once upon a time, " * 100}))
    rng = np.random.default_rng(7)
    for _ in range(60):
        broken = bytearray(whole)
        at = int(rng.integers(0, len(broken)))
        broken[at : at + 4] = rng.bytes(len(broken[at : at + 4]))
        with contextlib.suppress(SourceError):
            read(form, Objects({"good": whole, "broken": bytes(broken)}), rejects=[])


@EACH
def test_an_object_that_changed_is_said_so(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    objects = Objects({"a": write(some_table(5))})
    name: Any = form.name
    schema = form.schema(objects, source(name), objects.all())
    chunk = Chunk(0, 0, objects.all(), 0, len(objects.data["a"]))
    objects.data["a"] = write(some_table(6))
    with pytest.raises(SourceChanged):
        list(form.read(chunk, ReadContext(source(name), schema, objects, print, 1_000_000)))


@EACH
def test_long_records_and_bad_utf8_are_rejected_one_by_one(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    raw = [b"fine", b"\xff\xfe", b"x" * 5000, b"also fine"]
    text = pa.Array.from_buffers(pa.string(), 4, pa.array(raw, pa.binary()).buffers())
    rejects: list[Quarantined] = []
    records = read(form, Objects({"a": write(pa.table({"t": text}))}), rejects=rejects, max_record_bytes=4096)
    assert [row["t"] for row in rows(records)] == ["fine", "also fine"]
    assert positions(records) == [0, 3]
    assert [(q.position, q.rule, q.path) for q in rejects] == [("row 1", "utf-8", "a"), ("row 2", "max_record", "a")]
    assert "'t'" in rejects[0].reason


@EACH
def test_no_rows_and_no_columns(form: Format, write: Callable[[pa.Table], bytes]) -> None:
    assert read(form, Objects({"a": write(pa.table({"x": pa.array([], pa.int32())}))})) == []
    twice = pa.table([pa.array([1]), pa.array([2])], names=["x", "x"])
    with pytest.raises(SourceError, match="more than one column 'x'"):
        read(form, Objects({"a": write(twice)}))


def test_a_row_group_is_read_alone() -> None:
    table = pa.table({"b": [np.random.default_rng(i).bytes(50_000) for i in range(40)]})
    data = parquet_bytes(table, row_group_size=2, compression="none", use_dictionary=False)
    objects = Objects({"a": data})
    chunk = chunks_of(PARQUET, objects, source("parquet"), 500_000)[1]
    objects.longest = 0
    records = read(PARQUET, objects, [chunk])
    assert sum(r.batch.num_rows for r in records) in (8, 10, 12)
    assert objects.longest < 700_000
    assert objects.count < 8


def test_a_huge_row_group_is_read_page_by_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.pipeline.formats.parquet.HOLD_BYTES", 200_000)
    table = pa.table({"b": [np.random.default_rng(i).bytes(5_000) for i in range(200)], "i": range(200)})
    objects = Objects(
        {"a": parquet_bytes(table, compression="none", use_dictionary=False, data_page_size=20_000, write_batch_size=4)}
    )
    assert [r["b"] for r in rows(read(PARQUET, objects))] == table["b"].to_pylist()
    assert objects.longest <= 200_000


def test_long_values_behind_a_dictionary_do_not_swell_a_batch() -> None:
    table = pa.table({"s": ["x" * 100_000] * 2000})
    objects = Objects({"a": parquet_bytes(table)})
    assert len(objects.data["a"]) < 100_000
    before = pa.total_allocated_bytes()
    seen = peak = 0
    schema = PARQUET.schema(objects, source("parquet"), objects.all())
    chunk = Chunk(0, 0, objects.all(), 0, len(objects.data["a"]))
    context = ReadContext(source("parquet"), schema, objects, print, 1_000_000)
    for records in PARQUET.read(chunk, context):
        seen, peak = seen + records.batch.num_rows, max(peak, pa.total_allocated_bytes() - before)
    assert seen == 2000
    assert peak < 60_000_000


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_arrow_compressed_buffers(codec: str) -> None:
    table = some_table(500)
    assert [r["id"] for r in rows(read(ARROW, Objects({"a": file_bytes(table, codec=codec)})))] == list(range(500))


def test_arrow_replaced_dictionaries_in_a_stream() -> None:
    out = io.BytesIO()
    schema = pa.schema([("s", pa.dictionary(pa.int8(), pa.string()))])
    with pa.ipc.new_stream(out, schema) as writer:
        for values in (["a", "b"], ["c", "a"]):
            writer.write_batch(
                pa.record_batch([pa.array(values).dictionary_encode().cast(schema[0].type)], schema=schema)
            )
    assert [r["s"] for r in rows(read(ARROW, Objects({"a": out.getvalue()})))] == ["a", "b", "c", "a"]


def test_arrow_legacy_stream_and_a_stream_that_was_never_closed() -> None:
    table = some_table(250)
    assert len(rows(read(ARROW, Objects({"a": stream_bytes(table, legacy=True)})))) == 250
    with pytest.raises(SourceError, match="no end mark"):
        read(ARROW, Objects({"a": stream_bytes(table)[:-8]}))
    with pytest.raises(SourceError, match="no end mark"):
        read(ARROW, Objects({"a": stream_bytes(table) + b"more"}))


def test_arrow_runs_and_extension_types() -> None:
    runs = pa.RunEndEncodedArray.from_arrays([2, 5], ["a", "b"])
    uuids = pa.array([bytes([i]) * 16 for i in range(5)], pa.uuid())
    objects = Objects({"a": file_bytes(pa.table({"r": runs, "u": uuids}))})
    records = read(ARROW, objects)
    assert [r["r"] for r in rows(records)] == ["a", "a", "b", "b", "b"]
    assert records[0].batch.schema.field("u").type == pa.binary(16)


def test_the_footer_s_blocks_are_the_messages() -> None:
    data = file_bytes(some_table(1000))
    length = int.from_bytes(data[-10:-6], "little")
    blocks = record_batches(data[-10 - length : -10])
    assert len(blocks) == 10
    schema = pa.ipc.open_file(io.BytesIO(data)).schema
    for i, block in enumerate(blocks):
        message = pa.ipc.read_message(pa.py_buffer(data[block.offset : block.offset + block.length_bytes]))
        assert pa.ipc.read_record_batch(message, schema)["id"][0].as_py() == 100 * i
    for keep in (0, 3, 10, length // 2):
        try:
            record_batches(data[-10 - length : -10][:keep])
        except ValueError:
            continue


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_a_footer_of_any_bytes_is_blocks_or_a_value_error(data: bytes) -> None:
    try:
        record_batches(data)
    except ValueError:
        return
