"""What an epoch delivered, as one document: the same for the same rows, whatever the ranks were."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from millrace.core.errors import UsageError
from millrace.core.model import block_digest
from millrace.feed.tally import RowTally

__all__ = ["QuarantinedRow", "Receipt", "Traffic", "add_traffic", "merge_receipts", "traffic_since"]


@dataclass(frozen=True, slots=True, order=True)
class QuarantinedRow:
    """A row that can't be given, the same way every time.

    Attributes:
        position: Its place in the epoch.
        dataset: Its version's digest.
        row: Its number in that version, from 0.
        reason: Why.
    """

    position: int
    dataset: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was read from one store.

    Attributes:
        store, cloud, region: Which.
        bytes: That came in.
        wasted: Of these, answers nobody needed any more, and rotten ones.
        dollars: What leaving that site costs at list price; None where no price is known.
    """

    store: str
    cloud: str
    region: str
    bytes: int
    wasted: int
    dollars: float | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was delivered of positions ``[begin, end)`` of an epoch: by one rank, or, merged, by all.

    Attributes:
        datasets: Digests of the versions, in the order of the streams.
        order: Fingerprint of the order: versions, seed, shuffle.
        epoch, begin, end: Which positions.
        total: Positions in the epoch.
        rows: How many rows were delivered.
        digest: Of the delivered (position, stream, row) triples; doesn't depend on who delivered which.
        quarantined: Rows that can't be given.
        share: ``(rank, world size, replication)``, or None for a merged one.
        traffic: What was read meanwhile, by store. Not a part of :attr:`proof`.
    """

    datasets: tuple[str, ...]
    order: str
    epoch: int
    begin: int
    end: int
    total: int
    rows: int
    digest: str
    quarantined: tuple[QuarantinedRow, ...]
    share: tuple[int, int, int] | None
    traffic: tuple[Traffic, ...] = field(default=())

    @property
    def whole(self) -> bool:
        """Whether every row of the range is accounted for: delivered, or named."""
        return self.rows + len(self.quarantined) == self.end - self.begin

    @property
    def complete(self) -> bool:
        """Whether that is so of the whole epoch."""
        return self.whole and self.begin == 0 and self.end == self.total

    @property
    def proof(self) -> str:
        """One line for all that was delivered: equal for equal rows, on whatever ranks and from whatever stores."""
        fixed = [self.order, self.epoch, self.begin, self.end, self.rows, self.digest]
        rows = [[q.position, q.dataset, q.row] for q in sorted(self.quarantined)]
        return block_digest(json.dumps([fixed, rows], separators=(",", ":")).encode())

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "whole": self.whole, "complete": self.complete, "proof": self.proof}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> Receipt:
        """The receipt in what :meth:`plain` gave.

        Raises:
            UsageError: it isn't one, or its proof doesn't fit.
        """
        try:
            receipt = Receipt(
                datasets=tuple(plain["datasets"]),
                order=str(plain["order"]),
                epoch=int(plain["epoch"]),
                begin=int(plain["begin"]),
                end=int(plain["end"]),
                total=int(plain["total"]),
                rows=int(plain["rows"]),
                digest=str(plain["digest"]),
                quarantined=tuple(QuarantinedRow(**q) for q in plain["quarantined"]),
                share=None if plain["share"] is None else _share(*plain["share"]),
                traffic=tuple(Traffic(**t) for t in plain["traffic"]),
            )
            RowTally.from_hex(receipt.rows, receipt.digest)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"this is not a feed's receipt: {error}") from error
        if plain.get("proof") != receipt.proof:
            raise UsageError("the receipt was edited: its proof doesn't fit what it says")
        return receipt


def merge_receipts(parts: Sequence[Receipt]) -> Receipt:
    """One receipt from those of all ranks, and of all the times an epoch was taken up again.

    Raises:
        UsageError: they are of different epochs or orders, overlap, or leave something out; names it.
    """
    if not parts:
        raise UsageError("there is no receipt to merge")
    first = parts[0]
    for part in parts:
        if (part.order, part.epoch, part.total) != (first.order, first.epoch, first.total):
            raise UsageError(
                f"these receipts are of different feeds: epoch {first.epoch} of order {first.order[:12]} and epoch "
                f"{part.epoch} of order {part.order[:12]}"
            )
    ranges = sorted({(p.begin, p.end) for p in parts if p.begin < p.end} or {(p.begin, p.end) for p in parts})
    for (_, end), (begin, _) in itertools.pairwise(ranges):
        if begin != end:
            raise UsageError(
                f"the receipts {'overlap' if begin < end else 'leave out positions'} between {min(begin, end)} and "
                f"{max(begin, end)} of epoch {first.epoch}"
            )
    tally = RowTally()
    rows = 0
    quarantined: set[QuarantinedRow] = set()
    for begin, end in ranges:
        for part in _one_of_each_group([p for p in parts if (p.begin, p.end) == (begin, end)]):
            tally.merge(RowTally.from_hex(part.rows, part.digest))
            rows += part.rows
            quarantined.update(part.quarantined)
    merged = replace(
        first,
        begin=ranges[0][0],
        end=ranges[-1][1],
        rows=rows,
        digest=tally.hexdigest(),
        quarantined=tuple(sorted(quarantined)),
        share=None,
        traffic=add_traffic(t for part in parts for t in part.traffic),
    )
    if not merged.whole:
        missing = merged.end - merged.begin - rows - len(quarantined)
        raise UsageError(
            f"the receipts account for {rows + len(quarantined)} rows of the {merged.end - merged.begin} in positions "
            f"{merged.begin} to {merged.end} of epoch {first.epoch}: "
            + (f"{missing} are missing; merge those of every rank" if missing > 0 else "some rank's is there twice")
        )
    return merged


def _share(rank: int, world_size: int, replication: int) -> tuple[int, int, int]:
    if not (0 <= rank < world_size and replication >= 1):
        raise ValueError(f"there is no rank {rank} of {world_size} in groups of {replication}")
    return rank, world_size, replication


def _one_of_each_group(parts: Sequence[Receipt]) -> list[Receipt]:
    """Ranks of one replication group were given the same rows: one of them speaks for all."""
    found: dict[tuple[int, int] | int, Receipt] = {}
    for i, part in enumerate(parts):
        found.setdefault(-1 - i if part.share is None else (part.share[0] // part.share[2], part.share[1]), part)
    return list(found.values())


def add_traffic(all_traffic: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """What several read, as one: sums, by store."""
    found: dict[str, Traffic] = {}
    for item in all_traffic:
        before = found.get(item.store)
        found[item.store] = item if before is None else _plus(item, before, 1)
    return tuple(found[name] for name in sorted(found))


def traffic_since(now: Iterable[Traffic], before: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """What was read between two moments, by store."""
    known = {item.store: item for item in before}
    return tuple(_plus(item, known[item.store], -1) if item.store in known else item for item in now)


def _plus(a: Traffic, b: Traffic, sign: int) -> Traffic:
    dollars = None if a.dollars is None or b.dollars is None else a.dollars + sign * b.dollars
    return replace(a, bytes=a.bytes + sign * b.bytes, wasted=a.wasted + sign * b.wasted, dollars=dollars)
