"""A reader's claim: while it stands, garbage collection leaves the version alone, even one that was removed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from millrace.catalog.versions import label, still_there
from millrace.core.errors import CoordError, UsageError
from millrace.core.facts import ReaderClaim, VersionRecord, encode
from millrace.core.keys import reader
from millrace.core.model import Digest
from millrace.core.ports import Clock, Coordination, Write

__all__ = ["CLAIM_TTL_MS", "reading"]

CLAIM_TTL_MS: Final = 120_000
"""How long a claim outlives a reader that was killed."""


@contextlib.asynccontextmanager
async def reading(
    coord: Coordination, version: VersionRecord, who: str, clock: Clock, *, ttl_ms: int = CLAIM_TTL_MS
) -> AsyncIterator[None]:
    """Claim ``version`` while the body runs; the claim is renewed meanwhile and removed afterwards.

    The claim is written first and the version looked up afterwards: a collection that began before the claim
    can only miss it if the version was removed by then, and then this refuses.

    Args:
        coord: Where.
        version: What is read.
        who: Names this reader; unique among those that live (host, process and a counter, for example).
        clock: For the claim's end.
        ttl_ms: How long the claim stands when it is no longer renewed.

    Raises:
        UsageError: the version was removed.
        CoordError: the claim could not be renewed in time; the body was cancelled.
    """
    key = reader(Digest(version.digest), who)
    loop = asyncio.get_running_loop()

    async def claim() -> float:
        """Write it; gives the loop's time at which it ends."""
        ends = loop.time() + ttl_ms / 1000
        fact = ReaderClaim(who=who, until_ms=clock.now_ms() + ttl_ms)
        await coord.commit([Write(key, encode(fact))])
        return ends

    ends = await claim()
    failures: list[CoordError] = []

    async def keep(limit: asyncio.Timeout) -> None:
        while True:
            await asyncio.sleep(ttl_ms / 3000)
            try:
                limit.reschedule(await claim())
            except CoordError as error:
                failures.append(error)
                del failures[:-1]

    try:
        if not await still_there(coord, version):
            raise UsageError(f"{label(version)} was removed; see 'millrace datasets' for what there is")
        async with asyncio.timeout_at(ends) as limit:
            keeper = asyncio.create_task(keep(limit))
            try:
                yield
            finally:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)
    except TimeoutError as error:
        if not limit.expired():
            raise
        why = f": {failures[-1]}" if failures else ""
        raise CoordError(
            f"the claim of {who} on {label(version)} could not be renewed for {ttl_ms // 1000} s{why}; "
            "reading was stopped, since the data may be collected now; try again"
        ) from error
    finally:
        with contextlib.suppress(CoordError):  # a claim that can't be taken away ends by itself
            await coord.commit([Write(key, None)])
