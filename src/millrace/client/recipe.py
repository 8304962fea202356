"""From what a user asks for to a loader: options checked, defaults found, everything tied together."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa

from millrace.client.formats import FormatName, finish_for
from millrace.core.errors import UsageError
from millrace.core.units import format_bytes, parse_share, parse_size
from millrace.feed.columns import columns_of
from millrace.feed.loader import Loader
from millrace.feed.mixing import MixedOrder, Stage, Stream, plan_streams, quotas
from millrace.feed.order import ORDER_VERSION, EpochOrder, Order, OrderPlan, Shuffle, parse_shuffle, plan_order
from millrace.feed.receipt import add_traffic
from millrace.feed.recipe import Recipe
from millrace.feed.share import Sharing
from millrace.feed.spans import SPANS_A_WINDOW
from millrace.wiring.surroundings import rank_and_world

if TYPE_CHECKING:
    from millrace.client.dataset import Dataset

__all__ = ["LoaderOptions", "build_loader", "size_option"]

_SPARE_BYTES: Final = 64_000_000
"""Room for blocks loaded ahead of a window's end, above what windows need."""


@dataclass(frozen=True)
class LoaderOptions:
    """What a user asked for; see ``Dataset.loader``."""

    batch_size: int
    seed: int
    shuffle: bool | str
    rank: int | None
    world_size: int | None
    replication: int
    drop_last: bool
    columns: tuple[str, ...] | None
    format: FormatName | None
    decode: Mapping[str, Callable[[Any], Any]]
    lanes: int | None
    window: int | None
    prefetch: str | int
    memory: str | int | None
    quarantine: float | str
    pin_memory: bool


def build_loader(datasets: Sequence[Dataset], stages: Sequence[Stage] | None, options: LoaderOptions) -> Loader:
    """A loader over one dataset, or over several that are mixed.

    Args:
        datasets: One, or the streams of a mixture.
        stages: Of the mixture; None for one dataset by itself.
        options: What the user asked for.

    Raises:
        UsageError: something doesn't fit; names it.
    """
    schema = _one_schema(datasets)
    closed = [d.label for d in datasets if d.closed]
    if closed:
        raise UsageError(f"{closed[0]} was closed; open it again")
    empty = [d.label for d in datasets if len(d) == 0]
    if empty:
        raise UsageError(f"{empty[0]} has no rows, so there is nothing to feed")
    sharing = _sharing(options)
    finish = finish_for(options.format, pin_memory=options.pin_memory)
    _check_decode(options)
    shuffle = parse_shuffle(options.shuffle)
    plans = _plans(datasets, stages, shuffle, options)
    order = _order(datasets, stages, plans)
    memory = _memory(datasets, plans, sharing, options)
    first = datasets[0]
    recipe = Recipe(
        sources=tuple(d.source for d in datasets),
        labels=tuple(d.label for d in datasets),
        schema=schema,
        columns=columns_of(schema, options.columns, as_arrow=finish is None),
        decode=options.decode,
        order=order,
        identity=_identity(datasets, plans, stages),
        sharing=sharing,
        finish=finish,
        in_place=shuffle in {Shuffle.BLOCKS, Shuffle.NONE} and stages is None,
        window_rows=_window_rows(datasets, plans, sharing, memory),
        memory_bytes=memory,
        ahead_bytes=size_option("prefetch", options.prefetch),
        quarantine=_share_option("quarantine", options.quarantine),
    )
    sharing.steps(order(0).rows)  # refuses what would give nothing
    distinct = tuple(dict.fromkeys(datasets))
    loader = Loader(
        recipe,
        cache=first.cache,
        background=first.session.background,
        clock=first.session.world.clock,
        traffic=lambda: add_traffic(item for d in distinct for item in d.traffic()),
        events=first.sink,
        others=lambda: [event for d in distinct[1:] for event in d.events],
    )
    for dataset in distinct:
        dataset.keep(loader)
    return loader


def _sharing(options: LoaderOptions) -> Sharing:
    rank, world_size = options.rank, options.world_size
    if (rank is None) != (world_size is None):
        given, lacking = ("rank", "world_size") if world_size is None else ("world_size", "rank")
        raise UsageError(f"{given}= is given and {lacking}= isn't; give both, or neither to ask the launcher")
    if rank is None or world_size is None:
        rank, world_size = _distributed() or rank_and_world()
    return Sharing(options.batch_size, rank, world_size, options.replication, options.drop_last)


def _distributed() -> tuple[int, int] | None:
    if "torch.distributed" not in sys.modules:
        return None
    from millrace.feed.torch.tensors import distributed_rank  # only where torch is in use already

    return distributed_rank()


