"""The loader: a plain iterable of batches, exact and resumable."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any, Final

import numpy as np

from millrace.core.errors import UsageError
from millrace.core.ports import Clock
from millrace.feed.account import Account, Part
from millrace.feed.assemble import Assembler
from millrace.feed.background import Background
from millrace.feed.blocks import BlockPool, LocalBlocks
from millrace.feed.events import FeedEvent
from millrace.feed.foresight import Foresight
from millrace.feed.order import Order
from millrace.feed.receipt import Receipt, Traffic, traffic_since
from millrace.feed.recipe import Recipe
from millrace.feed.spans import Planner, Span
from millrace.feed.state import Place, decode_state, encode_state
from millrace.feed.tally import RowTally

__all__ = ["Loader"]

_EVENTS_KEPT: Final = 1000
_EXPECTED_ROWS: Final = 2**18


class Loader:
    """Batches of one rank: ``for batch in loader`` is one epoch, the next ``for`` the next.

    A loop that is left early goes on where it stopped, with the next ``for``; :meth:`set_epoch` and
    :meth:`load_state_dict` go elsewhere. One loop at a time.

    Args:
        recipe: See there.
        cache: The local cache, or None.
        background: Where fetches run.
        clock: For events.
        traffic: What was read from each store so far.
        events: What went wrong; appended to by those who read.
        others: What else went wrong, and is told of elsewhere: with the other streams of a mixture.

    Raises:
        UsageError: the system doesn't grant the address space for so much memory.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        cache: LocalBlocks | None,
        background: Background,
        clock: Clock,
        traffic: Callable[[], Sequence[Traffic]],
        events: MutableSequence[FeedEvent],
        others: Callable[[], Sequence[FeedEvent]] = tuple,
    ) -> None:
        self.recipe = recipe
        self._background = background
        self._clock = clock
        self._traffic = traffic
        self._events = events
        self._others = others
        self._foresight = Foresight(recipe.order, clock)
        self._pool = BlockPool(
            recipe.sources,
            recipe.columns,
            recipe.schema,
            cache=cache,
            background=background,
            budget_bytes=recipe.memory_bytes,
            ahead_bytes=recipe.ahead_bytes,
            foresight=self._foresight,
        )
        self._assembler = Assembler(recipe, self._pool, self._set_aside)
        self._orders: dict[int, Order] = {}
        self._running = 0  # which loop is the one that may go on; negative when closed
        self._next_span = 0
        self._place = Place(0, 0)
        self._account = self._open_account()

    def __len__(self) -> int:
        """Steps in an epoch, the same for every rank."""
        return self.recipe.sharing.steps(self._order(self._place.epoch).rows)

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of."""
        return self._next_place().epoch

    @property
    def position(self) -> int:
        """How many rows of it were given, over all ranks."""
        return self._next_place().position

    @property
    def events(self) -> tuple[FeedEvent, ...]:
        """What went wrong while the feed went on; the newest 1,000."""
        found, others = self._events[-_EVENTS_KEPT:], self._others()
        if others:
            found = sorted([*found, *others], key=lambda event: event.at_ms)[-_EVENTS_KEPT:]
        return tuple(found)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands: small, safe for JSON, the same on every rank after the same step."""
        return encode_state(self.recipe.identity, self._next_place(), batch_size=self.recipe.sharing.batch_size)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, of this world size or another.

        Raises:
            UsageError: it is of another version, seed or order, or was edited; names the difference.
        """
        place = decode_state(state, self.recipe.identity)
        size = self.recipe.sharing.batch_size
        rows = self._order(place.epoch).rows
        if place.position > rows or (place.position % size and place.position < rows):
            raise UsageError(
                f"the state stands at row {place.position} of an epoch of {rows}, which is not between two batches of "
                f"{size}; use the batch size it was made with ({state.get('batch_size')}), or one that divides it"
            )
        self._move(place)

    def set_epoch(self, epoch: int) -> None:
        """Begin at the start of an epoch, whatever was read before.

        Raises:
            UsageError: it isn't a whole number from 0.
        """
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise UsageError(f"{epoch!r} is not an epoch; they are counted from 0")
        self._move(Place(epoch, 0))

    def receipt(self) -> Receipt:
        """What this rank was given of the current epoch, or of the last one right after its end.

        It begins where this process took the epoch up; so does its traffic, which is of all loaders of the dataset in
        this process. ``millrace.merge_receipts`` makes one of those of all ranks.
        """
        return self._account.receipt(traffic_since(self._traffic(), self._traffic_before))

    def expected(self, epoch: int | None = None) -> Receipt:
        """The receipt that an epoch without a row set aside must merge to: from the order alone, read nowhere.

        Takes about 0.1 us a row.

        Args:
            epoch: Default: the one :meth:`receipt` speaks of.
        """
        epoch = self._place.epoch if epoch is None else epoch
        order = self._order(epoch)
        end = self._end(order)
        tally = RowTally()
        for begin in range(0, end, _EXPECTED_ROWS):
            positions = np.arange(begin, min(begin + _EXPECTED_ROWS, end))
            found = order.locate(positions)
            ids = self._pool.first_rows[self._pool.first[found.stream] + found.block] + found.row
            tally.add(positions, found.stream, ids)
        return Receipt(
            datasets=tuple(s.index.manifest for s in self.recipe.sources),
            order=order.fingerprint,
            epoch=epoch,
            begin=0,
            end=end,
            total=end,
            rows=tally.rows,
            digest=tally.hexdigest(),
            quarantined=(),
            share=None,
        )

    def stats(self) -> dict[str, Any]:
        """Blocks loaded, from where, and how long batches waited for them; safe for JSON."""
        stats = self._pool.stats
        return {
            "blocks_loaded": stats.loaded,
            "blocks_from_cache": stats.hits,
            "waits": stats.waits,
            "waited_s": round(stats.waited_s, 6),
            "waited_max_s": round(stats.waited_max_s, 6),
            "memory_bytes": self._pool.arena.used_bytes,
            "events": len(self.events),
        }

    def close(self) -> None:
        """Stop reading ahead and let the memory go; it can't be iterated again. Safe to call twice."""
        self._running = -1
        self._pool.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return self.part_of(0, 1)

    def part_of(self, worker: int, workers: int) -> Iterator[Any]:
        """One loop over some of the steps that are left of the epoch: what one of several workers makes of them.

        Between batches the loader stands behind the step that it gave last; at the end, at that of the epoch.

        Args:
            worker: Which: its steps are the ``worker``-th from here (from 0), and every ``workers``-th from there.
            workers: How many there are.
        """
        self._background.check_process()
        self._check_open()
        place = self._next_place()
        if place != self._place:
            self._move(place)
        self._running += 1
        return self._batches(self._running, worker, workers)

    def take_part(self) -> Part:
        """What was given since this was last asked, or since the epoch was taken up: a part of a receipt."""
        return self._account.take_part()

    def _batches(self, mine: int, worker: int, workers: int) -> Iterator[Any]:
        epoch = self._place.epoch
        order = self._order(epoch)
        end = self._end(order)
        size = self.recipe.sharing.batch_size
        skipped = (workers - 1) * size
        planner = Planner(
            order,
            self.recipe.sharing,
            self._pool,
            first_step=-(-self._place.position // size) + worker,
            stride=workers,
            number=self._next_span,
            window_rows=self.recipe.window_rows // workers,
        )
        self._foresight.begin(self._place, end)
        account, assembler = self._account, self._assembler
        while not planner.ended:
            self._check_turn(mine)
            span = planner.take()
            self._foresight.at(self._place)
            self._next_span = span.number + 1
            found = assembler.find(span)
            bounds = span.bounds.tolist()
            position = span.first_step * size
            for a, b in itertools.pairwise(bounds):
                self._check_turn(mine)
                batch = assembler.batch(span, found, a, b)
                position = min(position + size, end)
                self._place = Place(epoch, position)
                account.given(span, b, position)
                position += skipped
                yield batch
            if mine == self._running:
                planner.look_ahead()  # before blocks are let go of: the next span may need them too
                assembler.done(span)
        if workers > 1 and mine == self._running:
            self._place = Place(epoch, end)

    def _set_aside(self, span: Span, i: int, reason: str) -> None:
        self._account.set_aside(span, i, reason)

    def _next_place(self) -> Place:
        """Behind an epoch's end is the next one's beginning."""
        place = self._place
        if place.position and place.position >= self._end(self._order(place.epoch)):
            return Place(place.epoch + 1, 0)
        return place

    def _move(self, place: Place) -> None:
        self._check_open()
        self._running += 1
        self._next_span += 1
        self._pool.reset(drop=self.recipe.in_place)
        self._place = place
        self._account = self._open_account()

    def _open_account(self) -> Account:
        order = self._order(self._place.epoch)
        self._traffic_before = tuple(self._traffic())
        return Account(
            self.recipe,
            self._place,
            order=order.fingerprint,
            total=self._end(order),
            clock=self._clock,
            events=self._events,
        )

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            self._orders = {epoch: self.recipe.order(epoch)}  # one at a time: it has a few arrays of O(blocks)
        return self._orders[epoch]

    def _end(self, order: Order) -> int:
        sharing = self.recipe.sharing
        return min(sharing.steps(order.rows) * sharing.batch_size, order.rows)

    def _check_turn(self, mine: int) -> None:
        if mine != self._running:
            raise UsageError(
                "this loop over the loader was overtaken by another one, or by load_state_dict, set_epoch or close; "
                "take one loop at a time"
            )

    def _check_open(self) -> None:
        if self._running < 0:
            raise UsageError("this loader was closed; make another with ds.loader(...)")
