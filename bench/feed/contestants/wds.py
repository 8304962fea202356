"""webdataset: tars of 64 MB, all of them in random order, then its shuffle buffer of 5,000 rows, then batches.

A sample is one file in a tar; in ``mix`` the ending says the kind. Nothing is decoded. A state it doesn't have.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import webdataset

from bench.feed.batches import Batch, Output
from bench.feed.entry import SEED, Job, enter
from bench.feed.rows import BATCH_ROWS, KINDS, pieces

_BUFFER_ROWS = 5000


def prepare(job: Job) -> None:
    pattern = str(job.data / "shard-%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=64e6, maxcount=10**9, verbose=0, mtime=0) as writer:
        for piece in pieces(job.workload, job.rows):
            for i, (kind, row) in enumerate(piece.each(), piece.first):
                ending = KINDS[kind] if job.workload == "mix" else "row"
                writer.write({"__key__": f"{i:09}", ending: bytes(row)})


class Loader:
    def __init__(self, job: Job) -> None:
        self._out = Output(job.workload)
        files = [str(path) for path in job.files("*.tar")]
        rows = (
            webdataset.WebDataset(files, shardshuffle=len(files), seed=SEED, empty_check=False)
            .shuffle(_BUFFER_ROWS, seed=SEED)
            .batched(BATCH_ROWS, collation_fn=self._mix if job.workload == "mix" else self._one)
        )
        self._batches = webdataset.WebLoader(rows, batch_size=None, **job.processes) if job.workers else rows

    def _one(self, samples: list[dict[str, Any]]) -> Batch:
        return self._out.rows([sample["row"] for sample in samples])

    def _mix(self, samples: list[dict[str, Any]]) -> Batch:
        kinds = [next(i for i, kind in enumerate(KINDS) if kind in sample) for sample in samples]
        return self._out.rows([sample[KINDS[kind]] for sample, kind in zip(samples, kinds, strict=True)], kinds)

    def epoch(self) -> Iterator[Batch]:
        return iter(self._batches)


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"webdataset {version('webdataset')}")
