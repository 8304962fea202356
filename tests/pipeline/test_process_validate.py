from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SpecError, TransformError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Validate
from millrace.pipeline.process import Chain, ProcessContext
from millrace.pipeline.records import Records

CHUNK = Chunk(0, 0, (SourceObject("a.txt", 10, "v"),), 0, 10)
SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("n", pa.int64()), ("raw", pa.binary())])


def build(schema: pa.Schema = SCHEMA, **rules: Any) -> Chain:
    return Chain.build([Validate.model_validate({"validate": rules})], base=Path(), schema=schema)


def run(
    chain: Chain, batch: pa.RecordBatch, cuts: Sequence[int] = (), losers: Sequence[Any] = ()
) -> tuple[list[dict[str, Any]], list[Quarantined]]:
    rejected: list[Quarantined] = []
    bounds = sorted({0, batch.num_rows, *(c for c in cuts if c < batch.num_rows)})

    def records() -> Iterator[Records]:
        for start, end in itertools.pairwise(bounds):
            positions = np.arange(start, end, dtype=np.int64)
            yield Records(batch.slice(start, end - start), np.zeros(end - start, np.int32), positions)

    context = ProcessContext(CHUNK, "line at byte", rejected.append, lambda n, s: nullcontext(), losers)
    kept = [row for b in chain.run(records(), context) for row in b.to_pylist()]
    assert context.counts.quarantined == len(rejected)
    assert context.counts.rows_in == batch.num_rows == len(kept) + len(rejected)
    return kept, rejected


