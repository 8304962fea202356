from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import Nondeterministic, SpecError, TransformError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import SqlTransform
from millrace.pipeline.process import Chain, ProcessContext
from millrace.pipeline.process.repeat import difference
from millrace.pipeline.records import Records

CHUNK = Chunk(0, 0, (SourceObject("a.txt", 10, "v"), SourceObject("b.txt", 10, "v")), 0, 20)


def context(rejected: list[Quarantined] | None = None) -> ProcessContext:
    bad: list[Quarantined] = [] if rejected is None else rejected
    return ProcessContext(CHUNK, "row", bad.append, lambda name, seconds: nullcontext())


def records(batch: pa.RecordBatch, cuts: Sequence[int] = ()) -> Iterator[Records]:
    bounds = sorted({0, batch.num_rows, *(c for c in cuts if 0 < c < batch.num_rows)})
    for start, end in itertools.pairwise(bounds):
        positions = np.arange(start, end, dtype=np.int64)
        yield Records(batch.slice(start, end - start), (positions % 2).astype(np.int32), positions)


def chain(sql: str, schema: pa.Schema) -> Chain:
    return Chain.build([SqlTransform(sql=sql)], base=Path(), schema=schema)


def run(sql: str, batch: pa.RecordBatch, rejected: list[Quarantined] | None = None, cuts: Sequence[int] = ()) -> Any:
    ready = chain(sql, batch.schema)
    batches = list(ready.run(records(batch, cuts), context(rejected)))
    for found in batches:
        assert found.schema.equals(ready.schema, check_metadata=True)
        assert found.num_rows
        found.validate(full=True)
    return pa.Table.from_batches(batches, ready.schema)


