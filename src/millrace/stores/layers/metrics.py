"""Counting and timing every call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from millrace.core.errors import MillraceError
from millrace.core.ports import Content, Store
from millrace.stores.layers.layer import Layer, Op
from millrace.telemetry.metrics import StoreMetrics

__all__ = ["Metrics"]

T = TypeVar("T")

_READS = frozenset({"get", "get_range", "read_many", "content"})


class Metrics(Layer):
    """Reports every call: how long it took, how it ended, how many bytes went through.

    Args:
        inner: The store wrapped.
        name: The store's name: the label. Keys are never labels, there would be millions.
        metrics: Where to report.
        monotonic_s: Seconds that never go backwards.
    """

    def __init__(
        self,
        inner: Store,
        *,
        name: str,
        metrics: StoreMetrics,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(inner, name=name)
        self._metrics = metrics
        self._monotonic_s = monotonic_s

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Call, and report."""
        started_s = self._monotonic_s()
        try:
            result = await call()
        except MillraceError as error:
            self._metrics.failed(self._name, op.name, error.kind, self._monotonic_s() - started_s)
            raise
        except asyncio.CancelledError:
            self._metrics.failed(self._name, op.name, "Cancelled", self._monotonic_s() - started_s)
            raise
        self._metrics.done(self._name, op.name, self._monotonic_s() - started_s)
        if op.name == "put":
            self._metrics.moved(self._name, "written", op.known_bytes)
        elif op.name in _READS:
            self._metrics.moved(self._name, "read", _bytes_in(result))
        return result


def _bytes_in(result: object) -> int:
    if isinstance(result, Content):
        return result.size_bytes
    if isinstance(result, memoryview):
        return result.nbytes
    if isinstance(result, list):
        return sum(view.nbytes for view in result if isinstance(view, memoryview))
    return 0
