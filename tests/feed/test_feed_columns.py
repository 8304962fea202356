"""Columns: whatever the types, batches have the values that pyarrow says are there, or say that there is none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import Corrupt, TransformError, UsageError
from millrace.feed.arena import Arena
from millrace.feed.columns import Ragged, bind, columns_of
from millrace.feed.loader import Loader

MakeLoader = Callable[..., Loader]
SourceOf = Callable[[Sequence[pa.RecordBatch]], Any]
Dice = np.random.Generator

# --- any type, and arrays of it -----------------------------------------------------------------------------------

NUMBERS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float16(), pa.float32(), pa.float64()),
    *(pa.date32(), pa.date64(), pa.time32("s"), pa.time64("us"), pa.duration("ms")),
    *(pa.timestamp("us"), pa.timestamp("s", tz="Europe/Berlin")),
]
LEAVES = [
    *NUMBERS,
    *(pa.bool_(), pa.null(), pa.decimal128(12, 3)),
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.binary(1), pa.binary(5)),
]
TENSORS = [
    pa.fixed_shape_tensor(pa.float32(), (2, 3)),
    pa.fixed_shape_tensor(pa.uint8(), (2, 1, 3), permutation=[2, 0, 1]),
]
TYPES = st.sampled_from(TENSORS) | st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: st.one_of(
        inner.map(pa.list_),
        inner.map(pa.large_list),
        st.tuples(inner, st.integers(0, 3)).map(lambda t: pa.list_(*t)),
        st.lists(inner, min_size=1, max_size=2).map(lambda ts: pa.struct([(f"f{i}", t) for i, t in enumerate(ts)])),
    ),
    max_leaves=3,
)


def some(kind: pa.DataType, n: int, nulls: float, dice: Dice) -> pa.Array:
    """``n`` values, about so many of them null, on every level; what lies under a null is anything."""
    mask = dice.random(n) < nulls if nulls else np.zeros(n, np.bool_)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, some(kind.storage_type, n, nulls, dice))
    if pa.types.is_struct(kind):
        fields = [some(field.type, n, nulls, dice) for field in kind]
        return pa.StructArray.from_arrays(fields, fields=list(kind), mask=pa.array(mask))
    if pa.types.is_fixed_size_list(kind):
        values = some(kind.value_type, n * kind.list_size, nulls, dice)
        if kind.list_size == 0:  # pyarrow divides by it
            return pa.array([None if null else [] for null in mask.tolist()], kind)
        return pa.FixedSizeListArray.from_arrays(values, type=kind, mask=pa.array(mask))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = np.concatenate([[0], np.cumsum(dice.integers(0, 4, n))])
        made = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        width = np.int64 if pa.types.is_large_list(kind) else np.int32
        values = some(kind.value_type, int(offsets[-1]), nulls, dice)
        return made.from_arrays(pa.array(offsets.astype(width)), values, type=kind, mask=pa.array(mask))
    return leaf(kind, n, mask, dice)


def whole(kind: pa.DataType) -> pa.DataType:
    """What a time is a number of."""
    return pa.int32() if kind.bit_width == 32 else pa.int64()


def leaf(kind: pa.DataType, n: int, mask: npt.NDArray[np.bool_], dice: Dice) -> pa.Array:
    types = pa.types
    if types.is_null(kind):
        return pa.nulls(n)
    if types.is_boolean(kind):
        return pa.array(dice.random(n) < 0.5, mask=mask)
    if types.is_floating(kind):
        return pa.array(dice.normal(size=n).astype(kind.to_pandas_dtype()), kind, mask=mask)
    if types.is_decimal(kind):
        return pa.array(dice.integers(-999, 999, n).astype(np.int32), mask=mask).cast(pa.decimal128(12, 0)).cast(kind)
    if is_number(kind):
        raw = dice.integers(0, 86_000 if types.is_time(kind) else 120, n)
        raw *= 86_400_000 if kind == pa.date64() else 1
        numbers = pa.array(raw, mask=mask)
        return numbers.cast(whole(kind)).view(kind) if types.is_temporal(kind) else numbers.cast(kind)
    length = kind.byte_width if types.is_fixed_size_binary(kind) else None
    lengths = dice.integers(0, 20, n).tolist() if length is None else [length] * n
    words = [dice.integers(97, 123, k, dtype=np.uint8).tobytes() for k in lengths]
    given = [None if null else word for word, null in zip(words, mask.tolist(), strict=True)]
    return pa.array(given, pa.binary() if length is None else kind).cast(kind)


# --- what batches should have of it -------------------------------------------------------------------------------

BAD = object()


def is_number(kind: pa.DataType) -> bool:
    """Floating-point ones too, and times, which are whole numbers."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_temporal(kind))


