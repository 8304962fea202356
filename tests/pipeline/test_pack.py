"""pack's laws: a digest tells of the rows and of nothing else, and every block stands alone."""

from __future__ import annotations

import datetime
import decimal
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import TransformError
from millrace.core.model import block_digest, digest_of
from millrace.core.spec import Shards
from millrace.pipeline.canonical import canonical
from millrace.pipeline.pack import PackedShard, pack
from millrace.pipeline.process.plain import plain_batch, plain_schema
from millrace.pipeline.rowsize import row_sizes

NEVER = 2**31
"""A shard size nothing here reaches."""


def packed(batches: Sequence[pa.RecordBatch], **shards: Any) -> list[PackedShard]:
    return list(pack(batches, Shards(**{"size": NEVER, "block_rows": 4, **shards})))


def digests(batches: Sequence[pa.RecordBatch], **shards: Any) -> list[str]:
    return [p.shard.digest for p in packed(batches, **shards)]


def content(shard: PackedShard) -> bytes:
    return b"".join(shard.pieces)


def table(shards: Sequence[PackedShard]) -> pa.Table:
    return pa.concat_tables([pa.ipc.open_file(pa.py_buffer(content(s))).read_all() for s in shards])


# --- values, and every way to lay them out ------------------------------------------------------------

TYPES: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "int32": (pa.int32(), st.integers(-(2**31), 2**31 - 1)),
    "uint16": (pa.uint16(), st.integers(0, 65535)),
    "double": (pa.float64(), st.floats(allow_nan=False)),
    "bool": (pa.bool_(), st.booleans()),
    "string": (pa.string(), st.text(st.characters(codec="utf-8"), max_size=6)),
    "binary": (pa.binary(), st.binary(max_size=6)),
    "large_list": (pa.large_list(pa.uint8()), st.lists(st.integers(0, 255), max_size=3)),
    "fixed": (pa.binary(3), st.binary(min_size=3, max_size=3)),
    "date": (pa.date32(), st.dates()),
    "decimal": (pa.decimal128(10, 2), st.integers(-(10**9), 10**9).map(lambda n: decimal.Decimal(n) / 100)),
    "list": (pa.list_(pa.string()), st.lists(st.none() | st.text("ab", max_size=2), max_size=3)),
    "tokens": (pa.list_(pa.uint16(), 3), st.lists(st.integers(0, 9), min_size=3, max_size=3)),
    "struct": (
        pa.struct([("x", pa.int32()), ("y", pa.list_(pa.bool_()))]),
        st.fixed_dictionaries(
            {"x": st.none() | st.integers(0, 9), "y": st.none() | st.lists(st.none() | st.booleans(), max_size=3)}
        ),
    ),
    "map": (
        pa.map_(pa.string(), pa.int32()),
        st.dictionaries(st.text("ab", min_size=1, max_size=2), st.none() | st.integers(0, 9), max_size=2).map(
            lambda d: list(d.items())
        ),
    ),
    "null": (pa.null(), st.none()),
}


@st.composite
def columns(draw: st.DrawFn) -> dict[str, tuple[pa.DataType, list[Any]]]:
    """One to three columns of one to fourteen rows, with and without nulls."""
    rows = draw(st.integers(1, 14))
    found = {}
    for name in draw(st.lists(st.sampled_from(sorted(TYPES)), min_size=1, max_size=3, unique=True)):
        kind, values = TYPES[name]
        nullable = draw(st.booleans())
        found[name] = (kind, draw(st.lists(st.none() | values if nullable else values, min_size=rows, max_size=rows)))
    return found


def plainly(made: dict[str, tuple[pa.DataType, list[Any]]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(v, k) for k, v in made.values()], names=list(made))


def elsewhere(array: pa.Array, before: int) -> pa.Array:
    """The same values as a slice of a longer array, whose other values lie around them."""
    around = array.take(pa.array([0] * before + [*range(len(array))] + [len(array) - 1] * 3))
    return around.slice(before, len(array))


