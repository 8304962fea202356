"""The outputs of tasks as objects in the work store: bulk facts lie there, only their digests in the ledger."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict

from millrace.core.errors import Corrupt
from millrace.core.keys import task_output
from millrace.core.model import Block, ChunkOutput, Digest, Quarantined, Receipt, Shard, digest_of
from millrace.core.ports import Store

__all__ = ["decode_chunk_output", "encode_chunk_output", "load_output", "save_output"]


def encode_chunk_output(output: ChunkOutput) -> bytes:
    """JSON; a 64 MB shard takes about 2 KB."""
    return json.dumps(
        {
            "chunk": output.chunk,
            "schema": base64.b64encode(output.schema).decode(),
            "shards": [
                [s.digest, s.size_bytes, s.rows, [[b.offset, b.length_bytes, b.rows, b.digest] for b in s.blocks]]
                for s in output.shards
            ],
            "receipts": [[r.digest, r.store, r.verified_at_ms] for r in output.receipts],
            "rows_in": output.rows_in,
            "bytes_in": output.bytes_in,
            "duplicates": output.duplicates,
            "quarantined": output.quarantined,
            "quarantine": [asdict(q) for q in output.quarantine],
        },
        separators=(",", ":"),
    ).encode()


def decode_chunk_output(data: bytes | memoryview) -> ChunkOutput:
    """The facts in an output object.

    Raises:
        Corrupt: it isn't one.
    """
    try:
        raw = json.loads(bytes(data))
        shards = tuple(
            Shard(Digest(digest), size, rows, tuple(Block(o, n, r, Digest(d)) for o, n, r, d in blocks))
            for digest, size, rows, blocks in raw["shards"]
        )
        return ChunkOutput(
            chunk=raw["chunk"],
            schema=base64.b64decode(raw["schema"], validate=True),
            shards=shards,
            receipts=tuple(Receipt(Digest(d), store, at) for d, store, at in raw["receipts"]),
            rows_in=raw["rows_in"],
            bytes_in=raw["bytes_in"],
            duplicates=raw["duplicates"],
            quarantined=raw["quarantined"],
            quarantine=tuple(Quarantined(**q) for q in raw["quarantine"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Corrupt(f"this is not a chunk's output: {error}") from error


async def save_output(work: Store, run: int, phase: str, data: bytes | memoryview) -> Digest:
    """Keep a task's output, durably, under its digest."""
    digest = digest_of(data)
    await work.put(task_output(run, phase, digest), [data])
    return digest


async def load_output(work: Store, run: int, phase: str, digest: Digest) -> memoryview:
    """A task's output, verified.

    Raises:
        Corrupt: the scratch object is damaged; names it and says what to do.
    """
    key = task_output(run, phase, digest)
    data = await work.get(key)
    if digest_of(data) != digest:
        raise Corrupt(
            f"{key} in {work.url} is damaged; start a new run with --fresh, shards already made are used again",
            store=work.url,
            key=key,
        )
    return data
