"""What was given of an epoch, as it is given: the making of a receipt."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import QuarantineExceeded
from millrace.core.ports import Clock
from millrace.feed.events import FeedEvent
from millrace.feed.receipt import QuarantinedRow, Receipt, Traffic
from millrace.feed.recipe import Recipe
from millrace.feed.spans import Span
from millrace.feed.state import Place
from millrace.feed.tally import RowTally

__all__ = ["Account", "Part", "check_quarantine"]

_ALWAYS = 10
"""Rows that may be set aside however small the epoch is, unless none may."""


@dataclass(frozen=True, slots=True)
class Part:
    """What was given between two moments.

    Attributes:
        rows, digest: How many rows, and their digest; see ``tally.RowTally``.
        quarantined: Those between them that can't be given.
    """

    rows: int
    digest: str
    quarantined: tuple[QuarantinedRow, ...]


class Account:
    """Of one epoch, from where this process took it up.

    Rows are counted when their span ends or somebody asks, not batch by batch.

    Args:
        recipe: Of the loader.
        place: Where it was taken up.
        order: The order's fingerprint.
        total: Positions in the epoch.
        clock: For events.
        events: Where rows that are set aside are told of.
    """

    def __init__(
        self, recipe: Recipe, place: Place, *, order: str, total: int, clock: Clock, events: MutableSequence[FeedEvent]
    ) -> None:
        self._recipe = recipe
        self._epoch, self._begin = place.epoch, place.position
        self._end = place.position
        self._order = order
        self._total = total
        self._clock = clock
        self._events = events
        self._tally = RowTally()
        self._untaken = RowTally()  # of what take_part() has not given yet
        self._taken: set[QuarantinedRow] = set()
        self._quarantined: set[QuarantinedRow] = set()
        self._span: Span | None = None
        self._counted = self._given = 0

    def given(self, span: Span, upto: int, position: int) -> None:
        """A step was given: the span's rows before ``upto``, the epoch's positions before ``position``."""
        if self._span is not span:
            self._count()
            self._span, self._counted = span, 0
        self._given = upto
        self._end = position

    def set_aside(self, span: Span, i: int, reason: str) -> None:
        """Row ``i`` of a span can't be given.

        Raises:
            QuarantineExceeded: these are too many.
        """
        if not span.given[i]:
            return
        span.given[i] = False
        stream, row = int(span.stream[i]), int(span.ids[i])
        version = self._recipe.sources[stream].index.manifest
        found = QuarantinedRow(int(span.positions[i]), version, row, reason)
        if found in self._quarantined:
            return  # a loop that was left and taken up again finds it again
        self._quarantined.add(found)
        sentence = f"row {row} of {self._recipe.labels[stream]} is set aside: {reason}"
        self._events.append(FeedEvent("quarantine", sentence, self._clock.now_ms()))
        check_quarantine(self._recipe, self._epoch, self._total, len(self._quarantined), sentence)

    def take_part(self) -> Part:
        """What was given since this was last asked."""
        self._count()
        tally, self._untaken = self._untaken, RowTally()
        new = {q for q in self._quarantined - self._taken if q.position < self._end} if self._quarantined else set()
        self._taken |= new
        return Part(tally.rows, tally.hexdigest(), tuple(sorted(new)))

    def receipt(self, traffic: Sequence[Traffic]) -> Receipt:
        """What was given so far."""
        self._count()
        sharing = self._recipe.sharing
        return Receipt(
            datasets=tuple(s.index.manifest for s in self._recipe.sources),
            order=self._order,
            epoch=self._epoch,
            begin=self._begin,
            end=self._end,
            total=self._total,
            rows=self._tally.rows,
            digest=self._tally.hexdigest(),
            quarantined=tuple(sorted(q for q in self._quarantined if q.position < self._end)),
            share=(sharing.rank, sharing.world_size, sharing.replication),
            traffic=tuple(traffic),
        )

    def _count(self) -> None:
        span, a, b = self._span, self._counted, self._given
        if span is None or a == b:
            return
        kept = a + np.flatnonzero(span.given[a:b])
        new = RowTally()
        new.add(span.positions[kept], span.stream[kept], span.ids[kept])
        self._tally.merge(new)
        self._untaken.merge(new)
        self._counted = b


def check_quarantine(recipe: Recipe, epoch: int, total: int, count: int, newest: str) -> None:
    """Whether ``count`` rows of an epoch of ``total`` may be set aside.

    Raises:
        QuarantineExceeded: these are too many.
    """
    if count > (max(recipe.quarantine * total, _ALWAYS) if recipe.quarantine else 0):
        raise QuarantineExceeded(
            f"{count} rows of epoch {epoch} can't be given, more than quarantine={recipe.quarantine:g} allows; "
            "raise it, or mend them at ingest (validate, sql); "
            f"the newest: {newest}"
        )
