from __future__ import annotations

import csv
import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyarrow import csv as pacsv

from millrace.core.errors import SourceError, SpecError, UsageError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.columns import TIME_TYPE
from millrace.pipeline.formats.csv import CSV
from millrace.pipeline.formats.quotes import QuotedRecords
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


def source(columns: dict[str, str] | None = None, multiline: bool = True) -> Source:
    return Source.model_validate({"url": "file://./x", "format": "csv", "columns": columns, "multiline": multiline})


def read(
    files: dict[str, bytes] | bytes,
    rejects: list[Quarantined],
    columns: dict[str, str] | None = None,
    chunk_bytes: int = 0,
    multiline: bool = True,
    **limits: int,
) -> list[Records]:
    objects = Objects({"a": files} if isinstance(files, bytes) else files)
    src = source(columns, multiline)
    schema = CSV.schema(objects, src, objects.all())
    assert schema.metadata is None
    context = ReadContext(src, schema, objects, rejects.append, **{"max_record_bytes": 10**6, **limits})
    chunks = [Chunk(0, 0, objects.all(), 0, sum(o.size_bytes for o in objects.all()))]
    if chunk_bytes:
        chunks = [
            Chunk(0, 0, (obj,), a, b)
            for obj in objects.all()
            for a, b in itertools.pairwise(CSV.cut(objects, src, obj, chunk_bytes))
        ]
    out = [records for chunk in chunks for records in CSV.read(chunk, context)]
    for records in out:
        assert records.batch.schema.equals(schema, check_metadata=True)
        records.batch.validate(full=True)
    return out


def rows(found: Sequence[Records]) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for records in found for row in records.batch.to_pylist()]


def good(files: dict[str, bytes] | bytes, columns: dict[str, str] | None = None, **more: Any) -> list[tuple[Any, ...]]:
    rejects: list[Quarantined] = []
    found = rows(read(files, rejects, columns, **more))
    assert rejects == []
    return found


def test_rows_are_strings_under_the_header() -> None:
    data = b'\xef\xbb\xbfx,y z\r\n1,"a,""b"""\r\n,\r\n\r\n" sp ",NA\n"two\r\nlines",\xc3\xbc'
    expected = [("a", "1", 'a,"b"'), ("a", "", ""), ("a", " sp ", "NA"), ("a", "two\r\nlines", "ü")]
    assert good(data) == expected
    assert good({"a.gz": gzip.compress(data)}) == [("a.gz", *rest) for _, *rest in expected]


def test_columns_choose_and_type() -> None:
    import datetime as dt

    data = b"t,i,skip,d,b,r,s\n2024-05-01,1,zz,1.5,true,\xff,x\n,,,,,,\n"
    columns = {"s": "string", "i": "int64", "d": "double", "b": "bool", "t": "timestamp", "r": "binary"}
    (first, second) = good(data, columns)
    assert first == ("a", "x", 1, 1.5, True, dt.datetime(2024, 5, 1, tzinfo=dt.UTC), b"\xff")
    assert second[:6] == ("a", "", None, None, None, None)
    assert CSV.schema(Objects({}), source(columns), ()).field("t").type == TIME_TYPE


def test_json_columns_are_refused_with_a_way_out() -> None:
    with pytest.raises(SpecError, match=r"columns: 'j' can't be json, .* make it a string"):
        CSV.schema(Objects({}), source({"j": "json"}), ())


def test_headers_must_be_the_same_and_the_difference_is_named() -> None:
    for other, what in (
        (b"x,z\n", r"column 2 is 'z' instead of 'y'"),
        (b"x\n", r"it lacks 'y'"),
        (b"x,y,z\n", r"it also has 'z'"),
        (b"y,x\n", r"column 1 is 'y' instead of 'x'"),
    ):
        with pytest.raises(SourceError, match=rf"^b has another header than the first file: {what}; list the columns"):
            read({"a": b"x,y\n1,2\n", "b": other}, [])
    columns = {"x": "int64"}
    assert good({"a": b"x,y\n1,2\n", "b": b"z,x\n3,4\n", "c": b"x,y\n5,6\n"}, columns) == [
        ("a", 1),
        ("b", 4),
        ("c", 5),
    ]
    with pytest.raises(SourceError, match=r"^b has no column 'x'; its header is 'y'"):
        read({"a": b"x,y\n1,2\n", "b": b"y\n1\n"}, [], columns)


