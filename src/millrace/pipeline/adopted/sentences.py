"""What is said of files that can't be adopted: the file, the reason, the way out."""

from __future__ import annotations

import pyarrow as pa

from millrace.core.errors import SourceChanged, SourceError
from millrace.core.model import SourceObject
from millrace.pipeline.adopted.scan import BLOCK_BYTES_MAX

__all__ = ["changed", "not_adoptable", "require_rows", "too_long"]


def not_adoptable(obj: SourceObject, why: str, *, way_out: str = "write it again or exclude it") -> SourceError:
    """A file that can't be read in place as it is."""
    return SourceError(f"{obj.path} {why}; {way_out}")


def changed(path: str) -> SourceChanged:
    """A file that was written to meanwhile."""
    return SourceChanged(
        f"{path} changed or disappeared while it was being adopted; wait until nobody writes there, then adopt again"
    )


def too_long(obj: SourceObject, what: str, size_bytes: int) -> SourceError:
    """A block that no record batch can hold."""
    return SourceError(
        f"{obj.path}: {what} has {size_bytes} bytes, over the {BLOCK_BYTES_MAX} one block may have; write smaller ones"
    )


def require_rows(batch: pa.RecordBatch, rows: int, schema: pa.Schema) -> pa.RecordBatch:
    """The batch, if it has so many rows and this schema.

    Raises:
        ValueError: it doesn't.
    """
    if batch.num_rows != rows:
        raise ValueError(f"it has {batch.num_rows} rows, not {rows}")
    if not batch.schema.equals(schema):
        raise ValueError("its columns are others than the dataset's")
    return batch
