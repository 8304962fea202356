"""One task, from grant to facts: the stages composed, timed and counted.

A ``TaskRunner`` lives in one process and runs one task at a time for each slot. It is given everything: the plan,
the compiled transforms, the stores. The CPU work of a task runs in one thread; the event loop moves bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from millrace.agent.stopwatch import Stopwatch
from millrace.core.errors import MillraceError
from millrace.core.messages import Failure, Grant, PhaseInputs, TaskDone, TaskFacts, TaskFailed
from millrace.core.model import ChunkOutput, Receipt, Shard
from millrace.core.ports import Clock, Store
from millrace.core.spec import Pipeline
from millrace.pipeline.distribute import Distributor, Place
from millrace.pipeline.outputs import encode_chunk_output
from millrace.pipeline.pack import PackedShard, pack
from millrace.pipeline.plan import Plan
from millrace.pipeline.process.chain import Chain

__all__ = ["Deadline", "TaskContext", "TaskRunner"]

Deadline = Callable[[str, float], AbstractContextManager[None]]
"""Entered around every call into a user's code, with its name and its time limit in seconds."""

_SHARDS_IN_HAND = 2
"""Packed shards of one task that may wait for or be in distribution: the bound on its memory."""
_QUARANTINE_KEPT = 1000
"""Bad records of one chunk that are named; all of them are counted."""
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


class TaskRunner:
    """Runs granted tasks. Every answer is an event; nothing is raised but cancellation."""

    def __init__(self, context: TaskContext) -> None:
        self._context = context
        self._distributor = Distributor(context.stores, context.place, context.clock)
        self._inputs: PhaseInputs | None = None
        self._losers: dict[int, dict[int, npt.NDArray[np.int64]]] = {}

    def enter(self, inputs: PhaseInputs) -> None:
        """A phase begins."""
        self._inputs = inputs
        self._losers.clear()

    async def run(self, grant: Grant) -> TaskDone | TaskFailed:
        """Do one task and say how it went."""
        work = _Work(grant.task, Stopwatch(self._context.clock.monotonic_s))
        started = self._context.clock.monotonic_s()
        kind = grant.task.phase.partition("-")[0]
        does = {"survey": self._survey, "resolve": self._resolve, "main": self._main, "persist": self._persist}[kind]
        try:
            facts = await does(work)
        except MillraceError as error:
            return TaskFailed(grant, self._failure(error, work))
        except (OSError, ValueError, TypeError, KeyError, MemoryError, pa.ArrowException) as error:
            # Not one of ours: a library's answer to input nobody foresaw. It is named, and the run goes on.
            sentence = self._sentence(f"{type(error).__name__}: {error}", work)
            return TaskFailed(grant, Failure(type(error).__name__, sentence, False, "work"))
        return TaskDone(grant, work.complete(facts, self._context.clock.monotonic_s() - started, self._take_notes()))

    # --- the four kinds of task ---------------------------------------------------------------------

    async def _main(self, work: _Work) -> TaskFacts:
        chunk = self._context.plan.chunk(work.task.index)
        losers = await self._losers_of(chunk.index, self._barriers(chunk))
        shards: list[Shard] = []
        receipts: list[Receipt] = []
        schema = b""

        def packed() -> Iterator[PackedShard]:
            nonlocal schema
            for batch in self._processed(chunk, work, losers):
                if not schema:
                    schema = bytes(memoryview(batch.schema.remove_metadata().serialize()))
                work.rows_out += batch.num_rows
                work.stopwatch.add("process", rows=batch.num_rows, size_bytes=batch.nbytes)
                yield batch

        made = work.stopwatch.wrap("pack", pack(packed(), self._context.pipeline.shards))
        async for shard in _in_thread(made):
            work.stopwatch.add("pack", rows=shard.shard.rows, size_bytes=shard.shard.size_bytes)
            shards.append(shard.shard)
            receipts += await self._distribute(shard, work)
        output = ChunkOutput(
            chunk=chunk.index,
            schema=schema,
            shards=tuple(shards),
            receipts=tuple(receipts),
            rows_in=work.rows_in,
            bytes_in=chunk.size_bytes,
            duplicates=work.duplicates,
            quarantined=work.quarantined,
            quarantine=tuple(work.quarantine),
        )
        digest = await self._save(work.task, encode_chunk_output(output))
        return TaskFacts(
            output=digest,
            schema=str(pa.ipc.read_schema(pa.py_buffer(schema))).replace("\n", ", ") if schema else "",
            shards=len(shards),
            replicas=len(receipts),
            bytes_in=chunk.size_bytes,
            bytes_out=sum(s.size_bytes for s in shards),
        )
