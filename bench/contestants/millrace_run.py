"""Millrace, as ``millrace run`` does it: a plan, then the run, in one process through its wiring.

The variant is how many replicas, each in a store and a cloud of its own; Millrace reads every one back and hashes it
before it counts. The layout ``files`` takes the input as opaque files; the others as Parquet.
"""

from __future__ import annotations

import asyncio
import hashlib
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from bench.digests import Tally, files_in
from bench.entry import Job, enter, lap
from bench.tokens import COLUMN, add_column
from millrace.wiring.planning import make_plan
from millrace.wiring.running import RunOptions, run_planned
from millrace.wiring.world import open_world


def work(job: Job) -> Mapping[str, Any]:
    base = job.scratch
    stores = [f"store{i}" for i in range(int(job.variant))]
    world, pipeline = base / "world.yaml", base / "pipeline.yaml"
    world.write_text(
        "clouds:\n"
        + "".join(
            f"  cloud{i}: {{regions: {{here: {{jurisdiction: us, stores: {{{name}: "
            f'{{url: "file://{job.out / name}"}}}}}}}}}}\n'
            for i, name in enumerate(stores)
        )
    )
    kind = "files" if job.layout == "files" else "parquet"
    pipeline.write_text(
        f"dataset: bench\nsources:\n  - {{url: 'file://{job.source}', format: {kind}}}\n"
        f"placement: {{replicas: {len(stores)}, min_clouds: {len(stores)}}}\n"
    )
    return asyncio.run(_run(world, pipeline, job.workers))


async def _run(world_file: Path, pipeline_file: Path, workers: int) -> Mapping[str, Any]:
    seconds = lap()
    async with open_world(world_file) as world:
        planned = await make_plan(world, pipeline_file)
        planned_s = seconds()
        result = await run_planned(world, planned, RunOptions(workers=workers))
    report = result.report
    if result.exit_code or report.quarantined:
        raise SystemExit(f"the run ended as {report.state}: {report.error}")
    return {
        "digest": report.digest,
        "plan": planned_s,
        "stages": {stage.stage: stage.seconds for stage in report.stages},
    }


def tally(job: Job) -> list[Tally]:
    return [_store(job, folder) for folder in sorted(job.out.iterdir())]


def _store(job: Job, folder: Path) -> Tally:
    found = Tally()
    with ThreadPoolExecutor(job.workers) as pool:
        for part in pool.map(lambda path: _shard(path, job.layout), files_in(folder / "shards", "*.arrow")):
            found.add(part)
    return found


def _shard(path: Path, layout: str) -> Tally:
    found = Tally()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if hashlib.sha256(data).hexdigest() != path.stem:
            raise ValueError(f"{path} is not what its name says")
    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as reader:
        for i in range(reader.num_record_batches):
            batch = reader.get_batch(i)
            if layout != "files":
                add_column(found, batch.column(COLUMN))
                continue
            names, offsets = (batch.column(name).to_pylist() for name in ("path", "offset"))
            for row, piece in enumerate(batch.column("data")):
                found.add_piece(names[row], offsets[row], memoryview(piece.as_buffer()))
    return found


if __name__ == "__main__":
    enter(work, tally, versions=f"millrace {version('millrace')} on pyarrow {pa.__version__}")
