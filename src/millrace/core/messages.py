"""What passes between the control loop, the scheduler and the nodes: grants out, events in.

Everything here is a plain frozen value: it can be pickled between a process and its own children, and
encoded for a wire by the ``wire`` layer when there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from millrace.core.errors import MillraceError
from millrace.core.model import Digest, StageTime

__all__ = [
    "Control",
    "Failure",
    "Grant",
    "NodeEvent",
    "Phase",
    "PhaseInputs",
    "TaskDone",
    "TaskFacts",
    "TaskFailed",
    "TaskId",
]


class Control(StrEnum):
    """What an operator asked of a run."""

    RUN = "run"
    PAUSE = "pause"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Phase:
    """One pass over the run's tasks; the next begins when all of this one are done.

    ``survey`` writes the keys of a ``dedup`` or ``unique`` barrier, ``resolve`` decides which rows lose,
    ``main`` makes shards and replicas, ``persist`` makes the manifest.

    Attributes:
        kind: One of those four words.
        barrier: Which key barrier of the pipeline, from 0; 0 for the others.
        tasks: How many.
    """

    kind: str
    barrier: int
    tasks: int

    @property
    def name(self) -> str:
        """``main``, ``survey-0`` ...: used in ledger keys."""
        return f"{self.kind}-{self.barrier}" if self.kind in {"survey", "resolve"} else self.kind


@dataclass(frozen=True, slots=True)
class TaskId:
    """One task: its phase's name and its index in that phase (the chunk's index, or the partition's)."""

    phase: str
    index: int


@dataclass(frozen=True, slots=True)
class Grant:
    """A task granted to a node.

    Attributes:
        task: Which.
        node: To whom.
        attempt: From 1. The first answer wins; an answer to an older attempt is as good.
        epoch: The run lease's fencing epoch under which it was granted.
    """

    task: TaskId
    node: str
    attempt: int
    epoch: int


@dataclass(frozen=True, slots=True)
class PhaseInputs:
    """What the tasks of a phase need to know of the phases before: sent to every node when a phase begins.

    Attributes:
        phase: The phase that begins.
        outputs: For each earlier phase it reads: its name and the outputs of its tasks, 32 bytes a task in
            order of index; 32 zero bytes where a chunk was set aside.
    """

    phase: str
    outputs: tuple[tuple[str, bytes], ...]

    def of(self, phase: str) -> tuple[tuple[int, Digest], ...]:
        """(index, digest of its output) of each finished task of ``phase``."""
        packed = dict(self.outputs)[phase]
        digests = (packed[i : i + 32] for i in range(0, len(packed), 32))
        return tuple((i, Digest(d.hex())) for i, d in enumerate(digests) if any(d))


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """What is known of a finished task: a digest, sizes and counts, never bytes.

    Attributes:
        output: Digest of the object that holds the details (a ``ChunkOutput``, key partitions, a manifest).
        schema: Digest of the output schema, or ``""`` when there were no rows.
        seconds: Wall time of the task on its node.
        first_quarantined: One sentence about the first bad record, for the message of a run that stops.
        notes: Sentences for the run's report: a store that failed while the work went on elsewhere.
        pages, meta_pages: Of ``persist`` only: encoded replica pages, of the segments and of the manifest's own
            objects.
    """

    output: Digest
    schema: str = ""
    rows_in: int = 0
    rows_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    shards: int = 0
    replicas: int = 0
    duplicates: int = 0
    quarantined: int = 0
    seconds: float = 0.0
    stages: tuple[StageTime, ...] = ()
    first_quarantined: str = ""
    notes: tuple[str, ...] = ()
    pages: tuple[bytes, ...] = ()
    meta_pages: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """An error, as a value.

    Attributes:
        kind: The error's class name.
        message: Its sentence.
        retryable: Whether another attempt may succeed.
        blame: ``work`` when the task itself is at fault (its input, its transform), ``place`` when the
            node, a link or a store is. Only the first counts against the task's budget of attempts.
        exit_code: What a run that fails of it exits with.
    """

    kind: str
    message: str
    retryable: bool
    blame: str
    exit_code: int = 1

    @classmethod
    def of(cls, error: MillraceError, *, blame: str) -> Failure:
        """The failure that stands for ``error``."""
        return cls(error.kind, str(error), error.retryable, blame, error.exit_code)


@dataclass(frozen=True, slots=True)
class TaskDone:
    """A node finished a task."""

    grant: Grant
    facts: TaskFacts


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A node could not finish a task."""

    grant: Grant
    failure: Failure


NodeEvent = TaskDone | TaskFailed
