"""Restoring replicas of one object from a whole copy, within its policy."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from millrace.catalog.crew import at_once
from millrace.catalog.inspect import Checked
from millrace.core.errors import PolicyRefused, StoreError
from millrace.core.facts import ReplicaEntry
from millrace.core.model import Digest, StoreSite, Verdict
from millrace.core.ports import Clock, Store
from millrace.core.replicas import fetch
from millrace.core.spec import Placement
from millrace.decide.placement import legal, place, score
from millrace.pipeline.distribute import Blob, put_verified

__all__ = ["Repairer", "Restored", "shortfall"]

_OBJECTS_IN_MEMORY: Final = 2


@dataclass(slots=True)
class Restored:
    """What a repair of one object came to.

    Attributes:
        gained: Store name to when its replica was read back whole.
        failed: Store name to why nothing could be written there.
        short: Why the policy is still not met; empty when it is.
    """

    gained: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    short: str = ""


def shortfall(held: Sequence[StoreSite], policy: Placement) -> str:
    """What is lacking when an object lies whole in these legal stores; empty when nothing is."""
    if len(held) < policy.replicas:
        return f"{len(held)} of {policy.replicas} replicas are whole"
    clouds = len({site.cloud for site in held})
    return f"its replicas are in {clouds} of {policy.min_clouds} clouds" if clouds < policy.min_clouds else ""


class Repairer:
    """Copies verified bytes to where they are missing; two objects in memory at a time.

    Args:
        stores: Every store of the world by name.
        sites: Every store as decisions see it.
        policy: The version's own.
        clock: For the receipts.
    """

    def __init__(
        self, stores: Mapping[str, Store], sites: Sequence[StoreSite], policy: Placement, clock: Clock
    ) -> None:
        self._stores = stores
        self._sites = {site.name: site for site in sites if site.name in stores}
        self._policy = policy
        self._clock = clock
        self._slots = asyncio.Semaphore(_OBJECTS_IN_MEMORY)

    def legal(self, name: str) -> StoreSite | None:
        """The site of a store that may hold a replica; None if it may not, or isn't in the world."""
        site = self._sites.get(name)
        return site if site is not None and legal(site, self._policy) is None else None

    def held(self, names: Sequence[str]) -> list[StoreSite]:
        """The legal ones of these stores."""
        return [site for name in names if (site := self.legal(name)) is not None]

    async def restore(self, entry: ReplicaEntry, checks: Sequence[Checked]) -> Restored:
        """Write what is missing: in place where the store works, elsewhere within policy where it doesn't.

        Nothing whole is written over: every write looks first at what is there. Only copies that were found
        whole are read from, and they are hashed again as they are read.

        Args:
            entry: The object.
            checks: All that is known of its replicas; at least one of them whole.

        Raises:
            StoreError: no whole copy can be read any more.
        """
        whole = [c.store for c in checks if c.verdict is Verdict.WHOLE]
        broken = [c.store for c in checks if c.verdict in {Verdict.MISSING, Verdict.ROTTEN}]
        unreadable = {c.store for c in checks if c.verdict is Verdict.UNREADABLE}
        digest = Digest(entry.digest)
        restored = Restored()
        async with self._slots:
            data = await fetch(self._stores, entry.key, digest, whole)
            blob = Blob(digest, entry.key, entry.size_bytes, [data])
            await self._put(blob, [name for name in broken if self.legal(name)], restored)
            while shortfall(self.held([*whole, *restored.gained]), self._policy):
                have = {*whole, *restored.gained}
                targets, restored.short = self._elsewhere(digest, have, unreadable | set(restored.failed))
                fresh = [name for name in targets if name not in have]
                if not fresh:
                    break
                await self._put(blob, fresh, restored)
        lacking = shortfall(self.held([*whole, *restored.gained]), self._policy)
        restored.short = f"{lacking}; {restored.short}" if lacking and restored.short else lacking
        return restored

    def _elsewhere(self, digest: Digest, have: set[str], without: set[str]) -> tuple[list[str], str]:
        """Where replicas should be, and why that is not all the policy asks for."""
        usable = [site for site in self._sites.values() if site.name not in without]
        try:
            return [s.name for s in place(digest, usable, self._policy, keep=have)], ""
        except PolicyRefused as error:
            allowed = [site for site in usable if legal(site, self._policy) is None]
            without_words = f" ({', '.join(sorted(without))} can't be used now)" if without else ""
            # Fewer copies than the policy asks for are better than fewer still; never more.
            allowed.sort(key=lambda site: (site.name not in have, score(digest, site)))
            return [site.name for site in allowed[: self._policy.replicas]], f"{error}{without_words}"

    async def _put(self, blob: Blob, names: Sequence[str], restored: Restored) -> None:
        await at_once([self._put_one(blob, name, restored) for name in names])

    async def _put_one(self, blob: Blob, name: str, restored: Restored) -> None:
        try:
            await put_verified(self._stores[name], blob)
        except StoreError as error:
            restored.failed[name] = f"{error.kind}: {error}"
        else:
            restored.gained[name] = self._clock.now_ms()
