"""Files in place: cut, hashed and decoded, they have the rows that the pipeline's readers give."""

from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.manifest import ENCODINGS, Encoding
from millrace.core.model import Block, Chunk, Shard, SourceObject, block_digest
from millrace.core.spec import Source
from millrace.pipeline.adopted.decode import decode_block, index_file
from millrace.pipeline.adopted.scan import BLOCK_BYTES, BLOCK_ROWS, Scan
from millrace.pipeline.export import open_exporter
from millrace.pipeline.formats.registry import format_named
from millrace.pipeline.records import ReadContext


class Files:
    """Blocking reads over a dictionary."""

    def __init__(self, data: Mapping[str, bytes]) -> None:
        self.data = dict(data)

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(path, len(data), "1") for path, data in sorted(self.data.items()))

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        data = self.data[obj.path]
        return memoryview(data)[start : len(data) if length is None else start + length]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def index(
    encoding: Encoding, data: bytes, path: str = "a", *, check: bool = True, hold_bytes: int = 1 << 30
) -> tuple[Shard, pa.Schema]:
    files = Files({path: data})
    told: list[int] = []
    found = index_file(encoding, files, files.all()[0], check=check, told=told.append, hold_bytes=hold_bytes)
    assert sum(told) == len(data)
    return found


def decoded(encoding: Encoding, data: bytes, *, check: bool = True) -> pa.Table:
    """A file by way of its blocks, each of which is checked on the way."""
    shard, schema = index(encoding, data, check=check)
    assert shard.digest == hashlib.sha256(data).hexdigest()
    assert shard.size_bytes == len(data)
    assert shard.rows == sum(b.rows for b in shard.blocks)
    whole = memoryview(data)
    aux = [b for b in shard.blocks if b.rows == 0]
    assert len(aux) <= 1
    batches = []
    for block in shard.blocks:
        assert block_digest(piece(whole, block)) == block.digest
        if block.rows:
            # In memory of its own, at an odd address: nothing but the block's bytes is there.
            moved = memoryview(b"x" + bytes(piece(whole, block)))[1:]
            rest = piece(whole, aux[0]) if aux else None
            batch = decode_block(encoding, schema, rest, moved, offset=block.offset, rows=block.rows)
            batch.validate(full=True)
            assert (batch.num_rows, batch.schema) == (block.rows, schema)
            batches.append(batch)
    return pa.Table.from_batches(batches, schema=schema)


def piece(data: memoryview, block: Block) -> memoryview:
    return data[block.offset : block.offset + block.length_bytes]


def through_pipeline(encoding: Encoding, data: bytes) -> pa.Table:
    """The same file as a pipeline reads it, without the ``path`` it adds."""
    files = Files({"a": data})
    source, form = Source(url="file://./data", format=encoding), format_named(encoding)
    schema = form.schema(files, source, files.all())

    def reject(bad: object) -> None:
        pytest.fail(f"{bad}")

    context = ReadContext(source, schema, files, reject, max_record_bytes=2**31)
    chunk = Chunk(0, 0, files.all(), 0, len(data))
    batches = [records.batch for records in form.read(chunk, context)]
    return pa.Table.from_batches(batches, schema=schema).drop_columns(["path"])


def same_rows(encoding: Encoding, data: bytes, *, check: bool = True) -> pa.Table:
    found, wanted = decoded(encoding, data, check=check), through_pipeline(encoding, data)
    assert found.schema == wanted.schema
    assert found.equals(wanted)
    return found


def exported(name: str, table: pa.Table, folder: Path) -> bytes:
    exporter = open_exporter(name, folder, table.schema, shard_bytes=1 << 30)
    for batch in table.to_batches(max_chunksize=100):
        exporter.write(batch)
    exporter.close()
    (file,) = [p for p in folder.iterdir() if p.name != "index.json"]
    return file.read_bytes()


def parquet(table: pa.Table, **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, **options)
    return out.getvalue()


