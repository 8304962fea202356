"""One block of an adopted dataset, from its verified bytes to rows; and one file, from its bytes to blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import pyarrow as pa

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.manifest import Encoding
from millrace.core.model import Shard, SourceObject
from millrace.pipeline.adopted.arrow import decode_arrow, index_arrow
from millrace.pipeline.adopted.mds import decode_mds, index_mds
from millrace.pipeline.adopted.parquet import decode_parquet, index_parquet
from millrace.pipeline.adopted.scan import FileIndex, Subject
from millrace.pipeline.adopted.sentences import changed, not_adoptable
from millrace.pipeline.adopted.webdataset import decode_webdataset, index_webdataset
from millrace.pipeline.formats.ranged import HOLD_BYTES
from millrace.pipeline.records import Reads

__all__ = ["WHAT", "decode_block", "index_file"]

WHAT: Final[Mapping[Encoding, str]] = {
    "arrow": "an Arrow record batch",
    "parquet": "a Parquet row group",
    "webdataset": "samples of a tar",
    "mds": "MDS samples",
}

_Decode = Callable[[pa.Schema, memoryview | None, memoryview, int, int], pa.RecordBatch]
_DECODERS: Final[Mapping[Encoding, _Decode]] = {
    "arrow": decode_arrow,
    "parquet": decode_parquet,
    "webdataset": decode_webdataset,
    "mds": decode_mds,
}
_INDEXERS: Final[Mapping[Encoding, Callable[[Subject], FileIndex]]] = {
    "arrow": index_arrow,
    "parquet": index_parquet,
    "webdataset": index_webdataset,
    "mds": index_mds,
}


def decode_block(
    encoding: Encoding,
    schema: pa.Schema,
    aux: memoryview | None,
    data: memoryview,
    *,
    offset: int,
    rows: int,
) -> pa.RecordBatch:
    """The rows of one block. A pure function; may be called from any thread.

    Args:
        encoding: The manifest's.
        schema: The manifest's: the batch has exactly this one.
        aux: The bytes of the shard's block of no rows; None where it has none.
        data: The block's bytes. They must stay as they are while the batch is used: it may hold views of them.
        offset: Where the block begins in its shard.
        rows: How many it must have.

    Raises:
        SourceError: the bytes can't be decoded; names the offset and the reason. That they are those of the digest is
            the caller's to know; then the file was written so.
    """
    try:
        return _DECODERS[encoding](schema, aux, data, offset, rows)
    except (pa.ArrowException, SourceError, ValueError, OSError, KeyError) as err:
        why = (str(err).strip().splitlines() or [type(err).__name__])[0].rstrip(".")[:300]
        raise SourceError(f"the block at byte {offset} can't be read as {WHAT[encoding]}: {why}") from err


def index_file(
    encoding: Encoding,
    reads: Reads,
    obj: SourceObject,
    *,
    check: bool,
    told: Callable[[int], None],
    hold_bytes: int = HOLD_BYTES,
) -> tuple[Shard, pa.Schema]:
    """Hash a file and cut it into blocks. Waits for reads; holds up to 64 MB, or the largest block.

    Args:
        encoding: What it should be.
        reads: Blocking reads.
        obj: The file.
        check: Decode each block once, so that a block that can't be read is known now.
        told: Called with the number of bytes that were hashed since the last call.
        hold_bytes: Files of at most this are read once, whole.

    Returns:
        The file as a shard, and the schema of its rows. A tar's schema has the extensions that are in it.

    Raises:
        SourceChanged: it changed meanwhile.
        SourceError: it is not what it should be; names it.
    """
    if obj.size_bytes == 0:
        raise not_adoptable(obj, "is empty", way_out="remove or exclude it")
    try:
        subject = Subject(reads, obj, check=check, told=told, hold_bytes=hold_bytes)
        found = _INDEXERS[encoding](subject)
        digest = subject.scan.finish()
    except SourceChanged as err:
        raise changed(obj.path) from err
    return Shard(digest, obj.size_bytes, sum(b.rows for b in found.blocks), found.blocks), found.schema
