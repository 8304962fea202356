"""One cached block as a file: its bytes, then a trailer that proves them.

::

    payload | magic 8 | payload's length, u64 little-endian 8 | BLAKE3 of payload and name 32 | boot 16

A file appears under its name by a rename when all of it is written, so a killed process never leaves a part. A machine
that loses its power may: the name can reach the disk before the bytes do. That is what ``boot`` is for. It says in
which boot of the machine the bytes were last known to be right; in any other they are hashed before they are believed,
once, and the trailer is stamped with the new boot.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import struct
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from millrace.core.ports import Bytes

__all__ = [
    "BOOT_BYTES",
    "TRAILER_BYTES",
    "Damaged",
    "Trailer",
    "boot_id",
    "check_name",
    "is_block_name",
    "open_block",
    "read_exactly",
    "read_trailer",
    "stamp",
    "verify",
    "write_block",
]

_TRAILER = struct.Struct("<8sQ32s16s")
TRAILER_BYTES = _TRAILER.size
BOOT_BYTES = 16
_MAGIC = b"mrblock1"
_NAME = re.compile(r"[0-9a-f]{64}[0-9A-Za-z.]{0,64}", re.ASCII)
_STEP_BYTES = 1 << 20
"""Hashed, then written, while it still lies in the processor's cache; between two steps a cancelled writer notices."""
_STEP_PIECES = min(1024, os.sysconf("SC_IOV_MAX"))
_NO_ATIME: int = getattr(os, "O_NOATIME", 0)


class Damaged(Exception):
    """The file is not the block its name says, whole. The message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Trailer:
    """What a file says of itself.

    Attributes:
        length: Bytes of payload.
        digest: BLAKE3 of the payload and the name, 32 bytes.
        boot: The boot of the machine in which these bytes were last known to be right, 16 bytes.
    """

    length: int
    digest: bytes
    boot: bytes


def is_block_name(name: str) -> bool:
    """Whether a block may be called that: 64 hexadecimal letters, then at most 64 letters, digits and dots."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """Refuse what is not a block's name, and so could be a way out of the folder.

    Raises:
        ValueError: It is none.
    """
    if not is_block_name(name):
        raise ValueError(f"{name!r} is no block's name: 64 hexadecimal letters, then letters, digits and dots")


def boot_id() -> bytes:
    """Which boot of this machine this is, 16 bytes.

    Where the system doesn't say (only Linux does), a random one: every process then believes only what it has
    written or hashed itself.
    """
    with contextlib.suppress(OSError, ValueError):
        return uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip()).bytes
    return secrets.token_bytes(BOOT_BYTES)


def open_block(path: str) -> int:
    """Open a block for reading, without a write to the disk for its access time.

    The kernel would write one at every read: a file whose modification time lies ahead always looks modified since.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | _NO_ATIME)
    except PermissionError:  # the file is another user's: no O_NOATIME
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


def read_trailer(handle: int) -> Trailer:
    """Read and check the last bytes of a file.

    Raises:
        Damaged: It is too short, has no trailer, or its trailer tells of another length.
        OSError: as the system says.
    """
    size = os.fstat(handle).st_size
    raw = os.pread(handle, TRAILER_BYTES, size - TRAILER_BYTES) if size >= TRAILER_BYTES else b""
    if len(raw) != TRAILER_BYTES:
        raise Damaged(f"it has {size} bytes, fewer than a block can have")
    magic, length, digest, boot = _TRAILER.unpack(raw)
    if magic != _MAGIC:
        raise Damaged("it does not end as a block does")
    if length != size - TRAILER_BYTES:
        raise Damaged(f"it has {size - TRAILER_BYTES} bytes instead of {length}")
    return Trailer(length, digest, boot)


def read_exactly(handle: int, memory: memoryview) -> None:
    """Fill ``memory`` from the file's beginning, without holding the interpreter's lock.

    Raises:
        Damaged: The file ended before.
        OSError: as the system says.
    """
    done = 0
    while done < len(memory):
        got = os.preadv(handle, [memory[done:]], done)
        if not got:
            raise Damaged(f"it ended after {done} of {len(memory)} bytes")
        done += got


def verify(name: str, payload: memoryview, trailer: Trailer) -> None:
    """Hash a block.

    Raises:
        Damaged: These are not the bytes that were written under that name.
    """
    if blake3(payload).update(name.encode()).digest() != trailer.digest:
        raise Damaged("its bytes are not those that were written")


def stamp(path: str, handle: int, boot: bytes) -> None:
    """Write into a verified file that it is right as of this boot. When it is needed stays as it was.

    Losing power in the midst of it is harmless: whatever then stands there is no later boot's.

    Args:
        path: The file.
        handle: The verified file, open for reading; if ``path`` is another one by now, nothing is done.
        boot: 16 bytes.

    Raises:
        OSError: as the system says; the file is as it was.
    """
    verified = os.fstat(handle)
    writable = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.path.samestat(verified, os.fstat(writable)):
            os.pwrite(writable, boot, verified.st_size - BOOT_BYTES)
            os.utime(writable, ns=(verified.st_atime_ns, verified.st_mtime_ns))
    finally:
        os.close(writable)


def write_block(handle: int, name: str, pieces: Sequence[Bytes], boot: bytes, stop: threading.Event) -> bool:
    """Write payload and trailer to an empty file.

    Args:
        handle: Open for writing.
        name: The block's name.
        pieces: The payload, concatenated.
        boot: 16 bytes.
        stop: Looked at between two steps.

    Returns:
        False if ``stop`` was set before all was written.

    Raises:
        OSError: as the system says.
    """
    hasher = blake3()
    offset = 0
    for group in _steps(pieces):
        if stop.is_set():
            return False
        for piece in group:
            hasher.update(piece)
        offset = _write_all(handle, group, offset)
    trailer = _TRAILER.pack(_MAGIC, offset, hasher.update(name.encode()).digest(), boot)
    _write_all(handle, [memoryview(trailer)], offset)
    return not stop.is_set()


def _steps(pieces: Sequence[Bytes]) -> Iterator[list[memoryview]]:
    """Cut the pieces into lists that one system call takes, each about a step long."""
    group: list[memoryview] = []
    size = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), _STEP_BYTES):
            group.append(view[start : start + _STEP_BYTES])
            size += len(group[-1])
            if size >= _STEP_BYTES or len(group) == _STEP_PIECES:
                yield group
                group, size = [], 0
    if group:
        yield group


def _write_all(handle: int, group: list[memoryview], offset: int) -> int:
    left = group
    while left:
        written = os.pwritev(handle, left, offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left[0])
            left = left[1:]
        if left and written:
            left = [left[0][written:], *left[1:]]
    return offset
