"""A read takes the first replica that is there and true, and says of each why it was not."""

from __future__ import annotations

import asyncio

import pytest

from millrace.core.errors import Corrupt, Unavailable
from millrace.core.model import digest_of
from millrace.core.replicas import fetch
from millrace.stores.memory import MemoryStore

DATA = b"the shard"
DIGEST = digest_of(DATA)
KEY = "shards/x"


async def stores(**contents: bytes | None) -> dict[str, MemoryStore]:
    made = {}
    for name, data in contents.items():
        made[name] = MemoryStore(name)
        if data is not None:
            await made[name].put(KEY, [data])
    return made


def read(names: list[str], **contents: bytes | None) -> bytes:
    async def main() -> bytes:
        return bytes(await fetch(await stores(**contents), KEY, DIGEST, names))

    return asyncio.run(main())


def test_the_first_whole_replica_in_the_order_asked_for_is_read() -> None:
    assert read(["a", "b"], a=DATA, b=b"rot") == DATA
    assert read(["b", "a"], a=DATA, b=b"rot") == DATA
    assert read(["gone", "b", "a"], a=DATA, b=None) == DATA


def test_only_the_stores_named_are_asked() -> None:
    with pytest.raises(Unavailable, match="no store is known to hold it"):
        read([], a=DATA)


def test_every_replica_rotten_is_corrupt() -> None:
    with pytest.raises(Corrupt) as caught:
        read(["a", "b"], a=b"rot", b=b"")
    assert str(caught.value) == (
        "no whole replica of shards/x is left (a: the bytes are not those the digest names; b: the bytes are not those "
        "the digest names); bring one of these stores back, then run millrace verify --repair"
    )
    assert caught.value.key == KEY


def test_some_out_of_reach_may_come_back() -> None:
    with pytest.raises(Unavailable) as caught:
        read(["a", "b", "gone"], a=b"rot", b=None)
    message = str(caught.value)
    assert "a: the bytes are not those" in message
    assert "b: store b has no object 'shards/x'" in message
    assert "gone: not in this world file" in message
