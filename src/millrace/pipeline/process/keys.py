"""Keys of records: 128 bits that are equal exactly when the values are (but for a chance of about n² / 2^129).

A key is the first half of the SHA-256 over an encoding of the values in which no two rows of different values look
alike: each value carries a tag for its meaning and, where its length varies, its length. It is the same for the same
value however batches are cut and columns laid out: 5 is 5 in int8 and int64, text is text in string and string_view.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from millrace.core.errors import TransformError

__all__ = ["KeyBatch", "partition", "row_keys"]

Bytes = bytes | memoryview

_NULL: Final = b"\0"
_PREFIX: Final = struct.Struct("<cQ").pack  # a tag and a length
_UNIT_NS: Final = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


@dataclass(frozen=True, slots=True)
class KeyBatch:
    """Keys of some rows of one chunk.

    Attributes:
        high, low: uint64, one a row: the key's halves, the first eight bytes big-endian in ``high``.
        ordinals: int64, one a row: its number in the chunk's stream as it arrives at the barrier.
    """

    high: npt.NDArray[np.uint64]
    low: npt.NDArray[np.uint64]
    ordinals: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ordinals)

    def take(self, rows: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> KeyBatch:
        """These rows, by number or by mask."""
        return KeyBatch(self.high[rows], self.low[rows], self.ordinals[rows])


def partition(high: npt.NDArray[np.uint64], partitions: int) -> npt.NDArray[np.int64]:
    """Which of ``partitions`` (1 to 2^31) each key belongs to, by its top bits; even to about one in 2^32."""
    return ((high >> np.uint64(32)) * np.uint64(partitions) >> np.uint64(32)).astype(np.int64)


def row_keys(batch: pa.RecordBatch, columns: Sequence[str], first_ordinal: int) -> KeyBatch:
    """The keys of a batch's rows by the values of these columns, in this order. Null is a value like others.

    Holds about twice the columns' bytes.

    Raises:
        TransformError: a column isn't there, or has a type without an equality (a union).
    """
    encoded = []
    for name in columns:
        if name not in batch.schema.names:
            raise TransformError(f"there is no column {name!r}; there are {', '.join(batch.schema.names)}")
        try:
            encoded.append(_encode(batch.column(name)))
        except TypeError:
            kind = batch.schema.field(name).type
            raise TransformError(f"column {name!r} is {kind}, and values of that type can't be compared") from None
    sha256 = hashlib.sha256
    if len(encoded) == 1:
        digests = [sha256(cell).digest() for cell in encoded[0].cells()]
    else:
        digests = [sha256(b"".join(cells)).digest() for cells in zip(*(e.cells() for e in encoded), strict=True)]
    words = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 4).astype(np.uint64)
    ordinals = np.arange(first_ordinal, first_ordinal + batch.num_rows, dtype=np.int64)
    return KeyBatch(np.ascontiguousarray(words[:, 0]), np.ascontiguousarray(words[:, 1]), ordinals)


# --- the encoding -----------------------------------------------------------------------------------


class _Cells(Protocol):
    """Encoded values, one after another."""

    def cells(self) -> Sequence[Bytes]:
        """Each value's bytes."""

    def flat(self) -> tuple[Bytes, npt.NDArray[np.int64]]:
        """All of them end to end, and where each begins, with the end last."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Values of varying length, each an object."""

    pieces: list[bytes]

    def cells(self) -> Sequence[Bytes]:
        return self.pieces

    def flat(self) -> tuple[Bytes, npt.NDArray[np.int64]]:
        offsets = np.zeros(len(self.pieces) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, self.pieces), np.int64, len(self.pieces)), out=offsets[1:])
        return b"".join(self.pieces), offsets


@dataclass(frozen=True, slots=True)
class _Words:
    """Values of a few words, end to end: value i is ``data[offsets[i]:offsets[i + 1]]``."""

    data: bytes
    offsets: npt.NDArray[np.int64]

    def cells(self) -> Sequence[Bytes]:
        view = memoryview(self.data)
        return [view[s:e] for s, e in pairwise(self.offsets.tolist())]

    def flat(self) -> tuple[Bytes, npt.NDArray[np.int64]]:
        return self.data, self.offsets


def _encode(array: pa.Array) -> _Cells:
    """Encode an array of a plain type.

    Raises:
        TypeError: not a type that has an equality.
    """
    kind = array.type
    if not len(array):
        return _Pieces([])
    if pt.is_null(kind):
        return _Pieces([_NULL] * len(array))
    if pt.is_string(kind) or pt.is_binary(kind):
        return _encode_bytes(array, b"s" if pt.is_string(kind) else b"y")
    if pt.is_fixed_size_binary(kind):
        return _encode_bytes(array.cast(pa.binary()), b"y")
    if pt.is_list(kind) or pt.is_fixed_size_list(kind):
        return _encode_list(array)
    if pt.is_struct(kind):
        return _encode_struct(array)
    if pt.is_map(kind) or pt.is_decimal(kind) or pt.is_interval(kind):
        return _encode_python(array)
    for test, words in _TAGGED:
        if test(kind):
            tags, values = words(array)
            return _encode_words(array, tags, values)
    raise TypeError(kind)


def _encode_bytes(array: pa.Array, tag: bytes) -> _Cells:
    _, offset_buffer, data_buffer = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[array.offset : array.offset + len(array) + 1].tolist()
    data = memoryview(data_buffer) if data_buffer is not None else memoryview(b"")
    if array.null_count:
        valid = array.is_valid().to_pylist()
        spans = zip(offsets, offsets[1:], valid, strict=False)
        return _Pieces([_PREFIX(tag, e - s) + data[s:e] if ok else _NULL for s, e, ok in spans])
    return _Pieces([_PREFIX(tag, e - s) + data[s:e] for s, e in pairwise(offsets)])


