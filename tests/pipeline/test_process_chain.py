from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import SpecError, TransformError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Dedup, SqlTransform, Tokenize, Transform, Validate
from millrace.pipeline.process import (
    Chain,
    ProcessContext,
    count_barriers,
    decode_losers,
    encode_losers,
    encode_survey,
    merge_losers,
    resolve,
    survey_partition,
)
from millrace.pipeline.records import Records

SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("n", pa.int64())])
Row = tuple[str | None, int | None]


def transforms(*specs: dict[str, Any]) -> list[Transform]:
    kinds: dict[str, Any] = {"sql": SqlTransform, "validate": Validate, "tokenize": Tokenize, "dedup": Dedup}
    return [kinds[next(iter(spec))].model_validate(spec) for spec in specs]


def build(*specs: dict[str, Any], schema: pa.Schema = SCHEMA) -> Chain:
    return Chain.build(transforms(*specs), base=Path(), schema=schema)


def chunk(index: int) -> Chunk:
    return Chunk(index, 0, (SourceObject(f"{index}.txt", 10, "v"),), 0, 10)


def records(index: int, rows: Sequence[Row], cuts: Sequence[int] = ()) -> Iterator[Records]:
    batch = pa.RecordBatch.from_pylist([{"path": f"{index}.txt", "text": t, "n": n} for t, n in rows], SCHEMA)
    bounds = sorted({0, len(rows), *(c for c in cuts if c < len(rows))})
    for start, end in itertools.pairwise(bounds):
        positions = np.arange(start, end, dtype=np.int64)
        yield Records(batch.slice(start, end - start), np.zeros(end - start, np.int32), positions)


def context(
    index: int, losers: Sequence[npt.NDArray[np.int64]] = (), rejected: list[Quarantined] | None = None
) -> ProcessContext:
    bad: list[Quarantined] = [] if rejected is None else rejected
    return ProcessContext(chunk(index), "row", bad.append, lambda n, s: nullcontext(), losers)


class Outcome:
    """What a whole run gives: output rows by chunk, rejects and counts."""

    def __init__(
        self, chain: Chain, chunks: Sequence[Sequence[Row]], cuts: Sequence[int] = (), partitions: int = 3
    ) -> None:
        losers: list[list[npt.NDArray[np.int64]]] = [[] for _ in chunks]
        for barrier in range(chain.barriers):
            surveys = []
            for i, rows in enumerate(chunks):
                keys = chain.survey(records(i, rows, cuts), context(i, losers[i]), barrier)
                surveys.append(b"".join(encode_survey(i, partitions, keys)))
            parts = [
                b"".join(encode_losers(resolve(survey_partition(s, p) for s in surveys))) for p in range(partitions)
            ]
            for i in range(len(chunks)):
                losers[i].append(merge_losers([decode_losers(part, i) for part in parts]))
        self.rows: list[list[dict[str, Any]]] = []
        self.rejected: list[Quarantined] = []
        self.duplicates = 0
        for i, rows in enumerate(chunks):
            ctx = context(i, losers[i], self.rejected)
            self.rows.append([r for b in chain.run(records(i, rows, cuts), ctx) for r in b.to_pylist()])
            self.duplicates += ctx.counts.duplicates
        self.rejected.sort(key=repr)


def test_no_transforms_gives_plain_batches() -> None:
    schema = pa.schema(
        [("d", pa.dictionary(pa.int8(), pa.string())), ("v", pa.string_view()), ("s", pa.struct([("u", pa.uuid())]))],
        metadata={"k": "v"},
    )
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"x" * 16, None], pa.binary(16)))
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array(["a", "b"]).dictionary_encode().cast(schema.field("d").type),
            pa.array(["c", None], pa.string_view()),
            pa.StructArray.from_arrays([uuids], fields=list(schema.field("s").type), mask=pa.array([False, True])),
        ],
        schema=schema,
    )
    chain = build(schema=schema)
    item = Records(batch, np.zeros(2, np.int32), np.arange(2))
    [found] = chain.run(iter([item, Records(batch.slice(0, 0), item.objects[:0], item.positions[:0])]), context(0))
    assert found.schema.equals(chain.schema, check_metadata=True)
    assert [str(t) for t in found.schema.types] == ["string", "string", "struct<u: fixed_size_binary[16]>"]
    assert found.to_pylist() == [{"d": "a", "v": "c", "s": {"u": b"x" * 16}}, {"d": "b", "v": None, "s": None}]


def test_nested_types_come_in_plain_whatever_their_slices() -> None:
    kind = pa.large_list(pa.field("element", pa.dictionary(pa.int32(), pa.large_string())))
    values = [["a", "b"], None, [], ["b", None], ["c"]]
    inner = pa.array(["a", "b", "b", None, "c"], pa.large_string()).dictionary_encode()
    array = pa.LargeListArray.from_arrays(pa.array([0, None, 2, 2, 4, 5], pa.int64()), inner, type=kind)
    assert array.to_pylist() == values
    chain = build(schema=pa.schema([("l", kind)]))
    assert str(chain.schema) == "l: list<item: string>\n  child 0, item: string"
    for start in range(5):
        part = pa.RecordBatch.from_arrays([array.slice(start)], schema=pa.schema([("l", kind)]))
        item = Records(part, np.zeros(5 - start, np.int32), np.arange(5 - start))
        [found] = chain.run(iter([item]), context(0))
        assert found.column(0).to_pylist() == values[start:]
        found.validate(full=True)


