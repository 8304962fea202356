"""Joining ranges: every request is answered, by bytes that were asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.core.ports import RangeRequest
from millrace.stores.coalesce import coalesce

REQUESTS = st.lists(
    st.builds(
        RangeRequest,
        st.sampled_from(["a", "b"]),
        st.integers(0, 300),
        st.none() | st.integers(0, 60),
        st.sampled_from([None, "v1"]),
    ),
    max_size=20,
)


@given(requests=REQUESTS, gap_bytes=st.integers(0, 50), span_bytes=st.integers(1, 200))
def test_slices_of_the_spans_are_what_was_asked_for(
    requests: list[RangeRequest], gap_bytes: int, span_bytes: int
) -> None:
    whole = {"a": bytes(range(256)), "b": bytes(255 - n for n in range(200))}
    spans = coalesce(requests, gap_bytes=gap_bytes, span_bytes=span_bytes)
    answered = []
    for span in spans:
        asked = span.request
        end = None if asked.length is None else asked.start + asked.length
        view = whole[asked.key][asked.start : end]
        assert len(span.parts) == 1 or (asked.length or 0) <= span_bytes
        for index, offset in span.parts:
            request = requests[index]
            answered.append(index)
            assert (request.key, request.version) == (asked.key, asked.version)
            stop = None if request.length is None else request.start + request.length
            wanted = whole[request.key][request.start : stop]
            assert view[offset : None if request.length is None else offset + request.length] == wanted
    assert sorted(answered) == list(range(len(requests)))


def test_neighbours_become_one_request_and_strangers_do_not() -> None:
    requests = [RangeRequest("a", at, 10, "v") for at in (1000, 0, 10, 25, 5000)]
    spans = coalesce(requests, gap_bytes=5, span_bytes=100)
    assert [(span.request.start, span.request.length) for span in spans] == [(0, 35), (1000, 10), (5000, 10)]
