"""What loaders are made of: a dataset, or several that are mixed."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from millrace.client.formats import FormatName
from millrace.client.recipe import LoaderOptions, build_loader
from millrace.core.errors import UsageError
from millrace.feed.loader import Loader
from millrace.feed.mixing import Stage

if TYPE_CHECKING:
    from millrace.client.dataset import Dataset

__all__ = ["Loadable"]


class Loadable(abc.ABC):
    """Something with rows that can be fed."""

    @abc.abstractmethod
    def _streams(self) -> tuple[tuple[Dataset, ...], Sequence[Stage] | None]:
        """The datasets, and how they are mixed; None for one by itself."""

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
        """Batches for one rank. See ``docs/feeding.md``.

        Args:
            batch_size: Rows in a *global* batch: over all ranks. Each rank gets its share of it.
            seed: 0 to 2**64 - 1. The order is a function of the version, the seed and the epoch alone.
            shuffle: ``True`` or ``"window"``; ``"full"``: over all rows, for what fits into memory; ``"blocks"``:
                blocks in random order, batches mostly views of them; ``False``: the dataset's order. In a mixture, of
                each dataset in itself.
            rank: Which of ``world_size``. Default: as ``torch.distributed`` or the launcher's variables say.
            world_size: How many ranks there are; goes with ``rank``.
            replication: Ranks in a group that get the same rows (tensor parallel).
            drop_last: Leave out the last batch of an epoch if it isn't full.
            columns: Which; default all.
            format: ``"torch"``, ``"numpy"``, ``"jax"`` or ``"arrow"``; default torch if it is installed, else numpy.
            decode: Column to a function from a row's value (bytes, text, array) to an array or number. Rows it
                raises on are set aside.
            lanes: Of the order; default from the version's size. See ``docs/design/feed-order.md``.
            window: Blocks that are mixed in each lane; default from the version's size.
            prefetch: Bytes on their way into the cache, or waiting there for their first use, beyond those in memory.
            memory: Bytes of blocks in memory; default what the shuffle window needs.
            quarantine: Share of an epoch's rows that may be set aside before it is an error; of a short epoch ten in
                any case, with 0 none.
            pin_memory: For torch: copy into page-locked memory if there is a device.

        Raises:
            UsageError: something here doesn't fit; says what, and what would.
        """
        if isinstance(columns, str):
            raise UsageError(f"columns={columns!r} is a text; name columns in a list: columns=[{columns!r}]")
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
        return build_loader(*self._streams(), options)