PEOPLE = pa.RecordBatch.from_pydict(
    {
        "path": [f"f{i}" for i in range(6)],
        "text": ["12", "x", "", None, "7", "100"],
        "n": [1, 2, 3, 4, None, 6],
        "tags": [["a", "b"], [], None, ["c"], ["d", None], ["e"]],
    }
)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT count(*) FROM records", "the aggregate count_star()"),
        ("SELECT sum(n) FROM records", "the aggregate sum()"),
        ("SELECT string_agg(text, ',') FROM records", "the aggregate string_agg()"),
        ("SELECT json_group_array(text) FROM records", "the aggregate string_agg()"),
        ("SELECT DISTINCT text FROM records", "DISTINCT"),
        ("SELECT DISTINCT ON (n) text FROM records", "DISTINCT"),
        ("SELECT text FROM records GROUP BY text", "GROUP BY"),
        ("SELECT text FROM records GROUP BY ALL", "GROUP BY"),
        ("SELECT text FROM records HAVING n > 1", "HAVING"),
        ("SELECT text FROM records ORDER BY n", "ORDER BY"),
        ("SELECT text FROM records LIMIT 3", "LIMIT"),
        ("SELECT text FROM records LIMIT 10%", "LIMIT"),
        ("SELECT text FROM records OFFSET 3", "OFFSET"),
        ("SELECT text FROM records USING SAMPLE 3", "SAMPLE"),
        ("SELECT text FROM records TABLESAMPLE 10%", "SAMPLE"),
        ("SELECT row_number() OVER () FROM records", "window function"),
        ("SELECT sum(n) OVER (ORDER BY n) FROM records", "window function"),
        ("SELECT text FROM records QUALIFY n > 1", "QUALIFY"),
        ("SELECT a.text FROM records a, records b", "a join"),
        ("SELECT a.text FROM records a JOIN records b USING (n)", "a join"),
        ("SELECT text FROM records UNION ALL SELECT text FROM records", "UNION"),
        ("SELECT text FROM records EXCEPT SELECT text FROM records", "UNION, INTERSECT or EXCEPT"),
        ("SELECT (SELECT max(n) FROM records) FROM records", "a subquery"),
        ("SELECT text FROM records WHERE n IN (SELECT n FROM records)", "a subquery"),
        ("SELECT text FROM records WHERE EXISTS (SELECT 1)", "a subquery"),
        ("SELECT text FROM (SELECT text FROM records)", "a subquery"),
        ("WITH t AS (SELECT text FROM records) SELECT text FROM t", "WITH"),
        ("VALUES (1)", "VALUES"),
        ("SELECT * FROM read_csv('x.csv')", "the table function read_csv"),
        ("SELECT * FROM range(3)", "the table function range"),
        ("SELECT * FROM 'x.parquet'", "there is no table 'x.parquet'"),
        ("SELECT text FROM other", "there is no table 'other'"),
        ("SELECT text FROM main.records", "there is no table"),
        ("SELECT 1", "the table records"),
        ("SELECT random() FROM records", "random() can't be used"),
        ("SELECT uuid() FROM records", "uuid() can't be used"),
        ("SELECT now() FROM records", "now() can't be used"),
        ("SELECT today() FROM records", "today() can't be used"),
        ("SELECT current_date FROM records", "current_date can't be used"),
        ("SELECT current_timestamp FROM records", "current_timestamp can't be used"),
        ("SELECT localtimestamp FROM records", "localtimestamp can't be used"),
        ("SELECT current_localtimestamp() FROM records", "current_localtimestamp() can't be used"),
        ("SELECT nextval('s') FROM records", "nextval() can't be used"),
        ("SELECT current_setting('threads') FROM records", "current_setting() can't be used"),
        ("SELECT getvariable('x') FROM records", "getvariable() can't be used"),
        ("SELECT vector_type(n) FROM records", "vector_type() can't be used"),
        ("SELECT age(TIMESTAMP '2000-01-01') FROM records", "age() can't be used"),
        ("SELECT ago(INTERVAL 1 DAY) FROM records", "ago"),
        ("SELECT pg_sleep(1) FROM records", "sleep"),
        ("SELECT version() FROM records", "version() can't be used"),
        ("SELECT rowid FROM records", "rowid"),
        ("SELECT records FROM records", "is the table, not a column"),
        ("SELECT r FROM records r", "is the table, not a column"),
        ("SELECT a FROM records AS r(a, b)", "can't be renamed in FROM"),
        ("SELECT #1 FROM records", "positional reference"),
        ("SELECT ? FROM records", "parameter"),
        ("SELECT text FROM records; SELECT text FROM records", "2 statements"),
        ("DESCRIBE records", "DESCRIBE"),
        ("DELETE FROM records", "only one SELECT"),
        ("COPY records TO 'x.csv'", "only one SELECT"),
        ("INSTALL httpfs", "only one SELECT"),
        ("SET threads = 4", "only one SELECT"),
        ("SELEC text FROM records", "this is not SQL"),
        ("SELECT nope FROM records", "there is no column 'nope'; there are path, text, n, tags"),
        ("SELECT lenght(text) FROM records", "lenght"),
        ("SELECT text, upper(text) AS text FROM records", "two output columns are called 'text'"),
        ("SELECT regexp_matches(text, '(') FROM records", "missing )"),
    ],
)
def test_refusals_name_the_field_and_the_thing(sql: str, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        chain(sql, PEOPLE.schema)
    assert str(caught.value).startswith("transforms.0.sql: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM records",
        "FROM records",
        "FROM records WHERE length(text) > 1",
        "SELECT path, text FROM records WHERE length(text) > 1 -- a comment",
        "SELECT TEXT, r.path FROM records AS r",
        "SELECT text, path FROM records",
        "SELECT * EXCLUDE (tags) FROM records",
        "SELECT * REPLACE (upper(text) AS text) FROM records WHERE n > 1",
        "SELECT * EXCLUDE (path) REPLACE (n + 1 AS n) FROM records",
        "SELECT * RENAME (n AS m) FROM records",
        "SELECT *, length(text) AS len FROM records",
        "SELECT upper(text), 'a''b', 1.5, tags[1], tags[1:2] FROM records",
        "SELECT text AS t, length(t) AS k FROM records WHERE k > 1 AND t <> 'x'",
        "SELECT path, unnest(tags) AS tag FROM records",
        "SELECT unnest(tags) AS tag, unnest([1, 2, 3]) AS i, path FROM records WHERE n > 1",
        "SELECT COLUMNS('t.*') FROM records",
        "SELECT COLUMNS(*) FROM records",
        "SELECT * LIKE 't%' FROM records",
        "SELECT struct_pack(*COLUMNS(*)) AS everything, path FROM records",
        "SELECT CASE WHEN n > 2 THEN 'big' ELSE text END AS size, n BETWEEN 2 AND 4 FROM records",
        "SELECT TRY_CAST(text AS INTEGER) AS i, text::VARCHAR, n::DECIMAL(10, 2) AS d FROM records",
        "SELECT list_transform(tags, lambda x: x || '!') AS loud, [t FOR t IN tags IF t > 'a'] AS some FROM records",
        "SELECT {'a': n, 'b': text} AS s, MAP {'k': n} AS m, tags.len() AS k FROM records",
        "SELECT n FROM records WHERE text IN ('x', '7') OR text IS NULL",
        "SELECT list_sum([n, 1]) AS s, list_aggregate(tags, 'string_agg', '-') AS j FROM records",
        "SELECT DATE '2020-01-01' + n::INTEGER AS day, INTERVAL 3 DAY AS i FROM records",
        "SELECT text COLLATE NOCASE < 'Y' AS c FROM records",
        "SELECT trim(BOTH '1' FROM text) AS t, extract(year FROM DATE '2020-01-01') AS y FROM records",
        "SELECT NULL AS nothing FROM records",
        "SELECT text SIMILAR TO '1.*' AS s, text ~ '^1' AS r, text GLOB '1*' AS g FROM records",
        "SELECT TRY(text::INTEGER) AS i, coalesce(text, 'none') AS c, nullif(n, 2) AS z FROM records",
    ],
)
def test_what_is_allowed_gives_what_duckdb_gives(sql: str) -> None:
    with duckdb.connect(config={"threads": 1}) as connection:
        connection.register("records", PEOPLE)
        expected = connection.sql(sql).to_arrow_table()
    for cuts in ((), (1, 4)):
        found = run(sql, PEOPLE, cuts=cuts)
        assert found.schema.names == expected.schema.names
        assert found.to_pylist() == expected.to_pylist()