def plain(array: pa.Array) -> list[Any]:
    """Its values as Python's, times as whole numbers."""
    kind = array.type
    is_valid = array.is_valid().to_pylist()
    if pa.types.is_fixed_size_list(kind):
        values, n = plain(array.values), kind.list_size
        return [values[i * n : (i + 1) * n] if is_valid[i] else None for i in range(len(array))]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        values, edges = plain(array.values), itertools.pairwise(array.offsets.to_pylist())
        return [values[a:b] if is_valid[i] else None for i, (a, b) in enumerate(edges)]
    found: list[Any] = (array.view(whole(kind)) if pa.types.is_temporal(kind) else array).to_pylist()
    return found


def has_null(value: Any) -> bool:
    return value is None or (isinstance(value, list) and any(has_null(v) for v in value))


def expected(array: pa.Array) -> list[Any]:
    """Each row's value as the documentation has it, or BAD."""
    kind = array.type
    types = pa.types
    if isinstance(kind, pa.FixedShapeTensorType):
        axes = kind.permutation or range(len(kind.shape))
        values = plain(array.storage)
        return [BAD if has_null(v) else np.array(v).reshape(kind.shape).transpose(*axes).tolist() for v in values]
    if types.is_floating(kind):
        return [math.nan if v is None else v for v in array.to_pylist()]
    inner, is_empty = kind, False
    while types.is_fixed_size_list(inner):
        is_empty |= inner.list_size == 0
        inner = inner.value_type
    ragged = types.is_binary(kind) or types.is_large_binary(kind)
    if types.is_list(kind) or types.is_large_list(kind):
        ragged = is_number(kind.value_type)
    fixed = (is_number(inner) or types.is_fixed_size_binary(inner)) and not is_empty
    if types.is_boolean(kind) or ragged or fixed:
        return [BAD if has_null(v) else v for v in plain(array)]
    return array.to_pylist()  # type: ignore[no-any-return]


def rows_of(column: Any) -> list[Any]:
    """Each row of a batch's column, as Python values."""
    if isinstance(column, Ragged):
        values, edges = rows_of(column.values), itertools.pairwise(column.offsets.tolist())
        return [values[a:b] for a, b in edges]
    if isinstance(column, np.ndarray):
        column = (column.view(np.int64) if column.dtype.kind == "M" else column).tolist()
    return list(column)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, bytes):
        return a == list(b)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def blocks_of(columns: Sequence[pa.Array], cuts: Sequence[int]) -> list[pa.RecordBatch]:
    whole = pa.record_batch(
        {"id": pa.array(range(len(columns[0])), pa.int64())} | {f"c{i}": c for i, c in enumerate(columns)}
    )
    edges = sorted({0, len(columns[0]), *(c for c in cuts if c < len(columns[0]))})
    return [whole.slice(a, b - a) for a, b in itertools.pairwise(edges)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    types=st.lists(TYPES, min_size=1, max_size=3),
    rows=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 39), max_size=4),
    nulls=st.sampled_from([0.0, 0.0, 0.15, 1.0]),
    seed=st.integers(0, 2**32),
    shuffle=st.sampled_from(["window", "full", "blocks", "none"]),
    batch=st.integers(1, 50),
)
def test_any_types_come_as_they_are(
    types: list[pa.DataType],
    rows: int,
    cuts: list[int],
    nulls: float,
    seed: int,
    shuffle: str,
    batch: int,
    make_loader: MakeLoader,
    source_of: SourceOf,
) -> None:
    dice = np.random.default_rng(seed)
    columns = [some(kind, rows, nulls, dice) for kind in types]
    should = [expected(column) for column in columns]
    is_bad = [any(values[i] is BAD for values in should) for i in range(rows)]
    source = source_of(blocks_of(columns, cuts))
    with make_loader(source, batch, shuffle=shuffle, seed=seed) as loader:
        seen = []
        for given_batch in loader:
            ids = given_batch["id"].tolist()
            seen += ids
            for c, values in enumerate(should):
                found = rows_of(given_batch[f"c{c}"])
                assert len(found) == len(ids)
                for i, value in zip(ids, found, strict=True):
                    assert same(value, values[i]), (types[c], i, value, values[i])
        assert sorted(seen) == [i for i in range(rows) if not is_bad[i]]
        assert sorted(q.row for q in loader.receipt().quarantined) == [i for i in range(rows) if is_bad[i]]
        assert loader.receipt().complete
    if any("view" in str(kind) for kind in types):  # pyarrow can't take rows of these
        return
    with make_loader(source, batch, shuffle=shuffle, seed=seed, arrow=True) as loader:
        table = pa.Table.from_batches(list(loader))
        order = table["id"].combine_chunks()
        whole = pa.Table.from_batches(source.batches)
        assert sorted(order.to_pylist()) == list(range(rows))
        assert table.schema == whole.schema
        for name in whole.column_names:
            assert same(table[name].to_pylist(), whole[name].take(order).to_pylist())


