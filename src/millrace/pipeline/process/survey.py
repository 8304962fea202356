"""Exact dedup over a whole run, in pieces that each fit in memory.

A *survey* of each chunk writes the keys of its rows, one Arrow record batch for each partition of the key space.
*Resolve* reads one partition of every survey and says which rows lose: all but the first, by (chunk, ordinal), of
each key. Then each chunk is read again with its losers known. All of it is pure; who reads and writes is elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import Corrupt
from millrace.pipeline.process.keys import KeyBatch, partition

__all__ = [
    "RangedReader",
    "decode_losers",
    "encode_losers",
    "encode_survey",
    "merge_losers",
    "resolve",
    "survey_partition",
]

_KEYS: Final = pa.schema(
    [pa.field("high", pa.uint64(), False), pa.field("low", pa.uint64(), False), pa.field("ordinal", pa.int64(), False)]
)
_LOSERS: Final = pa.schema([pa.field("ordinal", pa.int64(), False)])
_READ_AHEAD_BYTES: Final = 65536


class RangedReader(io.RawIOBase):
    """A file over a function that reads ranges, so that one record batch can be read of a large object.

    Args:
        read: Gives bytes ``[start, start + length)``.
        size_bytes: Of the whole object.
    """

    def __init__(self, read: Callable[[int, int], bytes | memoryview], size_bytes: int) -> None:
        self._read = read
        self._size_bytes = size_bytes
        self._at = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        return self._at

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill as much of the buffer as there is."""
        length = max(0, min(len(buffer), self._size_bytes - self._at))
        if length:
            memoryview(buffer)[:length] = self._read(self._at, length)
        self._at += length
        return length


Readable = bytes | bytearray | memoryview | RangedReader


def _open(source: Readable, what: str) -> pa.ipc.RecordBatchFileReader:
    if isinstance(source, RangedReader):
        file = pa.PythonFile(io.BufferedReader(source, _READ_AHEAD_BYTES), mode="r")
    else:
        file = pa.BufferReader(source)
    try:
        return pa.ipc.open_file(file)
    except pa.ArrowException as error:
        raise Corrupt(f"{what} is not an Arrow file: {error}") from error


def encode_survey(chunk: int, partitions: int, keys: Iterable[KeyBatch]) -> list[memoryview]:
    """A chunk's keys as the pieces of one object: an Arrow IPC file, record batch p for partition p.

    Holds all keys of the chunk: 24 bytes a row.

    Args:
        chunk: Its index; kept in the file.
        partitions: How many, the same for the whole run.
        keys: In the stream's order.
    """
    batches = list(keys)
    high = np.concatenate([k.high for k in batches]) if batches else np.empty(0, np.uint64)
    low = np.concatenate([k.low for k in batches]) if batches else np.empty(0, np.uint64)
    ordinals = np.concatenate([k.ordinals for k in batches]) if batches else np.empty(0, np.int64)
    del batches
    belongs = partition(high, partitions)
    order = np.argsort(belongs, kind="stable")
    ends = np.searchsorted(belongs[order], np.arange(partitions + 1)).tolist()
    schema = _KEYS.with_metadata({"chunk": str(chunk), "partitions": str(partitions)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for start, end in pairwise(ends):
            rows = order[start:end]
            writer.write_batch(pa.RecordBatch.from_arrays([high[rows], low[rows], ordinals[rows]], schema=schema))
    return [memoryview(sink.getvalue())]


def survey_partition(source: Readable, index: int) -> tuple[int, KeyBatch]:
    """One partition of a survey: its chunk's index, and the keys in the stream's order.

    Args:
        source: The object's bytes, or a ``RangedReader``: then little more than the partition is read.
        index: Which partition.

    Raises:
        Corrupt: the bytes are no survey with that partition.
    """
    reader = _open(source, "a survey of keys")
    metadata = reader.schema.metadata or {}
    if b"chunk" not in metadata or not reader.schema.equals(_KEYS):
        raise Corrupt("this object is not a survey of keys")
    if not 0 <= index < reader.num_record_batches:
        raise Corrupt(f"this survey has {reader.num_record_batches} partitions and no number {index}")
    batch = reader.get_batch(index)
    # Copies: views would keep the bytes of every whole survey alive while one partition of each is held.
    high, low, ordinals = (column.to_numpy().copy() for column in batch.columns)
    return int(metadata[b"chunk"]), KeyBatch(high, low, ordinals)


def resolve(parts: Iterable[tuple[int, KeyBatch]]) -> dict[int, npt.NDArray[np.int64]]:
    """Which rows lose, by chunk: of each key, all but the first by (chunk, ordinal).

    Args:
        parts: (chunk index, its keys in one partition, in the stream's order), in any order of chunks. About 60 bytes
            a key are held.

    Returns:
        For each chunk that has any: its losers' ordinals, sorted.
    """
    pairs = sorted(((c, k) for c, k in parts if len(k)), key=lambda pair: (pair[0], int(pair[1].ordinals[0])))
    if not pairs:
        return {}
    high = np.concatenate([keys.high for _, keys in pairs])
    low = np.concatenate([keys.low for _, keys in pairs])
    # Rows lie in the dataset's order now, so a stable sort by key alone leaves the first of each key in front.
    order = np.argsort(high, kind="stable")
    ranked = high[order]
    same = ranked[1:] == ranked[:-1]
    if (low[order[1:]] != low[order[:-1]])[same].any():  # two keys with one first half: 1 in 2^64 pairs
        order = np.lexsort((low, high))
        ranked = high[order]
        same = (ranked[1:] == ranked[:-1]) & (low[order[1:]] == low[order[:-1]])
    lost = np.sort(order[1:][same])
    del high, low, ranked, same, order
    ordinals = np.concatenate([keys.ordinals for _, keys in pairs])[lost]
    chunks = np.repeat(np.asarray([c for c, _ in pairs], np.int64), [len(k) for _, k in pairs])[lost]
    found, starts = np.unique(chunks, return_index=True)
    return dict(zip(found.tolist(), np.split(ordinals, starts[1:]), strict=True)) if len(found) else {}


def encode_losers(losers: Mapping[int, npt.NDArray[np.int64]]) -> list[memoryview]:
    """One partition's losers as the pieces of one object: an Arrow IPC file, a record batch a chunk that has any."""
    chunks = sorted(chunk for chunk, ordinals in losers.items() if len(ordinals))
    schema = _LOSERS.with_metadata({"chunks": ",".join(map(str, chunks))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for chunk in chunks:
            writer.write_batch(pa.RecordBatch.from_arrays([pa.array(losers[chunk], pa.int64())], schema=schema))
    return [memoryview(sink.getvalue())]


def decode_losers(source: Readable, chunk: int) -> npt.NDArray[np.int64]:
    """One chunk's losers in one partition, sorted; empty if it has none.

    Raises:
        Corrupt: the bytes are no losers.
    """
    reader = _open(source, "a list of duplicates")
    metadata = reader.schema.metadata or {}
    if b"chunks" not in metadata or not reader.schema.equals(_LOSERS):
        raise Corrupt("this object is not a list of duplicates")
    chunks = [int(c) for c in metadata[b"chunks"].split(b",") if c]
    if chunk not in chunks:
        return np.empty(0, np.int64)
    found: npt.NDArray[np.int64] = reader.get_batch(chunks.index(chunk)).column(0).to_numpy().copy()
    return found


def merge_losers(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """A chunk's losers over all partitions, sorted: what ``ProcessContext.losers`` wants."""
    return np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