@pytest.mark.parametrize("multiline", [True, False])
def test_odd_headers_are_named(multiline: bool) -> None:
    for data, what in (
        (b"x,x\n", "two columns called 'x'"),
        (b"\nx\n", "begins with a blank line"),
        (b"\xff\n", "header that can't be read"),
        (b"x" * 1_100_000, "no header in its first 1000000 bytes"),
    ):
        with pytest.raises(SourceError, match=f"^a .*{what}"):
            read(data, [], multiline=multiline)
    with pytest.raises(UsageError, match="no row, so the columns are not known"):
        read({"a": b"", "b": b""}, [])


def test_empty_files_and_headers_alone_have_no_rows() -> None:
    assert good({"a": b"", "b": b"x\n", "c": b"x", "d": b"x\n1\n"}) == [("d", "1")]
    assert good({"a": b""}, {"x": "string"}) == []


def test_a_path_of_the_data_takes_the_place_of_ours() -> None:
    assert good(b"path,x\np,1\n") == [("1", "p")]
    assert good(b"path\np\n") == [("p",)]
    assert good(b"path,x\np,1\n", {"path": "string"}) == [("p",)]
    with pytest.raises(SourceError, match="it lacks 'path'"):
        read({"a": b"path,x\np,1\n", "b": b"x\n1\n"}, [])


def test_each_bad_row_is_named_and_the_others_are_kept() -> None:
    lines = [b"1,a,", b"x,b,", b"2,c", b"3,d,e,f", b"4,\xff,", b"5,g,noon", b"6,h\rh,", b"7,i,2024-05-01"]
    data = b"i,s,t\n" + b"\n".join(lines) + b"\n"
    rejects: list[Quarantined] = []
    found = read(data, rejects, {"i": "int64", "s": "string", "t": "timestamp"})
    assert [row[1:3] for row in rows(found)] == [(1, "a"), (7, "i")]
    starts = list(itertools.accumulate((len(line) + 1 for line in lines), initial=6))
    assert found[0].positions.tolist() == [starts[0], starts[7]]
    assert [(q.position, q.rule, q.reason) for q in rejects] == [
        (f"row at byte {starts[1]}", "type", "column 'i' holds 'x', expected int64"),
        (f"row at byte {starts[2]}", "columns", "the row has 2 values, the header 3"),
        (f"row at byte {starts[3]}", "columns", "the row has 4 values, the header 3"),
        (f"row at byte {starts[4]}", "utf-8", "column 's' is not UTF-8: invalid start byte at its byte 0"),
        (f"row at byte {starts[5]}", "type", "column 't' holds 'noon', expected timestamp"),
        (f"row at byte {starts[6]}", "csv", "a carriage return stands in a value without quotes"),
    ]


def test_a_quote_that_is_never_closed() -> None:
    with pytest.raises(SourceError, match=r"^a ends inside a quoted value"):
        read(b'x,y\n1,"2\n3,4\n', [])
    rejects: list[Quarantined] = []
    assert rows(read(b'x,y\n1,"2\n3,4\n', rejects, multiline=False)) == [("a", "3", "4")]
    assert [(q.position, q.rule) for q in rejects] == [("row at byte 4", "csv")]
    assert "set multiline: true" in rejects[0].reason


def test_a_long_row_is_rejected_and_the_rest_is_read() -> None:
    data = b'x\n1\n"' + b"y\n" * 5000 + b'"\n2\n'
    rejects: list[Quarantined] = []
    assert rows(read(data, rejects, max_record_bytes=1000)) == [("a", "1"), ("a", "2")]
    assert [(q.position, q.rule) for q in rejects] == [("row at byte 4", "max_record")]


def test_a_byte_order_mark_inside_a_file_is_text() -> None:
    assert good(b"x\n1\n\xef\xbb\xbf2\n", batch_rows=1) == [("a", "1"), ("a", "\ufeff2")]
    assert good(b'\xef\xbb\xbf"x\ny"\n1\n') == [("a", "1")]


