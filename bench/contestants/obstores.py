"""A script with ``obstore``: ranged reads, a put to each of three local stores, ranged reads back.

Two files at once, eight ranges of each. It doesn't fsync: ``obstore`` has no way to ask for that.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from obstore.store import LocalStore

from bench.contestants.copies import COPIES, tally
from bench.entry import Job, enter

_PART_BYTES = 16_000_000


async def _read(store: LocalStore, name: str, size: int) -> tuple[Sequence[Any], str]:
    parts = await asyncio.gather(
        *(
            store.get_range_async(name, start=at, length=min(_PART_BYTES, size - at))
            for at in range(0, size, _PART_BYTES)
        )
    )
    return parts, await asyncio.to_thread(_sha256, parts)


def _sha256(parts: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


async def _copy(source: LocalStore, stores: Sequence[LocalStore], name: str, size: int) -> None:
    parts, digest = await _read(source, name, size)
    await asyncio.gather(*(store.put_async(name, iter(parts), chunk_size=_PART_BYTES) for store in stores))
    del parts
    for store in stores:
        _, again = await _read(store, name, size)
        if again != digest:
            raise ValueError(f"{name} is not what was read")


async def _all(job: Job) -> None:
    source = LocalStore(job.source)
    stores = [LocalStore(job.out / name, mkdir=True) for name in COPIES]
    free = asyncio.Semaphore(job.workers)

    async def one(name: str, size: int) -> None:
        async with free:
            await _copy(source, stores, name, size)

    async with asyncio.TaskGroup() as group:
        for path in job.inputs:
            group.create_task(one(path.name, path.stat().st_size))


def work(job: Job) -> Mapping[str, Any]:
    asyncio.run(_all(job))
    return {}


if __name__ == "__main__":
    enter(work, tally, versions=f"obstore {version('obstore')}")
