"""Indexing many files at once, given out in their order."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

import pyarrow as pa

from millrace.core.manifest import Encoding
from millrace.core.model import Shard, SourceObject
from millrace.core.ports import Store
from millrace.pipeline.adopted.decode import index_file
from millrace.pipeline.reads import StoreReads

__all__ = ["index_files"]


async def index_files(
    store: Store,
    files: Sequence[SourceObject],
    encoding: Encoding,
    *,
    check: bool,
    slots: int,
    told: Callable[[int], None],
) -> AsyncGenerator[tuple[SourceObject, Shard, pa.Schema], None]:
    """Each file with what it was found to be, in order, ``slots`` of them at work.

    Whoever may leave it early wraps it in ``contextlib.aclosing``: then the threads at work are ended.

    Args:
        store: Where the files lie.
        files: As listed.
        encoding: What they should be.
        check: Decode each block once.
        slots: Files at once, each with up to 64 MB or its largest block in memory.
        told: Called with all bytes that were hashed so far, from any thread.

    Raises:
        SourceError, SourceChanged: a file isn't what it should be, or changed; names it.
        StoreError: the store failed.
    """
    reads = StoreReads(store, asyncio.get_running_loop())
    lock = threading.Lock()
    hashed = 0

    def count(size_bytes: int) -> None:
        nonlocal hashed
        with lock:
            hashed += size_bytes
            told(hashed)

    def work(obj: SourceObject) -> tuple[Shard, pa.Schema]:
        return index_file(encoding, reads, obj, check=check, told=count)

    coming: deque[tuple[SourceObject, asyncio.Task[tuple[Shard, pa.Schema]]]] = deque()
    todo = iter(files)
    try:
        while True:
            while len(coming) < slots and (obj := next(todo, None)) is not None:
                coming.append((obj, asyncio.create_task(asyncio.to_thread(work, obj))))
            if not coming:
                return
            obj, task = coming[0]
            shard, schema = await asyncio.shield(task)
            coming.popleft()
            yield obj, shard, schema
    finally:
        reads.close()
        await asyncio.gather(*(task for _, task in coming), return_exceptions=True)
