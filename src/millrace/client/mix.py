"""Several datasets fed as one, by weight: ``millrace.mix({...}, weights={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from millrace.client.dataset import Dataset
from millrace.client.formats import FormatName
from millrace.client.recipe import LoaderOptions, build_loader
from millrace.core.errors import UsageError
from millrace.feed.loader import Loader
from millrace.feed.mixing import Stage, largest_epoch

__all__ = ["Mix", "mix"]

Weights = Mapping[str, float]


class Mix:
    """Datasets that are fed together. Made by :func:`mix`.

    Attributes:
        datasets: By the name they have in it, in order.
        stages: What follows what.
    """

    def __init__(self, datasets: Mapping[str, Dataset], stages: Sequence[Stage]) -> None:
        self.datasets = dict(datasets)
        self.stages = tuple(stages)

    def __len__(self) -> int:
        """Rows in an epoch."""
        return sum(stage.rows for stage in self.stages)

    def __repr__(self) -> str:
        return f"<millrace mix of {', '.join(self.datasets)}: {len(self)} rows an epoch>"

    def loader(
        self,
        batch_size: int = 32,
        *,
        seed: int = 0,
        shuffle: bool | str = True,
        rank: int | None = None,
        world_size: int | None = None,
        replication: int = 1,
        drop_last: bool = False,
        columns: Sequence[str] | None = None,
        format: FormatName | None = None,
        decode: Mapping[str, Callable[[Any], Any]] | None = None,
        lanes: int | None = None,
        window: int | None = None,
        prefetch: str | int = "256MB",
        memory: str | int | None = None,
        quarantine: float | str = 0.01,
        pin_memory: bool = False,
    ) -> Loader:
        """Batches for one rank, as ``Dataset.loader`` gives them.

        Args:
            batch_size: See ``Dataset.loader``, here and below.
            seed: See there.
            shuffle: See there; of each dataset in itself. How they are mixed is in ``weights``.
            rank: See there.
            world_size: See there.
            replication: See there.
            drop_last: See there.
            columns: See there.
            format: See there.
            decode: See there.
            lanes: See there.
            window: See there.
            prefetch: See there.
            memory: See there.
            quarantine: See there.
            pin_memory: See there.

        Raises:
            UsageError: something here doesn't fit, or the datasets have different columns.
        """
        options = LoaderOptions(
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            replication=replication,
            drop_last=drop_last,
            columns=None if columns is None else tuple(columns),
            format=format,
            decode=dict(decode or {}),
            lanes=lanes,
            window=window,
            prefetch=prefetch,
            memory=memory,
            quarantine=quarantine,
            pin_memory=pin_memory,
        )
        return build_loader(tuple(self.datasets.values()), self.stages, options)


def mix(
    datasets: Mapping[str, Dataset],
    *,
    weights: Weights | None = None,
    rows: int | None = None,
    stages: Sequence[tuple[int, Weights]] | None = None,
) -> Mix:
    """Feed datasets together, each as often as its weight says.

    Args:
        datasets: By a name of your choice. They have the same columns.
        weights: One for each name: 70 and 30 are the same as 0.7 and 0.3. Default: all alike.
        rows: Of an epoch; of these each dataset gets exactly its share. Default: as many as there are before one of
            them repeats.
        stages: Instead of both: ``(rows, weights)`` pairs that follow each other.

    Raises:
        UsageError: the weights don't fit the datasets, or can't be; says what.
    """
    if not datasets:
        raise UsageError("millrace.mix got no datasets; give it {'name': millrace.open(...), ...}")
    if stages is not None:
        if weights is not None or rows is not None:
            raise UsageError("stages= says rows and weights itself; leave rows= and weights= out")
        return Mix(datasets, [Stage(n, _in_order(datasets, w)) for n, w in stages])
    ordered = _in_order(datasets, weights if weights is not None else dict.fromkeys(datasets, 1.0))
    if rows is None:
        rows = largest_epoch([len(d) for d in datasets.values()], ordered)
    return Mix(datasets, [Stage(rows, ordered)])


def _in_order(datasets: Mapping[str, Dataset], weights: Weights) -> tuple[float, ...]:
    if set(weights) != set(datasets):
        odd = sorted(set(weights) ^ set(datasets))[0]
        where = "weights" if odd in weights else "datasets"
        raise UsageError(
            f"{odd!r} is among the {where} only; give each of {', '.join(datasets)} a weight (0 leaves it out)"
        )
    return tuple(weights[name] for name in datasets)