def _plans(
    datasets: Sequence[Dataset], stages: Sequence[Stage] | None, shuffle: Shuffle, options: LoaderOptions
) -> tuple[OrderPlan, ...]:
    tables = [(d.index.rows, d.index.lengths) for d in datasets]
    seed, lanes, window = options.seed, options.lanes, options.window
    if stages is not None:
        return plan_streams(tables, stages, seed=seed, shuffle=shuffle, lanes=lanes, window=window)
    (rows, lengths) = tables[0]
    return (plan_order(rows, lengths, seed=seed, shuffle=shuffle, lanes=lanes, window=window),)


def _order(
    datasets: Sequence[Dataset], stages: Sequence[Stage] | None, plans: Sequence[OrderPlan]
) -> Callable[[int], Order]:
    if stages is None:
        plan, index, manifest = plans[0], datasets[0].index, datasets[0].digest
        return lambda epoch: EpochOrder(plan, index.rows, manifest=manifest, epoch=epoch)
    streams = [Stream(plan, d.index.rows, d.digest) for plan, d in zip(plans, datasets, strict=True)]
    return lambda epoch: MixedOrder(streams, stages, seed=plans[0].seed, epoch=epoch)


def _check_decode(options: LoaderOptions) -> None:
    for name, decode in options.decode.items():
        if not callable(decode):
            raise UsageError(f"decode[{name!r}] is {decode!r}, which is no function; give one of a row's value")
    if options.decode and options.format == "arrow":
        raise UsageError("decode= is not for format='arrow', which gives rows as they are; take format='numpy'")


def _memory(datasets: Sequence[Dataset], plans: Sequence[OrderPlan], sharing: Sharing, options: LoaderOptions) -> int:
    """Bytes for blocks: what the windows that are open at a time hold, and some that come."""
    given = None if options.memory is None else size_option("memory", options.memory)
    total = 0
    for d, plan in zip(datasets, plans, strict=True):
        lengths = d.index.lengths
        if plan.shuffle is Shuffle.FULL:
            total += int(lengths.sum()) + len(lengths) * 65_536
            continue
        lanes = min(-(-plan.lanes // sharing.groups) + 1, plan.lanes)
        blocks = min(lanes * plan.window, len(lengths))
        total += math.ceil(blocks * (float(lengths.mean()) + 65_536))
    if plans[0].shuffle is Shuffle.FULL:
        allowed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4 if given is None else given
        if total > allowed:
            limit = "a quarter of this machine's" if given is None else "memory="
            raise UsageError(
                f"shuffle='full' keeps the dataset in memory, {format_bytes(total)}, and {limit} is "
                f"{format_bytes(allowed)}; use shuffle='window', which spreads rows nearly as well, or "
                f"{'say memory= yourself' if given is None else f'memory={total}'}"
            )
    return total + _SPARE_BYTES if given is None else given


def _window_rows(datasets: Sequence[Dataset], plans: Sequence[OrderPlan], sharing: Sharing, memory_bytes: int) -> int:
    """See ``Recipe.window_rows``. Without windows so many rows that a span of them needs half of the memory."""
    if plans[0].shuffle is Shuffle.WINDOW:
        lanes = -(-plans[0].lanes // sharing.groups)
        return sum(int(d.index.rows.mean() * p.window * lanes) for d, p in zip(datasets, plans, strict=True))
    if plans[0].shuffle is Shuffle.FULL:
        return 2**40
    stored = sum(int(d.index.lengths.sum()) for d in datasets)
    return SPANS_A_WINDOW * (memory_bytes * sum(len(d) for d in datasets) // (2 * stored))


def size_option(what: str, value: str | int) -> int:
    """A number of bytes that a user wrote as the option ``what``: ``"256MB"``, or a number.

    Raises:
        UsageError: it isn't one.
    """
    try:
        return parse_size(value)
    except ValueError as error:
        raise UsageError(f"{what}={value!r}: {error}") from error


def _share_option(what: str, value: float | str) -> float:
    try:
        return parse_share(value)
    except ValueError as error:
        raise UsageError(f"{what}={value!r}: {error}") from error


def _one_schema(datasets: Sequence[Dataset]) -> pa.Schema:
    first = datasets[0]
    for other in datasets[1:]:
        if not other.schema.equals(first.schema):
            raise UsageError(
                f"{first.label} and {other.label} can't be mixed: their rows have other columns "
                f"({_columns(first.schema)} and {_columns(other.schema)}); bring them to one schema at ingest"
            )
    return first.schema


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{f.name}: {f.type}" for f in schema)


def _identity(
    datasets: Sequence[Dataset], plans: Sequence[OrderPlan], stages: Sequence[Stage] | None
) -> dict[str, Any]:
    """What decides the order, for states: named so that a difference can be."""
    return {
        "datasets": [d.digest for d in datasets],
        "seed": plans[0].seed,
        "shuffle": plans[0].shuffle.value,
        "lanes": plans[0].lanes,
        "window": [p.window for p in plans],
        "order": ORDER_VERSION,
        "mix": None if stages is None else [[stage.rows, list(quotas(stage))] for stage in stages],
    }
