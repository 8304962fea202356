"""rm: taking versions out of the catalog. Their bytes go later, by garbage collection."""

from __future__ import annotations

from typing import Final

from millrace.catalog.versions import entries, resolve, split_reference
from millrace.core.errors import Conflict
from millrace.core.facts import VersionRecord, VersionRef, decode, encode
from millrace.core.keys import dataset_head, dataset_version
from millrace.core.ports import Compare, Coordination, Entry, Write

__all__ = ["remove"]

_ATTEMPTS: Final = 32
_AT_ONCE: Final = 90
"""Versions in one transaction, with room for the head; a port takes 100 writes."""


async def remove(coord: Coordination, reference: str) -> tuple[VersionRecord, ...]:
    """Remove ``name`` with all its versions, or the one version that ``name@3`` or ``name@digest`` means.

    Removing the newest version makes the next older one the newest; both happen in one transaction. A dataset
    of more than 90 versions goes the oldest first, its head last, so that it is a dataset until it is gone.
    The number of a removed version is not given again.

    Returns:
        What was removed, the oldest first.

    Raises:
        UsageError: there is no such dataset or version.
        Conflict: others kept changing the dataset meanwhile.
    """
    name, which = split_reference(reference)
    removed: list[VersionRecord] = []
    await resolve(coord, reference)
    for _ in range(_ATTEMPTS):
        record = await resolve(coord, reference) if which else None
        there = [entry async for entry in entries(coord, f"datasets/{name}/versions/")]
        if not there and removed:
            return tuple(removed)
        going = there[:_AT_ONCE] if record is None else [e for e in there if e.key == _key(record)]
        head = await coord.get(dataset_head(name))
        if head is None or not going:
            continue
        writes, compares = _transaction(name, head, there, going)
        try:
            await coord.commit(writes, compares=compares)
        except Conflict:
            continue
        removed += [decode(VersionRecord, e.value, key=e.key) for e in going]
        if which:
            return tuple(removed)
    raise Conflict(f"dataset {name} was changed by others {_ATTEMPTS} times in a row; try again")


def _key(record: VersionRecord) -> str:
    return dataset_version(record.dataset, record.version)


def _transaction(name: str, head: Entry, there: list[Entry], going: list[Entry]) -> tuple[list[Write], list[Compare]]:
    """Take ``going`` of ``there`` away and leave the head naming the newest that stays."""
    writes = [Write(e.key, None) for e in going]
    compares = [Compare(head.key, head.revision), *(Compare(e.key, e.revision) for e in going)]
    gone = {e.key for e in going}
    staying = [e for e in there if e.key not in gone]
    if not staying:
        writes.append(Write(head.key, None))
    elif dataset_version(name, decode(VersionRef, head.value, key=head.key).version) in gone:
        older = decode(VersionRecord, staying[-1].value, key=staying[-1].key)
        writes.append(Write(head.key, encode(VersionRef(version=older.version, digest=older.digest))))
        compares.append(Compare(staying[-1].key, staying[-1].revision))
    return writes, compares
