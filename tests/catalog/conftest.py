"""A small world in memory in which datasets are made, broken, mended and collected."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pytest

from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.verify import verify
from millrace.control.ledger import encode_facts
from millrace.control.versions import commit_version
from millrace.coord.memory import MemoryCoordination
from millrace.core.errors import ReadOnly, Unavailable
from millrace.core.facts import Lineage, RunRecord, VersionRecord, encode
from millrace.core.keys import dataset_lease, ledger_page, run_lease, run_record, work_plan
from millrace.core.messages import TaskFacts
from millrace.core.model import ChunkOutput, Digest, Receipt, Shard, StoreSite
from millrace.core.ports import Bytes, Lease, ObjectInfo, Write
from millrace.core.spec import Placement, Shards
from millrace.decide.placement import place
from millrace.pipeline.distribute import Blob, Distributor
from millrace.pipeline.outputs import encode_chunk_output, save_output
from millrace.pipeline.pack import pack
from millrace.pipeline.persist import Persisted, persist
from millrace.stores.memory import MemoryStore

SITES = (
    StoreSite("aws", "aws", "us-east-1", "us"),
    StoreSite("gcp", "gcp", "us-central1", "us"),
    StoreSite("az", "azure", "westeurope", "eu"),
    StoreSite("ibm", "ibm", "us-south", "us"),
)


class FakeClock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.ms

    def monotonic_s(self) -> float:
        return self.ms / 1000

    def now_ns(self) -> int:
        return self.ms * 1_000_000


class TestStore(MemoryStore):
    """A memory store that can be unplugged or made read-only, and whose objects can be spoilt."""

    __test__ = False

    def __init__(self, name: str, clock: FakeClock) -> None:
        super().__init__(name, now_ns=clock.now_ns)
        self.name = name
        self.down = False
        self.read_only = False
        self.puts: list[str] = []
        self.reads = 0

    def _check(self, key: str) -> None:
        self.reads += 1
        if self.down:
            raise Unavailable(f"store {self.name} refused the connection", store=self.name, key=key)

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: Literal["overwrite", "create"] = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        self._check(key)
        if self.read_only:
            raise ReadOnly(f"store {self.name} takes no writes", store=self.name, key=key)
        self.puts.append(key)
        return await super().put(key, data, mode=mode, if_version=if_version)

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        self._check(key)
        return await super().get(key, version=version)

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        self._check(key)
        return await super().get_range(key, start, length, version=version)

    async def head(self, key: str) -> ObjectInfo:
        self._check(key)
        return await super().head(key)

    async def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        self._check(prefix)
        async for page in super().list(prefix):
            yield page

    async def delete(self, key: str) -> None:
        self._check(key)
        await super().delete(key)

    async def spoil(self, key: str, how: str) -> None:
        """``flip`` a byte, ``delete``, ``truncate`` or ``grow`` an object behind everybody's back."""
        data = bytearray(await MemoryStore.get(self, key))
        if how == "delete":
            await MemoryStore.delete(self, key)
            return
        if how == "flip":
            data[len(data) // 2] ^= 1
        await MemoryStore.put(self, key, [{"flip": data, "truncate": data[:-7], "grow": data + b"x"}[how]])

    async def keys(self, prefix: str = "") -> set[str]:
        return {info.key async for page in MemoryStore.list(self, prefix) for info in page}


@dataclass(frozen=True)
class Made:
    """A dataset version that was made."""

    record: VersionRecord
    unchanged: bool
    outputs: tuple[ChunkOutput, ...]

    @property
    def shards(self) -> list[str]:
        return [f"shards/{s.digest[:2]}/{s.digest}.arrow" for o in self.outputs for s in o.shards]


class Scene:
    """Four clouds, a coordination store, a work store and a clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.stores = {site.name: TestStore(site.name, self.clock) for site in SITES}
        self.sites: tuple[StoreSite, ...] = SITES
        self.work = TestStore("work", self.clock)
        self.coord = MemoryCoordination()
        self.runs = 0

    def batch(self, chunk: int, rows: int = 40) -> pa.RecordBatch:
        """Rows that depend on ``chunk`` alone."""
        return pa.record_batch(
            {"id": [chunk * 1000 + i for i in range(rows)], "text": [f"{chunk}/{i}" * 9 for i in range(rows)]}
        )

    def distributor(self, policy: Placement) -> Distributor:
        def placed(digest: Digest, keep: Any, without: Any) -> list[str]:
            return [s.name for s in place(digest, self.sites, policy, keep=keep, without=without)]

        return Distributor(self.stores, placed, self.clock)

    async def chunk(self, chunk: int, distributor: Distributor, rows: int = 40) -> ChunkOutput:
        """Pack and distribute one chunk."""
        shards: list[Shard] = []
        receipts: list[Receipt] = []
        schema = b""
        for packed in pack([self.batch(chunk, rows)], Shards(size=1024, block_rows=10)):
            shards.append(packed.shard)
            blob = Blob(
                packed.shard.digest,
                f"shards/{packed.shard.digest[:2]}/{packed.shard.digest}.arrow",
                packed.shard.size_bytes,
                packed.pieces,
            )
            receipts += await distributor.distribute(blob)
            schema = bytes(memoryview(self.batch(chunk).schema.serialize()))
        return ChunkOutput(chunk, schema, tuple(shards), tuple(receipts), rows, rows * 10, 0, 0)

    async def persist(self, outputs: Sequence[ChunkOutput], distributor: Distributor) -> Persisted:
        async def each() -> AsyncIterator[ChunkOutput]:
            for output in outputs:
                yield output

        return await persist(each(), 10, distributor)

    async def lease(self, dataset: str) -> Lease:
        return await self.coord.acquire(dataset_lease(dataset), "test", 10_000, now_ms=self.clock.ms)

    async def make(
        self, chunks: Sequence[int], dataset: str = "set", *, policy: Placement | None = None, rows: int = 40
    ) -> Made:
        """Make a version of these chunks."""
        rules = policy or Placement()
        distributor = self.distributor(rules)
        outputs = [await self.chunk(c, distributor, rows) for c in chunks]
        made = await self.persist(outputs, distributor)
        self.runs += 1
        record, unchanged = await self.commit(made, dataset, rules, self.runs)
        return Made(record, unchanged, tuple(outputs))

    async def commit(
        self, made: Persisted, dataset: str, policy: Placement, run: int, guard: Lease | None = None
    ) -> tuple[VersionRecord, bool]:
        return await commit_version(
            self.coord,
            dataset=dataset,
            manifest=made.manifest,
            run=run,
            created_at_ms=self.clock.ms,
            rows=made.rows,
            size_bytes=made.bytes,
            shards=made.shards,
            placement=policy.model_dump(mode="json"),
            lineage=lineage(),
            pages=made.pages,
            meta=made.meta,
            guard=guard or await self.lease(dataset),
        )

    async def open(self, record: VersionRecord) -> OpenManifest:
        return await open_manifest(self.coord, self.stores, self.sites, record)

    async def verify(self, record: VersionRecord, **options: Any) -> Any:
        return await verify(self.coord, self.stores, self.sites, record, who="tester", clock=self.clock, **options)

    def holders(self, made: Made, key: str) -> list[str]:
        """The stores that got a receipt for this shard, in the order they were read from."""
        digest = key.split("/")[-1].removesuffix(".arrow")
        names = {r.store for o in made.outputs for r in o.receipts if r.digest == digest}
        return [s.name for s in self.sites if s.name in names]

    async def start_run(
        self, run: int, chunks: Sequence[int], *, state: str = "running", alive: bool = True
    ) -> list[str]:
        """A run with these chunks in its ledger; gives the keys of its shards."""
        record = run_fact(run, state, self.clock.ms, len(chunks))
        distributor = self.distributor(Placement())
        entries, keys = {}, []
        if alive:
            await self.coord.acquire(run_lease(run), f"process {run}", 10_000, now_ms=self.clock.ms)
        for i, chunk in enumerate(chunks):
            output = await self.chunk(chunk, distributor)
            keys += [f"shards/{s.digest[:2]}/{s.digest}.arrow" for s in output.shards]
            digest = await save_output(self.work, run, "main", encode_chunk_output(output))
            entries[str(i)] = encode_facts(TaskFacts(digest, rows_in=40))
        await self.work.put(work_plan(run), [b"a plan"])
        await self.coord.commit(
            [
                Write(run_record(run), encode(record)),
                Write(ledger_page(run, "main", 0), json.dumps(entries).encode()),
            ]
        )
        return keys

    async def end_run(self, run: int, state: str) -> None:
        await self.coord.commit([Write(run_record(run), encode(run_fact(run, state, self.clock.ms, 1)))])
        held = await self.coord.holder(run_lease(run))
        if held is not None:
            await self.coord.release(held)


def lineage(sql: str = "SELECT 1") -> Lineage:
    return Lineage(
        sources=({"url": "file:///data", "objects": 1},),
        spec={"transforms": [{"sql": sql}]},
        spec_digest="0" * 64,
        plan_digest="1" * 64,
        code={"millrace": "0.1.0"},
    )


def run_fact(run: int, state: Any, at_ms: int, tasks: int) -> RunRecord:
    return RunRecord(
        run=run,
        dataset="set",
        state=state,
        identity="i" * 64,
        pipeline_file="pipeline.yaml",
        created_at_ms=at_ms,
        ended_at_ms=at_ms if state in {"done", "superseded", "stopped", "failed"} else None,
        phases=(("main", 0, tasks),),
        lineage=lineage(),
        placement={},
    )


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.fixture(scope="session")
def new_scene() -> type[Scene]:
    """Makes scenes, for tests that need a fresh one for each example."""
    return Scene
