"""Parquet in place: a block is the bytes of one row group; the footer is what they need to be read."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.model import Block, SourceObject
from millrace.pipeline.adopted.scan import BLOCK_BYTES_MAX, FileIndex, Subject
from millrace.pipeline.adopted.sentences import changed, not_adoptable, require_rows, too_long
from millrace.pipeline.adopted.window import Window
from millrace.pipeline.formats.ranged import RangedFile, decoding
from millrace.pipeline.formats.tabular import conform, plain_schema

__all__ = ["decode_parquet", "index_parquet"]

WHAT: Final = "a Parquet file"
_MAGIC: Final = b"PAR1"
_ENCRYPTED: Final = b"PARE"
_FOOTERS_KEPT: Final = 32


@dataclass(frozen=True, slots=True)
class _Group:
    """A row group: its number, the bytes its column chunks lie in, and its rows."""

    index: int
    start: int
    end: int
    rows: int


@dataclass(frozen=True, slots=True)
class _Footer:
    """A footer, parsed, and which row group begins where."""

    metadata: pq.FileMetaData
    groups: Mapping[int, int]


def index_parquet(subject: Subject) -> FileIndex:
    """Cut a file into its row groups.

    Raises:
        SourceError: it is truncated, corrupt, no Parquet file, or laid out so that its row groups can't be read alone.
    """
    obj = subject.obj
    at, footer = _footer_of(subject.file)
    with decoding(obj, WHAT):
        metadata = pq.read_metadata(pa.BufferReader(footer))
        schema = plain_schema(metadata.schema.to_arrow_schema(), obj)
    if not schema.names:
        raise not_adoptable(obj, "has no columns")
    with decoding(obj, WHAT):
        groups = [g for g in _groups(metadata) if g.rows]
    _require_apart(groups, at, obj)
    blocks: dict[int, Block] = {}
    for group in sorted(groups, key=lambda g: g.start):
        part = subject.scan.part(group.start, group.end)
        blocks[group.index] = part.block(group.rows)
        if subject.check:
            with decoding(obj, WHAT):
                decode_parquet(schema, footer, part.data, group.start, group.rows)
    tail = subject.scan.part(at, obj.size_bytes)
    if not subject.same(footer, tail):
        raise changed(obj.path)
    return FileIndex(schema, (tail.block(0), *(blocks[i] for i in sorted(blocks))))


def decode_parquet(
    schema: pa.Schema, aux: memoryview | None, data: memoryview, offset: int, rows: int
) -> pa.RecordBatch:
    """The rows of the row group whose bytes are ``data``.

    Raises:
        ValueError, OSError, pa.ArrowException: it can't be decoded.
    """
    if aux is None:
        raise ValueError("the file's footer is missing")
    footer = _parsed(bytes(aux))
    if offset not in footer.groups:
        raise ValueError("the footer knows no row group that begins there")
    reader = pq.ParquetFile(
        pa.PythonFile(Window(data, offset), mode="r"),
        metadata=footer.metadata,
        pre_buffer=False,
        arrow_extensions_enabled=False,
    )
    table = reader.read_row_group(footer.groups[offset], use_threads=False)
    batches = table.combine_chunks().to_batches()
    if len(batches) != 1:
        raise ValueError("its values are more than one record batch can hold; write smaller row groups")
    return require_rows(conform(batches[0], schema), rows, schema)


@functools.lru_cache(maxsize=_FOOTERS_KEPT)
def _parsed(footer: bytes) -> _Footer:
    """Parsing a footer takes milliseconds, and each row group of a file comes with the same one."""
    metadata = pq.read_metadata(pa.BufferReader(footer))
    return _Footer(metadata, {group.start: group.index for group in _groups(metadata) if group.rows})


def _footer_of(file: RangedFile) -> tuple[int, memoryview]:
    """Where the footer begins, and its bytes."""
    obj, size = file.obj, file.obj.size_bytes
    magic = bytes(file.span(size - 4, 4)) if size >= 12 else b""
    if magic == _ENCRYPTED:
        raise not_adoptable(obj, "is an encrypted Parquet file", way_out="write it without encryption or exclude it")
    if magic != _MAGIC:
        raise not_adoptable(obj, f"is not {WHAT}, or is truncated: it doesn't end with PAR1")
    length = int.from_bytes(file.span(size - 8, 4), "little")
    if length + 12 > size:
        raise not_adoptable(
            obj, f"is corrupt: its footer is said to have {length} bytes, but the file has {size} in all"
        )
    return size - 8 - length, file.span(size - 8 - length, length + 8)


class _NotReadError(Exception):
    """Stops a trial before it reads anything."""


class _Unread(Window):
    """A file that has a length and gives no byte."""

    def __init__(self) -> None:
        super().__init__(memoryview(b""), 1 << 62)

    def read(self, n: int = -1) -> pa.Buffer:
        """Refused."""
        raise _NotReadError


def _try(metadata: pq.FileMetaData) -> None:
    """Have Arrow look at all that a footer says, up to the first read.

    Asking for a column of a footer that contradicts itself ends the process, since that error is not one pyarrow
    expects there. On the way to a read the same error is an exception.

    Raises:
        OSError, pa.ArrowException: the footer contradicts itself.
    """
    reader = pq.ParquetFile(
        pa.PythonFile(_Unread(), mode="r"), metadata=metadata, pre_buffer=True, arrow_extensions_enabled=False
    )
    with contextlib.suppress(_NotReadError):
        reader.read_row_groups(range(metadata.num_row_groups), use_threads=False)


def _groups(metadata: pq.FileMetaData) -> list[_Group]:
    _try(metadata)
    groups = []
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        columns = [group.column(j) for j in range(group.num_columns)]
        if any(column.file_path for column in columns):
            raise ValueError("its columns lie in other files")
        spans = [_span(column) for column in columns] or [(0, 0)]
        groups.append(_Group(i, min(s for s, _ in spans), max(e for _, e in spans), group.num_rows))
    return groups


def _span(column: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """The bytes of a column chunk, as Arrow's reader computes them."""
    start = int(column.data_page_offset)
    dictionary = column.dictionary_page_offset
    if dictionary is not None and 0 < dictionary < start:
        start = int(dictionary)
    return start, start + int(column.total_compressed_size)


def _require_apart(groups: Sequence[_Group], end: int, obj: SourceObject) -> None:
    """Each row group has bytes of its own, before the footer, and not too many."""
    before = 0
    for group in sorted(groups, key=lambda g: g.start):
        if group.start < before:
            why = "runs into another one" if before else "begins before the file does"
            raise not_adoptable(obj, f"can't be read row group by row group: number {group.index} {why}")
        if not group.start < group.end <= end or group.rows < 0:
            raise not_adoptable(
                obj, f"is truncated or corrupt: row group {group.index} lies outside of it ({obj.size_bytes} bytes)"
            )
        if group.end - group.start > BLOCK_BYTES_MAX:
            raise too_long(obj, f"row group {group.index}", group.end - group.start)
        before = group.end
