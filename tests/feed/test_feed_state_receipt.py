"""States and receipts: small documents that fit together, or say why they don't."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import QuarantineExceeded, TransformError, UsageError
from millrace.feed.loader import Loader
from millrace.feed.receipt import QuarantinedRow, Receipt, Traffic, add_traffic, merge_receipts, traffic_since
from millrace.feed.state import Place, decode_state, encode_state
from millrace.feed.tally import RowTally

MakeLoader = Callable[..., Loader]
SourceOf = Callable[[Sequence[pa.RecordBatch]], Any]

IDENTITY = {
    "datasets": ["ab" * 32],
    "seed": 2**64 - 1,
    "shuffle": "window",
    "lanes": 16,
    "window": [4],
    "order": 1,
    "mix": None,
}
OTHERS: dict[str, tuple[Any, str]] = {
    "datasets": (["cd" * 32], "the dataset version is abababababab there and cdcdcdcdcdcd here"),
    "seed": (3, "the seed is 18446744073709551615 there and 3 here"),
    "shuffle": ("full", "the shuffle is window there and full here"),
    "lanes": (8, "the number of lanes is 16 there and 8 here"),
    "window": ([4, 2], "the shuffle window is 4 there and 4, 2 here"),
    "order": (2, "the version of the order itself is 1 there and 2 here"),
    "mix": ([[100, [70, 30]]], "the mix of streams is None there and 100, 70, 30 here"),
}

# --- states ---------------------------------------------------------------------------------------------------------


@given(epoch=st.integers(0, 2**70), position=st.integers(0, 2**50), batch_size=st.integers(1, 2**40))
def test_a_state_goes_through_json(epoch: int, position: int, batch_size: int) -> None:
    state = encode_state(IDENTITY, Place(epoch, position), batch_size=batch_size)
    there = json.dumps(state)
    assert len(there) < 500
    assert decode_state(json.loads(there), IDENTITY) == decode_state(state, IDENTITY) == Place(epoch, position)


@pytest.mark.parametrize("key", OTHERS)
def test_the_difference_is_named(key: str) -> None:
    value, words = OTHERS[key]
    state = encode_state(IDENTITY, Place(1, 32), batch_size=32)
    with pytest.raises(UsageError, match=words) as raised:
        decode_state(state, {**IDENTITY, key: value})
    assert "loader.set_epoch(N)" in str(raised.value)


@given(data=st.data())
def test_any_edit_is_noticed(data: st.DataObject) -> None:
    state = encode_state(IDENTITY, Place(1, 32), batch_size=32)
    key = data.draw(st.sampled_from(sorted(state)))
    values = st.none() | st.integers() | st.text() | st.lists(st.integers()) | st.booleans()
    value = data.draw(values.filter(lambda v: json.dumps(v) != json.dumps(state[key])))
    edited = {**state, key: value}
    for wrong in (edited, {k: v for k, v in state.items() if k != key}, {**state, "more": 1}):
        with pytest.raises(UsageError, match=r"edited|upgrade it|not a loader's state"):
            decode_state(wrong, IDENTITY)


@pytest.mark.parametrize("place", [{"epoch": -1}, {"position": 1.5}, {"epoch": None}, {"position": "0"}])
def test_a_state_that_somebody_made_up(place: dict[str, Any]) -> None:
    made = encode_state(IDENTITY, replace(Place(0, 0), **place), batch_size=1)
    with pytest.raises(UsageError, match="are not whole numbers: it is not one that Millrace wrote"):
        decode_state(made, IDENTITY)


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "0", None])
def test_what_is_no_epoch(epoch: Any, make_loader: MakeLoader, source_of: SourceOf) -> None:
    loader = make_loader(source_of([pa.record_batch({"id": pa.array([1])})]))
    with pytest.raises(UsageError, match="is not an epoch; they are counted from 0"):
        loader.set_epoch(epoch)


# --- receipts ------------------------------------------------------------------------------------------------------


def receipt(begin: int, end: int, *, rank: int = 0, world_size: int = 1, **more: Any) -> Receipt:
    """Of every ``world_size``-th position."""
    tally = RowTally()
    mine = np.arange(begin + rank, end, world_size)
    tally.add(mine, np.zeros(len(mine), np.int32), mine * 7)
    made = Receipt(
        datasets=("ab" * 32,),
        order="cd" * 32,
        epoch=2,
        begin=begin,
        end=end,
        total=100,
        rows=tally.rows,
        digest=tally.hexdigest(),
        quarantined=(),
        share=(rank, world_size, 1),
    )
    return replace(made, **more)


@given(
    cuts=st.lists(st.integers(0, 100), max_size=5),
    worlds=st.lists(st.integers(1, 5), min_size=7, max_size=7),
    dice=st.randoms(),
)
def test_parts_of_an_epoch_are_one_whatever_the_cuts_and_worlds(cuts: list[int], worlds: list[int], dice: Any) -> None:
    edges = sorted([0, *cuts, 100])
    parts = [
        receipt(a, b, rank=rank, world_size=size)
        for (a, b), size in zip(itertools.pairwise(edges), worlds, strict=False)
        for rank in range(size)
    ]
    dice.shuffle(parts)
    merged = merge_receipts([Receipt.from_plain(json.loads(json.dumps(p.plain()))) for p in parts])
    assert merged.complete
    assert merged.proof == merge_receipts([receipt(0, 100)]).proof
    assert Receipt.from_plain(merged.plain()) == merged


def test_a_rank_that_was_given_nothing_is_no_hole() -> None:
    whole = receipt(0, 100)
    for idle in (receipt(50, 50), receipt(0, 0), receipt(100, 100)):
        assert merge_receipts([whole, idle]).complete
    assert not merge_receipts([receipt(50, 50)]).complete


def test_groups_that_share_rows_count_once() -> None:
    pair = [replace(receipt(0, 100), share=(rank, 2, 2)) for rank in (0, 1)]
    assert merge_receipts(pair).rows == 100


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([], "no receipt to merge"),
        ([receipt(0, 60), receipt(50, 100)], "overlap between 50 and 60 of epoch 2"),
        ([receipt(0, 40), receipt(50, 100)], "leave out positions between 40 and 50"),
        ([receipt(0, 100, rank=0, world_size=2)], "50 are missing; merge those of every rank"),
        ([receipt(0, 100), receipt(0, 100, rank=0, world_size=2)], "some rank's is there twice"),
        ([receipt(0, 100), receipt(0, 100, epoch=3)], "different feeds: epoch 2 of order cdcdcdcdcdcd and epoch 3"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_parts_that_don_t_fit_say_so(parts: list[Receipt], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        merge_receipts(parts)


@pytest.mark.parametrize(
    "edit",
    [
        {"rows": 99},
        {"digest": "0" * 32},
        {"order": "x"},
        {"epoch": 3},
        {"begin": 1},
        {"end": 99},
        {"quarantined": [{"position": 1, "dataset": "d", "row": 1, "reason": ""}]},
        {"proof": ""},
    ],
    ids=lambda v: next(iter(v)),
)
def test_an_edited_receipt_is_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="edited: its proof doesn't fit"):
        Receipt.from_plain({**receipt(0, 100).plain(), **edit})


@pytest.mark.parametrize(
    "edit",
    [
        {"digest": "not hexadecimal"},
        {"share": [1, 1, 1]},
        {"share": [0, 1]},
        {"share": [0, 1, 0]},
        {"quarantined": [{"row": 1}]},
        {"traffic": [1]},
        {"rows": "many"},
        {"datasets": None},
    ],
    ids=str,
)
def test_what_is_no_receipt(edit: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="this is not a feed's receipt"):
        Receipt.from_plain({**receipt(0, 100).plain(), **edit})


@pytest.mark.parametrize("document", [{}, [], "text", 1, None])
def test_other_documents(document: Any) -> None:
    with pytest.raises(UsageError, match="this is not a feed's receipt"):
        Receipt.from_plain(document)


def test_reasons_are_no_part_of_the_proof_and_rows_are() -> None:
    row = QuarantinedRow(3, "ab" * 32, 21, "one reason")
    made = receipt(0, 100, quarantined=(row,))
    assert made.proof == replace(made, quarantined=(replace(row, reason="another"),)).proof
    assert made.proof != replace(made, quarantined=(replace(row, position=4),)).proof


# --- traffic ---------------------------------------------------------------------------------------------------------

A = Traffic("a", "aws", "r", 10, 1, 0.5)
B = Traffic("b", "onprem", "r", 5, 0, None)


def test_traffic_adds_up_by_store() -> None:
    assert add_traffic([B, A, A]) == (Traffic("a", "aws", "r", 20, 2, 1.0), B)
    assert add_traffic([]) == ()
    assert traffic_since(add_traffic([A, B, A]), [A]) == (A, B)
    assert traffic_since([A], [A]) == (Traffic("a", "aws", "r", 0, 0, 0.0),)


def test_a_receipt_tells_of_its_own_epoch_s_traffic(make_loader: MakeLoader, source_of: SourceOf) -> None:
    moved = [Traffic("a", "aws", "r", 1000, 0, 0.25)]
    source = source_of([pa.record_batch({"id": pa.array(range(8))})])
    loader = make_loader(source, 4, traffic=lambda: tuple(moved))
    assert [t.bytes for t in loader.receipt().traffic] == [0]
    for read in (10, 20):
        batches = iter(loader)
        moved[0] = replace(moved[0], bytes=moved[0].bytes + read)
        list(batches)
        assert [t.bytes for t in loader.receipt().traffic] == [read]


# --- rows that are set aside -----------------------------------------------------------------------------------------


def test_none_may_be_set_aside_where_that_was_said(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of([pa.record_batch({"n": pa.array([None, 1], pa.int32())})])
    with pytest.raises(QuarantineExceeded, match=r"1 rows of epoch 0 .* quarantine=0 allows"):
        list(make_loader(source, quarantine=0))
    assert len(list(make_loader(source, quarantine=0.001))) == 1  # a few may, of a short epoch


def test_a_row_is_told_of_once_however_often_the_loop_is_left(make_loader: MakeLoader, source_of: SourceOf) -> None:
    values = pa.array([i if i != 20 else None for i in range(32)], pa.int32())
    loader = make_loader(source_of([pa.record_batch({"n": values})]), 4, shuffle=False)
    given = [next(iter(loader))["n"].tolist() for _ in range(8)]
    assert [i for step in given for i in step] == [i for i in range(32) if i != 20]
    assert [e.kind for e in loader.events] == ["quarantine"]
    assert len(loader.receipt().quarantined) == 1


def test_events_are_bounded(make_loader: MakeLoader, source_of: SourceOf) -> None:
    source = source_of([pa.record_batch({"id": pa.array(range(1500))})])
    source.broken[0] = TransformError("no such codec")
    loader = make_loader(source, 100, shuffle=False)
    assert sum(len(batch["id"]) for batch in loader) == 0
    assert len(loader.events) == loader.stats()["events"] == 1000
    assert len(loader.receipt().quarantined) == 1500
    assert loader.receipt().complete
