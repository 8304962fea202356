"""Stores in clouds, over obstore: ``s3://``, ``gs://`` and ``az://``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

from millrace.core.errors import PreconditionFailed, StoreError, Unavailable, Unsupported
from millrace.core.ports import Bytes, Capabilities, Content, ObjectInfo, RangeRequest
from millrace.stores.buffers import fresh_buffer
from millrace.stores.cloud_client import Client, build_client, parse_cloud_url
from millrace.stores.cloud_errors import OBSTORE_ERRORS, cloud_error, status_of
from millrace.stores.coalesce import Span, coalesce
from millrace.stores.gather import gather_bounded
from millrace.stores.hashing import hash_by_ranges
from millrace.stores.keys import PutMode, check_key, check_prefix, check_put, check_range, flat_pieces
from millrace.stores.probe import PROBE_PREFIX, probe

__all__ = ["CloudStore"]

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 6
_PARTS_MOST = 9000
_READS_AT_ONCE = 32
_GAP_BYTES = 256 << 10
_PAGE_OBJECTS = 1000
_RETRIES = 2
_WEAK = "W/"  # such an ETag never matches an If-Match; it is compared after the answer only


class CloudStore:
    """Objects in a bucket.

    The version of an object is its ETag without quotes: the one name that listing, reading and writing share.

    Args:
        url: ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix``.
        name: The store's name, for errors.
        options: ``endpoint``, ``region``, ``anonymous``, ``path_style`` ... as the world file has them.
        credentials: By obstore's names; what is missing comes from the provider's own chain.
        credential_provider: obstore's callback that gives fresh credentials, or None.
        now_ms: The wall clock, milliseconds since 1970: a put's ``modified_ms``, which servers don't tell.
        token: Gives a fresh random word for each probe.

    Raises:
        UsageError: the URL, an option or a credential is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        options: Mapping[str, Any] | None = None,
        credentials: Mapping[str, str] | None = None,
        credential_provider: Any = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        token: Callable[[], str] = lambda: uuid4().hex,
    ) -> None:
        self._address = parse_cloud_url(url, name)
        self._name = name
        self._now_ms = now_ms
        self._token = token
        build = functools.partial(
            build_client,
            self._address,
            name=name,
            options=options or {},
            credentials=credentials or {},
            credential_provider=credential_provider,
        )
        # Parts of an upload and pages of a listing are repeated by obstore, as only it knows where it was. A
        # conditional put is not: repeating one after a lost response would turn our own success into a conflict.
        self._steady: Client = build(retries=_RETRIES)
        self._once: Client = build(retries=0)
        self._capabilities: Capabilities | None = None
        self._probing = asyncio.Lock()
        self._closed = False

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return self._address.url

    async def capabilities(self) -> Capabilities:
        """See :func:`millrace.stores.probe.probe`. Asked once; a failed probe is made again the next time."""
        self._check_open("")
        async with self._probing:
            if self._capabilities is None:
                self._capabilities = await probe(self, self._token())
        return self._capabilities

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: PutMode = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`. Plain puts of over 16 MiB go up in parts, conditional ones whole.

        Raises:
            Unsupported: the store's conditional puts are not honest, and one is asked for.
        """
        check_put(mode, if_version, self._name, check_key(key, self._name))
        if mode == "create" and not (await self.capabilities()).create_only:
            raise self._lacks(key, "create-only puts")
        if if_version is not None and not (await self.capabilities()).compare_and_swap:
            raise self._lacks(key, "compare-and-swap puts")
        pieces = flat_pieces(data)
        size_bytes = sum(len(piece) for piece in pieces)
        version = await self._send(key, pieces, size_bytes, mode, if_version)
        if version is None:
            return await self.head(key)
        return ObjectInfo(key, size_bytes, version, self._now_ms())

    async def put_as_told(self, key: str, data: bytes, mode: PutMode, if_version: str | None) -> str:
        """For the probe: see :class:`millrace.stores.probe.Probed`."""
        version = await self._send(key, [memoryview(data)], len(data), mode, if_version)
        return version if version is not None else (await self.head(key)).version

    async def get_now(self, key: str) -> bytes:
        """For the probe: see :class:`millrace.stores.probe.Probed`."""
        return bytes(await self.get(key))

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """See :class:`millrace.core.ports.Store`. Large objects come in concurrent ranges of one version."""
        return await self.get_range(key, 0, None, version=version)

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """See :class:`millrace.core.ports.Store`."""
        check_range(RangeRequest(key, start, length, version), self._name)
        if length == 0:
            self._check_version(await self.head(key), version)
            return memoryview(b"")
        first_end = start + (_PART_BYTES if length is None else min(length, _PART_BYTES))
        first, size_bytes, found = await self._fetch(key, start, first_end, version)
        end = size_bytes if length is None else min(start + length, size_bytes)
        if end <= first_end:
            return first
        whole = fresh_buffer(end - start)
        whole[: len(first)] = first

        async def part(at: int) -> None:
            piece, _, _ = await self._fetch(key, at, min(at + _PART_BYTES, end), found)
            whole[at - start : at - start + len(piece)] = piece

        parts = [functools.partial(part, at) for at in range(first_end, end, _PART_BYTES)]
        try:
            await gather_bounded(parts, _PARTS_AT_ONCE)
        except PreconditionFailed:
            if version is not None:
                raise
            raise self._cut(key) from None  # the caller named no version, so it may have the new one
        return whole.toreadonly()

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """See :class:`millrace.core.ports.Store`. Neighbouring ranges of one object are one request."""
        for request in requests:
            check_range(request, self._name)
        spans = coalesce(requests, gap_bytes=_GAP_BYTES, span_bytes=_PART_BYTES)
        results: dict[int, memoryview] = {}

        async def read(span: Span) -> None:
            asked = span.request
            view = await self.get_range(asked.key, asked.start, asked.length, version=asked.version)
            for index, offset in span.parts:
                wanted = requests[index].length
                results[index] = view[offset : None if wanted is None else offset + wanted]

        await gather_bounded([functools.partial(read, span) for span in spans], _READS_AT_ONCE)
        return [results[index] for index in range(len(requests))]

    async def content(self, key: str) -> Content:
        """See :class:`millrace.core.ports.Store`."""
        return await hash_by_ranges(self, key)

    async def head(self, key: str) -> ObjectInfo:
        """See :class:`millrace.core.ports.Store`."""
        check_key(key, self._name)
        with self._errors(key, "read"):
            return _info(await self._steady.head_async(key))

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """See :class:`millrace.core.ports.Store`."""
        check_prefix(prefix, self._name)
        # obstore's prefixes end at a "/"; what follows is sorted out here.
        folder = prefix.rpartition("/")[0]
        with self._errors(prefix, "list"):
            stream = self._steady.list(folder or None, chunk_size=_PAGE_OBJECTS)
            pages = aiter(stream)
        while True:
            with self._errors(prefix, "list"):
                metas = await anext(pages, None)
            if metas is None:
                return
            found = [_info(meta) for meta in metas]
            page = [one for one in found if one.key.startswith(prefix) and not one.key.startswith(PROBE_PREFIX)]
            if page:
                yield page

    async def delete(self, key: str) -> None:
        """See :class:`millrace.core.ports.Store`."""
        check_key(key, self._name)
        with self._errors(key, "delete"), contextlib.suppress(FileNotFoundError):
            await self._steady.delete_async(key)

    async def aclose(self) -> None:
        """Refuse further calls. obstore's connections are closed with the last reference to it."""
        self._closed = True

    async def _send(
        self, key: str, pieces: Sequence[memoryview], size_bytes: int, mode: PutMode, if_version: str | None
    ) -> str | None:
        """One put; gives the version where the server tells it."""
        how: dict[str, Any] = {"use_multipart": False}
        client = self._steady
        if mode == "create":
            client, how = self._once, {"use_multipart": False, "mode": "create"}
        elif if_version is not None:
            client, how = self._once, {"use_multipart": False, "mode": await self._condition(key, if_version)}
        elif size_bytes > _PART_BYTES:
            chunk_bytes = max(_PART_BYTES // 2, -(-size_bytes // _PARTS_MOST))
            how = {"use_multipart": True, "chunk_size": chunk_bytes, "max_concurrency": _PARTS_AT_ONCE}
        body = pieces[0] if len(pieces) == 1 else list(pieces) or b""
        with self._errors(key, "write"):
            answer = await client.put_async(key, body, **how)
        tag = answer["e_tag"]
        return None if tag is None else _version(tag)

    async def _condition(self, key: str, if_version: str) -> dict[str, str]:
        """What obstore wants for "only if it is still this version"."""
        condition = {"e_tag": _quoted(if_version)}
        if self._address.scheme == "gs":
            # GCS compares generations on a write, and ETags, which all else goes by, only on a read.
            with self._errors(key, "write"):
                meta = await self._steady.head_async(key)
            self._check_version(_info(meta), if_version)
            condition["version"] = str(meta["version"])
        return condition

    async def _fetch(self, key: str, start: int, end: int, version: str | None) -> tuple[memoryview, int, str]:
        """Bytes ``[start, end)``, not empty, in one request; with the whole object's size and its version."""
        options: dict[str, Any] = {"range": (start, end)}
        if version and not version.startswith(_WEAK):
            options["if_match"] = _quoted(version)
        with self._errors(key, "read"):
            try:
                answer = await self._steady.get_async(key, options=options)  # type: ignore[arg-type]
                view = memoryview(await answer.bytes_async())
            except OBSTORE_ERRORS as problem:
                if status_of(problem) != 416:
                    raise
                answer = None
        if answer is None:  # it begins past the end, which is no error here
            info = await self.head(key)
            self._check_version(info, version)
            if info.size_bytes > start:
                raise self._cut(key)
            return memoryview(b""), info.size_bytes, info.version
        info = _info(answer.meta)
        self._check_version(info, version)
        if len(view) != min(end, info.size_bytes) - start:
            raise self._cut(key)
        return view, info.size_bytes, info.version

    @contextlib.contextmanager
    def _errors(self, key: str, doing: str) -> Iterator[None]:
        self._check_open(key)
        try:
            yield
        except OBSTORE_ERRORS as problem:
            raise cloud_error(problem, store=self._name, key=key, doing=doing) from None

    def _check_open(self, key: str) -> None:
        if self._closed:
            raise StoreError(f"store {self._name} is closed; open it again", store=self._name, key=key)

    def _check_version(self, info: ObjectInfo, version: str | None) -> None:
        if version is not None and info.version != version:
            message = (
                f"store {self._name}: {info.key!r} has version {info.version}, not {version}: "
                "it changed; list or read it again"
            )
            raise PreconditionFailed(message, store=self._name, key=info.key)

    def _cut(self, key: str) -> StoreError:
        message = f"store {self._name}: {key!r} came back cut short or changed meanwhile; read it again"
        return Unavailable(message, store=self._name, key=key)

    def _lacks(self, key: str, what: str) -> StoreError:
        message = (
            f"store {self._name} ({self.url}) lacks honest {what}, so {key!r} was not put; use another store for it"
        )
        return Unsupported(message, store=self._name, key=key)


def _version(tag: str) -> str:
    # Some listings write the ETag without its quotes, so none of ours has them. A weak one stays recognisable.
    return tag if tag.startswith(_WEAK) else tag.strip('"')


def _quoted(version: str) -> str:
    return version if version.startswith(_WEAK) else f'"{version}"'


def _info(meta: Any) -> ObjectInfo:
    version = _version(meta["e_tag"] or meta["version"] or "")
    return ObjectInfo(meta["path"], meta["size"], version, int(meta["last_modified"].timestamp() * 1000))
