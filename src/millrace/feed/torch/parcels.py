"""What worker processes hand over: batches with their account, so that a receipt says what was really given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, NamedTuple

from millrace.core import errors
from millrace.core.errors import MillraceError
from millrace.core.messages import Failure
from millrace.feed.account import Part, check_quarantine
from millrace.feed.events import FeedEvent
from millrace.feed.loader import Loader
from millrace.feed.receipt import QuarantinedRow, Receipt, Traffic, add_traffic
from millrace.feed.state import Place
from millrace.feed.tally import RowTally

__all__ = ["Collected", "Parcel", "Totals", "add_stats", "collate_parcel", "error_of", "parcels"]

_TOTALS_EVERY: Final = 16
"""Batches of a worker from one report of what it read to the next; the last is told with its last word."""


class Totals(NamedTuple):
    """What a worker read.

    Attributes:
        traffic: By store, in this loop.
        stats: Since it was started; see ``Loader.stats``.
    """

    traffic: tuple[Traffic, ...]
    stats: dict[str, Any]


class Parcel(NamedTuple):
    """What a worker hands over at a time: a batch, its last word of an epoch, or why it can't go on.

    A named tuple, because torch's pinning thread looks into those.

    Attributes:
        worker: Its number.
        batch: A batch, or None.
        given: Whether there is a batch.
        part: What is to be added to the receipt for it.
        events: What went wrong since the last parcel.
        totals: What the worker read so far; not with every parcel.
        failure: Why it can't go on.
    """

    worker: int
    batch: Any = None
    given: bool = False
    part: Part | None = None
    events: tuple[FeedEvent, ...] = ()
    totals: Totals | None = None
    failure: Failure | None = None


def parcels(begin: Callable[[], tuple[Loader, Iterator[Any]]], worker: int) -> Iterator[Parcel]:
    """The parcels of one worker and one epoch: its batches, and a last word.

    Args:
        begin: Opens the loader, and begins on the worker's part of the epoch.
        worker: Its number.
    """
    try:
        loader, batches = begin()
    except MillraceError as error:
        yield Parcel(worker, failure=Failure.of(error, blame="place"))
        return
    failure, told, count = None, _newest(loader), 0
    try:
        for batch in batches:
            part = loader.take_part()
            events, told = _since(loader, told)
            count += 1
            totals = None if count % _TOTALS_EVERY else _totals(loader)
            yield Parcel(worker, batch, True, part, events, totals)
    except MillraceError as error:
        failure = Failure.of(error, blame="place")
    events, told = _since(loader, told)
    yield Parcel(worker, events=events, totals=_totals(loader), failure=failure)


def collate_parcel(collate: Callable[[Any], Any], parcel: Parcel) -> Parcel:
    """The parcel with the user's ``collate_fn`` applied to its batch."""
    return parcel._replace(batch=collate(parcel.batch)) if parcel.given else parcel


def error_of(failure: Failure, worker: int) -> MillraceError:
    """The error a worker failed with, with its own sentence."""
    kind = getattr(errors, failure.kind, MillraceError)
    error: MillraceError = kind(failure.message)
    error.add_note(f"in worker process {worker} of the loader")
    return error


class Collected:
    """What was handed out of an epoch, from parcels; the main process's account.

    Args:
        loader: Stands where the epoch was taken up; gives what a receipt says beside rows.
    """

    def __init__(self, loader: Loader) -> None:
        self._recipe = loader.recipe
        self._empty = loader.receipt()
        self.place = Place(self._empty.epoch, self._empty.begin)
        self._tally = RowTally()
        self._quarantined: set[QuarantinedRow] = set()
        self._traffic: list[Traffic] = []  # of loops that ended
        self._reading: dict[int, tuple[Traffic, ...]] = {}  # worker to what it read in this loop

    @property
    def ended(self) -> bool:
        """Whether the whole epoch was handed out."""
        return self.place.position >= self._empty.total > 0

    def add(self, part: Part) -> None:
        """A batch is handed out.

        Raises:
            QuarantineExceeded: with it, too many rows of the epoch are set aside.
        """
        size = self._recipe.sharing.batch_size
        position = (self.place.position // size + 1) * size
        self._tally.merge(RowTally.from_hex(part.rows, part.digest))
        if part.quarantined:
            self._quarantined.update(part.quarantined)
            newest = part.quarantined[-1]
            sentence = f"row {newest.row} of version {newest.dataset[:12]} is set aside: {newest.reason}"
            check_quarantine(self._recipe, self.place.epoch, self._empty.total, len(self._quarantined), sentence)
        self.place = Place(self.place.epoch, min(position, self._empty.total))

    def begin(self) -> None:
        """Another loop begins: the first over this epoch, or one that goes on with it."""
        self._traffic = [*add_traffic(self._all_traffic())]
        self._reading = {}

    def read(self, worker: int, traffic: tuple[Traffic, ...]) -> None:
        """What a worker read so far in this loop."""
        self._reading[worker] = traffic

    def receipt(self) -> Receipt:
        """What was handed out so far."""
        return replace(
            self._empty,
            end=self.place.position,
            rows=self._tally.rows,
            digest=self._tally.hexdigest(),
            quarantined=tuple(sorted(self._quarantined)),
            traffic=add_traffic(self._all_traffic()),
        )

    def _all_traffic(self) -> list[Traffic]:
        return [*self._traffic, *(item for items in self._reading.values() for item in items)]


def _totals(loader: Loader) -> Totals:
    return Totals(loader.receipt().traffic, loader.stats())


def _newest(loader: Loader) -> FeedEvent | None:
    events = loader.events
    return events[-1] if events else None


def _since(loader: Loader, told: FeedEvent | None) -> tuple[tuple[FeedEvent, ...], FeedEvent | None]:
    """Events after ``told``, and the newest."""
    new: list[FeedEvent] = []
    for event in reversed(loader.events):
        if event is told:
            break
        new.append(event)
    return tuple(reversed(new)), new[0] if new else told


def add_stats(all_stats: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of several loaders, as one: sums, and the longest wait."""
    names = all_stats[0] if all_stats else {}
    return {name: round((max if name == "waited_max_s" else sum)(s[name] for s in all_stats), 6) for name in names}
