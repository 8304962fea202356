"""A claim on a version for as long as it is open, also while coordination can't be reached for a time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import AsyncIterator
from typing import Final

from millrace.catalog.readers import CLAIM_TTL_MS, reading
from millrace.core.errors import CoordError
from millrace.core.facts import VersionRecord
from millrace.core.ports import Clock, Coordination

__all__ = ["claimed"]

_NUMBERS: Final = itertools.count()
_TRIES_A_CLAIM: Final = 20
"""How often a lost claim is tried again in the time that one stands."""


@contextlib.asynccontextmanager
async def claimed(
    coord: Coordination, version: VersionRecord, clock: Clock, *, ttl_ms: int = CLAIM_TTL_MS
) -> AsyncIterator[None]:
    """Have garbage collection leave ``version`` alone while the body runs.

    A claim that could not be renewed is made again as soon as that is possible. What is read meanwhile is verified, and
    gone only if the version was removed.

    Raises:
        UsageError: the version was removed.
        CoordError: coordination can't be reached now.
    """
    who = f"{socket.gethostname()}-{os.getpid()}-feed-{next(_NUMBERS)}"
    is_claimed = asyncio.Event()

    async def keep() -> None:
        while True:
            try:
                async with reading(coord, version, who, clock, ttl_ms=ttl_ms):
                    is_claimed.set()
                    await asyncio.Event().wait()
            except CoordError:
                if not is_claimed.is_set():
                    raise
            await asyncio.sleep(ttl_ms / 1000 / _TRIES_A_CLAIM)

    keeper = asyncio.create_task(keep())
    first = asyncio.create_task(is_claimed.wait())
    try:
        await asyncio.wait((keeper, first), return_when=asyncio.FIRST_COMPLETED)
        if not is_claimed.is_set():
            await keeper
        yield
    finally:
        keeper.cancel()
        first.cancel()
        await asyncio.gather(keeper, first, return_exceptions=True)
