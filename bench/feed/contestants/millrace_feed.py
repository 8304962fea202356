"""Millrace: rows from Arrow files through a pipeline into one local store, then ``millrace.open`` and its loader.

The pipeline has its default shards and blocks. Blocks come from the cache of the machine, which the untimed epoch has
filled: it lies beside the store, so reading either would be the same.

Variants: ``window`` is the default shuffle, ``full`` mixes all rows, ``blocks`` gives whole blocks in random order;
``numpy`` is the default shuffle with arrays instead of tensors; ``loader`` is its ``DataLoader`` for worker processes.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bench.feed.batches import Batch
from bench.feed.entry import SEED, Job, enter
from bench.feed.rows import BATCH_ROWS, ROW_TOKENS, Rows, pieces
from millrace import open as open_dataset  # loaded when it is used: here, as other imports are
from millrace.feed.torch.loading import FeedDataLoader
from millrace.wiring.planning import make_plan
from millrace.wiring.running import RunOptions, run_planned
from millrace.wiring.world import open_world

_FILE_BYTES = 100_000_000


def _batch(piece: Rows, workload: str) -> pa.RecordBatch:
    if workload == "tokens":
        rows = pa.FixedSizeListArray.from_arrays(pa.array(piece.tokens().reshape(-1)), ROW_TOKENS)
        return pa.record_batch({"tokens": rows})
    offsets = pa.py_buffer(piece.offsets.astype(np.int32))
    payload = pa.BinaryArray.from_buffers(pa.binary(), len(piece), [None, offsets, pa.py_buffer(piece.values)])
    return pa.record_batch({"payload": payload} if piece.kinds is None else {"kind": piece.kinds, "payload": payload})


def _write(folder: Path, job: Job) -> None:
    folder.mkdir()
    writer: Any = None
    size = files = 0
    for piece in pieces(job.workload, job.rows):
        batch = _batch(piece, job.workload)
        if writer is None:
            writer = pa.ipc.new_file(str(folder / f"part-{files:05}.arrow"), batch.schema)
        writer.write_batch(batch)
        size += piece.values.nbytes
        if size >= _FILE_BYTES:
            writer.close()
            writer, size, files = None, 0, files + 1
    if writer is not None:
        writer.close()


def prepare(job: Job) -> None:
    source = job.data / "source"
    _write(source, job)
    store = f'{{url: "file://{job.data / "store"}"}}'
    (job.data / "world.yaml").write_text(
        f"clouds:\n  cloud: {{regions: {{here: {{jurisdiction: us, stores: {{disk: {store}}}}}}}}}\n"
    )
    (job.data / "pipeline.yaml").write_text(
        f"dataset: bench\nsources:\n  - {{url: 'file://{source}', format: arrow}}\n"
        "placement: {replicas: 1, min_clouds: 1}\n"
    )
    asyncio.run(_run(job.data / "world.yaml", job.data / "pipeline.yaml"))
    shutil.rmtree(source)


async def _run(world_file: Path, pipeline_file: Path) -> None:
    async with open_world(world_file) as world:
        result = await run_planned(world, await make_plan(world, pipeline_file), RunOptions(workers=2))
    report = result.report
    if result.exit_code or report.quarantined:
        raise SystemExit(f"the run ended as {report.state}: {report.error}")


class Loader:
    def __init__(self, job: Job) -> None:
        rows = open_dataset("bench", world=job.data / "world.yaml", cache=job.data / "cache")
        options: dict[str, Any] = {
            "batch_size": BATCH_ROWS,
            "seed": SEED,
            "shuffle": job.variant if job.variant in {"window", "full", "blocks"} else True,
            "format": "numpy" if job.variant == "numpy" else "torch",
            "rank": 0,
            "world_size": 1,
        }
        self._batches: Any = (
            FeedDataLoader(rows.loader, **job.processes, **options)
            if job.variant == "loader"
            else rows.loader(**options)
        )
        self.state, self.load = self._batches.state_dict, self._batches.load_state_dict
        self.epoch = {"tokens": self._tokens, "blobs": self._blobs, "mix": self._mix}[job.workload]

    def _tokens(self) -> Iterator[Batch]:
        return (Batch(batch["tokens"]) for batch in self._batches)

    def _blobs(self) -> Iterator[Batch]:
        return (Batch(*batch["payload"]) for batch in self._batches)  # values and offsets

    def _mix(self) -> Iterator[Batch]:
        for batch in self._batches:
            values, offsets = batch["payload"]
            yield Batch(values, offsets, batch["kind"])


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"millrace {version('millrace')}")
