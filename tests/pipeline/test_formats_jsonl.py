from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.core.errors import SourceError, UsageError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats import jsonl
from millrace.pipeline.formats.columns import COLUMN_TYPES, JSON_TYPE
from millrace.pipeline.formats.jsonl import JSONL, read_at_once, read_line_by_line
from millrace.pipeline.formats.jsonvalues import Fields
from millrace.pipeline.formats.linescan import line_batches, line_runs
from millrace.pipeline.records import ReadContext, Records


class Objects:
    """Blocking reads over a dictionary."""

    def __init__(self, data: dict[str, bytes]) -> None:
        self.data = data

    def all(self) -> tuple[SourceObject, ...]:
        return tuple(SourceObject(path, len(data), "1") for path, data in self.data.items())

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        return memoryview(self.data[obj.path])[start : None if length is None else start + length]

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        for i, obj in enumerate(objects):
            yield i, self.read(obj)


def source(columns: dict[str, str] | None = None) -> Source:
    return Source.model_validate({"url": "file://./x", "format": "jsonl", "columns": columns})


def schema_of(data: bytes, columns: dict[str, str] | None = None) -> dict[str, pa.DataType]:
    objects = Objects({"a": data})
    schema = JSONL.schema(objects, source(columns), objects.all())
    assert schema.metadata is None
    return {f.name: f.type for f in schema}


def read(
    files: dict[str, bytes] | bytes,
    rejects: list[Quarantined],
    columns: dict[str, str] | None = None,
    chunk_bytes: int = 10**9,
    **limits: int,
) -> list[Records]:
    objects = Objects({"a": files} if isinstance(files, bytes) else files)
    src = source(columns)
    schema = JSONL.schema(objects, src, objects.all())
    context = ReadContext(src, schema, objects, rejects.append, **{"max_record_bytes": 10**6, **limits})
    chunks = [Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))]
    if chunk_bytes < 10**9:
        chunks = [
            Chunk(0, 0, (obj,), a, b)
            for obj in objects.all()
            for a, b in itertools.pairwise(JSONL.cut(objects, src, obj, chunk_bytes))
        ]
    out = [records for chunk in chunks for records in JSONL.read(chunk, context)]
    for records in out:
        assert records.batch.schema.equals(schema, check_metadata=True)
        records.batch.validate(full=True)
    return out


def rows(found: Sequence[Records]) -> list[dict[str, Any]]:
    return [row for records in found for row in records.batch.to_pylist()]


def good(data: bytes, columns: dict[str, str] | None = None) -> list[dict[str, Any]]:
    rejects: list[Quarantined] = []
    found = rows(read(data, rejects, columns))
    assert rejects == []
    return [{k: v for k, v in row.items() if (k, v) != ("path", "a")} for row in found]


def bad(data: bytes, columns: dict[str, str] | None = None, **limits: int) -> list[tuple[str, str, str]]:
    rejects: list[Quarantined] = []
    read(data, rejects, columns, **limits)
    assert all(q.path == "a" and q.stage == "ingest" for q in rejects)
    return [(q.position, q.rule, q.reason) for q in rejects]


# --- schema -----------------------------------------------------------------------------------------


def test_fields_and_types_are_found_from_the_lines() -> None:
    data = b"""{"s":"x","i":1,"d":1,"b":true,"n":null,"o":{"x":1},"late":null,"mixed":"x"}
    {"d":1.5,"i":-9223372036854775808,"late":2.5,"l":[1],"mixed":[1]}
    """
    assert schema_of(data) == {
        "path": pa.string(),
        "s": pa.string(),
        "i": pa.int64(),
        "d": pa.float64(),
        "b": pa.bool_(),
        "n": pa.string(),
        "o": JSON_TYPE,
        "late": pa.float64(),
        "mixed": JSON_TYPE,
        "l": JSON_TYPE,
    }


def test_columns_say_what_to_read() -> None:
    columns = {"a": "double", "j": "json", "t": "timestamp", "r": "binary"}
    assert schema_of(b"", columns) == {"path": pa.string(), **{k: COLUMN_TYPES[v] for k, v in columns.items()}}