def test_a_truncated_gzip_is_named() -> None:
    whole = gzip.compress(b"x,y\n" + b"1,2\n" * 100_000)
    with pytest.raises(SourceError, match=r"^b\.csv\.gz ends in the middle of its gzip stream"):
        read({"a": b"x,y\n", "b.csv.gz": whole[:-10]}, [])


# --- laws -------------------------------------------------------------------------------------------

_values = st.text(st.sampled_from('ab",\n\r é'), max_size=6)
_tables = st.lists(st.tuples(_values, _values, _values), max_size=12)


def written(table: Sequence[Sequence[str]], end: str) -> bytes:
    text = io.StringIO(newline="")
    # The csv module leaves a lone carriage return without quotes, where it would end a row.
    lone = any("\r" in value for row in table for value in row)
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL).writerows(
        [("x", "y", "z"), *table]
    )
    return text.getvalue().encode()


@given(_tables, st.sampled_from(["\n", "\r\n"]), st.integers(1, 5), st.integers(1, 40))
def test_what_the_csv_module_writes_is_read_back(
    table: list[tuple[str, str, str]], end: str, batch_rows: int, batch_bytes: int
) -> None:
    data = written(table, end)
    expected = [("a", *row) for row in table]
    assert good(data) == expected
    assert good(data, batch_rows=batch_rows, batch_bytes=batch_bytes) == expected


@given(st.lists(st.sampled_from(['"', ",", "\n", "a", "\r\n"]), max_size=30).map("".join), st.data())
@example('a""b"\n"c\nd"\n', st.data())
def test_where_records_end_does_not_depend_on_the_blocks(text: str, data: st.DataObject) -> None:
    whole = np.frombuffer(text.encode(), np.uint8)
    finder = QuotedRecords()
    expected = finder.ends(whole).tolist()
    for cut in range(1, len(whole)):
        parts = QuotedRecords()
        found = [*parts.ends(whole[:cut]).tolist(), *(parts.ends(whole[cut:]) + cut).tolist()]
        assert found == expected
        assert parts.is_open == finder.is_open


@given(st.lists(st.sampled_from(['"', '""', ",", "\n", "a", "\r\n", '"a\nb"', "5"]), max_size=30).map("".join))
def test_records_end_where_arrow_ends_rows(text: str) -> None:
    finder = QuotedRecords()
    raw = text.encode() + b"\n"
    ends = finder.ends(np.frombuffer(raw, np.uint8)).tolist()
    if finder.is_open:
        return
    records = [raw[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    by_width: dict[int, list[bytes]] = {}
    for record in records:
        if record.strip(b"\r\n"):
            table = by_arrow(record)
            assert table.num_rows == 1
            by_width.setdefault(table.num_columns, []).append(record)
    for same in by_width.values():
        joined = by_arrow(b"".join(same)).to_pylist()
        assert joined == [by_arrow(record).to_pylist()[0] for record in same]


def by_arrow(raw: bytes) -> pa.Table:
    return pacsv.read_csv(
        pa.BufferReader(raw),
        read_options=pacsv.ReadOptions(autogenerate_column_names=True, block_size=len(raw) + 1),
        parse_options=pacsv.ParseOptions(newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(column_types={f"f{i}": pa.string() for i in range(32)}),
    )


_odd_lines = st.lists(
    st.sampled_from(
        [b"1,a", b"2,", b",x", b"bad", b"3,b,c", b"4,\xff", b'5,"q"', b'6,"open', b"", b"7,\rx", b'"8","9"']
    ),
    max_size=12,
)


@given(_odd_lines, st.integers(1, 40), st.integers(1, 4))
def test_rows_that_are_lines_are_the_same_however_they_are_cut(
    lines: list[bytes], chunk_bytes: int, batch_rows: int
) -> None:
    data = b"\n".join([b"i,s", *lines])
    columns = {"i": "int64", "s": "string"}
    rejects: tuple[list[Quarantined], list[Quarantined], list[Quarantined]] = ([], [], [])
    whole = rows(read(data, rejects[0], columns, multiline=False))
    assert rows(read(data, rejects[1], columns, chunk_bytes, multiline=False)) == whole
    assert rows(read(data, rejects[2], columns, multiline=False, batch_rows=batch_rows)) == whole
    assert rejects[0] == rejects[1] == rejects[2]
    assert len(whole) + len(rejects[0]) == sum(map(bool, lines))
