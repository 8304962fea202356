"""What the row formats share: an object's bytes as blocks, the ``path`` column, and cutting by size alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.model import Quarantined, SourceObject
from millrace.core.ports import Bytes
from millrace.core.spec import Source
from millrace.pipeline.decompress import BLOCK_BYTES, blocks, compression_of, decompressed
from millrace.pipeline.records import ReadContext, Reads

__all__ = ["BOM", "INT32_MAX", "even_cuts", "object_blocks", "path_column", "rejected", "whole_objects"]

BOM: Final = b"\xef\xbb\xbf"
"""The byte order mark that some programs write at the beginning of UTF-8 files."""

INT32_MAX: Final = 2**31 - 1
"""A batch's string or binary column holds at most this many bytes."""


def even_cuts(source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
    """Offsets at even distances, at most ``chunk_bytes``; ``[0, size]`` for a compressed object."""
    size = obj.size_bytes
    if size == 0 or compression_of(source, obj.path) != "none":
        return (0, size)
    count = -(-size // chunk_bytes)
    return [size * i // count for i in range(count + 1)]


def object_blocks(reads: Reads, source: Source, obj: SourceObject) -> Iterator[Bytes]:
    """One whole object's content, decompressed."""
    return decompressed(blocks(reads, obj), obj, compression_of(source, obj.path))


def whole_objects(context: ReadContext, objects: Sequence[SourceObject]) -> Iterator[tuple[int, Iterator[Bytes]]]:
    """Each object's content, decompressed, as (index in ``objects``, blocks), in order.

    Runs of small objects are fetched together. The blocks of one object are to be taken before the next is asked
    for; they need not be taken to their end.
    """
    at = 0
    while at < len(objects):
        end = at
        while end < len(objects) and objects[end].size_bytes <= BLOCK_BYTES:
            end += 1
        if end == at:
            yield at, object_blocks(context.reads, context.source, objects[at])
            at += 1
            continue
        for i, data in context.reads.read_whole(objects[at:end]):
            obj = objects[at + i]
            stored: Iterator[Bytes] = iter((data,) if len(data) else ())
            yield at + i, decompressed(stored, obj, compression_of(context.source, obj.path))
        at = end


def path_column(objects: Sequence[SourceObject], rows: npt.NDArray[np.int32]) -> pa.Array:
    """The ``path`` of each row; ``rows`` are indices into ``objects``."""
    used, where = np.unique(rows, return_inverse=True)
    return pa.array([objects[i].path for i in used.tolist()], pa.string()).take(pa.array(where))


def rejected(obj: SourceObject, position: str, rule: str, reason: str) -> Quarantined:
    """A record set aside while reading."""
    return Quarantined(obj.path, position, "ingest", rule, reason)
