"""Which datasets and versions there are, and what a person means by ``name``, ``name@3`` or ``name@4f2a90c1``."""

from __future__ import annotations

import difflib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from millrace.core.errors import CoordError, UsageError
from millrace.core.facts import VersionRecord, VersionRef, decode
from millrace.core.keys import dataset_head, dataset_version
from millrace.core.ports import Coordination, Entry
from millrace.core.spec import Placement

__all__ = [
    "DatasetLine",
    "entries",
    "label",
    "list_datasets",
    "newest",
    "policy_of",
    "resolve",
    "split_reference",
    "still_there",
    "versions_of",
]

_PAGE: Final = 200
_PREFIX_LETTERS: Final = 8
_HEX: Final = re.compile(r"[0-9a-f]+")
_NAMED_AT_MOST: Final = 12


@dataclass(frozen=True, slots=True)
class DatasetLine:
    """One dataset in a list.

    Attributes:
        name: Its name.
        versions: How many there are.
        newest: The one its head names.
    """

    name: str
    versions: int
    newest: VersionRecord


def label(record: VersionRecord) -> str:
    """``name@3``: what sentences and commands call a version."""
    return f"{record.dataset}@{record.version}"


def policy_of(record: VersionRecord) -> Placement:
    """The placement policy a version was made under."""
    return Placement.model_validate(record.placement)


async def entries(coord: Coordination, prefix: str, *, page: int = _PAGE) -> AsyncIterator[Entry]:
    """Every entry under ``prefix``, in key order, ``page`` of them in memory at a time."""
    after = ""
    while found := await coord.list(prefix, after=after, limit=page):
        for entry in found:
            yield entry
        after = found[-1].key


async def list_datasets(coord: Coordination) -> tuple[DatasetLine, ...]:
    """Every dataset that has a version, by name."""
    lines = []
    for name in sorted(await _names(coord)):
        records = [record async for record in versions_of(coord, name)]
        head = await newest(coord, name)
        if head is not None:
            lines.append(DatasetLine(name, len(records), head))
    return tuple(lines)


async def versions_of(coord: Coordination, dataset: str) -> AsyncIterator[VersionRecord]:
    """The versions of a dataset, the oldest first; none if there is no such dataset."""
    async for entry in entries(coord, f"datasets/{dataset}/versions/"):
        yield decode(VersionRecord, entry.value, key=entry.key)


async def newest(coord: Coordination, dataset: str) -> VersionRecord | None:
    """The version a dataset's head names; None if there is no such dataset."""
    key = dataset_head(dataset)
    while (head := await coord.get(key)) is not None:
        record_key = dataset_version(dataset, decode(VersionRef, head.value, key=key).version)
        entry = await coord.get(record_key)
        if entry is not None:
            return decode(VersionRecord, entry.value, key=record_key)
        moved = await coord.get(key)
        if moved is not None and moved.revision == head.revision:
            raise CoordError(
                f"the head of dataset {dataset} names a version whose record is gone ({record_key}); "
                f"remove the dataset with 'millrace rm {dataset}' and run its pipeline again"
            )
    return None


async def still_there(coord: Coordination, record: VersionRecord) -> bool:
    """Whether the version is in the catalog, as this very record's digest."""
    key = dataset_version(record.dataset, record.version)
    entry = await coord.get(key)
    return entry is not None and decode(VersionRecord, entry.value, key=key).digest == record.digest


def split_reference(reference: str) -> tuple[str, str]:
    """``name`` and what follows ``@``, empty when there is nothing.

    Raises:
        UsageError: it can't be a reference.
    """
    name, at, which = reference.partition("@")
    if not name or (at and not which):
        raise UsageError(f"{reference!r} names no version; write NAME, NAME@3 or NAME@DIGEST")
    return name, which.lower()


async def resolve(coord: Coordination, reference: str) -> VersionRecord:
    """The version a person means: ``name`` is the newest, ``name@3`` by number, ``name@4f2a90c1`` by digest.

    A digest may be cut to its first letters, at least 8. One that several versions carry means the newest of them.

    Raises:
        UsageError: there is no such dataset or version, or several; names what there is.
    """
    name, which = split_reference(reference)
    if not which:
        found = await newest(coord, name)
        if found is None:
            raise UsageError(await _no_dataset(coord, name))
        return found
    records = [record async for record in versions_of(coord, name)]
    if not records:
        raise UsageError(await _no_dataset(coord, name))
    if len(which) >= _PREFIX_LETTERS and _HEX.fullmatch(which):
        matches = [r for r in records if r.digest.startswith(which)]
        if len({r.digest for r in matches}) > 1:
            raise UsageError(f"{reference!r} could be {_named(matches)}; write more letters of the digest")
        if matches:
            return matches[-1]
    if which.isdecimal():
        for record in records:
            if record.version == int(which):
                return record
    elif not _HEX.fullmatch(which) or len(which) < _PREFIX_LETTERS:
        raise UsageError(
            f"{reference!r}: {which!r} is neither a version's number nor at least {_PREFIX_LETTERS} letters of its "
            f"digest; there is {_named(records)}"
        )
    raise UsageError(f"dataset {name} has no version {which}; there is {_named(records)}")


async def _names(coord: Coordination) -> list[str]:
    names: list[str] = []
    after = ""
    while page := await coord.list("datasets/", after=after, limit=1):
        names.append(page[0].key.split("/")[1])
        # "0" follows "/": this is past all of that dataset's keys, whatever its versions.
        after = f"datasets/{names[-1]}0"
    return names


async def _no_dataset(coord: Coordination, name: str) -> str:
    names = await _names(coord)
    if not names:
        return f"there is no dataset {name!r}, nor any other yet; run a pipeline first"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]!r}? There is" if close else "; there is"
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"there is no dataset {name!r}{hint} {', '.join(names[:_NAMED_AT_MOST])}{more}" + (
        "" if close else "; see 'millrace datasets'"
    )


def _named(records: list[VersionRecord]) -> str:
    shown = ", ".join(f"{label(r)} ({r.digest[:12]})" for r in records[-_NAMED_AT_MOST:])
    return shown if len(records) <= _NAMED_AT_MOST else f"{shown} and {len(records) - _NAMED_AT_MOST} older"
