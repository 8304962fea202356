"""webdataset: ``ShardWriter``, tars of 64 MB, each hashed by a second thread as it is closed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import webdataset

from bench.digests import Tally, files_in, sha256_files
from bench.entry import Job, enter
from bench.tokens import ROW_BYTES, column_bytes, columns


def work(job: Job) -> Mapping[str, Any]:
    with ThreadPoolExecutor(1) as pool:
        hashed = []

        def closed(name: str) -> None:
            hashed.append(pool.submit(sha256_files, [Path(name)]))

        key = 0
        pattern = str(job.out / "shard-%06d.tar")
        with webdataset.ShardWriter(pattern, maxsize=64e6, maxcount=10**9, post=closed, verbose=0) as writer:
            for path in job.inputs:
                for column in columns(path):
                    data = column_bytes(column)
                    for at in range(0, len(data), ROW_BYTES):
                        row = bytes(data[at : at + ROW_BYTES])
                        writer.write({"__key__": f"{key:09}", "tokens.bin": row})
                        key += 1
        for future in hashed:
            future.result()
    return {}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    for sample in webdataset.WebDataset([str(p) for p in files_in(job.out)], shardshuffle=False, empty_check=False):
        found.add_rows(memoryview(sample["tokens.bin"]), ROW_BYTES)
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"webdataset {version('webdataset')}")
