from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.mds import MDS
from millrace.pipeline.records import ReadContext, Records

SOURCE = Source(url="file://./data", format="mds")


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


def shard(columns: dict[str, tuple[str, int | None]], samples: Sequence[Sequence[bytes]], **config: Any) -> bytes:
    """An MDS shard, written by hand from encoded values."""
    text = json.dumps(
        {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [],
            "size_limit": 1 << 26,
            "column_names": list(columns),
            "column_encodings": [encoding for encoding, _ in columns.values()],
            "column_sizes": [size for _, size in columns.values()],
            **config,
        },
        sort_keys=True,
    ).encode()
    bodies = []
    for sample in samples:
        sizes = [len(v) for v, (_, size) in zip(sample, columns.values(), strict=True) if size is None]
        bodies.append(np.array(sizes, "<u4").tobytes() + b"".join(sample))
    offsets = np.cumsum([4 + 4 * (len(bodies) + 1) + len(text), *map(len, bodies)]).astype("<u4")
    return len(bodies).to_bytes(4, "little") + offsets.tobytes() + text + b"".join(bodies)


def read(
    objects: Objects, chunks: Sequence[Chunk] | None = None, rejects: list[Quarantined] | None = None, **limits: int
) -> list[Records]:
    schema = MDS.schema(objects, SOURCE, objects.all())
    assert schema.metadata is None
    if chunks is None:
        chunks = [Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))]
    quarantine = [] if rejects is None else rejects
    context = ReadContext(SOURCE, schema, objects, quarantine.append, **{"max_record_bytes": 1_000_000, **limits})
    out = [r for chunk in chunks for r in MDS.read(chunk, context)]
    for r in out:
        assert r.batch.schema.equals(schema, check_metadata=True)
        assert r.batch.num_rows == len(r.objects) == len(r.positions) > 0
        r.batch.validate(full=True)
    assert rejects is not None or quarantine == []
    return out


def rows(records: list[Records]) -> list[dict[str, Any]]:
    return [row for r in records for row in r.batch.to_pylist()]


def texts(n: int) -> bytes:
    return shard({"n": ("int", 8), "text": ("str", None)}, [(np.int64(i).tobytes(), b"t" * (i % 50)) for i in range(n)])


