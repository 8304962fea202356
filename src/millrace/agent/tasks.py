"""One task, from grant to facts: the stages composed, timed and counted.

A ``TaskRunner`` lives in one process and is given everything: the plan, the compiled transforms, the stores. The CPU
work of a task runs in one thread; the event loop moves bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.agent.stopwatch import Stopwatch
from millrace.agent.threaded import in_thread
from millrace.core.errors import MillraceError, StoreError
from millrace.core.keys import task_output
from millrace.core.messages import Failure, Grant, PhaseInputs, TaskDone, TaskFacts, TaskFailed, TaskId
from millrace.core.model import Chunk, ChunkOutput, Digest, Quarantined, Receipt, Shard, digest_of, shard_key
from millrace.core.pages import encode_page, meta_parts
from millrace.core.ports import Clock, Store
from millrace.core.spec import Pipeline
from millrace.pipeline.distribute import Blob, Distributor, Place
from millrace.pipeline.formats.registry import format_named
from millrace.pipeline.outputs import decode_chunk_output, encode_chunk_output, load_output, save_output
from millrace.pipeline.pack import PackedShard, pack
from millrace.pipeline.persist import persist
from millrace.pipeline.plan import Plan
from millrace.pipeline.process import (
    Chain,
    KeyBatch,
    ProcessContext,
    ProcessCounts,
    RangedReader,
    decode_losers,
    encode_losers,
    encode_survey,
    merge_losers,
    resolve,
    survey_partition,
)
from millrace.pipeline.process.plain import plain_schema
from millrace.pipeline.reads import StoreReads
from millrace.pipeline.records import ReadContext, Records

__all__ = ["Deadline", "TaskContext", "TaskRunner"]

Deadline = Callable[[str, float], AbstractContextManager[None]]
"""Entered around every call into a user's code, with its name and its time limit in seconds."""

T = TypeVar("T")

_QUARANTINE_KEPT = 1000
"""Bad records of one chunk that are named; all of them are counted."""
_SCHEMA_BYTES = 200
"""Of a schema's words that go into the ledger with each chunk."""
_READ_AHEAD = 16
"""Task outputs fetched at once when they are read in order."""


@dataclass(frozen=True)
class TaskContext:
    """All a process needs to run the tasks of one run.

    Attributes:
        run: Its id.
        node: This node's name, for sentences.
        plan: The whole plan.
        chains: The compiled transforms, one for each source; None where there are none.
        partitions: Into how many parts the keys of a barrier are divided.
        sources: The store of each source, in the pipeline's order.
        stores: The world's stores by name.
        work: Where task outputs are kept.
        place: The placement decision.
        deadline: What watches over calls into user code.
    """

    run: int
    node: str
    pipeline: Pipeline
    plan: Plan
    chains: Sequence[Chain | None]
    partitions: int
    sources: Sequence[Store]
    stores: Mapping[str, Store]
    work: Store
    place: Place
    clock: Clock
    deadline: Deadline


@dataclass(slots=True)
class _Work:
    """What is counted while one task runs."""

    task: TaskId
    stopwatch: Stopwatch
    counts: ProcessCounts = field(default_factory=ProcessCounts)
    unreadable: int = 0
    rows_in: int = 0
    rows_out: int = 0
    bad: list[Quarantined] = field(default_factory=list)
    failed_in: str = ""

    def reject(self, record: Quarantined) -> None:
        """A bad record, from ingest or process."""
        if record.stage == "ingest":
            self.unreadable += 1
        if len(self.bad) < _QUARANTINE_KEPT:
            self.bad.append(record)

    @property
    def quarantined(self) -> int:
        return self.unreadable + self.counts.quarantined

    def first_bad(self) -> str:
        if not self.bad:
            return ""
        q = self.bad[0]
        return f"{q.path}{f' {q.position}' if q.position else ''}: {q.rule}: {q.reason}"


