"""Hugging Face ``datasets``: into its Arrow cache, then ``save_to_disk``, then a SHA-256 of each file.

Two ways in: ``parquet``, its own reader, with two processes; ``generator``, rows one by one, as data that isn't in
a format it knows has to come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-not-found,unused-ignore]

from bench.digests import Tally, files_in, sha256_files
from bench.entry import Job, enter
from bench.tokens import COLUMN, add_column, rows

_TYPES = {"binary": datasets.Value("binary"), "list": datasets.List(datasets.Value("uint16"))}


def _examples(paths: list[str], layout: str) -> Iterator[dict[str, Any]]:
    for path in paths:
        for row in rows(Path(path), layout):
            yield {COLUMN: row}


def work(job: Job) -> Mapping[str, Any]:
    datasets.disable_progress_bars()
    paths = [str(path) for path in job.inputs]
    cache = str(job.scratch)
    if job.variant == "generator":
        made = datasets.Dataset.from_generator(
            _examples,
            features=datasets.Features({COLUMN: _TYPES[job.layout]}),
            gen_kwargs={"paths": paths, "layout": job.layout},
            num_proc=min(job.workers, len(paths)),
            cache_dir=cache,
        )
    else:
        made = datasets.Dataset.from_parquet(paths, num_proc=min(job.workers, len(paths)), cache_dir=cache)
    made.save_to_disk(job.out / "made", max_shard_size="64MB", num_proc=job.workers)
    sha256_files(files_in(job.out), job.workers)
    return {}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    data = datasets.load_from_disk(job.out / "made")
    for chunk in data.data.column(COLUMN).chunks:
        add_column(found, chunk)
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"datasets {datasets.__version__}")
