"""litdata: ``optimize`` with two workers, an input file a task, chunks of 64 MB, then a SHA-256 of each file.

``optimize`` keeps no digests of its own. Binary rows are returned as bytes. Lists are tokens, and tokens have their
own loader there (``TokensLoader``), which lays them end to end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import litdata  # type: ignore[import-not-found,unused-ignore]
import torch
from litdata.streaming.item_loader import TokensLoader  # type: ignore[import-not-found,unused-ignore]

from bench.digests import Tally, files_in, sha256_files
from bench.entry import Job, enter
from bench.tokens import ROW_BYTES, ROW_TOKENS, rows

_CHUNK_ROWS = 64_000_000 // ROW_BYTES


def _rows(path: str, layout: str) -> Iterator[Any]:
    for row in rows(Path(path), layout):
        yield row if layout == "binary" else torch.from_numpy(row.copy())


def work(job: Job) -> Mapping[str, Any]:
    os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(job.scratch / "cache")
    os.environ["DATA_OPTIMIZER_DATA_CACHE_FOLDER"] = str(job.scratch / "data")
    if job.layout == "binary":
        shape: dict[str, Any] = {"chunk_size": _CHUNK_ROWS}
    else:
        shape = {"chunk_size": _CHUNK_ROWS * ROW_TOKENS, "item_loader": TokensLoader(block_size=ROW_TOKENS)}
    litdata.optimize(
        partial(_rows, layout=job.layout),
        [str(path) for path in job.inputs],
        output_dir=str(job.out),
        num_workers=job.workers,
        reorder_files=False,
        verbose=False,
        start_method="fork",
        **shape,
    )
    sha256_files(files_in(job.out), job.workers)
    return {}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    loader = TokensLoader(block_size=ROW_TOKENS) if job.layout == "list" else None
    data = litdata.StreamingDataset(str(job.out), item_loader=loader)
    for i in range(len(data)):
        row = data[i]
        found.add_rows(memoryview(row.numpy() if isinstance(row, torch.Tensor) else row), ROW_BYTES)
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"litdata {litdata.__version__}")
