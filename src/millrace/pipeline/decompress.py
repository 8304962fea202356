"""Bytes of source objects as blocks, read ahead, and decompressed where they are gzip or zstd.

Nothing here holds more than a few blocks, whatever a compressed object would grow to.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, Literal

import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import SourceObject
from millrace.core.ports import Bytes
from millrace.core.spec import Source
from millrace.pipeline.records import Reads

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["BLOCK_BYTES", "Compression", "ObjectStream", "blocks", "compression_of", "decompressed"]

BLOCK_BYTES: Final = 4_000_000
"""Bytes of one block. Two are held: the one in use and the one that is on its way."""

Compression = Literal["none", "gzip", "zstd"]

_SUFFIXES: Final[dict[str, Compression]] = {".gz": "gzip", ".zst": "zstd"}


def compression_of(source: Source, path: str) -> Compression:
    """How an object is compressed: what the source says, or by the ending of its name (``.gz``, ``.zst``)."""
    if source.compression != "auto":
        return source.compression
    return next((kind for suffix, kind in _SUFFIXES.items() if path.endswith(suffix)), "none")


def blocks(
    reads: Reads, obj: SourceObject, start: int = 0, end: int | None = None, *, block_bytes: int = BLOCK_BYTES
) -> Generator[memoryview, None, None]:
    """Bytes ``[start, end)`` of an object, at most ``block_bytes`` at a time, one block read ahead.

    Raises:
        SourceError, SourceChanged, StoreError: as :class:`millrace.pipeline.records.Reads`.
    """
    end = obj.size_bytes if end is None else end
    if end - start <= block_bytes:
        if end > start:
            yield reads.read(obj, start, end - start)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as ahead:
        at = start
        pending = ahead.submit(reads.read, obj, at, block_bytes)
        while at < end:
            block = pending.result()
            if not len(block):
                raise SourceError(f"{obj.path} ends at byte {at}, but was listed with {obj.size_bytes} bytes")
            at += len(block)
            if at < end:
                pending = ahead.submit(reads.read, obj, at, min(block_bytes, end - at))
            yield block


class ObjectStream(io.RawIOBase):
    """Blocks as a binary stream: forward only, for what wants a file. ``tell`` is the bytes taken so far."""

    def __init__(self, source: Iterator[Bytes]) -> None:
        super().__init__()
        self._source = source
        self._block = memoryview(b"")
        self._taken = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes read."""
        return self._taken

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill ``buffer`` from the current block; 0 at the end."""
        while not len(self._block):
            block = next(self._source, None)
            if block is None:
                return 0
            self._block = memoryview(block).cast("B")
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._block))
        target[:count] = self._block[:count]
        self._block = self._block[count:]
        self._taken += count
        return count


def decompressed(
    source: Iterator[Bytes], obj: SourceObject, compression: Compression, *, block_bytes: int = BLOCK_BYTES
) -> Iterator[Bytes]:
    """What compressed blocks hold, at most ``block_bytes`` at a time; ``none`` gives them as they are.

    Several gzip members or zstd frames, one after another, are one stream, as ``cat`` makes them.

    Args:
        source: The object's stored bytes, from the first to the last.
        obj: For the sentence.
        compression: Of all of it.
        block_bytes: Of one block of what comes out, at most.

    Raises:
        SourceError: the stream ends in its middle, is empty or isn't of its kind; names the object and the byte.
    """
    if compression == "none":
        yield from source
        return
    raw = ObjectStream(source)
    empty = True
    with pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression) as stream:
        while True:
            try:
                block = stream.read(block_bytes)
            except OSError as error:
                raise SourceError(_broken(obj, compression, raw.tell(), str(error))) from error
            if not block:
                break
            empty = False
            yield block
    if empty and raw.tell() == 0:
        raise SourceError(f"{obj.path} is empty, which is not a {compression} stream; upload it again or exclude it")


def _broken(obj: SourceObject, compression: str, at: int, reason: str) -> str:
    if "truncated" in reason.lower():
        return (
            f"{obj.path} ends in the middle of its {compression} stream, at byte {at}; "
            "the file is cut short: upload it again"
        )
    return f"{obj.path} is not a whole {compression} stream: it breaks at or before byte {at} ({reason})"
