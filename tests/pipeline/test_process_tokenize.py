from __future__ import annotations

import builtins
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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from millrace.core.errors import Nondeterministic, SpecError, TransformError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Tokenize
from millrace.pipeline.process import Chain, ProcessContext
from millrace.pipeline.process.tokenize import ByteTokens
from millrace.pipeline.records import BATCH_BYTES, Records

CHUNK = Chunk(0, 0, (SourceObject("a.txt", 10, "v"),), 0, 10)
SCHEMA = pa.schema([("path", pa.string()), ("text", pa.string()), ("raw", pa.binary()), ("n", pa.int64())])


def build(base: Path = Path(), schema: pa.Schema = SCHEMA, **rules: Any) -> Chain:
    rules = {"column": "text", "tokenizer": "bytes", "pack": 8, **rules}
    return Chain.build([Tokenize.model_validate({"tokenize": rules})], base=base, schema=schema)


def batch_of(values: Sequence[str | None]) -> pa.RecordBatch:
    raw = [None if v is None else v.encode() for v in values]
    return pa.RecordBatch.from_arrays(
        [pa.array(["p"] * len(values), pa.string()), pa.array(values, pa.string()), pa.array(raw, pa.binary()),
         pa.nulls(len(values), pa.int64())],
        schema=SCHEMA,
    )  # fmt: skip


def run(
    chain: Chain, values: Sequence[str | None], cuts: Sequence[int] = (), rejected: list[Quarantined] | None = None
) -> list[pa.RecordBatch]:
    batch = batch_of(values)
    bounds = sorted({0, len(values), *(c for c in cuts if c < len(values))})

    def records() -> Iterator[Records]:
        for start, end in itertools.pairwise(bounds):
            positions = np.arange(start, end, dtype=np.int64)
            yield Records(batch.slice(start, end - start), np.zeros(end - start, np.int32), positions)

    bad: list[Quarantined] = [] if rejected is None else rejected
    found = list(chain.run(records(), ProcessContext(CHUNK, "row", bad.append, lambda n, s: nullcontext())))
    for item in found:
        assert item.schema.equals(chain.schema, check_metadata=True)
        item.validate(full=True)
    return found


def tokens(batches: list[pa.RecordBatch]) -> list[list[int]]:
    return [row for batch in batches for row in batch.column(0).to_pylist()]


def token_type(chain: Chain) -> pa.DataType:
    assert chain.schema is not None
    return chain.schema.field(0).type.value_type


def naive(values: Sequence[str], pack: int, end: int = 256, pad: int = 257) -> list[list[int]]:
    flat = [t for v in values for t in (*v.encode(), end)]
    flat += [pad] * (-len(flat) % pack)
    return [flat[i : i + pack] for i in range(0, len(flat), pack)]


def test_records_are_laid_end_to_end_and_the_last_row_is_padded() -> None:
    chain = build(pack=4)
    assert tokens(run(chain, ["abc", "é", ""])) == [[97, 98, 99, 256], [195, 169, 256, 256]]
    assert tokens(run(chain, ["abcd"])) == [[97, 98, 99, 100], [256, 257, 257, 257]]
    assert run(chain, []) == []


def test_the_column_is_fixed_lists_without_nulls() -> None:
    schema = build(into="ids", pack=16).schema
    assert schema == pa.schema(
        [pa.field("ids", pa.list_(pa.field("item", pa.uint16(), nullable=False), 16), nullable=False)]
    )
    assert token_type(build(pad=70_000)) == pa.uint32()


def test_end_and_pad_can_be_chosen_and_binary_is_bytes() -> None:
    assert tokens(run(build(column="raw", pack=3, end=0, pad=1), ["a", "bc"])) == [[97, 0, 98], [99, 0, 1]]


def test_null_text_is_set_aside() -> None:
    rejected: list[Quarantined] = []
    assert tokens(run(build(pack=2), ["a", None, "b"], rejected=rejected)) == [[97, 256], [98, 256]]
    assert rejected == [
        Quarantined("a.txt", "row 1", "process", "tokenize: null", "text is null, so there is nothing to tokenize")
    ]


@pytest.fixture(scope="module")
def law_chains() -> dict[int, Chain]:
    return {pack: build(pack=pack) for pack in (1, 3, 8)}


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text(max_size=20), max_size=10),
    st.lists(st.integers(0, 10), max_size=4),
    st.sampled_from([1, 3, 8]),
)
def test_bytes_are_what_the_plain_loop_gives_however_batched(
    law_chains: dict[int, Chain], values: list[str], cuts: list[int], pack: int
) -> None:
    whole = run(law_chains[pack], values)
    assert tokens(whole) == naive(values, pack)
    assert run(law_chains[pack], values, cuts) == whole


