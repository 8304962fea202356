"""A store in memory: small, strict, and a real implementation of every law. For tests and for trying things."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from millrace.core.errors import AlreadyExists, NotFound, PreconditionFailed, StoreError
from millrace.core.model import digest_of
from millrace.core.ports import Bytes, Capabilities, Content, ObjectInfo, RangeRequest
from millrace.stores.keys import PutMode, check_key, check_prefix, check_put, check_range, flat_pieces

__all__ = ["MemoryContents", "MemoryRegistry", "MemoryStore"]

_PAGE_OBJECTS = 1000


@dataclass(slots=True)
class MemoryContents:
    """What lies in one memory store. Several stores may share it, as several clients share a bucket."""

    objects: dict[str, tuple[bytes, ObjectInfo]] = field(default_factory=dict)
    writes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class MemoryRegistry:
    """Names for memory contents: the ``memory://NAME`` of one process that passes one registry around."""

    def __init__(self) -> None:
        self._contents: dict[str, MemoryContents] = {}

    def contents(self, name: str) -> MemoryContents:
        """The contents called ``name``, made empty when first asked for."""
        return self._contents.setdefault(name, MemoryContents())


class MemoryStore:
    """Objects in a dictionary.

    Args:
        name: The store's name, for errors and for its URL.
        contents: What it holds; shared with other stores, or fresh when None.
        now_ns: The wall clock, nanoseconds since 1970.
    """

    def __init__(
        self,
        name: str = "memory",
        *,
        contents: MemoryContents | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._name = name
        self._contents = MemoryContents() if contents is None else contents
        self._now_ns = now_ns
        self._closed = False

    @property
    def url(self) -> str:
        """``memory://NAME``."""
        return f"memory://{self._name}"

    async def capabilities(self) -> Capabilities:
        """Both kinds of conditional put are honest."""
        return Capabilities(create_only=True, compare_and_swap=True)

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: PutMode = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        check_put(mode, if_version, self._name, check_key(key, self._name))
        await self._turn(key)
        value = b"".join(flat_pieces(data))
        with self._contents.lock:
            there = self._contents.objects.get(key)
            if mode == "create" and there is not None:
                message = f"store {self._name} already has {key!r}; read it, or put it under another key"
                raise AlreadyExists(message, store=self._name, key=key)
            if if_version is not None and (there is None or there[1].version != if_version):
                found = "is not there" if there is None else f"has version {there[1].version}"
                message = f"store {self._name}: {key!r} {found}, not version {if_version}; read it again and decide"
                raise PreconditionFailed(message, store=self._name, key=key)
            self._contents.writes += 1
            info = ObjectInfo(key, len(value), str(self._contents.writes), self._now_ns() // 1_000_000)
            self._contents.objects[key] = (value, info)
        return info

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        await self._turn(key)
        return self._read(RangeRequest(key, version=version))

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        await self._turn(key)
        return self._read(RangeRequest(key, start, length, version))

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """See :class:`millrace.core.ports.Store`."""
        await self._turn("")
        return [self._read(request) for request in requests]

    async def content(self, key: str) -> Content:
        """See :class:`millrace.core.ports.Store`."""
        await self._turn(key)
        value = self._find(key)[0]
        return Content(digest_of(value), len(value))

    async def head(self, key: str) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        await self._turn(key)
        return self._find(key)[1]

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """See :class:`millrace.core.ports.Store`. Objects written after the listing began are not in it."""
        check_prefix(prefix, self._name)
        await self._turn("")
        with self._contents.lock:
            found = [info for key, (_, info) in self._contents.objects.items() if key.startswith(prefix)]
        for at in range(0, len(found), _PAGE_OBJECTS):
            yield found[at : at + _PAGE_OBJECTS]
            await self._turn("")

    async def delete(self, key: str) -> None:
        """See :class:`millrace.core.ports.Store`."""
        check_key(key, self._name)
        await self._turn(key)
        with self._contents.lock:
            self._contents.objects.pop(key, None)

    async def aclose(self) -> None:
        """Refuse further calls; shared contents stay."""
        self._closed = True

    async def _turn(self, key: str) -> None:
        if self._closed:
            raise StoreError(f"store {self._name} is closed; open it again", store=self._name, key=key)
        # A real store suspends its caller; without this, races in the callers would never show.
        await asyncio.sleep(0)

    def _find(self, key: str) -> tuple[bytes, ObjectInfo]:
        check_key(key, self._name)
        found = self._contents.objects.get(key)
        if found is None:
            raise NotFound(f"store {self._name} has no object {key!r}; check its name", store=self._name, key=key)
        return found

    def _read(self, request: RangeRequest) -> memoryview:
        check_range(request, self._name)
        value, info = self._find(request.key)
        if request.version is not None and request.version != info.version:
            message = (
                f"store {self._name}: {request.key!r} has version {info.version}, not {request.version}: "
                "it was replaced; list it again"
            )
            raise PreconditionFailed(message, store=self._name, key=request.key)
        end = None if request.length is None else request.start + request.length
        return memoryview(value)[request.start : end]
