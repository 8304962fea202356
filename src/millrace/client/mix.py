"""Several datasets fed as one, by weight: ``millrace.mix({...}, weights={...})``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millrace.client.dataset import Dataset
from millrace.client.loadable import Loadable
from millrace.core.errors import UsageError
from millrace.feed.mixing import Stage, largest_epoch

__all__ = ["Mix", "mix"]

Weights = Mapping[str, float]


class Mix(Loadable):
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

    def _streams(self) -> tuple[tuple[Dataset, ...], Sequence[Stage]]:
        return tuple(self.datasets.values()), self.stages


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
    if not isinstance(datasets, Mapping) or not all(isinstance(d, Dataset) for d in datasets.values()) or not datasets:
        raise UsageError(
            "millrace.mix wants datasets by name: {'prose': millrace.open(...), 'code': millrace.open(...)}"
        )
    if stages is not None:
        if weights is not None or rows is not None:
            raise UsageError("stages= says rows and weights itself; leave rows= and weights= out")
        return Mix(datasets, [Stage(n, _in_order(datasets, w)) for n, w in stages])
    ordered = _in_order(datasets, weights if weights is not None else dict.fromkeys(datasets, 1.0))
    if rows is None:
        rows = largest_epoch([len(d) for d in datasets.values()], ordered)
    return Mix(datasets, [Stage(rows, ordered)])


def _in_order(datasets: Mapping[str, Dataset], weights: Weights) -> tuple[float, ...]:
    if not isinstance(weights, Mapping):
        raise UsageError(
            f"weights are by name too: {{{', '.join(f'{name!r}: 1' for name in datasets)}}}, not {weights!r}"
        )
    if set(weights) != set(datasets):
        odd = sorted(set(weights) ^ set(datasets))[0]
        where = "weights" if odd in weights else "datasets"
        raise UsageError(
            f"{odd!r} is among the {where} only; give each of {', '.join(datasets)} a weight (0 leaves it out)"
        )
    return tuple(weights[name] for name in datasets)
