"""Open a manifest of many shards in a fresh process: seconds and peak memory.

    python bench/bench_manifest.py                  # half a million shards on a local disk
    python bench/bench_manifest.py --shards 100000 --blocks 8

It makes the manifest first (with made-up digests, on a store that is a directory, with the coordination store in
SQLite), then opens it in a new process, which reads every shard's digest, size and rows as columns. The target is
half a million shards in under 2 seconds and 200 MB, interpreter and libraries included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from millrace.catalog.manifests import open_manifest
from millrace.catalog.versions import resolve
from millrace.control.versions import commit_version
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.facts import Lineage, ReplicaEntry, ReplicaPage
from millrace.core.keys import dataset_lease, manifest_key, segment_key
from millrace.core.manifest import SEGMENT_SHARDS, SegmentRef, encode_root, encode_segment
from millrace.core.model import Block, Digest, Shard, StoreSite, digest_of, shard_key
from millrace.stores.local import LocalStore

SITES = (StoreSite("disk", "onprem", "here", "us"),)
NOW_MS = 1_700_000_000_000


def made_up_digest(rng: random.Random) -> Digest:
    return Digest(rng.randbytes(32).hex())


def made_up_shards(rng: random.Random, count: int, blocks: int) -> list[Shard]:
    return [
        Shard(
            made_up_digest(rng),
            64_000_000 + rng.randrange(1_000_000),
            blocks * 1024,
            tuple(Block(1000 + i * 4_000_000, 4_000_000, 1024, made_up_digest(rng)) for i in range(blocks)),
        )
        for _ in range(count)
    ]


async def make(root: Path, shards: int, blocks: int) -> None:
    """Write the manifest, its version and its replica pages."""
    store = LocalStore(root / "store", name="disk")
    coord = SqliteCoordination(root / "coord.sqlite")
    rng = random.Random(1)
    refs: list[SegmentRef] = []
    meta: list[ReplicaEntry] = []
    pages: list[ReplicaPage] = []

    async def keep(data: bytes, *, is_root: bool = False) -> Digest:
        digest = digest_of(data)
        key = manifest_key(digest) if is_root else segment_key(digest)
        await store.put(key, [data])
        meta.append(ReplicaEntry(digest=digest, key=key, size_bytes=len(data), stores={"disk": NOW_MS}))
        return digest

    for start in range(0, shards, SEGMENT_SHARDS):
        some = made_up_shards(rng, min(SEGMENT_SHARDS, shards - start), blocks)
        segment, index = encode_segment(some)
        refs.append(
            SegmentRef(
                digest=await keep(segment),
                size_bytes=len(segment),
                blocks=await keep(index),
                blocks_size_bytes=len(index),
                shards=len(some),
                rows=sum(s.rows for s in some),
                bytes=sum(s.size_bytes for s in some),
            )
        )
        entries = [
            ReplicaEntry(digest=s.digest, key=shard_key(s.digest), size_bytes=s.size_bytes, stores={"disk": NOW_MS})
            for s in some
        ]
        pages.append(ReplicaPage(entries=tuple(entries)))
    manifest = await keep(encode_root(None, 1024, refs), is_root=True)
    await commit_version(
        coord,
        dataset="bench",
        manifest=manifest,
        run=1,
        created_at_ms=NOW_MS,
        rows=sum(r.rows for r in refs),
        size_bytes=sum(r.bytes for r in refs),
        shards=shards,
        placement={"replicas": 1, "min_clouds": 1},
        lineage=Lineage(sources=(), spec={}, spec_digest="", plan_digest="", code={}),
        pages=pages,
        meta=ReplicaPage(entries=tuple(meta)),
        guard=await coord.acquire(dataset_lease("bench"), "bench", 60_000, now_ms=NOW_MS),
    )
    await coord.aclose()
    await store.aclose()


async def read(root: Path) -> dict[str, float]:
    """Open it and go through all columns."""
    store = LocalStore(root / "store", name="disk")
    coord = SqliteCoordination(root / "coord.sqlite")
    started = time.perf_counter()
    opened = await open_manifest(coord, {"disk": store}, SITES, await resolve(coord, "bench"))
    root_s = time.perf_counter() - started
    shards = size = 0
    check = 0
    async for _, segment in opened.segments():
        shards += len(segment)
        size += int(segment.sizes.sum())
        check ^= int(segment.digests.view("<u8").sum()) ^ int(segment.rows.sum())
    seconds = time.perf_counter() - started
    await coord.aclose()
    await store.aclose()
    return {"shards": shards, "bytes": size, "check": check, "root_s": root_s, "seconds": seconds}


def peak_rss_mb() -> float:
    """Of this process, since it began. (``getrusage`` would count the parent that it was forked from.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=500_000)
    parser.add_argument("--blocks", type=int, default=2, help="blocks in a shard; they lie apart and are not read")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        before = peak_rss_mb()
        print(json.dumps({**asyncio.run(read(args.read)), "import_mb": before, "peak_mb": peak_rss_mb()}))
        return
    with tempfile.TemporaryDirectory(prefix="bench-manifest-") as folder:
        started = time.perf_counter()
        asyncio.run(make(Path(folder), args.shards, args.blocks))
        print(f"made a manifest of {args.shards:,} shards in {time.perf_counter() - started:.1f} s")
        results = []
        for _ in range(args.repeat):
            done = subprocess.run(
                [sys.executable, os.path.abspath(__file__), "--read", folder], check=True, capture_output=True
            )
            results.append(json.loads(done.stdout))
        if any(r["shards"] != args.shards for r in results):
            raise SystemExit("not every shard was read")
        results.sort(key=lambda r: r["seconds"])
        median = results[len(results) // 2]
        print(f"opened and read: {median['seconds']:.2f} s (root alone {median['root_s'] * 1000:.0f} ms), median")
        print(f"peak memory: {max(r['peak_mb'] for r in results):.0f} MB ({median['import_mb']:.0f} after imports)")


if __name__ == "__main__":
    main()
