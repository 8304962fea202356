"""``lines``: a record a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.linescan import LineBatch, line_batches, line_runs
from millrace.pipeline.formats.objects import even_cuts, path_column, rejected
from millrace.pipeline.formats.text import TEXT_SCHEMA
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["LINES", "LinesFormat"]


class LinesFormat:
    """Each line is one record: ``path`` and ``text`` (UTF-8).

    A line ends in a newline, which with a carriage return right before it is not part of the text. A last line
    without a newline counts; an empty line is a record with empty text.
    """

    name = "lines"
    position = "line at byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Anywhere: the line rule sorts it out. Compressed objects can't be cut."""
        return even_cuts(source, obj, chunk_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path`` and ``text``."""
        return TEXT_SCHEMA

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """See :class:`millrace.pipeline.records.Format`. A line that isn't UTF-8 or is too long is rejected."""
        for lines in line_batches(context, line_runs(chunk, context, self.position)):
            raw = _texts(lines)
            keep: Sequence[int] | None = None
            try:
                column = raw.cast(pa.string())
            except pa.ArrowInvalid:
                keep = _valid_rows(raw, lines, chunk, context)
                column = raw.take(pa.array(keep, pa.int64())).cast(pa.string())
            objects = lines.objects if keep is None else lines.objects[keep]
            positions = lines.positions if keep is None else lines.positions[keep]
            if len(column):
                batch = pa.record_batch([path_column(chunk.objects, objects), column], schema=TEXT_SCHEMA)
                yield Records(batch, objects, positions)


def _texts(lines: LineBatch) -> pa.Array:
    """The lines as binary values, without what ends them."""
    offsets = np.concatenate((np.zeros(1, np.int64), lines.ends)).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(lines.data)]
    whole = pa.BinaryArray.from_buffers(pa.binary(), len(lines), buffers)
    data = np.frombuffer(lines.data, np.uint8)
    lengths = np.diff(offsets)
    returns = (lengths >= 2) & (data[lines.ends - np.minimum(lengths, 2)] == 13)
    if not returns.any():
        return pc.binary_slice(whole, 0, -1)
    if returns.all():
        return pc.binary_slice(whole, 0, -2)
    return pc.if_else(pa.array(returns), pc.binary_slice(whole, 0, -2), pc.binary_slice(whole, 0, -1))


def _valid_rows(raw: pa.Array, lines: LineBatch, chunk: Chunk, context: ReadContext) -> list[int]:
    keep = []
    for row, value in enumerate(raw.to_pylist()):
        try:
            value.decode("utf-8")
            keep.append(row)
        except UnicodeDecodeError as error:
            obj = chunk.objects[int(lines.objects[row])]
            at = int(lines.positions[row])
            reason = f"the line is not UTF-8: {error.reason} at byte {at + error.start} of the file"
            context.reject(rejected(obj, f"{LinesFormat.position} {at}", "utf-8", reason))
    return keep


LINES: Final = LinesFormat()
