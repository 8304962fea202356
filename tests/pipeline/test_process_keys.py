from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import Corrupt, TransformError
from millrace.pipeline.process import (
    KeyBatch,
    RangedReader,
    decode_losers,
    encode_losers,
    encode_survey,
    merge_losers,
    resolve,
    survey_partition,
)
from millrace.pipeline.process.keys import partition, row_keys
from millrace.pipeline.process.plain import plain_batch

Key = tuple[int, int]


def keys(*columns: pa.Array, start: int = 0) -> list[Key]:
    names = [f"c{i}" for i in range(len(columns))]
    found = row_keys(pa.RecordBatch.from_arrays(list(columns), names=names), names, start)
    assert found.ordinals.tolist() == list(range(start, start + len(columns[0])))
    return list(zip(found.high.tolist(), found.low.tolist(), strict=True))


def key(value: Any, kind: pa.DataType | None = None) -> Key:
    return keys(pa.array([value], kind))[0]


def test_a_key_is_the_first_half_of_a_sha256() -> None:
    digest = hashlib.sha256(b"s" + (3).to_bytes(8, "little") + b"abc").digest()
    assert key("abc") == (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))


DISTINCT: list[tuple[Any, pa.DataType]] = [
    (None, pa.string()),
    ("", pa.string()),
    (b"", pa.binary()),
    ("0", pa.string()),
    (b"0", pa.binary()),
    (0, pa.int64()),
    (0.0, pa.float64()),
    (False, pa.bool_()),
    (2**64 - 1, pa.uint64()),
    (-1, pa.int64()),
    (float("nan"), pa.float64()),
    (dt.date(1970, 1, 1), pa.date32()),
    (dt.time(0), pa.time64("us")),
    (dt.datetime(1970, 1, 1), pa.timestamp("us")),
    (dt.datetime(1970, 1, 1), pa.timestamp("us", "UTC")),
    (dt.timedelta(0), pa.duration("us")),
    (Decimal("0"), pa.decimal128(5, 2)),
    ([], pa.list_(pa.int64())),
    ([None], pa.list_(pa.int64())),
    ([0], pa.list_(pa.int64())),
    ([0, 0], pa.list_(pa.int64())),
    ([[0], [0]], pa.list_(pa.list_(pa.int64()))),
    ([[0, 0]], pa.list_(pa.list_(pa.int64()))),
    ({"a": 0}, pa.struct([("a", pa.int64())])),
    ({"a": None}, pa.struct([("a", pa.int64())])),
    ([], pa.map_(pa.string(), pa.int64())),
    ([("a", 0)], pa.map_(pa.string(), pa.int64())),
    ((1, 2, 3), pa.month_day_nano_interval()),
]


def test_different_values_have_different_keys() -> None:
    found = [key(value, kind) for value, kind in DISTINCT]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "same",
    [
        [(5, pa.int8()), (5, pa.uint16()), (5, pa.int64()), (5, pa.uint64())],
        [(0.0, pa.float64()), (-0.0, pa.float64()), (0.0, pa.float32()), (np.float16(0), pa.float16())],
        [(float("nan"), pa.float64()), (float("nan"), pa.float32())],
        [(None, pa.int8()), (None, pa.string()), (None, pa.null()), (None, pa.list_(pa.int8()))],
        [
            ("a", pa.string()),
            ("a", pa.large_string()),
            ("a", pa.string_view()),
            ("a", pa.dictionary("int32", "string")),
        ],
        [(b"ab", pa.binary()), (b"ab", pa.binary(2)), (b"ab", pa.large_binary())],
        [(dt.datetime(1999, 1, 1), pa.timestamp(unit)) for unit in ("s", "ms", "us", "ns")],
        [(dt.time(1, 2, 3), pa.time32("s")), (dt.time(1, 2, 3), pa.time64("ns"))],
        [(dt.date(1969, 1, 1), pa.date32()), (dt.date(1969, 1, 1), pa.date64())],
        [(Decimal("1.5"), pa.decimal128(5, 1)), (Decimal("1.50"), pa.decimal256(50, 2))],
        [([1, 2], pa.list_(pa.int8())), ([1, 2], pa.list_(pa.int64(), 2)), ([1, 2], pa.large_list(pa.int32()))],
    ],
)
def test_the_same_value_has_the_same_key_in_every_layout(same: list[tuple[Any, pa.DataType]]) -> None:
    found = set()
    for value, kind in same:
        batch = plain_batch(pa.RecordBatch.from_arrays([pa.array([value], kind)], names=["c"]))
        found.add(keys(batch.column(0))[0])
    assert len(found) == 1


def test_columns_do_not_run_into_each_other() -> None:
    a = keys(pa.array(["ab", "a", None, ""]), pa.array(["c", "bc", "", None]))
    assert len(set(a)) == 4


VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "s": (pa.string(), st.none() | st.text(max_size=3)),
    "i": (pa.int32(), st.none() | st.integers(-3, 3)),
    "u": (pa.uint64(), st.none() | st.sampled_from([0, 1, 2**63, 2**64 - 1])),
    "f": (pa.float32(), st.none() | st.sampled_from([0.0, -0.0, 1.5, float("nan")])),
    "l": (pa.list_(pa.string()), st.none() | st.lists(st.none() | st.text(max_size=2), max_size=3)),
    "p": (pa.list_(pa.int8(), 2), st.none() | st.lists(st.none() | st.integers(0, 1), min_size=2, max_size=2)),
    "r": (
        pa.struct([("a", pa.int8()), ("b", pa.list_(pa.int8()))]),
        st.none()
        | st.fixed_dictionaries(
            {"a": st.none() | st.integers(0, 1), "b": st.none() | st.lists(st.integers(0, 1), max_size=2)}
        ),
    ),
}
ROWS = st.lists(st.tuples(*(strategy for _, strategy in VALUES.values())), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.data())
def test_keys_do_not_depend_on_slices(rows: list[tuple[Any, ...]], data: st.DataObject) -> None:
    arrays = [
        pa.array(column, kind) for column, (kind, _) in zip(zip(*rows, strict=True), VALUES.values(), strict=True)
    ]
    start = data.draw(st.integers(0, len(rows) - 1))
    end = data.draw(st.integers(start, len(rows)))
    for chosen in (arrays, *([a] for a in arrays)):
        whole = keys(*chosen)
        assert keys(*(a.slice(start, end - start) for a in chosen)) == whole[start:end]
        alone = [keys(*(pa.array([a[i].as_py()], a.type) for a in chosen))[0] for i in range(len(rows))]
        assert alone == whole


def test_what_has_no_key_is_named() -> None:
    batch = pa.RecordBatch.from_arrays(
        [pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])], names=["odd"]
    )
    with pytest.raises(TransformError, match=r"column 'odd' is sparse_union.* can't be compared"):
        row_keys(batch, ["odd"], 0)
    with pytest.raises(TransformError, match="there is no column 'x'; there are odd"):
        row_keys(batch, ["x"], 0)


# --- surveys ----------------------------------------------------------------------------------------


def batch_of(values: Sequence[int], start: int = 0) -> KeyBatch:
    """Keys whose halves are made up from small numbers, spread over the key space."""
    numbers = np.asarray(values, np.uint64)
    high = (numbers >> np.uint64(1)) * np.uint64(2**61 + 12345)
    low = numbers & np.uint64(1)
    return KeyBatch(high, low, np.arange(start, start + len(values), dtype=np.int64))


def first_wins(chunks: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    seen: set[int] = set()
    losers: dict[int, list[int]] = {}
    for chunk, values in enumerate(chunks):
        for ordinal, value in enumerate(values):
            if value in seen:
                losers.setdefault(chunk, []).append(ordinal)
            seen.add(value)
    return losers


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 15), max_size=12), max_size=5),
    st.integers(1, 9),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_resolving_by_partition_is_first_wins_in_order(
    chunks: list[list[int]], partitions: int, batch_rows: int, random: Any
) -> None:
    surveys = []
    for index, values in enumerate(chunks):
        parts = [batch_of(values[i : i + batch_rows], i) for i in range(0, len(values), batch_rows)]
        surveys.append(b"".join(encode_survey(index, partitions, parts)))
    random.shuffle(surveys)
    lists = []
    for p in range(partitions):
        found = resolve(survey_partition(survey, p) for survey in surveys)
        lists.append(b"".join(encode_losers(found)))
    random.shuffle(lists)
    merged = {i: merge_losers([decode_losers(part, i) for part in lists]).tolist() for i in range(len(chunks))}
    assert {i: found for i, found in merged.items() if found} == first_wins(chunks)


def test_partitions_are_even_and_ordered_by_the_top_bits() -> None:
    high = np.array([i * (2**64 - 1) // 10_000 for i in range(10_001)], np.uint64)
    for partitions in (1, 3, 7, 256):
        found = partition(high, partitions)
        assert found.min() == 0
        assert found.max() == partitions - 1
        assert (np.diff(found) >= 0).all()
        counts = np.bincount(found)
        assert counts.max() - counts.min() <= 2


def test_a_survey_is_the_same_however_its_keys_are_batched() -> None:
    values = list(range(40)) * 2
    whole = encode_survey(3, 4, [batch_of(values)])
    assert encode_survey(3, 4, [batch_of(values[:7]), batch_of(values[7:], 7)]) == whole
    assert encode_survey(3, 4, []) == encode_survey(3, 4, [batch_of([])])


def test_one_partition_is_read_without_the_others() -> None:
    data = b"".join(encode_survey(5, 8, [batch_of(range(200_000))]))
    taken: list[int] = []

    def read(start: int, length: int) -> bytes:
        taken.append(length)
        return data[start : start + length]

    chunk, found = survey_partition(RangedReader(read, len(data)), 3)
    assert chunk == 5
    assert np.array_equal(found.ordinals, survey_partition(data, 3)[1].ordinals)
    assert sum(taken) < len(data) / 8 + 4 * 65536
    assert len(taken) <= 8


def test_losers_read_back_by_chunk() -> None:
    data = b"".join(encode_losers({7: np.array([1, 5]), 2: np.array([0]), 4: np.empty(0, np.int64)}))
    assert decode_losers(data, 7).tolist() == [1, 5]
    assert decode_losers(data, 2).tolist() == [0]
    assert decode_losers(data, 4).tolist() == decode_losers(data, 9).tolist() == []
    assert merge_losers([np.array([4, 9]), np.array([1])]).tolist() == [1, 4, 9]
    assert merge_losers([]).tolist() == []


def test_other_bytes_are_refused() -> None:
    survey = b"".join(encode_survey(0, 2, []))
    losers = b"".join(encode_losers({}))
    with pytest.raises(Corrupt, match="not an Arrow file"):
        survey_partition(b"nothing", 0)
    with pytest.raises(Corrupt, match="not a survey"):
        survey_partition(losers, 0)
    with pytest.raises(Corrupt, match="2 partitions and no number 2"):
        survey_partition(survey, 2)
    with pytest.raises(Corrupt, match="not a list of duplicates"):
        decode_losers(survey, 0)
