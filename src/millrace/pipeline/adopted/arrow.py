"""Arrow IPC in place: a block is the message of one record batch, as in Millrace's own shards.

Where such a message says all there is to say, a file has nothing else that is needed. Where a column is encoded (a
dictionary, runs, a view), the messages before the first batch, which are the schema and the dictionaries, go with it.
Files and streams differ in what lies around the messages, so both can be adopted.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from millrace.core.model import Block, SourceObject
from millrace.pipeline.adopted.scan import BLOCK_BYTES_MAX, FileIndex, Part, Subject
from millrace.pipeline.adopted.sentences import changed, not_adoptable, require_rows, too_long
from millrace.pipeline.adopted.window import Joined
from millrace.pipeline.formats.ipc_footer import batch_rows, dictionaries, record_batches, table_field
from millrace.pipeline.formats.ranged import Cursor, RangedFile, decoding
from millrace.pipeline.formats.tabular import conform, plain_schema

__all__ = ["decode_arrow", "index_arrow"]

WHAT: Final = "an Arrow IPC file"
_MAGIC: Final = b"ARROW1"
_FIRST: Final = 8
"""Where the first message of a file begins."""
_CONTINUATION: Final = b"\xff\xff\xff\xff"
_END: Final = _CONTINUATION + bytes(4)
_HEAD_BYTES_MAX: Final = 256_000_000
_HEADER_TYPE, _HEADER, _BODY_BYTES = 1, 2, 3
_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3


def index_arrow(subject: Subject) -> FileIndex:
    """Cut a file or a stream into its record batches.

    Raises:
        SourceError: it is truncated, corrupt, no Arrow IPC, or laid out so that its batches can't be read alone.
    """
    obj = subject.obj
    head = bytes(subject.file.span(0, _FIRST))
    if head[: len(_MAGIC)] == _MAGIC:
        return _index_file(subject)
    if len(head) < 8 or (head[:4] != _CONTINUATION and not 0 < int.from_bytes(head[:4], "little") <= obj.size_bytes):
        raise not_adoptable(obj, f"is neither an Arrow IPC file nor a stream, or is truncated: it begins with {head!r}")
    return _index_stream(subject)


def decode_arrow(schema: pa.Schema, aux: memoryview | None, data: memoryview, offset: int, rows: int) -> pa.RecordBatch:
    """The rows of the record batch whose message is ``data``. Copies only what is compressed or encoded.

    Raises:
        ValueError, OSError, pa.ArrowException: it can't be decoded.
    """
    try:
        if aux is None:
            batch = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
        else:
            with pa.ipc.open_stream(pa.PythonFile(Joined((aux, data, memoryview(_END))), mode="r")) as reader:
                batch = reader.read_next_batch()
    except (EOFError, StopIteration) as err:
        raise ValueError("there is no record batch") from err
    batch.validate()
    return require_rows(conform(batch, schema), rows, schema)


# --- files -------------------------------------------------------------------------------------------------------


def _index_file(subject: Subject) -> FileIndex:
    obj, scan = subject.obj, subject.scan
    with decoding(obj, WHAT):
        footer = _footer(subject.file)
        found = record_batches(footer)
        with pa.ipc.open_file(pa.PythonFile(subject.file, mode="r")) as reader:
            schema = reader.schema
        late = max((d.offset for d in dictionaries(footer)), default=0)
        first = min((b.offset for b in found), default=obj.size_bytes)
        _require_little_endian(_schema_head(subject.file))
    batches = _Batches(subject, schema)
    if found and late >= first:
        raise _late_dictionary(obj)
    if found and batches.encoded:
        aux = subject.file.span(_FIRST, _bounded(first - _FIRST, obj))
        batches.before(scan.part(_FIRST, first), aux)
    parts: dict[int, Block] = {}
    at = _FIRST
    for i, block in sorted(enumerate(found), key=lambda numbered: numbered[1].offset):
        end = block.offset + block.length_bytes
        if block.offset < at or block.metadata_bytes < 8 or end > obj.size_bytes - 10 or end <= block.offset:
            raise not_adoptable(obj, f"is truncated or corrupt: record batch {i} lies outside of it, or in another")
        if block.length_bytes > BLOCK_BYTES_MAX:
            raise too_long(obj, f"record batch {i}", block.length_bytes)
        at = end
        scan.skip(block.offset - scan.at)
        scan.cut(block.offset)
        with decoding(obj, WHAT):
            rows = batch_rows(scan.take(block.metadata_bytes))
        made = batches.add(scan.cut(end), rows)
        if made is not None:
            parts[i] = made
    tail = scan.part(obj.size_bytes - 10 - len(footer), obj.size_bytes - 10)
    if not subject.same(footer, tail):
        raise changed(obj.path)
    return batches.done([parts[i] for i in sorted(parts)])


def _footer(file: RangedFile) -> memoryview:
    size = file.obj.size_bytes
    if size < 18 or bytes(file.span(size - len(_MAGIC), len(_MAGIC))) != _MAGIC:
        raise ValueError("it doesn't end with ARROW1")
    length = int.from_bytes(file.span(size - 10, 4), "little", signed=True)
    if not 0 < length <= size - 18:
        raise ValueError("the footer's length is wrong")
    return file.span(size - 10 - length, length)


def _schema_head(file: RangedFile) -> memoryview:
    at, length = _FIRST, file.span(_FIRST, 4)
    if bytes(length) == _CONTINUATION:
        at, length = at + 4, file.span(at + 4, 4)
    return file.span(at + 4, int.from_bytes(length, "little"))


# --- streams -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Message:
    """A message of a stream: what it is, where it begins, its head without the prefix, and the bytes of its body."""

    kind: int
    start: int
    head: memoryview
    body_bytes: int


def _index_stream(subject: Subject) -> FileIndex:
    obj, scan = subject.obj, subject.scan
    with decoding(obj, WHAT), pa.ipc.open_stream(pa.PythonFile(subject.file, mode="r")) as reader:
        schema = reader.schema
    batches = _Batches(subject, schema)
    blocks: list[Block] = []
    is_first, end = True, 0
    for message in _messages(scan, obj):
        if message.kind == _SCHEMA and message.start == 0:
            with decoding(obj, WHAT):
                _require_little_endian(message.head)
        elif message.kind == _DICTIONARY and is_first:
            _bounded(message.start + message.body_bytes, obj)
        elif message.kind == _DICTIONARY:
            raise _late_dictionary(obj)
        elif message.kind != _BATCH:
            raise not_adoptable(obj, f"holds a message of kind {message.kind} at byte {message.start}, not a batch")
        if message.kind == _BATCH and is_first:
            is_first = False
            if batches.encoded:
                batches.before(scan.cut(message.start), subject.file.span(0, message.start))
        end = scan.at + message.body_bytes
        if end > obj.size_bytes:
            raise _not_ended(obj)
        if message.kind != _BATCH:
            scan.skip(message.body_bytes)
            continue
        if end - message.start > BLOCK_BYTES_MAX:
            raise too_long(obj, f"the record batch at byte {message.start}", end - message.start)
        with decoding(obj, WHAT):
            rows = batch_rows(len(message.head).to_bytes(4, "little") + bytes(message.head))
        scan.cut(message.start)
        made = batches.add(scan.cut(end), rows)
        blocks += [made] if made is not None else []
    return batches.done(blocks)


def _messages(cursor: Cursor, obj: SourceObject) -> Iterator[_Message]:
    """Each message of a stream. Before asking for the next one, the body is to be gone over."""
    legacy: bool | None = None
    while True:
        start = cursor.at
        prefix = bytes(cursor.take(4))
        if legacy is None:
            legacy = prefix != _CONTINUATION
        if not legacy:
            if prefix != _CONTINUATION:
                raise _not_ended(obj)
            prefix = bytes(cursor.take(4))
        if len(prefix) < 4:
            raise _not_ended(obj)
        length = int.from_bytes(prefix, "little")
        if length == 0:
            if obj.size_bytes - cursor.at:
                raise not_adoptable(obj, f"goes on after the mark that ends its stream, at byte {cursor.at}")
            return
        head = cursor.take(_bounded(length, obj))
        if len(head) < length:
            raise _not_ended(obj)
        with decoding(obj, WHAT):
            kind, body_bytes = _header(head)
        yield _Message(kind, start, head, body_bytes)


def _not_ended(obj: SourceObject) -> Exception:
    return not_adoptable(obj, "has no end mark where its stream ends; it is truncated or was never closed")


def _header(head: memoryview) -> tuple[int, int]:
    """(kind, bytes of the body) of a message: ``Message {version, header_type, header, bodyLength}``."""
    try:
        (root,) = struct.unpack_from("<I", head, 0)
        kind, body = table_field(head, root, _HEADER_TYPE), table_field(head, root, _BODY_BYTES)
        body_bytes = 0 if body is None else int(struct.unpack_from("<q", head, body)[0])
        found = 0 if kind is None else head[kind]
    except (struct.error, IndexError) as err:
        raise ValueError("not the head of a message") from err
    if body_bytes < 0:
        raise ValueError("a message whose body has a negative length")
    return found, body_bytes


# --- both --------------------------------------------------------------------------------------------------------


class _Batches:
    """The record batches of one file as they go by."""

    def __init__(self, subject: Subject, schema: pa.Schema) -> None:
        self._subject = subject
        self._schema = plain_schema(schema, subject.obj)
        if not schema.names:
            raise not_adoptable(subject.obj, "has no columns")
        self.encoded = any(_is_encoded(f.type) for f in schema)
        self._aux: memoryview | None = None
        self._first: list[Block] = []

    def before(self, part: Part, aux: memoryview) -> None:
        """What lies before the first batch, and each of them needs."""
        if not self._subject.same(aux, part):
            raise changed(self._subject.obj.path)
        self._first = [part.block(0)]
        self._aux = memoryview(bytes(aux))

    def add(self, part: Part, rows: int) -> Block | None:
        """A batch; None if it has no rows."""
        if rows == 0:
            return None
        if self._subject.check:
            with decoding(self._subject.obj, WHAT):
                batch = decode_arrow(self._schema, self._aux, part.data, part.offset, rows)
                batch.validate(full=True)
        return part.block(rows)

    def done(self, blocks: Sequence[Block]) -> FileIndex:
        """The file's index."""
        return FileIndex(self._schema, tuple(itertools.chain(self._first, blocks)))


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether a batch's message can't be read with the plain type in its schema."""
    is_a = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _is_encoded(kind.storage_type)
    if is_a.is_dictionary(kind) or is_a.is_run_end_encoded(kind) or is_a.is_string_view(kind):
        return True
    if is_a.is_binary_view(kind) or is_a.is_list_view(kind) or is_a.is_large_list_view(kind):
        return True
    return any(_is_encoded(kind.field(i).type) for i in range(kind.num_fields))


def _bounded(length: int, obj: SourceObject) -> int:
    if length > _HEAD_BYTES_MAX:
        raise not_adoptable(
            obj, f"has {length} bytes of schema and dictionaries before its first batch, over {_HEAD_BYTES_MAX}"
        )
    return length


def _late_dictionary(obj: SourceObject) -> Exception:
    return not_adoptable(
        obj,
        "has a dictionary after its first record batch, so that batches can't be read alone",
        way_out="write it with whole dictionaries, or ingest it with millrace run",
    )


def _require_little_endian(head: memoryview) -> None:
    """The schema's first field is 1 where numbers are big-endian: ``Schema {endianness: int16 = Little, ...}``."""
    try:
        (root,) = struct.unpack_from("<I", head, 0)
        header = table_field(head, root, _HEADER)
        if header is None:
            return
        table = header + struct.unpack_from("<I", head, header)[0]
        endianness = table_field(head, table, 0)
        big = endianness is not None and struct.unpack_from("<h", head, endianness)[0] == 1
    except struct.error as err:
        raise ValueError("its schema can't be read") from err
    if big:
        raise ValueError("its numbers are big-endian")