def test_a_column_called_like_a_clock_is_a_column() -> None:
    batch = pa.RecordBatch.from_pydict({"current_date": [1, 2], "rowid": [5, 6], "records": [7, 8]})
    assert run("SELECT current_date, rowid, records FROM records", batch).to_pylist() == batch.to_pylist()


def test_every_type_passes_through_unchanged() -> None:
    kinds: dict[pa.DataType, Any] = {
        pa.float16(): np.float16(1.5),
        pa.decimal256(50, 2): 3,
        pa.duration("us"): 5,
        pa.timestamp("s", "Europe/Paris"): 7,
        pa.timestamp("ns"): 8,
        pa.time32("s"): 9,
        pa.date64(): 86_400_000,
        pa.binary(4): b"abcd",
        pa.list_(pa.uint16(), 2): [1, 2],
        pa.list_(pa.float16()): [np.float16(2)],
        pa.map_(pa.string(), pa.int8()): [("k", 1)],
        pa.struct([pa.field("a", pa.float16())]): {"a": np.float16(1)},
        pa.null(): None,
    }
    arrays = [pa.array([value, None], kind) for kind, value in kinds.items()]
    batch = pa.RecordBatch.from_arrays([pa.array(["x", "y"]), *arrays], names=["path", *(f"c{i}" for i in range(13))])
    for sql in ("SELECT * FROM records WHERE path = 'x'", "SELECT * REPLACE (lower(path) AS path) FROM records"):
        found = run(sql, batch)
        assert found.schema == batch.schema
        assert found.slice(0, 1).to_batches()[0].equals(batch.slice(0, 1))
    with pytest.raises(SpecError, match=r"can't read column 'c0' of type halffloat; it can only pass through"):
        chain("SELECT c0 + 1 AS x FROM records", batch.schema)
    with pytest.raises(SpecError, match=r"can't read column 'c.*' of type .*; name the columns you need"):
        chain("SELECT COLUMNS('c.*') FROM records", batch.schema)


