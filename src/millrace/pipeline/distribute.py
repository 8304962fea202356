"""distribute: objects in, receipts out. A receipt is given after the bytes were read back and hashed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from millrace.core.errors import Corrupt, NotFound, PolicyRefused, PreconditionFailed, StoreError
from millrace.core.model import Digest, Receipt
from millrace.core.ports import Bytes, Clock, Store

__all__ = ["Blob", "Distributor", "hash_object", "put_verified"]

_WRITE_ATTEMPTS = 3
_DOWN_S = 30.0
"""How long a store that failed for good is left alone before it is tried again."""

Place = Callable[[Digest, Collection[str], Collection[str]], Sequence[str]]
"""(digest, keep, without) to store names; raises PolicyRefused."""


@dataclass(frozen=True, slots=True)
class Blob:
    """An immutable object to be replicated: ``pieces``, concatenated, have the digest."""

    digest: Digest
    key: str
    size_bytes: int
    pieces: Sequence[Bytes]


async def hash_object(store: Store, key: str, size_bytes: int) -> Digest:
    """The SHA-256 of an object as it is read back from ``store``.

    Raises:
        Corrupt: it is shorter or longer than ``size_bytes``.
        StoreError: it can't be read.
    """
    found = await store.content(key)
    if found.size_bytes != size_bytes:
        raise Corrupt(
            f"{key} in {store.url} has {found.size_bytes} bytes where {size_bytes} were written",
            store=store.url,
            key=key,
        )
    return found.digest


async def put_verified(store: Store, blob: Blob) -> None:
    """Make sure ``store`` holds ``blob``, proved by reading it back whole. Writes only what isn't there.

    Raises:
        Corrupt: what is read back differs from what was written, several times over.
        StoreError: it can't be written or read.
    """
    try:
        info = await store.head(blob.key)
        if info.size_bytes == blob.size_bytes and await _is_true(store, blob):
            return
    except NotFound:
        pass
    for _ in range(_WRITE_ATTEMPTS):
        await store.put(blob.key, blob.pieces)
        if await _is_true(store, blob):
            return
    raise Corrupt(
        f"{blob.key} was written to {store.url} {_WRITE_ATTEMPTS} times and came back different each time; "
        "take the store out of the world and check its disk or service",
        store=store.url,
        key=blob.key,
    )


async def _is_true(store: Store, blob: Blob) -> bool:
    """Whether what is read back is what the digest names."""
    for attempt in range(_WRITE_ATTEMPTS):
        try:
            return await hash_object(store, blob.key, blob.size_bytes) == blob.digest
        except Corrupt:
            return False
        except PreconditionFailed:
            # Another task that made the same shard wrote it again meanwhile; its bytes are the same. Read those.
            if attempt == _WRITE_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


class Distributor:
    """Puts objects where policy wants them, and elsewhere within policy when a store fails.

    Args:
        stores: Every store of the world by name.
        place: The placement decision, injected.
        clock: For receipts and for how long a failed store is left alone.
    """

    def __init__(self, stores: Mapping[str, Store], place: Place, clock: Clock) -> None:
        self._stores = stores
        self._place = place
        self._clock = clock
        self._down: dict[str, tuple[float, StoreError]] = {}
        self.notes: list[str] = []
        """Sentences about stores that failed while the work went on elsewhere; the caller takes them away."""

    async def distribute(self, blob: Blob) -> tuple[Receipt, ...]:
        """Replicate one object; gives a receipt for each replica, in placement order.

        Raises:
            StoreError: the policy can't be met with the stores that work; names them and why.
            PolicyRefused: it can't be met with any.
        """
        receipts: dict[str, Receipt] = {}
        failed: dict[str, StoreError] = {}
        now = self._clock.monotonic_s()
        avoid = {name for name, (until, _) in self._down.items() if until > now}
        while True:
            targets = self._targets(blob, receipts, failed, avoid)
            missing = [name for name in targets if name not in receipts]
            if not missing:
                return tuple(receipts[name] for name in targets)
            outcomes = await self._put_all(blob, missing)
            for name, outcome in zip(missing, outcomes, strict=True):
                if isinstance(outcome, Receipt):
                    receipts[name] = outcome
                else:
                    failed[name] = outcome
                    self._down[name] = (self._clock.monotonic_s() + _DOWN_S, outcome)
                    self._note(f"{name} is left out: {outcome}")

    def _targets(
        self, blob: Blob, receipts: Mapping[str, Receipt], failed: Mapping[str, StoreError], avoid: set[str]
    ) -> Sequence[str]:
        try:
            return self._place(blob.digest, receipts, {*failed, *avoid})
        except PolicyRefused:
            if avoid - set(failed):
                avoid.clear()  # a store that failed a while ago may have recovered; better than giving up
                return self._targets(blob, receipts, failed, avoid)
            if not failed:
                raise
        last = list(failed.values())[-1]
        sentence = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise type(last)(
            f"{len(receipts)} of the replicas of {blob.key} could be made and no legal place is left for the others: "
            f"{sentence}",
            store=last.store,
            key=blob.key,
        )

    async def _put_all(self, blob: Blob, names: Sequence[str]) -> list[Receipt | StoreError]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._put_one(blob, name)) for name in names]
        return [task.result() for task in tasks]

    async def _put_one(self, blob: Blob, name: str) -> Receipt | StoreError:
        try:
            await put_verified(self._stores[name], blob)
        except StoreError as error:
            return error
        return Receipt(blob.digest, name, self._clock.now_ms())

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
