"""verify: every replica of a version read back and hashed; with ``repair``, what is broken is restored.

It goes page by page through the replica pages: memory is bounded by one page and the replicas being read, not by
the version. It works as long as the coordination store does: even when the manifest itself is lost, its shards
are still checked, and those that other stores hold without anybody knowing are found.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from millrace.catalog.crew import at_once
from millrace.catalog.findings import Fault, Finding, VerifyProgress, VerifyReport
from millrace.catalog.in_place import IN_PLACE, is_in_place, lost_words, not_ours
from millrace.catalog.inspect import Checked, Inspector
from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.readers import reading
from millrace.catalog.repair import Repairer, shortfall
from millrace.catalog.versions import label, policy_of
from millrace.core.errors import StoreError
from millrace.core.facts import ReplicaEntry, ReplicaPage, VersionRecord
from millrace.core.keys import manifest_key, replica_page
from millrace.core.model import Digest, StoreSite, Verdict, shard_key
from millrace.core.pages import meta_keys, meta_parts, read_meta, read_page, update_page, with_replicas
from millrace.core.ports import Clock, Coordination, Store
from millrace.decide.placement import legal

__all__ = ["verify"]

_RECEIPTS_HELD: Final = 64
"""Repaired objects whose receipts may wait to be written: a kill loses no copy, only that it is known."""
_FAULTS: Final = {
    Verdict.MISSING: Fault.MISSING,
    Verdict.ROTTEN: Fault.ROTTEN,
    Verdict.UNREADABLE: Fault.UNREADABLE,
}


async def verify(
    coord: Coordination,
    stores: Mapping[str, Store],
    sites: Sequence[StoreSite],
    version: VersionRecord,
    *,
    who: str,
    clock: Clock,
    repair: bool = False,
    slots: int = 4,
    adopted: Collection[str] = (),
    progress: Callable[[VerifyProgress], None] | None = None,
) -> VerifyReport:
    """Hash every replica of every shard of ``version``, and of its manifest.

    Args:
        coord: Where the replica pages are.
        stores: Every store of the world by name, and the places whose files were adopted.
        sites: Every one of those as decisions see it.
        version: Which version; its own policy is what replicas are held against.
        who: Names this reader while it claims the version.
        clock: For the claim and the receipts.
        repair: Restore what is missing or rotten, under policy, and record it.
        slots: Replicas read at once, 16 MB each; a repair holds two whole objects besides.
        adopted: Names of the places whose files were adopted: nothing is ever placed there.
        progress: Called after each replica.

    Raises:
        UsageError: the version was removed.
        CoordError: the coordination store failed.
    """
    async with reading(coord, version, who, clock):
        try:
            manifest = await open_manifest(coord, stores, sites, version)
            lost = ""
        except StoreError as error:
            manifest, lost = None, str(error)
        pages = _Pages(coord, version, manifest)
        total = await _totals(pages) if progress is not None else (0, 0)
        own = [site for site in sites if site.name not in adopted]
        repairer = Repairer(stores, own, policy_of(version), clock) if repair else None
        places = frozenset(adopted)
        work = _Verification(coord, stores, sites, version, clock, repairer, slots, total, progress, places)
        async for key, entries in pages.all():
            await work.page(key, entries)
        if manifest is None and not any(f.object == manifest_key(Digest(version.digest)) for f in work.findings):
            work.findings.insert(0, work.finding(manifest_key(Digest(version.digest)), "", Fault.LOST, lost))
        return work.report()


class _Pages:
    """The objects of a version, a page of them at a time."""

    def __init__(self, coord: Coordination, version: VersionRecord, manifest: OpenManifest | None) -> None:
        self._coord = coord
        self._digest = Digest(version.digest)
        self._manifest = manifest

    async def all(self) -> AsyncIterator[tuple[str, tuple[ReplicaEntry, ...]]]:
        """Key and entries of each page: the manifest's own objects first. What no page knows has no stores."""
        parts = self._manifest.meta if self._manifest else await read_meta(self._coord, self._digest)
        if not parts and self._manifest:
            parts = meta_parts(ReplicaPage(entries=self._manifest.own_objects()))
        for key, part in zip(meta_keys(self._digest, len(parts)), parts, strict=True):
            yield key, part.entries
        i = 0
        while self._manifest is None or i < len(self._manifest):
            key = replica_page(self._digest, i)
            page = await read_page(self._coord, key)
            if page is not None:
                yield key, page.entries
            elif self._manifest is None:
                break
            else:
                yield key, await _entries_of(self._manifest, i)
            i += 1


async def _entries_of(manifest: OpenManifest, i: int) -> tuple[ReplicaEntry, ...]:
    """The shards of a segment whose replica page is gone; none when the segment is gone too."""
    try:
        segment = await manifest.segment(i)
    except StoreError:
        return ()  # the segment's own finding says so
    digests = [segment.digest(k) for k in range(len(segment))]
    return tuple(
        ReplicaEntry(digest=d, key=shard_key(d), size_bytes=int(size))
        for d, size in zip(digests, segment.sizes, strict=True)
    )


