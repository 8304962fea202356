"""Where the record batches of an Arrow IPC file lie, which pyarrow knows and doesn't tell.

The footer is a flatbuffer: ``Footer {version, schema, dictionaries: [Block], recordBatches: [Block], ...}`` with
``Block {offset: int64, metaDataLength: int32, bodyLength: int64}``; see ``format/File.fbs`` and
``format/Message.fbs`` of the Arrow project.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["IpcBlock", "batch_rows", "dictionaries", "record_batches", "table_field"]

_FOOTER_DICTIONARIES: Final = 2
_FOOTER_BATCHES: Final = 3
_MESSAGE_HEADER: Final = 2
_BATCH_LENGTH: Final = 0
_CONTINUATION: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class IpcBlock:
    """A record batch or a dictionary in a file.

    Attributes:
        offset: Of its message.
        metadata_bytes: Of the message's head, with its length prefix and padding.
        length_bytes: Of the whole message.
    """

    offset: int
    metadata_bytes: int
    length_bytes: int


def record_batches(footer: bytes | memoryview) -> list[IpcBlock]:
    """The blocks of all record batches, in the file's order.

    Raises:
        ValueError: these bytes are no footer.
    """
    return _blocks(footer, _FOOTER_BATCHES, "record batches")


def dictionaries(footer: bytes | memoryview) -> list[IpcBlock]:
    """The blocks of all dictionaries, in the file's order.

    Raises:
        ValueError: these bytes are no footer.
    """
    return _blocks(footer, _FOOTER_DICTIONARIES, "dictionaries")


def batch_rows(message: bytes | memoryview) -> int:
    """The rows of a record batch, from the head of its message.

    Raises:
        ValueError: these bytes are no record batch.
    """
    view = memoryview(message)
    try:
        (mark,) = struct.unpack_from("<I", view, 0)
        view = view[8 if mark == _CONTINUATION else 4 :]
        (root,) = struct.unpack_from("<I", view, 0)
        header = table_field(view, root, _MESSAGE_HEADER)
        if header is None:
            raise ValueError("a message without a header")
        table = header + struct.unpack_from("<I", view, header)[0]
        at = table_field(view, table, _BATCH_LENGTH)
        rows = 0 if at is None else int(struct.unpack_from("<q", view, at)[0])
    except struct.error as err:
        raise ValueError("not the head of a record batch") from err
    if rows < 0:
        raise ValueError("a record batch with a negative number of rows")
    return rows


def _blocks(footer: bytes | memoryview, field: int, what: str) -> list[IpcBlock]:
    view = memoryview(footer)
    try:
        (root,) = struct.unpack_from("<I", view, 0)
        at = table_field(view, root, field)
        if at is None:
            return []
        vector = at + struct.unpack_from("<I", view, at)[0]
        (count,) = struct.unpack_from("<I", view, vector)
        if vector + 4 + 24 * count > len(view):
            raise ValueError(f"the footer's list of {what} runs over its end")
        blocks = [struct.unpack_from("<qi4xq", view, vector + 4 + 24 * i) for i in range(count)]
    except struct.error as err:
        raise ValueError("the footer is no Arrow footer") from err
    return [IpcBlock(offset, metadata, metadata + body) for offset, metadata, body in blocks]


def table_field(view: memoryview, table: int, index: int) -> int | None:
    """Where a flatbuffer table's field is, or None when it has its default.

    Raises:
        struct.error: it would lie outside of ``view``.
    """
    vtable = table - struct.unpack_from("<i", view, table)[0]
    if vtable < 0:
        raise struct.error
    (size,) = struct.unpack_from("<H", view, vtable)
    slot = 4 + 2 * index
    offset = struct.unpack_from("<H", view, vtable + slot)[0] if slot + 2 <= size else 0
    return table + offset if offset else None