# --- one by one -----------------------------------------------------------------------------------------------------


def test_nulls_are_found_at_every_depth(make_loader: MakeLoader, source_of: SourceOf) -> None:
    kind = pa.list_(pa.list_(pa.int32(), 2), 2)
    deep = pa.array([[[1, 2], [3, 4]], [None, [7, 8]], [[1, None], [3, 4]], None, [[5, 6], [7, None]]], kind)
    loader = make_loader(source_of([pa.record_batch({"deep": deep})]), 5, shuffle=False)
    (batch,) = loader
    assert batch["deep"].tolist() == [[[1, 2], [3, 4]]]
    assert [(q.row, q.reason) for q in loader.receipt().quarantined] == [
        (1, "column 'deep' has a null inside of a value"),
        (2, "column 'deep' has a null inside of a value"),
        (3, f"column 'deep' is null, and {kind} has no value for that"),
        (4, "column 'deep' has a null inside of a value"),
    ]


def test_arrow_batches_keep_their_nulls(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of([pa.record_batch({"n": pa.array([1, None, 3]), "x": pa.array([None, 0.5, 1.5])})])
    loader = make_loader(source, 3, shuffle=False, arrow=True, quarantine=0)
    (batch,) = loader
    assert batch.to_pydict() == {"n": [1, None, 3], "x": [None, 0.5, 1.5]}
    assert loader.receipt().rows == 3


@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        (pa.uint64(), np.uint64, ()),
        (pa.float16(), np.float16, ()),
        (pa.duration("ns"), np.int64, ()),
        (pa.time64("ns"), np.int64, ()),
        (pa.time32("ms"), np.int32, ()),
        (pa.date32(), np.int32, ()),
        (pa.timestamp("ns", tz="UTC"), "M8[ns]", ()),
        (pa.binary(3), np.uint8, (3,)),
        (pa.list_(pa.binary(3), 2), np.uint8, (2, 3)),
        (pa.list_(pa.float64(), 2), np.float64, (2,)),
        (pa.fixed_shape_tensor(pa.int16(), (2, 3)), np.int16, (2, 3)),
        (pa.fixed_shape_tensor(pa.int16(), (2, 3, 4), permutation=[2, 0, 1]), np.int16, (4, 2, 3)),
        (pa.uuid(), np.uint8, (16,)),
    ],
    ids=str,
)
def test_what_is_of_a_fixed_width_is_an_array(
    kind: pa.DataType, dtype: Any, shape: tuple[int, ...], make_loader: MakeLoader, source_of: SourceOf
) -> None:
    column = some(kind, 6, 0.0, np.random.default_rng(1)) if kind != pa.uuid() else pa.array([bytes(16)] * 6, kind)
    for shuffle in (True, False):
        (batch,) = make_loader(source_of([pa.record_batch({"c": column})]), 6, shuffle=shuffle)
        assert batch["c"].dtype == np.dtype(dtype)
        assert batch["c"].shape == (6, *shape)