SCALARS = ["uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]


def test_scalars_texts_and_images() -> None:
    columns: dict[str, tuple[str, int | None]] = {f"c_{name}": (name, np.dtype(name).itemsize) for name in SCALARS}
    columns |= {"i": ("int", 8), "s": ("str", None), "b": ("bytes", None), "d": ("str_decimal", None)}
    columns |= {"img": ("jpeg", None), "raw": ("pil", None)}
    values = [*(np.dtype(n).type(100).tobytes() for n in SCALARS), np.int64(-5).tobytes()]
    values += ["h\u00e9".encode(), b"\0\xff", b"3.14", b"\xff\xd8jpeg", b"pil"]
    records = read(Objects({"a/shard.00000.mds": shard(columns, [values, values]), "a/index.json": b"{}"}))
    row = {f"c_{name}": 100 for name in SCALARS} | {"i": -5, "s": "h\u00e9", "b": b"\0\xff", "d": "3.14"}
    row |= {"img": b"\xff\xd8jpeg", "raw": b"pil", "path": "a/shard.00000.mds"}
    assert rows(records) == [row, row]
    schema = records[0].batch.schema
    assert [schema.field(f"c_{name}").type for name in SCALARS] == [pa.from_numpy_dtype(n) for n in SCALARS]
    assert [int(p) for r in records for p in r.positions] == [0, 1]


def test_json_is_canonical_and_bad_json_is_rejected() -> None:
    values = [b'{"b": 1, "a": [1.5, null, "\xc3\xa9"]}', b"{", b'"\\ud800"', b"\xff", b"7"]
    rejects: list[Quarantined] = []
    records = read(Objects({"x.mds": shard({"j": ("json", None)}, [[v] for v in values])}), rejects=rejects)
    assert [row["j"] for row in rows(records)] == ['{"a":[1.5,null,"\u00e9"],"b":1}', '"\\ud800"', "7"]
    assert [(q.rule, q.position) for q in rejects] == [("json", "sample 1"), ("json", "sample 3")]


def test_arrays_of_fixed_shape() -> None:
    a, b = np.arange(6, dtype=np.uint16).reshape(2, 3), np.arange(4, dtype=np.float32)
    data = shard({"a": ("ndarray:uint16:2,3", 12), "b": ("ndarray:float32:4", 16)}, [(a.tobytes(), b.tobytes())] * 3)
    records = read(Objects({"x.mds": data}))
    assert [row["a"] for row in rows(records)] == [a.tolist()] * 3
    assert records[0].batch.schema.field("a").type == pa.list_(pa.list_(pa.uint16(), 3), 2)
    assert records[0].batch.schema.field("b").type == pa.list_(pa.float32(), 4)


def encoded_array(value: np.ndarray[Any, Any], *, dtype: bool) -> bytes:
    codes = {"uint16": 16, "float64": 66, "int8": 9}
    width = 0 if max(value.shape) < 256 else 1
    head = bytes([codes[value.dtype.name]]) if dtype else b""
    return (
        head + bytes([value.ndim << 2 | width]) + np.array(value.shape, f"<u{1 << width}").tobytes() + value.tobytes()
    )


@pytest.mark.parametrize("dtype", [False, True])
def test_arrays_that_carry_their_shape(dtype: bool) -> None:
    values = [np.arange(n, dtype=np.uint16) for n in (3, 300, 1)]
    column = ("ndarray" if dtype else "ndarray:uint16", None)
    other = encoded_array(np.ones((2, 2), np.uint16), dtype=dtype)
    rejects: list[Quarantined] = []
    encoded = [[encoded_array(v, dtype=dtype)] for v in values]
    records = read(
        Objects({"x.mds": shard({"a": column}, [*encoded, [other], [b"\xff\xff"], *encoded])}), rejects=rejects
    )
    assert [row["a"] for row in rows(records)] == [v.tolist() for v in values] * 2
    assert [(q.rule, q.position) for q in rejects] == [("schema", "sample 3"), ("schema", "sample 4")]
    square = np.arange(6, dtype=np.int8).reshape(3, 2)
    records = read(Objects({"x.mds": shard({"a": ("ndarray", None)}, [[encoded_array(square, dtype=True)]] * 2)}))
    assert [row["a"] for row in rows(records)] == [square.tolist()] * 2


def test_pickles_are_refused() -> None:
    with pytest.raises(SourceError, match=r"^x\.mds: column 'p' is pickled.*runs whatever code"):
        read(Objects({"x.mds": shard({"p": ("pkl", None)}, [[b"cos\nsystem\n(S'true'\ntR."]])}))


@pytest.mark.parametrize(
    ("columns", "config", "sentence"),
    [
        ({"a": ("tensor", None)}, {}, "unknown encoding 'tensor'"),
        ({"a": ("ndarray:uint16:x", None)}, {}, "unknown encoding"),
        ({"a": ("ndarray:complex64:2", 16)}, {}, "unknown encoding"),
        ({"a": ("int", 4)}, {}, "values of 4 bytes, not 8"),
        ({"a": ("str", None)}, {"version": 3}, "version 3 is unknown"),
        ({"a": ("str", None)}, {"column_names": []}, "corrupt"),
        ({"a": ("str", None)}, {"column_names": 7}, "corrupt"),
    ],
)
def test_configs_that_cannot_be_read(
    columns: dict[str, tuple[str, int | None]], config: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SourceError, match=sentence):
        read(Objects({"x.mds": shard(columns, [], **config)}))


@given(chunk_bytes=st.integers(50, 20_000), n=st.integers(1, 200))
@settings(max_examples=40, deadline=None)
def test_any_chunk_size_gives_the_same_records(chunk_bytes: int, n: int) -> None:
    objects = Objects({"a/index.json": b"{}" * 99, "a/s.0.mds": texts(n), "a/s.1.mds": texts(7)})
    chunks: list[Chunk] = []
    for obj in objects.all():
        cuts = MDS.cut(objects, SOURCE, obj, chunk_bytes) if obj.size_bytes > chunk_bytes else (0, obj.size_bytes)
        chunks += [Chunk(len(chunks), 0, (obj,), a, b) for a, b in itertools.pairwise(cuts)]
    records = read(objects, chunks)
    assert [row["n"] for row in rows(records)] == [*range(n), *range(7)]
    assert [int(p) for r in records for p in r.positions] == [*range(n), *range(7)]


@pytest.mark.parametrize("ending", ["mds.zstd", "mds.zst", "mds.gz"])
def test_compressed_shards(ending: str) -> None:
    packed = gzip.compress(texts(100)) if ending.endswith("gz") else pa.compress(texts(100), codec="zstd", asbytes=True)
    objects = Objects({f"x.{ending}": packed})
    assert MDS.cut(objects, SOURCE, objects.all()[0], 10) == (0, len(packed))
    assert [row["n"] for row in rows(read(objects))] == list(range(100))
    with pytest.raises(SourceError, match=r"^bad"):
        read(Objects({"good.mds": texts(3), f"bad.{ending}": packed[:-30]}))


def test_bounds_and_long_samples() -> None:
    rejects: list[Quarantined] = []
    values = [[b"x" * (5000 if i in (3, 4, 9) else 10)] for i in range(10)]
    objects = Objects({"x.mds": shard({"s": ("str", None)}, values)})
    records = read(objects, rejects=rejects, max_record_bytes=1024, batch_rows=3)
    assert [int(p) for r in records for p in r.positions] == [0, 1, 2, 5, 6, 7, 8]
    assert [(q.position, q.rule) for q in rejects] == [(f"sample {i}", "max_record") for i in (3, 4, 9)]
    assert max(r.batch.num_rows for r in records) <= 3
    small = read(Objects({"x.mds": texts(500)}), batch_bytes=900)
    assert max(r.batch.drop_columns("path").nbytes for r in small) <= 900


def test_bad_utf8_is_rejected() -> None:
    rejects: list[Quarantined] = []
    records = read(Objects({"x.mds": shard({"s": ("str", None)}, [[b"a"], [b"\xff"], [b"c"]])}), rejects=rejects)
    assert [row["s"] for row in rows(records)] == ["a", "c"]
    assert [(q.position, q.rule) for q in rejects] == [("sample 1", "utf-8")]


def test_other_columns_than_the_first_are_named() -> None:
    first = shard({"a": ("int", 8), "b": ("str", None)}, [[bytes(8), b"x"]])
    for columns, sentence in (
        ({"a": ("int32", 4), "b": ("str", None)}, "column 'a' is int32, but int64"),
        ({"a": ("int", 8), "b": ("ndarray:uint8", None)}, "column 'b' is list<item: null>, but string"),
        ({"a": ("int", 8)}, "column 'b' is missing"),
    ):
        with pytest.raises(SourceError, match=sentence):
            read(Objects({"a.mds": first, "b.mds": shard(columns, [])}))  # type: ignore[arg-type]


def test_truncated_anywhere_is_an_error_that_names_the_shard() -> None:
    whole = texts(20)
    for keep in range(0, len(whole), 13):
        with pytest.raises(SourceError, match=r"^bad\.mds (is|is no whole|is empty)"):
            read(Objects({"good.mds": whole, "bad.mds": whole[:keep]}))
    with pytest.raises(SourceError, match="its samples end at byte"):
        read(Objects({"x.mds": whole + b"more"}))
    with pytest.raises(SourceError, match=r"only index\.json"):
        read(Objects({"index.json": b"{}"}))


def test_broken_bytes_never_raise_anything_else() -> None:
    whole = texts(30)
    rng = np.random.default_rng(3)
    for at in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[at : at + 2] = rng.bytes(len(broken[at : at + 2]))
        try:
            read(Objects({"good.mds": whole, "broken.mds": bytes(broken)}), rejects=[])
        except SourceError as err:
            if "broken.mds" not in str(err):
                raise AssertionError(str(err)) from err
