"""Blocking reads of source objects, for worker threads; the event loop moves the bytes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any, Final, Generic, NoReturn, TypeVar

from millrace.core.errors import (
    MillraceError,
    NotFound,
    PreconditionFailed,
    RunStopped,
    SourceChanged,
    SourceError,
    StoreError,
)
from millrace.core.model import SourceObject
from millrace.core.ports import RangeRequest, Store

__all__ = ["GROUP_BYTES", "GROUP_OBJECTS", "StoreReads"]

GROUP_BYTES: Final = 32_000_000
"""Bytes fetched ahead in one group ..."""
GROUP_OBJECTS: Final = 256
"""... and objects, at most. One group is in use while the next is on its way."""

_LOOK_S: Final = 0.2
"""How often a blocked thread looks whether the loop is still there to answer it."""

T = TypeVar("T")


class StoreReads:
    """:class:`millrace.pipeline.records.Reads` over a store. Thread-safe; used from any thread but the loop's.

    A blocked call ends with ``RunStopped`` when :meth:`close` is called or the loop goes away.

    Args:
        store: Opened at the source's URL.
        loop: The running loop that the store is used on.
        group_bytes, group_objects: How much :meth:`read_whole` fetches at a time.
    """

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        *,
        group_bytes: int = GROUP_BYTES,
        group_objects: int = GROUP_OBJECTS,
    ) -> None:
        self._store = store
        self._loop = loop
        self._group_bytes = group_bytes
        self._group_objects = group_objects
        self._closed = threading.Event()
        self._tasks: set[asyncio.Task[Any]] = set()  # touched on the loop only

    def close(self) -> None:
        """Fail every call that is blocked or still to come. From any thread, more than once."""
        self._closed.set()
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel_tasks)

    def read(self, obj: SourceObject, start: int = 0, length: int | None = None) -> memoryview:
        """See :class:`millrace.pipeline.records.Reads`."""
        left = max(obj.size_bytes - start, 0)
        wanted = left if length is None else min(length, left)
        if wanted == 0 and obj.size_bytes > 0:
            return memoryview(b"")
        request = self._store.get_range
        call = self._submit(lambda: request(obj.path, start, wanted, version=obj.version or None))
        data = self._wait(call, (obj,))
        _check_length(obj, len(data), wanted)
        return data

    def read_whole(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, memoryview]]:
        """See :class:`millrace.pipeline.records.Reads`."""
        groups = self._groups(objects)
        pending: _Call[list[memoryview]] | None = None
        try:
            bounds = next(groups, None)
            if bounds is not None:
                pending = self._submit_group(objects[slice(*bounds)])
            while bounds is not None and pending is not None:
                start, end = bounds
                views = self._wait(pending, objects[start:end])
                bounds = next(groups, None)
                pending = self._submit_group(objects[slice(*bounds)]) if bounds is not None else None
                views.reverse()
                for i in range(start, end):
                    view = views.pop()  # so that what has been handed out is not held here too
                    _check_length(objects[i], len(view), objects[i].size_bytes)
                    yield i, view
                    del view
        finally:
            if pending is not None:
                pending.abandon()

    def _groups(self, objects: Sequence[SourceObject]) -> Iterator[tuple[int, int]]:
        start, held = 0, 0
        for i, obj in enumerate(objects):
            full = i - start >= self._group_objects or held + obj.size_bytes > self._group_bytes
            if full and i > start:
                yield start, i
                start, held = i, 0
            held += obj.size_bytes
        if start < len(objects):
            yield start, len(objects)

    def _submit_group(self, objects: Sequence[SourceObject]) -> _Call[list[memoryview]]:
        requests = [RangeRequest(o.path, version=o.version or None) for o in objects]
        return self._submit(lambda: self._store.read_many(requests))

    def _submit(self, make: Callable[[], Coroutine[Any, Any, T]]) -> _Call[T]:
        if self._closed.is_set():
            raise _stopped()
        call = _Call(make, self._loop, self._tasks, self._closed)
        try:
            self._loop.call_soon_threadsafe(call.start)
        except RuntimeError:  # the loop is closed
            raise _stopped() from None
        return call

    def _wait(self, call: _Call[T], objects: Sequence[SourceObject]) -> T:
        while not wait((call.future,), _LOOK_S).done:
            if self._closed.is_set() or self._loop.is_closed():
                raise _stopped()
        try:
            return call.future.result()
        except CancelledError:
            raise _stopped() from None
        except StoreError as error:
            _explain(error, objects)

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()


class _Call(Generic[T]):
    """One coroutine on the loop, waited for by a thread.

    The coroutine is made on the loop, so that none is left unawaited when the loop goes away first.
    """

    def __init__(
        self,
        make: Callable[[], Coroutine[Any, Any, T]],
        loop: asyncio.AbstractEventLoop,
        tasks: set[asyncio.Task[Any]],
        closed: threading.Event,
    ) -> None:
        self.future: Future[T] = Future()
        self._make = make
        self._loop = loop
        self._tasks = tasks
        self._closed = closed
        self._task: asyncio.Task[T] | None = None

    def start(self) -> None:
        """On the loop."""
        if self._closed.is_set():
            self.future.cancel()
        if self.future.set_running_or_notify_cancel():
            self._task = self._loop.create_task(self._make())
            self._tasks.add(self._task)
            self._task.add_done_callback(self._finish)

    def abandon(self) -> None:
        """Nobody waits any more. From the thread."""
        if not self.future.cancel() and not self.future.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _finish(self, task: asyncio.Task[T]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self.future.set_exception(CancelledError())
        elif (error := task.exception()) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(task.result())


def _stopped() -> MillraceError:
    return RunStopped("reading stopped, because the run is being stopped")


def _check_length(obj: SourceObject, got: int, wanted: int) -> None:
    if got != wanted:
        raise SourceChanged(
            f"{obj.path} changed since the run was planned: it is no longer {obj.size_bytes} bytes long; "
            "start a new run to use it as it is now"
        )


def _explain(error: StoreError, objects: Sequence[SourceObject]) -> NoReturn:
    """Turn a store's error into one about the source object, or raise it again if it may pass."""
    named = next((o.path for o in objects if o.path == error.key), objects[0].path if len(objects) == 1 else error.key)
    if isinstance(error, NotFound):
        raise SourceChanged(
            f"{named} disappeared since the run was planned; put it back, or start a new run without it"
        ) from error
    if isinstance(error, PreconditionFailed):
        raise SourceChanged(
            f"{named} changed since the run was planned; start a new run to use it as it is now"
        ) from error
    if error.retryable:
        raise error
    raise SourceError(f"{named} can't be read: {error}") from error
