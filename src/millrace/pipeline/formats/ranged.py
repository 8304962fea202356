"""Three ways to look at one source object through :class:`Reads`: as a file, as a forward cursor, decompressed.

None holds more than one window of bytes, so an object of any size is read in bounded memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, Protocol

import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.model import Chunk, SourceObject
from millrace.core.spec import Source
from millrace.pipeline.records import Reads

__all__ = [
    "HOLD_BYTES",
    "Cursor",
    "InflatingCursor",
    "PlainCursor",
    "RangedFile",
    "codec_of",
    "decoding",
    "even_cuts",
    "open_cursor",
    "opened",
]

HOLD_BYTES: Final = 64_000_000
"""The most bytes of an object that are fetched in one read and held together."""
_WINDOW: Final = 8_000_000
_CODECS: Final = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".tzst": "zstd"}


class RangedFile:
    """A read-only binary file over range reads, for ``pyarrow.PythonFile``.

    Reads inside the held window are slices of it, without a copy; a read outside fetches a new window.
    """

    def __init__(
        self, reads: Reads, obj: SourceObject, whole: memoryview | None = None, *, least: int = 65_536
    ) -> None:
        """Look at an object.

        Args:
            reads: Blocking reads.
            obj: The object.
            whole: All of its bytes, where they have been fetched already.
            least: How many bytes a fetch asks for, at least.
        """
        self.obj = obj
        self.closed = False
        self._least = least
        self._reads = reads
        self._start = 0
        self._window = memoryview(b"") if whole is None else whole
        self._at = 0

    def hold(self, start: int, length: int) -> None:
        """Fetch ``[start, start + length)`` in one read, unless it is held; what was held before is let go."""
        if not (self._start <= start and start + length <= self._start + len(self._window)):
            self._window = memoryview(b"")
            self._window = self._reads.read(self.obj, start, length)
            self._start = start

    def span(self, start: int, length: int) -> memoryview:
        """Bytes ``[start, start + length)``, cut off at the end of the object."""
        length = max(0, min(length, self.obj.size_bytes - start))
        if length == 0:
            return memoryview(b"")
        if not (self._start <= start and start + length <= self._start + len(self._window)):
            self.hold(start, max(length, min(self._least, self.obj.size_bytes - start)))
        return self._window[start - self._start : start - self._start + length]

    def read(self, n: int = -1) -> pa.Buffer:
        """The next ``n`` bytes, or all that are left, as a buffer."""
        view = self.span(self._at, self.obj.size_bytes - self._at if n < 0 else n)
        self._at += len(view)
        return pa.py_buffer(view)

    def seek(self, offset: int, whence: int = 0) -> int:
        """As for any file."""
        self._at = offset + (0, self._at, self.obj.size_bytes)[whence]
        return self._at

    def tell(self) -> int:
        """As for any file."""
        return self._at

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def writable(self) -> bool:
        """No."""
        return False

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Let go of the window."""
        self._window = memoryview(b"")
        self.closed = True


class Cursor(Protocol):
    """Forward reading of bytes, decompressed where the object is compressed.

    Attributes:
        at: Offset of the next byte, in the decompressed bytes.
    """

    at: int

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes; fewer only where the object ends."""

    def skip(self, n: int) -> None:
        """Go ``n`` bytes on, without fetching them where that can be avoided."""


class PlainCursor:
    """A cursor over an object that isn't compressed: skips cost nothing.

    Attributes:
        at: Offset of the next byte.
        window: How many bytes a fetch asks for, at least.
    """

    def __init__(
        self,
        reads: Reads,
        obj: SourceObject,
        *,
        start: int = 0,
        end: int | None = None,
        window: int = _WINDOW,
        whole: memoryview | None = None,
    ) -> None:
        """Stand at ``start``; nothing beyond ``end`` is fetched ahead of need."""
        self.at = start
        self.window = window
        self._reads, self._obj = reads, obj
        self._end = obj.size_bytes if end is None else end
        self._held = memoryview(b"") if whole is None else whole
        self._held_at = start if whole is None else 0

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes; fewer only where the object ends."""
        n = max(0, min(n, self._obj.size_bytes - self.at))
        have = self._held[max(0, self.at - self._held_at) :]
        if len(have) < n:
            begin = self.at + len(have)
            ahead = max(n - len(have), min(self.window, self._end - begin))
            more = self._reads.read(self._obj, begin, ahead)
            if len(have):
                # A value that straddles two windows is the only thing that is copied.
                head = n - len(have)
                out = memoryview(b"".join((have, more[:head])))
                self._held, self._held_at = more, begin
                self.at += len(out)
                return out
            self._held, self._held_at, have = more, begin, more
        out = have[:n]
        self.at += len(out)
        return out

    def skip(self, n: int) -> None:
        """Go ``n`` bytes on, and no further than the end."""
        self.at = min(self.at + n, self._obj.size_bytes)
        if self.at >= self._held_at + len(self._held):
            self._held, self._held_at = memoryview(b""), self.at