def ipc(batches: Sequence[pa.RecordBatch], *, stream: bool = False, **options: Any) -> bytes:
    out = io.BytesIO()
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(out, batches[0].schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return out.getvalue()


def mixed(rows: int = 1000) -> pa.Table:
    """Columns of many kinds, with nulls."""
    dice = random.Random(rows)
    words = [None if dice.random() < 0.1 else "ä" * dice.randrange(40) for _ in range(rows)]
    lists = [None if dice.random() < 0.1 else list(range(dice.randrange(5))) for _ in range(rows)]
    return pa.table(
        {
            "id": pa.array(range(rows), pa.int64()),
            "word": pa.array(words),
            "kind": pa.array([f"kind {i % 7}" for i in range(rows)]).dictionary_encode(),
            "image": pa.array([bytes([i % 251]) * (i % 90) for i in range(rows)]),
            "list": pa.array(lists, pa.list_(pa.int32())),
            "vector": pa.FixedSizeListArray.from_arrays(
                pa.array(np.random.default_rng(rows).random(rows * 4), pa.float32()), 4
            ),
            "flag": pa.array([i % 3 == 0 for i in range(rows)]),
            "when": pa.array(range(rows), pa.timestamp("us", "UTC")),
            "pair": pa.array([{"x": i, "y": str(i)} for i in range(rows)]),
        }
    )


# --- parquet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "zstd", "data_page_version": "2.0"}, {"use_dictionary": False, "data_page_size": 500}],
    ids=["snappy", "zstd", "plain"],
)
def test_parquet_row_groups(options: dict[str, Any]) -> None:
    data = parquet(mixed(), row_group_size=130, write_page_index=True, **options)
    assert same_rows("parquet", data).num_rows == 1000
    shard, _ = index("parquet", data)
    assert [b.rows for b in shard.blocks] == [0, *[130] * 7, 90]
    assert index("parquet", data, check=False) == index("parquet", data)


def test_parquet_of_no_rows() -> None:
    shard, schema = index("parquet", parquet(mixed(0)))
    assert (shard.rows, len(shard.blocks), schema.names[0]) == (0, 1, "id")


# --- arrow --------------------------------------------------------------------------------------------------------


def plain(rows: int = 1000) -> list[pa.RecordBatch]:
    batches: list[pa.RecordBatch] = mixed(rows).drop_columns(["kind"]).to_batches(max_chunksize=130)
    return batches


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_arrow_batches_stand_alone(stream: bool, legacy: bool, compression: str | None) -> None:
    data = ipc(plain(), stream=stream, compression=compression, use_legacy_format=legacy)
    same_rows("arrow", data)
    shard, _ = index("arrow", data)
    assert [b.rows for b in shard.blocks] == [*[130] * 7, 90]


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_dictionaries_come_along(stream: bool) -> None:
    data = ipc(mixed().combine_chunks().to_batches(max_chunksize=130), stream=stream)
    same_rows("arrow", data)
    assert index("arrow", data)[0].blocks[0].rows == 0


def test_arrow_views_and_runs() -> None:
    kinds: list[tuple[str, pa.Array]] = [
        ("text", pa.array([f"word {i} and more of it" for i in range(50)], pa.string_view())),
        ("run", pa.RunEndEncodedArray.from_arrays(pa.array([20, 50], pa.int32()), pa.array(["a", "b"]))),
        ("nested", pa.array([[f"{i}"] for i in range(50)], pa.list_(pa.binary_view()))),
    ]
    batch = pa.RecordBatch.from_arrays([array for _, array in kinds], names=[name for name, _ in kinds])
    found = same_rows("arrow", ipc([batch, batch]))
    assert found.schema.types == [pa.string(), pa.string(), pa.list_(pa.binary())]


def test_arrow_names_and_notes_of_columns_do_not_count() -> None:
    field = pa.field(
        "a", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False, metadata={"k": "v"}
    )
    batch = pa.record_batch([pa.array([[1], [2, 3]], field.type)], schema=pa.schema([field], metadata={"x": "y"}))
    shard, schema = index("arrow", ipc([batch]))
    assert schema == pa.schema([("a", pa.list_(pa.int32()))])
    assert [b.rows for b in shard.blocks] == [2]
    same_rows("arrow", ipc([batch]))


def test_arrow_extension_types_are_their_storage() -> None:
    array = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * 3, pa.binary(16)))
    found = same_rows("arrow", ipc([pa.record_batch([array], names=["id"])]))
    assert found.schema.types == [pa.binary(16)]


