"""Ray Data: ``read_parquet`` to ``write_parquet`` on a local Ray of two CPUs, then a SHA-256 of each file.

Dictionaries and compression are off in what it writes: both cost time and random tokens give nothing back for it.
Starting Ray counts, as starting any tool's workers does, and is also given by itself.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray  # type: ignore[import-not-found,unused-ignore]
import ray.data  # type: ignore[import-not-found,unused-ignore]

from bench.digests import Tally, files_in, sha256_files
from bench.entry import Job, enter, lap
from bench.tokens import COLUMN, add_column


def work(job: Job) -> Mapping[str, Any]:
    # Not in the scratch folder: Ray puts sockets there, whose paths may have 107 letters.
    folder = Path(tempfile.gettempdir(), "ray")
    seconds = lap()
    ray.init(
        num_cpus=job.workers,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(folder),
    )
    started = seconds()
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.read_parquet(str(job.source))
    rows.write_parquet(str(job.out), compression="NONE", use_dictionary=False)
    sha256_files(files_in(job.out), job.workers)
    done = seconds()
    ray.shutdown()
    return {"startup": started, "seconds": done}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    for path in files_in(job.out, "*.parquet"):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024, columns=[COLUMN]):
                add_column(found, batch.column(0))
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"ray {ray.__version__}")
