"""One pass over a file, from front to back: SHA-256 of all of it, BLAKE3 of each part it is cut into."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
from blake3 import blake3

from millrace.core.model import Block, Digest, SourceObject, block_digest
from millrace.pipeline.formats.ranged import RangedFile
from millrace.pipeline.records import Reads

__all__ = ["BLOCK_BYTES", "BLOCK_BYTES_MAX", "BLOCK_ROWS", "FileIndex", "Part", "Scan", "Subject"]

BLOCK_BYTES: Final = 4_000_000
"""A block of samples is closed at the first one that brings it to this many bytes ..."""
BLOCK_ROWS: Final = 1024
"""... or rows. Both are constants: where blocks are cut is part of the digest."""
BLOCK_BYTES_MAX: Final = 2**31 - 2**20
"""No block may be longer: a column of one record batch holds at most 2 GiB of text or bytes."""

_WINDOW: Final = 32_000_000
_HASH_BYTES: Final = 1 << 20
"""Hashed at a time; members of a tar may be far smaller than what a call costs."""


@dataclass(frozen=True, slots=True)
class FileIndex:
    """What a file was found to hold.

    Attributes:
        schema: Of its rows, in plain types.
        blocks: In the order of their rows; one of no rows, if the others need it, is first.
    """

    schema: pa.Schema
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a file that the pass went over.

    Attributes:
        offset, length: Where, in bytes.
        digest: BLAKE3.
        data: The bytes; empty unless the scan keeps them.
    """

    offset: int
    length: int
    digest: Digest
    data: memoryview

    def block(self, rows: int) -> Block:
        """It, as a block of so many rows."""
        return Block(self.offset, self.length, rows, self.digest)


class Scan:
    """A :class:`millrace.pipeline.formats.ranged.Cursor` that hashes what it goes over, skipped bytes too.

    Holds one window of 32 MB, and the part being cut where parts are kept. Bytes that may yet belong to the next
    part are held until :meth:`settle` or :meth:`cut` says where they belong.

    Args:
        reads: Blocking reads; each checks that the file hasn't changed.
        obj: The file.
        whole: All of its bytes, where they were read already.
        keep: Whether parts come with their bytes.
        told: Called with the number of bytes of each window as it is fetched.
    """

    def __init__(
        self,
        reads: Reads,
        obj: SourceObject,
        *,
        whole: memoryview | None = None,
        keep: bool = False,
        told: Callable[[int], None] = lambda _bytes: None,
    ) -> None:
        self.at = 0
        self.keep = keep
        self._reads, self._obj, self._told = reads, obj, told
        self._sha = hashlib.sha256()
        self._blake = blake3()
        self._windows: deque[tuple[int, memoryview]] = deque()
        self._kept: list[memoryview] = []
        self._fetched = self._hashed = self._settled = self._cut = 0
        if whole is not None:
            self._add(whole)

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes; fewer only where the file ends."""
        start, end = self.at, min(self.at + n, self._obj.size_bytes)
        while self._fetched < end:
            self._fetch()
        out = self._between(start, end)
        self._go_to(end)
        return out

    def skip(self, n: int) -> None:
        """Go ``n`` bytes on, hashing them, and no further than the end."""
        end = min(self.at + n, self._obj.size_bytes)
        while self.at < end:
            if self._fetched <= self.at:
                self._fetch()
            self._go_to(min(end, self._fetched))

    def settle(self, offset: int) -> None:
        """What lies before ``offset`` belongs to the part being cut, so it need not be held."""
        self._settled = max(self._settled, offset)

    def cut(self, end: int) -> Part:
        """End the part at ``end``, which is not before anything that was settled; the next part begins there."""
        self.settle(end)
        self.skip(end - self.at)
        self._hash_to(end)
        data = self._kept[0] if len(self._kept) == 1 else memoryview(b"".join(self._kept))
        part = Part(self._cut, end - self._cut, Digest(self._blake.hexdigest()), data)
        self._blake, self._kept, self._cut = blake3(), [], end
        return part

    def part(self, start: int, end: int) -> Part:
        """Go on to ``start`` and cut ``[start, end)``."""
        keep, self.keep = self.keep, False
        self.cut(start)
        self.keep = keep
        return self.cut(end)

    def finish(self) -> Digest:
        """Go to the end; gives the SHA-256 of the whole file."""
        self.keep = False
        self.cut(self._obj.size_bytes)
        return Digest(self._sha.hexdigest())

    def _fetch(self) -> None:
        self._add(self._reads.read(self._obj, self._fetched, min(_WINDOW, self._obj.size_bytes - self._fetched)))

    def _add(self, window: memoryview) -> None:
        self._sha.update(window)
        self._windows.append((self._fetched, window))
        self._fetched += len(window)
        self._told(len(window))

    def _go_to(self, at: int) -> None:
        self.at = at
        upto = min(self._settled, at)
        if upto - self._hashed >= _HASH_BYTES:
            self._hash_to(upto)

    def _hash_to(self, upto: int) -> None:
        for piece in self._pieces(self._hashed, upto):
            self._blake.update(piece)
            if self.keep:
                self._kept.append(piece)
        self._hashed = upto
        while self._windows and self._windows[0][0] + len(self._windows[0][1]) <= upto:
            self._windows.popleft()

    def _pieces(self, start: int, end: int) -> list[memoryview]:
        return [w[max(0, start - at) : end - at] for at, w in self._windows if at < end and at + len(w) > start]

    def _between(self, start: int, end: int) -> memoryview:
        pieces = self._pieces(start, end)
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


class Subject:
    """A file being adopted, to be looked at in two ways: at random, for its footer or head, and in one pass.

    Attributes:
        obj: The file.
        file: To be read at random.
        scan: The one pass.
        check: Whether each block is decoded once.
    """

    def __init__(
        self, reads: Reads, obj: SourceObject, *, check: bool, told: Callable[[int], None], hold_bytes: int
    ) -> None:
        """Files of at most ``hold_bytes`` are read once, whole; of others, footers and heads are read twice."""
        whole = reads.read(obj) if obj.size_bytes <= hold_bytes else None
        self.obj, self.check = obj, check
        self.file = RangedFile(reads, obj, whole)
        self.scan = Scan(reads, obj, whole=whole, keep=check, told=told)

    def same(self, seen: memoryview, part: Part) -> bool:
        """Whether what was read at random is what the pass found."""
        return len(seen) == part.length and block_digest(seen) == part.digest