def test_columns_that_pass_through_unfiltered_are_shared() -> None:
    ready = chain("SELECT path, text, length(text) AS k FROM records", PEOPLE.schema)
    [found] = list(ready.run(records(PEOPLE), context()))
    assert found.column("text").buffers()[2].address == PEOPLE.column("text").buffers()[2].address


def test_computed_columns_have_plain_types() -> None:
    found = run(
        "SELECT 'a'::ENUM('a', 'b') AS e, '{}'::JSON AS j, [1] AS l, n::HUGEINT AS h, TIMESTAMPTZ '2000-01-01' AS t "
        "FROM records",
        PEOPLE,
    )
    assert [str(f.type) for f in found.schema] == [
        "string",
        "string",
        "list<item: int32>",
        "decimal128(38, 0)",
        "timestamp[us, tz=UTC]",
    ]


def test_records_that_fail_are_set_aside_with_where_they_came_from() -> None:
    rejected: list[Quarantined] = []
    found = run("SELECT path, text::INTEGER AS i FROM records", PEOPLE, rejected)
    assert found["i"].to_pylist() == [12, None, 7, 100]
    assert [(q.path, q.position, q.stage, q.rule) for q in rejected] == [
        ("b.txt", "row 1", "process", "sql: SELECT path, text::INTEGER AS i FROM records"),
        ("a.txt", "row 2", "process", "sql: SELECT path, text::INTEGER AS i FROM records"),
    ]
    assert "Could not convert string 'x' to INT32" in rejected[0].reason


def test_origins_follow_rows_through_filters_and_unnest() -> None:
    rejected: list[Quarantined] = []
    steps = [
        SqlTransform(sql="SELECT unnest(tags) AS tag, path FROM records WHERE n > 1"),
        SqlTransform(sql="SELECT CASE WHEN tag = 'e' THEN tag::INTEGER ELSE 1 END AS i FROM records"),
    ]
    ready = Chain.build(steps, base=Path(), schema=PEOPLE.schema)
    assert sum(b.num_rows for b in ready.run(records(PEOPLE), context(rejected))) == 1
    assert [(q.path, q.position) for q in rejected] == [("b.txt", "row 5")]


def test_rows_that_cannot_be_followed_are_found_by_their_path() -> None:
    rejected: list[Quarantined] = []
    batch = pa.RecordBatch.from_pydict({"path": ["a.txt", "b.txt"], "text": ["1", "x"]})
    steps = [
        SqlTransform(sql="SELECT COLUMNS('path|text') FROM records"),
        SqlTransform(sql="SELECT text::INTEGER AS i FROM records"),
    ]
    ready = Chain.build(steps, base=Path(), schema=batch.schema)
    assert sum(b.num_rows for b in ready.run(records(batch), context(rejected))) == 1
    assert [(q.path, q.position) for q in rejected] == [("b.txt", "")]


def test_the_hidden_row_number_gets_out_of_the_way() -> None:
    batch = pa.RecordBatch.from_pydict({"__row": [3, 1], "__ROW_": ["x", "y"]})
    assert run('SELECT * FROM records WHERE "__row" > 1', batch).to_pylist() == [{"__row": 3, "__ROW_": "x"}]


