"""The plan of a run: which bytes of which objects make which chunk. A pure function of the listing."""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt
from millrace.core.model import Chunk, Digest, SourceObject
from millrace.core.ports import Bytes, Store
from millrace.core.spec import Pipeline, Source
from millrace.pipeline.formats.registry import format_named
from millrace.pipeline.listing import Listing, list_source
from millrace.pipeline.reads import StoreReads
from millrace.pipeline.records import Format

__all__ = ["GROUP_OBJECTS", "Cuts", "Plan", "cut", "plan_sources"]

GROUP_OBJECTS: Final = 10_000
"""Objects in a group of small ones, at most."""

Cuts = Mapping[int, Sequence[int]]
"""Where the large objects of one source may be cut, by their index in its listing (see ``Format.cut``)."""

_MAGIC: Final = b"MILLPLAN\x01\0\0\0\0\0\0\0"
_ALIGNMENT: Final = 64
_PLAN_THREADS: Final = 8
_CUTS_AT_ONCE: Final = 512

_OBJECTS: Final = pa.schema(
    [("source", pa.int32()), ("path", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string())]
)
_CHUNKS: Final = pa.schema(
    [("source", pa.int32()), ("first", pa.int64()), ("last", pa.int64()), ("start", pa.int64()), ("end", pa.int64())]
)


@dataclass(frozen=True, eq=False)
class Plan:
    """Every chunk of a run, as columns. About 100 bytes an object.

    Attributes:
        objects: One row an object: ``source``, ``path``, ``size``, ``version``; by source, then path.
        chunks: One row a chunk: ``source``, ``first`` and ``last`` (rows of ``objects``, the second exclusive),
            ``start`` and ``end`` (as in :class:`millrace.core.model.Chunk`).
        source_schemas: What each source's records look like.
    """

    objects: pa.RecordBatch
    chunks: pa.RecordBatch
    source_schemas: tuple[pa.Schema, ...]

    def __len__(self) -> int:
        return int(self.chunks.num_rows)

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of input, as stored (compressed where it is)."""
        return int(self.objects["size"].to_numpy().sum())

    @property
    def total_objects(self) -> int:
        """Source objects."""
        return int(self.objects.num_rows)

    def chunk(self, index: int) -> Chunk:
        """One chunk, with its objects. Raises ``IndexError`` past the last."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        source, first, last, start, end = (self.chunks[name][index].as_py() for name in _CHUNKS.names)
        rows = self.objects.slice(first, last - first)
        columns = (rows[name].to_pylist() for name in ("path", "size", "version"))
        return Chunk(index, source, tuple(map(SourceObject, *columns)), start, end)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self.chunk, range(len(self)))

    @cached_property
    def digest(self) -> Digest:
        """SHA-256 of what :meth:`encode` gives, its last 32 bytes left out."""
        return Digest(bytes(self.encode()[-1]).hex())

    def encode(self) -> list[Bytes]:
        """The plan as bytes, in pieces; equal plans give equal bytes.

        Magic, a count, as many (length) words, then the sections, each aligned to 64 bytes: the sources' schemas,
        the objects, the chunks; at the end the SHA-256 of all before it.
        """
        sections = [memoryview(schema.serialize()) for schema in self.source_schemas]
        sections += [memoryview(self.objects.serialize()), memoryview(self.chunks.serialize())]
        head = _MAGIC + struct.pack(f"<{len(sections) + 1}Q", len(sections), *map(len, sections))
        pieces: list[Bytes] = [head + bytes(-len(head) % _ALIGNMENT)]
        for section in sections:
            pieces += [section, bytes(-len(section) % _ALIGNMENT)]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        return [*pieces, digest.digest()]

    @classmethod
    def decode(cls, data: Bytes) -> Plan:
        """The plan that :meth:`encode` wrote, on top of ``data``, without copying it.

        Raises:
            Corrupt: these bytes are not a whole plan.
        """
        view = memoryview(data).cast("B")
        if len(view) < len(_MAGIC) + 40 or bytes(view[: len(_MAGIC)]) != _MAGIC:
            raise Corrupt(f"the stored plan is not a plan ({len(view)} bytes); start a new run")
        if hashlib.sha256(view[:-32]).digest() != bytes(view[-32:]):
            raise Corrupt(f"the stored plan is damaged ({len(view)} bytes that don't add up); start a new run")
        (count,) = struct.unpack_from("<Q", view, len(_MAGIC))
        lengths = struct.unpack_from(f"<{count}Q", view, len(_MAGIC) + 8)
        at = len(_MAGIC) + 8 * (count + 1)
        sections = []
        for length in lengths:
            at += -at % _ALIGNMENT
            sections.append(pa.py_buffer(view[at : at + length]))
            at += length
        return cls(
            pa.ipc.read_record_batch(sections[-2], _OBJECTS),
            pa.ipc.read_record_batch(sections[-1], _CHUNKS),
            tuple(pa.ipc.read_schema(section) for section in sections[:-2]),
        )