class TaskRunner:
    """Runs granted tasks. Every answer is an event; nothing is raised but cancellation.

    Without transforms any number of tasks may run at once; with them one at a time.
    """

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._distributor = Distributor(context.stores, context.place, context.clock)
        self._inputs: PhaseInputs | None = None

    def enter(self, inputs: PhaseInputs) -> None:
        """A phase begins; tasks granted from now on belong to it."""
        self._inputs = inputs

    async def run(self, grant: Grant) -> TaskDone | TaskFailed:
        """Do one task and say how it went."""
        clock = self._context.clock
        work = _Work(grant.task, Stopwatch(clock.monotonic_s))
        started = clock.monotonic_s()
        kind = grant.task.phase.partition("-")[0]
        does = {"survey": self._survey, "resolve": self._resolve, "main": self._main, "persist": self._persist}[kind]
        try:
            facts = await does(work)
        except MillraceError as error:
            blame = "place" if isinstance(error, StoreError) else "work"
            return TaskFailed(grant, replace(Failure.of(error, blame=blame), message=self._sentence(str(error), work)))
        except (OSError, ValueError, TypeError, KeyError, MemoryError, pa.ArrowException) as error:
            # Not one of ours: a library's answer to input nobody foresaw. It is named, and the run goes on.
            sentence = self._sentence(f"{type(error).__name__}: {error}", work)
            return TaskFailed(grant, Failure(type(error).__name__, sentence, False, "work"))
        notes = tuple(self._distributor.notes)
        self._distributor.notes.clear()
        return TaskDone(
            grant,
            replace(facts, seconds=clock.monotonic_s() - started, stages=work.stopwatch.times(), notes=notes),
        )

    async def aclose(self) -> None:
        """Close the stores and the transforms."""
        for store in (*self._context.sources, *self._context.stores.values(), self._context.work):
            await store.aclose()
        for chain in self._context.chains:
            if chain is not None:
                chain.close()

    # --- the four kinds of task ---------------------------------------------------------------------

    async def _main(self, work: _Work) -> TaskFacts:
        """A chunk: read, transform, pack, replicate."""
        chunk = self._context.plan.chunk(work.task.index)
        losers = await self._losers(chunk)
        shards: list[Shard] = []
        receipts: list[Receipt] = []
        schema: list[pa.Schema] = []

        def packed(reads: StoreReads) -> Generator[PackedShard, None, None]:
            batches = self._batches(chunk, reads, losers, work, schema)
            yield from work.stopwatch.wrap("pack", pack(batches, self._context.pipeline.shards))

        reads = self._reads(chunk)
        try:
            async with aclosing(in_thread(packed(reads))) as made:
                async for item in made:
                    work.stopwatch.add("pack", rows=item.shard.rows, size_bytes=item.shard.size_bytes)
                    shards.append(item.shard)
                    receipts += await self._distribute(item, work)
        finally:
            reads.close()
        output = ChunkOutput(
            chunk=chunk.index,
            schema=bytes(memoryview(schema[0].serialize())) if schema else b"",
            shards=tuple(shards),
            receipts=tuple(receipts),
            rows_in=work.rows_in + work.unreadable,
            bytes_in=chunk.size_bytes,
            duplicates=work.counts.duplicates,
            quarantined=work.quarantined,
            quarantine=tuple(work.bad),
        )
        return TaskFacts(
            output=await self._save(work.task, encode_chunk_output(output)),
            schema=_named(schema[0]) if schema else "",
            rows_in=output.rows_in,
            rows_out=work.rows_out,
            bytes_in=chunk.size_bytes,
            bytes_out=sum(s.size_bytes for s in shards),
            shards=len(shards),
            replicas=len(receipts),
            duplicates=output.duplicates,
            quarantined=output.quarantined,
            first_quarantined=work.first_bad(),
        )

    async def _survey(self, work: _Work) -> TaskFacts:
        """A chunk's keys at one barrier."""
        chunk = self._context.plan.chunk(work.task.index)
        barrier = int(work.task.phase.partition("-")[2])
        losers = await self._losers(chunk)
        chain = self._context.chains[chunk.source]
        assert chain is not None

        def keys(reads: StoreReads) -> list[KeyBatch]:
            context = self._process_context(chunk, losers, work, lambda _record: None)
            records = self._records(chunk, reads, work, lambda _record: None)
            return list(work.stopwatch.wrap("process", chain.survey(records, context, barrier)))

        reads = self._reads(chunk)
        try:
            found = await asyncio.to_thread(keys, reads)
        finally:
            reads.close()
        pieces = await asyncio.to_thread(encode_survey, chunk.index, self._context.partitions, found)
        return TaskFacts(
            output=await self._save(work.task, b"".join(pieces)), rows_in=work.rows_in, bytes_in=chunk.size_bytes
        )

    async def _resolve(self, work: _Work) -> TaskFacts:
        """One partition of a barrier's keys: which rows lose."""
        phase = f"survey-{work.task.phase.partition('-')[2]}"
        surveys = self._earlier(phase)
        loop = asyncio.get_running_loop()

        def losers() -> list[memoryview]:
            parts = (self._partition(phase, digest, work.task.index, loop) for _, digest in surveys)
            return encode_losers(resolve(work.stopwatch.wrap("process", parts)))

        return TaskFacts(output=await self._save(work.task, b"".join(await asyncio.to_thread(losers))))

    async def _persist(self, work: _Work) -> TaskFacts:
        """The manifest, from what all chunks came to."""
        outputs = self._earlier("main")
        started = self._context.clock.monotonic_s()
        made = await persist(self._outputs(outputs), self._context.pipeline.shards.block_rows, self._distributor)
        work.stopwatch.add(
            "persist",
            seconds=self._context.clock.monotonic_s() - started,
            rows=made.rows,
            size_bytes=sum(e.size_bytes for e in made.meta.entries),
        )
        return TaskFacts(
            output=made.manifest,
            rows_out=made.rows,
            bytes_out=made.bytes,
            shards=made.shards,
            pages=tuple(encode_page(p) for p in made.pages),
            meta_pages=tuple(encode_page(p) for p in meta_parts(made.meta)),
        )

    # --- the stages of a chunk ------------------------------------------------------------------------

    def _records(
        self, chunk: Chunk, reads: StoreReads, work: _Work, reject: Callable[[Quarantined], None]
    ) -> Iterator[Records]:
        context = self._context
        source = context.pipeline.sources[chunk.source]
        reading = ReadContext(
            source=source,
            schema=context.plan.source_schemas[chunk.source],
            reads=reads,
            reject=reject,
            max_record_bytes=context.pipeline.max_record,
        )
        work.stopwatch.add("ingest", size_bytes=chunk.size_bytes)
        for records in work.stopwatch.wrap("ingest", format_named(source.format).read(chunk, reading)):
            work.rows_in += records.batch.num_rows
            work.stopwatch.add("ingest", rows=records.batch.num_rows)
            yield records

    def _batches(
        self,
        chunk: Chunk,
        reads: StoreReads,
        losers: Sequence[npt.NDArray[np.int64]],
        work: _Work,
        schema: list[pa.Schema],
    ) -> Iterator[pa.RecordBatch]:
        records = self._records(chunk, reads, work, work.reject)
        chain = self._context.chains[chunk.source]
        if chain is None:
            batches: Iterator[pa.RecordBatch] = (r.batch for r in records)
        else:
            context = self._process_context(chunk, losers, work, work.reject)
            batches = work.stopwatch.wrap("process", chain.run(records, context))
        for batch in batches:
            if not schema:
                schema.append(plain_schema(batch.schema))
            work.rows_out += batch.num_rows
            if chain is not None:
                work.stopwatch.add("process", rows=batch.num_rows, size_bytes=batch.nbytes)
            yield batch

    async def _distribute(self, packed: PackedShard, work: _Work) -> tuple[Receipt, ...]:
        started = self._context.clock.monotonic_s()
        shard = packed.shard
        try:
            receipts = await self._distributor.distribute(
                Blob(shard.digest, shard_key(shard.digest), shard.size_bytes, packed.pieces)
            )
        except MillraceError:
            work.failed_in = "distribute"  # the thread is at another stage of the next shard already
            raise
        work.stopwatch.add(
            "distribute",
            seconds=self._context.clock.monotonic_s() - started,
            rows=shard.rows * len(receipts),
            size_bytes=shard.size_bytes * len(receipts),
        )
        return receipts

    # --- what tasks read and leave --------------------------------------------------------------------

    def _reads(self, chunk: Chunk) -> StoreReads:
        return StoreReads(self._context.sources[chunk.source], asyncio.get_running_loop())

    def _process_context(
        self,
        chunk: Chunk,
        losers: Sequence[npt.NDArray[np.int64]],
        work: _Work,
        reject: Callable[[Quarantined], None],
    ) -> ProcessContext:
        return ProcessContext(
            chunk=chunk,
            format_position=format_named(self._context.pipeline.sources[chunk.source].format).position,
            reject=reject,
            deadline=self._context.deadline,
            losers=losers,
            counts=work.counts,
        )

    def _earlier(self, phase: str) -> tuple[tuple[int, Digest], ...]:
        if self._inputs is None:
            raise ValueError(f"a task was granted before its phase began: {phase} is not known")
        return self._inputs.of(phase)

    async def _losers(self, chunk: Chunk) -> list[npt.NDArray[np.int64]]:
        """The losing rows of this chunk at each barrier resolved so far."""
        found = []
        for phase in [name for name, _ in self._inputs.outputs] if self._inputs else []:
            if phase.startswith("resolve-"):
                parts = [await self._load(phase, digest) for _, digest in self._earlier(phase)]
                found.append(merge_losers([decode_losers(part, chunk.index) for part in parts]))
        return found

    def _partition(
        self, phase: str, digest: Digest, index: int, loop: asyncio.AbstractEventLoop
    ) -> tuple[int, KeyBatch]:
        """One partition of one survey; of a large run only that is read, of a small one all, and verified."""

        def wait(work: Coroutine[Any, Any, T]) -> T:
            return asyncio.run_coroutine_threadsafe(work, loop).result()

        if self._context.partitions == 1:
            return survey_partition(wait(self._load(phase, digest)), index)
        store, key = self._context.work, task_output(self._context.run, phase, digest)
        size = wait(store.head(key)).size_bytes
        return survey_partition(RangedReader(lambda at, n: wait(store.get_range(key, at, n)), size), index)

    async def _outputs(self, outputs: Sequence[tuple[int, Digest]]) -> AsyncIterator[ChunkOutput]:
        for first in range(0, len(outputs), _READ_AHEAD):
            group = outputs[first : first + _READ_AHEAD]
            for data in await asyncio.gather(*(self._load("main", digest) for _, digest in group)):
                yield decode_chunk_output(data)

    async def _load(self, phase: str, digest: Digest) -> memoryview:
        return await load_output(self._context.work, self._context.run, phase, digest)

    async def _save(self, task: TaskId, data: bytes) -> Digest:
        return await save_output(self._context.work, self._context.run, task.phase, data)

    def _sentence(self, what: str, work: _Work) -> str:
        """An error, with all that is known of where it happened."""
        context = self._context
        stage = work.failed_in or work.stopwatch.current or work.task.phase
        if work.task.phase.startswith(("main", "survey")):
            chunk = context.plan.chunk(work.task.index)
            where = f"chunk {chunk.index} ({chunk.describe()})"
        else:
            where = f"{work.task.phase} task {work.task.index}"
        return f"{stage} failed on {where} of run {context.run} at node {context.node}: {what}"


def _named(schema: pa.Schema) -> str:
    """The schema in words; of a wide one the beginning and a digest, since it stands in the ledger once a chunk."""
    words = ", ".join(str(f) for f in schema)
    if len(words.encode()) <= _SCHEMA_BYTES:
        return words
    beginning = words.encode()[: _SCHEMA_BYTES // 2].decode(errors="ignore")
    return f"{beginning}... ({len(schema)} columns, {digest_of(words.encode())[:16]})"
