"""Replica pages as they lie in the coordination store: packed, so that one always fits into a value.

A page of 2,048 shards as plain JSON takes 0.6 MB with three stores and over 3 MB with sixteen of long names; a
value may have 1 MiB. So a page names its stores once, leaves out keys that follow from the digest, counts times
from the earliest one, and is deflated: 0.1 MB with three stores, under 0.7 MB in the worst case there is
(``PART_ENTRIES`` entries, sixteen replicas each, times without any pattern).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from millrace.core.errors import Conflict, CoordError
from millrace.core.facts import ReplicaEntry, ReplicaPage
from millrace.core.keys import manifest_key, replica_page, segment_key
from millrace.core.model import Digest, shard_key
from millrace.core.ports import Compare, Coordination, Lease, Write

__all__ = [
    "PART_ENTRIES",
    "decode_page",
    "encode_page",
    "merge_pages",
    "meta_keys",
    "meta_parts",
    "read_meta",
    "read_page",
    "update_page",
    "with_replicas",
]

PART_ENTRIES: Final = 4096
"""Entries in one value, at most. Only the ``meta`` page of over four million shards has more; it gets parts."""

_FORMAT: Final = "millrace-replicas/1"
_UNPACKED_BYTES_MAX: Final = 64 * 2**20
_CAS_ATTEMPTS: Final = 32
_KEYS: Final[tuple[Callable[[Digest], str], ...]] = (shard_key, segment_key, manifest_key)


def encode_page(page: ReplicaPage) -> bytes:
    """The page, packed.

    Raises:
        CoordError: it has more than ``PART_ENTRIES`` entries.
    """
    if len(page.entries) > PART_ENTRIES:
        raise CoordError(f"a replica page of {len(page.entries)} entries is over the {PART_ENTRIES} one value takes")
    names = sorted({name for entry in page.entries for name in entry.stores})
    column = {name: i for i, name in enumerate(names)}
    base = min((at for entry in page.entries for at in entry.stores.values()), default=0)
    rows = [
        [
            entry.digest,
            _key_kind(entry),
            entry.size_bytes,
            [number for name in sorted(entry.stores) for number in (column[name], entry.stores[name] - base)],
        ]
        for entry in page.entries
    ]
    document = {"format": _FORMAT, "stores": names, "base_ms": base, "entries": rows}
    return zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 4)


def decode_page(value: bytes, *, key: str) -> ReplicaPage:
    """The page in ``value``.

    Raises:
        CoordError: it isn't one; names the key.
    """
    try:
        document = json.loads(zlib.decompressobj().decompress(value, _UNPACKED_BYTES_MAX))
        if document["format"] != _FORMAT:
            raise CoordError(f"the replica page at {key} has format {document['format']!r}; upgrade Millrace")
        names = [str(name) for name in document["stores"]]
        base = int(document["base_ms"])
        # The values were checked when they were packed: building a million models with checks takes seconds.
        entries = tuple(_entry(row, names, base) for row in document["entries"])
    except (ValueError, KeyError, TypeError, IndexError, zlib.error) as error:
        raise CoordError(f"the record at {key} is not a replica page this version can read: {error}") from error
    return ReplicaPage.model_construct(entries=entries)


def merge_pages(old: ReplicaPage, new: ReplicaPage, *, key: str) -> ReplicaPage:
    """Every replica that either of two pages of the same objects knows, with its later time.

    Raises:
        CoordError: they don't speak of the same objects; names the key.
    """
    if [e.digest for e in old.entries] != [e.digest for e in new.entries]:
        raise CoordError(
            f"the replica page at {key} speaks of other objects than the manifest in its name; "
            "remove that version and run its pipeline again"
        )
    return ReplicaPage.model_construct(
        entries=tuple(
            before.model_copy(update={"stores": _latest(before.stores, after.stores)})
            for before, after in zip(old.entries, new.entries, strict=True)
        )
    )


def with_replicas(
    page: ReplicaPage, gained: Mapping[str, Mapping[str, int]], dropped: Mapping[str, frozenset[str]]
) -> ReplicaPage:
    """The page after a repair.

    Args:
        page: As it is now.
        gained: Digest to store name to when that replica was read back whole.
        dropped: Digest to the stores that no longer count as holding it.
    """
    if not gained and not dropped:
        return page
    entries = []
    for entry in page.entries:
        gone = dropped.get(entry.digest, frozenset())
        kept = {name: at for name, at in entry.stores.items() if name not in gone}
        entries.append(entry.model_copy(update={"stores": _latest(kept, gained.get(entry.digest, {}))}))
    return ReplicaPage.model_construct(entries=tuple(entries))


def meta_parts(meta: ReplicaPage) -> tuple[ReplicaPage, ...]:
    """The ``meta`` page in parts that fit into values, in order; one, nearly always."""
    entries = meta.entries
    return tuple(
        ReplicaPage.model_construct(entries=entries[i : i + PART_ENTRIES])
        for i in range(0, max(len(entries), 1), PART_ENTRIES)
    )


def meta_keys(manifest: Digest, parts: int) -> tuple[str, ...]:
    """The keys of the parts of the ``meta`` page: ``meta``, ``meta-000001`` ..."""
    return tuple(replica_page(manifest, "meta" if i == 0 else f"meta-{i:06d}") for i in range(parts))


async def read_page(coord: Coordination, key: str) -> ReplicaPage | None:
    """The replica page at ``key``; None if there is none."""
    entry = await coord.get(key)
    return None if entry is None else decode_page(entry.value, key=key)


async def read_meta(coord: Coordination, manifest: Digest) -> tuple[ReplicaPage, ...]:
    """The parts of a manifest's ``meta`` page; empty if there is none."""
    parts: list[ReplicaPage] = []
    while not parts or len(parts[-1].entries) == PART_ENTRIES:
        page = await read_page(coord, meta_keys(manifest, len(parts) + 1)[-1])
        if page is None:
            break
        parts.append(page)
    return tuple(parts)


async def update_page(
    coord: Coordination,
    key: str,
    change: Callable[[ReplicaPage | None], ReplicaPage],
    *,
    guard: Lease | None = None,
) -> ReplicaPage:
    """Change one page by compare-and-swap, however often others change it meanwhile.

    Args:
        coord: Where it lies.
        key: Its key.
        change: From what is there to what shall be; may be called several times.
        guard: A lease that must still stand.

    Raises:
        Conflict: others changed it each of many times.
        Fenced: ``guard`` does not stand.
    """
    for _ in range(_CAS_ATTEMPTS):
        entry = await coord.get(key)
        before = None if entry is None else decode_page(entry.value, key=key)
        after = change(before)
        if after == before:
            return after
        try:
            await coord.commit(
                [Write(key, encode_page(after))],
                compares=[Compare(key, 0 if entry is None else entry.revision)],
                guard=guard,
            )
        except Conflict:
            continue
        return after
    raise Conflict(f"the replica page at {key} was changed by others {_CAS_ATTEMPTS} times in a row; try again")


def _key_kind(entry: ReplicaEntry) -> int | str:
    digest = Digest(entry.digest)
    return next((i for i, key in enumerate(_KEYS) if key(digest) == entry.key), entry.key)


def _entry(row: list[Any], names: list[str], base: int) -> ReplicaEntry:
    digest, kind, size, numbers = row
    return ReplicaEntry.model_construct(
        digest=digest,
        key=_KEYS[kind](digest) if isinstance(kind, int) else kind,
        size_bytes=int(size),
        stores={names[numbers[i]]: base + numbers[i + 1] for i in range(0, len(numbers), 2)},
    )


def _latest(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in sorted({*a, *b})}
