"""A store on a local disk: atomic, durable, and honest about conditional puts between processes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TypeVar
from urllib.parse import quote

from millrace.core.errors import NotFound, ReadOnly, StoreError
from millrace.core.ports import Bytes, Capabilities, Content, ObjectInfo, RangeRequest
from millrace.stores.disk import Disk
from millrace.stores.keys import PutMode, check_key, check_prefix, check_put, check_range
from millrace.stores.threads import Stop, WorkerThreads
from millrace.stores.walk import Walk, WalkRules

__all__ = ["LocalStore"]

T = TypeVar("T")

Page = Sequence[ObjectInfo]


class LocalStore:
    """Objects as files under ``root``.

    A put is a temporary file in the same file system, an fsync, a rename (or a hard link, for create-only) and
    an fsync of the directory. Versions are ``mtime_ns-size``. Files may be put there by others too; a file
    that others change in place between two ticks of the file system's clock keeps its version.

    Args:
        root: A directory, absolute. It is made when first written to.
        name: The store's name, for errors.
        follow_symlinks: List what links lead to.
        prune: Called, in a worker thread, with a directory's path relative to the root while listing; True means:
            do not go in.
        on_broken: Called, in a worker thread, with the relative path and the error of what can't be listed (see
            :class:`millrace.stores.walk.WalkRules`); None raises the error.
        must_exist: Listing raises ``NotFound`` when there is no root. Otherwise it is an empty store.
        only: The one file name, directly in ``root``, that this store consists of. Such a store takes no writes.
        threads: How many calls may block at once, at least 1.
        now_ns: The wall clock, nanoseconds since 1970, that dates the files written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        name: str,
        follow_symlinks: bool = True,
        prune: Callable[[str], bool] | None = None,
        on_broken: Callable[[str, StoreError], None] | None = None,
        must_exist: bool = False,
        only: str | None = None,
        threads: int = 8,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._root = os.path.abspath(root)
        self._name = name
        self._only = only
        self._rules = WalkRules(follow_symlinks, prune, on_broken, must_exist)
        self._disk = Disk(self._root, name, now_ns)
        self._threads = WorkerThreads(f"store-{name}", threads)
        self._capabilities: Capabilities | None = None
        self._closed = False

    @property
    def url(self) -> str:
        """``file:///...``, percent-encoded."""
        path = self._root if self._only is None else os.path.join(self._root, self._only)
        return "file://" + quote(os.fsencode(path))

    async def capabilities(self) -> Capabilities:
        """Create-only stands on hard links, compare-and-swap on file locks; the second is tried out.

        Raises:
            ReadOnly, AccessDenied, NoSpace: nothing can be written here.
        """
        if self._capabilities is None:
            self._check_writable("")
            swaps = await self._run("", self._disk.probe_lock)
            self._capabilities = Capabilities(create_only=swaps, compare_and_swap=swaps)
        return self._capabilities

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: PutMode = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`. The pieces go to the kernel as they are, without a copy."""
        check_put(mode, if_version, self._name, check_key(key, self._name))
        self._check_writable(key)
        return await self._run(
            key, lambda stop: self._disk.write(key, data, mode=mode, if_version=if_version, stop=stop)
        )

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        return (await self.read_many((RangeRequest(key, version=version),)))[0]

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        return (await self.read_many((RangeRequest(key, start, length, version),)))[0]

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """See :class:`millrace.core.ports.Store`. All of them in one thread."""
        for request in requests:
            self._check_mine(check_range(request, self._name).key)
        if not requests:
            return []
        return await self._run(requests[0].key, lambda stop: self._disk.read_many(requests, stop))

    async def content(self, key: str) -> Content:
        """See :class:`millrace.core.ports.Store`."""
        self._check_mine(check_key(key, self._name))
        return await self._run(key, lambda stop: self._disk.content(key, stop))

    async def head(self, key: str) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        self._check_mine(check_key(key, self._name))
        return await self._run(key, lambda _: self._disk.head(key))

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """See :class:`millrace.core.ports.Store`. A page is at most 4,096 objects, made in one thread hop."""
        check_prefix(prefix, self._name)
        if self._only is not None:
            if self._only.startswith(prefix):
                yield [await self.head(self._only)]
            return
        walk = Walk(self._root, self._name, self._rules)
        pages = walk.pages(prefix)

        def step(stop: Stop) -> Page | None:
            walk.stop = stop
            return next(pages, None)

        try:
            while page := await self._run("", step):
                yield page
        finally:
            with contextlib.suppress(ValueError):  # a cancelled step that the kernel still holds closes it itself
                pages.close()

    async def delete(self, key: str) -> None:
        """See :class:`millrace.core.ports.Store`. Directories stay, as other keys may lie in them."""
        check_key(key, self._name)
        self._check_writable(key)
        await self._run(key, lambda stop: self._disk.remove(key, stop))

    async def aclose(self) -> None:
        """Let the threads end."""
        self._closed = True
        await self._threads.aclose()

    async def _run(self, key: str, work: Callable[[Stop], T]) -> T:
        if self._closed:
            raise StoreError(f"store {self._name} is closed; open it again", store=self._name, key=key)
        return await self._threads.run(work)

    def _check_mine(self, key: str) -> None:
        if self._only is not None and key != self._only:
            message = f"store {self._name} is the one object {self._only!r}; it has no {key!r}"
            raise NotFound(message, store=self._name, key=key)

    def _check_writable(self, key: str) -> None:
        if self._only is not None:
            message = f"store {self._name} is one file, {self.url}, to be read; name a directory to write to"
            raise ReadOnly(message, store=self._name, key=key)