def test_the_schema_is_known_through_the_chain() -> None:
    chain = build(
        {"sql": "SELECT path, upper(text) AS loud FROM records"},
        {"validate": {"required": ["loud"]}},
        {"dedup": ["loud"]},
        {"tokenize": {"column": "loud", "tokenizer": "bytes", "pack": 4}},
    )
    assert chain.schema is not None
    assert chain.schema.names == ["tokens"]
    with pytest.raises(SpecError, match=r"transforms\.1\.dedup: there is no column 'text'; there are path, loud"):
        build({"sql": "SELECT path, upper(text) AS loud FROM records"}, {"dedup": ["text"]})


def test_barriers_are_counted_by_the_spec_alone() -> None:
    specs = transforms(
        {"dedup": ["text"]},
        {"validate": {"required": ["text"]}},
        {"validate": {"unique": ["path"], "rules": ["n > 0"]}},
        {"sql": "FROM records"},
        {"dedup": ["n"]},
    )
    assert count_barriers(specs) == Chain.build(specs, base=Path(), schema=SCHEMA).barriers == 3


def test_dedup_drops_and_counts_and_unique_sets_aside() -> None:
    chunks: list[list[Row]] = [[("a", 1), ("b", 1), ("a", 2)], [("b", 3), ("c", 1), (None, 5), (None, 6)]]
    dropped = Outcome(build({"dedup": ["text"]}), chunks)
    assert [[r["text"] for r in rows] for rows in dropped.rows] == [["a", "b"], ["c", None]]
    assert (dropped.duplicates, dropped.rejected) == (3, [])
    aside = Outcome(build({"validate": {"unique": ["text"]}}), chunks)
    assert aside.rows == dropped.rows
    assert [(q.path, q.position, q.rule) for q in aside.rejected] == [
        ("0.txt", "row 2", "unique: text"),
        ("1.txt", "row 0", "unique: text"),
        ("1.txt", "row 3", "unique: text"),
    ]
    assert aside.rejected[0].reason == "the same text appears earlier in the dataset"


def test_a_pass_that_gives_fewer_rows_than_its_survey_is_found_out() -> None:
    chain = build({"dedup": ["text"]})
    with pytest.raises(
        TransformError, match=r"dedup: text: the survey of this chunk saw row 7 and this pass has only 1"
    ):
        list(chain.run(records(0, [("a", 1)]), context(0, [np.array([7])])))


def test_losers_are_needed() -> None:
    with pytest.raises(ValueError, match="1 key barriers need as many lists of losers, and there are 0"):
        list(build({"dedup": ["text"]}).run(records(0, [("a", 1)]), context(0)))


def test_a_chain_can_be_run_and_left_again() -> None:
    chain = build({"sql": "SELECT text FROM records"})
    stream = chain.run(records(0, [("a", 1), ("b", 2)], [1]), context(0))
    assert next(stream).to_pylist() == [{"text": "a"}]
    del stream
    assert [b.num_rows for b in chain.run(records(0, [("a", 1)]), context(0))] == [1]
    chain.close()


@pytest.fixture(scope="module")
def law_chain() -> Chain:
    return build(
        {"sql": "SELECT path, text, n FROM records WHERE n IS NULL OR n > 0"},
        {"dedup": ["text"]},
        {"validate": {"required": ["text"], "unique": ["n"], "rules": ["text <> 'no'"]}},
        {"tokenize": {"column": "text", "tokenizer": "bytes", "pack": 5}},
    )


def plainly(chunks: Sequence[Sequence[Row]]) -> tuple[list[list[str]], int, int]:
    """The law chain as one loop over everything: texts kept by chunk, duplicates, quarantined."""
    texts: set[str | None] = set()
    numbers: set[int | None] = set()
    kept: list[list[str]] = []
    duplicates = quarantined = 0
    for rows in chunks:
        kept.append([])
        for text, n in rows:
            if n is not None and n <= 0:
                continue
            if text in texts:
                duplicates += 1
                continue
            texts.add(text)
            if not text or text == "no" or n in numbers:
                quarantined += 1
                continue
            numbers.add(n)
            kept[-1].append(text)
    return kept, duplicates, quarantined


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from([None, "", "no", "a", "b", "long text", "é"]), st.none() | st.integers(-1, 4)),
            max_size=8,
        ),
        max_size=3,
    ),
    st.lists(st.integers(0, 8), max_size=3),
    st.integers(1, 4),
)
def test_the_whole_is_what_one_loop_gives_however_batched_and_partitioned(
    law_chain: Chain, chunks: list[list[Row]], cuts: list[int], partitions: int
) -> None:
    outcome = Outcome(law_chain, chunks, cuts, partitions)
    kept, duplicates, quarantined = plainly(chunks)
    texts = []
    for rows in outcome.rows:
        flat = [t for row in rows for t in row["tokens"] if t != 257]
        parts = bytes(t if t != 256 else 255 for t in flat).split(b"\xff")[:-1]
        texts.append([p.decode() for p in parts])
    assert texts == kept
    assert (outcome.duplicates, len(outcome.rejected)) == (duplicates, quarantined)
