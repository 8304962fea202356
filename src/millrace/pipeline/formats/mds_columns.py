"""The encodings of MDS columns: from a config and raw bytes to Arrow arrays.

Layouts as in ``streaming/base/format/mds/encodings.py`` of mosaicml-streaming 0.13. All numbers are little-endian.

=====================  ==========================================================================
encoding               column
=====================  ==========================================================================
str                    string
str_int, _float,       string, the digits as they were written (they may have any precision)
str_decimal
bytes                  binary
int, intN, uintN,      the number
floatN
json                   string, the value with sorted keys and without spaces
ndarray:T:shape        fixed-size list of T, nested for two and more dimensions
ndarray:T, ndarray     list of T, nested as deep as the first sample; others are rejected
jpeg, png, pil, ...    binary, the encoded image; never decoded
pkl                    refused: reading a pickle runs whatever code it names
=====================  ==========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["MdsColumn", "NotDecodable", "gather_sizes", "parse_column"]

_SCALARS: Final = {
    "int": np.dtype("<i8"),
    **{f"{k}int{bits}": np.dtype(f"<{k or 'i'}{bits // 8}") for k in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
_ARRAY_CODES: Final = {
    8: "uint8",
    9: "int8",
    16: "uint16",
    17: "int16",
    18: "float16",
    32: "uint32",
    33: "int32",
    34: "float32",
    64: "uint64",
    65: "int64",
    66: "float64",
}
_TEXT: Final = ("str", "str_int", "str_float", "str_decimal")
_RAW: Final = ("bytes", "jpeg", "png", "pil", "jpeg_array", "jpegarray", "list[pil]", "list[jpeg]", "list[png]")


class NotDecodable(ValueError):
    """One value isn't what its encoding says."""


