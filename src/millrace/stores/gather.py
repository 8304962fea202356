"""Many calls at once, bounded, and all of them ended when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

__all__ = ["gather_bounded"]

T = TypeVar("T")


async def gather_bounded(calls: Sequence[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    """Make the calls, at most ``limit`` at a time, and give their results in order.

    The first failure is raised as it is, after the other calls were cancelled and have ended.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(calls))

    async def worker() -> None:
        for index, call in waiting:
            results[index] = await call()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(limit, len(calls))):
                group.create_task(worker())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [results[index] for index in range(len(calls))]
