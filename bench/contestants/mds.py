"""mosaicml-streaming: ``MDSWriter`` without compression, with its own SHA-256.

The writer is one process by itself; the variant ``pool`` is its documentation's way to use several: a writer for
each part of the input in a pool (forked, so that nothing is imported twice), then ``merge_index``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.digests import Tally
from bench.entry import Job, enter
from bench.mosaic import streaming
from bench.tokens import COLUMN, ROW_BYTES, ROW_TOKENS, rows

_ENCODINGS = {"binary": "bytes", "list": f"ndarray:uint16:{ROW_TOKENS}"}


def _write(paths: Sequence[Path], out: Path, layout: str) -> None:
    with streaming.MDSWriter(out=str(out), columns={COLUMN: _ENCODINGS[layout]}, hashes=["sha256"]) as writer:
        for path in paths:
            for row in rows(path, layout):
                writer.write({COLUMN: row})


def work(job: Job) -> Mapping[str, Any]:
    if job.variant != "pool":
        _write(job.inputs, job.out, job.layout)
        return {}
    parts = [(job.inputs[i :: job.workers], job.out / f"{i}", job.layout) for i in range(job.workers)]
    with multiprocessing.get_context("fork").Pool(job.workers) as pool:
        pool.starmap(_write, parts)
    streaming.base.util.merge_index(str(job.out), keep_local=True)
    return {}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    data = streaming.StreamingDataset(local=str(job.out), batch_size=1, validate_hash="sha256")
    for i in range(data.num_samples):
        found.add_rows(memoryview(data[i][COLUMN]), ROW_BYTES)
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"mosaicml-streaming {streaming.__version__}")
