"""The SQLite store and its twin in memory, driven alike at random: they must agree on every answer."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from millrace.coord.memory import MemoryCoordination
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import CoordError
from millrace.core.ports import Change, Compare, Coordination, Lease, Write

KEYS = st.sampled_from(["a", "a/%", "a/_", "a/b", "aa", "b", "é", "é/x", "\U0010ffff"])
PREFIXES = st.sampled_from(["", "a", "a/", "a/%", "a/_", "é", "b", "c", "\U0010ffff"])
VALUES = st.one_of(st.none(), st.binary(max_size=4))
NAMES = st.sampled_from(["l", "m"])
HOLDERS = st.sampled_from(["x", "y", "z"])
TTLS_MS = st.integers(1, 20)


class Twins(RuleBasedStateMachine):
    """Every rule is one call, made of both stores."""

    revisions = Bundle("revisions")
    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "coord.db"
        self.now_ms = 1000
        self.epochs: dict[str, tuple[int, str]] = {}
        self.memory = MemoryCoordination(tombstones_max=3)
        self.sqlite = self.opened()

    def opened(self) -> SqliteCoordination:
        return SqliteCoordination(self.path, tombstones_max=3)

    def both(self, call: Callable[[Coordination], Coroutine[Any, Any, Any]]) -> Any:
        """What both answer: equal results, or errors of one kind with one sentence."""

        async def one(store: Coordination) -> Any:
            try:
                return await call(store)
            except CoordError as error:
                return (error.kind, str(error))

        async def two() -> tuple[Any, Any]:
            return await one(self.memory), await one(self.sqlite)

        in_memory, on_disk = self.runner.run(two())
        assert in_memory == on_disk
        return in_memory

    @initialize(target=revisions)
    def start(self) -> int:
        return 0

    @rule(
        target=revisions,
        writes=st.dictionaries(KEYS, VALUES, max_size=4),
        compared=st.lists(KEYS, max_size=1),
        revision=revisions,
        guard=st.none() | leases,
    )
    def commit(self, writes: dict[str, bytes | None], compared: list[str], revision: int, guard: Lease | None) -> Any:
        done = self.both(
            lambda store: store.commit(
                [Write(*item) for item in writes.items()],
                compares=[Compare(key, revision) for key in compared],
                guard=guard,
            )
        )
        return done if isinstance(done, int) else multiple()

    @rule(target=revisions, key=KEYS, value=VALUES)
    def swap(self, key: str, value: bytes | None) -> Any:
        async def call(store: Coordination) -> int:
            entry = await store.get(key)
            return await store.commit([Write(key, value)], compares=[Compare(key, entry.revision if entry else 0)])

        done = self.both(call)
        assert isinstance(done, int)
        return done

    @rule(prefix=PREFIXES, after=st.just("") | KEYS, limit=st.integers(1, 4))
    def page(self, prefix: str, after: str, limit: int) -> None:
        self.both(lambda store: store.list(prefix, after=after, limit=limit))

    @rule(prefix=PREFIXES, since=revisions)
    def watch(self, prefix: str, since: int) -> None:
        async def call(store: Coordination) -> list[Change]:
            end = prefix + "\U0010ffff-end"
            await store.commit([Write(end, b"")])
            found: list[Change] = []
            changes = store.watch(prefix, since_revision=since)
            async with aclosing(cast(Any, changes)):
                while not found or found[-1].entry.key != end:
                    found.append(await anext(changes))
            return found

        self.both(call)

    @rule(target=leases, name=NAMES, holder=HOLDERS, ttl_ms=TTLS_MS, steal=st.booleans())
    def acquire(self, name: str, holder: str, ttl_ms: int, steal: bool) -> Any:
        lease = self.both(lambda store: store.acquire(name, holder, ttl_ms, now_ms=self.now_ms, steal=steal))
        if not isinstance(lease, Lease):
            return multiple()
        epoch, last = self.epochs.get(name, (0, ""))
        assert lease.epoch > epoch or (lease.epoch == epoch and holder == last)
        self.epochs[name] = (lease.epoch, holder)
        return lease

    @rule(target=leases, lease=consumes(leases), ttl_ms=TTLS_MS)
    def renew(self, lease: Lease, ttl_ms: int) -> Any:
        renewed = self.both(lambda store: store.renew(lease, ttl_ms, now_ms=self.now_ms))
        return renewed if isinstance(renewed, Lease) else lease

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.both(lambda store: store.release(lease))

    @rule(step_ms=st.integers(1, 15))
    def wait(self, step_ms: int) -> None:
        self.now_ms += step_ms

    @rule()
    def reopen(self) -> None:
        self.runner.run(self.sqlite.aclose())
        self.sqlite = self.opened()

    @invariant()
    def same_facts(self) -> None:
        self.both(lambda store: store.list(""))
        self.both(lambda store: store.commit([]))
        for name in ("l", "m"):
            self.both(lambda store, name=name: store.holder(name))  # type: ignore[misc]

    def teardown(self) -> None:
        self.runner.run(self.sqlite.aclose())
        self.runner.close()
        self.directory.cleanup()


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