def with_garbage(array: pa.Array, dice: np.random.Generator) -> pa.Array:
    """The same values with other bytes under the nulls and behind the last row."""
    kind = array.type
    n = len(array)
    if pa.types.is_nested(kind) or pa.types.is_null(kind) or n == 0:
        return array
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    spare = dice.integers(0, 256, 64, dtype=np.uint8).tobytes()
    bits = np.unpackbits(dice.integers(0, 256, (n + 7) // 8 + 1, dtype=np.uint8), bitorder="little")
    bits[:n] = valid
    bitmap = pa.py_buffer(np.packbits(bits, bitorder="little"))
    if pa.types.is_boolean(kind):
        flags = np.unpackbits(dice.integers(0, 256, (n + 7) // 8 + 1, dtype=np.uint8), bitorder="little")
        flags[:n][valid] = array.fill_null(False).to_numpy(zero_copy_only=False)[valid]
        return pa.Array.from_buffers(kind, n, [bitmap, pa.py_buffer(np.packbits(flags, bitorder="little"))])
    if kind in (pa.string(), pa.binary()):
        pieces = [v.as_py() if v.is_valid else "junk"[: int(dice.integers(0, 5))] for v in array]
        raw = [p.encode() if isinstance(p, str) else p for p in pieces]
        lead = dice.integers(0, 256, int(dice.integers(0, 9)), dtype=np.uint8).tobytes()
        ends = np.cumsum([len(lead), *map(len, raw)]).astype(np.int32)
        return pa.Array.from_buffers(kind, n, [bitmap, pa.py_buffer(ends), pa.py_buffer(lead + b"".join(raw) + spare)])
    width = kind.bit_width // 8
    plain = pa.array(array.to_pylist(), kind)
    values = np.frombuffer(plain.buffers()[1], dtype=np.uint8)[: n * width].reshape(n, width).copy()
    values[~valid] = dice.integers(0, 256, (int((~valid).sum()), width), dtype=np.uint8)
    return pa.Array.from_buffers(kind, n, [bitmap, pa.py_buffer(values.tobytes() + spare)])


@given(columns(), st.integers(0, 9), st.integers(0, 2**32))
def test_the_digest_does_not_tell_how_arrays_were_laid_out(
    made: dict[str, tuple[pa.DataType, list[Any]]], before: int, seed: int
) -> None:
    plain = plainly(made)
    dice = np.random.default_rng(seed)
    others = [
        [elsewhere(c, before) for c in plain.columns],
        [with_garbage(c, dice) for c in plain.columns],
        [elsewhere(with_garbage(c, dice), before) for c in plain.columns],
    ]
    expected = digests([plain])
    for arrays in others:
        batch = pa.RecordBatch.from_arrays(arrays, names=plain.schema.names)
        assert batch.to_pylist() == plain.to_pylist()
        assert digests([batch]) == expected


def large(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    """The rows with another column, of text whose lengths lie around the smallest size of a block."""
    lengths = [(i * 337) % 1200 if i % 5 else None for i in range(batch.num_rows)]
    return batch.append_column(column, pa.array([None if n is None else "x" * n for n in lengths], pa.string()))


CUTS = st.lists(st.integers(0, 6), max_size=8)


@given(columns(), CUTS, st.booleans(), st.sampled_from(["none", "lz4", "zstd"]), st.integers(1024, 3000) | st.none())
def test_the_digest_does_not_tell_how_rows_were_cut_into_batches(
    made: dict[str, tuple[pa.DataType, list[Any]]],
    cuts: list[int],
    copies: bool,
    compression: str,
    block_size: int | None,
) -> None:
    plain = plainly(made)
    how: dict[str, Any] = {"compression": compression}
    if block_size is not None:
        plain, how = large(plain, "long"), how | {"block_size": block_size, "block_rows": 9}
    batches, start = [], 0
    for rows in [*cuts, plain.num_rows]:
        part = plain.slice(start, rows)
        batches.append(pa.RecordBatch.from_pylist(part.to_pylist(), schema=part.schema) if copies else part)
        start += rows
    assert digests(batches, **how) == digests([plain], **how)


def told(value: Any, kind: pa.DataType) -> int:
    """The bytes of one value as ``rowsize`` defines them, one value at a time."""
    types = pa.types
    if types.is_null(kind) or types.is_boolean(kind):
        return int(types.is_boolean(kind))
    if types.is_string(kind) or types.is_binary(kind):
        return 4 + len(value.encode() if isinstance(value, str) else value or b"")
    if types.is_map(kind):
        return 4 + sum(told(k, kind.key_type) + told(v, kind.item_type) for k, v in value or [])
    if types.is_list(kind):
        return 4 + sum(told(v, kind.value_type) for v in value or [])
    if types.is_fixed_size_list(kind):
        return sum(told(v, kind.value_type) for v in value or [None] * kind.list_size)
    if types.is_struct(kind):
        return sum(told((value or {}).get(f.name), f.type) for f in kind)
    return int(kind.bit_width) // 8


NESTED: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "pairs": (pa.list_(pa.string(), 2), st.lists(st.none() | st.text("ab", max_size=3), min_size=2, max_size=2)),
    "records": (
        pa.list_(pa.struct([("n", pa.int16()), ("s", pa.string())])),
        st.lists(
            st.none() | st.fixed_dictionaries({"n": st.integers(0, 9), "s": st.text("xy", max_size=3)}), max_size=3
        ),
    ),
    "deep": (pa.struct([("m", TYPES["map"][0]), ("b", pa.bool_())]), st.fixed_dictionaries({"m": TYPES["map"][1]})),
}


@given(st.data(), st.integers(0, 9), st.integers(0, 2**32))
def test_the_size_of_a_row_is_told_by_the_row_alone(data: st.DataObject, before: int, seed: int) -> None:
    kinds = TYPES | NESTED
    names = data.draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, max_size=3, unique=True))
    rows = data.draw(st.integers(1, 9))
    values = {n: data.draw(st.lists(st.none() | kinds[n][1], min_size=rows, max_size=rows), label=n) for n in names}
    plain = plain_batch(pa.RecordBatch.from_arrays([pa.array(values[n], kinds[n][0]) for n in names], names=names))
    expected = [sum(told(row[f.name], f.type) for f in plain.schema) for row in plain.to_pylist()]
    dice = np.random.default_rng(seed)
    other = [elsewhere(with_garbage(c, dice), before) for c in plain.columns]
    for batch in (plain, pa.RecordBatch.from_arrays(other, names=names)):
        sizes = row_sizes(batch)
        assert [sizes.between(i, i + 1) for i in range(rows)] == expected
        for start in range(rows):
            for wanted in {1, *np.cumsum(expected[start:]).tolist(), sum(expected) + 1} - {0}:
                reached = [end for end in range(start + 1, rows + 1) if sum(expected[start:end]) >= wanted]
                assert sizes.reaching(wanted, start) == (reached[0] if reached else rows)


@given(columns(), st.integers(1, 7), st.sampled_from(["none", "lz4", "zstd"]))
def test_rows_come_out_as_they_went_in_and_each_block_can_be_read_alone(
    made: dict[str, tuple[pa.DataType, list[Any]]], block_rows: int, compression: str
) -> None:
    plain = plainly(made)
    shards = packed([plain], block_rows=block_rows, compression=compression)
    assert table(shards).to_pylist() == plain.to_pylist()
    for shard in shards:
        data = content(shard)
        assert digest_of(data) == shard.shard.digest
        assert len(data) == shard.shard.size_bytes
        position, rows = shard.shard.blocks[0].offset, 0
        schema = pa.ipc.read_schema(pa.ipc.read_message(pa.py_buffer(data[8:position])))
        assert schema == plain_schema(plain.schema)
        for block in shard.shard.blocks:
            assert block.offset == position
            alone = data[block.offset : block.offset + block.length_bytes]
            assert block_digest(alone) == block.digest
            message = pa.ipc.read_message(pa.py_buffer(alone))
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate(full=True)
            assert batch.num_rows == block.rows
            assert batch.to_pylist() == plain.slice(rows, block.rows).to_pylist()
            position += block.length_bytes
            rows += block.rows
        assert rows == shard.shard.rows


@given(columns())
def test_canonical_buffers_are_exact_and_valid(made: dict[str, tuple[pa.DataType, list[Any]]]) -> None:
    batch = canonical(plainly(made))
    batch.validate(full=True)
    for column in batch.columns:
        assert column.offset == 0
        bitmap = column.buffers()[0]
        assert (bitmap is None) == (column.null_count == 0 or pa.types.is_null(column.type))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(1, 50))
def test_blocks_have_exactly_the_rows_asked_for_but_the_last(sizes: list[int], block_rows: int) -> None:
    batches = [pa.record_batch({"a": pa.array(range(n), pa.int64())}) for n in sizes]
    shards = packed(batches, block_rows=block_rows)
    rows = [b.rows for s in shards for b in s.shard.blocks]
    assert sum(rows) == sum(sizes)
    assert all(n == block_rows for n in rows[:-1])
    assert all(0 < n <= block_rows for n in rows[-1:])


# --- closing ------------------------------------------------------------------------------------------


def numbers(rows: int, start: int = 0) -> pa.RecordBatch:
    return pa.record_batch({"a": pa.array(range(start, start + rows), pa.int64())})


def test_a_shard_is_closed_by_the_first_block_that_reaches_its_size() -> None:
    shards = packed([numbers(4000)], block_rows=100, size=4096)
    assert len(shards) > 1
    for shard in shards[:-1]:
        last = shard.shard.blocks[-1]
        assert last.offset < 4096 <= last.offset + last.length_bytes
    assert table(shards).column("a").to_pylist() == list(range(4000))


@pytest.mark.parametrize("cut", [1, 4, 10])
def test_a_block_is_closed_by_the_row_that_brings_it_to_its_size(cut: int) -> None:
    """Otherwise a block of 1,024 long values would have to be held whole, by the packer and by every feed."""
    batches = [
        pa.record_batch({"a": pa.array(["x" * 2000] * rows, pa.string())}) for rows in [cut] * (10 // cut) + [10 % cut]
    ]
    shards = packed(batches, block_rows=1024, size=8192, block_size=4096)
    assert [[b.rows for b in s.shard.blocks] for s in shards] == [[3, 3], [3, 1]]
    assert table(shards).num_rows == 10


@pytest.mark.parametrize(("block_size", "rows"), [(4008, [2, 2, 1]), (4009, [3, 2]), (2004, [1] * 5)])
def test_a_row_that_ends_at_the_size_closes_the_block(block_size: int, rows: list[int]) -> None:
    (shard,) = packed([pa.record_batch({"a": ["x" * 2000] * 5})], block_rows=1024, block_size=block_size)
    assert [b.rows for b in shard.shard.blocks] == rows


def test_blocks_of_fixed_rows_are_closed_by_arithmetic() -> None:
    tokens = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(100 * 16, np.uint16)), 16)
    assert row_sizes(pa.record_batch({"t": tokens, "ok": pa.array([True] * 100)})).ends is None
    (shard,) = packed([pa.record_batch({"t": tokens, "ok": pa.array([True] * 100)})], block_rows=64, block_size=1024)
    assert [b.rows for b in shard.shard.blocks] == [32, 32, 32, 4]  # 33 bytes a row