def test_a_path_of_the_data_takes_the_place_of_ours() -> None:
    assert list(schema_of(b'{"path":"p","x":1}\n')) == ["x", "path"]
    assert good(b'{"path":"p","x":1}\n{"x":2}\n') == [{"x": 1, "path": "p"}, {"x": 2, "path": None}]
    assert good(b'{"path":"p"}\n') == [{"path": "p"}]
    assert good(b'{"path":7,"x":1}\n', {"path": "int64"}) == [{"path": 7}]


def test_the_sample_skips_empty_and_broken_objects() -> None:
    objects = Objects({"a": b"", "b": b"\n\n", "c.gz": gzip.compress(b"x" * 99)[:-9], "d": b'\xef\xbb\xbf{"x":1}'})
    assert JSONL.schema(objects, source(), objects.all()).names == ["path", "x"]


def test_no_fields_to_be_found_is_an_error() -> None:
    for data in (b"", b"\n", b"[1]\n", b"{}\n"):
        with pytest.raises(UsageError, match="list them under columns"):
            schema_of(data)
    objects = Objects({"c.gz": gzip.compress(b"x" * 99)[:-9]})
    with pytest.raises(SourceError, match=r"c\.gz ends in the middle"):
        JSONL.schema(objects, source(), objects.all())


def test_a_first_line_longer_than_the_sample_is_looked_at() -> None:
    data = json.dumps({"text": "x" * (jsonl.SAMPLE_BYTES + 10), "n": 1}).encode()
    assert list(schema_of(data)) == ["path", "text", "n"]


# --- records ----------------------------------------------------------------------------------------


def test_values_come_as_they_are() -> None:
    data = '{"s":"ü\\n\\u0000","i":1,"d":2,"b":false}\r\n\n{"d":0.1}\n  {"s":null}'.encode()
    assert good(data, {"s": "string", "i": "int64", "d": "double", "b": "bool"}) == [
        {"s": "ü\n\0", "i": 1, "d": 2.0, "b": False},
        {"s": None, "i": None, "d": 0.1, "b": None},
        {"s": None, "i": None, "d": None, "b": None},
    ]


def test_nested_values_are_canonical_json() -> None:
    assert good(
        b'{"o": {"b": [1, 2.50, "\xc3\xa9"], "a": null}}\n{"o": "text"}\n{"o": null}\n{"o":{"k":1,"k":2}}\n'
    ) == [
        {"o": '{"a":null,"b":[1,2.5,"é"]}'},
        {"o": '"text"'},
        {"o": None},
        {"o": '{"k":2}'},
    ]


def test_times_and_bytes() -> None:
    import datetime as dt

    utc = dt.UTC
    data = b"""{"t":"2024-05-01T12:00:00Z","r":"AAE="}
{"t":"2024-05-01","r":""}
{"t":"2024-05-01 12:00:00.25+02:00"}
"""
    first, second, third = good(data, {"t": "timestamp", "r": "binary"})
    assert first == {"t": dt.datetime(2024, 5, 1, 12, tzinfo=utc), "r": b"\0\1"}
    assert second == {"t": dt.datetime(2024, 5, 1, tzinfo=utc), "r": b""}
    assert third["t"] == dt.datetime(2024, 5, 1, 10, 0, 0, 250_000, tzinfo=utc)
    found = bad(b'{"t":"noon"}\n{"t":7}\n{"r":"?"}\n', {"t": "timestamp", "r": "binary"})
    assert [reason for *_, reason in found] == [
        "field 't' is 'noon', expected timestamp",
        "field 't' is a whole number, expected timestamp",
        "field 'r' is not base64, expected binary",
    ]


