"""From URLs to stores, and what is said of URLs that are wrong."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from millrace.core.errors import NotFound, Unavailable, UsageError
from millrace.core.ports import Store
from millrace.stores.layers import Fault, FaultPlan, FaultRates, RetryPlan
from millrace.stores.memory import MemoryRegistry
from millrace.stores.open import Layers
from millrace.stores.open import open as open_store
from millrace.stores.walk import WalkRules
from millrace.telemetry.metrics import StoreMetrics


def url_of(url: str, **more: Any) -> str:
    store = open_store(url, name="s", **more)
    try:
        return store.url
    finally:
        asyncio.run(store.aclose())


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("file:///data/corpus", "file:///data/corpus"),
        ("file:///data/./x/../corpus/", "file:///data/corpus"),
        ("file://./world/aws", "file:///base/world/aws"),
        ("file://../world", "file:///world"),
        ("file://.", "file:///base"),
        ("file:///with space", "file:///with%20space"),
        ("file:///with%20space", "file:///with%20space"),
        ("file:///a?b#c", "file:///a%3Fb%23c"),
        ("file:///100%25", "file:///100%25"),
        ("file:///bytes%ff", "file:///bytes%FF"),
        ("file:///日本", "file:///%E6%97%A5%E6%9C%AC"),
        ("memory://scratch", "memory://scratch"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/with space", "s3://bucket/with space"),
    ],
)
def test_urls(url: str, opened: str) -> None:
    assert url_of(url, base="/base") == opened


def test_gs_and_az_open_without_a_network() -> None:
    assert url_of("gs://bucket/p", credentials={"bearer_token": "t"}) == "gs://bucket/p"
    assert url_of("az://container/p", options={"account": "a", "anonymous": True}) == "az://container/p"


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("ftp://x/y", "its scheme 'ftp' is not known; known are memory://, file://, s3://, gs:// and az://"),
        ("/just/a/path", "has no scheme; known are"),
        ("hdfs://namenode/x", "hdfs:// comes in a later version"),
        ("cos://bucket/x", "cos:// comes in a later version"),
        ("file://world/aws", "write file:///world/aws for an absolute path or file://./world/aws"),
        ("file://./relative", "nothing says to what"),
        ("file:///50%", "write %25 for a %"),
        ("file:///a%00b", "holds a NUL"),
        ("memory://", "write memory://NAME"),
        ("s3:///prefix", "write s3://BUCKET/PREFIX"),
        ("s3://b!/prefix", "write s3://BUCKET/PREFIX"),
        ("s3://bucket/a//b", "has an empty part"),
        ("s3://bucket/../b", "has an empty part, '.' or '..'"),
    ],
)
def test_wrong_urls_are_told_what_is_right(url: str, sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_store(url, name="mine")
    assert sentence in str(refused.value)
    assert "store mine" in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["s3://AKIA:hunter2@bucket/p", "s3://hunter2@bucket", "gs://b:hunter2/p", "az://container/p?sig=hunter2"],
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="must not hold") as refused:
        open_store(url, name="mine")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "options", "sentence"),
    [
        ("s3://bucket", {"regoin": "x"}, "'regoin' is no option of s3://; known are endpoint, region"),
        ("s3://bucket", {"secret_access_key": "hunter2"}, "is no option of s3://"),
        ("s3://bucket", {"anonymous": "yes"}, "anonymous must be true or false, not str"),
        ("s3://bucket", {"region": 3}, "region must be a string, not int"),
        ("s3://bucket", {"endpoint": "https://me:hunter2@host"}, "its endpoint must not hold"),
        ("file:///x", {"region": "x"}, "file:// takes no options, not region"),
    ],
)
def test_wrong_options_are_named(url: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_store(url, name="mine", options=options)
    assert sentence in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_wrong_credentials_are_named_and_not_repeated() -> None:
    with pytest.raises(UsageError, match="colour") as refused:
        open_store("s3://bucket", name="mine", credentials={"colour": "hunter2"})
    assert "hunter2" not in str(refused.value)


def test_memory_is_shared_through_a_registry_and_not_without() -> None:
    async def main() -> None:
        registry = MemoryRegistry()
        one = open_store("memory://a", name="1", memory=registry)
        two = open_store("memory://a", name="2", memory=registry)
        other = open_store("memory://b", name="3", memory=registry)
        fresh = open_store("memory://a", name="4")
        await one.put("k", [b"x"])
        assert bytes(await two.get("k")) == b"x"
        for store in (other, fresh):
            with pytest.raises(NotFound):
                await store.get("k")

    asyncio.run(main())


def test_a_source_may_be_one_file_or_must_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "one file.bin").write_bytes(b"data")
    (tmp_path / "other").write_bytes(b"no")

    async def keys(url: str, **more: Any) -> list[str]:
        store = open_store(url, name="s", **more)
        try:
            return [info.key async for page in store.list() for info in page]
        finally:
            await store.aclose()

    source = WalkRules(must_exist=True, prune=lambda relative: relative == "skipped")
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped/x").touch()
    assert asyncio.run(keys(f"file://{tmp_path}/one file.bin", source=source)) == ["one file.bin"]
    assert sorted(asyncio.run(keys("file://.", base=tmp_path, source=source))) == ["one file.bin", "other"]
    with pytest.raises(NotFound, match="nowhere"):
        asyncio.run(keys(f"file://{tmp_path}/nowhere", source=source))
    assert asyncio.run(keys(f"file://{tmp_path}/nowhere")) == []


def test_the_layers_stand_in_their_order() -> None:
    async def main() -> None:
        registry = CollectorRegistry()

        def inside(store: Store) -> Store:
            faults = FaultPlan(per_op={"get": FaultRates(unavailable=1)})
            return Fault(store, name="s", plan=faults, rng=random.Random(1))

        layers = Layers(
            rng=random.Random(1),
            retry=RetryPlan(attempts=3, delay_s=0),
            metrics=StoreMetrics(registry),
            inside=inside,
        )
        store = open_store("memory://a", name="s", layers=layers)
        await store.put("k", [b"x"])
        with pytest.raises(Unavailable):
            await store.get("k")
        # Metrics lie outside the retries: one call, one error, two repetitions.
        labels = {"store": "s", "op": "get"}
        assert registry.get_sample_value("millrace_store_seconds_count", labels) == 1
        labels["kind"] = "Unavailable"
        assert registry.get_sample_value("millrace_store_errors_total", labels) == 1
        assert registry.get_sample_value("millrace_store_retries_total", labels) == 2
        await store.aclose()

    asyncio.run(main())


def test_disks_need_no_cloud_library_and_clouds_say_which() -> None:
    script = """
import sys
sys.modules["obstore"] = None
from millrace.core.errors import UsageError
from millrace.stores.open import open as open_store
open_store("file:///tmp", name="disk")
try:
    open_store("s3://bucket", name="far")
except UsageError as refused:
    print(refused)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "store far: cloud stores need the library obstore; run: pip install 'millrace[cloud]'\n"
