"""What all wrappers of a store share: every call goes through one method, :meth:`Layer.around`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from millrace.core.ports import Bytes, Capabilities, Content, ObjectInfo, RangeRequest, Store
from millrace.stores.keys import PutMode

__all__ = ["Layer", "Op", "close_pages"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Op:
    """One call of a store, as its wrappers see it.

    Attributes:
        name: The method: ``put``, ``get`` ... For a listing, each page is one call.
        key: The object, the prefix, or ``""``.
        known_bytes: Bytes sent, or asked for where the caller said how many.
        open_reads: How many reads are in it whose size nobody knows: whole objects, and ranges to the end.
    """

    name: str
    key: str = ""
    known_bytes: int = 0
    open_reads: int = 0


class Layer:
    """A store that passes every call on to ``inner``. Subclasses change :meth:`around`, and seldom more.

    Args:
        inner: The store wrapped. Closing the layer closes it.
        name: The store's name, for errors and metrics.
    """

    def __init__(self, inner: Store, *, name: str) -> None:
        self._inner = inner
        self._name = name

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Make one call. ``call`` may be made again, except for ``list``, where it gives the next page."""
        return await call()

    @property
    def url(self) -> str:
        """The wrapped store's."""
        return self._inner.url

    async def capabilities(self) -> Capabilities:
        """See :class:`millrace.core.ports.Store`."""
        return await self.around(Op("capabilities"), self._inner.capabilities)

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        op = Op("put", key, sum(memoryview(piece).nbytes for piece in data))
        return await self.around(op, lambda: self._inner.put(key, data, mode=mode, if_version=if_version))

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        return await self.around(Op("get", key, open_reads=1), lambda: self._inner.get(key, version=version))

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        op = Op("get_range", key, length or 0, int(length is None))
        return await self.around(op, lambda: self._inner.get_range(key, start, length, version=version))

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """See :class:`millrace.core.ports.Store`."""
        lengths = [request.length for request in requests]
        op = Op("read_many", "", sum(length or 0 for length in lengths), lengths.count(None))
        return await self.around(op, lambda: self._inner.read_many(requests))

    async def content(self, key: str) -> Content:
        """See :class:`millrace.core.ports.Store`."""
        return await self.around(Op("content", key, open_reads=1), lambda: self._inner.content(key))

    async def head(self, key: str) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        return await self.around(Op("head", key), lambda: self._inner.head(key))

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """See :class:`millrace.core.ports.Store`."""
        pages = aiter(self._inner.list(prefix))
        op = Op("list", prefix)
        try:
            while (page := await self.around(op, lambda: _next_page(pages))) is not None:
                yield page
        finally:
            await close_pages(pages)

    async def delete(self, key: str) -> None:
        """See :class:`millrace.core.ports.Store`."""
        await self.around(Op("delete", key), lambda: self._inner.delete(key))

    async def aclose(self) -> None:
        """Close the wrapped store."""
        await self._inner.aclose()


async def close_pages(pages: AsyncIterator[Sequence[ObjectInfo]]) -> None:
    """End a listing early, if it is of a kind that holds something open."""
    aclose = getattr(pages, "aclose", None)
    if aclose is not None:
        await aclose()


async def _next_page(pages: AsyncIterator[Sequence[ObjectInfo]]) -> Sequence[ObjectInfo] | None:
    return await anext(pages, None)
