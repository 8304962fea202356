"""A bound on how long one call may take."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from millrace.core.errors import TimedOut
from millrace.core.ports import Store
from millrace.stores.layers.layer import Layer, Op

__all__ = ["Timeout", "TimeoutPlan"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TimeoutPlan:
    """Seconds for a call: ``base_s`` plus the time its bytes take at the slowest rate that still counts as alive.

    Attributes:
        base_s: For the answer to begin.
        bytes_per_s: The slowest rate.
        open_read_bytes: What a read of unknown size is taken for.
        total_s: Never more than this.
    """

    base_s: float = 30.0
    bytes_per_s: float = 1e6
    open_read_bytes: int = 100_000_000
    total_s: float = 900.0

    def seconds(self, op: Op) -> float:
        """The bound for one call."""
        size_bytes = op.known_bytes + op.open_reads * self.open_read_bytes
        return min(self.base_s + size_bytes / self.bytes_per_s, self.total_s)


class Timeout(Layer):
    """Cancels a call that takes too long, and raises ``TimedOut``.

    Args:
        inner: The store wrapped.
        name: The store's name.
        plan: How long.
    """

    def __init__(self, inner: Store, *, name: str, plan: TimeoutPlan = TimeoutPlan()) -> None:
        super().__init__(inner, name=name)
        self._plan = plan

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Call, within the time."""
        allowed_s = self._plan.seconds(op)
        try:
            async with asyncio.timeout(allowed_s) as bound:
                return await call()
        except TimeoutError:
            if not bound.expired():
                raise
            at = f" of {op.key!r}" if op.key else ""
            message = f"store {self._name} did not finish a {op.name}{at} in {allowed_s:g} s; look at the link to it"
            raise TimedOut(message, store=self._name, key=op.key) from None
