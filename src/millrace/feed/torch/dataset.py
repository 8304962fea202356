"""A feed as a ``torch.utils.data.IterableDataset``: whole batches, in a process or shared by worker processes."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from millrace.core.errors import UsageError
from millrace.feed.background import FORKED
from millrace.feed.loader import Loader
from millrace.feed.state import Place, decode_state, encode_state
from millrace.feed.torch.parcels import parcels

__all__ = ["FeedDataset"]


class FeedDataset(IterableDataset[Any]):  # type: ignore[misc,unused-ignore]  # torch isn't always there to be checked
    """Batches of one rank for any ``DataLoader(dataset, batch_size=None, ...)``, torchdata's included.

    With worker processes, worker ``w`` of ``N`` makes the steps ``w``, ``w + N``, ...: what comes together is in order.
    Each worker opens the same version of the dataset by its digest, and reads through the machine's cache.

    :class:`millrace.feed.torch.FeedDataLoader` does more: receipts, states that fit any number of workers, epochs that
    go on by themselves. Without it, say ``set_epoch`` before each epoch when workers don't persist.

    Args:
        make: Gives a loader: the method ``loader`` of a dataset or a mix. Sent to workers, so it can be pickled.
        options: For it. ``rank`` and ``world_size`` are found here and now, unless they are given; ``format`` is
            ``"torch"`` unless it is given.

    Raises:
        UsageError: an option doesn't fit.
    """

    def __init__(self, make: Callable[..., Loader], **options: Any) -> None:
        super().__init__()
        options.setdefault("format", "torch")
        loader = make(**options)
        sharing = loader.recipe.sharing  # of this process: its workers can't ask torch.distributed
        options.update(rank=sharing.rank, world_size=sharing.world_size)
        goto = torch.zeros(3, dtype=torch.int64)  # sending a tensor to a worker makes it shared memory
        self._open(functools.partial(make, **options), goto, in_parcels=False, loader=loader)

    def _open(self, make: Callable[[], Loader], goto: Any, *, in_parcels: bool, loader: Loader | None) -> None:
        self._make = make
        self._goto = goto  # (serial, epoch, position): where the main process wants all workers to begin
        self._in_parcels = in_parcels
        self._process = os.getpid()
        self._loader = loader
        self._first: tuple[int, int, int] | None = None  # in a worker: what the goto was when it was started
        self._serial = -1  # the serial of the goto that was followed last
        self._within: int | None = None  # the epoch of a loop here that has not ended
        self._at_end = False
        self._resume: Place | None = None
        self._next: Place | None = None  # in a worker: the next step that is its own
        self._share: tuple[int, int] = (0, 1)

    @property
    def loader(self) -> Loader:
        """This process's own.

        Raises:
            UsageError: this process was forked off.
        """
        if os.getpid() != self._process:
            raise UsageError(FORKED)
        if self._loader is None:
            self._loader = self._make()
        return self._loader

    @property
    def make(self) -> Callable[[], Loader]:
        """What workers make their loaders with."""
        return self._make

    def __len__(self) -> int:
        """Steps in an epoch, the same for every rank and any number of workers."""
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Begin the next loop at the start of an epoch, in all workers.

        Raises:
            UsageError: it isn't a whole number from 0.
        """
        self.loader.set_epoch(epoch)
        self._within, self._at_end = None, False
        self.go_to(Place(epoch, 0))

    def go_to(self, place: Place) -> None:
        """Have all workers begin their next loop there."""
        self._goto[1], self._goto[2] = place.epoch, place.position
        self._goto[0] += 1

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands: without workers what ``loader.state_dict()`` gives, in a worker its own part."""
        loader = self.loader
        if self._next is not None or self._resume is not None:
            return {"worker": list(self._share), "feed": self._encode(self._resume or self._next or Place(0, 0))}
        place = Place(loader.epoch, loader.position)
        if self._within is not None and place.epoch > self._within:
            place = Place(self._within, loader.receipt().total)  # all given, and the loop doesn't know yet
        return self._encode(place)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next loop where a state stands.

        Raises:
            UsageError: it is of another version, seed or order, was edited, or is another worker's.
        """
        loader = self.loader
        info = get_worker_info()
        if info is not None:
            share = [info.id, info.num_workers]
            if not isinstance(state, Mapping) or state.get("worker") != share:
                theirs = state.get("worker") if isinstance(state, Mapping) else None
                raise UsageError(
                    f"worker {info.id} of {info.num_workers} can't go on from the state of {_worker(theirs)}; "
                    "keep the number of workers, or use millrace.feed.torch.FeedDataLoader, whose states fit any"
                )
            self._resume = decode_state(state["feed"], loader.recipe.identity)
            self._share = (info.id, info.num_workers)
            return
        if isinstance(state, Mapping) and "worker" in state:
            raise UsageError(
                f"this is the state of {_worker(state['worker'])}: give it to a DataLoader with as many workers"
            )
        loader.load_state_dict(state)
        place = decode_state(state, loader.recipe.identity)
        self._within = None
        self._at_end = 0 < loader.receipt().total <= place.position
        self.go_to(place)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is None:
            return self._here()
        if self._in_parcels:
            return parcels(lambda: (self.loader, self._in_worker(info.id, info.num_workers)), info.id)
        return self._in_worker(info.id, info.num_workers)

    def __getstate__(self) -> dict[str, Any]:
        first = self._goto.tolist()
        return {"make": self._make, "goto": self._goto, "in_parcels": self._in_parcels, "first": first}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._open(state["make"], state["goto"], in_parcels=state["in_parcels"], loader=None)
        self._first = tuple(state["first"])

    def in_parcels(self) -> FeedDataset:
        """Have workers give parcels: batches with their account. For ``FeedDataLoader``."""
        self._in_parcels = True
        return self

    def _here(self) -> Iterator[Any]:
        if self._at_end:
            self._at_end = False
            return iter(())
        batches = iter(self.loader)
        self._within = self.loader.epoch
        return self._followed(batches)

    def _followed(self, batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        self._within = None

    def _in_worker(self, worker: int, workers: int) -> Iterator[Any]:
        loader = self.loader
        begins = self._begins()
        own, place = self._resume is not None, self._resume or begins
        self._resume, self._share = None, (worker, workers)
        loader.load_state_dict(self._encode(place))
        total, size = loader.receipt().total, loader.recipe.sharing.batch_size
        first = -(-place.position // size) + (0 if own else worker)
        self._next = Place(place.epoch, min(first * size, total))
        if place.position >= total > 0:
            return iter(())
        return self._counted(loader.part_of(0 if own else worker, workers), first, workers, total)

    def _begins(self) -> Place:
        """Where a worker's next loop begins, before its share is taken."""
        serial, epoch, position = self._first or self._goto.tolist()
        if self._in_parcels:
            # Told before each loop. It may be that of a later one already: then nobody takes what this one gives.
            return Place(*self._goto.tolist()[1:])
        self._first = None
        if serial != self._serial:
            self._serial = serial
            return Place(epoch, position)
        return Place(0 if self._next is None else self._next.epoch + 1, 0)

    def _counted(self, batches: Iterator[Any], first: int, workers: int, total: int) -> Iterator[Any]:
        """The batches, and after each of them the next one's place noted."""
        size = self.loader.recipe.sharing.batch_size
        epoch = self.loader.epoch
        for n, batch in enumerate(batches, 1):
            self._next = Place(epoch, min((first + n * workers) * size, total))
            yield batch

    def _encode(self, place: Place) -> dict[str, Any]:
        recipe = self.loader.recipe
        return encode_state(recipe.identity, place, batch_size=recipe.sharing.batch_size)


def _worker(share: Any) -> str:
    if isinstance(share, list | tuple) and len(share) == 2:
        return f"worker {share[0]} of {share[1]}"
    return "a feed without workers"
