"""The cloud store against servers that lie, refuse, break off or deny: small strict ones of our own."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from millrace.core.errors import (
    AccessDenied,
    AlreadyExists,
    NoSpace,
    NotFound,
    PreconditionFailed,
    StoreError,
    Unavailable,
    Unsupported,
)
from millrace.core.ports import Capabilities, RangeRequest
from millrace.stores.cloud import CloudStore
from millrace.stores.layers import Retry, RetryPlan
from millrace.stores.memory import MemoryStore
from millrace.stores.probe import PROBE_PREFIX, probe

Answer = tuple[int, str]


class Bucket(ThreadingHTTPServer):
    """As much of S3 as a store needs, honest unless told otherwise.

    Attributes:
        manners: ``honest``; ``ignore``: conditions are not looked at; ``refuse``: they are answered with 501;
            ``deny all``: every condition fails; ``no swap``: only If-Match is ignored.
        fail: Answers to give instead of doing the next requests, oldest first, by method.
        hang_up_after: Methods whose next request is done and then not answered.
        log: ``PUT key``, ``GET key bytes=0-3`` ...
    """

    daemon_threads = True

    def __init__(self, manners: str = "honest") -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.manners = manners
        self.objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.fail: dict[str, list[Answer]] = {}
        self.hang_up_after: list[str] = []
        self.log: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Bucket

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        if self.command in self.server.hang_up_after:
            self.server.hang_up_after.remove(self.command)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if status != 204:
            self.send_header("Content-Length", headers.get("Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str) -> None:
        self.reply(status, f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode())

    def begin(self) -> tuple[str, bytes] | None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = unquote(urlsplit(self.path).path).removeprefix("/bucket").removeprefix("/")
        self.server.log.append(f"{self.command} {key} {self.headers.get('Range') or ''}".strip())
        planned = self.server.fail.get(self.command)
        if planned:
            self.error(*planned.pop(0))
            return None
        return key, body

    def met(self, key: str) -> bool:
        wanted, unwanted = self.headers.get("If-Match"), self.headers.get("If-None-Match")
        if self.server.manners == "ignore" or (self.server.manners == "no swap" and wanted):
            return True
        if wanted is None and unwanted is None:
            return True
        if self.server.manners == "refuse":
            self.error(501, "NotImplemented")
            return False
        there = self.server.objects.get(key)
        ok = there is None if unwanted else there is not None and etag(there) == wanted
        if not ok or self.server.manners == "deny all":
            self.error(412, "PreconditionFailed")
            return False
        return True

    def do_PUT(self) -> None:
        if (begun := self.begin()) is None:
            return
        key, body = begun
        with self.server.lock:
            if self.met(key):
                self.server.objects[key] = body
                self.reply(200, ETag=etag(body))

    def do_GET(self) -> None:
        if (begun := self.begin()) is None:
            return
        key, _ = begun
        data = self.server.objects.get(key)
        wanted = self.headers.get("If-Match")
        if not key:
            self.listing()
        elif data is None:
            self.error(404, "NoSuchKey")
        elif wanted and wanted != etag(data) and self.server.manners != "ignore":
            self.error(412, "PreconditionFailed")
        else:
            self.give(data)

    do_HEAD = do_GET  # noqa: N815 - http.server's name

    def give(self, data: bytes) -> None:
        about = {"ETag": etag(data), "Last_Modified": "Sun, 22 Nov 2026 08:00:00 GMT"}
        asked = self.headers.get("Range")
        if asked is None:
            self.reply(200, data, **about)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)) + 1, len(data))
        if start >= len(data):
            self.error(416, "InvalidRange")
        else:
            self.reply(206, data[start:end], **about, Content_Range=f"bytes {start}-{end - 1}/{len(data)}")

    def do_DELETE(self) -> None:
        if (begun := self.begin()) is not None:
            self.server.objects.pop(begun[0], None)
            self.reply(204)

    def do_POST(self) -> None:
        """Bulk delete, which is how obstore deletes."""
        if (begun := self.begin()) is not None:
            for part in begun[1].decode().split("<Key>")[1:]:
                self.server.objects.pop(part.split("</Key>")[0], None)
            self.reply(200, b"<DeleteResult></DeleteResult>")

    def listing(self) -> None:
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{etag(data)}</ETag>"
            "<LastModified>2026-11-22T08:00:00.000Z</LastModified></Contents>"
            for key, data in sorted(self.server.objects.items())
        )
        self.reply(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())


@pytest.fixture
def serve() -> Iterator[Callable[..., Bucket]]:
    running: list[tuple[Bucket, threading.Thread]] = []

    def start(manners: str = "honest") -> Bucket:
        bucket = Bucket(manners)
        thread = threading.Thread(target=bucket.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((bucket, thread))
        return bucket

    yield start
    for bucket, thread in running:
        bucket.shutdown()
        bucket.server_close()
        thread.join()


def store_of(endpoint: str, name: str = "far") -> CloudStore:
    return CloudStore(
        "s3://bucket",
        name=name,
        options={"endpoint": endpoint, "region": "us-east-1", "path_style": True},
        credentials={"access_key_id": "AKIA", "secret_access_key": "hunter2"},
    )


def run(bucket: Bucket, body: Callable[[CloudStore], Awaitable[None]]) -> None:
    async def main() -> None:
        store = store_of(bucket.endpoint)
        await body(store)
        await store.aclose()

    asyncio.run(main())


# --- what conditional puts are worth --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manners", "found"),
    [
        ("honest", Capabilities(create_only=True, compare_and_swap=True)),
        ("ignore", Capabilities(create_only=False, compare_and_swap=False)),
        ("refuse", Capabilities(create_only=False, compare_and_swap=False)),
        ("deny all", Capabilities(create_only=False, compare_and_swap=False)),
        ("no swap", Capabilities(create_only=True, compare_and_swap=False)),
    ],
)
def test_the_probe_finds_out_what_a_server_does(
    serve: Callable[..., Bucket], manners: str, found: Capabilities
) -> None:
    bucket = serve(manners)

    async def body(store: CloudStore) -> None:
        assert await store.capabilities() == found
        asked = len(bucket.log)
        assert await store.capabilities() == found
        assert len(bucket.log) == asked, "it was probed twice"
        assert bucket.objects == {}, "the probe left something"
        for allowed, put in (
            (found.create_only, store.put("k", [b"x"], mode="create")),
            (found.compare_and_swap, store.put("k", [b"y"], if_version=etag(b"x").strip('"'))),
        ):
            if allowed:
                await put
                continue
            with pytest.raises(Unsupported, match=r"store far .* lacks honest .* use another store"):
                await put
        await store.put("plain", [b"works all the same"])

    run(bucket, body)


def test_many_first_calls_probe_once(serve: Callable[..., Bucket]) -> None:
    bucket = serve()

    async def body(store: CloudStore) -> None:
        await asyncio.gather(*(store.put(f"k{number}", [b"x"], mode="create") for number in range(8)))
        assert len({line.split()[1] for line in bucket.log if PROBE_PREFIX in line}) == 1

    run(bucket, body)


def test_a_probe_that_could_not_be_made_is_made_again(serve: Callable[..., Bucket]) -> None:
    bucket = serve()
    bucket.fail["PUT"] = [(503, "SlowDown")]

    async def body(store: CloudStore) -> None:
        with pytest.raises(Unavailable):
            await store.capabilities()
        assert (await store.capabilities()).create_only

    run(bucket, body)


def test_the_remains_of_a_probe_are_not_listed(serve: Callable[..., Bucket]) -> None:
    bucket = serve()
    bucket.objects = {f"{PROBE_PREFIX}1": b"left by a dead process", ".millrace/other": b"x"}

    async def body(store: CloudStore) -> None:
        assert [info.key async for page in store.list() for info in page] == [".millrace/other"]

    run(bucket, body)


def test_a_probe_cleans_up_when_it_fails() -> None:
    class Breaking(MemoryStore):
        async def put_as_told(self, key: str, data: bytes, mode: Any, if_version: str | None) -> str:
            if data == b"fourth":
                raise Unavailable("the link went down")
            return (await self.put(key, [data], mode=mode, if_version=if_version)).version

        async def get_now(self, key: str) -> bytes:
            return bytes(await self.get(key))

    async def main() -> None:
        store = Breaking("m")
        with pytest.raises(Unavailable):
            await probe(store, "t")
        assert [page async for page in store.list()] == []

    asyncio.run(main())


# --- lost responses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["create", "swap"])
def test_a_put_done_but_not_answered_is_no_conflict(serve: Callable[..., Bucket], how: str) -> None:
    bucket = serve()

    async def body(store: CloudStore) -> None:
        await store.capabilities()
        version = (await store.put("swapped", [b"old"])).version
        layer = Retry(store, name="far", rng=random.Random(1), plan=RetryPlan(delay_s=0.001))
        bucket.hang_up_after = ["PUT"]
        if how == "create":
            info = await layer.put("created", [b"mi", b"ne"], mode="create")
        else:
            info = await layer.put("swapped", [b"mi", b"ne"], if_version=version)
        assert bytes(await store.get(info.key, version=info.version)) == b"mine"
        bucket.hang_up_after = ["PUT"]
        bucket.objects["theirs"] = b"theirs"
        with pytest.raises(AlreadyExists):
            await layer.put("theirs", [b"mine"], mode="create")

    run(bucket, body)


def test_a_conditional_put_is_sent_once_by_the_adapter(serve: Callable[..., Bucket]) -> None:
    bucket = serve()

    async def body(store: CloudStore) -> None:
        await store.capabilities()
        bucket.fail["PUT"] = [(500, "InternalError")] * 3
        with pytest.raises(Unavailable):
            await store.put("once", [b"x"], mode="create")
        assert bucket.log.count("PUT once") == 1

    run(bucket, body)


def test_two_writers_at_the_very_same_moment_are_not_yet_a_conflict(serve: Callable[..., Bucket]) -> None:
    bucket = serve()

    async def body(store: CloudStore) -> None:
        await store.capabilities()
        bucket.fail["PUT"] = [(409, "ConditionalRequestConflict")]
        with pytest.raises(Unavailable):
            await store.put("k", [b"x"], mode="create")

    run(bucket, body)


# --- what servers answer ----------------------------------------------------------------------------------


ANSWERS: list[tuple[Answer, type[StoreError], str]] = [
    ((403, "AccessDenied"), AccessDenied, "check the credentials"),
    ((401, "Unauthorized"), AccessDenied, "check the credentials"),
    ((404, "NoSuchBucket"), NotFound, "there is no such bucket"),
    ((429, "TooManyRequests"), Unavailable, "429 TooManyRequests"),
    ((500, "InternalError"), Unavailable, "500 InternalError"),
    ((503, "SlowDown"), Unavailable, "503 SlowDown"),
    ((507, "InsufficientStorage"), NoSpace, "no space left"),
    ((403, "QuotaExceeded"), NoSpace, "no space left"),
    ((400, "AuthorizationHeaderMalformed"), StoreError, "look at the store's URL and options"),
    ((501, "NotImplemented"), Unsupported, "lacks this operation"),
]


@pytest.mark.parametrize(("answer", "kind", "sentence"), ANSWERS)
def test_answers_become_kinds(
    serve: Callable[..., Bucket], answer: Answer, kind: type[StoreError], sentence: str
) -> None:
    bucket = serve()

    async def body(store: CloudStore) -> None:
        bucket.fail["PUT"] = [answer] * 9
        with pytest.raises(StoreError, match="'some/key'") as failed:
            await store.put("some/key", [b"x"])
        assert type(failed.value) is kind
        assert sentence in str(failed.value)
        assert (failed.value.store, failed.value.key) == ("far", "some/key")
        assert "hunter2" not in str(failed.value)
        assert "AKIA" not in str(failed.value)
        assert failed.value.__cause__ is None

    run(bucket, body)


def test_a_server_that_is_away() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]

    async def main() -> None:
        store = store_of(f"http://127.0.0.1:{port}")
        with pytest.raises(Unavailable, match="the server did not answer"):
            await store.head("k")

    asyncio.run(main())


# --- reading -----------------------------------------------------------------------------------------------


def test_a_large_object_comes_in_ranges_of_one_version(serve: Callable[..., Bucket]) -> None:
    bucket = serve()
    bucket.objects["big"] = random.Random(1).randbytes(40 << 20)

    async def body(store: CloudStore) -> None:
        view = await store.get("big")
        assert bytes(view) == bucket.objects["big"]
        assert view.readonly
        ranges = [line for line in bucket.log if line.startswith("GET big bytes=")]
        assert len(ranges) == 3
        assert len(await store.get_range("big", 5, 20 << 20)) == 20 << 20

    run(bucket, body)


def test_a_server_that_ignores_if_match_is_found_out_on_reading(serve: Callable[..., Bucket]) -> None:
    bucket = serve("ignore")
    bucket.objects["k"] = b"new bytes"

    async def body(store: CloudStore) -> None:
        with pytest.raises(PreconditionFailed, match="'k'"):
            await store.get("k", version="an-older-one")

    run(bucket, body)


def test_read_many_joins_neighbours(serve: Callable[..., Bucket]) -> None:
    bucket = serve()
    bucket.objects["k"] = bytes(range(256)) * 4000

    async def body(store: CloudStore) -> None:
        requests = [RangeRequest("k", at * 100, 100) for at in range(500)]
        views = await store.read_many(requests)
        assert [bytes(view) for view in views] == [bucket.objects["k"][at * 100 : at * 100 + 100] for at in range(500)]
        assert len(bucket.log) == 1

    run(bucket, body)


def test_a_key_no_bucket_can_list_is_named_as_such(serve: Callable[..., Bucket]) -> None:
    bucket = serve()
    bucket.objects = {"good": b"x", "bad//key": b"y"}

    async def body(store: CloudStore) -> None:
        with pytest.raises(Unsupported, match="empty part"):
            async for _ in store.list():
                pass

    run(bucket, body)
