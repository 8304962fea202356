"""A plain iterator, run in a thread, read by a coroutine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any, TypeVar

__all__ = ["in_thread"]

T = TypeVar("T")


async def in_thread(items: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items, each made in a thread while the one before is being used: two exist at once, never more.

    When the reader leaves early, the item in the making is waited for and the generator is closed.
    """
    pending: asyncio.Future[Any] = asyncio.ensure_future(asyncio.to_thread(next, items, _END))
    try:
        while (item := await asyncio.shield(pending)) is not _END:
            pending = asyncio.ensure_future(asyncio.to_thread(next, items, _END))
            yield item
    finally:
        await asyncio.gather(pending, return_exceptions=True)
        await asyncio.to_thread(items.close)


_END = object()
