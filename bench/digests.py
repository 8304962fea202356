"""What makes two outputs the same, whatever their format and order: digests of content, added up.

The digest of each item is taken as a number and the numbers are summed modulo 2**128, so neither the order nor the
way items are grouped into files matters, while one that is lost, doubled or changed shows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PIECE_BYTES", "Tally", "files_in", "sha256_files", "tally_files"]

PIECE_BYTES = 8_000_000
"""Files are tallied in pieces of this size, as Millrace's ``files`` format cuts them."""
_MODULUS = 1 << 128


@dataclass(slots=True)
class Tally:
    """So many items, and their sum."""

    count: int = 0
    total: int = 0

    def add_rows(self, data: memoryview, row_bytes: int) -> None:
        """Rows of ``row_bytes`` bytes each, laid end to end."""
        view = data.cast("B")
        if len(view) % row_bytes:
            raise ValueError(f"{len(view)} bytes are not rows of {row_bytes}")
        for at in range(0, len(view), row_bytes):
            digest = hashlib.blake2b(view[at : at + row_bytes], digest_size=16).digest()
            self.total = (self.total + int.from_bytes(digest)) % _MODULUS
        self.count += len(view) // row_bytes

    def add_piece(self, path: str, offset: int, data: memoryview | bytes) -> None:
        """A piece of a file, bound to its name and place."""
        digest = hashlib.sha256(f"{path}\0{offset}\0{len(data)}\0".encode())
        digest.update(data)
        self.total = (self.total + int.from_bytes(digest.digest()[:16])) % _MODULUS
        self.count += 1

    def add(self, other: Tally) -> None:
        """All of another tally."""
        self.count += other.count
        self.total = (self.total + other.total) % _MODULUS

    def plain(self) -> list[int | str]:
        """For JSON."""
        return [self.count, f"{self.total:032x}"]


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The files below a folder, in order."""
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def sha256_files(paths: Iterable[Path], workers: int = 2) -> list[str]:
    """The SHA-256 of each file, several at once."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tally_files(root: Path, paths: Sequence[Path] | None = None) -> Tally:
    """Every piece of every file below ``root``, by its path relative to it."""
    result = Tally()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in pool.map(lambda path: _tally_file(root, path), files_in(root) if paths is None else paths):
            result.add(part)
    return result


def _tally_file(root: Path, path: Path) -> Tally:
    result = Tally()
    name = path.relative_to(root).as_posix()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(PIECE_BYTES))
        at = 0
        while length := _fill(file.fileno(), buffer):
            result.add_piece(name, at, buffer[:length])
            at += length
    return result


def _fill(descriptor: int, buffer: memoryview) -> int:
    done = 0
    while done < len(buffer) and (length := os.readv(descriptor, [buffer[done:]])):
        done += length
    return done