def test_unnest_of_long_records_comes_out_in_bounded_batches() -> None:
    batch = pa.RecordBatch.from_pydict({"path": ["p"], "text": ["x" * 1_000_000], "n": [100]})
    ready = chain("SELECT text, unnest(range(n)) AS i FROM records", batch.schema)
    found = list(ready.run(records(batch), context()))
    assert sum(b.num_rows for b in found) == 100
    assert max(b.nbytes for b in found) < 40_000_000


def test_sql_after_an_unknown_schema_is_checked_at_the_first_batch() -> None:
    step = Chain.build([SqlTransform(sql="SELECT text FROM records")], base=Path(), schema=PEOPLE.schema)
    other = pa.RecordBatch.from_pydict({"words": ["a"]})
    with pytest.raises(TransformError, match=r"transforms\.0\.sql: there is no column 'text'; there are words"):
        list(step.run(records(other), context()))


def test_every_query_runs_under_the_deadline() -> None:
    entered: list[tuple[str, float]] = []

    @contextmanager
    def deadline(name: str, seconds: float) -> Iterator[None]:
        entered.append((name, seconds))
        yield

    ready = Chain.build(
        [SqlTransform(sql="SELECT text FROM records WHERE n > 1", timeout=7)], base=Path(), schema=PEOPLE.schema
    )
    ctx = ProcessContext(CHUNK, "row", lambda q: None, deadline, sample_every=2)
    list(ready.run(records(PEOPLE, (2, 4)), ctx))
    # batches 0 and 2 run twice
    assert entered == [("sql: SELECT text FROM records WHERE n > 1", 7.0)] * 5


LAW_SCHEMA = pa.schema([("text", pa.string()), ("n", pa.int64()), ("l", pa.list_(pa.int64()))])
LAW_QUERIES = (
    "SELECT text, n + 1 AS m, unnest(l) AS i FROM records WHERE length(text) > 1 OR n > 0",
    "SELECT *, text::INTEGER AS t FROM records WHERE n <> 0",
)


@pytest.fixture(scope="module")
def law_chains() -> list[Chain]:
    return [chain(sql, LAW_SCHEMA) for sql in LAW_QUERIES]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=6), st.none() | st.integers(-5, 5), st.lists(st.integers(0, 3), max_size=3)),
        max_size=12,
    ),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_sql_does_not_depend_on_how_records_are_batched(
    law_chains: list[Chain], rows: list[tuple[str, int | None, list[int]]], cuts: list[int]
) -> None:
    batch = pa.RecordBatch.from_pylist([{"text": t, "n": n, "l": items} for t, n, items in rows], LAW_SCHEMA)
    for ready in law_chains:
        whole: list[Quarantined] = []
        parts: list[Quarantined] = []
        one = pa.Table.from_batches(ready.run(records(batch), context(whole)), ready.schema)
        many = pa.Table.from_batches(ready.run(records(batch, cuts), context(parts)), ready.schema)
        assert one == many
        assert whole == parts


def test_difference_is_by_bits() -> None:
    def batch(**columns: Any) -> pa.RecordBatch:
        return pa.RecordBatch.from_pydict(columns)

    nan = float("nan")
    assert difference(batch(a=[1.0, nan], b=[[nan], None]), batch(a=[1.0, nan], b=[[nan], None])) is None
    assert difference(batch(a=[0.0]), batch(a=[-0.0])) == "column 'a', row 0"
    assert difference(batch(a=["x"] * 9 + ["y"]), batch(a=["x"] * 10)) == "column 'a', row 9"
    assert difference(batch(a=[[1], [2]]), batch(a=[[1], [3]])) == "column 'a', row 1"
    assert difference(batch(a=[1]), batch(a=[1, 2])) == "there are 1 rows once and 2 the next time"
    assert difference(batch(a=[1]), batch(a=["1"])) == "column 'a' is int64 once and string the next time"
    assert difference(batch(a=[1]), batch(b=[1])) == "the columns are a once and b the next time"
    assert issubclass(Nondeterministic, TransformError)
