"""A bound on how many calls are under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from millrace.core.ports import Store
from millrace.stores.layers.layer import Layer, Op

__all__ = ["Limit"]

T = TypeVar("T")


class Limit(Layer):
    """Lets ``concurrent`` calls in at a time; the others wait their turn, first come first served.

    A listing holds its place while it fetches a page, not while the page is looked at.

    Args:
        inner: The store wrapped.
        name: The store's name.
        concurrent: At least 1.
    """

    def __init__(self, inner: Store, *, name: str, concurrent: int) -> None:
        super().__init__(inner, name=name)
        self._places = asyncio.Semaphore(concurrent)

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Wait for a place, then call."""
        async with self._places:
            return await call()
