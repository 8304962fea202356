"""MDS, the shard format of MosaicML's streaming: a chunk owns the samples that begin in its range.

A shard describes itself: ``uint32 n``, ``uint32 offsets[n + 1]``, a JSON config, then the samples. A sample is the
uint32 sizes of its columns without a fixed size, then the columns' values. ``index.json`` beside the shards repeats
the configs and is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.mds_columns import MdsColumn, NotDecodable, gather_sizes, parse_column
from millrace.pipeline.formats.ranged import Cursor, codec_of, even_cuts, open_cursor, opened
from millrace.pipeline.formats.tabular import emit, require_same, with_path
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["MDS", "Mds"]

_INDEX: Final = "index.json"
_CONFIG_BYTES: Final = 16_000_000


@dataclass(frozen=True, slots=True)
class _Head:
    """The head of a shard.

    Attributes:
        offsets: int64[n + 1]: where each sample begins, and where the last one ends.
        columns: In the order of their values.
    """

    offsets: npt.NDArray[np.int64]
    columns: tuple[MdsColumn, ...]


class Mds:
    """Reads MDS shards, plain or compressed. Stateless."""

    name = "mds"
    position = "sample"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Even ranges; reads nothing. A compressed shard can't be cut."""
        whole = codec_of(source, obj.path) is not None or _is_index(obj)
        return (0, obj.size_bytes) if whole else even_cuts(obj, chunk_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """The first shard's columns, after ``path``; arrays without a fixed shape are typed by the first sample.

        Raises:
            SourceError: there is no shard, or the first one can't be read.
        """
        shards = [obj for obj in objects if not _is_index(obj)]
        for obj in shards:
            cursor = open_cursor(reads, source, obj)
            head = _head(cursor, obj)
            if len(head.offsets) == 1 and any(c.is_open for c in head.columns) and obj is not shards[-1]:
                continue
            values = _first_values(cursor, head, obj)
            try:
                return with_path(
                    pa.schema([pa.field(c.name, c.type_of(v)) for c, v in zip(head.columns, values, strict=True)])
                )
            except NotDecodable as err:
                raise SourceError(
                    f"{obj.path}: a column of the first sample {err}; write it again or exclude it"
                ) from err
        raise SourceError("no MDS shard is among the source's first objects, only index.json; include the .mds files")

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """The samples that begin in the chunk, copied once from the shard's bytes.

        Holds a window of 8 MB, a batch, and the offsets of the shard.

        Raises:
            SourceError: a shard is truncated, corrupt, or has other columns than the first.
        """
        for index, obj, start, end, whole in opened(chunk, context.reads, skip=(_INDEX,)):
            cursor = open_cursor(context.reads, context.source, obj, end=end, whole=whole)
            head = _head(cursor, obj)
            plain = _require_columns(head, context.schema, obj)
            if codec_of(context.source, obj.path) is not None:
                end = 1 << 62
            elif head.offsets[-1] != obj.size_bytes:
                raise _broken(obj, f"its samples end at byte {head.offsets[-1]}, but it has {obj.size_bytes}")
            first, last = np.searchsorted(head.offsets[:-1], [start, end], side="left")
            for i, j in _batches(head.offsets, int(first), int(last), context):
                cursor.skip(int(head.offsets[i]) - cursor.at)
                length = int(head.offsets[j] - head.offsets[i])
                if length > context.max_record_bytes and j == i + 1:
                    _reject(
                        context, obj, i, "max_record", f"it has {length} bytes, more than {context.max_record_bytes}"
                    )
                    continue
                data = cursor.take(length)
                if len(data) < length:
                    raise _broken(obj, f"it ends at byte {cursor.at}, within sample {i} or after")
                batch, kept = _decode(data, head, i, j, plain, obj, context)
                yield from emit(batch, kept, index, obj, context, position=self.position)


def _is_index(obj: SourceObject) -> bool:
    return obj.path.rsplit("/", 1)[-1] == _INDEX


def _broken(obj: SourceObject, why: str) -> SourceError:
    return SourceError(
        f"{obj.path} is no whole MDS shard: {why}; it is truncated or corrupt, so write it again or exclude it"
    )


def _reject(context: ReadContext, obj: SourceObject, sample: int, rule: str, why: str) -> None:
    context.reject(Quarantined(obj.path, f"{Mds.position} {sample}", "ingest", rule, f"sample {sample}: {why}"))


def _head(cursor: Cursor, obj: SourceObject) -> _Head:
    """Reads the head; the cursor then stands where the first sample begins.

    Raises:
        SourceError: this is no MDS shard, or a column of it can't be read.
    """
    if obj.size_bytes == 0:
        raise SourceError(f"{obj.path} is empty, not an MDS shard; remove or exclude it")
    count_bytes = cursor.take(4)
    if len(count_bytes) < 4:
        raise _broken(obj, "it ends within its head")
    count = int.from_bytes(count_bytes, "little")
    raw = cursor.take(4 * (count + 1))
    if len(raw) < 4 * (count + 1):
        raise _broken(obj, "it ends within the list of its samples")
    offsets = np.frombuffer(raw, dtype="<u4").astype(np.int64)
    config_bytes = int(offsets[0]) - cursor.at
    if not 0 < config_bytes <= _CONFIG_BYTES or np.any(np.diff(offsets) < 0):
        raise _broken(obj, "the list of its samples makes no sense")
    config = cursor.take(config_bytes)
    if len(config) < config_bytes:
        raise _broken(obj, "it ends within its config")
    try:
        return _Head(offsets, _columns(json.loads(bytes(config))))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as err:
        raise _broken(obj, "its config is not the JSON of one") from err
    except ValueError as err:
        raise SourceError(f"{obj.path}: {err}") from err


def _columns(config: dict[str, Any]) -> tuple[MdsColumn, ...]:
    if config["format"] != "mds" or config["version"] != 2:
        raise ValueError(f"format {config['format']!r} version {config['version']!r} is unknown; MDS version 2 is read")
    names, encodings, sizes = config["column_names"], config["column_encodings"], config["column_sizes"]
    if not len(names) == len(encodings) == len(sizes) == len(set(names)):
        raise ValueError("the config names its columns differently in different places; it is corrupt")
    return tuple(parse_column(n, e, s) for n, e, s in zip(names, encodings, sizes, strict=True))


def _first_values(cursor: Cursor, head: _Head, obj: SourceObject) -> list[memoryview | None]:
    """The first sample's values where a column's type is open, None elsewhere."""
    if len(head.offsets) == 1 or not any(c.is_open for c in head.columns):
        return [None] * len(head.columns)
    length = int(head.offsets[1] - head.offsets[0])
    data = cursor.take(length)
    if len(data) < length:
        raise _broken(obj, f"it ends at byte {cursor.at}, within sample 0")
    spans = _spans(data, head, 0, 1, obj)
    return [
        data[int(b[0]) : int(b[0] + n[0])] if c.is_open else None for c, (b, n) in zip(head.columns, spans, strict=True)
    ]


def _require_columns(head: _Head, expected: pa.Schema, obj: SourceObject) -> pa.Schema:
    """The shard's own schema, without ``path`` unless it has such a column, checked against the source's."""
    fields = []
    for column in head.columns:
        if not column.is_open:
            kind = column.type_of()
        else:
            where = expected.get_field_index(column.name)
            kind = expected.field(where).type if where >= 0 else pa.null()
            kind = kind if pa.types.is_list(kind) else pa.list_(pa.null())
        fields.append(pa.field(column.name, kind))
    plain = pa.schema(fields)
    require_same(with_path(plain), expected, obj)
    return plain


def _batches(offsets: npt.NDArray[np.int64], first: int, last: int, context: ReadContext) -> Iterator[tuple[int, int]]:
    """Samples [i, j) of one batch after the other; one that is too long stands alone."""
    long = first + np.flatnonzero(np.diff(offsets[first : last + 1]) > context.max_record_bytes)
    i = first
    while i < last:
        j = int(np.searchsorted(offsets, offsets[i] + context.batch_bytes, side="right")) - 1
        j = max(i + 1, min(j, i + context.batch_rows, last))
        at = int(np.searchsorted(long, i))
        if at < len(long) and long[at] < j:
            j = i + 1 if long[at] == i else int(long[at])
        yield i, j
        i = j


def _spans(
    data: memoryview, head: _Head, i: int, j: int, obj: SourceObject
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """For each column, where its values in samples [i, j) begin in ``data`` and how long they are.

    Raises:
        SourceError: the sizes of a sample's columns don't add up to the sample's.
    """
    starts, ends = head.offsets[i:j] - head.offsets[i], head.offsets[i + 1 : j + 1] - head.offsets[i]
    varying = sum(c.size is None for c in head.columns)
    least = 4 * varying + sum(c.size or 0 for c in head.columns)
    short = np.flatnonzero(ends - starts < least)
    if len(short):
        raise _broken(obj, f"sample {i + short[0]} is shorter than its columns")
    sizes = iter(gather_sizes(np.frombuffer(data, np.uint8), starts, varying).T)
    spans = []
    at = starts + 4 * varying
    for column in head.columns:
        length = next(sizes) if column.size is None else np.full(j - i, column.size, dtype=np.int64)
        spans.append((at, length))
        at = at + length
    wrong = np.flatnonzero(at != ends)
    if len(wrong):
        raise _broken(obj, f"the columns of sample {i + wrong[0]} don't add up to its size")
    return spans


def _decode(
    data: memoryview, head: _Head, i: int, j: int, plain: pa.Schema, obj: SourceObject, context: ReadContext
) -> tuple[pa.RecordBatch, npt.NDArray[np.int64]]:
    """Samples [i, j) as a batch, with their numbers; those that can't be decoded are rejected."""
    columns: list[pa.Array] = []
    keep = np.ones(j - i, dtype=np.bool_)
    for column, field, (begin, length) in zip(head.columns, plain, _spans(data, head, i, j, obj), strict=True):
        array, bad = column.decode(data, begin, length, field.type)
        for row in sorted(bad):
            if keep[row]:
                rule = "json" if column.encoding == "json" else "schema"
                _reject(context, obj, i + row, rule, f"column {column.name!r} {bad[row]}")
            keep[row] = False
        columns.append(array)
    batch = pa.RecordBatch.from_arrays(columns, schema=plain)
    numbers = np.arange(i, j, dtype=np.int64)
    return (batch, numbers) if keep.all() else (batch.filter(pa.array(keep)), numbers[keep])


MDS: Final = Mds()
