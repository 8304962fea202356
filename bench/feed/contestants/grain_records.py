"""Grain: ArrayRecord files of 64 MB with a record a group, as it asks for, and a global shuffle.

Records are gathered in lists of 32 by ``MapDataset.batch`` and copied when they come out. The variant is the number of
threads that read ahead, 16 by its default; they are part of this process. The kind is a record's first byte. It
doesn't end an epoch by itself: batches are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from typing import Any

import grain.python as grain  # type: ignore[import-not-found,unused-ignore]
from array_record.python.array_record_module import ArrayRecordWriter  # type: ignore[import-not-found,unused-ignore]

from bench.feed.batches import Batch, Output
from bench.feed.entry import SEED, Job, enter
from bench.feed.rows import BATCH_ROWS, pieces

_FILE_BYTES = 64_000_000
_PREFETCH_BATCHES = 16


def prepare(job: Job) -> None:
    writer: Any = None
    size = files = 0
    for piece in pieces(job.workload, job.rows):
        if writer is None:
            path = job.data / f"part-{files:05}.array_record"
            writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for kind, row in piece.each():
            writer.write(bytes([kind]) + bytes(row) if job.workload == "mix" else bytes(row))
        size += piece.values.nbytes
        if size >= _FILE_BYTES:
            writer.close()
            writer, size, files = None, 0, files + 1
    if writer is not None:
        writer.close()


class Loader:
    def __init__(self, job: Job) -> None:
        self._job = job
        self._out = Output(job.workload)
        source = grain.ArrayRecordDataSource([str(path) for path in job.files("*.array_record")])
        rows = grain.MapDataset.source(source).shuffle(seed=SEED).batch(BATCH_ROWS, batch_fn=list).repeat()
        threads = int(job.variant)
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_PREFETCH_BATCHES if threads else 0)
        batches = rows.to_iter_dataset(options)
        if job.workers:
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=job.workers))
        self._batches = iter(batches)
        self._given = 0

    def state(self) -> Any:
        return self._batches.get_state(), self._given

    def load(self, state: Any) -> None:
        inner, self._given = state
        self._batches.set_state(inner)

    def epoch(self) -> Iterator[Batch]:
        for rows in islice(self._batches, self._job.batches - self._given):
            self._given += 1
            if self._job.workload == "mix":
                yield self._out.rows([memoryview(row)[1:] for row in rows], [row[0] for row in rows])
            else:
                yield self._out.rows(rows)
        self._given = 0


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"grain {version('grain')}, array_record {version('array_record')}")