def test_arrow_empty_batches_are_no_blocks() -> None:
    some = plain(10)[0]
    shard, _ = index("arrow", ipc([some.slice(0, 0), some, some.slice(0, 0)]))
    assert [b.rows for b in shard.blocks] == [10]
    shard, schema = index("arrow", ipc([some.slice(0, 0)], stream=True))
    assert (shard.blocks, schema.names) == ((), some.schema.names)


def test_feather_files_are_arrow_files() -> None:
    out = io.BytesIO()
    feather.write_feather(mixed(300), out, compression="lz4", chunksize=100)
    same_rows("arrow", out.getvalue())


def test_arrow_dictionaries_that_grow_are_refused() -> None:
    one, two = (pa.record_batch([pa.array(words).dictionary_encode()], names=["w"]) for words in (["a"], ["a", "b"]))
    for stream in (False, True):
        with pytest.raises(SourceError, match=r"^a has a dictionary after its first record batch"):
            index("arrow", ipc([one, two], stream=stream, emit_dictionary_deltas=True))


# --- samples ------------------------------------------------------------------------------------------------------


def samples(rows: int = 2500) -> pa.Table:
    table = mixed(rows)
    filled = table.set_column(1, "word", table["word"].fill_null("")).drop_columns(["list", "pair", "when"])
    return filled.set_column(2, "kind", filled["kind"].cast(pa.string()))


def test_mds_samples(tmp_path: Path) -> None:
    data = exported("mds", samples(), tmp_path / "out")
    found = same_rows("mds", data)
    assert found.num_rows == 2500
    shard, _ = index("mds", data)
    assert [b.rows for b in shard.blocks] == [0, BLOCK_ROWS, BLOCK_ROWS, 2500 - 2 * BLOCK_ROWS]
    assert index("mds", data, check=False) == index("mds", data)


def test_mds_columns_of_fixed_size_only(tmp_path: Path) -> None:
    table = samples(30).select(["id", "vector"])
    same_rows("mds", exported("mds", table, tmp_path / "out"))


def test_mds_arrays_without_a_shape() -> None:
    def array(values: list[int]) -> bytes:
        return bytes([1 << 2, len(values)]) + np.array(values, "<i8").tobytes()

    same_rows(
        "mds", mds({"a": ("ndarray:int64", None), "b": ("json", None)}, [[array([1, 2]), b"[1]"], [array([3]), b"{}"]])
    )


def mds(columns: Mapping[str, tuple[str, int | None]], rows: Sequence[Sequence[bytes]], **config: Any) -> bytes:
    """An MDS shard, written by hand from encoded values."""
    text = json.dumps(
        {
            "version": 2,
            "format": "mds",
            "column_names": list(columns),
            "column_encodings": [encoding for encoding, _ in columns.values()],
            "column_sizes": [size for _, size in columns.values()],
            **config,
        }
    ).encode()
    made = []
    for row in rows:
        varying = [v for v, (_, size) in zip(row, columns.values(), strict=True) if size is None]
        made.append(b"".join(len(v).to_bytes(4, "little") for v in varying) + b"".join(row))
    first = 4 + 4 * (len(rows) + 1) + len(text)
    offsets = np.cumsum([first, *map(len, made)]).astype("<u4")
    return len(rows).to_bytes(4, "little") + offsets.tobytes() + text + b"".join(made)


def test_webdataset_samples(tmp_path: Path) -> None:
    table = samples()
    columns = {"__key__": pa.array([f"{i // 100}/{i}" for i in range(table.num_rows)]), "jpg": table["image"]}
    data = exported("webdataset", pa.table({**columns, "txt": table["word"]}), tmp_path / "out")
    found = same_rows("webdataset", data)
    assert (found.num_rows, found.schema.names) == (2500, ["__key__", "jpg", "txt.txt"])
    shard, _ = index("webdataset", data)
    assert [b.rows for b in shard.blocks] == [BLOCK_ROWS, BLOCK_ROWS, 2500 - 2 * BLOCK_ROWS]
    assert index("webdataset", data, check=False) == index("webdataset", data)


