"""WebDataset in place: a block is a run of whole samples of a tar, header to padding. It needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np
import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import Block, SourceObject
from millrace.pipeline.adopted.scan import BLOCK_BYTES, BLOCK_BYTES_MAX, BLOCK_ROWS, FileIndex, Subject
from millrace.pipeline.adopted.sentences import not_adoptable, require_rows, too_long
from millrace.pipeline.adopted.window import Members
from millrace.pipeline.formats.tarheader import BLOCK
from millrace.pipeline.formats.tarwalk import Member, walk
from millrace.pipeline.formats.webdataset import KEY, split_name, unsafe_name

__all__ = ["decode_webdataset", "index_webdataset"]

_WAY_OUT: Final = "pack it again or exclude it"


def index_webdataset(subject: Subject) -> FileIndex:
    """Cut a tar into runs of samples.

    Where a pipeline would set a bad sample aside, this refuses the file: what is read in place has no quarantine.

    Raises:
        SourceError: it is truncated, corrupt, no tar, or has a member that belongs to no sample.
    """
    walk_over = _Walk(subject)
    for member in walk(subject.scan, subject.obj.path):
        walk_over.add(member)
    return walk_over.done()


def decode_webdataset(
    schema: pa.Schema, aux: memoryview | None, data: memoryview, offset: int, rows: int
) -> pa.RecordBatch:
    """The samples whose members are ``data``.

    Raises:
        ValueError, SourceError, pa.ArrowException: they can't be decoded.
    """
    columns: dict[str, list[memoryview | None]] = {f.name: [] for f in schema if f.name != KEY}
    keys: list[str] = []
    for key, extension, value in _members(data, offset):
        if not keys or key != keys[-1]:
            keys.append(key)
            for values in columns.values():
                values.append(None)
        if extension not in columns:
            raise ValueError(f"sample {key!r} has the extension {extension!r}, which the dataset hasn't")
        if columns[extension][-1] is not None:
            raise ValueError(f"sample {key!r} has two members with the extension {extension!r}")
        columns[extension][-1] = value
    arrays = [pa.array(keys, f.type) if f.name == KEY else _binary(columns[f.name]) for f in schema]
    return require_rows(pa.RecordBatch.from_arrays(arrays, schema=schema), rows, schema)


def _members(data: memoryview, offset: int) -> Iterator[tuple[str, str, memoryview]]:
    cursor = Members(data)
    for member in walk(cursor, f"the block at byte {offset}"):
        if member.kind == "directory":
            continue
        named = split_name(member.name)
        if member.kind != "file" or named is None or cursor.at + member.size > len(data):
            raise ValueError(f"member {member.name!r} is no part of a sample, or is not whole")
        yield named[0], named[1], cursor.take(member.size)


def _binary(values: list[memoryview | None]) -> pa.Array:
    """What ``pa.array`` gives, in half of its time: one join instead of a call for each value."""
    lengths = np.fromiter((0 if v is None else len(v) for v in values), np.int64, len(values))
    offsets = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    if offsets[-1] >= 2**31:
        raise ValueError("its values are more than one column of a record batch can hold")
    joined = pa.py_buffer(b"".join(v for v in values if v is not None))
    valid = np.fromiter((v is not None for v in values), np.bool_, len(values))
    bitmap = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    buffers = [bitmap, pa.py_buffer(offsets.astype(np.int32)), joined]
    return pa.Array.from_buffers(pa.binary(), len(values), buffers)


class _Walk:
    """The members of a tar as they go by, put together to samples and blocks."""

    def __init__(self, subject: Subject) -> None:
        self._obj, self._scan, self._check = subject.obj, subject.scan, subject.check
        self._blocks: list[Block] = []
        self._extensions: set[str] = set()
        self._key = ""
        self._seen: set[str] = set()
        self._start = self._end = self._rows = 0

    def add(self, member: Member) -> None:
        """The next member; its data is gone over by whoever asks for the one after it."""
        if member.kind == "directory":
            return
        key, extension = _named(member, self._obj)
        if key != self._key or not self._rows:
            self._begin(key, member.start)
        if extension in self._seen:
            raise not_adoptable(
                self._obj, f"has two members {extension!r} in sample {key!r} (byte {member.start})", way_out=_WAY_OUT
            )
        self._seen.add(extension)
        self._extensions.add(extension)
        self._end = self._scan.at + -(-member.size // BLOCK) * BLOCK
        if self._end - self._start > BLOCK_BYTES_MAX:
            raise too_long(self._obj, f"sample {key!r}", self._end - self._start)
        if self._scan.at + member.size > self._obj.size_bytes:
            raise not_adoptable(
                self._obj, f"ends within member {member.name!r}, which has {member.size} bytes; it is truncated"
            )
        self._scan.settle(min(self._end, self._obj.size_bytes))

    def done(self) -> FileIndex:
        """The index of the whole tar."""
        if self._rows:
            self._close(self._end)
        columns = [pa.field(KEY, pa.string()), *(pa.field(e, pa.binary()) for e in sorted(self._extensions))]
        return FileIndex(pa.schema(columns), tuple(self._blocks))

    def _begin(self, key: str, start: int) -> None:
        """A sample begins; it also ends the block before it if that is full."""
        if not self._rows:
            self._scan.cut(start)
            self._start = start
        elif self._rows == BLOCK_ROWS or start - self._start >= BLOCK_BYTES:
            self._close(start)
            self._start = start
        self._key, self._rows = key, self._rows + 1
        self._seen = set()

    def _close(self, end: int) -> None:
        part = self._scan.cut(end)
        if self._check:
            columns = [pa.field(KEY, pa.string()), *(pa.field(e, pa.binary()) for e in sorted(self._extensions))]
            try:
                decode_webdataset(pa.schema(columns), None, part.data, part.offset, self._rows)
            except (ValueError, SourceError, pa.ArrowException) as err:
                raise not_adoptable(self._obj, f"can't be read at byte {part.offset}: {err}", way_out=_WAY_OUT) from err
        self._blocks.append(part.block(self._rows))
        self._rows = 0


def _named(member: Member, obj: SourceObject) -> tuple[str, str]:
    """A member's key and extension.

    Raises:
        SourceError: it belongs to no sample, or its name can't be used; names it.
    """
    named = split_name(member.name) if member.kind == "file" else None
    printable = member.name.encode("utf-8", "backslashreplace").decode()
    where = f"member {printable!r} (byte {member.start})"
    if named is None:
        why = "has no extension" if member.kind == "file" else f"is {member.kind}"
        raise not_adoptable(obj, f"has the {where}, which {why} and so belongs to no sample", way_out=_WAY_OUT)
    unsafe = unsafe_name(member.name)
    if unsafe is not None or printable != member.name:
        why = unsafe or "has a name that is not UTF-8"
        raise not_adoptable(obj, f"has the {where}, which {why}", way_out=_WAY_OUT)
    if named[1] == KEY:
        raise not_adoptable(obj, f"has the {where}, whose extension is the name of the keys' column", way_out=_WAY_OUT)
    return named
