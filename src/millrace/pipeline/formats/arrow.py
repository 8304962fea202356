"""Arrow IPC: a file is read at random, a chunk owning the record batches that begin in its range; a stream is whole.

Which of the two an object is shows in its first bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.ipc_footer import IpcBlock, batch_rows, record_batches
from millrace.pipeline.formats.ranged import HOLD_BYTES, RangedFile, decoding, even_cuts, opened
from millrace.pipeline.formats.tabular import conform, emit, plain_schema, require_same, with_path
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["ARROW", "Arrow"]

_WHAT: Final = "an Arrow IPC file"
_MAGIC: Final = b"ARROW1"
_CONTINUATION: Final = b"\xff\xff\xff\xff"
_END: Final = _CONTINUATION + bytes(4)
_STREAM_WINDOW: Final = 8_000_000


class Arrow:
    """Reads Arrow IPC files (Feather 2) and streams. Stateless."""

    name = "arrow"
    position = "row"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Even ranges for a file, after a look at its first bytes; a stream can't be cut."""
        if bytes(reads.read(obj, 0, len(_MAGIC))) == _MAGIC:
            return even_cuts(obj, chunk_bytes)
        return (0, obj.size_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """The first object's schema in plain types, after ``path``.

        Raises:
            SourceError: the first object is no Arrow IPC file or stream.
        """
        obj = objects[0]
        file = RangedFile(reads, obj)
        open_one = pa.ipc.open_file if _is_file(file) else pa.ipc.open_stream
        with decoding(obj, _WHAT), open_one(pa.PythonFile(file, mode="r")) as reader:
            return with_path(plain_schema(reader.schema, obj))

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """The rows of the record batches that begin in the chunk.

        Holds a run of record batches of at most 64 MB, or one larger batch. For a range, the heads of the batches
        before it are read too, since rows are numbered through the object.

        Raises:
            SourceError: an object is truncated, corrupt, no Arrow IPC, or has another schema than the first.
        """
        for index, obj, start, end, whole in opened(chunk, context.reads):
            file = RangedFile(context.reads, obj, whole)
            batches = (
                _file_batches(file, start, end, context)
                if _is_file(file)
                else _stream_batches(RangedFile(context.reads, obj, whole, least=_STREAM_WINDOW), context)
            )
            for row, batch in batches:
                positions = np.arange(row, row + batch.num_rows, dtype=np.int64)
                yield from emit(batch, positions, index, obj, context, position=self.position)


def _is_file(file: RangedFile) -> bool:
    obj = file.obj
    if obj.size_bytes == 0:
        raise SourceError(f"{obj.path} is empty, not {_WHAT}; remove or exclude it")
    head = bytes(file.span(0, 8))
    if head[: len(_MAGIC)] == _MAGIC:
        return True
    if len(head) < 8 or (head[:4] != _CONTINUATION and not 0 < int.from_bytes(head[:4], "little") <= obj.size_bytes):
        raise SourceError(
            f"{obj.path} is neither an Arrow IPC file nor a stream, or is truncated: it begins with {head!r}; write it "
            "again or exclude it"
        )
    return False


def _checked(batch: pa.RecordBatch, plain: pa.Schema) -> pa.RecordBatch:
    """The batch in plain types. IPC carries raw buffers, so offsets are checked before anybody follows them."""
    batch.validate()
    return conform(batch, plain)


def _file_batches(file: RangedFile, start: int, end: int, context: ReadContext) -> Iterator[tuple[int, pa.RecordBatch]]:
    obj = file.obj
    with decoding(obj, _WHAT):
        reader = pa.ipc.open_file(pa.PythonFile(file, mode="r"))
        blocks = record_batches(_footer(file))
        plain = plain_schema(reader.schema, obj)
    require_same(with_path(plain), context.schema, obj)
    starts = list(itertools.accumulate((b.offset for b in blocks), max))
    owned = [i for i, at in enumerate(starts) if start <= at < end]
    row = 0
    with decoding(obj, _WHAT):
        for block in blocks[: owned[0]] if owned else ():
            row += batch_rows(file.span(block.offset, block.metadata_bytes))
    for run in _runs(owned, blocks):
        _hold(file, [blocks[i] for i in run])
        for i in run:
            with decoding(obj, _WHAT):
                batch = _checked(reader.get_batch(i), plain)
            yield row, batch
            row += batch.num_rows


def _footer(file: RangedFile) -> memoryview:
    size = file.obj.size_bytes
    length = int.from_bytes(file.span(size - 10, 4), "little", signed=True)
    if not 0 < length <= size - 18:
        raise ValueError("the footer's length is wrong")
    return file.span(size - 10 - length, length)


def _runs(owned: Sequence[int], blocks: Sequence[IpcBlock]) -> Iterator[list[int]]:
    """Neighbouring batches that fit into one read together."""
    run: list[int] = []
    held = 0
    for i in owned:
        if run and held + blocks[i].length_bytes > HOLD_BYTES:
            yield run
            run, held = [], 0
        run.append(i)
        held += blocks[i].length_bytes
    if run:
        yield run


def _hold(file: RangedFile, blocks: Sequence[IpcBlock]) -> None:
    first, last = min(b.offset for b in blocks), max(b.offset + b.length_bytes for b in blocks)
    if first < 0 or last > file.obj.size_bytes:
        raise SourceError(
            f"{file.obj.path}: a record batch lies outside the file ({file.obj.size_bytes} bytes); it is truncated or "
            "corrupt, so write it again or exclude it"
        )
    if last - first <= HOLD_BYTES:
        file.hold(first, last - first)


def _stream_batches(file: RangedFile, context: ReadContext) -> Iterator[tuple[int, pa.RecordBatch]]:
    obj = file.obj
    legacy = bytes(file.span(0, 4)) != _CONTINUATION
    with decoding(obj, _WHAT):
        reader = pa.ipc.open_stream(pa.PythonFile(file, mode="r"))
        plain = plain_schema(reader.schema, obj)
    require_same(with_path(plain), context.schema, obj)
    row = 0
    while True:
        with decoding(obj, _WHAT):
            batch = next(reader, None)
            if batch is None:
                break
            batch = _checked(batch, plain)
        yield row, batch
        row += batch.num_rows
    # A stream cut off between two messages reads as if it had ended there; only the mark tells.
    tail = bytes(file.span(max(0, obj.size_bytes - 8), 8))
    if file.tell() < obj.size_bytes or not tail.endswith(_END[4:] if legacy else _END):
        raise SourceError(
            f"{obj.path}: the stream has no end mark where it ends, at byte {file.tell()} of {obj.size_bytes}; it is "
            "truncated or was never closed, so write it again or exclude it"
        )


ARROW: Final = Arrow()
