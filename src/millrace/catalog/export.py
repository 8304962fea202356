"""export: a version's records, in order, into files of another format. Two shards in memory, whatever its size."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa

from millrace.catalog.in_place import is_in_place
from millrace.catalog.manifests import OpenManifest
from millrace.catalog.readers import reading
from millrace.core.errors import Corrupt, SourceError, Unavailable, UsageError
from millrace.core.facts import ReplicaEntry, VersionRecord
from millrace.core.model import Block, Digest
from millrace.core.ports import Clock, Coordination
from millrace.pipeline.adopted.decode import decode_block

__all__ = ["ExportProgress", "ExportReport", "Exporter", "export_dataset"]

T = TypeVar("T")


class Exporter(Protocol):
    """Writes records to files. Its methods block; they are called from one thread at a time."""

    def write(self, batch: pa.RecordBatch) -> None:
        """Add records."""

    def close(self) -> Sequence[str]:
        """Finish; gives the files that were written, relative to the directory."""

    def abort(self) -> None:
        """Take away what was written so far."""


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """How far it is."""

    shards_done: int
    shards_total: int
    rows_done: int
    rows_total: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written.

    Attributes:
        files: Relative to the directory, in order.
        shards, rows, bytes: Of the version that was read.
    """

    files: tuple[str, ...]
    shards: int
    rows: int
    bytes: int


async def export_dataset(
    coord: Coordination,
    version: VersionRecord,
    manifest: OpenManifest,
    open_exporter: Callable[[pa.Schema], Exporter],
    *,
    who: str,
    clock: Clock,
    progress: Callable[[ExportProgress], None] | None = None,
) -> ExportReport:
    """Stream the shards of ``version`` in order into an exporter.

    Each shard is fetched whole from any true replica and verified before a record of it is written; the next one
    is on its way meanwhile. A failure or cancellation takes away what was written.

    Args:
        coord: For the claim that keeps garbage collection away.
        version: What is exported.
        manifest: Its manifest, opened.
        open_exporter: Makes the exporter for a schema; called in a thread, since it may touch the disk.
        who: Names this reader, uniquely.
        clock: For the claim.
        progress: Called after each shard.

    Raises:
        UsageError: the version has no rows, or was removed.
        StoreError: no whole replica of a shard can be read.
    """
    schema = manifest.schema
    if schema is None:
        raise UsageError(f"{version.dataset}@{version.version} has no rows; there is nothing to export")
    async with reading(coord, version, who, clock):
        exporter = await _opened(open_exporter, schema)
        root = manifest.root
        rows = size = shards = 0
        try:
            async with aclosing(_records(manifest, schema)) as batches:
                async for batch, ended in batches:
                    if batch is not None:
                        await _in_thread(exporter.write, batch)
                        rows += batch.num_rows
                    shards += ended > 0
                    size += ended
                    if progress is not None:
                        progress(ExportProgress(shards, root.shards, rows, root.rows, size, root.bytes))
            files = await _in_thread(exporter.close)
        except BaseException:
            await _in_thread(exporter.abort)
            raise
    return ExportReport(tuple(str(file) for file in files), shards, rows, size)


async def _records(
    manifest: OpenManifest, schema: pa.Schema
) -> AsyncGenerator[tuple[pa.RecordBatch | None, int], None]:
    """Every batch in order, and after the last one of each shard (None, the shard's bytes)."""
    if await _is_adopted(manifest):
        async with aclosing(_adopted(manifest, schema)) as found:
            async for item in found:
                yield item
        return
    async with aclosing(_shards(manifest)) as whole:
        async for data in whole:
            for batch in _batches(data):
                yield batch, 0
            yield None, len(data)


async def _is_adopted(manifest: OpenManifest) -> bool:
    """Whether the version's shards are files that were adopted: they are read block by block, whatever their size."""
    if manifest.root.encoding != "arrow":
        return True
    page = await manifest.replicas(0) if len(manifest) else None
    return page is not None and is_in_place(page.entries[0])


async def _adopted(
    manifest: OpenManifest, schema: pa.Schema
) -> AsyncGenerator[tuple[pa.RecordBatch | None, int], None]:
    async with aclosing(manifest.segments()) as segments:
        async for i, _ in segments:
            page = await manifest.replicas(i)
            if page is None:
                raise Unavailable(
                    "it is no longer known where the adopted files of this version lie; adopt them again, which makes "
                    "the same version"
                )
            for entry, blocks in zip(page.entries, await manifest.blocks(i), strict=True):
                aux: memoryview | None = None
                for block in blocks:
                    data = await manifest.block(block, entry)
                    if block.rows == 0:
                        aux = data
                        continue
                    yield await asyncio.to_thread(_decoded, manifest, schema, entry, aux, data, block), 0
                yield None, entry.size_bytes


def _decoded(
    manifest: OpenManifest,
    schema: pa.Schema,
    entry: ReplicaEntry,
    aux: memoryview | None,
    data: memoryview,
    block: Block,
) -> pa.RecordBatch:
    try:
        return decode_block(manifest.root.encoding, schema, aux, data, offset=block.offset, rows=block.rows)
    except SourceError as error:
        raise SourceError(f"{entry.key}: {error}") from error


async def _shards(manifest: OpenManifest) -> AsyncGenerator[memoryview, None]:
    """Every shard, whole, in order; one is fetched while the one before is used."""
    coming: asyncio.Task[memoryview] | None = None
    try:
        async with aclosing(_digests(manifest)) as digests:
            async for digest, known in digests:
                following = asyncio.create_task(manifest.shard(digest, known))
                ready, coming = coming, following
                if ready is not None:
                    yield await ready
        if coming is not None:
            yield await coming
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _digests(manifest: OpenManifest) -> AsyncGenerator[tuple[Digest, ReplicaEntry | None], None]:
    async with aclosing(manifest.segments()) as segments:
        async for i, segment in segments:
            page = await manifest.replicas(i)
            for k in range(len(segment)):
                yield segment.digest(k), page.entries[k] if page is not None else None


def _batches(data: memoryview) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.py_buffer(data))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    except pa.ArrowInvalid as error:
        raise Corrupt(f"a shard can't be read as an Arrow file, though its digest is right: {error}") from error


async def _opened(open_exporter: Callable[[pa.Schema], Exporter], schema: pa.Schema) -> Exporter:
    """The exporter; when cancelled meanwhile, what it has begun is taken away."""
    opening = asyncio.ensure_future(asyncio.to_thread(open_exporter, schema))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if not opening.cancelled() and opening.exception() is None:
            await _in_thread(opening.result().abort)
        raise


async def _in_thread(work: Callable[..., T], *args: object) -> T:
    """Like ``asyncio.to_thread``, but when cancelled it waits for the thread: nothing writes behind our back."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.gather(running, return_exceptions=True)
        raise
