"""Listing a source: which objects it has, in one order, as columns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from millrace.core.errors import AccessDenied, NotFound, SourceError, UsageError
from millrace.core.model import SourceObject
from millrace.core.ports import ObjectInfo, Store
from millrace.core.spec import Source
from millrace.pipeline.globs import PathFilter, path_filter

__all__ = ["Listing", "ListingProgress", "list_source"]

ListingProgress = Callable[[int], None]
"""Told how many objects of a source have been seen so far."""

_SCHEMA = pa.schema([("path", pa.large_string()), ("size", pa.int64()), ("version", pa.large_string())])
_PAGE_OBJECTS = 65_536


class Listing(Sequence[SourceObject]):
    """The objects of one source, sorted by the bytes of their paths. About 100 bytes each.

    Attributes:
        table: ``path``, ``size`` and ``version``, one row an object, in one piece.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.take(pc.sort_indices(table["path"])).combine_chunks()
        self._paths, self._sizes, self._versions = (_whole(self.table[name]) for name in _SCHEMA.names)

    @classmethod
    def of(cls, objects: Iterable[SourceObject]) -> Listing:
        """A listing of these objects, in whatever order they come."""
        objects = list(objects)
        columns = ([o.path for o in objects], [o.size_bytes for o in objects], [o.version for o in objects])
        return cls(pa.table(list(columns), schema=_SCHEMA))

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each object."""
        sizes: npt.NDArray[np.int64] = self._sizes.to_numpy()
        return sizes

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> SourceObject: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceObject]: ...

    def __getitem__(self, index: int | slice) -> SourceObject | Sequence[SourceObject]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return SourceObject(self._paths[index].as_py(), self._sizes[index].as_py(), self._versions[index].as_py())


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays([*column.chunks, pa.array([], column.type)])


async def list_source(store: Store, source: Source, *, progress: ListingProgress | None = None) -> Listing:
    """List a source's objects and keep those its globs want.

    Args:
        store: Opened at the source's URL, so that its keys are the paths.
        source: What to keep. Nothing else is filtered: dot files and empty ones are objects too.
        progress: Called after each page.

    Raises:
        UsageError: nothing is left to read, or a glob makes no sense.
        SourceError: the source can't be listed, or a name is not UTF-8.
        StoreError: the store failed.
    """
    wanted = path_filter(source)
    seen = 0
    counts = {"include": 0, "exclude": 0}
    pages: list[pa.Table] = []
    rows: list[ObjectInfo] = []
    try:
        async for page in _pages(store):
            seen += len(page)
            rows.extend(_kept(page, wanted, counts))
            if len(rows) >= _PAGE_OBJECTS:
                pages.append(_columns(rows, source))
                rows = []
            if progress is not None:
                progress(seen)
    except NotFound as error:
        raise UsageError(f"{source.url} can't be read: {error}") from error
    except AccessDenied as error:
        raise SourceError(f"{source.url} can't be listed: {error}") from error
    pages.append(_columns(rows, source))
    table = pa.concat_tables(pages)
    if table.num_rows == 0:
        raise UsageError(_nothing(source, seen, counts))
    return Listing(table)


def _pages(store: Store) -> AsyncIterator[Sequence[ObjectInfo]]:
    return store.list("")


def _kept(page: Sequence[ObjectInfo], wanted: PathFilter, counts: dict[str, int]) -> list[ObjectInfo]:
    included = [info for info in page if wanted.includes(info.key)]
    kept = [info for info in included if not wanted.excludes(info.key)]
    counts["include"] += len(page) - len(included)
    counts["exclude"] += len(included) - len(kept)
    return kept


def _columns(rows: Sequence[ObjectInfo], source: Source) -> pa.Table:
    try:
        paths = pa.array([info.key for info in rows], pa.large_string())
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{source.url} holds {str(error.object)!a}, a name that is not UTF-8; rename it or exclude it"
        ) from None
    sizes = pa.array([info.size_bytes for info in rows], pa.int64())
    versions = pa.array([info.version for info in rows], pa.large_string())
    return pa.table([paths, sizes, versions], schema=_SCHEMA)


def _nothing(source: Source, seen: int, counts: dict[str, int]) -> str:
    if seen == 0:
        return f"{source.url} has no objects: there is nothing to read; check the url"
    reasons = []
    if counts["include"]:
        reasons.append(f"{counts['include']} match no include ({', '.join(map(repr, source.include))})")
    if counts["exclude"]:
        reasons.append(f"{counts['exclude']} match an exclude ({', '.join(map(repr, source.exclude))})")
    noun = "object" if seen == 1 else "objects"
    return f"{source.url} leaves nothing to read: of {seen} {noun} seen, {' and '.join(reasons)}; check the globs"
