"""Parquet: a chunk owns the row groups whose first byte lies in its range.

Planning therefore needs no footer: large files are cut into even ranges from their size alone. A chunk reads the
footer, then only the bytes of its own row groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.ranged import HOLD_BYTES, RangedFile, decoding, even_cuts, opened
from millrace.pipeline.formats.tabular import conform, emit, plain_schema, require_same, with_path
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["PARQUET", "Parquet"]

_WHAT: Final = "a Parquet file"
_TAIL: Final = 65_536
_MAGIC: Final = b"PAR1"
_PROBE_ROWS: Final = 8


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group.

    Attributes:
        index: In the file.
        start: Where it begins, for ownership: never before the group before it.
        first, last: The bytes its column chunks lie in.
        rows: In it.
        row: The number of its first row in the file.
        row_bytes: Bytes a decoded row takes, as far as the footer tells.
    """

    index: int
    start: int
    first: int
    last: int
    rows: int
    row: int
    row_bytes: float


class Parquet:
    """Reads Parquet files. Stateless."""

    name = "parquet"
    position = "row"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Even ranges; reads nothing."""
        return even_cuts(obj, chunk_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """The first file's schema in plain types, after ``path``.

        Raises:
            SourceError: the first file is no Parquet file.
        """
        obj = objects[0]
        metadata = _footer(RangedFile(reads, obj))
        return with_path(_plain(metadata, obj))

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """The rows of the row groups that begin in the chunk.

        Holds at most the bytes of one run of row groups (64 MB); a larger row group is read page by page.

        Raises:
            SourceError: a file is truncated, corrupt, no Parquet file, or has another schema than the first.
        """
        for index, obj, start, end, whole in opened(chunk, context.reads):
            file = RangedFile(context.reads, obj, whole)
            metadata = _footer(file)
            plain = _plain(metadata, obj)
            require_same(with_path(plain), context.schema, obj)
            for run in _runs([g for g in _groups(metadata, obj) if start <= g.start < end]):
                row = run[0].row
                for batch in _decode(file, metadata, run, plain, context):
                    positions = np.arange(row, row + batch.num_rows, dtype=np.int64)
                    row += batch.num_rows
                    yield from emit(batch, positions, index, obj, context, position=self.position)
                if row != run[-1].row + run[-1].rows:
                    raise SourceError(
                        f"{obj.path}: row groups {run[0].index} to {run[-1].index} lack rows the footer tells of; "
                        "the file is corrupt, so write it again or exclude it"
                    )


def _footer(file: RangedFile) -> pq.FileMetaData:
    """The file's metadata: one read of the last 64 KB, a second if the footer is longer."""
    obj, size = file.obj, file.obj.size_bytes
    if size == 0:
        raise SourceError(f"{obj.path} is empty, not {_WHAT}; remove or exclude it")
    if size < 12 or bytes(file.span(max(0, size - _TAIL), _TAIL)[-4:]) != _MAGIC:
        raise SourceError(
            f"{obj.path} is not {_WHAT}, or is truncated: it doesn't end with PAR1; write it again or exclude it"
        )
    length = int.from_bytes(file.span(size - 8, 4), "little")
    if length + 12 > size:
        raise SourceError(
            f"{obj.path}: the footer is said to have {length} bytes, but the file has {size}; it is corrupt"
        )
    # pyarrow looks at the last 64 KB first, whatever the footer's length.
    tail = min(size, max(_TAIL, length + 8))
    file.hold(size - tail, tail)
    with decoding(obj, _WHAT):
        return pq.read_metadata(pa.PythonFile(file, mode="r"))


def _plain(metadata: pq.FileMetaData, obj: SourceObject) -> pa.Schema:
    with decoding(obj, _WHAT):
        return plain_schema(metadata.schema.to_arrow_schema(), obj)


def _groups(metadata: pq.FileMetaData, obj: SourceObject) -> list[_Group]:
    groups: list[_Group] = []
    start = row = 0
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        spans = [_column_span(group.column(j)) for j in range(group.num_columns)] or [(start, start)]
        first, last = min(s for s, _ in spans), max(e for _, e in spans)
        if first < 0 or last > obj.size_bytes or group.num_rows < 0:
            raise SourceError(
                f"{obj.path}: row group {i} lies outside the file ({obj.size_bytes} bytes); it is truncated or corrupt"
            )
        # A writer may lay groups out of order; what counts is that each has one owner and that order is kept.
        start = max(start, min(first, obj.size_bytes - 1))
        groups.append(
            _Group(i, start, first, last, group.num_rows, row, group.total_byte_size / max(1, group.num_rows))
        )
        row += group.num_rows
    return groups


def _column_span(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    start = int(column.data_page_offset)
    dictionary = column.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = int(dictionary)
    return start, start + int(column.total_compressed_size)


def _runs(groups: Sequence[_Group]) -> Iterator[list[_Group]]:
    """Neighbouring row groups that fit into one read together."""
    run: list[_Group] = []
    for group in groups:
        if run and max(group.last, *(g.last for g in run)) - min(group.first, *(g.first for g in run)) > HOLD_BYTES:
            yield run
            run = []
        run.append(group)
    if run:
        yield run


def _decode(
    file: RangedFile, metadata: pq.FileMetaData, run: Sequence[_Group], plain: pa.Schema, context: ReadContext
) -> Iterator[pa.RecordBatch]:
    first, last = min(g.first for g in run), max(g.last for g in run)
    buffer_bytes = 0
    if last - first <= HOLD_BYTES:
        file.hold(first, last - first)
    else:
        # Each column keeps a buffer of its own, so that what is held stays bounded however wide the table is.
        buffer_bytes = max(65_536, min(8_000_000, HOLD_BYTES // max(1, metadata.num_columns)))
    with decoding(file.obj, _WHAT):
        reader = pq.ParquetFile(
            pa.PythonFile(file, mode="r"),
            metadata=metadata,
            buffer_size=buffer_bytes,
            pre_buffer=False,
            arrow_extensions_enabled=False,
        )
    indices = [g.index for g in run]
    row_bytes = max(g.row_bytes for g in run)
    if _may_swell(metadata, run[0].index):
        row_bytes = max(row_bytes, _probe(reader, indices, plain, file.obj))
    batch_rows = max(1, min(context.batch_rows, int(context.batch_bytes / max(1.0, row_bytes))))
    batches = reader.iter_batches(batch_rows, row_groups=indices, use_threads=False)
    while True:
        with decoding(file.obj, _WHAT):
            batch = next(batches, None)
            if batch is None:
                return
            batch = conform(batch, plain)
        yield batch


def _may_swell(metadata: pq.FileMetaData, group: int) -> bool:
    """Whether a row may be far larger decoded than the footer says: long values in a dictionary, or lists."""
    for j in range(metadata.num_columns):
        column = metadata.row_group(group).column(j)
        dictionary = any("DICTIONARY" in encoding for encoding in column.encodings)
        if dictionary and (column.physical_type == "BYTE_ARRAY" or metadata.schema.column(j).max_repetition_level):
            return True
    return False


def _probe(reader: pq.ParquetFile, groups: Sequence[int], plain: pa.Schema, obj: SourceObject) -> float:
    """Bytes of a decoded row, by decoding the first few."""
    with decoding(obj, _WHAT):
        for batch in itertools.islice(reader.iter_batches(_PROBE_ROWS, row_groups=groups[:1], use_threads=False), 1):
            return float(conform(batch, plain).nbytes / max(1, batch.num_rows))
    return 0.0


PARQUET: Final = Parquet()
