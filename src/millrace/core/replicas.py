"""Reading an immutable object from whichever replica is there and true."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from millrace.core.errors import Corrupt, StoreError, Unavailable
from millrace.core.model import Digest, digest_of
from millrace.core.ports import Store

__all__ = ["fetch"]


async def fetch(stores: Mapping[str, Store], key: str, digest: Digest, names: Sequence[str]) -> memoryview:
    """The object at ``key``, verified, from the first of ``names`` that has it whole.

    Raises:
        Corrupt: every replica that could be read is rotten.
        Unavailable: none could be read; the message says why for each store, and how to repair.
    """
    failures: list[str] = []
    rotten = 0
    for name in names:
        store = stores.get(name)
        if store is None:
            failures.append(f"{name}: not in this world file")
            continue
        try:
            data = await store.get(key)
        except StoreError as error:
            failures.append(f"{name}: {error}")
            continue
        if digest_of(data) == digest:
            return data
        rotten += 1
        failures.append(f"{name}: the bytes are not those the digest names")
    kind = Corrupt if rotten and rotten == len(failures) else Unavailable
    raise kind(
        f"no whole replica of {key} is left ({'; '.join(failures) or 'no store is known to hold it'}); "
        "bring one of these stores back, then run millrace verify --repair",
        key=key,
    )
