"""mosaicml-streaming: MDS shards of 64 MB in place, ``StreamingDataset`` and ``StreamingDataLoader``.

Shuffled by its default algorithm, ``py1e``, whose spans of 262,144 rows hold all of what is measured here. Rows are
bytes, the encoding that costs nothing to decode; the kind is a second column. The variant ``ahead`` lets its threads
prepare the whole epoch instead of 8 batches: all shards are here, and threads that sleep and wake cost it much.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from bench.feed.batches import Batch, Output
from bench.feed.entry import SEED, Job, enter
from bench.feed.rows import BATCH_ROWS, pieces
from bench.mosaic import streaming


def prepare(job: Job) -> None:
    columns = {"payload": "bytes"} if job.workload != "mix" else {"kind": "uint8", "payload": "bytes"}
    with streaming.MDSWriter(out=str(job.data), columns=columns, size_limit=64_000_000) as writer:
        for piece in pieces(job.workload, job.rows):
            for kind, row in piece.each():
                values = {"kind": np.uint8(kind), "payload": bytes(row)}
                writer.write({name: values[name] for name in columns})


class Loader:
    def __init__(self, job: Job) -> None:
        self._out = Output(job.workload)
        self._mix = job.workload == "mix"
        streaming.base.util.clean_stale_shared_memory()
        rows = streaming.StreamingDataset(
            local=str(job.data),
            shuffle=True,
            shuffle_seed=SEED,
            batch_size=BATCH_ROWS,
            predownload=job.rows if job.variant == "ahead" else None,
        )
        self._batches = streaming.StreamingDataLoader(
            rows, batch_size=BATCH_ROWS, collate_fn=self._collate, **job.processes
        )
        self.state, self.load = self._batches.state_dict, self._batches.load_state_dict

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        kinds = [row["kind"] for row in rows] if self._mix else None
        # A dictionary whose first value has one item a row: that is how the loader counts what it gave.
        return {"rows": rows, "batch": self._out.rows([row["payload"] for row in rows], kinds)}

    def epoch(self) -> Iterator[Batch]:
        return (batch["batch"] for batch in self._batches)


if __name__ == "__main__":
    enter(prepare, Loader, versions=f"mosaicml-streaming {streaming.__version__}")
