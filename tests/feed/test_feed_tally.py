"""The tally of rows: the same whoever counts and in whatever order; another when a row is."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import UsageError
from millrace.feed.tally import RowTally

Rows = list[tuple[int, int, int]]
rows = st.lists(st.tuples(st.integers(0, 2**50 - 1), st.integers(0, 9), st.integers(0, 2**62)), max_size=40)


def columns(some: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    table = np.array(some, np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1].astype(np.int32), table[:, 2]


def tally(some: Rows) -> RowTally:
    counted = RowTally()
    counted.add(*columns(some))
    return counted


@settings(deadline=None)
@given(rows, st.randoms(use_true_random=False), st.integers(0, 40))
def test_it_doesnt_matter_who_counts_what_when(some: Rows, random: Any, cut: int) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)
    parts = tally(shuffled[:cut])
    parts.merge(tally(shuffled[cut:]))
    assert parts == tally(some)
    assert parts.hexdigest() == tally(some).hexdigest()
    assert parts.rows == len(some)


@settings(deadline=None)
@given(rows.filter(bool), st.integers(0, 39), st.integers(0, 2), st.integers(1, 9))
def test_any_other_row_shows(some: Rows, at: int, field: int, by: int) -> None:
    at %= len(some)
    other = [list(row) for row in some]
    other[at][field] ^= by
    assert tally([tuple(row) for row in other]).hexdigest() != tally(some).hexdigest()  # type: ignore[misc]


@settings(deadline=None)
@given(rows.filter(bool))
def test_lost_and_repeated_rows_show(some: Rows) -> None:
    assert tally(some[:-1]) != tally(some)
    assert tally([*some, some[0]]).hexdigest() != tally(some).hexdigest()


def test_rows_that_changed_places_show() -> None:
    assert tally([(0, 0, 5), (1, 0, 6)]) != tally([(0, 0, 6), (1, 0, 5)])
    assert tally([(0, 0, 5), (1, 1, 5)]) != tally([(0, 1, 5), (1, 0, 5)])
    assert tally([(3, 0, 4)]) != tally([(4, 0, 3)])


def test_no_rows_have_the_sum_zero() -> None:
    assert RowTally().hexdigest() == "0" * 32
    assert RowTally().rows == 0


def test_the_hash_stays_what_it_is() -> None:
    counted = RowTally()
    counted.add(np.arange(10_000), np.arange(10_000, dtype=np.int32) % 3, np.arange(10_000)[::-1] * 7)
    assert counted.hexdigest() == "ea43c2f4fe3e9bfd5dcc2a3ed1bee14c"


@settings(deadline=None)
@given(rows)
def test_it_goes_through_json(some: Rows) -> None:
    counted = tally(some)
    again = RowTally.from_plain(json.loads(json.dumps(counted.plain())))
    assert again == counted
    assert RowTally.from_hex(counted.rows, counted.hexdigest()) == counted
    again.add(*columns([(1, 1, 1)]))
    assert again == tally([*some, (1, 1, 1)])


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({}, "rows"),
        ({"rows": -1, "sum": "0" * 32}, "rows"),
        ({"rows": True, "sum": "0" * 32}, "rows"),
        ({"rows": 1.5, "sum": "0" * 32}, "rows"),
        ({"rows": 1}, "sum"),
        ({"rows": 1, "sum": "0" * 31}, "sum"),
        ({"rows": 1, "sum": "0x" + "0" * 30}, "sum"),
        ({"rows": 1, "sum": 7}, "sum"),
        ([1, 2], "object"),
    ],
)
def test_an_edited_tally_is_refused_by_its_field(value: Any, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        RowTally.from_plain(value)


def test_columns_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        RowTally().add(np.arange(3), np.zeros(2, np.int32), np.arange(3))
