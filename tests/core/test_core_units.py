"""Sizes, durations and shares: what is read is what is meant, and the rest is refused with the way out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.units import format_bytes, format_seconds, parse_duration_s, parse_share, parse_size

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64MB", 64_000_000),
        ("64 MiB", 67_108_864),
        ("1.5GiB", 1_610_612_736),
        (" 10 kb ", 10_000),
        ("0", 0),
        (4096, 4096),
        (1.5, 2),
        ("1e6", 1_000_000),
        (1e16, 10**16),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_as_people_write_them(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("5m", 300), ("1.5h", 5400), ("2d", 172_800), ("250ms", 0.25), (7, 7), ("7", 7), (0.5, 0.5)],
)
def test_durations_as_people_write_them(text: object, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "share"), [("0.1%", 0.001), ("100%", 1), (0, 0), (1, 1), (0.00001, 0.00001), ("1e-05", 1e-5), ("0%", 0)]
)
def test_shares_as_people_write_them(text: object, share: float) -> None:
    assert parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["", "MB", "-1MB", "1,5MB", "64 M B", "nan", "inf", True, None, [64], {"MB": 64}, "0x40"]
)
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="is not a size; write it like 64MB or 64MiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (parse_size, "64Mb/s", "is not a size"),
        (parse_size, "64Mbit", "unknown unit 'mbit'; sizes are in B, KB"),
        (parse_size, "5%", "unknown unit '%'"),
        (parse_duration_s, "5min", "unknown unit 'min'; durations are in ms, s, m, h or d"),
        (parse_duration_s, "-1s", "is not a duration; write it like 90s or 5m"),
        (parse_share, "5MB", "unknown unit 'mb'; a share is written like 0.1% or 0.001"),
        (parse_share, "101%", "more than everything"),
        (parse_share, 1.5, "more than everything"),
        (parse_share, "-1%", "is not a share"),
        (parse_size, "1e400", "beyond all bounds"),
        (parse_size, "9" * 400, "is not a size"),
    ],
)
def test_a_wrong_unit_is_named(parse: object, text: object, words: str) -> None:
    assert callable(parse)
    with pytest.raises(ValueError, match=words):
        parse(text)


def test_a_refusal_does_not_repeat_a_novel() -> None:
    with pytest.raises(ValueError) as caught:
        parse_size("x" * 100_000)
    assert len(str(caught.value)) < 200


@given(st.integers(0, 10**15), st.sampled_from([*UNITS, *BINARY, ""]), st.sampled_from(["", " "]))
def test_whole_sizes_are_exact(number: int, unit: str, gap: str) -> None:
    factor = {**UNITS, **BINARY, "": 1}[unit]
    if number * factor < 2**53:
        assert parse_size(f"{number}{gap}{unit}") == number * factor


@given(st.integers(0, 10**21))
def test_a_size_read_back_from_its_short_form_is_right_to_three_figures(size: int) -> None:
    shown = format_bytes(size)
    number, unit = shown.split()
    assert len(number) <= 5
    if unit in UNITS:
        assert parse_size(shown) == pytest.approx(size, rel=0.00501, abs=0.5)


@given(st.floats(0, 1e9))
def test_any_text_made_of_seconds_is_a_duration(seconds: float) -> None:
    assert parse_duration_s(f"{seconds}s") == pytest.approx(seconds)
    assert parse_duration_s(seconds) == pytest.approx(seconds)


@given(st.text(max_size=20))
def test_any_text_is_a_value_or_a_value_error(text: str) -> None:
    for parse in (parse_size, parse_duration_s, parse_share):
        try:
            value = parse(text)
        except ValueError:
            continue
        assert value >= 0


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (1_500_000_000, "1.5 GB"),
        (999_999, "1 MB"),
        (64_000_000, "64 MB"),
        (5 * 10**13, "50 TB"),
        (25 * 10**17, "2.5 EB"),
        (5 * 10**22, "50000 EB"),
    ],
)
def test_sizes_as_they_are_shown(size: int, shown: str) -> None:
    assert format_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.0s"),
        (1.24, "1.2s"),
        (59.94, "59.9s"),
        (59.96, "1m 00s"),
        (185, "3m 05s"),
        (3599.6, "1h 00m"),
        (7620, "2h 07m"),
    ],
)
def test_durations_as_they_are_shown(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown
