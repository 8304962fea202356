"""A ``torch.utils.data.DataLoader`` over a feed: exact with any number of workers, and stateful."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, Final

import torch
from torch.utils.data import DataLoader

from millrace.core.errors import UsageError
from millrace.feed.events import FeedEvent
from millrace.feed.loader import Loader
from millrace.feed.receipt import Receipt
from millrace.feed.state import Place, encode_state
from millrace.feed.torch.dataset import FeedDataset
from millrace.feed.torch.parcels import Collected, Parcel, add_stats, collate_parcel, error_of

__all__ = ["FeedDataLoader"]

_EVENTS_KEPT: Final = 1000
_OURS: Final = {
    "sampler": "the order is the feed's: shuffle= and seed= choose it",
    "batch_sampler": "the order is the feed's: batch_size=, shuffle= and seed= choose it",
    "in_order": "batches come in their order, whatever the number of workers",
}


class FeedDataLoader(DataLoader[Any]):  # type: ignore[misc,unused-ignore]  # torch isn't always there to be checked
    """Batches of one rank: ``for batch in loader`` is one epoch, the next ``for`` the next.

    The same batches in the same order with 0 or N workers. What it says of itself (:meth:`state_dict`,
    :meth:`receipt`) is of batches that were handed out, not of those that workers made ahead; a state fits any world
    size and any number of workers.

    Args:
        make: Gives a loader: the method ``loader`` of a dataset or a mix.
        num_workers: Processes that make batches. 0 is right unless ``decode=`` functions take long: the feed reads
            ahead with threads. Each worker has its own shuffle windows in memory.
        collate_fn: From a batch (a dict of tensors) to what the loop gets; run in workers.
        pin_memory: Copy into page-locked memory, if there is a device.
        multiprocessing_context: ``"spawn"`` (default) or ``"forkserver"``, or such a context.
        prefetch_factor, persistent_workers, timeout, worker_init_fn, generator: See ``DataLoader``; the generator is
            one of its own by default, so that the program's random numbers don't depend on workers.
        options: For ``make``: ``batch_size``, ``seed``, ``shuffle``, ``rank``, ``world_size``, ``columns``, ``decode``
            and others.

    Raises:
        UsageError: an option doesn't fit; says what would.
    """

    def __init__(
        self,
        make: Callable[..., Loader],
        *,
        num_workers: int = 0,
        collate_fn: Callable[[Any], Any] | None = None,
        pin_memory: bool = False,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        generator: Any = None,
        **options: Any,
    ) -> None:
        for name, why in _OURS.items():
            if name in options:
                raise UsageError(f"{name}= is not for a feed: {why}")
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
            raise UsageError(f"{num_workers!r} can't be a number of workers; it is a whole number from 0 up")
        context = _context(multiprocessing_context, num_workers)
        if pin_memory and num_workers == 0:
            options["pin_memory"] = True
        dataset = FeedDataset(make, **options)
        self._feed: Loader = dataset.loader
        if num_workers:
            _check_sendable(dataset, collate_fn, worker_init_fn)
            dataset.in_parcels()
        if generator is None:
            generator = torch.Generator().manual_seed(int(self._feed.recipe.identity["seed"]) % 2**63)
        collate = _as_it_is if collate_fn is None else collate_fn
        self._collected: Collected | None = None if num_workers == 0 else Collected(self._feed)
        self._running = 0  # which loop is the one that may go on; negative when closed
        self._events: list[FeedEvent] = []
        self._past: list[dict[str, Any]] = []  # stats of workers that ended
        self._present: dict[int, dict[str, Any]] = {}  # and of those there are
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=functools.partial(collate_parcel, collate) if num_workers else collate,
            pin_memory=pin_memory and num_workers > 0 and torch.accelerator.is_available(),
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=context,
            generator=generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    def __len__(self) -> int:
        """Steps in an epoch, the same for every rank and any number of workers."""
        return len(self._feed)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of."""
        return self._next_place().epoch

    @property
    def position(self) -> int:
        """How many rows of it were handed out, over all ranks."""
        return self._next_place().position

    @property
    def events(self) -> tuple[FeedEvent, ...]:
        """What went wrong while the feed went on, in workers too; the newest 1,000."""
        return (*self._feed.events, *self._events)[-_EVENTS_KEPT:]

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: small, safe for JSON, the same on every rank after the same step, with workers or not."""
        recipe = self._feed.recipe
        return encode_state(recipe.identity, self._next_place(), batch_size=recipe.sharing.batch_size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of another world size or number of workers too, or of a loader without torch.

        Raises:
            UsageError: it is of another version, seed or order, or was edited; names the difference.
        """
        self._check_open()
        self._feed.load_state_dict(state)
        self._moved()

    def set_epoch(self, epoch: int) -> None:
        """Begin at the start of an epoch, whatever was handed out before.

        Raises:
            UsageError: it isn't a whole number from 0.
        """
        self._check_open()
        self._feed.set_epoch(epoch)
        self._moved()

    def receipt(self) -> Receipt:
        """What this rank was handed of the current epoch, or of the last one right after its end.

        What workers read is known as of the newest batches they handed in, and whole when the epoch has ended.
        ``gather_receipts`` makes one of those of all ranks.
        """
        if self._collected is None:
            return self._feed.receipt()
        return self._collected.receipt()

    def expected(self, epoch: int | None = None) -> Receipt:
        """The receipt that an epoch without a row set aside must merge to; see ``Loader.expected``."""
        if epoch is None and self._collected is not None:
            epoch = self._collected.place.epoch
        return self._feed.expected(epoch)

    def stats(self) -> dict[str, Any]:
        """Blocks loaded, from where, and how long batches waited for them, added up over workers; safe for JSON."""
        return add_stats([self._feed.stats(), *self._past, *self._present.values()])

    def close(self) -> None:
        """End persistent workers and let memory go; it can't be iterated again. Safe to call twice."""
        self._running = -1
        self._iterator = None
        self._feed.close()

    def __enter__(self) -> FeedDataLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        self._check_open()
        if self._collected is None:
            batches = iter(self._feed)
            return batches if self.collate_fn is _as_it_is else map(self.collate_fn, batches)
        place = self._next_place()
        if self._collected.place != place:
            self._feed.load_state_dict(self.state_dict())
            self._collected = Collected(self._feed)
        self._collected.begin()
        self.dataset.go_to(place)
        if not self.persistent_workers or self._iterator is None:
            self._past += [{**stats, "memory_bytes": 0} for stats in self._present.values()]
            self._present = {}
        self._running += 1
        return self._unpacked(super().__iter__(), self._running)

    def _unpacked(self, parcels: Iterator[Parcel], mine: int) -> Iterator[Any]:
        try:
            while True:
                # Before a parcel is taken: persistent workers' parcels are all in one queue, whichever loop takes them.
                if mine != self._running or self._collected is None:
                    raise UsageError(
                        "this loop over the loader was overtaken by another one, or by load_state_dict, set_epoch or "
                        "close; take one loop at a time"
                    )
                parcel = next(parcels, None)
                if parcel is None:
                    return
                self._note(parcel, self._collected)
                if parcel.failure is not None:
                    raise error_of(parcel.failure, parcel.worker)
                if parcel.part is not None:
                    self._collected.add(parcel.part)
                    yield parcel.batch
        finally:
            del parcels  # an error's traceback holds this frame, and that must not hold workers

    def _note(self, parcel: Parcel, collected: Collected) -> None:
        self._events += parcel.events
        del self._events[:-_EVENTS_KEPT]
        if parcel.totals is not None:
            self._present[parcel.worker] = parcel.totals.stats
            collected.read(parcel.worker, parcel.totals.traffic)

    def _next_place(self) -> Place:
        if self._collected is None:
            return Place(self._feed.epoch, self._feed.position)
        place = self._collected.place
        return Place(place.epoch + 1, 0) if self._collected.ended else place

    def _moved(self) -> None:
        self._running += 1
        if self._collected is not None:
            self._collected = Collected(self._feed)

    def _check_open(self) -> None:
        if self._running < 0:
            raise UsageError("this loader was closed; make another")


def _as_it_is(batch: Any) -> Any:
    return batch


def _context(given: Any, workers: int) -> Any:
    """The multiprocessing context for this many workers.

    Raises:
        UsageError: it would fork.
    """
    if workers == 0:
        if given is not None:
            raise UsageError("multiprocessing_context= is for workers; say num_workers=, or leave it out")
        return None
    method = given if given is None or isinstance(given, str) else given.get_start_method()
    if method == "fork":
        raise UsageError(
            "workers of a feed can't be forked: threads and open connections don't come along; leave "
            "multiprocessing_context= out, or say 'spawn' or 'forkserver'"
        )
    return "spawn" if given is None else given


def _check_sendable(dataset: FeedDataset, *more: Any) -> None:
    """Whether workers can be sent what they need: said before they are started.

    Raises:
        UsageError: something can't be pickled.
    """
    try:
        ForkingPickler.dumps((dataset.make, *more))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"worker processes can't be sent what they need: {error}; functions (decode=, collate_fn=, "
            "worker_init_fn=) must stand at the top of a module, or use num_workers=0"
        ) from error