def _encode_words(array: pa.Array, tags: npt.NDArray[np.uint8], values: npt.NDArray[np.int64]) -> _Cells:
    """A tag a row and one or more 64-bit words a row (shape (n, w)), little-endian."""
    values = values.reshape(len(array), -1)
    width = 1 + 8 * values.shape[1]
    cells = np.empty((len(array), width), np.uint8)
    cells[:, 0] = tags
    cells[:, 1:] = np.ascontiguousarray(values, "<i8").view(np.uint8).reshape(len(array), width - 1)
    if not array.null_count:
        return _Words(cells.tobytes(), np.arange(len(array) + 1, dtype=np.int64) * width)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    cells[~valid, 0] = 0
    keep = np.repeat(valid[:, None], width, axis=1)
    keep[:, 0] = True
    offsets = np.zeros(len(array) + 1, np.int64)
    np.cumsum(np.where(valid, width, 1), out=offsets[1:])
    return _Words(cells[keep].tobytes(), offsets)


_Tagged = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


def _tags(array: pa.Array, tag: bytes) -> npt.NDArray[np.uint8]:
    return np.full(len(array), tag[0], np.uint8)


def _integers(array: pa.Array) -> _Tagged:
    if array.type == pa.uint64():
        words: npt.NDArray[np.int64] = pc.fill_null(array, 0).to_numpy().view(np.int64)
        return np.where(words < 0, ord("u"), ord("i")).astype(np.uint8), words
    return _tags(array, b"i"), pc.fill_null(array, 0).cast(pa.int64()).to_numpy()


def _floats(array: pa.Array) -> _Tagged:
    values = pc.fill_null(array, 0).cast(pa.float64()).to_numpy() + 0.0  # -0.0 becomes 0.0
    values = np.where(np.isnan(values), np.nan, values)  # one NaN
    return _tags(array, b"f"), values.view(np.int64)


def _booleans(array: pa.Array) -> _Tagged:
    return _tags(array, b"b"), pc.fill_null(array, False).cast(pa.int64()).to_numpy()


def _dates(array: pa.Array) -> _Tagged:
    days = array.cast(pa.date32()).cast(pa.int32()).cast(pa.int64())
    return _tags(array, b"D"), pc.fill_null(days, 0).to_numpy()


def _instants(array: pa.Array) -> _Tagged:
    tag = b"d" if pt.is_duration(array.type) else b"t" if array.type.tz is None else b"T"
    return _tags(array, tag), _seconds_and_ns(pc.fill_null(array.cast(pa.int64()), 0).to_numpy(), array.type.unit)


def _times(array: pa.Array) -> _Tagged:
    ints = array.cast(pa.int32() if array.type.bit_width == 32 else pa.int64()).cast(pa.int64())
    return _tags(array, b"M"), _seconds_and_ns(pc.fill_null(ints, 0).to_numpy(), array.type.unit)


def _seconds_and_ns(values: npt.NDArray[np.int64], unit: str) -> npt.NDArray[np.int64]:
    ns = _UNIT_NS[unit]
    seconds, rest = np.divmod(values, 10**9 // ns)
    return np.stack([seconds, rest * ns], axis=1)


_TAGGED: Final[tuple[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], _Tagged]], ...]] = (
    (pt.is_integer, _integers),
    (pt.is_floating, _floats),
    (pt.is_boolean, _booleans),
    (pt.is_date, _dates),
    (pt.is_timestamp, _instants),
    (pt.is_duration, _instants),
    (pt.is_time, _times),
)


def _encode_list(array: pa.Array) -> _Cells:
    lengths = pc.fill_null(pc.list_value_length(array), 0).cast(pa.int64()).to_numpy()
    data, offsets = _encode(array.flatten()).flat()  # leaves out what lies under nulls
    ends = np.zeros(len(array) + 1, np.int64)
    np.cumsum(lengths, out=ends[1:])
    spans = offsets[ends].tolist()
    valid = array.is_valid().to_pylist()
    view = memoryview(data)
    counts = lengths.tolist()
    return _Pieces(
        [
            _PREFIX(b"l", n) + view[s:e] if ok else _NULL
            for n, s, e, ok in zip(counts, spans, spans[1:], valid, strict=False)
        ]
    )


def _encode_struct(array: pa.Array) -> _Cells:
    children = [_encode(child).cells() for child in array.flatten()]
    prefix = _PREFIX(b"r", len(children))
    valid = array.is_valid().to_pylist()
    if not children:
        return _Pieces([prefix if ok else _NULL for ok in valid])
    rows = zip(valid, *children, strict=True)
    return _Pieces([b"".join((prefix, *cells)) if ok else _NULL for ok, *cells in rows])


def _encode_python(array: pa.Array) -> _Cells:
    """Types too rare to be worth their own path."""
    return _Pieces([_NULL if value is None else _encode_value(value) for value in array.to_pylist()])


def _encode_value(value: object) -> bytes:
    if isinstance(value, Decimal):
        text = format(value, "f")
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return _text(b"n", "0" if text in {"-0", ""} else text)
    if isinstance(value, list):  # a map: its pairs, in order
        pairs = [_encode(pa.array([part])).flat()[0] for pair in value for part in pair]
        return _PREFIX(b"m", len(value)) + b"".join(pairs)
    return _text(b"v", repr(value))


def _text(tag: bytes, text: str) -> bytes:
    data = text.encode()
    return _PREFIX(tag, len(data)) + data