@dataclass(frozen=True, slots=True)
class MdsColumn:
    """One column of a shard.

    Attributes:
        name: As in the config.
        encoding: As in the config.
        size: Bytes of every value, or None where each sample says.
        dtype: Of numbers; None for other columns, and for an array that names its own.
        shape: Of arrays, where it is fixed.
    """

    name: str
    encoding: str
    size: int | None
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] | None = None

    @property
    def is_array(self) -> bool:
        """Whether it holds NumPy arrays."""
        return self.encoding.split(":")[0] == "ndarray"

    @property
    def is_open(self) -> bool:
        """Whether the type isn't known before a sample has been seen."""
        return self.is_array and self.shape is None

    def type_of(self, first: memoryview | None = None) -> pa.DataType:
        """The Arrow type; ``first`` is a sample's value, needed where the type is open.

        Raises:
            NotDecodable: the value isn't an array.
        """
        if self.encoding in _TEXT or self.encoding == "json":
            return pa.string()
        if self.encoding in _RAW:
            return pa.binary()
        if not self.is_open:
            assert self.dtype is not None
            kind = pa.from_numpy_dtype(self.dtype)
            for length in reversed(self.shape or ()):
                kind = pa.list_(kind, length)
            return kind
        dtype, shape, _ = self._array_head(memoryview(b"") if first is None else first)
        kind = pa.from_numpy_dtype(dtype)
        for _ in shape:
            kind = pa.list_(kind)
        return kind

    def decode(
        self, data: memoryview, begin: npt.NDArray[np.int64], length: npt.NDArray[np.int64], kind: pa.DataType
    ) -> tuple[pa.Array, dict[int, str]]:
        """The values at ``data[begin : begin + length]`` as an array of ``kind``.

        Returns:
            The array, and by row what is wrong with values that can't be decoded (they are null or empty in it).
        """
        if self.dtype is not None and self.shape == ():
            raw = np.frombuffer(data, np.uint8)[begin[:, None] + np.arange(self.dtype.itemsize, dtype=np.int64)]
            return pa.Array.from_buffers(kind, len(begin), [None, pa.py_buffer(raw)]), {}
        values = [data[b : b + n] for b, n in zip(begin.tolist(), length.tolist(), strict=True)]
        if self.is_open:
            return self._decode_open(values, kind)
        if self.encoding == "json":
            return _decode_json(values, kind)
        joined = pa.py_buffer(b"".join(values))
        if self.dtype is None:
            offsets = np.zeros(len(values) + 1, dtype=np.int32)
            np.cumsum(length, out=offsets[1:])
            return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(offsets), joined]), {}
        out = pa.Array.from_buffers(pa.from_numpy_dtype(self.dtype), joined.size // self.dtype.itemsize, [None, joined])
        for count in reversed(self.shape or ()):
            out = pa.FixedSizeListArray.from_arrays(out, count)
        return out, {}

    def _decode_open(self, values: Sequence[memoryview], kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
        bad: dict[int, str] = {}
        depth, inner = 0, kind
        while pa.types.is_list(inner):
            depth, inner = depth + 1, inner.value_type
        pieces: list[memoryview] = []
        lengths: list[list[int]] = [[] for _ in range(depth)]
        for row, value in enumerate(values):
            try:
                dtype, shape, data = self._array_head(value)
                if pa.from_numpy_dtype(dtype) != inner or len(shape) != depth:
                    raise NotDecodable(
                        f"is an array of {dtype} in {len(shape)} dimensions, the first is of {inner} in {depth}"
                    )
            except NotDecodable as err:
                bad[row] = str(err)
                shape, data = (0,) * depth, memoryview(b"")
            pieces.append(data)
            count = 1
            for level, size in enumerate(shape):
                lengths[level] += [size] * count
                count *= size
        data_all = pa.py_buffer(b"".join(pieces))
        out = pa.Array.from_buffers(inner, data_all.size // (inner.bit_width // 8), [None, data_all])
        for sizes in reversed(lengths):
            offsets = np.zeros(len(sizes) + 1, dtype=np.int32)
            np.cumsum(sizes, out=offsets[1:])
            out = pa.ListArray.from_arrays(pa.array(offsets), out)
        return out, bad

    def _array_head(self, value: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], memoryview]:
        """(dtype, shape, bytes) of a value laid out as ``[dtype] [ndim << 2 | log2 width] [shape] data``."""
        dtype, at = self.dtype, 0
        if dtype is None:
            name = _ARRAY_CODES.get(value[0]) if len(value) else None
            if name is None:
                raise NotDecodable("is no array: its type code is unknown")
            dtype, at = np.dtype(name).newbyteorder("<"), 1
        if len(value) <= at:
            raise NotDecodable("is no array: it ends within its shape")
        ndim, width = value[at] >> 2, 1 << (value[at] & 3)
        data_at = at + 1 + ndim * width
        if ndim == 0 or len(value) < data_at:
            raise NotDecodable("is no array: it ends within its shape")
        shape = tuple(int(n) for n in np.frombuffer(value[at + 1 : data_at], dtype=f"<u{width}"))
        count = 1
        for length in shape:
            count *= length
        if count * dtype.itemsize != len(value) - data_at:
            raise NotDecodable(f"has {len(value) - data_at} bytes, not those of an array of {dtype} with shape {shape}")
        return dtype, shape, value[data_at:]


def parse_column(name: str, encoding: str, size: int | None) -> MdsColumn:
    """A column from a shard's config.

    Raises:
        ValueError: the encoding is unknown, or refused, or its size is not the one it must have; says which.
    """
    head, _, rest = encoding.partition(":")
    if encoding == "pkl":
        raise ValueError(
            f"column {name!r} is pickled, and reading a pickle runs whatever code it names; write it again as json, "
            "bytes or ndarray"
        )
    dtype: np.dtype[Any] | None = _SCALARS.get(encoding)
    shape: tuple[int, ...] | None = () if dtype is not None else None
    expected = dtype.itemsize if dtype is not None else None
    if head == "ndarray":
        dtype_name, _, dims = rest.partition(":")
        if dtype_name and dtype_name not in _ARRAY_CODES.values():
            raise ValueError(f"column {name!r} has the unknown encoding {encoding!r}")
        dtype = np.dtype(dtype_name).newbyteorder("<") if dtype_name else None
        if dims and dtype is not None:
            if not all(d.isdigit() and 0 < int(d) < 2**31 for d in dims.split(",")):
                raise ValueError(f"column {name!r} has the unknown encoding {encoding!r}")
            shape = tuple(int(d) for d in dims.split(","))
            expected = int(np.prod(shape, dtype=object)) * dtype.itemsize
    elif dtype is None and encoding != "json" and encoding not in _TEXT and encoding not in _RAW:
        raise ValueError(f"column {name!r} has the unknown encoding {encoding!r}")
    if size != expected:
        raise ValueError(f"column {name!r} ({encoding}) is said to have values of {size} bytes, not {expected}")
    return MdsColumn(name, encoding, size, dtype, shape)


def _decode_json(values: Sequence[memoryview], kind: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    texts: list[str | None] = []
    bad: dict[int, str] = {}
    for row, value in enumerate(values):
        try:
            texts.append(_canonical(bytes(value)))
        except ValueError as err:
            bad[row] = f"is not JSON: {err}"
            texts.append(None)
    return pa.array(texts, kind), bad


def _canonical(data: bytes) -> str:
    try:
        value = json.loads(data)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Lone surrogates, which JSON may spell with escapes and UTF-8 can't hold.
        text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text


def gather_sizes(data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """The ``count`` uint32 sizes at the head of each sample: int64 of shape (samples, count)."""
    where = starts[:, None] + np.arange(4 * count, dtype=np.int64)
    sizes: npt.NDArray[np.int64] = data[where].view("<u4").astype(np.int64)
    return sizes
