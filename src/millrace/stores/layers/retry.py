"""Trying again, without ever mistaking one's own earlier success for somebody else's."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from millrace.core.errors import AlreadyExists, NotFound, PreconditionFailed, StoreError
from millrace.core.ports import Bytes, ObjectInfo, Store
from millrace.stores.keys import PutMode, same_bytes
from millrace.stores.layers.layer import Layer, Op, close_pages

__all__ = ["Retry", "RetryPlan"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RetryPlan:
    """How often and how long.

    Before attempt ``n + 1`` it waits a uniformly random time between 0 and
    ``min(delay_s_max, delay_s * 2 ** (n - 1))``: exponential backoff with full jitter, so that clients that
    failed together do not come back together.

    Attributes:
        attempts: At most, the first included; at least 1.
        delay_s: Upper bound of the first wait.
        delay_s_max: Upper bound of any wait.
        total_s: No attempt begins later than this after the first one.
        list_again_objects: A listing that broke off after more than this many is not begun again. It bounds the
            memory for the keys already given.
    """

    attempts: int = 5
    delay_s: float = 0.1
    delay_s_max: float = 5.0
    total_s: float = 300.0
    list_again_objects: int = 2_000_000


class Retry(Layer):
    """Repeats calls that failed with a retryable error.

    A conditional put whose response was lost may have happened. If its repetition meets a conflict, the
    object is read back: when it is byte for byte what was to be put, the put succeeded. So a value that
    stands for its writer (a lease, a claim) must name the writer. When it is something else, the conflict is
    raised, and the put may still have happened and have been replaced since: who must not apply a change
    twice looks for it in what is there.

    A listing that breaks off is begun again, and what was given already is left out.

    Args:
        inner: The store wrapped.
        name: The store's name.
        rng: For the jitter.
        plan: How often and how long.
        sleep: Waits so many seconds.
        monotonic_s: Seconds that never go backwards.
        on_retry: Told the call's name and the error before each wait.
    """

    def __init__(
        self,
        inner: Store,
        *,
        name: str,
        rng: random.Random,
        plan: RetryPlan = RetryPlan(),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        monotonic_s: Callable[[], float] = time.monotonic,
        on_retry: Callable[[str, StoreError], None] | None = None,
    ) -> None:
        super().__init__(inner, name=name)
        self._rng = rng
        self._plan = plan
        self._sleep = sleep
        self._monotonic_s = monotonic_s
        self._on_retry = on_retry

    async def around(self, op: Op, call: Callable[[], Awaitable[T]]) -> T:
        """Call until it works, fails for good, or the plan is used up: then the last error is raised."""
        plan = self._plan
        deadline_s = self._monotonic_s() + plan.total_s
        for attempt in range(1, plan.attempts):
            try:
                return await call()
            except StoreError as error:
                wait_s = self._rng.uniform(0, min(plan.delay_s_max, plan.delay_s * 2 ** (attempt - 1)))
                if not error.retryable or self._monotonic_s() + wait_s > deadline_s:
                    raise
                if self._on_retry is not None:
                    self._on_retry(op.name, error)
            await self._sleep(wait_s)
        return await call()

    async def put(
        self, key: str, data: Sequence[Bytes], *, mode: PutMode = "overwrite", if_version: str | None = None
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        op = Op("put", key, sum(memoryview(piece).nbytes for piece in data))
        unknown = False  # whether an earlier attempt may have happened all the same

        async def attempt() -> ObjectInfo:
            nonlocal unknown
            try:
                return await self._inner.put(key, data, mode=mode, if_version=if_version)
            except (AlreadyExists, PreconditionFailed):
                mine = await self._ours(key, data) if unknown else None
                if mine is None:
                    raise
                return mine
            except StoreError as error:
                unknown = unknown or error.retryable
                raise

        return await self.around(op, attempt)

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """See :class:`millrace.core.ports.Store`."""
        given: set[str] = set()
        pages = self._inner.list(prefix)
        broken: StoreError | None = None

        async def next_fresh() -> Sequence[ObjectInfo] | None:
            nonlocal pages, broken
            if broken is not None:
                if len(given) > self._plan.list_again_objects:
                    raise self._broke_off(prefix, len(given)) from broken
                await close_pages(pages)
                pages = self._inner.list(prefix)
                broken = None
            try:
                async for page in pages:
                    fresh = [info for info in page if info.key not in given]
                    if fresh:
                        return fresh
            except StoreError as error:
                broken = error
                raise
            return None

        try:
            while (page := await self.around(Op("list", prefix), next_fresh)) is not None:
                given.update(info.key for info in page)
                yield page
        finally:
            await close_pages(pages)

    def _broke_off(self, prefix: str, objects: int) -> StoreError:
        message = f"store {self._name}: its listing broke off after {objects} objects; list it by smaller prefixes"
        return StoreError(message, store=self._name, key=prefix)

    async def _ours(self, key: str, data: Sequence[Bytes]) -> ObjectInfo | None:
        """The object, if it holds exactly ``data``."""
        try:
            info = await self._inner.head(key)
            whole = await self._inner.get(key, version=info.version)
        except (NotFound, PreconditionFailed):
            return None
        return info if same_bytes(data, whole) else None