async def _totals(pages: _Pages) -> tuple[int, int]:
    objects = size = 0
    async for _, entries in pages.all():
        for entry in _distinct(entries):
            objects += len(entry.stores)
            size += len(entry.stores) * entry.size_bytes
    return objects, size


def _distinct(entries: Sequence[ReplicaEntry]) -> list[ReplicaEntry]:
    """Each object once: a shard that two chunks made alike is listed twice, with the same replicas."""
    return list({(entry.digest, entry.key): entry for entry in entries}.values())


@dataclass(slots=True)
class _Outcome:
    """What became of one object."""

    findings: list[Finding] = field(default_factory=list)
    gained: dict[str, int] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()


class _Verification:
    """The state of one verification: counts, findings, receipts that wait to be written."""

    def __init__(
        self,
        coord: Coordination,
        stores: Mapping[str, Store],
        sites: Sequence[StoreSite],
        version: VersionRecord,
        clock: Clock,
        repairer: Repairer | None,
        slots: int,
        total: tuple[int, int],
        progress: Callable[[VerifyProgress], None] | None,
        adopted: frozenset[str],
    ) -> None:
        self.findings: list[Finding] = []
        self._coord = coord
        self._sites = {site.name: site for site in sites if site.name in stores}
        self._version = version
        self._policy = policy_of(version)
        self._adopted = adopted
        self._clock = clock
        self._inspector = Inspector(stores, clock, slots=slots)
        self._repairer = repairer
        self._slots = slots
        self._total = total
        self._progress = progress
        self._counts: Counter[str] = Counter()
        self._pending: dict[str, _Outcome] = {}
        self._flushing = asyncio.Lock()

    async def page(self, key: str, entries: Sequence[ReplicaEntry]) -> None:
        """Look at (and repair) the objects of one page; their receipts are written when this returns."""
        todo = iter(list(enumerate(_distinct(entries))))
        found: dict[int, list[Finding]] = {}

        async def work(todo: Iterator[tuple[int, ReplicaEntry]]) -> None:
            for i, entry in todo:
                outcome = await self._object(entry)
                if outcome.findings:
                    found[i] = outcome.findings
                if outcome.gained or outcome.dropped:
                    self._pending[entry.digest] = outcome
                if len(self._pending) >= _RECEIPTS_HELD:
                    await self._flush(key, entries)

        await at_once([work(todo) for _ in range(self._slots)])
        await self._flush(key, entries)
        for i in sorted(found):
            self.findings += found[i]

    def report(self) -> VerifyReport:
        """Everything so far."""
        c = self._counts
        return VerifyReport(
            dataset=label(self._version),
            digest=self._version.digest,
            objects=c["objects"],
            replicas=c["replicas"],
            bytes=c["bytes"],
            whole=c[Verdict.WHOLE],
            missing=c[Verdict.MISSING],
            rotten=c[Verdict.ROTTEN],
            unreadable=c[Verdict.UNREADABLE],
            under_replicated=c[Fault.UNDER_REPLICATED],
            forbidden=c[Fault.FORBIDDEN],
            lost=sum(f.verdict is Fault.LOST for f in self.findings),
            restored=c["restored"],
            findings=tuple(self.findings),
        )

    def finding(self, key: str, store: str, fault: Fault, detail: str) -> Finding:
        """A finding of this version."""
        return Finding(label(self._version), key, store, fault, detail)

    # --- one object --------------------------------------------------------------------------------

    async def _object(self, entry: ReplicaEntry) -> _Outcome:
        checks = await self._checked(entry)
        outcome = _Outcome(self._judged(entry, checks))
        if self._repairer is not None:
            await self._repair(self._repairer, entry, checks, outcome)
        return outcome

    async def _checked(self, entry: ReplicaEntry) -> list[Checked]:
        """The replicas that are known, and if none of them is whole, what else can be found in the world."""
        names = sorted(entry.stores)
        checks = await self._inspector.check_all(entry, names)
        self._counts["objects"] += 1
        self._counts["replicas"] += len(checks)
        self._counts["bytes"] += len(checks) * entry.size_bytes
        for check in checks:
            self._counts[check.verdict] += 1
        if self._progress is not None:
            done = self._counts["replicas"], self._counts["bytes"]
            self._progress(VerifyProgress(done[0], self._total[0], done[1], self._total[1]))
        if not any(c.verdict is Verdict.WHOLE for c in checks):
            # Adopted files are looked for where files were adopted, Millrace's own objects in its own stores.
            elsewhere = [
                name
                for name in self._sites
                if name not in entry.stores and (name in self._adopted) == is_in_place(entry, self._adopted)
            ]
            more = await self._inspector.check_all(entry, elsewhere)
            checks += [c for c in more if c.verdict is Verdict.WHOLE]
        return checks

    def _judged(self, entry: ReplicaEntry, checks: Sequence[Checked]) -> list[Finding]:
        found = [
            self.finding(entry.key, c.store, _FAULTS[c.verdict], c.detail)
            for c in checks
            if c.verdict is not Verdict.WHOLE
        ]
        whole = [c.store for c in checks if c.verdict is Verdict.WHOLE]
        if is_in_place(entry, self._adopted):
            short = shortfall(self._legal(whole), IN_PLACE)
        else:
            short = shortfall(self._legal(self._counted(whole)), self._policy)
        self._counts[Fault.UNDER_REPLICATED] += bool(short)
        if not whole and not any(c.verdict is Verdict.UNREADABLE for c in checks):
            found.append(self.finding(entry.key, "", Fault.LOST, lost_words(self._version)))
        elif short and not found:
            found.append(self.finding(entry.key, "", Fault.UNDER_REPLICATED, short))
        for check in checks:
            site = self._sites.get(check.store)
            refusal = legal(site, self._policy) if site else None
            if refusal is not None and check.verdict in {Verdict.WHOLE, Verdict.ROTTEN}:
                self._counts[Fault.FORBIDDEN] += 1
                sentence = f"{refusal.sentence}; remove the object from there once its other replicas are whole"
                found.append(self.finding(entry.key, check.store, Fault.FORBIDDEN, sentence))
        return found

    def _counted(self, whole: Sequence[str]) -> list[str]:
        """What the policy counts: not what lies where files were adopted, as it may go at any time."""
        return [name for name in whole if name not in self._adopted]

    def _legal(self, names: Sequence[str]) -> list[StoreSite]:
        sites = [self._sites[name] for name in names if name in self._sites]
        return [site for site in sites if legal(site, self._policy) is None]

    async def _repair(
        self, repairer: Repairer, entry: ReplicaEntry, checks: Sequence[Checked], outcome: _Outcome
    ) -> None:
        whole = [c.store for c in checks if c.verdict is Verdict.WHOLE]
        bad = [c.store for c in checks if c.verdict is not Verdict.WHOLE]
        unknown = [name for name in whole if name not in entry.stores]
        if is_in_place(entry, self._adopted):
            self._forget(whole, bad, unknown, outcome)
            return
        if not whole:
            outcome.findings = [
                replace(f, repair="no whole copy can be read to restore it from") for f in outcome.findings
            ]
            return
        if not (bad or unknown or shortfall(self._legal(self._counted(whole)), self._policy)):
            return
        try:
            restored = await repairer.restore(entry, checks)
        except StoreError as error:
            outcome.findings = [replace(f, repair=str(error)) for f in outcome.findings]
            return
        self._counts["restored"] += len(restored.gained)
        now_ms = self._clock.now_ms()
        outcome.gained = {**dict.fromkeys(unknown, now_ms), **restored.gained}
        if not restored.short:
            outcome.dropped = frozenset(bad) - set(outcome.gained)
        placed = sorted(set(restored.gained) - set(bad))
        outcome.findings = [
            self._after(f, restored.gained, restored.failed, restored.short, placed) for f in outcome.findings
        ]
        if restored.short and all(f.repaired for f in outcome.findings):
            outcome.findings.append(
                replace(self.finding(entry.key, "", Fault.UNDER_REPLICATED, restored.short), repair=restored.short)
            )

    def _forget(self, whole: Sequence[str], bad: Sequence[str], unknown: Sequence[str], outcome: _Outcome) -> None:
        """All a repair does about an adopted file: where another place has it whole, that one counts instead."""
        if not whole:
            outcome.findings = [replace(f, repair=not_ours(self._version)) for f in outcome.findings]
            return
        outcome.gained = dict.fromkeys(unknown, self._clock.now_ms())
        outcome.dropped = frozenset(bad)
        instead = f"no longer counted on: it lies whole in {', '.join(sorted(whole))}"
        outcome.findings = [replace(f, repaired=True, repair=instead) for f in outcome.findings]

    @staticmethod
    def _after(
        finding: Finding, gained: Mapping[str, int], failed: Mapping[str, str], short: str, placed: Sequence[str]
    ) -> Finding:
        """The finding after its object was repaired."""
        instead = f"placed in {', '.join(placed)}" if placed else "the policy is met without it"
        why = f" ({failed[finding.store]})" if finding.store in failed else ""
        if finding.verdict is Fault.FORBIDDEN:
            return replace(finding, repair="left there: nothing is deleted by a repair")
        if finding.store in gained:
            return replace(finding, repaired=True, repair="restored in place")
        if short:
            return replace(finding, repair=f"{short}{why}")
        return replace(finding, repaired=True, repair=f"{instead}{why}")

    async def _flush(self, key: str, entries: Sequence[ReplicaEntry]) -> None:
        async with self._flushing:
            pending, self._pending = self._pending, {}
            if not pending:
                return
            gained = {digest: outcome.gained for digest, outcome in pending.items()}
            dropped = {digest: outcome.dropped for digest, outcome in pending.items()}
            first = ReplicaPage(entries=tuple(entries))

            def change(before: ReplicaPage | None) -> ReplicaPage:
                return with_replicas(first if before is None else before, gained, dropped)

            await update_page(self._coord, key, change)