def rows(*values: tuple[str | None, int | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [{"path": f"p{i}", "text": t, "n": n, "raw": b"x"} for i, (t, n) in enumerate(values)], SCHEMA
    )


def broken(rejected: list[Quarantined]) -> list[tuple[str, str, str]]:
    return [(q.position.removeprefix("line at byte "), q.rule, q.reason) for q in rejected]


def test_required_columns_are_neither_null_nor_empty() -> None:
    batch = pa.RecordBatch.from_pylist(
        [
            {"path": "p", "text": "a", "n": 0, "raw": b"x"},
            {"path": "p", "text": "", "n": 0, "raw": b"x"},
            {"path": "p", "text": None, "n": 0, "raw": None},
            {"path": "p", "text": "a", "n": None, "raw": b"x"},
            {"path": "p", "text": "a", "n": 0, "raw": b""},
        ],
        SCHEMA,
    )
    kept, rejected = run(build(required=["text", "n", "raw"]), batch)
    assert len(kept) == 1
    assert sorted(broken(rejected)) == [
        ("1", "required: text", "text is empty"),
        ("2", "required: text", "text is null"),
        ("3", "required: n", "n is null"),
        ("4", "required: raw", "raw is empty"),
    ]
    assert {q.stage for q in rejected} == {"process"}


def test_rules_are_kept_when_true_and_null_is_not() -> None:
    kept, rejected = run(
        build(rules=["n > 1", "length(text) < 3"]), rows(("a", 2), ("abc", 2), ("abc", 1), ("a", None))
    )
    assert [r["path"] for r in kept] == ["p0"]
    assert sorted(broken(rejected)) == [
        ("1", "length(text) < 3", "it is false for this record"),
        ("2", "n > 1", "it is false for this record"),
        ("3", "n > 1", "it is null for this record"),
    ]


def test_a_rule_that_fails_on_a_record_sets_it_aside_under_that_rule() -> None:
    chain = build(required=["text"], rules=["n > 0", "text::INTEGER > 5 -- as a number", "length(text) < 3"])
    kept, rejected = run(chain, rows(("7", 1), ("x", 1), ("x", 0), ("333", 1), ("", 1), ("1", 1)))
    assert [r["path"] for r in kept] == ["p0"]
    found = sorted(broken(rejected))
    assert [(at, rule) for at, rule, _ in found] == [
        ("1", "text::INTEGER > 5 -- as a number"),
        ("2", "n > 0"),
        ("3", "length(text) < 3"),
        ("4", "required: text"),
        ("5", "text::INTEGER > 5 -- as a number"),
    ]
    assert "Could not convert string 'x' to INT32" in found[0][2]


def test_unique_sets_aside_what_the_survey_found() -> None:
    chain = build(required=["text"], unique=["text", "n"])
    assert chain.barriers == 1
    # Ordinals are of the rows that arrive: the empty text never does.
    kept, rejected = run(chain, rows(("a", 1), ("", 2), ("b", 1), ("a", 1)), losers=[np.array([2])])
    assert [r["path"] for r in kept] == ["p0", "p2"]
    assert sorted(broken(rejected)) == [
        ("1", "required: text", "text is empty"),
        ("3", "unique: text, n", "the same text, n appears earlier in the dataset"),
    ]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"required": ["txt"]}, "validate.required: there is no column 'txt'; there are path, text, n, raw, h"),
        ({"unique": ["txt"]}, "validate.unique: there is no column 'txt'; there are path, text, n, raw, h"),
        ({"rules": ["txt > 1"]}, "validate.rules.0: there is no column 'txt'; there are path, text, n, raw, h"),
        ({"rules": ["n > 1", "length(text)"]}, "validate.rules.1: 'length(text)' gives int64, not true or false"),
        ({"rules": ["count(*) > 1"]}, "the aggregate count_star() can't be used"),
        ({"rules": ["random() > 0.5"]}, "random() can't be used"),
        ({"rules": ["n IN (SELECT 1)"]}, "a subquery can't be used"),
        ({"rules": ["n > 1, n < 3"]}, "is not one condition"),
        ({"rules": ["n > 1 AS x"]}, "is not one condition"),
        ({"rules": ["*"]}, "is not one condition"),
        ({"rules": ["unnest([true, false])"]}, "unnest makes several rows"),
        ({"rules": ["n > 1 FROM records WHERE true --"]}, "this is not SQL"),
        ({"rules": ["n > 1) OR (true"]}, "this is not SQL"),
        ({"rules": ["n >"]}, "this is not SQL"),
        ({"rules": ["h > 1"]}, "rules: SQL can't read column 'h' of type halffloat"),
    ],
)
def test_refusals(rules: dict[str, list[str]], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(SCHEMA.append(pa.field("h", pa.float16())), **rules)
    assert str(caught.value).startswith("transforms.0.validate.")
    assert words in str(caught.value)


def test_a_batch_without_the_column_is_an_error_that_names_it() -> None:
    other = pa.RecordBatch.from_pydict({"path": ["p"], "words": ["x"]})
    for rules in ({"required": ["text"]}, {"rules": ["text > 'a'"]}, {"unique": ["text"]}):
        with pytest.raises(TransformError, match="there is no column 'text'; there are path, words"):
            run(build(**rules), other, losers=[np.empty(0, np.int64)])


LAW = {"required": ["text"], "rules": ["n > 0", "text::INTEGER < 50 OR n > 5"]}


@pytest.fixture(scope="module")
def law_chain() -> Chain:
    return build(**LAW)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.none() | st.sampled_from(["", "1", "99", "x"]), st.none() | st.integers(-1, 7)), max_size=15),
    st.lists(st.integers(0, 15), max_size=4),
)
def test_validation_does_not_depend_on_how_records_are_batched(
    law_chain: Chain, values: list[tuple[str | None, int | None]], cuts: list[int]
) -> None:
    batch = rows(*values)
    kept, rejected = run(law_chain, batch)
    kept_again, rejected_again = run(law_chain, batch, cuts)
    assert kept == kept_again
    key = [(int(p), *rest) for p, *rest in broken(rejected)]
    assert sorted(key) == sorted((int(p), *rest) for p, *rest in broken(rejected_again))
