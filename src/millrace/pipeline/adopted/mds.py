"""MDS in place: a block is a run of samples; the shard's head (offsets and columns) is what they need to be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import SourceObject
from millrace.pipeline.adopted.scan import BLOCK_BYTES, BLOCK_BYTES_MAX, BLOCK_ROWS, FileIndex, Subject
from millrace.pipeline.adopted.sentences import changed, require_rows, too_long
from millrace.pipeline.formats.mds_columns import MdsColumn, gather_sizes, parse_column
from millrace.pipeline.formats.ranged import RangedFile, decoding

__all__ = ["decode_mds", "index_mds"]

WHAT: Final = "an MDS shard"
_HEAD_BYTES_MAX: Final = 1_000_000_000

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of a shard.

    Attributes:
        offsets: int64, shape (samples + 1,): where each sample begins, and where the last one ends.
        columns: In the order of their values.
    """

    offsets: Int64s
    columns: tuple[MdsColumn, ...]


def index_mds(subject: Subject) -> FileIndex:
    """Cut a shard into runs of samples.

    Raises:
        SourceError: it is truncated, corrupt, no MDS shard, or has a column that can't be read.
    """
    obj, scan = subject.obj, subject.scan
    with decoding(obj, WHAT):
        raw = _head_bytes(subject.file)
        head = _parse(raw)
        samples = np.diff(head.offsets)
        if head.offsets[-1] != obj.size_bytes:
            raise ValueError(f"its samples end at byte {head.offsets[-1]}, but it has {obj.size_bytes}")
        if len(samples) and samples.min() <= 0:
            raise ValueError("the list of its samples makes no sense")
        schema = _schema_of(head, subject.file)
    if len(samples) and samples.max() > BLOCK_BYTES_MAX:
        raise too_long(obj, f"sample {samples.argmax()}", int(samples.max()))
    first = scan.cut(len(raw))
    if not subject.same(raw, first):
        raise changed(obj.path)
    blocks = [first.block(0)]
    for i, j in _runs(head.offsets):
        part = scan.cut(int(head.offsets[j]))
        if subject.check:
            _check(schema, raw, part.data, part.offset, j - i, i, obj)
        blocks.append(part.block(j - i))
    return FileIndex(schema, tuple(blocks))


def decode_mds(schema: pa.Schema, aux: memoryview | None, data: memoryview, offset: int, rows: int) -> pa.RecordBatch:
    """The samples whose bytes are ``data``, copied once.

    Raises:
        ValueError, pa.ArrowException: they can't be decoded; names the sample, counted in its shard.
    """
    if aux is None:
        raise ValueError("the shard's head is missing")
    head = _parse(aux)
    first = int(np.searchsorted(head.offsets, offset))
    last = first + rows
    if last >= len(head.offsets) or head.offsets[first] != offset or head.offsets[last] != offset + len(data):
        raise ValueError("the head knows no such run of samples")
    columns: list[pa.Array] = []
    spans = _spans(data, head, first, last)
    if [c.name for c in head.columns] != schema.names:
        raise ValueError("its columns are others than the dataset's")
    for column, field, (begin, length) in zip(head.columns, schema, spans, strict=True):
        array, bad = column.decode(data, begin, length, field.type)
        if bad:
            row = min(bad)
            raise ValueError(f"column {column.name!r} of sample {first + row} {bad[row]}")
        columns.append(array)
    return require_rows(pa.RecordBatch.from_arrays(columns, schema=schema), rows, schema)


def _check(
    schema: pa.Schema, head: memoryview, data: memoryview, offset: int, rows: int, first: int, obj: SourceObject
) -> None:
    try:
        batch = decode_mds(schema, head, data, offset, rows)
        batch.validate(full=True)
    except (ValueError, pa.ArrowException) as err:
        why = str(err).splitlines()[0]
        raise SourceError(
            f"{obj.path}: samples {first} to {first + rows - 1} can't be decoded: {why}; write the shard again or "
            "exclude it"
        ) from err


