"""Grain's ArrayRecord: a file for each input file, a record a row, uncompressed; then a SHA-256 of each file.

``group_size:1`` is what Grain asks for, since it reads records one by one. Writing is threaded inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter  # type: ignore[import-not-found,unused-ignore]

from bench.digests import Tally, files_in, sha256_files
from bench.entry import Job, enter
from bench.tokens import ROW_BYTES, column_bytes, columns


def work(job: Job) -> Mapping[str, Any]:
    for path in job.inputs:
        writer = ArrayRecordWriter(str(job.out / f"{path.stem}.array_record"), "group_size:1,uncompressed")
        for column in columns(path):
            data = column_bytes(column)
            for at in range(0, len(data), ROW_BYTES):
                writer.write(bytes(data[at : at + ROW_BYTES]))
        writer.close()
    sha256_files(files_in(job.out), job.workers)
    return {}


def tally(job: Job) -> list[Tally]:
    found = Tally()
    for path in files_in(job.out):
        reader = ArrayRecordReader(str(path))
        count = reader.num_records()
        for at in range(0, count, 1024):
            for row in reader.read(range(at, min(at + 1024, count))):
                found.add_rows(memoryview(row), ROW_BYTES)
        reader.close()
    return [found]


if __name__ == "__main__":
    enter(work, tally, versions=f"array_record {version('array_record')}")
