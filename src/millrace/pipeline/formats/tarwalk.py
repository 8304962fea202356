"""Walking a tar's headers, forward, without reading what the members hold.

Reads ustar, the older Unix format, GNU long names and pax headers. Knows nothing of samples.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from millrace.core.errors import SourceError
from millrace.pipeline.formats.ranged import Cursor
from millrace.pipeline.formats.tarheader import BLOCK, ordinary_file

__all__ = ["Member", "walk"]

_EXTENSION_BYTES: Final = 1_000_000
_KINDS: Final = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a pipe",
}
_DATALESS: Final = {*_KINDS, tarfile.DIRTYPE}


@dataclass(frozen=True, slots=True)
class Member:
    """One member of a tar.

    Attributes:
        start: Byte offset of its first header, long-name and pax headers included.
        name: As stored; undecodable bytes are lone surrogates.
        size: Bytes of its data, which begin where the cursor stands when the member is given out.
        kind: ``file``, ``directory``, or what else it is, with its article.
    """

    start: int
    name: str
    size: int
    kind: str


def walk(cursor: Cursor, path: str) -> Iterator[Member]:
    """Each member, in order. Before asking for the next one, the data may be taken from the cursor, or not.

    Args:
        cursor: Stands at a header.
        path: The tar's, for sentences.

    Raises:
        SourceError: the tar is truncated or corrupt; names it and the byte.
    """
    start, long_name, pax = cursor.at, None, dict[str, str]()
    while True:
        at = cursor.at
        header = bytes(cursor.take(BLOCK))
        if len(header) < BLOCK:
            raise SourceError(
                f"{path} ends at byte {at + len(header)} "
                + ("within a header" if header else "without the mark that ends an archive")
                + "; it is truncated, so write it again or exclude it"
            )
        if not header.strip(b"\0"):
            _require_end(cursor, path)
            return
        ordinary = ordinary_file(header)
        if ordinary is not None and not pax:
            name, size, data_at = long_name or ordinary[0], ordinary[1], cursor.at
            yield Member(start, name, size, "file")
            start = _go_to(cursor, data_at + -(-size // BLOCK) * BLOCK)
            long_name = None
            continue
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as err:
            raise SourceError(
                f"{path} has no valid tar header at byte {at} ({err}); it is corrupt or no tar, so write it again or "
                "exclude it"
            ) from err
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            data = _extension(cursor, info.size, path, at)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                pax = _pax(data, path, at)
            continue
        if info.type == tarfile.XGLTYPE:
            # Comments and the like, for the archive as a whole.
            _extension(cursor, info.size, path, at)
            continue
        size = _size(info, pax, path, at)
        name = pax.get("path") or long_name or info.name
        data_at = cursor.at
        kind = _KINDS.get(info.type, "of an unknown type")
        if info.type in tarfile.REGULAR_TYPES:
            kind = "file"
        if info.type == tarfile.DIRTYPE:
            kind = "directory"
        yield Member(start, name, size, kind)
        start = _go_to(cursor, data_at + -(-size // BLOCK) * BLOCK)
        long_name, pax = None, {}


def _go_to(cursor: Cursor, at: int) -> int:
    if cursor.at < at:
        cursor.skip(at - cursor.at)
    return at


def _size(info: tarfile.TarInfo, pax: dict[str, str], path: str, at: int) -> int:
    if info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
        raise SourceError(f"{path} has a sparse member at byte {at}, which can't be read; pack it without --sparse")
    if info.type in _DATALESS:
        return 0
    try:
        size = int(pax.get("size", info.size))
    except ValueError as err:
        raise SourceError(f"{path} has a pax header with a wrong size before byte {at}; it is corrupt") from err
    if size < 0:
        raise SourceError(f"{path} has a member of negative size at byte {at}; it is corrupt")
    return size


def _extension(cursor: Cursor, size: int, path: str, at: int) -> bytes:
    """The data of a header that speaks of the next member."""
    if not 0 <= size <= _EXTENSION_BYTES:
        raise SourceError(f"{path} has an extended header of {size} bytes at byte {at}; it is corrupt")
    padded = -(-size // BLOCK) * BLOCK
    data = bytes(cursor.take(padded))
    if len(data) < padded:
        raise SourceError(
            f"{path} ends at byte {cursor.at} within a header; it is truncated, so write it again or exclude it"
        )
    return data[:size]


def _pax(data: bytes, path: str, at: int) -> dict[str, str]:
    """Records of the form ``length key=value newline``, where the length counts the whole record."""
    found: dict[str, str] = {}
    while data:
        head, _, _ = data.partition(b" ")
        length = int(head) if head.isdigit() and len(head) < 8 else 0
        record = data[len(head) + 1 : length - 1]
        key, equals, value = record.partition(b"=")
        if not equals or length > len(data) or data[length - 1 : length] != b"\n":
            raise SourceError(f"{path} has a malformed pax header at byte {at}; it is corrupt")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return found


def _require_end(cursor: Cursor, path: str) -> None:
    """After the end mark there may be padding, and nothing else: members there would be lost in silence."""
    at = cursor.at
    if bytes(cursor.take(65_536)).strip(b"\0"):
        raise SourceError(
            f"{path} goes on after the mark that ends an archive, at byte {at}; two tars joined end to end must be "
            "given as two files"
        )