def test_a_small_shard_bounds_its_blocks_unless_told_otherwise() -> None:
    assert (Shards().block_size, Shards(size=1_000_000).block_size) == (8_000_000, 1_000_000)
    assert Shards.model_validate(Shards(size=4096).model_dump()) == Shards(size=4096)


def test_no_rows_make_no_shard() -> None:
    assert packed([]) == []
    assert packed([numbers(0), numbers(0)]) == []
    assert [s.shard.rows for s in packed([numbers(0), numbers(3), numbers(0)])] == [3]


def test_pieces_are_taken_from_the_records_and_not_copied_together() -> None:
    batch = pa.record_batch({"a": pa.array(np.arange(100_000))})
    (shard,) = packed([batch], block_rows=1_000_000)
    assert len(shard.pieces) < 8
    address = batch.column(0).buffers()[1].address
    assert any(pa.py_buffer(p).address == address for p in shard.pieces)


def test_a_shard_in_the_making_holds_no_more_than_one() -> None:
    """The next batch is asked for only when the one before is packed."""
    asked: list[int] = []

    def batches() -> Any:
        for i in range(5):
            asked.append(i)
            yield numbers(1000, i)

    shards = pack(batches(), Shards(size=8000, block_rows=1000))
    next(shards)
    assert asked == [0]
    next(shards)
    assert asked == [0, 1]


