"""Which checkpoints of a name there are: what the stores list, and what the records add."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from millrace.catalog.checkpoint_depot import Depot
from millrace.catalog.checkpoint_manifest import ManifestKey, decode_manifest, parse_key
from millrace.catalog.crew import at_once
from millrace.catalog.versions import entries
from millrace.core.errors import Conflict, CoordError, Corrupt, NotFound, StoreError, Unavailable
from millrace.core.facts import CheckpointManifest, CheckpointRecord, decode, encode
from millrace.core.keys import checkpoint_folder, checkpoint_manifest, checkpoint_record
from millrace.core.model import Digest
from millrace.core.ports import Compare, Lease, Write

__all__ = [
    "COORDINATION",
    "Known",
    "Survey",
    "change_record",
    "list_manifests",
    "read_manifest",
    "records_of",
    "survey",
]

COORDINATION: Final = "(coordination)"
"""What the coordination is called among the stores that failed."""

_CAS_ATTEMPTS: Final = 32

Listed = Mapping[str, tuple[ManifestKey, int]]
"""Key to what it says and when it was written."""


@dataclass(frozen=True, slots=True)
class Known:
    """One checkpoint, as listings and records tell. Whether it is whole, only reading it tells.

    Attributes:
        step: Of the training run.
        key: Its manifest's, in every store.
        stores: Those that list its manifest, in reading order, the local one included.
        at_ms: When it was made, as well as is known.
        record: What the coordination says; None when nothing, or of another checkpoint with this step.
    """

    step: int
    key: str
    stores: tuple[str, ...]
    at_ms: int
    record: CheckpointRecord | None

    @property
    def mark(self) -> str:
        """The first 8 letters of its digest."""
        return self.key[-13:-5]

    @property
    def pinned(self) -> bool:
        """Whether somebody wants it kept."""
        return self.record is not None and self.record.pinned

    @property
    def replicated(self) -> bool:
        """Whether the policy's replicas were read back, once."""
        return self.record is not None and self.record.state == "replicated"


@dataclass(frozen=True, slots=True)
class Survey:
    """All checkpoints of a name.

    Attributes:
        known: The newest step first; of one step, the one that counts first.
        listed: What each store lists.
        records: By step.
        failed: Store to why it could not be listed.
    """

    known: tuple[Known, ...]
    listed: Mapping[str, Listed]
    records: Mapping[int, CheckpointRecord]
    failed: Mapping[str, str]


async def survey(depot: Depot, *, among: Collection[str] | None = None, tolerant: bool = False) -> Survey:
    """Ask every readable store and the coordination.

    Args:
        depot: Whose.
        among: Ask only these stores.
        tolerant: Go on without records when the coordination fails.

    Raises:
        CoordError: the coordination fails, and ``tolerant`` is not set.
    """
    failed: dict[str, str] = {}
    listed: dict[str, Listed] = {}

    async def ask(name: str) -> None:
        try:
            listed[name] = await list_manifests(depot, name)
        except StoreError as error:
            failed[name] = f"{error.kind}: {error}"

    await at_once([ask(name) for name in depot.readable() if among is None or name in among])
    records: Mapping[int, CheckpointRecord] = {}
    try:
        records = await records_of(depot)
    except CoordError as error:
        if not tolerant:
            raise
        failed[COORDINATION] = str(error)
    return Survey(_known(depot, listed, records), listed, records, failed)


def _known(depot: Depot, listed: Mapping[str, Listed], records: Mapping[int, CheckpointRecord]) -> tuple[Known, ...]:
    keys = {key: said for found in listed.values() for key, (said, _) in found.items()}
    for noted in records.values():
        key = checkpoint_manifest(depot.name, noted.step, Digest(noted.digest))
        keys.setdefault(key, ManifestKey(key, noted.step, noted.digest[:8]))
    found = []
    for key, said in keys.items():
        recorded = records.get(said.step)
        record = recorded if recorded is not None and recorded.digest[:8] == said.mark else None
        holders = tuple(name for name in depot.readable() if key in listed.get(name, {}))
        at_ms = record.created_at_ms if record else max(listed[name][key][1] for name in holders)
        found.append(Known(said.step, key, holders, at_ms, record))
    # Of two that have one step, the recorded one counts, then the one that was written later.
    found.sort(key=lambda k: (k.step, k.record is not None, k.at_ms, k.mark), reverse=True)
    return tuple(found)


async def list_manifests(depot: Depot, name: str) -> Listed:
    """The manifests a store lists. Raises ``StoreError``."""
    found: dict[str, tuple[ManifestKey, int]] = {}
    async for page in depot.store(name).list(f"{checkpoint_folder(depot.name)}0"):
        for info in page:
            said = parse_key(depot.name, info.key)
            if said is not None:
                found[info.key] = said, info.modified_ms
    return found


async def read_manifest(depot: Depot, known: Known, *, also: Iterable[str] = ()) -> CheckpointManifest:
    """Its manifest, verified, from the first store that has it whole.

    Args:
        depot: Whose.
        known: Which.
        also: Stores to look into that don't list it.

    Raises:
        Corrupt: every copy that could be read is rotten or gone.
        Unavailable: none could be read; says why for each store.
    """
    why: list[str] = []
    kind: type[StoreError] = Corrupt
    for name in dict.fromkeys((*known.stores, *also)):
        try:
            return decode_manifest(await depot.store(name).get(known.key), key=known.key)
        except StoreError as error:
            why.append(f"{name}: {error}")
            if not isinstance(error, Corrupt | NotFound):
                kind = Unavailable
    raise kind(f"no manifest of step {known.step} can be read ({'; '.join(why) or 'no store lists it'})", key=known.key)


async def records_of(depot: Depot) -> dict[int, CheckpointRecord]:
    """Every record of the name, by step. Raises ``CoordError``."""
    found = {}
    async for entry in entries(depot.coord, checkpoint_folder(depot.name)):
        record = decode(CheckpointRecord, entry.value, key=entry.key)
        found[record.step] = record
    return found


async def change_record(
    depot: Depot,
    step: int,
    change: Callable[[CheckpointRecord | None], CheckpointRecord | None],
    *,
    guard: Lease | None = None,
) -> CheckpointRecord | None:
    """Change one record by compare-and-swap, however often others change it meanwhile; gives what is there then.

    Args:
        depot: Whose.
        step: Which.
        change: From what is there to what shall be, None for nothing; may be called several times.
        guard: A lease that must still stand.

    Raises:
        Conflict: others changed it each of many times.
        Fenced: ``guard`` does not stand.
    """
    key = checkpoint_record(depot.name, step)
    for _ in range(_CAS_ATTEMPTS):
        entry = await depot.coord.get(key)
        before = None if entry is None else decode(CheckpointRecord, entry.value, key=key)
        after = change(before)
        if after == before and guard is None:
            return after
        try:
            await depot.coord.commit(
                [Write(key, None if after is None else encode(after))],
                compares=[Compare(key, 0 if entry is None else entry.revision)],
                guard=guard,
            )
        except Conflict:
            continue
        return after
    raise Conflict(f"the record {key} was changed by others {_CAS_ATTEMPTS} times in a row; try again")
