"""Hugging Face ``datasets``: Arrow files of 64 MB, mapped.

Variants: ``map`` asks the data set for 32 row numbers at once, in its ``arrow`` format, through torch's
``DataLoader``. ``iterable`` shuffles its 64 shards and a buffer of 5,000 rows, which come one by one, also as Arrow,
the fastest of its formats here. ``combine_chunks`` copies rows into one contiguous column, which is not copied again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets  # type: ignore[import-not-found,unused-ignore]
import numpy as np
import pyarrow as pa
import torch
from datasets.arrow_writer import ArrowWriter  # type: ignore[import-not-found,unused-ignore]
from torch.utils.data import DataLoader

from bench.feed.batches import Batch, wrapped
from bench.feed.entry import SEED, Job, enter
from bench.feed.permuted import Permuted
from bench.feed.rows import BATCH_ROWS, ROW_TOKENS, Rows, pieces

_BUFFER_ROWS = 5000
_SHARDS = 64
_FILE_BYTES = 64_000_000


def _table(piece: Rows, features: Any) -> pa.Table:
    if "tokens" in features:
        rows = pa.FixedSizeListArray.from_arrays(pa.array(piece.tokens().reshape(-1)), ROW_TOKENS)
        return pa.table({"tokens": rows}, schema=features.arrow_schema)
    offsets = pa.py_buffer(piece.offsets.astype(np.int32))
    rows = pa.BinaryArray.from_buffers(pa.binary(), len(piece), [None, offsets, pa.py_buffer(piece.values)])
    columns = {"payload": rows} if piece.kinds is None else {"kind": pa.array(piece.kinds), "payload": rows}
    return pa.table(columns, schema=features.arrow_schema)


def prepare(job: Job) -> None:
    types = {
        "tokens": {"tokens": datasets.List(datasets.Value("uint16"), length=ROW_TOKENS)},
        "blobs": {"payload": datasets.Value("binary")},
        "mix": {"kind": datasets.Value("uint8"), "payload": datasets.Value("binary")},
    }
    features = datasets.Features(types[job.workload])
    writer: Any = None
    size = files = 0
    for piece in pieces(job.workload, job.rows):
        if writer is None:
            writer = ArrowWriter(path=str(job.data / f"data-{files:05}.arrow"), features=features)
        writer.write_table(_table(piece, features))
        size += piece.values.nbytes
        if size >= _FILE_BYTES:
            writer.finalize()
            writer, size, files = None, 0, files + 1
    if writer is not None:
        writer.finalize()


class Loader:
    def __init__(self, job: Job) -> None:
        parts = [datasets.Dataset.from_file(str(path)) for path in job.files("*.arrow")]
        rows = datasets.concatenate_datasets(parts).with_format("arrow")
        order: Any = None
        if job.variant == "map":
            order = Permuted(job.rows, lists=True)
            self.state, self.load = order.state, order.load
        else:
            rows = rows.to_iterable_dataset(num_shards=_SHARDS).shuffle(seed=SEED, buffer_size=_BUFFER_ROWS)
            self.state, self.load = rows.state_dict, rows.load_state_dict
        self._rows = rows
        self._epochs = 0
        size, collate = (None, _batch) if job.variant == "map" else (BATCH_ROWS, _joined)
        self._batches = DataLoader(rows, size, sampler=order, collate_fn=collate, **job.processes)

    def epoch(self) -> Iterator[Batch]:
        if isinstance(self._rows, datasets.IterableDataset):
            self._rows.set_epoch(self._epochs)
            self._epochs += 1
        return iter(self._batches)


def _joined(rows: list[pa.Table]) -> Batch:
    return _batch(pa.concat_tables(rows))


def _batch(table: pa.Table) -> Batch:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}  # the one copy
    if "tokens" in columns:
        return Batch(wrapped(columns["tokens"].flatten().to_numpy()).view(-1, ROW_TOKENS))
    column = columns["payload"]
    ends = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    offsets = torch.from_numpy((ends - ends[0]).astype(np.int64))
    values = np.frombuffer(column.buffers()[2], np.uint8)[ends[0] : ends[-1]]
    return Batch(wrapped(values), offsets, wrapped(columns["kind"].to_numpy()) if "kind" in columns else None)


if __name__ == "__main__":
    datasets.disable_progress_bars()
    enter(prepare, Loader, versions=f"datasets {datasets.__version__}")
