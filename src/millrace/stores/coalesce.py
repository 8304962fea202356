"""Turning many small ranges of one object into few larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from millrace.core.ports import RangeRequest

__all__ = ["Span", "coalesce"]


@dataclass(frozen=True, slots=True)
class Span:
    """One request that answers several.

    Attributes:
        request: What to ask for.
        parts: Which of the original requests it answers: their index and where they begin in it.
    """

    request: RangeRequest
    parts: tuple[tuple[int, int], ...]


def coalesce(requests: Sequence[RangeRequest], *, gap_bytes: int, span_bytes: int) -> list[Span]:
    """Join ranges of one object and one version that lie close together.

    Args:
        requests: In any order. One with ``length`` None stays alone, as its end isn't known.
        gap_bytes: Bytes nobody asked for that may be read between two ranges.
        span_bytes: A joined range is at most this long; a single longer range stays as it is.

    Returns:
        Spans in the order of their first bytes within each object; every request is a part of exactly one.
    """
    groups: dict[tuple[str, str | None], list[tuple[int, int, int]]] = {}
    spans = []
    for index, request in enumerate(requests):
        if request.length is None:
            spans.append(Span(request, ((index, 0),)))
        else:
            end = request.start + request.length
            groups.setdefault((request.key, request.version), []).append((request.start, end, index))
    for (key, version), ranges in groups.items():
        ranges.sort()
        base, end, first = ranges[0]
        parts = [(first, 0)]
        for start, stop, index in ranges[1:]:
            if start - end <= gap_bytes and max(stop, end) - base <= span_bytes:
                end = max(end, stop)
                parts.append((index, start - base))
                continue
            spans.append(Span(RangeRequest(key, base, end - base, version), tuple(parts)))
            base, end, parts = start, stop, [(index, 0)]
        spans.append(Span(RangeRequest(key, base, end - base, version), tuple(parts)))
    return spans
