"""The loader: every row once, as what it is, resumable, and clear about what it can't give."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.errors import QuarantineExceeded, TransformError, Unavailable, UsageError
from millrace.feed.columns import Ragged
from millrace.feed.loader import Loader
from millrace.feed.receipt import Receipt, merge_receipts

MakeLoader = Callable[..., Loader]
SourceOf = Callable[[Sequence[pa.RecordBatch]], Any]


def numbered(sizes: Sequence[int]) -> list[pa.RecordBatch]:
    """Blocks of these sizes whose one column counts through all of them."""
    edges = itertools.pairwise(np.cumsum([0, *sizes]))
    return [pa.record_batch({"id": pa.array(np.arange(a, b), pa.int64())}) for a, b in edges]


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


def flat(batches: list[list[int]]) -> list[int]:
    return [i for batch in batches for i in batch]


# --- what comes out ----------------------------------------------------------------------------------------------


def every_kind() -> pa.RecordBatch:
    columns = {
        "int": pa.array([1, 2, 3], pa.int16()),
        "float": pa.array([0.5, None, 2.5], pa.float32()),
        "bool": pa.array([True, False, True]),
        "time": pa.array([1, 2, 3], pa.timestamp("us")),
        "day": pa.array([1, 2, 3], pa.date32()),
        "image": pa.array(
            [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11, 12]]], pa.list_(pa.list_(pa.uint8(), 2), 2)
        ),
        "key": pa.array([b"abcd", b"efgh", b"ijkl"], pa.binary(4)),
        "blob": pa.array([b"", b"one", b"three"], pa.binary()),
        "large": pa.array([b"x", b"", b"yy"], pa.large_binary()),
        "text": pa.array(["a", None, "ünï"], pa.string()),
        "list": pa.array([[1.5], [], [2.5, 3.5]], pa.list_(pa.float64())),
        "struct": pa.array([{"a": 1}, None, {"a": 3}], pa.struct([("a", pa.int64())])),
    }
    return pa.record_batch(columns)


def test_each_type_comes_as_what_a_training_loop_wants(make_loader: MakeLoader, source_of: SourceOf) -> None:
    (batch,) = make_loader(source_of([every_kind()]), 3, shuffle=False)
    assert batch["int"].dtype == np.int16
    assert batch["int"].tolist() == [1, 2, 3]
    assert np.isnan(batch["float"][1])
    assert batch["float"][2] == 2.5
    assert batch["bool"].tolist() == [True, False, True]
    assert batch["time"].dtype == np.dtype("M8[us]")
    assert batch["time"].view(np.int64).tolist() == [1, 2, 3]
    assert batch["day"].tolist() == [1, 2, 3]
    assert batch["image"].shape == (3, 2, 2)
    assert batch["image"][2].tolist() == [[9, 10], [11, 12]]
    assert batch["key"].tobytes() == b"abcdefghijkl"
    assert batch["blob"].values.tobytes() == b"onethree"
    assert batch["blob"].offsets.tolist() == [0, 0, 3, 8]
    assert batch["large"].offsets.tolist() == [0, 1, 1, 3]
    assert batch["text"] == ["a", None, "ünï"]
    assert batch["list"].values.tolist() == [1.5, 2.5, 3.5]
    assert batch["list"].offsets.tolist() == [0, 1, 1, 3]
    assert batch["struct"] == [{"a": 1}, None, {"a": 3}]


@pytest.mark.parametrize("shuffle", [True, "full", "blocks", False])
def test_types_survive_gathering_from_many_blocks(make_loader: MakeLoader, source_of: SourceOf, shuffle: Any) -> None:
    rng = np.random.default_rng(3)
    blobs = [rng.bytes(int(n)) for n in rng.integers(0, 300, 50)]
    whole = pa.record_batch(
        {"id": pa.array(range(50)), "blob": pa.array(blobs), "even": [i % 2 == 0 for i in range(50)]}
    )
    source = source_of([whole.slice(0, 20), whole.slice(20, 7), whole.slice(27)])
    seen = {}
    for batch in make_loader(source, 8, shuffle=shuffle):
        assert isinstance(batch["blob"], Ragged)
        for k, i in enumerate(batch["id"].tolist()):
            a, b = batch["blob"].offsets[k : k + 2]
            seen[i] = (batch["blob"].values[a:b].tobytes(), bool(batch["even"][k]))
    assert seen == {i: (blob, i % 2 == 0) for i, blob in enumerate(blobs)}


def test_arrow_batches_are_the_rows_asked_for(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([5, 1, 9]))
    arrays = ids(make_loader(source, 4))
    batches = list(make_loader(source, 4, arrow=True))
    assert all(isinstance(b, pa.RecordBatch) for b in batches)
    assert [b.column(0).to_pylist() for b in batches] == arrays


def test_columns_are_chosen_and_named(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of([every_kind()])
    (batch,) = make_loader(source, 3, columns=["text", "int"])
    assert list(batch) == ["text", "int"]
    with pytest.raises(UsageError, match="no column 'ints'; there is int, float"):
        make_loader(source, columns=["ints"])


def test_a_batch_is_its_own_memory(make_loader: MakeLoader, source_of: SourceOf) -> None:
    """A training loop may keep a batch as long as it wants, whatever is loaded meanwhile."""
    for shuffle in (True, "blocks", False):
        loader = make_loader(source_of(numbered([64] * 40)), 32, shuffle=shuffle, memory=1)
        kept = [(batch["id"], batch["id"].copy()) for batch in loader]
        for given, copy in kept:
            np.testing.assert_array_equal(given, copy)
        assert sorted(flat([b.tolist() for b, _ in kept])) == list(range(64 * 40))


# --- the order, and going on in it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, "full", "blocks", False])
@pytest.mark.parametrize("drop_last", [False, True])
def test_stopping_anywhere_and_going_on_changes_nothing(
    make_loader: MakeLoader, source_of: SourceOf, shuffle: Any, drop_last: bool
) -> None:
    source = source_of(numbered([7, 1, 12, 3, 8]))
    options: dict[str, Any] = {
        "shuffle": shuffle,
        "drop_last": drop_last,
        "lanes": None if shuffle in {False, "blocks"} else 3,
    }
    whole = make_loader(source, 4, **options)
    first, second = ids(whole), ids(whole)
    assert sorted(flat(first)) == sorted(set(flat(first)))
    assert len(flat(first)) == (28 if drop_last else 31)
    assert whole.receipt().complete
    for stop in range(len(first) + 1):
        before = make_loader(source, 4, **options)
        taken = ids(itertools.islice(before, stop))
        state = json.loads(json.dumps(before.state_dict()))
        after = make_loader(source, 4, **options)
        after.load_state_dict(state)
        left = ids(after)
        assert taken + left == (first if stop < len(first) else first + second)
        if 0 < stop < len(first):
            parts = [before.receipt(), after.receipt()]
            assert merge_receipts(parts).proof == whole.expected(0).proof


def test_a_loop_left_early_goes_on_and_the_next_epoch_is_another_order(
    make_loader: MakeLoader, source_of: SourceOf
) -> None:
    source = source_of(numbered([16] * 4))
    whole = make_loader(source, 8)
    first, second = ids(whole), ids(whole)
    assert first != second
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(64))
    loader = make_loader(source, 8)
    for i, _batch in enumerate(loader):
        if i == 2:
            break
    assert (loader.epoch, loader.position) == (0, 24)
    assert ids(loader) == first[3:]
    assert (loader.epoch, loader.position) == (1, 0)
    loader.set_epoch(0)
    assert ids(loader) == first


def test_one_loop_at_a_time(make_loader: MakeLoader, source_of: SourceOf) -> None:
    loader = make_loader(source_of(numbered([16] * 4)), 8)
    stale = iter(loader)
    next(stale)
    fresh = iter(loader)
    next(fresh)
    with pytest.raises(UsageError, match="overtaken"):
        next(stale)
    next(fresh)
    loader.close()
    with pytest.raises(UsageError, match="overtaken"):
        next(fresh)
    with pytest.raises(UsageError, match="closed"):
        iter(loader)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("replication", [1, 2])
def test_ranks_share_each_batch_and_their_receipts_are_one(
    make_loader: MakeLoader, source_of: SourceOf, world_size: int, replication: int
) -> None:
    source = source_of(numbered([10] * 9 + [1]))
    alone = make_loader(source, 16)
    expected = [sorted(batch) for batch in ids(alone)]
    ranks = [
        make_loader(source, 16, rank=r, world_size=world_size * replication, replication=replication)
        for r in range(world_size * replication)
    ]
    given = [ids(loader) for loader in ranks]
    for r in range(0, len(ranks), replication):
        assert all(given[r] == given[r + k] for k in range(replication))
    for step, rows in enumerate(expected):
        assert sorted(flat([g[step] for g in given[::replication]])) == rows
    assert len({json.dumps(loader.state_dict()) for loader in ranks}) == 1
    merged = merge_receipts([loader.receipt() for loader in ranks])
    assert merged.complete
    assert merged.proof == alone.receipt().proof == alone.expected(0).proof


# --- states that don't fit --------------------------------------------------------------------------------------


def test_a_state_of_another_feed_is_refused_by_the_difference(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([16] * 4))
    loader = make_loader(source, 8, seed=1)
    state = loader.state_dict()
    others = {
        "the seed is 1 there and 2 here": make_loader(source, 8, seed=2),
        "the shuffle is window there and full here": make_loader(source, 8, shuffle="full"),
        "the dataset version is": make_loader(source_of(numbered([16] * 5)), 8, seed=1),
        "the number of lanes": make_loader(source, 8, lanes=4),
    }
    for words, other in others.items():
        with pytest.raises(UsageError, match=words):
            other.load_state_dict(state)
        assert len(ids(other)) in {8, 10}  # and it still feeds


def test_an_edited_or_foreign_state_is_refused(make_loader: MakeLoader, source_of: SourceOf) -> None:
    loader = make_loader(source_of(numbered([16] * 4)), 8)
    next(iter(loader))
    state = loader.state_dict()
    for wrong, words in (
        ({**state, "position": 16}, "edited"),
        ({k: v for k, v in state.items() if k != "check"}, "edited"),
        ({**state, "format": "millrace-feed/9"}, "upgrade"),
        ({}, "not a loader's state"),
        ([1], "not a loader's state"),
        (None, "not a loader's state"),
    ):
        with pytest.raises(UsageError, match=words):
            loader.load_state_dict(wrong)  # type: ignore[arg-type]


def test_another_batch_size_goes_on_where_it_can(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([16] * 4))
    order = flat(ids(make_loader(source, 8)))
    loader = make_loader(source, 8)
    assert flat(ids(itertools.islice(loader, 3))) == order[:24]
    state = loader.state_dict()
    smaller = make_loader(source, 12)
    smaller.load_state_dict(state)
    assert flat(ids(smaller)) == order[24:]
    wrong = make_loader(source, 16)
    with pytest.raises(UsageError, match="not between two batches of 16; use the batch size it was made with"):
        wrong.load_state_dict(state)


# --- what can't be given ------------------------------------------------------------------------------------------


def test_rows_without_a_value_are_set_aside_and_named(make_loader: MakeLoader, source_of: SourceOf) -> None:
    blocks = [
        pa.record_batch(
            {"id": pa.array(range(10)), "n": pa.array([None if i == 3 else i for i in range(10)], pa.int32())}
        ),
        pa.record_batch({"id": pa.array(range(10, 20)), "n": pa.array(range(10), pa.int32())}),
    ]
    source = source_of(blocks)
    runs = []
    for world_size in (1, 3):
        ranks = [make_loader(source, 6, rank=r, world_size=world_size) for r in range(world_size)]
        given = sorted(flat([flat(ids(loader)) for loader in ranks]))
        assert given == [i for i in range(20) if i != 3]
        merged = merge_receipts([loader.receipt() for loader in ranks])
        (row,) = merged.quarantined
        assert row.row == 3
        assert "column 'n' is null" in row.reason
        assert merged.complete
        runs.append(merged.proof)
        assert [e.kind for loader in ranks for e in loader.events] == ["quarantine"]
    assert len(set(runs)) == 1
    (event,) = make_and_drain(make_loader, source).events
    assert event.sentence.startswith("row 3 of memory@1 is set aside: column 'n' is null")


def make_and_drain(make_loader: MakeLoader, source: Any) -> Loader:
    loader = make_loader(source, 6)
    list(loader)
    return loader


def test_nulls_inside_of_values_are_found(make_loader: MakeLoader, source_of: SourceOf) -> None:
    pair = pa.array([[1, 2], [3, None], None, [5, 6]], pa.list_(pa.int32(), 2))
    some = pa.array([[1], [], [2, None], [3]], pa.list_(pa.int64()))
    source = source_of([pa.record_batch({"id": pa.array(range(4)), "pair": pair, "some": some})])
    loader = make_loader(source, 4, shuffle=False)
    (batch,) = loader
    assert batch["id"].tolist() == [0, 3]
    assert {q.row: q.reason.partition(" has")[0].partition(" is")[0] for q in loader.receipt().quarantined} == {
        1: "column 'pair'",
        2: "column 'pair'",
    }


def test_a_decoder_that_fails_costs_its_row(make_loader: MakeLoader, source_of: SourceOf) -> None:
    blobs = pa.array([bytes([i] * 4) for i in range(12)])
    source = source_of([pa.record_batch({"id": pa.array(range(12)), "blob": blobs})])

    def decode(value: Any) -> Any:
        if value[0] in {2, 7}:
            raise ValueError("no image in it")
        return value.astype(np.int32) * 2

    loader = make_loader(source, 4, decode={"blob": decode})
    seen: dict[int, int] = {}
    for batch in loader:
        assert batch["blob"].shape == (len(batch["id"]), 4)
        seen |= dict(zip(batch["id"].tolist(), batch["blob"][:, 0].tolist(), strict=True))
    assert seen == {i: i * 2 for i in range(12) if i not in {2, 7}}
    receipt = loader.receipt()
    assert sorted(q.row for q in receipt.quarantined) == [2, 7]
    assert receipt.quarantined[0].reason == "decode['blob'] raised ValueError: no image in it"
    assert receipt.complete


def test_too_many_bad_rows_stop_the_feed(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of([pa.record_batch({"n": pa.array([None] * 20 + [1] * 80, pa.int32())})])
    with pytest.raises(QuarantineExceeded, match=r"allows; .*the newest: row \d+ of memory@1 .*column 'n' is null"):
        list(make_loader(source, 10, quarantine=0.05))


def test_a_block_that_cannot_be_decoded_is_set_aside_row_by_row(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([5, 5, 5]))
    source.broken[1] = TransformError("block 12ab can't be decoded: no such codec")
    loader = make_loader(source, 4)
    assert sorted(flat(ids(loader))) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    receipt = loader.receipt()
    assert sorted(q.row for q in receipt.quarantined) == [5, 6, 7, 8, 9]
    assert receipt.complete


def test_a_block_that_is_nowhere_is_an_error_and_can_come_back(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([16] * 8))
    source.broken[5] = Unavailable("no whole replica of shards/ab is left")
    loader = make_loader(source, 8)
    taken: list[list[int]] = []
    with pytest.raises(Unavailable, match="no whole replica"):
        taken.extend(batch["id"].tolist() for batch in loader)
    del source.broken[5]
    taken += ids(loader)
    assert sorted(flat(taken)) == list(range(128))
    assert loader.receipt().complete


# --- memory ---------------------------------------------------------------------------------------------------------


def test_what_is_loaded_ahead_keeps_to_the_budget(make_loader: MakeLoader, source_of: SourceOf) -> None:
    rows = pa.array(np.zeros(2**17, np.uint8))
    source = source_of([pa.record_batch({"x": rows}) for _ in range(64)])
    loader = make_loader(source, 4096, shuffle="blocks", memory=8 * 2**17)
    for _batch in loader:
        assert loader.stats()["memory_bytes"] <= 12 * 2**17
    assert sorted(source.fetched) == list(range(64))  # each once


def test_receipts_don_t_merge_when_something_is_missing(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([10] * 4))
    ranks = [make_loader(source, 8, rank=r, world_size=2) for r in range(2)]
    for loader in ranks:
        list(loader)
    parts = [loader.receipt() for loader in ranks]
    with pytest.raises(UsageError, match="20 are missing"):
        merge_receipts(parts[:1])
    whole = merge_receipts(parts)
    with pytest.raises(UsageError, match="there twice"):
        merge_receipts([*parts, Receipt.from_plain({**whole.plain()})])
    with pytest.raises(UsageError, match="edited"):
        Receipt.from_plain({**whole.plain(), "rows": 41})
    with pytest.raises(UsageError, match="no receipt"):
        merge_receipts([])
    list(ranks[0])
    with pytest.raises(UsageError, match="different feeds: epoch 1"):
        merge_receipts([ranks[0].receipt(), parts[1]])


class Shelf:
    """A cache that keeps everything, and what it is told about when blocks are needed."""

    def __init__(self) -> None:
        self.blocks: dict[str, bytes] = {}
        self.told: dict[str, float] = {}

    def read(self, name: str, alloc: Callable[[int], memoryview]) -> bool:
        if name not in self.blocks:
            return False
        alloc(len(self.blocks[name]))[:] = self.blocks[name]
        return True

    async def fill(self, name: str, fetch: Any) -> Any:
        if name in self.blocks:
            return None
        pieces = await fetch()
        self.blocks[name] = b"".join(pieces)
        return pieces

    def needed_many(self, needs: Any, *, after_read: bool = False) -> None:
        assert after_read
        self.told |= dict(needs)


def test_the_cache_hears_of_each_block_that_is_done_with(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of(numbered([2000] * 60))
    shelf = Shelf()
    loader = make_loader(source, 100, shuffle="blocks", memory=10 * 2**16, cache=shelf)
    list(loader)
    list(loader)
    assert len(shelf.told) == 60
    assert sorted(source.fetched) == list(range(60))  # once: the second epoch was all on the shelf
