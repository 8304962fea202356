"""The records kept in the coordination store, as JSON: versions, runs, progress, replicas."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from millrace.core.errors import CoordError

__all__ = [
    "CheckpointFile",
    "CheckpointManifest",
    "CheckpointPart",
    "CheckpointRecord",
    "Lineage",
    "QuarantineLine",
    "ReaderClaim",
    "ReplicaEntry",
    "ReplicaPage",
    "RunProgress",
    "RunRecord",
    "RunReport",
    "StageReport",
    "VersionRecord",
    "VersionRef",
    "decode",
    "encode",
]

F = TypeVar("F", bound="Fact")

RunState = Literal["running", "paused", "stopped", "failed", "done", "superseded"]


class Fact(BaseModel):
    """Frozen; unknown keys are kept out, so that an older Millrace says so instead of guessing."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def encode(fact: Fact) -> bytes:
    """Compact JSON."""
    return fact.model_dump_json(exclude_none=True).encode()


def decode(kind: type[F], value: bytes, *, key: str) -> F:
    """The record in ``value``.

    Raises:
        CoordError: it isn't one; names the key.
    """
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = f"{'.'.join(str(p) for p in detail['loc'])}: " if detail["loc"] else ""
        raise CoordError(
            f"the record at {key} is not a {kind.__name__} this version can read: {where}{detail['msg']}"
        ) from error


class AdoptedStore(Fact):
    """A place whose files were adopted: read by datasets, and never written to.

    Attributes:
        name: What replica pages call it.
        url: Absolute, without credentials.
        options: What the adapter takes; never a secret.
        cloud, region, jurisdiction: Its site.
    """

    name: str
    url: str
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    cloud: str
    region: str
    jurisdiction: str


class VersionRef(Fact):
    """A dataset's head: the newest version and its digest."""

    version: int
    digest: str


class Lineage(Fact):
    """Where a version came from.

    Attributes:
        sources: URL, format, objects and bytes of each source.
        spec: The pipeline as it was validated.
        spec_digest, plan_digest: SHA-256 of the canonical spec and of the plan.
        code: ``millrace`` and library versions, and the SHA-256 of each transform module's file.
    """

    sources: tuple[dict[str, Any], ...]
    spec: dict[str, Any]
    spec_digest: str
    plan_digest: str
    code: dict[str, str]


class VersionRecord(Fact):
    """One version of a dataset.

    Attributes:
        digest: Of its manifest: the version's true name.
        bytes: Of all shards, one replica each.
        placement: The policy it was made under; repair keeps to it.
    """

    dataset: str
    version: int
    digest: str
    run: int
    created_at_ms: int
    rows: int
    bytes: int
    shards: int
    placement: dict[str, Any]
    lineage: Lineage


class StageReport(Fact):
    """One stage's work, summed over tasks and workers."""

    stage: str
    seconds: float
    rows: int
    bytes: int

    @property
    def mb_per_s(self) -> float:
        """Megabytes a second of work."""
        return self.bytes / 1e6 / self.seconds if self.seconds > 0 else 0.0


class QuarantineLine(Fact):
    """One record or chunk set aside, as a person reads it."""

    path: str
    position: str
    stage: str
    rule: str
    reason: str


class RunReport(Fact):
    """What a run did: the final report on screen and ``--json``."""

    run: int
    state: str
    dataset: str
    version: int | None = None
    digest: str | None = None
    unchanged: bool = False
    chunks: int = 0
    chunks_done: int = 0
    rows: int = 0
    rows_in: int = 0
    shards: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    replicas: int = 0
    duplicates: int = 0
    quarantined: int = 0
    quarantined_chunks: int = 0
    seconds: float = 0.0
    stages: tuple[StageReport, ...] = ()
    quarantine: tuple[QuarantineLine, ...] = ()
    error: str | None = None
    notes: tuple[str, ...] = ()