def test_what_has_no_array_comes_as_python_values(make_loader: MakeLoader, source_of: SourceOf) -> None:
    columns = {
        "empty": pa.array([b"", b""], pa.binary(0)),
        "nothing": pa.nulls(2),
        "flags": pa.array([[True, False], None], pa.list_(pa.bool_(), 2)),
        "words": pa.array([["a", None], []], pa.list_(pa.string())),
        "pairs": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "view": pa.array(["x", None], pa.string_view()),
    }
    (batch,) = make_loader(source_of([pa.record_batch(columns)]), 2, shuffle=False)
    assert batch == {name: column.to_pylist() for name, column in columns.items()}


def test_a_value_without_a_python_form_is_an_error_that_names_the_column(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    times = pa.array([{"t": 2**62}], pa.struct([("t", pa.time64("us"))]))
    source = source_of([pa.record_batch({"id": pa.array([1]), "nested": times})])
    with pytest.raises(TransformError, match="column 'nested' has a value that can't be made a Python object"):
        list(make_loader(source, 1))
    (batch,) = make_loader(source, 1, columns=["id"])
    assert batch["id"].tolist() == [1]
    view = source_of([pa.record_batch({"v": pa.array(["x"], pa.string_view())})])
    with pytest.raises(TransformError, match="Arrow can't take rows of one of the columns v"):
        list(make_loader(view, 1, arrow=True))


def test_a_thousand_columns(make_loader: MakeLoader, source_of: SourceOf) -> None:
    rng = np.random.default_rng(5)
    wide = pa.record_batch({f"c{i}": rng.integers(0, 100, 64) for i in range(1000)})
    seen = 0
    for batch in make_loader(source_of([wide.slice(0, 40), wide.slice(40)]), 16):
        assert len(batch) == 1000
        seen += int(batch["c999"].sum())
    assert seen == sum(wide["c999"].to_pylist())


def test_columns_that_are_not_there_or_named_twice() -> None:
    schema = pa.schema([("a", pa.int8()), ("b", pa.int8()), ("b", pa.int8())])
    for names in (["c"], ["b"], None):
        with pytest.raises(UsageError, match=r"column '[bc]'"):
            columns_of(schema, names)
    with pytest.raises(UsageError, match="names no column"):
        columns_of(schema, [])
    assert [c.name for c in columns_of(schema, ["a"])] == ["a"]


def test_a_decoder_for_no_column_is_refused(make_loader: MakeLoader, source_of: SourceOf) -> None:
    with pytest.raises(UsageError, match="decode= names 'image', which is not a column that is read"):
        make_loader(source_of([pa.record_batch({"id": pa.array([1])})]), decode={"image": len})


def test_values_that_lie_elsewhere_are_refused() -> None:
    batch = pa.record_batch({"a": pa.array([1, 2, 3])})
    with pytest.raises(Corrupt, match="can't be read in place"):
        bind(batch, columns_of(batch.schema, None), Arena(1_000_000))


def test_all_null_columns_and_empty_values(make_loader: MakeLoader, source_of: SourceOf) -> None:
    columns = {
        "x": pa.nulls(3, pa.float32()),
        "s": pa.array(["", None, ""]),
        "b": pa.array([b"", b"", b""]),
        "l": pa.array([[], [], []], pa.list_(pa.int64())),
    }
    for shuffle in (True, False):
        (batch,) = make_loader(source_of([pa.record_batch(columns)]), 3, shuffle=shuffle)
        assert np.isnan(batch["x"]).all()
        assert sorted(batch["s"], key=str) == ["", "", None]
        assert batch["b"].offsets.tolist() == batch["l"].offsets.tolist() == [0, 0, 0, 0]
        assert batch["l"].values.dtype == np.int64