def test_long_records_and_short_ones_take_the_same_path_in_the_end() -> None:
    values = ["x" * 9_000_000, "y" * 300, *["z"] * 5000, "", "w" * 4_000_000]
    found = run(build(pack=1000), values)
    flat = np.concatenate([b.column(0).flatten().to_numpy() for b in found])
    expected = np.concatenate(
        [[*v.encode(), 256] if len(v) < 9 else np.r_[np.full(len(v), ord(v[0])), 256] for v in values]
    )
    assert np.array_equal(flat[: len(expected)], expected)
    assert (flat[len(expected) :] == 257).all()
    assert max(b.nbytes for b in found) <= BATCH_BYTES
    assert len({b.num_rows for b in found[:-1]}) == 1
    assert max(len(p) for p in ByteTokens(None, None).encode(pa.array(values)) if isinstance(p, np.ndarray)) < 5_000_000


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"column": "txt"}, "tokenize.column: there is no column 'txt'; there are path, text, raw, n"),
        ({"column": "n"}, "tokenize.column: 'n' is int64, not text"),
        ({"end": 2**32}, "tokenize.end: 4294967296 does not fit 32 bits"),
    ],
)
def test_refusals(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as caught:
        build(**rules)
    assert str(caught.value) == f"transforms.0.{words}"


def test_a_batch_without_the_column_is_an_error_that_names_it() -> None:
    chain = build()
    other = pa.RecordBatch.from_pydict({"words": ["a"]})
    item = Records(other, np.zeros(1, np.int32), np.zeros(1, np.int64))
    with pytest.raises(TransformError, match=r"column: there is no column 'text'; there are words"):
        list(chain.run(iter([item]), ProcessContext(CHUNK, "row", lambda q: None, lambda n, s: nullcontext())))


# --- tokenizer files --------------------------------------------------------------------------------


def words_file(folder: Path, vocab: dict[str, int], unknown: str | None = "?", name: str = "t.json") -> str:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / name))
    return name


VOCAB = {"?": 0, "a": 1, "b": 2, "</s>": 3}


def test_a_file_gives_tokens_with_nothing_added_cut_or_padded(tmp_path: Path) -> None:
    chain = build(tmp_path, tokenizer=words_file(tmp_path, VOCAB), pack=4)
    assert token_type(chain) == pa.uint16()
    assert tokens(run(chain, ["a b a zzz", "b"])) == [[1, 2, 1, 0], [3, 2, 3, 3]]


def test_a_file_with_large_ids_needs_32_bits(tmp_path: Path) -> None:
    chain = build(tmp_path, tokenizer=words_file(tmp_path, {**VOCAB, "c": 70_000}), pack=2)
    assert token_type(chain) == pa.uint32()
    assert tokens(run(chain, ["c"])) == [[70_000, 3]]


def test_a_file_without_an_end_token_needs_one(tmp_path: Path) -> None:
    name = words_file(tmp_path, {"?": 0, "a": 1})
    with pytest.raises(SpecError, match=r"transforms\.0\.tokenize\.end: .*t\.json has none of the usual end tokens"):
        build(tmp_path, tokenizer=name)
    assert tokens(run(build(tmp_path, tokenizer=name, end=9, pack=3, pad=8), ["a"])) == [[1, 9, 8]]


def test_a_record_the_tokenizer_fails_on_is_set_aside(tmp_path: Path) -> None:
    rejected: list[Quarantined] = []
    name = words_file(tmp_path, {"a": 1, "</s>": 3}, unknown="missing")
    found = run(build(tmp_path, tokenizer=name, pack=2), ["a", "zzz", "a"], rejected=rejected)
    assert tokens(found) == [[1, 3], [1, 3]]
    assert [(q.position, q.rule) for q in rejected] == [("row 1", "tokenize: t.json")]
    assert "UNK" in rejected[0].reason


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from("ab?"), max_size=4).map(" ".join), max_size=6), st.integers(0, 6))
def test_a_file_does_not_depend_on_batches(tmp_path_factory: Any, values: list[str], at: int) -> None:
    folder = tmp_path_factory.getbasetemp()
    chain = build(folder, tokenizer=words_file(folder, VOCAB), pack=3)
    assert run(chain, values, [at]) == run(chain, values)


def test_a_file_that_is_not_there_or_is_garbage(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"tokenizer: .*none\.json can't be read: No such file"):
        build(tmp_path, tokenizer="none.json")
    with pytest.raises(SpecError, match=r"tokenizer: .* can't be read: Is a directory"):
        build(tmp_path, tokenizer=".")
    (tmp_path / "bad.json").write_bytes(b'{"version": 3}\xff')
    with pytest.raises(SpecError, match=r"bad\.json is not a tokenizers JSON file"):
        build(tmp_path, tokenizer="bad.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(SpecError, match=r"bad\.json is not a tokenizers JSON file"):
        build(tmp_path, tokenizer="bad.json")


def test_without_the_library_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SpecError, match=r"pip install 'millrace\[tokenizers\]'"):
        build(tokenizer="t.json")


def test_a_second_run_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = itertools.count()

    def encode(self: ByteTokens, array: pa.Array) -> Iterator[Any]:
        yield np.array([next(turns)], np.uint16)

    monkeypatch.setattr(ByteTokens, "encode", encode)
    with pytest.raises(Nondeterministic, match=r"tokenize: bytes gives different output .* column 'tokens'"):
        run(build(), ["a"])
