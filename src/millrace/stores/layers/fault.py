"""Failing on purpose, reproducibly."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from millrace.core.errors import NoSpace, Unavailable
from millrace.core.model import digest_of
from millrace.core.ports import Bytes, Content, ObjectInfo, RangeRequest, Store
from millrace.stores.keys import PutMode
from millrace.stores.layers.layer import Layer, Op

__all__ = ["Fault", "FaultPlan", "FaultRates"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How likely each fault is, from 0 (never) to 1 (always), for one call.

    Attributes:
        unavailable: It fails before anything happened.
        delay: It waits ``FaultPlan.delay_s`` first.
        lost_response: It happens, then fails.
        corrupt: One bit of the bytes read is flipped.
        truncate: The bytes read are cut short.
    """

    unavailable: float = 0.0
    delay: float = 0.0
    lost_response: float = 0.0
    corrupt: float = 0.0
    truncate: float = 0.0


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which faults to make.

    Attributes:
        rates: For every call that ``per_op`` doesn't name.
        per_op: Rates by method name: ``{"put": FaultRates(lost_response=1.0)}``.
        delay_s: How long a delayed call waits.
        no_space_after_bytes: Puts beyond this sum fail with ``NoSpace``; None for endless space.
    """

    rates: FaultRates = FaultRates()
    per_op: Mapping[str, FaultRates] = field(default_factory=dict)
    delay_s: float = 0.01
    no_space_after_bytes: int | None = None


class Fault(Layer):
    """Makes the faults of a plan. One seed and one order of calls give the same faults again.

    Args:
        inner: The store wrapped.
        name: The store's name.
        plan: Which faults.
        rng: The dice.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        inner: Store,
        *,
        name: str,
        plan: FaultPlan,
        rng: random.Random,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        super().__init__(inner, name=name)
        self._plan = plan
        self._rng = rng
        self._sleep = sleep
        self._written_bytes = 0

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Call, or not, or as if not."""
        rates = self._rates(op.name)
        if self._rng.random() < rates.delay:
            await self._sleep(self._plan.delay_s)
        if self._rng.random() < rates.unavailable:
            raise self._unavailable(op, "before it began")
        lost = self._rng.random() < rates.lost_response
        result = await call()
        if lost:
            raise self._unavailable(op, "after it was done")
        return result

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        limit = self._plan.no_space_after_bytes
        size_bytes = sum(memoryview(piece).nbytes for piece in data)
        if limit is not None and self._written_bytes + size_bytes > limit:
            message = f"store {self._name} has no space left for {key!r} (an injected fault); raise its limit"
            raise NoSpace(message, store=self._name, key=key)
        self._written_bytes += size_bytes
        return await super().put(key, data, mode=mode, if_version=if_version)

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        return self._spoil("get", await super().get(key, version=version))

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        return self._spoil("get_range", await super().get_range(key, start, length, version=version))

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """See :class:`millrace.core.ports.Store`."""
        return [self._spoil("read_many", view) for view in await super().read_many(requests)]

    async def content(self, key: str) -> Content:
        """See :class:`millrace.core.ports.Store`."""
        true = await super().content(key)
        rates = self._rates("content")
        if self._rng.random() < rates.truncate:
            return Content(digest_of(b"cut short"), self._rng.randrange(true.size_bytes + 1) // 2)
        if self._rng.random() < rates.corrupt:
            return Content(digest_of(b"a flipped bit"), true.size_bytes)
        return true

    def _rates(self, op_name: str) -> FaultRates:
        return self._plan.per_op.get(op_name, self._plan.rates)

    def _spoil(self, op_name: str, view: memoryview) -> memoryview:
        rates = self._rates(op_name)
        if len(view) and self._rng.random() < rates.truncate:
            view = view[: self._rng.randrange(len(view))]
        if len(view) and self._rng.random() < rates.corrupt:
            changed = bytearray(view)
            changed[self._rng.randrange(len(changed))] ^= 1 << self._rng.randrange(8)
            view = memoryview(changed).toreadonly()
        return view

    def _unavailable(self, op: Op, when: str) -> Unavailable:
        at = f" of {op.key!r}" if op.key else ""
        message = f"store {self._name} lost a {op.name}{at} {when} (an injected fault); try again"
        return Unavailable(message, store=self._name, key=op.key)