def _head_bytes(file: RangedFile) -> memoryview:
    """Everything before the first sample."""
    size = file.obj.size_bytes
    if size < 8:
        raise ValueError("it ends within its head")
    count = int.from_bytes(file.span(0, 4), "little")
    if 8 + 4 * count > size:
        raise ValueError("it ends within the list of its samples")
    length = int.from_bytes(file.span(4, 4), "little")
    if not 8 + 4 * count < length <= min(size, _HEAD_BYTES_MAX):
        raise ValueError("the list of its samples makes no sense")
    return file.span(0, length)


def _parse(head: memoryview) -> _Head:
    """A head from its bytes.

    Raises:
        ValueError: it isn't one, or a column of it can't be read.
    """
    count = int.from_bytes(head[:4], "little") if len(head) >= 8 else -1
    config_at = 4 + 4 * (count + 1)
    if count < 0 or config_at >= len(head):
        raise ValueError("it ends within its head")
    offsets = np.frombuffer(head[4:config_at], dtype="<u4").astype(np.int64)
    if offsets[0] != len(head) or np.any(np.diff(offsets) < 0):
        raise ValueError("the list of its samples makes no sense")
    try:
        config = json.loads(bytes(head[config_at:]))
        return _Head(offsets, _columns(config))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as err:
        raise ValueError("its config is not the JSON of one") from err


def _columns(config: dict[str, Any]) -> tuple[MdsColumn, ...]:
    if config["format"] != "mds" or config["version"] != 2:
        raise ValueError(f"format {config['format']!r} version {config['version']!r} is unknown; MDS version 2 is read")
    names, encodings, sizes = config["column_names"], config["column_encodings"], config["column_sizes"]
    if not names or not len(names) == len(encodings) == len(sizes) == len(set(names)):
        raise ValueError("its config names no columns, or differently in different places")
    return tuple(parse_column(n, e, s) for n, e, s in zip(names, encodings, sizes, strict=True))


def _schema_of(head: _Head, file: RangedFile) -> pa.Schema:
    """The shard's columns; arrays without a fixed shape are typed by the first sample, as null where there is none."""
    fields = []
    length = int(head.offsets[1] - head.offsets[0]) if len(head.offsets) > 1 else 0
    is_open = any(column.is_open for column in head.columns)
    data = file.span(int(head.offsets[0]), length) if length and is_open else memoryview(b"")
    spans = _spans(data, head, 0, 1) if len(data) else []
    for i, column in enumerate(head.columns):
        if column.is_open and not spans:
            fields.append(pa.field(column.name, pa.null()))
            continue
        value = data[int(spans[i][0][0]) : int(spans[i][0][0] + spans[i][1][0])] if column.is_open else None
        fields.append(pa.field(column.name, column.type_of(value)))
    return pa.schema(fields)


def _runs(offsets: Int64s) -> Iterator[tuple[int, int]]:
    """Samples [i, j) of one block after the other."""
    i, count = 0, len(offsets) - 1
    while i < count:
        j = int(np.searchsorted(offsets, offsets[i] + BLOCK_BYTES))
        if j - i > 1 and j <= count and offsets[j] - offsets[i] > BLOCK_BYTES_MAX:
            j -= 1
        j = min(j, i + BLOCK_ROWS, count)
        yield i, j
        i = j


def _spans(data: memoryview, head: _Head, i: int, j: int) -> list[tuple[Int64s, Int64s]]:
    """For each column, where its values in samples [i, j) begin in ``data`` and how long they are.

    Raises:
        ValueError: the sizes of a sample's columns don't add up to the sample's.
    """
    starts, ends = head.offsets[i:j] - head.offsets[i], head.offsets[i + 1 : j + 1] - head.offsets[i]
    varying = sum(c.size is None for c in head.columns)
    least = 4 * varying + sum(c.size or 0 for c in head.columns)
    if len(short := np.flatnonzero(ends - starts < least)):
        raise ValueError(f"sample {i + short[0]} is shorter than its columns")
    sizes = iter(gather_sizes(np.frombuffer(data, np.uint8), starts, varying).T)
    spans = []
    at = starts + 4 * varying
    for column in head.columns:
        length = next(sizes) if column.size is None else np.full(j - i, column.size, dtype=np.int64)
        spans.append((at, length))
        at = at + length
    if len(wrong := np.flatnonzero(at != ends)):
        raise ValueError(f"the columns of sample {i + wrong[0]} don't add up to its size")
    return spans
