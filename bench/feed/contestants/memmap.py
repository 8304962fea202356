"""By hand: all rows in one file, numpy's memmap of it, and a permutation of all row numbers.

Variants: ``bare`` is a loop; ``loader`` has torch's ``DataLoader`` around it, which asks for whole batches; ``limit``
is the bare loop over rows that lie in an anonymous array, which is what this machine can gather at most.

Tokens are taken by ``numpy.take`` straight into the batch's buffer; rows of different lengths are copied there one by
one. Where they are is a second array.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from bench.feed.batches import Batch, Output
from bench.feed.entry import Job, enter
from bench.feed.permuted import Permuted
from bench.feed.rows import ROW_TOKENS, pieces


def prepare(job: Job) -> None:
    sizes, kinds = [], []
    with (job.data / "values.bin").open("wb") as file:
        for piece in pieces(job.workload, job.rows):
            file.write(piece.values.data)
            sizes.append(np.diff(piece.offsets))
            if piece.kinds is not None:
                kinds.append(piece.kinds)
    np.save(job.data / "offsets.npy", np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))
    if kinds:
        np.save(job.data / "kinds.npy", np.concatenate(kinds))


class Rows:
    """Batches by their row numbers."""

    def __init__(self, job: Job) -> None:
        path = job.data / "values.bin"
        # The memmap's own class makes each slice dearer; the bytes are the same.
        whole = np.fromfile(path, np.uint8) if job.variant == "limit" else np.asarray(np.memmap(path, np.uint8, "r"))
        self._tokens = whole.view(np.uint16).reshape(-1, ROW_TOKENS) if job.workload == "tokens" else None
        self._view = whole.data
        self._offsets = np.load(job.data / "offsets.npy")
        self._kinds = np.load(job.data / "kinds.npy") if job.workload == "mix" else None
        self._out = Output(job.workload)

    def __getitem__(self, ids: Any) -> Batch:
        if self._tokens is not None:
            room = self._out.reserve(len(ids) * self._tokens.strides[0]).view(np.uint16).reshape(-1, ROW_TOKENS)
            np.take(self._tokens, ids, axis=0, out=room, mode="clip")  # the other modes copy twice
            return self._out.made(len(ids), None)
        view = self._view
        starts, ends = self._offsets[ids].tolist(), self._offsets[ids + 1].tolist()
        rows = [view[start:end] for start, end in zip(starts, ends, strict=True)]
        return self._out.rows(rows, None if self._kinds is None else self._kinds[ids])


class Loader:
    def __init__(self, job: Job) -> None:
        rows = Rows(job)
        order = Permuted(job.rows)
        self.state, self.load = order.state, order.load
        self.epoch: Callable[[], Iterator[Batch]]
        if job.variant == "loader":
            loader = DataLoader(rows, None, sampler=order, collate_fn=_as_it_is, **job.processes)
            self.epoch = partial(iter, loader)
        else:
            self.epoch = partial(map, rows.__getitem__, order)


def _as_it_is(batch: Batch) -> Batch:
    return batch


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"numpy {np.__version__}, torch {torch.__version__}")