def test_each_bad_line_is_named_and_the_others_are_kept() -> None:
    lines = [
        b'{"i":1,"s":"x"}',
        b'{"i":"1"}',
        b'{"i":1.0}',
        b'{"i":9223372036854775808}',
        b'{"s":1}',
        b'{"s":{}}',
        b'{"new":1}',
        b"[1]",
        b"null",
        b'{"i":1',
        b'{"s":"\xff"}',
        b'{"s":"\\ud800"}',
        b'{"i":true}',
        b'{"i":1}{"i":2}',
        b'{"i":2}',
    ]
    rejects: list[Quarantined] = []
    data = b"\n".join(lines)
    found = read({"a": lines[0] + b"\n", "b": data}, rejects)
    # The types are of the first file, and of the second as far as a first type stays.
    assert [row["i"] for row in rows(found)][:2] == [1, 1]
    objects = Objects({"b": data})
    schema = pa.schema([("path", pa.string()), ("i", pa.int64()), ("s", pa.string())])
    told: list[Quarantined] = []
    context = ReadContext(source(), schema, objects, told.append, 1000)
    kept = list(JSONL.read(Chunk(0, 0, objects.all(), 0, len(data)), context))
    assert [row["i"] for row in rows(kept)] == [1, 2]
    assert [(q.rule, q.reason.split(";")[0]) for q in told] == [
        ("schema", "field 'i' is a string, expected int64"),
        ("schema", "field 'i' is a number, expected int64"),
        ("schema", "field 'i' is a whole number of more than 64 bits, expected int64"),
        ("schema", "field 's' is a whole number, expected string"),
        ("schema", "field 's' is an object, expected string"),
        ("schema", "field 'new' is not among those the sample showed"),
        ("json", "the line is a list, not a JSON object"),
        ("json", "the line is null, not a JSON object"),
        ("json", "the line is not JSON: Expecting ',' delimiter at its character 6"),
        ("utf-8", "the line is not UTF-8: invalid start byte at its byte 6"),
        ("schema", "field 's' is text with half of a surrogate pair, expected string"),
        ("schema", "field 'i' is a bool, expected int64"),
        ("json", "the line is not JSON: Extra data at its character 7"),
    ]
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]
    assert [q.position for q in told] == [f"line at byte {at}" for at in starts[1:14]]
    assert kept[0].positions.tolist() == [0, starts[14]]


def test_other_fields_are_left_out_when_columns_are_listed() -> None:
    assert good(b'{"a":1,"b":{"c":[]},"a2":"x"}\n', {"a": "int64"}) == [{"a": 1}]


def test_numbers_that_are_none_are_rejected_in_a_double_column() -> None:
    data = b'{"d":1}\n{"d":NaN}\n{"d":-Infinity}\n{"d":1e999}\n{"d":-0}\n'
    assert [reason.split(",")[0] for *_, reason in bad(data, {"d": "double"})] == [
        "field 'd' is not a finite number"
    ] * 3
    assert bad(b'{"j":[NaN]}\n', {"j": "json"})[0][1] == "schema"


def test_a_line_that_is_too_deep_is_rejected() -> None:
    data = b'{"a":1}\n{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
    assert [rule for _, rule, _ in bad(data)] == ["json"]


def test_a_long_line_is_rejected_and_the_rest_is_read() -> None:
    data = b'{"a":1}\n{"a":"' + b"x" * 5000 + b'"}\n{"a":2}\n'
    rejects: list[Quarantined] = []
    assert [r["a"] for r in rows(read(data, rejects, max_record_bytes=1000))] == [1, 2]
    assert [(q.position, q.rule) for q in rejects] == [("line at byte 8", "max_record")]


# --- laws -------------------------------------------------------------------------------------------

