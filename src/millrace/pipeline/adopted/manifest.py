"""The manifest of an adopted dataset: drawn up as files are indexed, then replicated like any other.

Its shards lie where they were found; only what names them is written. A segment has fewer shards than a pipeline's,
since its replica page must hold the path of each of them and still fit into one value of the coordination store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from millrace.core.facts import ReplicaEntry, ReplicaPage
from millrace.core.keys import manifest_key, segment_key
from millrace.core.manifest import Encoding, SegmentRef, encode_root, encode_segment
from millrace.core.model import Digest, Shard, digest_of
from millrace.pipeline.adopted.schemas import CommonSchema
from millrace.pipeline.distribute import Blob, Distributor
from millrace.pipeline.persist import Persisted

__all__ = ["SEGMENT_FILES", "Draft"]

SEGMENT_FILES: Final = 512
"""Paths of up to 1,024 bytes: half of the 1 MiB that a value may have."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """A segment that is drawn up: its reference and its two objects."""

    ref: SegmentRef
    shards: bytes
    blocks: bytes


class Draft:
    """A manifest in the making. Takes about 60 bytes a block and 200 a file.

    Args:
        encoding: Of the files.
        store: The name of the adopted store they lie in.

    Attributes:
        rows, bytes, files, blocks: So far.
        largest_block_bytes: The longest block so far.
    """

    def __init__(self, encoding: Encoding, store: str) -> None:
        self.rows = self.bytes = self.files = self.blocks = self.largest_block_bytes = 0
        self._encoding: Encoding = encoding
        self._store = store
        self._schema = CommonSchema(encoding)
        self._block_rows = 1
        self._pending: list[Shard] = []
        self._entries: list[ReplicaEntry] = []
        self._segments: list[_Segment] = []
        self._pages: list[ReplicaPage] = []

    def add(self, path: str, shard: Shard, schema: pa.Schema, *, at_ms: int) -> None:
        """The next file, in order.

        Args:
            path: In the adopted store.
            shard: What it is.
            schema: Of its rows.
            at_ms: When it was read whole.

        Raises:
            SourceError: it has another schema than those before; names it and the column.
        """
        self._schema.add(path, schema)
        self.rows += shard.rows
        self.bytes += shard.size_bytes
        self.files += 1
        self.blocks += sum(b.rows > 0 for b in shard.blocks)
        self.largest_block_bytes = max(self.largest_block_bytes, *(b.length_bytes for b in shard.blocks), 0)
        self._block_rows = max(self._block_rows, *(b.rows for b in shard.blocks), 1)
        self._pending.append(shard)
        stores = {self._store: at_ms}
        self._entries.append(ReplicaEntry(digest=shard.digest, key=path, size_bytes=shard.size_bytes, stores=stores))
        if len(self._pending) == SEGMENT_FILES:
            self._close_segment()

    @property
    def schema(self) -> pa.Schema:
        """Of all files."""
        return self._schema.schema

    async def persist(self, distributor: Distributor) -> Persisted:
        """Replicate the manifest's objects, the root last; each is read back.

        Raises:
            StoreError: they can't be made durable where policy wants them.
        """
        if self._pending:
            self._close_segment()
        meta: list[ReplicaEntry] = []
        for segment in self._segments:
            for digest, data in ((segment.ref.digest, segment.shards), (segment.ref.blocks, segment.blocks)):
                meta.append(await _replicate(distributor, digest, segment_key(digest), data))
        refs = [segment.ref for segment in self._segments]
        root = encode_root(self.schema, self._block_rows, refs, encoding=self._encoding)
        digest = digest_of(root)
        meta.append(await _replicate(distributor, digest, manifest_key(digest), root))
        return Persisted(
            manifest=digest,
            rows=self.rows,
            bytes=self.bytes,
            shards=self.files,
            pages=tuple(self._pages),
            meta=ReplicaPage(entries=tuple(meta)),
        )

    def _close_segment(self) -> None:
        shards, blocks = encode_segment(self._pending)
        ref = SegmentRef(
            digest=digest_of(shards),
            size_bytes=len(shards),
            blocks=digest_of(blocks),
            blocks_size_bytes=len(blocks),
            shards=len(self._pending),
            rows=sum(s.rows for s in self._pending),
            bytes=sum(s.size_bytes for s in self._pending),
        )
        self._segments.append(_Segment(ref, shards, blocks))
        self._pages.append(ReplicaPage(entries=tuple(self._entries)))
        self._pending, self._entries = [], []


async def _replicate(distributor: Distributor, digest: Digest, key: str, data: bytes) -> ReplicaEntry:
    receipts = await distributor.distribute(Blob(digest, key, len(data), [data]))
    stores = {receipt.store: receipt.verified_at_ms for receipt in receipts}
    return ReplicaEntry(digest=digest, key=key, size_bytes=len(data), stores=stores)
