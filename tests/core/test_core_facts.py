"""The records in the coordination store: what is written comes back, what can't be read is named by its key."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import CoordError
from millrace.core.facts import (
    Lineage,
    QuarantineLine,
    ReaderClaim,
    ReplicaEntry,
    ReplicaPage,
    RunProgress,
    RunRecord,
    RunReport,
    StageReport,
    VersionRecord,
    VersionRef,
    decode,
    encode,
)

text = st.sampled_from(["", "a", "name with space", "\n\u00e9\u4e2d\U0001f600", "\x00", '"}'])
counts = st.integers(0, 2**60)
stages = st.builds(StageReport, stage=text, seconds=st.floats(0, 1e9), rows=counts, bytes=counts)
lines = st.builds(QuarantineLine, path=text, position=text, stage=text, rule=text, reason=text)
lineages = st.builds(
    Lineage,
    sources=st.lists(st.dictionaries(text, text | counts, max_size=3), max_size=2).map(tuple),
    spec=st.dictionaries(text, text | counts, max_size=3),
    spec_digest=text,
    plan_digest=text,
    code=st.dictionaries(text, text, max_size=3),
)
reports = st.builds(
    RunReport,
    run=counts,
    state=text,
    dataset=text,
    version=st.none() | counts,
    digest=st.none() | text,
    seconds=st.floats(0, 1e9),
    stages=st.lists(stages, max_size=3).map(tuple),
    quarantine=st.lists(lines, max_size=3).map(tuple),
    notes=st.lists(text, max_size=3).map(tuple),
)
facts = st.one_of(
    st.builds(VersionRef, version=counts, digest=text),
    st.builds(ReaderClaim, who=text, until_ms=counts),
    lineages,
    reports,
    st.builds(
        RunRecord,
        run=counts,
        dataset=text,
        state=st.sampled_from(["running", "paused", "stopped", "failed", "done", "superseded"]),
        identity=text,
        pipeline_file=text,
        created_at_ms=counts,
        phases=st.lists(st.tuples(text, counts, counts), max_size=3).map(tuple),
        lineage=lineages,
        placement=st.dictionaries(text, counts, max_size=2),
        report=st.none() | reports,
        exit_code=st.none() | st.integers(0, 3),
    ),
    st.builds(
        RunProgress,
        phase=text,
        done=counts,
        tasks=counts,
        bytes_done=counts,
        bytes_total=counts,
        rows=counts,
        quarantined=counts,
        bytes_per_s=st.floats(0, 1e12),
        eta_s=st.none() | st.floats(0, 1e9),
        workers=counts,
        at_ms=counts,
    ),
    st.builds(
        ReplicaPage,
        entries=st.lists(
            st.builds(ReplicaEntry, digest=text, key=text, size_bytes=counts, stores=st.dictionaries(text, counts)),
            max_size=3,
        ).map(tuple),
    ),
)


@given(facts)
def test_a_fact_comes_back_as_it_was_and_is_written_in_one_way(fact: VersionRef) -> None:
    again = decode(type(fact), encode(fact), key="k")
    assert again == fact
    assert encode(again) == encode(fact)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "this version can read: Input should be an object"),
        (b'{"version": 1}', "digest: Field required"),
        (b'{"version": "one", "digest": "d"}', "version: Input should be a valid integer"),
        (b'{"version": 1, "digest": "d", "colour": "red"}', "colour: Extra inputs are not permitted"),
    ],
)
def test_what_can_not_be_read_is_named(value: bytes, words: str) -> None:
    """An unknown field is a newer version's: guessing what it means is worse than stopping."""
    with pytest.raises(CoordError) as caught:
        decode(VersionRef, value, key="datasets/a/head")
    assert "the record at datasets/a/head is not a VersionRef this version can read: " in str(caught.value)
    assert words in str(caught.value)


def test_a_stage_of_no_time_has_no_rate() -> None:
    assert StageReport(stage="pack", seconds=0, rows=1, bytes=10**6).mb_per_s == 0
    assert StageReport(stage="pack", seconds=2, rows=1, bytes=10**6).mb_per_s == 0.5


def test_a_version_record_holds_no_place() -> None:
    assert not {"stores", "url", "clouds"} & set(VersionRecord.model_fields)
