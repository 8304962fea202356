"""Plan many source objects: seconds and peak memory of listing, cutting, encoding and decoding.

    python bench/bench_plan.py                      # a million objects of a store that makes them up
    python bench/bench_plan.py --files /dev/shm     # a million real, empty files below that directory

The target is a million objects in under 60 seconds and 1 GB.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence

from millrace.core.ports import ObjectInfo, Store
from millrace.core.spec import Pipeline, Source
from millrace.pipeline.globs import path_filter
from millrace.pipeline.plan import Plan, plan_sources
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryStore

PAGE = 1000


class ImaginaryStore(MemoryStore):
    """Lists objects that aren't there, a page at a time, as a cloud does."""

    def __init__(self, count: int) -> None:
        super().__init__("imaginary")
        self._count = count

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        for at in range(0, self._count, PAGE):
            yield [
                ObjectInfo(
                    f"year={2000 + i % 25}/month={i % 12:02}/part-{i * 7919 % self._count:09}.txt",
                    20_000 + i % 1000,
                    f'"{i:032x}"',
                    1_700_000_000_000,
                )
                for i in range(at, min(at + PAGE, self._count))
            ]
            await asyncio.sleep(0)


def make_files(below: str, count: int) -> str:
    """``count`` empty files, a thousand in a directory."""
    root = tempfile.mkdtemp(prefix="bench-plan-", dir=below)
    for folder in range(-(-count // 1000)):
        path = os.path.join(root, f"{folder:05}")
        os.mkdir(path)
        for i in range(folder * 1000, min(folder * 1000 + 1000, count)):
            os.close(os.open(os.path.join(path, f"part-{i:09}.txt"), os.O_CREAT | os.O_WRONLY, 0o600))
    return root


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def measure(store: Store, source: Source) -> None:
    pipeline = Pipeline(dataset="bench", sources=(source,))
    before = peak_mb()
    start = time.perf_counter()
    plan = asyncio.run(plan_sources(pipeline, [store]))
    planned = time.perf_counter()
    data = b"".join(plan.encode())
    encoded = time.perf_counter()
    again = Plan.decode(data)
    decoded = time.perf_counter()
    chunk = again.chunk(len(again) - 1)
    read = time.perf_counter()
    print(
        f"objects {plan.total_objects}, chunks {len(plan)}, bytes of input {plan.total_bytes}, of the plan {len(data)}"
    )
    print(f"plan    {planned - start:8.2f} s")
    print(f"encode  {encoded - planned:8.2f} s")
    print(f"decode  {decoded - encoded:8.2f} s")
    print(f"1 chunk {read - decoded:8.4f} s for {len(chunk.objects)} objects")
    print(f"peak    {peak_mb():8.0f} MB resident, of which {before:.0f} MB before planning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--files", metavar="DIRECTORY", help="use real, empty files below this directory")
    options = parser.parse_args()
    source = Source(url="file://./data", include=("**/*.txt",), exclude=("**/.git/**",), format="text")
    if options.files is None:
        measure(ImaginaryStore(options.objects), source)
        return
    root = make_files(options.files, options.objects)
    try:
        measure(LocalStore(root, name="source", prune=path_filter(source).dir_pruned), source)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