# --- types and schemas --------------------------------------------------------------------------------


def test_metadata_is_taken_off_at_every_level() -> None:
    inner = pa.field("item", pa.int32(), metadata={"PARQUET:field_id": "7"})
    field = pa.field("a", pa.list_(inner), metadata={"k": "v"})
    marked = pa.record_batch([pa.array([[1], [2, 3]], pa.list_(inner))], schema=pa.schema([field], metadata={"m": "n"}))
    plain = pa.record_batch({"a": pa.array([[1], [2, 3]], pa.list_(pa.int32()))})
    assert digests([marked]) == digests([plain])


def test_encodings_of_the_same_values_give_the_same_shard() -> None:
    values = ["a", "b", None, "a"]
    plain = pa.array(values)
    expected = digests([pa.record_batch({"a": plain})])
    assert digests([pa.record_batch({"a": plain.dictionary_encode()})]) == expected
    assert digests([pa.record_batch({"a": pa.array(values, pa.string_view())})]) == expected
    assert digests([pa.record_batch({"a": pa.array(values, pa.large_string())})]) == expected
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3, 4], pa.int32()), plain)
    assert digests([pa.record_batch({"a": runs})]) == expected


def test_dictionaries_inside_of_lists_are_decoded_too() -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    nested = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), words)
    (shard,) = packed([pa.record_batch({"a": nested})])
    assert table([shard]).schema.field("a").type == pa.list_(pa.string())
    assert digests([pa.record_batch({"a": pa.array([["a", "b"], ["a"]])})]) == [shard.shard.digest]