_scalars = st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats() | st.text(max_size=5)
_values = st.recursive(
    _scalars, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=2), v, max_size=2)
)
_objects = st.dictionaries(st.sampled_from(["s", "i", "d", "b", "x"]), _values, max_size=5)
_fitting = st.fixed_dictionaries(
    {},
    optional={
        "s": st.text(max_size=5) | st.none(),
        "i": st.integers(-(2**63), 2**63 - 1) | st.none(),
        "d": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**25), 10**25) | st.none(),
        "b": st.booleans() | st.none(),
        "t": st.sampled_from(["2024-05-01", "2024-05-01T00:00:00Z", None]),
    },
)
_line = (
    _fitting.map(json.dumps).map(str.encode)
    | st.builds(lambda o: json.dumps(o, ensure_ascii=False, separators=(",", ":")), _fitting).map(
        lambda s: s.encode("utf-8", "surrogatepass")
    )
    | _objects.map(json.dumps).map(str.encode)
    | st.sampled_from(
        [
            b"",
            b" ",
            b"\r",
            b"{}",
            b"{}\r",
            b' {"i":1}',
            b'{"i":1} ',
            b'{"i":1}{"i":2}',
            b'{"i":1},{"i":2}',
            b'{"i":-0,"d":-0}',
            b'{"i":1,"i":2}',
            b'{"x":1,"x":2}',
            b'{"i":01}',
            b'{"d":1e400}',
            b'{"d":1.7976931348623159e308}',
            b'{"d":4e-400}',
            b'{"d":NaN}',
            b'{"s":"\xff"}',
            b'{"x":"\xff"}',
            b'{"s":"\\ud83d\\ude00\\u00e9"}',
            b'{"s":"\\ude00"}',
            b'{"s":"\t"}',
            b'{"i":1}\0{"i":2}',
            b'{"i":1}\0}',
            b'{"s":{"a":',
            b'{"s":1}}',
            b'{"t":"noon"}',
            b"\xef\xbb\xbf{}",
            b'{"i":1.0}',
            b'{"i":1e2}',
            b'{"b":"true"}',
            b'{"\\u0069":5}',
        ]
    )
)
_KINDS = {
    n: COLUMN_TYPES[k] for n, k in {"s": "string", "i": "int64", "d": "double", "b": "bool", "t": "timestamp"}.items()
}


@given(st.lists(_line, min_size=1, max_size=6), st.booleans())
@example([b'{"i":1}{"i":1}', b'{"i":1}\0}'], True)
@example([b'{"i":1}{"i":1}', b""], False)
@example([b'{"x":{"a":', b'{"i":1}}'], False)
def test_both_readers_agree(lines: list[bytes], strict: bool) -> None:
    data = b"\n".join(lines) + b"\n"
    objects = Objects({"a": data})
    rejects: list[Quarantined] = []
    context = ReadContext(source(), pa.schema([]), objects, rejects.append, 10**6)
    chunk = Chunk(0, 0, objects.all(), 0, len(data))
    for batch in line_batches(context, line_runs(chunk, context, "line at byte")):
        fields = Fields(_KINDS, strict=strict)
        slow, kept = read_line_by_line(batch, fields, chunk, context)
        fast = read_at_once(batch, fields)
        if fast is not None:
            assert rejects == []
            assert kept == list(range(len(lines)))
            assert all(mine.equals(theirs) for mine, theirs in zip(fast, slow, strict=True))
            assert [math.copysign(1, v) for v in fast[2].drop_null().to_pylist()] == [
                math.copysign(1, v) for v in slow[2].drop_null().to_pylist()
            ]


@given(st.lists(_fitting.map(json.dumps), min_size=1, max_size=8))
def test_plain_lines_are_read_at_once(lines: list[str]) -> None:
    data = "\r\n".join([*lines, ""]).encode()
    objects = Objects({"a": data})
    context = ReadContext(source(), pa.schema([]), objects, lambda q: None, 10**6)
    for batch in line_batches(context, line_runs(Chunk(0, 0, objects.all(), 0, len(data)), context, "")):
        assert read_at_once(batch, Fields(_KINDS, strict=True)) is not None


@given(st.lists(_line, min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 4))
def test_records_are_the_same_however_they_are_cut(lines: list[bytes], chunk_bytes: int, batch_rows: int) -> None:
    columns = {"s": "string", "i": "int64", "d": "double", "b": "bool"}
    data = b"\n".join(lines)
    rejects: tuple[list[Quarantined], list[Quarantined], list[Quarantined]] = ([], [], [])
    whole = rows(read(data, rejects[0], columns))
    assert repr(rows(read(data, rejects[1], columns, chunk_bytes))) == repr(whole)
    assert repr(rows(read(data, rejects[2], columns, batch_rows=batch_rows))) == repr(whole)
    assert rejects[0] == rejects[1] == rejects[2]
