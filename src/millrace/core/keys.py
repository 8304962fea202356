"""Every key Millrace writes in the coordination store and every path it writes in a store, in one place.

Coordination::

    counters/runs                               the last run id
    counters/datasets/<name>                    the highest version number a dataset ever had
    datasets/<name>/head                        VersionRef: the newest version
    datasets/<name>/versions/<8 digits>         VersionRecord
    runs/<8 digits>/record                      RunRecord
    runs/<8 digits>/control                     what an operator asked: run, pause or stop
    runs/<8 digits>/progress                    RunProgress, about once a second while it runs
    runs/<8 digits>/ledger/<phase>/<6 digits>   a page of task facts
    replicas/<manifest digest>/<6 digits>       a ReplicaPage: one for each segment, and ``meta``
    readers/<manifest digest>/<reader id>       somebody reads this version until then
    checkpoints/<name>/<12 digits>              CheckpointRecord: one step of a training run
    gc/marks                                    objects nobody names, and since when
    adopted/<store name>                        AdoptedStore: files that were adopted where they lie, to be read only

Leases: ``run/<id>`` (who drives a run), ``dataset/<name>`` (who may add a version), ``gc``, ``checkpoints/<name>``
(who writes or removes checkpoints), ``checkpoints/<name>/<12 digits>`` (who replicates one).

Stores::

    shards/ab/<digest>.arrow                    a shard
    manifests/<digest>.json                     a manifest's root
    manifests/segments/<digest>.arrow           a segment: its shards, or their blocks
    checkpoints/<name>/<12 digits>-<8 letters>.json   a checkpoint's manifest, by its step and digest
    checkpoints/<name>/objects/ab/<digest>      a file of a checkpoint, or a part of a large one

The work store of a run (scratch)::

    runs/<8 digits>/plan.arrow                  the plan
    runs/<8 digits>/<phase>/<digest>            a task's output
"""

from __future__ import annotations

from millrace.core.model import Digest

__all__ = [
    "ADOPTED",
    "GC_LEASE",
    "GC_MARKS",
    "RUN_COUNTER",
    "checkpoint_folder",
    "checkpoint_lease",
    "checkpoint_manifest",
    "checkpoint_object",
    "checkpoint_record",
    "dataset_head",
    "dataset_lease",
    "dataset_version",
    "ledger_page",
    "ledger_prefix",
    "manifest_key",
    "reader",
    "replica_page",
    "run_control",
    "run_lease",
    "run_prefix",
    "run_progress",
    "run_record",
    "segment_key",
    "task_output",
    "work_plan",
]

RUN_COUNTER = "counters/runs"
GC_LEASE = "gc"
GC_MARKS = "gc/marks"
ADOPTED = "adopted/"


def adopted_store(name: str) -> str:
    """Key of a place whose files were adopted."""
    return f"{ADOPTED}{name}"


def dataset_head(name: str) -> str:
    """Key of a dataset's head."""
    return f"datasets/{name}/head"


def dataset_version(name: str, version: int) -> str:
    """Key of one version's record."""
    return f"datasets/{name}/versions/{version:08d}"


def dataset_lease(name: str) -> str:
    """Lease of the one run that may add a version."""
    return f"dataset/{name}"


def run_prefix(run: int) -> str:
    """Prefix of all that belongs to a run, in coordination and in the work store."""
    return f"runs/{run:08d}/"


def run_record(run: int) -> str:
    """Key of a run's record."""
    return f"{run_prefix(run)}record"


def run_control(run: int) -> str:
    """Key of what an operator asked of a run."""
    return f"{run_prefix(run)}control"


def run_progress(run: int) -> str:
    """Key of a run's latest progress."""
    return f"{run_prefix(run)}progress"


def run_lease(run: int) -> str:
    """Lease of the process that drives a run."""
    return f"run/{run:08d}"


def ledger_page(run: int, phase: str, page: int) -> str:
    """Key of one page of a phase's finished tasks."""
    return f"{ledger_prefix(run, phase)}{page:06d}"


def ledger_prefix(run: int, phase: str) -> str:
    """Prefix of all pages of a phase."""
    return f"{run_prefix(run)}ledger/{phase}/"


def replica_page(manifest: Digest, page: int | str) -> str:
    """Key of where a segment's shards lie; page ``meta`` is the manifest's own objects."""
    return f"replicas/{manifest}/{page:06d}" if isinstance(page, int) else f"replicas/{manifest}/{page}"


def reader(manifest: Digest, reader_id: str) -> str:
    """Key of one reader's claim on a version."""
    return f"readers/{manifest}/{reader_id}"


def manifest_key(digest: Digest) -> str:
    """Where a manifest's root lies in a store."""
    return f"manifests/{digest}.json"


def segment_key(digest: Digest) -> str:
    """Where a manifest's segment (or its blocks) lies in a store."""
    return f"manifests/segments/{digest}.arrow"


def checkpoint_folder(name: str) -> str:
    """Prefix of all checkpoints of one name, in coordination and in every store."""
    return f"checkpoints/{name}/"


def checkpoint_record(name: str, step: int) -> str:
    """Key of what is known of one step's checkpoint."""
    return f"{checkpoint_folder(name)}{step:012d}"


def checkpoint_lease(name: str, step: int | None = None) -> str:
    """Lease of who writes or removes checkpoints of a name; with a step, of who replicates that one."""
    return f"checkpoints/{name}" if step is None else f"checkpoints/{name}/{step:012d}"


def checkpoint_manifest(name: str, step: int, digest: Digest) -> str:
    """Where a checkpoint's manifest lies in every store."""
    return f"{checkpoint_folder(name)}{step:012d}-{digest[:8]}.json"


def checkpoint_object(name: str, digest: Digest) -> str:
    """Where a file of a checkpoint, or a part of one, lies in every store."""
    return f"{checkpoint_folder(name)}objects/{digest[:2]}/{digest}"


def work_plan(run: int) -> str:
    """Where a run's plan lies in the work store."""
    return f"{run_prefix(run)}plan.arrow"


def task_output(run: int, phase: str, digest: Digest) -> str:
    """Where a task's output lies in the work store."""
    return f"{run_prefix(run)}{phase}/{digest}"