def cut(
    listings: Sequence[Listing], pipeline: Pipeline, cuts: Sequence[Cuts], schemas: Sequence[pa.Schema] = ()
) -> Plan:
    """Cut the objects of all sources into chunks.

    Objects up to ``pipeline.chunk`` bytes are grouped in order, until a group would pass that size or 10,000
    objects. A larger one makes chunks of its own: neighbouring pieces between its offsets are joined while they
    fit, and a piece that is too large by itself is a chunk all the same.

    Args:
        listings: One a source.
        pipeline: Its ``chunk``.
        cuts: One a source; an object that isn't named can't be cut.
        schemas: One a source.

    Raises:
        ValueError: offsets don't go from 0 to the object's size, or don't increase.
    """
    chunks: list[tuple[int, int, int, int, int]] = []
    objects: list[pa.Table] = []
    base = 0
    for source, (listing, offsets) in enumerate(zip(listings, cuts, strict=True)):
        sizes = listing.sizes
        before = 0
        for large in np.flatnonzero(sizes > pipeline.chunk).tolist():
            chunks += _groups(source, base, before, sizes[before:large], pipeline.chunk)
            size = int(sizes[large])
            for start, end in _ranges(offsets.get(large, (0, size)), size, pipeline.chunk):
                chunks.append((source, base + large, base + large + 1, start, end))
            before = large + 1
        chunks += _groups(source, base, before, sizes[before:], pipeline.chunk)
        numbers = pa.array(np.full(len(listing), source, np.int32))
        objects.append(pa.table([numbers, *listing.table.columns], schema=_OBJECTS))
        base += len(listing)
    columns = np.array(chunks, np.int64).reshape(-1, len(_CHUNKS)).T
    return Plan(
        _one_batch(pa.concat_tables(objects) if objects else _OBJECTS.empty_table()),
        pa.record_batch([pa.array(c).cast(f.type) for c, f in zip(columns, _CHUNKS, strict=True)], schema=_CHUNKS),
        tuple(schemas),
    )


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    columns = [
        column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, pa.array([], column.type)])
        for column in table.columns
    ]
    return pa.record_batch(columns, schema=table.schema)


def _groups(
    source: int, base: int, first: int, sizes: npt.NDArray[np.int64], limit: int
) -> Iterator[tuple[int, int, int, int, int]]:
    """Chunks of whole objects; ``sizes`` are those of the objects from ``first`` on, each at most ``limit``."""
    total = np.concatenate(([0], np.cumsum(sizes)))
    at = 0
    while at < len(sizes):
        fits = int(np.searchsorted(total, total[at] + limit, side="right")) - 1
        end = min(max(fits, at + 1), at + GROUP_OBJECTS)
        yield source, base + first + at, base + first + end, 0, int(total[end] - total[at])
        at = end


def _ranges(offsets: Sequence[int], size: int, limit: int) -> Iterator[tuple[int, int]]:
    points = np.asarray(offsets, np.int64)
    if len(points) < 2 or points[0] != 0 or points[-1] != size or (np.diff(points) <= 0).any():
        raise ValueError(f"cut offsets must increase from 0 to {size}, not {offsets!r:.200}")
    at = 0
    while at < len(points) - 1:
        fits = int(np.searchsorted(points, points[at] + limit, side="right")) - 1
        end = max(fits, at + 1)
        yield int(points[at]), int(points[end])
        at = end


PlanProgress = Callable[[int], None]
"""Told how many objects of all sources have been seen so far."""


async def plan_sources(pipeline: Pipeline, stores: Sequence[Store], *, progress: PlanProgress | None = None) -> Plan:
    """List every source, look into large and first objects, and cut.

    Args:
        pipeline: Its sources and its ``chunk``.
        stores: One a source, each opened at its source's URL.
        progress: Called as the listing goes on.

    Raises:
        UsageError: a source has nothing to read.
        SourceError: a source can't be listed, or an object isn't what its format says.
        StoreError: a store failed.
    """
    listings: list[Listing] = []
    cuts: list[Cuts] = []
    schemas: list[pa.Schema] = []
    seen = 0
    for source, store in zip(pipeline.sources, stores, strict=True):
        before = seen

        def told(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count)

        listing = await list_source(store, source, progress=told)
        seen += len(listing)
        schema, where = await _looked_into(store, source, listing, pipeline.chunk)
        listings.append(listing)
        cuts.append(where)
        schemas.append(schema)
    return cut(listings, pipeline, cuts, schemas)


async def _looked_into(store: Store, source: Source, listing: Listing, chunk_bytes: int) -> tuple[pa.Schema, Cuts]:
    """Ask the format for the schema and the cuts, in threads of our own: a store may need the loop's."""
    loop = asyncio.get_running_loop()
    reads = StoreReads(store, loop)
    form: Format = format_named(source.format)
    pool = ThreadPoolExecutor(_PLAN_THREADS, thread_name_prefix="plan")
    try:
        schema = await loop.run_in_executor(pool, form.schema, reads, source, listing)
        large = np.flatnonzero(listing.sizes > chunk_bytes).tolist()
        cuts: dict[int, Sequence[int]] = {}
        for at in range(0, len(large), _CUTS_AT_ONCE):
            some = large[at : at + _CUTS_AT_ONCE]
            jobs = [loop.run_in_executor(pool, form.cut, reads, source, listing[i], chunk_bytes) for i in some]
            cuts.update(zip(some, await asyncio.gather(*jobs), strict=True))
        return schema, cuts
    finally:
        reads.close()
        pool.shutdown(wait=False, cancel_futures=True)
