"""Bytes that are in memory, as the files and cursors that decoders want to read from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa

__all__ = ["Joined", "Members", "Window"]

_BLOCK: Final = 512


class _File:
    """What ``pyarrow.PythonFile`` asks of a file that is only read."""

    closed = False

    def readable(self) -> bool:
        """Yes."""
        return True

    def writable(self) -> bool:
        """No."""
        return False

    def seekable(self) -> bool:
        """Unless said otherwise."""
        return True

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """No more reads."""
        self.closed = True


class Window(_File):
    """A file of which one stretch is there. What is read is a view of it, without a copy.

    Args:
        data: The stretch.
        offset: Where in the file it begins.
    """

    def __init__(self, data: memoryview, offset: int) -> None:
        self._data, self._offset, self._at = data, offset, 0

    def read(self, n: int = -1) -> pa.Buffer:
        """The next ``n`` bytes.

        Raises:
            ValueError: they are not within the stretch.
        """
        start = self._at - self._offset
        end = len(self._data) if n < 0 else start + n
        if start < 0 or end > len(self._data):
            raise ValueError(f"bytes {self._at} to {self._offset + end} are wanted, which lie outside the block")
        self._at = self._offset + end
        return pa.py_buffer(self._data[start:end])

    def seek(self, offset: int, whence: int = 0) -> int:
        """As for any file."""
        self._at = offset + (0, self._at, self._offset + len(self._data))[whence]
        return self._at

    def tell(self) -> int:
        """As for any file."""
        return self._at


class Joined(_File):
    """Several pieces as one stream. A read within one piece is a view of it, without a copy."""

    def __init__(self, pieces: Sequence[memoryview]) -> None:
        self._pieces = [piece for piece in pieces if len(piece)]
        self._at = self._piece = self._in_piece = 0

    def seekable(self) -> bool:
        """No."""
        return False

    def read(self, n: int = -1) -> pa.Buffer:
        """The next ``n`` bytes; fewer only at the end."""
        found: list[memoryview] = []
        wanted = sum(map(len, self._pieces)) if n < 0 else n
        while wanted and self._piece < len(self._pieces):
            piece = self._pieces[self._piece][self._in_piece : self._in_piece + wanted]
            found.append(piece)
            wanted -= len(piece)
            self._in_piece += len(piece)
            if self._in_piece == len(self._pieces[self._piece]):
                self._piece, self._in_piece = self._piece + 1, 0
        self._at += sum(map(len, found))
        return pa.py_buffer(found[0] if len(found) == 1 else b"".join(found))

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at


class Members:
    """Whole members of a tar as a cursor over an archive of nothing else: after them comes the mark that ends one.

    Attributes:
        at: Offset of the next byte, from the first member.
    """

    def __init__(self, data: memoryview) -> None:
        self.at = 0
        self._data = data

    def take(self, n: int) -> memoryview:
        """The next ``n`` bytes; zeros after the last member."""
        start, self.at = self.at, self.at + n
        if start >= len(self._data):
            return memoryview(bytes(min(n, _BLOCK)))
        return self._data[start : start + n]

    def skip(self, n: int) -> None:
        """Go ``n`` bytes on."""
        self.at += n
