"""Finding out what a store's conditional puts are worth, instead of believing its documentation."""

from __future__ import annotations

import contextlib
from typing import Protocol

from millrace.core.errors import AlreadyExists, NotFound, PreconditionFailed, StoreError, Unsupported
from millrace.core.ports import Capabilities
from millrace.stores.keys import PutMode

__all__ = ["PROBE_PREFIX", "Probed", "probe"]

PROBE_PREFIX = ".millrace/probe-"


class Probed(Protocol):
    """The three requests a probe makes, as the server answers them, with nothing checked in front."""

    async def put_as_told(self, key: str, data: bytes, mode: PutMode, if_version: str | None) -> str:
        """Send the put, conditions and all; give the version."""

    async def get_now(self, key: str) -> bytes:
        """The object's bytes."""

    async def delete(self, key: str) -> None:
        """Remove it."""


async def probe(store: Probed, token: str) -> Capabilities:
    """Write one small object several ways and look at what comes of it. Seven requests and a delete.

    A server can be honest, refuse (501), or ignore a condition and let every writer win. One that checks and
    then writes without a lock, so that only writers at the very same moment both win, is not found out.

    Args:
        store: To be probed.
        token: Makes the key unique, so that two probes don't meet.

    Raises:
        StoreError: the store could not be asked: it is away, or takes no writes.
    """
    key = f"{PROBE_PREFIX}{token}"
    try:
        create_only = await _creates(store, key)
        return Capabilities(create_only, await _swaps(store, key))
    finally:
        # A store that keeps the object for good has answered all the same; listings leave it out.
        with contextlib.suppress(StoreError):
            await store.delete(key)


async def _creates(store: Probed, key: str) -> bool:
    with contextlib.suppress(NotFound):
        await store.get_now(key)
        raise AlreadyExists(f"the probe {key!r} is there already; probe with a fresh token", key=key)
    try:
        await store.put_as_told(key, b"first", "create", None)
        await store.put_as_told(key, b"second", "create", None)
    except AlreadyExists:
        return await _holds(store, key, b"first")
    except (PreconditionFailed, Unsupported):
        return False
    return False


async def _swaps(store: Probed, key: str) -> bool:
    stale = await store.put_as_told(key, b"third", "overwrite", None)
    fresh = await store.put_as_told(key, b"fourth", "overwrite", None)
    if stale == fresh:
        return False  # versions that don't change can't be compared
    try:
        await store.put_as_told(key, b"fifth", "overwrite", stale)
    except PreconditionFailed:
        pass
    except Unsupported:
        return False
    else:
        return False
    try:
        await store.put_as_told(key, b"sixth", "overwrite", fresh)
    except (PreconditionFailed, Unsupported):
        return False
    return await _holds(store, key, b"sixth")


async def _holds(store: Probed, key: str, wanted: bytes) -> bool:
    try:
        return await store.get_now(key) == wanted
    except NotFound:
        return False