def tar(members: Sequence[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset_of_other_tools(format: int) -> None:
    long = "deep/" * 30 + "key" if format != tarfile.USTAR_FORMAT else "deep/key"
    members = [("a/", b""), ("a/one.txt", b"1"), ("a/one.cls", b""), ("b/", b""), (f"{long}.txt", b"x" * 700)]
    found = same_rows("webdataset", tar(members, format))
    assert found.to_pylist() == [
        {"__key__": "a/one", "cls": b"", "txt": b"1"},
        {"__key__": long, "cls": None, "txt": b"x" * 700},
    ]


def test_blocks_of_samples_are_cut_by_bytes() -> None:
    big = BLOCK_BYTES // 4
    data = tar([(f"{i}.bin", bytes([i]) * big) for i in range(10)])
    shard, _ = index("webdataset", data)
    assert [b.rows for b in shard.blocks] == [4, 4, 2]
    same_rows("webdataset", data)
    shard, _ = index("mds", mds({"b": ("bytes", None)}, [[bytes([i]) * big] for i in range(10)]))
    assert [b.rows for b in shard.blocks] == [0, 4, 4, 2]


# --- one pass -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.binary(min_size=1, max_size=300),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8),
    st.integers(1, 50),
    st.booleans(),
)
def test_a_pass_hashes_what_it_goes_over(data: bytes, steps: list[tuple[int, int]], window: int, keep: bool) -> None:
    class Short(Files):
        def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
            return super().read(obj, start, min(window, len(data) - start))

    files = Short({"a": data})
    told: list[int] = []
    scan = Scan(files, files.all()[0], keep=keep, told=told.append)
    at = 0
    for gap, length in steps:
        start, end = min(at + gap, len(data)), min(at + gap + length, len(data))
        scan.settle(start)
        scan.skip(start - scan.at)
        assert bytes(scan.take(length // 2)) == data[start : start + length // 2][: end - start]
        part = scan.part(start, end) if scan.at <= start else None
        part = part or (scan.cut(end))
        assert part.digest == block_digest(data[part.offset : end])
        if keep and part.offset == start:
            assert bytes(part.data) == data[start:end]
        at = end
    assert scan.finish() == hashlib.sha256(data).hexdigest()
    assert sum(told) == len(data)


# --- what can't be adopted ----------------------------------------------------------------------------------------


def build(encoding: Encoding, folder: Path, rows: int = 200) -> bytes:
    if encoding == "parquet":
        return parquet(mixed(rows), row_group_size=50)
    if encoding == "arrow":
        return ipc(plain(rows))
    return exported(encoding, samples(rows), folder)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_cut_short_is_named(encoding: Encoding, tmp_path: Path) -> None:
    data = build(encoding, tmp_path / "out")
    for at in [1, 7, 30, 600, len(data) // 2, len(data) - 9, len(data) - 1]:
        if encoding == "webdataset" and len(data) - at < 1024:
            continue  # within the marks that end an archive, where a second one may be missing
        for check in (True, False):
            with pytest.raises(SourceError, match=r"^dir/a b\b.*(exclude|again)"):
                index(encoding, data[:at], "dir/a b", check=check)


def test_a_stream_cut_short_is_named() -> None:
    data = ipc(plain(200), stream=True)
    for at in [20, 300, len(data) // 2, len(data) - 8, len(data) - 1]:
        with pytest.raises(SourceError, match=r"^a\b.*again"):
            index("arrow", data[:at])
    with pytest.raises(SourceError, match="goes on after"):
        index("arrow", data + b"more")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_something_else_is_named(encoding: Encoding, tmp_path: Path) -> None:
    others = [build(e, tmp_path / e) for e in ENCODINGS if e != encoding]
    for data in (*others, b"x", b"hello\n" * 1000, bytes(5000), np.random.default_rng(7).bytes(5000)):
        if encoding == "webdataset" and not any(data):
            continue  # 5,000 zeros are a tar of no members
        with pytest.raises(SourceError, match=r"^a\b"):
            index(encoding, data)
    with pytest.raises(SourceError, match="a is empty; remove"):
        index(encoding, b"")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_damage_is_an_error_or_another_digest(encoding: Encoding, tmp_path: Path) -> None:
    """Whatever a flipped bit hits, nothing else than a named error comes out, and never the digest of the whole."""
    data = build(encoding, tmp_path / "out")
    whole, _ = index(encoding, data)
    dice = random.Random(5)
    named: list[str] = []
    for _ in range(25):
        bad = bytearray(data)
        bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
        try:
            shard, _ = index(encoding, bytes(bad))
        except SourceError as error:
            named.append(str(error))
        else:
            assert shard.digest != whole.digest
    assert all(sentence.startswith("a") for sentence in named)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_bytes_that_are_not_what_the_index_says(encoding: Encoding, tmp_path: Path) -> None:
    data = build(encoding, tmp_path / "out")
    shard, schema = index(encoding, data)
    aux = next((piece(memoryview(data), b) for b in shard.blocks if b.rows == 0), None)
    block = next(b for b in shard.blocks if b.rows)
    good = piece(memoryview(data), block)

    def refused(aux: memoryview | None, data: memoryview, at: int, rows: int, schema: pa.Schema) -> None:
        with pytest.raises(SourceError, match=rf"^the block at byte {at} can't be read as .*: ."):
            decode_block(encoding, schema, aux, data, offset=at, rows=rows)

    refused(aux, good, block.offset, block.rows + 1, schema)
    refused(aux, good[: len(good) // 2], block.offset, block.rows, schema)
    refused(aux, memoryview(bytes(len(good))), block.offset, block.rows, schema)
    refused(aux, good, block.offset, block.rows, schema.remove(1))
    if aux is not None:
        refused(None, good, block.offset, block.rows, schema)
        refused(aux, good, block.offset + 1, block.rows, schema)
        refused(aux[: len(aux) // 2], good, block.offset, block.rows, schema)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("README", b"hello")], "'README' .byte 0., which has no extension"),
        ([("a.txt", b"1"), ("a.txt", b"2")], "two members 'txt' in sample 'a'"),
        ([("../a.txt", b"1")], "climbs out"),
        ([("a.__key__", b"1")], "name of the keys' column"),
    ],
)
def test_tars_that_have_bad_samples(members: list[tuple[str, bytes]], words: str) -> None:
    for check in (True, False):
        with pytest.raises(SourceError, match=rf"^a has.*{words}.*; pack it again or exclude it"):
            index("webdataset", tar(members), check=check)


def test_mds_that_is_refused() -> None:
    one = {"a": ("str", None)}
    for data, words in (
        (mds({"a": ("pkl", None)}, [[b"x"]]), "pickled"),
        (mds(one, [[b"\xff\xfe"]]), "samples 0 to 0 can't be decoded: .*UTF8"),
        (mds({"a": ("json", None)}, [[b"{}"], [b"{"]]), "column 'a' of sample 1 is not JSON"),
        (mds(one, [[b"x"]], version=3), "version 3"),
        (mds(one, [[b"x"]]) + b"y", "samples end at byte"),
        (mds({}, [[]]), "list of its samples makes no sense|names no columns"),
    ):
        with pytest.raises(SourceError, match=rf"^a\b.*({words})"):
            index("mds", data)


def test_text_that_is_not_text_is_named() -> None:
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    with pytest.raises(SourceError, match=r"^a can't be read as an Arrow IPC file: .*UTF8"):
        index("arrow", ipc([pa.record_batch([bad], names=["t"])]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_large_files_are_not_held(encoding: Encoding, tmp_path: Path) -> None:
    """What is read at random and in one pass gives what is read whole."""
    data = build(encoding, tmp_path / "out")
    assert index(encoding, data, hold_bytes=0) == index(encoding, data)
    stream = ipc(mixed(200).to_batches(), stream=True)
    assert index("arrow", stream, hold_bytes=0) == index("arrow", stream)


@pytest.mark.parametrize("encoding", [e for e in ENCODINGS if e != "webdataset"])
def test_a_file_that_changes_between_two_looks(encoding: Encoding, tmp_path: Path) -> None:
    """The store says that it is the same version all the time, but the bytes are others."""
    data = build(encoding, tmp_path / "out", 6000)
    at = {"parquet": len(data) - 60, "arrow": len(data) - 30, "mds": 500}[encoding]
    files = Fickle({"a": data}, {"a": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]})
    with pytest.raises(SourceChanged, match=r"^a changed or disappeared while it was being adopted"):
        index_file(encoding, files, files.all()[0], check=False, told=lambda _bytes: None, hold_bytes=0)


class Fickle(Files):
    """Gives other bytes to the pass from front to back, which is the one that asks for long stretches."""

    def __init__(self, data: dict[str, bytes], later: dict[str, bytes]) -> None:
        super().__init__(data)
        self.later = later

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        if start == 0 and length == obj.size_bytes:
            self.data = self.later
        return super().read(obj, start, length)
