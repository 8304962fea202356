"""litdata: chunks of 64 MB in place, ``StreamingDataset`` and ``StreamingDataLoader``, shuffled.

Tokens have their own loader there (``TokensLoader``), which lays them end to end. Other rows are bytes; in ``mix``
pairs of a number and bytes. The variant ``full`` shuffles over whole chunks instead of 256 rows of one, and decodes
rows one by one, since decoding the 256 around each costs many times more then.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import litdata  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import torch
from litdata.streaming.item_loader import TokensLoader  # type: ignore[import-not-found,unused-ignore]

from bench.feed.batches import Batch, Output
from bench.feed.entry import SEED, Job, enter
from bench.feed.rows import BATCH_ROWS, ROW_TOKENS, pieces

_CHUNK_BYTES = 64_000_000


def _rows(job: Job, _: int) -> Iterator[Any]:
    for piece in pieces(job.workload, job.rows):
        for kind, row in piece.each():
            if job.workload == "tokens":
                yield torch.from_numpy(np.frombuffer(row, np.uint16).copy())
            else:
                yield (kind, bytes(row)) if job.workload == "mix" else bytes(row)


def prepare(job: Job) -> None:
    shape: dict[str, Any] = {"chunk_bytes": _CHUNK_BYTES}
    if job.workload == "tokens":
        shape = {"chunk_size": _CHUNK_BYTES // 2, "item_loader": TokensLoader(block_size=ROW_TOKENS)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = f"{folder}/cache"
        os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = f"{folder}/data"
        litdata.optimize(
            partial(_rows, job),
            [0],
            output_dir=str(job.data),
            num_workers=1,
            verbose=False,
            start_method="fork",
            **shape,
        )


class Loader:
    def __init__(self, job: Job) -> None:
        self._out = Output(job.workload)
        collate = {"tokens": self._tokens, "blobs": self._out.rows, "mix": self._mix}[job.workload]
        rows = litdata.StreamingDataset(
            str(job.data),
            item_loader=TokensLoader(block_size=ROW_TOKENS) if job.workload == "tokens" else None,
            shuffle=True,
            seed=SEED,
            item_shuffle_window="full" if job.variant == "full" else None,
            batch_decode=0 if job.variant == "full" else "auto",
        )
        self._batches = litdata.StreamingDataLoader(rows, batch_size=BATCH_ROWS, collate_fn=collate, **job.processes)
        self.state, self.load = self._batches.state_dict, self._batches.load_state_dict

    def _tokens(self, rows: list[torch.Tensor]) -> Batch:
        return self._out.rows([row.numpy().view(np.uint8) for row in rows])

    def _mix(self, rows: list[tuple[int, bytes]]) -> Batch:
        return self._out.rows([row for _, row in rows], [kind for kind, _ in rows])

    def epoch(self) -> Iterator[Batch]:
        return iter(self._batches)


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"litdata {litdata.__version__}")
