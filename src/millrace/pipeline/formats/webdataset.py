"""WebDataset: a tar whose consecutive members with one key are one sample, a binary column for each extension.

The key is the member's path up to the first dot of its base name, the extension what follows that dot.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, Quarantined, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.formats.ranged import Cursor, PlainCursor, codec_of, open_cursor, opened
from millrace.pipeline.formats.tabular import emit, with_path
from millrace.pipeline.formats.tarwalk import Member, walk
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["KEY", "WEBDATASET", "WebDataset", "split_name", "unsafe_name"]

KEY: Final = "__key__"
_NAME: Final = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
_SCHEMA_SAMPLES: Final = 100
_SCHEMA_OBJECTS: Final = 16
_HOPS: Final = 200_000
_NEAR: Final = 65_536
_FAR: Final = 2_048


def split_name(name: str) -> tuple[str, str] | None:
    """A member's name as (key, extension), or None where it has no extension or nothing before it."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2]) if match else None


def unsafe_name(name: str) -> str | None:
    """Why a name must not be used as a path, or None: absolute, climbing out with ``..``, or with a NUL."""
    if name.startswith("/"):
        return "is an absolute path"
    if ".." in name.split("/"):
        return "climbs out of its folder with '..'"
    return "has a NUL in it" if "\0" in name else None


@dataclass(slots=True)
class _Sample:
    """A sample while its members go by.

    Attributes:
        key: What its members share.
        start: Byte offset of its first header.
        values: By extension; empty once there is a problem.
        size: Bytes of all values so far.
        problem: (rule, reason) of the first thing wrong with it.
    """

    key: str
    start: int
    values: dict[str, memoryview] = field(default_factory=dict)
    size: int = 0
    problem: tuple[str, str] | None = None

    def spoil(self, rule: str, reason: str) -> None:
        """Mark it bad and let go of what it holds."""
        self.problem = self.problem or (rule, reason)
        self.values.clear()


class WebDataset:
    """Reads WebDataset tars, plain or compressed. Stateless."""

    name = "webdataset"
    position = "byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Cuts at sample starts, found header by header; a compressed tar can't be cut.

        Looks at no more than 200,000 members; the rest is one piece. A tar that turns out to be broken is cut up to
        there: reading the last piece says what is wrong with it.
        """
        if codec_of(source, obj.path) is not None:
            return (0, obj.size_bytes)
        cuts = [0]
        begin = 0
        try:
            for start in _sample_starts(reads, obj):
                # ``begin`` is where the last sample that fits began: cut there once the next one doesn't.
                if start - cuts[-1] > chunk_bytes and begin > cuts[-1]:
                    cuts.append(begin)
                begin = start
        except SourceError:
            pass
        if obj.size_bytes - cuts[-1] > chunk_bytes and begin > cuts[-1]:
            cuts.append(begin)
        return (*cuts, obj.size_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path``, ``__key__`` and the extensions of the first 100 samples, sorted, as binary.

        Raises:
            SourceError: none of the first tars has a sample; says why the first of them doesn't.
        """
        extensions: set[str] = set()
        samples, key, problem = 0, None, None
        for obj in objects[:_SCHEMA_OBJECTS]:
            try:
                cursor = open_cursor(reads, source, obj)
                if isinstance(cursor, PlainCursor):
                    cursor.window = _NEAR
                for member in walk(cursor, obj.path):
                    named = split_name(member.name) if member.kind == "file" else None
                    if named is None or unsafe_name(member.name) or named[1] == KEY or not _is_text(member.name):
                        continue
                    if named[0] != key:
                        samples, key = samples + 1, named[0]
                    if samples > _SCHEMA_SAMPLES:
                        break
                    extensions.add(named[1])
            except SourceError as err:
                problem = problem or err
            if samples > _SCHEMA_SAMPLES:
                break
        if not extensions:
            raise problem or SourceError(
                f"{objects[0].path} has no sample: no member is named like key.extension; check the source's format"
            )
        return with_path(
            pa.schema([pa.field(KEY, pa.string()), *(pa.field(e, pa.binary()) for e in sorted(extensions))])
        )

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """The samples that begin in the chunk, which begins where a sample does.

        Holds a batch, a window of 8 MB and the values of one sample.

        Raises:
            SourceError: a tar is truncated or corrupt; names it and the byte.
        """
        own = context.schema if "path" in _extensions(context.schema) else context.schema.remove(0)
        for index, obj, start, end, whole in opened(chunk, context.reads):
            if obj.size_bytes == 0:
                raise SourceError(f"{obj.path} is empty, not a tar; remove or exclude it")
            cursor = open_cursor(context.reads, context.source, obj, end=end, whole=whole)
            if codec_of(context.source, obj.path) is not None:
                end = 1 << 62
            elif start:
                cursor.skip(start)
            batch: list[_Sample] = []
            held = 0
            for sample in _good(_samples(cursor, obj, end, context), obj, context):
                if batch and (held + sample.size > context.batch_bytes or len(batch) == context.batch_rows):
                    yield from _emit(batch, own, index, obj, context)
                    batch, held = [], 0
                batch.append(sample)
                held += sample.size
            yield from _emit(batch, own, index, obj, context)