class RunRecord(Fact):
    """One execution of a pipeline.

    Attributes:
        identity: SHA-256 of the spec, the plan and the transforms' code: the same work has the same one.
        pipeline_file: As it was given.
        phases: (kind, barrier, tasks) in order.
        exit_code: What the command exits with, once it ended.
    """

    run: int
    dataset: str
    state: RunState
    identity: str
    pipeline_file: str
    created_at_ms: int
    ended_at_ms: int | None = None
    phases: tuple[tuple[str, int, int], ...]
    lineage: Lineage
    placement: dict[str, Any]
    report: RunReport | None = None
    exit_code: int | None = None


class RunProgress(Fact):
    """How far a run is, for other terminals."""

    phase: str
    done: int
    tasks: int
    bytes_done: int
    bytes_total: int
    rows: int
    quarantined: int
    bytes_per_s: float
    workers: int
    at_ms: int
    eta_s: float | None = None


class ReplicaEntry(Fact):
    """Where one object lies.

    Attributes:
        digest: SHA-256 of its bytes.
        key: Its path in every store.
        size_bytes: Its length.
        stores: Store name to when it was last read back whole, milliseconds since 1970.
    """

    digest: str
    key: str
    size_bytes: int
    stores: dict[str, int] = Field(default_factory=dict)


class ReplicaPage(Fact):
    """The replicas of one segment's shards, in manifest order, or of the manifest's own objects."""

    entries: tuple[ReplicaEntry, ...]


class ReaderClaim(Fact):
    """Somebody reads a version; garbage collection leaves it alone until then."""

    who: str
    until_ms: int


class CheckpointPart(Fact):
    """An object that holds a file of a checkpoint, or a part of one.

    Attributes:
        digest: SHA-256 of its bytes.
        size_bytes: Its length.
    """

    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class CheckpointFile(Fact):
    """One file of a checkpoint.

    Attributes:
        path: Relative to the checkpoint's folder, ``/`` between parts.
        size_bytes: Its length.
        digest: SHA-256 of all of it.
        parts: The objects that hold it, in order; none for an empty file.
    """

    path: str
    size_bytes: int = Field(ge=0)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    parts: tuple[CheckpointPart, ...]


class CheckpointManifest(Fact):
    """A checkpoint: what it consists of, and where the loader was.

    Attributes:
        name: Of the series, as ``millrace.checkpoints`` got it.
        step: Of the training run.
        created_at_ms: Milliseconds since 1970. Not a part of what the checkpoint is: the same saved again is the same.
        kind: ``torch`` when it was written by torch.distributed.checkpoint, else ``files``.
        world_size: How many ranks wrote it.
        files: In the order of their paths.
        folders: Those that nothing lies in.
        loader_state: What a loader's ``state_dict`` gave, or None.
        parent: The digest of the checkpoint it builds on. Always None so far: every checkpoint is whole by itself.
    """

    format: Literal["millrace-checkpoint/1"] = "millrace-checkpoint/1"
    name: str
    step: int = Field(ge=0)
    created_at_ms: int
    kind: Literal["files", "torch"] = "files"
    world_size: int = Field(default=1, ge=1)
    files: tuple[CheckpointFile, ...]
    folders: tuple[str, ...] = ()
    loader_state: Any = None
    parent: None = None

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.size_bytes for file in self.files)


class CheckpointRecord(Fact):
    """What is known of one step's checkpoint. A help, not the truth: that lies in the stores.

    Attributes:
        digest: What it is; see :func:`millrace.catalog.checkpoint_manifest.identity`.
        state: ``local`` until the policy's replicas were read back.
        stores: Store name to when it was last read back whole, milliseconds since 1970.
        placement: The policy it is replicated under.
    """

    name: str
    step: int
    digest: str
    created_at_ms: int
    size_bytes: int
    files: int
    state: Literal["local", "replicated"] = "local"
    stores: dict[str, int] = Field(default_factory=dict)
    pinned: bool = False
    placement: dict[str, Any]
