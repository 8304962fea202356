"""An S3 server that stops answering and then dies, while blocks are read from it: another store takes over."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from millrace.core.model import StoreSite, block_digest, digest_of, shard_key
from millrace.feed.events import FeedEvent
from millrace.feed.index import Extent
from millrace.feed.replicas import ReplicaReader
from millrace.stores.local import LocalStore
from millrace.stores.open import Layers
from millrace.stores.open import open as open_store

DATA = random.Random(6).randbytes(4 << 20)
BLOCK = 64 << 10
SHARD = digest_of(DATA)
KEY = shard_key(SHARD)


class Clock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        return time.monotonic()


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    endpoint: str


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{endpoint}/shelf", method="PUT"), timeout=30).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, "the server did not start"
                time.sleep(0.05)
        yield Server(process, endpoint)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("end", [signal.SIGSTOP, signal.SIGKILL], ids=["stalls", "dies"])
def test_a_server_that_goes_away_in_the_middle_is_left_for_a_disk(
    server: Server, tmp_path: Path, end: signal.Signals
) -> None:
    told: list[FeedEvent] = []

    async def main() -> list[float]:
        bucket = open_store(
            "s3://shelf/a",
            name="aws-main",
            options={"endpoint": server.endpoint, "region": "us-east-1", "path_style": True},
            credentials={"access_key_id": "test", "secret_access_key": "test"},
            layers=Layers(rng=random.Random(1)),
        )
        disk = LocalStore(tmp_path, name="gcp-main")
        for store in (bucket, disk):
            await store.put(KEY, [DATA])
        sites = [
            StoreSite("aws-main", "aws", "us-east-1", "us"),
            StoreSite("gcp-main", "gcp", "us-central1", "us"),
        ]
        waits: list[float] = []
        reader = ReplicaReader(
            {"aws-main": bucket, "gcp-main": disk},
            sites,
            here="aws/us-east-1",
            price=lambda site: 0.0,
            clock=Clock(),
            rng=random.Random(2),
            on_event=told.append,
        )

        async def read(at: int) -> None:
            began_s = time.monotonic()
            piece = DATA[at : at + BLOCK]
            wanted = Extent(SHARD, at, BLOCK, 1, block_digest(piece))
            assert await reader.read(wanted, KEY, ["aws-main", "gcp-main"]) == piece
            waits.append(time.monotonic() - began_s)

        for at in range(0, 16 * BLOCK, BLOCK):
            await read(at)
        assert reader.traffic()["aws-main"].bytes_useful >= 12 * BLOCK
        under_way = [asyncio.create_task(read(at)) for at in range(16 * BLOCK, 32 * BLOCK, BLOCK)]
        await asyncio.sleep(0.005)
        server.process.send_signal(end)
        await asyncio.gather(*under_way)
        for at in range(32 * BLOCK, 64 * BLOCK, BLOCK):
            await read(at)
        traffic = reader.traffic()
        assert traffic["aws-main"].bytes_useful + traffic["gcp-main"].bytes_useful == len(DATA)
        assert traffic["gcp-main"].bytes_useful >= 32 * BLOCK
        await reader.aclose()
        for store in (bucket, disk):
            await store.aclose()
        return waits

    waits = asyncio.run(main())
    assert len(waits) == 64
    assert any(SHARD[:12] in event.sentence and "gcp-main is" in event.sentence for event in told)
