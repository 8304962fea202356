"""Hashing an object that can only be read by ranges over an event loop."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Protocol

from millrace.core.model import Digest
from millrace.core.ports import Content, ObjectInfo

__all__ = ["hash_by_ranges"]

RANGE_BYTES = 8_000_000
"""What is held at a time: twice this."""


class Ranged(Protocol):
    """The two methods of a store that hashing needs."""

    async def head(self, key: str) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""


async def hash_by_ranges(store: Ranged, key: str) -> Content:
    """Hash one version of an object, fetching a range while the one before is hashed.

    Raises:
        NotFound: it isn't there.
        PreconditionFailed: it was replaced meanwhile.
    """
    info = await store.head(key)
    digest = hashlib.sha256()
    position = 0
    fetch = asyncio.ensure_future(store.get_range(key, 0, RANGE_BYTES, version=info.version))
    try:
        while True:
            data = await fetch
            position += len(data)
            if len(data) < RANGE_BYTES:
                await asyncio.to_thread(digest.update, data)
                return Content(Digest(digest.hexdigest()), position)
            fetch = asyncio.ensure_future(store.get_range(key, position, RANGE_BYTES, version=info.version))
            await asyncio.to_thread(digest.update, data)
    finally:
        if not fetch.done():
            fetch.cancel()
            await asyncio.gather(fetch, return_exceptions=True)
