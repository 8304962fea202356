"""What all work on the checkpoints of one name needs, and the leases it is done under."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from millrace.core.errors import CoordError, Fenced, LeaseHeld
from millrace.core.keys import checkpoint_lease
from millrace.core.model import StoreSite
from millrace.core.ports import Clock, Coordination, Lease, Store
from millrace.core.spec import Placement
from millrace.decide.placement import legal

__all__ = ["LOCAL", "PART_BYTES", "Budget", "Depot", "Grip", "gripped"]

LOCAL: Final = "(local)"
"""What the folder on this machine is called among the stores. No store of a world can have this name."""

PART_BYTES: Final = 64_000_000
"""Larger files are kept as several objects: this much of one is in memory at a time."""

_LEASE_MS: Final = 60_000
_LOOK_S: Final = 0.05
_IN_MEMORY_BYTES: Final = 4 * PART_BYTES
_AT_ONCE: Final = 8


@dataclass(frozen=True)
class Depot:
    """The checkpoints of one name, and where they can lie.

    Attributes:
        name: Of the series; checked to be a name.
        coord: Where records and leases are.
        stores: Every store of the world by name.
        sites: Every store as decisions see it.
        local: The store in this machine's state folder: durable, but no replica of the policy.
        policy: Where replicas go.
        near: The cloud this machine is in, if that is known.
        clock: For times and ages.
        who: Names this process, uniquely.
        alive: Whether the process that a name like ``who`` speaks of may still run.
        part_bytes: Larger files are cut into parts of this.
    """

    name: str
    coord: Coordination
    stores: Mapping[str, Store]
    sites: Sequence[StoreSite]
    local: Store
    policy: Placement
    near: str | None
    clock: Clock
    who: str
    alive: Callable[[str], bool]
    part_bytes: int = PART_BYTES
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def store(self, name: str) -> Store:
        """A store of the world, or the local one."""
        return self.local if name == LOCAL else self.stores[name]

    def readable(self) -> tuple[str, ...]:
        """The stores to read from, the best first: the local one, the near cloud's, the others that policy allows."""
        allowed = [s for s in self.sites if s.name in self.stores and legal(s, self.policy) is None]
        return (LOCAL, *(s.name for s in sorted(allowed, key=lambda s: s.cloud != self.near)))

    def holder(self) -> str:
        """A new name for a holder of a lease: two pieces of work in one process are two holders."""
        return f"{self.who} checkpoint-{next(self._numbers)}"


@dataclass(slots=True)
class Grip:
    """A lease that is held.

    Attributes:
        lease: As it was last renewed: the guard of commits.
    """

    depot: Depot
    lease: Lease

    async def check(self) -> None:
        """Renew it now. Raises ``Fenced`` when somebody took it."""
        self.lease = await self.depot.coord.renew(self.lease, _LEASE_MS, now_ms=self.depot.clock.now_ms())


@contextlib.asynccontextmanager
async def gripped(depot: Depot, step: int | None = None, *, patience_s: float = 0.0) -> AsyncIterator[Grip]:
    """Hold the lease of the name, or of one step's replication, and renew it while the body runs.

    A holder that is dead is not waited for.

    Args:
        depot: Whose.
        step: None for the name's.
        patience_s: How long to wait for another holder.

    Raises:
        LeaseHeld: another holder has had it all that time.
    """
    lease = await _take(depot, checkpoint_lease(depot.name, step), patience_s)
    grip = Grip(depot, lease)

    async def keep() -> None:
        while True:
            await asyncio.sleep(_LEASE_MS / 4000)
            try:
                await grip.check()
            except Fenced:
                return  # the body hears it at its next commit
            except CoordError:
                continue  # it lasts for two more attempts

    keeper = asyncio.create_task(keep())
    try:
        yield grip
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        with contextlib.suppress(CoordError):  # one that can't be given back ends by itself
            await depot.coord.release(grip.lease)


async def _take(depot: Depot, name: str, patience_s: float) -> Lease:
    holder = depot.holder()
    deadline_s = asyncio.get_running_loop().time() + patience_s
    steal = False
    while True:
        try:
            return await depot.coord.acquire(name, holder, _LEASE_MS, now_ms=depot.clock.now_ms(), steal=steal)
        except LeaseHeld as error:
            steal = not depot.alive(error.holder.partition(" ")[0])
            if steal:
                continue
            if asyncio.get_running_loop().time() >= deadline_s:
                raise LeaseHeld(
                    f"{error.holder} is at work on the checkpoints of {depot.name}; wait until it is done",
                    holder=error.holder,
                    expires_at_ms=error.expires_at_ms,
                ) from error
            await asyncio.sleep(_LOOK_S)


class Budget:
    """A bound on what is in memory at once: so many bytes and so many pieces.

    Args:
        size_bytes: In all. One piece that is larger alone goes all the same, alone.
        pieces: How many at most.
    """

    def __init__(self, size_bytes: int = _IN_MEMORY_BYTES, pieces: int = _AT_ONCE) -> None:
        self.pieces = pieces
        self._size_bytes = size_bytes
        self._free_bytes = size_bytes
        self._freed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, size_bytes: int) -> AsyncIterator[None]:
        """Wait for room, and keep it while the body runs."""
        wanted = min(size_bytes, self._size_bytes)
        async with self._freed:
            await self._freed.wait_for(lambda: self._free_bytes >= wanted)
            self._free_bytes -= wanted
        try:
            yield
        finally:
            self._free_bytes += wanted
            async with self._freed:
                self._freed.notify_all()
