"""``text``: a record a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from millrace.core.model import Chunk, SourceObject
from millrace.core.ports import Bytes
from millrace.core.spec import Source
from millrace.pipeline.decompress import compression_of
from millrace.pipeline.formats.objects import INT32_MAX, path_column, rejected, whole_objects
from millrace.pipeline.records import ReadContext, Reads, Records

__all__ = ["TEXT", "TEXT_SCHEMA", "TextFormat"]

TEXT_SCHEMA: Final = pa.schema([("path", pa.string()), ("text", pa.string())])


class TextFormat:
    """Each object is one record: ``path`` (the object's, with its ``.gz`` if it has one) and ``text`` (UTF-8)."""

    name = "text"
    position = "byte"

    def cut(self, reads: Reads, source: Source, obj: SourceObject, chunk_bytes: int) -> Sequence[int]:
        """Never."""
        return (0, obj.size_bytes)

    def schema(self, reads: Reads, source: Source, objects: Sequence[SourceObject]) -> pa.Schema:
        """``path`` and ``text``."""
        return TEXT_SCHEMA

    def read(self, chunk: Chunk, context: ReadContext) -> Iterator[Records]:
        """See :class:`millrace.pipeline.records.Format`. What isn't UTF-8 or too long is rejected."""
        wanted = [i for i, obj in enumerate(chunk.objects) if not _too_long(obj, context)]
        objects = [chunk.objects[i] for i in wanted]
        texts: list[Bytes] = []
        rows: list[int] = []
        held = 0
        for i, content in whole_objects(context, objects):
            text = _joined(content, objects[i], context)
            if text is None:
                continue
            if texts and held + len(text) > INT32_MAX:
                yield from _records(chunk, context, texts, rows)
                texts, rows, held = [], [], 0
            texts.append(text)
            rows.append(wanted[i])
            held += len(text)
            del text
            if held >= context.batch_bytes or len(texts) >= context.batch_rows:
                yield from _records(chunk, context, texts, rows)
                texts, rows, held = [], [], 0
        yield from _records(chunk, context, texts, rows)


def _too_long(obj: SourceObject, context: ReadContext) -> bool:
    """Whether the listing alone says so; then the object isn't read."""
    if compression_of(context.source, obj.path) != "none" or obj.size_bytes <= context.max_record_bytes:
        return False
    reason = f"the file has {obj.size_bytes} bytes, more than max_record ({context.max_record_bytes})"
    context.reject(rejected(obj, "", "max_record", reason))
    return True


def _joined(content: Iterator[Bytes], obj: SourceObject, context: ReadContext) -> Bytes | None:
    """The whole text, or None when it was rejected for its length."""
    pieces: list[Bytes] = []
    size = 0
    for piece in content:
        size += len(piece)
        if size > context.max_record_bytes:
            reason = f"the file has more than max_record ({context.max_record_bytes}) bytes when decompressed"
            context.reject(rejected(obj, "", "max_record", reason))
            return None
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _records(chunk: Chunk, context: ReadContext, texts: list[Bytes], rows: list[int]) -> Iterator[Records]:
    try:
        column = pa.array(texts, pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        good: list[str] = []
        kept: list[int] = []
        for text, row in zip(texts, rows, strict=True):
            try:
                good.append(str(text, "utf-8"))
                kept.append(row)
            except UnicodeDecodeError as error:
                reason = f"the file is not UTF-8: {error.reason} at byte {error.start}"
                context.reject(rejected(chunk.objects[row], f"byte {error.start}", "utf-8", reason))
        column, rows = pa.array(good, pa.string()), kept
    if not rows:
        return
    objects = np.array(rows, np.int32)
    batch = pa.record_batch([path_column(chunk.objects, objects), column], schema=TEXT_SCHEMA)
    yield Records(batch, objects, np.zeros(len(rows), np.int64))


TEXT: Final = TextFormat()