def _extensions(schema: pa.Schema) -> frozenset[str]:
    return frozenset(f.name for f in schema if pa.types.is_binary(f.type))


def _is_text(name: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in name)


def _sample_starts(reads: Reads, obj: SourceObject) -> Iterator[int]:
    """Where samples begin. Small members are walked in windows of 64 KB, large ones by a hop to the next header."""
    cursor = PlainCursor(reads, obj, window=_NEAR)
    key: str | None = None
    for member in itertools.islice(walk(cursor, obj.path), _HOPS):
        cursor.window = _NEAR if member.size < _NEAR else _FAR
        named = split_name(member.name) if member.kind == "file" else None
        if named is not None and named[0] != key:
            key = named[0]
            yield member.start


def _samples(cursor: Cursor, obj: SourceObject, end: int, context: ReadContext) -> Iterator[_Sample]:
    """Each sample that begins before ``end``, whole or with its problem."""
    known = _extensions(context.schema)
    sample: _Sample | None = None
    for member in walk(cursor, obj.path):
        named = split_name(member.name) if member.kind == "file" else None
        if sample is not None and named is not None and named[0] == sample.key:
            _add(sample, named[1], member, cursor, obj, known, context)
            continue
        if member.start >= end:
            break
        if member.kind == "directory":
            continue
        if named is None:
            why = "has no extension" if member.kind == "file" else f"is {member.kind}"
            loose = _Sample(member.name, member.start)
            loose.spoil(
                "member", f"{member.name!r} {why}, so it belongs to no sample; pack only files named key.extension"
            )
            yield loose
            continue
        if sample is not None:
            yield sample
        sample = _Sample(named[0], member.start)
        _add(sample, named[1], member, cursor, obj, known, context)
    if sample is not None:
        yield sample


def _add(
    sample: _Sample,
    extension: str,
    member: Member,
    cursor: Cursor,
    obj: SourceObject,
    known: frozenset[str],
    context: ReadContext,
) -> None:
    sample.size += member.size
    unsafe = unsafe_name(member.name)
    if unsafe is not None:
        sample.spoil("unsafe name", f"member {member.name!r} {unsafe}")
    elif not _is_text(member.name):
        sample.spoil("utf-8", f"the name of member {member.name!r} is not valid UTF-8")
    elif extension not in known:
        sample.spoil(
            "schema",
            f"member {member.name!r} has an extension that the source's first {_SCHEMA_SAMPLES} samples don't have; "
            "exclude such tars, or read them as another source",
        )
    elif extension in sample.values:
        sample.spoil("duplicate member", f"sample {sample.key!r} has two members with the extension {extension!r}")
    elif sample.size > context.max_record_bytes:
        sample.spoil(
            "max_record",
            f"sample {sample.key!r} has {sample.size} bytes or more, over max_record ({context.max_record_bytes})",
        )
    if cursor.at + member.size > obj.size_bytes and codec_of(context.source, obj.path) is None:
        raise _cut_off(obj, member, obj.size_bytes)
    if sample.problem is None:
        value = cursor.take(member.size)
        if len(value) < member.size:
            raise _cut_off(obj, member, cursor.at)
        sample.values[extension] = value


def _cut_off(obj: SourceObject, member: Member, at: int) -> SourceError:
    return SourceError(
        f"{obj.path} ends at byte {at} within member {member.name!r}, which has {member.size} bytes; it is truncated, "
        "so write it again or exclude it"
    )


def _good(samples: Iterator[_Sample], obj: SourceObject, context: ReadContext) -> Iterator[_Sample]:
    for sample in samples:
        if sample.problem is None:
            yield sample
        else:
            rule, reason = sample.problem
            context.reject(Quarantined(obj.path, f"byte {sample.start}", "ingest", rule, _printable(reason)))


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _emit(
    batch: Sequence[_Sample], own: pa.Schema, index: int, obj: SourceObject, context: ReadContext
) -> Iterator[Records]:
    if not batch:
        return
    columns = [
        pa.array([s.key for s in batch] if f.name == KEY else [s.values.get(f.name) for s in batch], f.type)
        for f in own
    ]
    positions = np.array([s.start for s in batch], dtype=np.int64)
    yield from emit(
        pa.RecordBatch.from_arrays(columns, schema=own), positions, index, obj, context, position=WebDataset.position
    )


WEBDATASET: Final = WebDataset()