def test_dictionaries_that_change_from_batch_to_batch_do_not_show() -> None:
    one = pa.record_batch({"a": pa.array(["a", "b", "a"]).dictionary_encode()})
    two = pa.record_batch({"a": pa.array(["c", "b"]).dictionary_encode()})
    plain = pa.record_batch({"a": ["a", "b", "a", "c", "b"]})
    assert digests([one, two]) == digests([plain])


def test_what_lies_under_a_null_parent_does_not_show() -> None:
    child = pa.array([1, 2, 3], pa.int32())
    other = pa.array([1, 99, 3], pa.int32())
    absent = pa.array([1, None, 3], pa.int32())
    mask = pa.array([False, True, False])
    made = [pa.StructArray.from_arrays([c], names=["x"], mask=mask) for c in (child, other, absent)]
    assert len({tuple(digests([pa.record_batch({"s": s})])) for s in made}) == 1
    fixed = [
        pa.FixedSizeListArray.from_arrays(pa.array(v, pa.int32()), 2, mask=mask)
        for v in ([1, 1, 2, 2, 3, 3], [1, 1, 9, None, 3, 3])
    ]
    assert len({tuple(digests([pa.record_batch({"f": f})])) for f in fixed}) == 1


@pytest.mark.parametrize("under", [[1, 2, 3], [1, 99, 3], [1, None, 3]])
def test_a_child_that_can_not_be_null_stays_so_under_a_null_parent(under: list[int | None]) -> None:
    field = pa.field("x", pa.int32(), nullable=False)
    bitmap = pa.py_buffer(np.packbits([True, False, True], bitorder="little"))
    made = pa.Array.from_buffers(pa.struct([field]), 3, [bitmap], children=[pa.array(under, pa.int32())])
    (shard,) = packed([pa.record_batch({"s": made})])
    read = table([shard]).column("s").chunk(0)
    assert read.to_pylist() == [{"x": 1}, None, {"x": 3}]
    assert read.field(0).null_count == 0
    assert read.field(0).to_pylist() == [1, 0, 3]


def test_nulls_of_a_list_hide_nothing() -> None:
    bitmap = pa.py_buffer(np.packbits([True, False, True], bitorder="little"))
    offsets = pa.py_buffer(np.array([0, 1, 3, 4], np.int32))
    hidden = pa.Array.from_buffers(pa.list_(pa.int64()), 3, [bitmap, offsets], children=[pa.array([1, 66, 77, 4])])
    plain = pa.array([[1], None, [4]])
    assert hidden.to_pylist() == plain.to_pylist()
    assert digests([pa.record_batch({"a": hidden})]) == digests([pa.record_batch({"a": plain})])


def test_times_keep_their_zone() -> None:
    at = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    made = pa.array([at, None], pa.timestamp("us", "UTC"))
    assert table(packed([pa.record_batch({"t": made})])).column("t").type == pa.timestamp("us", "UTC")


def test_a_union_is_refused_by_name() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])])
    for column in (union, pa.StructArray.from_arrays([union], ["u"])):
        with pytest.raises(TransformError, match=r"column 'odd' is of type .*union.*; select the fields you need"):
            packed([pa.record_batch({"odd": column})])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"b": [1]}, "the columns change within one chunk: first a, then b"),
        ({"a": [1], "b": [1]}, "the columns change within one chunk: first a, then a, b"),
        ({"a": ["x"]}, "column 'a' changes its type within one chunk: first int64, then string"),
    ],
)
def test_a_schema_that_changes_is_an_error_that_names_the_column(other: dict[str, list[Any]], sentence: str) -> None:
    with pytest.raises(TransformError) as caught:
        packed([pa.record_batch({"a": [1]}), pa.record_batch(other)])
    assert str(caught.value) == sentence


def test_nullability_that_changes_is_an_error() -> None:
    strict = pa.record_batch([pa.array([1])], schema=pa.schema([pa.field("a", pa.int64(), nullable=False)]))
    with pytest.raises(TransformError, match="whether a column may be null changes within one chunk"):
        packed([pa.record_batch({"a": [1]}), strict])


def test_these_shards_have_these_names_for_ever() -> None:
    """A digest is a dataset's identity: a release that changes it renames everybody's shards."""
    batch = pa.record_batch(
        {
            "path": ["a.txt", "b.txt", None],
            "tokens": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.uint16(), 2)),
            "ok": [True, None, False],
        }
    )
    assert [d[:16] for d in digests([batch], block_rows=2)] == ["f311c393e9bd39a4"]


def test_a_shard_is_a_file_any_arrow_reads() -> None:
    (shard,) = packed([numbers(10)])
    assert pa.ipc.open_file(io.BytesIO(content(shard))).num_record_batches == 3
