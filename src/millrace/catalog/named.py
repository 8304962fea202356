"""The census: every object that some version, reader or unfinished run names. What can't be read is never guessed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from millrace.catalog.crew import at_once
from millrace.catalog.manifests import open_manifest
from millrace.catalog.versions import entries, label
from millrace.core.errors import CoordError, StoreError, Unavailable
from millrace.core.facts import ReaderClaim, RunRecord, VersionRecord, decode
from millrace.core.keys import ledger_prefix, run_prefix, run_record
from millrace.core.model import Digest, StoreSite
from millrace.core.ports import Coordination, Entry, Store
from millrace.pipeline.outputs import decode_chunk_output, load_output

__all__ = ["FINISHED", "Beat", "Named", "RunKeys", "census", "runs_of"]

FINISHED: Final = frozenset({"done", "superseded"})
"""States of runs that won't go on. A stopped or failed run is continued from its ledger, so it still names things."""

CLAIM_SLACK_MS: Final = 60_000
"""How long a claim is honoured past its end: clocks of two machines differ."""

_OUTPUTS_AT_ONCE: Final = 32

Beat = Callable[[], Awaitable[None]]
"""Called now and then during long work; renews a lease, and raises when it was lost."""


@dataclass(slots=True)
class Named:
    """What must stay.

    Attributes:
        digests: 32 bytes each, of shards and of manifests' objects alike.
        manifests: The manifests of live versions and claims: their replica pages stay.
        expired_claims: Keys of claims whose time is long over.
    """

    digests: set[bytes] = field(default_factory=set)
    manifests: set[str] = field(default_factory=set)
    expired_claims: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RunKeys:
    """A run that has keys in the coordination store.

    Attributes:
        run: Its id.
        record: None when it has keys but no record (yet).
    """

    run: int
    record: RunRecord | None

    @property
    def finished(self) -> bool:
        """Whether it names nothing any more."""
        return self.record is not None and self.record.state in FINISHED


async def runs_of(coord: Coordination) -> AsyncIterator[RunKeys]:
    """Every run that has a key, by id. Reads one entry and the record of each, not its ledger."""
    after = ""
    while page := await coord.list("runs/", after=after, limit=1):
        number = page[0].key.split("/")[1]
        # "0" follows "/": past all keys of this run.
        after = f"runs/{number}0"
        if not number.isdecimal():
            continue
        key = run_record(int(number))
        entry = await coord.get(key)
        yield RunKeys(int(number), None if entry is None else decode(RunRecord, entry.value, key=key))


async def census(
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    work: Store,
    *,
    now_ms: int,
    beat: Beat,
) -> Named:
    """Everything that is named now. About 100 bytes of memory an object.

    Args:
        coord: Where versions, claims and runs are.
        stores: Where manifests are.
        sites: Every store as decisions see it.
        work: Where the outputs of runs' tasks are.
        now_ms: Wall time.
        beat: Called between steps.

    Raises:
        Unavailable: something that may name objects can't be read; the sentence says what. Then nothing is known.
    """
    named = Named()
    read: set[str] = set()
    async for entry in entries(coord, "datasets/"):
        if "/versions/" in entry.key:
            version = decode(VersionRecord, entry.value, key=entry.key)
            await _add_manifest(named, coord, stores, sites, version, label(version), read, beat)
    async for entry in entries(coord, "readers/"):
        claim = decode(ReaderClaim, entry.value, key=entry.key)
        if claim.until_ms + CLAIM_SLACK_MS < now_ms:
            named.expired_claims.append(entry.key)
            continue
        digest = Digest(entry.key.split("/")[1])
        what = f"the version {digest[:12]} that {claim.who} reads"
        await _add_manifest(named, coord, stores, sites, digest, what, read, beat)
    async for run in runs_of(coord):
        if not run.finished:
            await _add_run(named, coord, work, run.run, beat)
    return named


async def _add_manifest(
    named: Named,
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    version: VersionRecord | Digest,
    what: str,
    read: set[str],
    beat: Beat,
) -> None:
    digest = version.digest if isinstance(version, VersionRecord) else version
    if digest in named.manifests:
        return
    named.manifests.add(digest)
    await beat()
    try:
        manifest = await open_manifest(coord, stores, sites, version)
        named.digests.add(bytes.fromhex(digest))
        for i, ref in enumerate(manifest.root.segments):
            if ref.digest in read:
                continue
            read.add(ref.digest)
            named.digests |= {bytes.fromhex(ref.digest), bytes.fromhex(ref.blocks)}
            named.digests.update(row.tobytes() for row in (await manifest.segment(i)).digests)
            await beat()
    except StoreError as error:
        raise Unavailable(
            f"nothing is collected, since the manifest of {what} can't be read and what it names isn't known: {error}",
            store=error.store,
            key=error.key,
        ) from error


async def _add_run(named: Named, coord: Coordination, work: Store, run: int, beat: Beat) -> None:
    """The shards an unfinished run has receipts for: it goes on from them."""

    async def one(output: Digest) -> list[bytes]:
        try:
            made = decode_chunk_output(await load_output(work, run, "main", output))
        except StoreError as error:
            raise Unavailable(
                f"nothing is collected, since a chunk's output of run {run}, which isn't finished, can't be read: "
                f"{error}; or run its pipeline with --fresh, which gives that run up",
                store=error.store,
                key=error.key,
            ) from error
        return [bytes.fromhex(shard.digest) for shard in made.shards]

    async for entry in entries(coord, ledger_prefix(run, "main"), page=16):
        outputs = _outputs(entry)
        for i in range(0, len(outputs), _OUTPUTS_AT_ONCE):
            await beat()
            for digests in await at_once([one(output) for output in outputs[i : i + _OUTPUTS_AT_ONCE]]):
                named.digests.update(digests)


def _outputs(page: Entry) -> list[Digest]:
    """The outputs a ledger page names. A chunk that was set aside has none."""
    try:
        tasks = json.loads(page.value)
        return [Digest(facts["output"]) for facts in tasks.values() if facts.get("output")]
    except (ValueError, AttributeError, TypeError) as error:
        raise CoordError(
            f"nothing is collected, since the ledger page at {page.key} can't be read ({error}); "
            f"run that pipeline with --fresh, which gives up {run_prefix(int(page.key.split('/')[1]))}"
        ) from error