class InflatingCursor:
    """A cursor over a gzip or zstd object, decompressed as it goes; several members or frames are one stream.

    Attributes:
        at: Offset of the next byte in the decompressed bytes.
    """

    def __init__(self, reads: Reads, obj: SourceObject, codec: str, whole: memoryview | None = None) -> None:
        """Stand at the beginning."""
        self.at = 0
        self._obj, self._codec = obj, codec
        self._stream = pa.CompressedInputStream(pa.PythonFile(_Ahead(reads, obj, whole), mode="r"), codec)

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes; fewer only where the stream ends.

        Raises:
            SourceError: the stream is truncated or corrupt; names the object and how far it could be read.
        """
        if self._obj.size_bytes == 0:
            raise SourceError(f"{self._obj.path} is empty, not {self._codec}; remove or exclude it")
        pieces, missing = [], n
        while missing > 0:
            try:
                piece = self._stream.read(min(missing, _WINDOW))
            except (pa.ArrowException, OSError) as err:
                raise SourceError(
                    f"{self._obj.path} can't be decompressed as {self._codec} beyond byte {self.at} of its content: "
                    f"{_first_line(err)}; write the file again or exclude it"
                ) from err
            if not piece:
                break
            pieces.append(piece)
            missing -= len(piece)
            self.at += len(piece)
        return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def skip(self, n: int) -> None:
        """Go ``n`` bytes on, decompressing them."""
        while n > 0:
            got = len(self.take(min(n, 1_000_000)))
            if got == 0:
                return
            n -= got


class _Ahead(RangedFile):
    """A file that is read from front to back, a window at a time."""

    def read(self, n: int = -1) -> pa.Buffer:
        left = self.obj.size_bytes - self.tell()
        if left > 0:
            window = min(_WINDOW, left)
            have = self._start + len(self._window) - self.tell()
            if have <= 0:
                self.hold(self.tell(), window)
                have = len(self._window)
            # Never across a window: the decompressor takes short reads as they come.
            n = min(have, left if n < 0 else n)
        return super().read(n)


def open_cursor(
    reads: Reads, source: Source, obj: SourceObject, *, end: int | None = None, whole: memoryview | None = None
) -> Cursor:
    """A cursor at the beginning of an object's content, decompressing where its name or the spec says so."""
    codec = codec_of(source, obj.path)
    if codec is not None:
        return InflatingCursor(reads, obj, codec, whole)
    return PlainCursor(reads, obj, end=end, whole=whole)


def codec_of(source: Source, path: str) -> str | None:
    """``gzip``, ``zstd`` or None, from the spec or, with ``auto``, from how the name ends."""
    if source.compression == "auto":
        return next((codec for ending, codec in _CODECS.items() if path.lower().endswith(ending)), None)
    return None if source.compression == "none" else source.compression


def even_cuts(obj: SourceObject, chunk_bytes: int) -> tuple[int, ...]:
    """Every multiple of ``chunk_bytes`` inside the object, and its two ends."""
    return (*range(0, max(1, obj.size_bytes), chunk_bytes), obj.size_bytes)


def opened(
    chunk: Chunk, reads: Reads, skip: Sequence[str] = ()
) -> Iterator[tuple[int, SourceObject, int, int, memoryview | None]]:
    """A chunk's objects, as (index, object, first byte owned, one past the last, all bytes or None), in order.

    Groups of small objects come with their bytes, fetched ahead; a lone object is left to range reads.

    Args:
        chunk: The chunk.
        reads: Blocking reads.
        skip: Base names of objects that hold no records.
    """
    wanted = [(i, obj) for i, obj in enumerate(chunk.objects) if obj.path.rsplit("/", 1)[-1] not in skip]
    if len(chunk.objects) == 1:
        for i, obj in wanted:
            yield i, obj, chunk.start, chunk.end, None
        return
    run: list[tuple[int, SourceObject]] = []
    for i, obj in wanted:
        if obj.size_bytes <= HOLD_BYTES:
            run.append((i, obj))
            continue
        yield from _whole(run, reads)
        run = []
        yield i, obj, 0, obj.size_bytes, None
    yield from _whole(run, reads)


def _whole(
    run: Sequence[tuple[int, SourceObject]], reads: Reads
) -> Iterator[tuple[int, SourceObject, int, int, memoryview | None]]:
    for at, data in reads.read_whole([obj for _, obj in run]) if run else ():
        index, obj = run[at]
        yield index, obj, 0, obj.size_bytes, data


@contextlib.contextmanager
def decoding(obj: SourceObject, what: str) -> Iterator[None]:
    """Turns what pyarrow says of bad bytes into a sentence that names the object.

    Args:
        obj: The object being decoded.
        what: What it should be, with its article: ``a Parquet file``.

    Raises:
        SourceError: pyarrow could not decode it. Errors of reading pass through as they are.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, KeyError) as err:
        raise SourceError(
            f"{obj.path} can't be read as {what}: {_first_line(err)}; it is truncated, corrupt or something else, "
            "so write it again or exclude it"
        ) from err


def _first_line(err: BaseException) -> str:
    text: Any = err.args[0] if err.args else err
    return (str(text).strip().splitlines() or [type(err).__name__])[0].rstrip(".")[:300]
