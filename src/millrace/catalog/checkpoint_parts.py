"""The objects a checkpoint consists of: read from whichever store has them true, and many of them at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from millrace.catalog.checkpoint_depot import Budget, Depot
from millrace.catalog.crew import at_once
from millrace.core.errors import Corrupt, NotFound, StoreError, Unavailable
from millrace.core.keys import checkpoint_object
from millrace.core.model import Digest, digest_of
from millrace.core.ports import Store

__all__ = ["digest_aside", "each_within", "is_true", "read_part"]

T = TypeVar("T")

_ASIDE_BYTES: Final = 1 << 20


async def each_within(budget: Budget, work: Iterable[T], do: Callable[[T], Awaitable[None]]) -> None:
    """``do`` every piece of ``work``, ``budget.pieces`` of them at once. The first error ends it all."""
    todo = iter(work)

    async def hand(todo: Iterator[T]) -> None:
        for one in todo:
            await do(one)

    await at_once([hand(todo) for _ in range(budget.pieces)])


async def digest_aside(data: bytes | bytearray | memoryview) -> Digest:
    """Its SHA-256; of much data, in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(digest_of, data) if len(data) > _ASIDE_BYTES else digest_of(data)


async def is_true(store: Store, key: str, digest: Digest, size_bytes: int) -> bool:
    """Whether the object is there with these very bytes, by reading it. Raises ``StoreError`` if that can't be told."""
    try:
        if (await store.head(key)).size_bytes != size_bytes:
            return False
        found = await store.content(key)
    except NotFound:
        return False
    return found.size_bytes == size_bytes and found.digest == digest


async def read_part(depot: Depot, digest: Digest, names: Sequence[str]) -> tuple[memoryview, str]:
    """The bytes of an object, verified, and the store they came from: the first of ``names`` that has it true.

    Raises:
        Corrupt: it is rotten or missing in every store.
        Unavailable: no store that could be read has it true; says why for each.
    """
    key = checkpoint_object(depot.name, digest)
    why: list[str] = []
    kind: type[StoreError] = Corrupt
    for name in names:
        try:
            data = await depot.store(name).get(key)
        except NotFound:
            why.append(f"{name} has it not")
            continue
        except StoreError as error:
            why.append(f"{name}: {error}")
            kind = Unavailable
            continue
        if await digest_aside(data) == digest:
            return data, name
        why.append(f"in {name} its bytes are not those its digest names")
    raise kind(f"no store has {key} whole ({'; '.join(why)})", key=key)
