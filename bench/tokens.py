"""Rows of tokens in Parquet: how they are made, and how contestants get at them.

A row is 2,048 uint16 tokens, 4,096 bytes. Two layouts, each in one column named ``tokens``:

- ``binary``: the bytes of a row as one value;
- ``list``: a list of uint16, as ``pyarrow`` writes it with its default settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from bench.digests import Tally

__all__ = [
    "COLUMN",
    "LAYOUTS",
    "ROW_BYTES",
    "ROW_TOKENS",
    "add_column",
    "column_bytes",
    "columns",
    "make_rows",
    "matrix",
    "rows",
]

COLUMN = "tokens"
LAYOUTS = ("binary", "list")
ROW_TOKENS = 2048
ROW_BYTES = 2 * ROW_TOKENS
VOCABULARY = 50_257
FILE_ROWS = 20_000
BATCH_ROWS = 1024

Matrix = npt.NDArray[np.uint16]


def make_rows(folder: Path, layout: str, count: int) -> Tally:
    """Write ``count`` rows as Parquet files of 20,000 (82 MB), or find them there; gives their tally.

    Tokens are uniform random numbers below 50,257 from a fixed seed, so that no compression pretends to be speed.
    """
    note = folder / "tally.json"
    inputs = folder / "rows"
    if note.exists():
        size, total = json.loads(note.read_text())
        return Tally(size, int(total, 16))
    inputs.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20_48)
    tally = Tally()
    for i, first in enumerate(range(0, count, FILE_ROWS)):
        size = min(FILE_ROWS, count - first)
        tokens = rng.integers(0, VOCABULARY, (size, ROW_TOKENS), dtype=np.uint16)
        tally.add_rows(tokens.data.cast("B"), ROW_BYTES)
        pq.write_table(pa.table({COLUMN: _array(tokens, layout)}), inputs / f"part-{i:05}.parquet")
    note.write_text(json.dumps(tally.plain()))
    return tally


def _array(tokens: Matrix, layout: str) -> pa.Array:
    size = len(tokens)
    if layout == "binary":
        offsets = np.arange(size + 1, dtype=np.int32) * ROW_BYTES
        return pa.BinaryArray.from_buffers(
            pa.binary(), size, [None, pa.py_buffer(offsets), pa.py_buffer(tokens.reshape(-1))]
        )
    offsets = np.arange(size + 1, dtype=np.int32) * ROW_TOKENS
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens.reshape(-1)))


def columns(path: Path, batch_rows: int = BATCH_ROWS) -> Iterator[pa.Array]:
    """The column of one file, in batches: the fastest way pyarrow has in bounded memory."""
    with pq.ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(batch_rows, columns=[COLUMN]):
            yield batch.column(0)


def column_bytes(column: pa.Array) -> memoryview:
    """All rows of a column end to end, without a copy."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        width = np.int64 if pa.types.is_large_binary(kind) else np.int32
        ends = np.frombuffer(column.buffers()[1], width)[column.offset : column.offset + len(column) + 1]
        return memoryview(column.buffers()[2])[int(ends[0]) : int(ends[-1])]
    if pa.types.is_fixed_size_binary(kind):
        start = column.offset * kind.byte_width
        return memoryview(column.buffers()[1])[start : start + len(column) * kind.byte_width]
    values: Any = column.flatten().to_numpy()
    if values.dtype != np.uint16:
        raise ValueError(f"the column holds {kind}, not lists of uint16")
    return memoryview(values).cast("B")


def matrix(column: pa.Array) -> Matrix:
    """A column as uint16 of shape (rows, 2048), without a copy."""
    return np.frombuffer(column_bytes(column), np.uint16).reshape(len(column), ROW_TOKENS)


def rows(path: Path, layout: str) -> Iterator[Any]:
    """The rows of one file one by one, as tools that take one at a time want them: bytes, or an array of uint16."""
    for column in columns(path):
        if layout == "binary":
            yield from column.to_pylist()
        else:
            yield from matrix(column)


def add_column(tally: Tally, column: pa.Array) -> None:
    """Count a column's rows."""
    if len(column):
        tally.add_rows(column_bytes(column), ROW_BYTES)
