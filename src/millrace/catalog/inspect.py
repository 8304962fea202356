"""Looking at one replica: is it there, is it whole, and if not, how is it broken."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from millrace.catalog.crew import at_once
from millrace.core.errors import Corrupt, NotFound, StoreError
from millrace.core.facts import ReplicaEntry
from millrace.core.model import Verdict
from millrace.core.ports import Clock, Store
from millrace.pipeline.distribute import hash_object

__all__ = ["Checked", "Inspector"]

_FAILURES_IN_A_ROW: Final = 8
_LEFT_ALONE_S: Final = 30.0
"""A store that fails again and again is asked again after this time, not for each of its 100,000 objects."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found out about one replica.

    Attributes:
        store: Whose.
        verdict: In a word.
        detail: In a sentence; empty when it is whole.
    """

    store: str
    verdict: Verdict
    detail: str = ""


@dataclass(slots=True)
class _Trouble:
    failures: int = 0
    until_s: float = 0.0
    last: str = ""


class Inspector:
    """Reads replicas back and hashes them, a few at a time.

    Args:
        stores: Every store of the world by name.
        clock: For how long a failing store is left alone.
        slots: Replicas read at once, at least 1; each takes up to 16 MB of memory, whatever its size.
    """

    def __init__(self, stores: Mapping[str, Store], clock: Clock, *, slots: int) -> None:
        self._stores = stores
        self._clock = clock
        self._slots = asyncio.Semaphore(slots)
        self._trouble: dict[str, _Trouble] = {}

    async def check(self, entry: ReplicaEntry, name: str) -> Checked:
        """Read the replica of ``entry`` in store ``name`` whole and judge it. Raises nothing but cancellation."""
        store = self._stores.get(name)
        if store is None:
            return Checked(name, Verdict.UNREADABLE, f"store {name} is not in this world file")
        async with self._slots:
            trouble = self._trouble.setdefault(name, _Trouble())
            if trouble.until_s > self._clock.monotonic_s():
                return Checked(name, Verdict.UNREADABLE, f"not tried, as {name} keeps failing: {trouble.last}")
            try:
                checked = await self._judge(store, name, entry)
            except StoreError as error:
                trouble.failures += 1
                trouble.last = f"{error.kind}: {error}"
                if trouble.failures >= _FAILURES_IN_A_ROW:
                    trouble.until_s = self._clock.monotonic_s() + _LEFT_ALONE_S
                return Checked(name, Verdict.UNREADABLE, trouble.last)
        trouble.failures = 0
        return checked

    async def check_all(self, entry: ReplicaEntry, names: Sequence[str]) -> list[Checked]:
        """Judge several replicas of one object at once, in the order of ``names``."""
        return await at_once([self.check(entry, name) for name in names])

    async def _judge(self, store: Store, name: str, entry: ReplicaEntry) -> Checked:
        try:
            size = (await store.head(entry.key)).size_bytes
            if size != entry.size_bytes:
                verb = "truncated" if size < entry.size_bytes else "grown"
                return Checked(name, Verdict.ROTTEN, f"{verb} to {size} of {entry.size_bytes} bytes")
            digest = await hash_object(store, entry.key, entry.size_bytes)
        except NotFound:
            return Checked(name, Verdict.MISSING, "the object is not there")
        except Corrupt as error:
            return Checked(name, Verdict.ROTTEN, str(error))
        if digest != entry.digest:
            return Checked(name, Verdict.ROTTEN, f"the bytes differ: their SHA-256 is {digest}")
        return Checked(name, Verdict.WHOLE)
