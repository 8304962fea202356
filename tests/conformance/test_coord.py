"""The laws of the coordination port, for every adapter."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from millrace.coord.memory import MemoryCoordination
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import Conflict, CoordError, Fenced, LeaseHeld
from millrace.core.ports import Change, Compare, Coordination, Entry, Lease, Write

Scenario = Callable[[Coordination], Coroutine[Any, Any, None]]
Run = Callable[[Scenario], None]
TOMBSTONES_MAX = 8
MIB = 1 << 20


@pytest.fixture(params=["memory", "sqlite"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """Runs a scenario on a fresh, empty store."""

    def make() -> Coordination:
        if request.param == "memory":
            return MemoryCoordination(tombstones_max=TOMBSTONES_MAX)
        return SqliteCoordination(tmp_path / "coord.db", tombstones_max=TOMBSTONES_MAX, poll_interval_s=0.01)

    def run_one(scenario: Scenario) -> None:
        async def main() -> None:
            coord = make()
            try:
                await scenario(coord)
            finally:
                await coord.aclose()

        asyncio.run(main())

    return run_one


async def put(coord: Coordination, key: str, value: bytes = b"x") -> int:
    return await coord.commit([Write(key, value)])


async def keys(listing: Awaitable[Sequence[Entry]]) -> list[str]:
    return [entry.key for entry in await listing]


def watching(coord: Coordination, prefix: str, *, since_revision: int = 0) -> aclosing[AsyncGenerator[Change, None]]:
    """A watch that is closed at the end of its block. The adapters' watches are generators."""
    changes = coord.watch(prefix, since_revision=since_revision)
    return aclosing(cast(AsyncGenerator[Change, None], changes))


async def take(changes: AsyncIterator[Change], count: int) -> list[tuple[str, bytes | None]]:
    """The next ``count`` changes, as (key, value), a deletion's value being None."""
    found = [await anext(changes) for _ in range(count)]
    return [(change.entry.key, None if change.deleted else change.entry.value) for change in found]


# --- values and revisions ---------------------------------------------------------------------------


def test_a_value_is_read_back_with_the_revision_that_wrote_it(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        assert await coord.get("a") is None
        first = await put(coord, "a", b"1")
        second = await put(coord, "b", b"")
        assert 0 < first < second
        assert await coord.get("a") == Entry("a", b"1", first)
        assert await coord.get("b") == Entry("b", b"", second)

    run(scenario)


def test_one_commit_has_one_revision_and_reading_has_none(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        revision = await coord.commit([Write("a", b"1"), Write("b", b"2")])
        assert [entry.revision for entry in await coord.list("")] == [revision, revision]
        assert await coord.commit([]) == revision
        assert await coord.commit([], compares=[Compare("a", revision)]) == revision

    run(scenario)


def test_a_deleted_key_is_gone_until_written_again(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        first = await put(coord, "a")
        deleted = await coord.commit([Write("a", None)])
        assert deleted > first
        assert await coord.get("a") is None
        assert list(await coord.list("")) == []
        again = await coord.commit([Write("a", b"2")], compares=[Compare("a", 0)])
        assert again > deleted
        assert await coord.get("a") == Entry("a", b"2", again)
        await coord.commit([Write("never", None)])

    run(scenario)


# --- compare and swap -------------------------------------------------------------------------------


def test_compare_and_swap_lets_one_of_two_writers_win(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        created = await coord.commit([Write("a", b"1")], compares=[Compare("a", 0)])
        with pytest.raises(Conflict, match="'a'"):
            await coord.commit([Write("a", b"2")], compares=[Compare("a", 0)])
        swapped = await coord.commit([Write("a", b"2")], compares=[Compare("a", created)])
        with pytest.raises(Conflict, match="'a'"):
            await coord.commit([Write("a", b"3")], compares=[Compare("a", created)])
        assert await coord.get("a") == Entry("a", b"2", swapped)

    run(scenario)


def test_a_compare_on_a_missing_key_holds_at_revision_0_only(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        written = await put(coord, "a")
        with pytest.raises(Conflict):
            await coord.commit([Write("b", b"")], compares=[Compare("missing", written)])
        await coord.commit([Write("a", None)])
        with pytest.raises(Conflict):
            await coord.commit([Write("b", b"")], compares=[Compare("a", written)])
        await coord.commit([Write("b", b"")], compares=[Compare("a", 0), Compare("missing", 0)])

    run(scenario)


def test_a_refused_commit_leaves_nothing(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        before = await put(coord, "a", b"1")
        with pytest.raises(Conflict):
            await coord.commit(
                [Write("a", None), Write("b", b"2"), Write("c", b"3")],
                compares=[Compare("a", before), Compare("z", before)],
            )
        assert await coord.list("") == [Entry("a", b"1", before)]
        assert await coord.commit([]) == before

    run(scenario)


def test_concurrent_increments_lose_no_update(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        async def increment() -> None:
            while True:
                entry = await coord.get("n")
                value, revision = (int(entry.value), entry.revision) if entry else (0, 0)
                try:
                    await coord.commit([Write("n", b"%d" % (value + 1))], compares=[Compare("n", revision)])
                except Conflict:
                    continue
                return

        async with asyncio.TaskGroup() as group:
            for _ in range(16):
                group.create_task(increment())
        entry = await coord.get("n")
        assert entry is not None
        assert entry.value == b"16"

    run(scenario)


# --- listing ----------------------------------------------------------------------------------------


def test_list_gives_pages_in_key_order(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        names = [f"p/{i:03}" for i in range(25)]
        await coord.commit([Write(name, name.encode()) for name in reversed(names)])
        await put(coord, "q")
        found: list[str] = []
        while page := await keys(coord.list("p/", after=found[-1] if found else "", limit=10)):
            assert len(page) <= 10
            found += page
        assert found == names
        assert await keys(coord.list("p/", after="p/0225")) == ["p/023", "p/024"]
        assert await keys(coord.list("p/", after="o")) == names
        assert await keys(coord.list("p/", after="p0")) == []
        assert await keys(coord.list("", after="p/024")) == ["q"]
        assert await keys(coord.list("none")) == []

    run(scenario)


def test_a_prefix_is_exact_whatever_its_characters(run: Run) -> None:
    everything = ["%", "%a", "A", "A_", "Ab", "_", "_x", "a", "a%b", "a_b", "axb", "z\x00", "z\x00y", "\x7f", "\x7fa"]
    everything += ["\x80", "é", "éa", "é\U0010ffff", "ê", "\u07ff", "\u0800", "\ud7ff", "\uffff", "\U00010000"]
    everything += ["\U0010ffff", "\U0010ffffa", "e\u0301", "[a]", "*", "?", "\\", "'", '"', " ", "\n"]

    async def scenario(coord: Coordination) -> None:
        await coord.commit([Write(key, key.encode()) for key in everything])
        for prefix in ["", "é\U0010ffff", "a%b", "zz", *everything]:
            assert await keys(coord.list(prefix)) == sorted(key for key in everything if key.startswith(prefix))
            after = sorted(key for key in everything if key > prefix)
            assert await keys(coord.list("", after=prefix)) == after

    run(scenario)


# --- watching ---------------------------------------------------------------------------------------


def test_a_watch_from_0_tells_what_is_there_then_what_comes(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        await put(coord, "p/b", b"1")
        await put(coord, "p/a", b"2")
        await put(coord, "q/a", b"3")
        async with watching(coord, "p/") as changes:
            assert await take(changes, 2) == [("p/b", b"1"), ("p/a", b"2")]
            waiting = asyncio.ensure_future(anext(changes))
            await put(coord, "q/b", b"4")
            revision = await put(coord, "p/c", b"5")
            assert await waiting == Change(Entry("p/c", b"5", revision))
            await coord.commit([Write("p/a", None), Write("p/d", b"6"), Write("q/a", None)])
            assert await take(changes, 2) == [("p/a", None), ("p/d", b"6")]

    run(scenario)


def test_a_watch_tells_only_what_is_newer_than_its_revision(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        await put(coord, "a", b"1")
        await put(coord, "b", b"1")
        since = await put(coord, "c", b"1")
        deleted = await coord.commit([Write("b", None)])
        await put(coord, "a", b"2")
        async with watching(coord, "", since_revision=since) as changes:
            gone = await anext(changes)
            assert gone == Change(Entry("b", b"", deleted), deleted=True)
            assert await take(changes, 1) == [("a", b"2")]
        async with watching(coord, "", since_revision=deleted) as changes:
            assert await take(changes, 1) == [("a", b"2")]

    run(scenario)


def test_changes_between_two_looks_arrive_in_order_and_end_at_the_newest(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        async with watching(coord, "") as changes:
            first = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0)
            for i in range(20):
                await coord.commit([Write("a", b"%d" % i), Write("b", b"%d" % i)])
            await put(coord, "end")
            seen = [await first]
            while seen[-1].entry.key != "end":
                seen.append(await anext(changes))
        places = [(change.entry.revision, change.entry.key) for change in seen]
        assert places == sorted(set(places))
        newest = {change.entry.key: change.entry.value for change in seen}
        assert newest == {"a": b"19", "b": b"19", "end": b"x"}

    run(scenario)


def test_a_watch_tells_more_than_a_batch(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        names = [f"{i:04}" for i in range(250)]
        for start in range(0, 250, 90):
            await coord.commit([Write(name, b"") for name in reversed(names[start : min(start + 90, 250)])])
        async with watching(coord, "") as changes:
            assert [key for key, _ in await take(changes, 250)] == names
            await put(coord, "new")
            assert await take(changes, 1) == [("new", b"x")]

    run(scenario)


def test_two_watches_each_hear_everything(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        async def hear(prefix: str) -> list[tuple[str, bytes | None]]:
            async with watching(coord, prefix) as changes:
                return await take(changes, 3)

        tasks = [asyncio.create_task(hear("")), asyncio.create_task(hear("k"))]
        for i in range(3):
            await put(coord, f"k{i}")
        assert [[key for key, _ in await task] for task in tasks] == [["k0", "k1", "k2"]] * 2

    run(scenario)


def test_a_watch_that_missed_forgotten_deletions_says_so(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        since = await put(coord, "kept")
        for i in range(TOMBSTONES_MAX + 1):
            await put(coord, f"{i}")
            await coord.commit([Write(f"{i}", None)])
        with pytest.raises(CoordError, match="watch again from revision 0") as missed:
            await anext(coord.watch("", since_revision=since))
        floor = int(re.findall(r"up to revision (\d+)", str(missed.value))[0])
        async with watching(coord, "", since_revision=floor) as changes:
            assert (await anext(changes)).deleted
        async with watching(coord, "kept") as changes:
            assert await take(changes, 1) == [("kept", b"x")]
            newest = await coord.commit([Write("kept", None)])
            assert await take(changes, 1) == [("kept", None)]
        async with watching(coord, "", since_revision=newest) as changes:
            await put(coord, "later")
            assert await take(changes, 1) == [("later", b"x")]

    run(scenario)


def test_closing_ends_the_watches_and_refuses_the_rest(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        async def hear() -> list[str]:
            return [change.entry.key async for change in coord.watch("")]

        await put(coord, "a")
        task = asyncio.create_task(hear())
        async with watching(coord, "") as other:
            await take(other, 1)
            await coord.aclose()
            assert await task in (["a"], [])
            with pytest.raises(StopAsyncIteration):
                await anext(other)
        for call in (coord.get("a"), coord.commit([]), coord.holder("l")):
            with pytest.raises(CoordError, match="closed"):
                await call
        await coord.aclose()

    run(scenario)


def test_a_cancelled_watch_leaves_no_task(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        async def hear() -> None:
            async with watching(coord, "") as changes:
                await take(changes, 2)

        await put(coord, "a")
        task = asyncio.create_task(hear())
        await put(coord, "a")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await put(coord, "b")

    run(scenario)


# --- leases -----------------------------------------------------------------------------------------


def test_a_held_lease_is_refused_until_it_expires(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        assert await coord.holder("l") is None
        lease = await coord.acquire("l", "a", 100, now_ms=1000)
        assert (lease.name, lease.holder, lease.expires_at_ms) == ("l", "a", 1100)
        assert await coord.holder("l") == lease
        with pytest.raises(LeaseHeld, match="held by a") as held:
            await coord.acquire("l", "b", 100, now_ms=1099)
        assert (held.value.holder, held.value.expires_at_ms) == ("a", 1100)
        taken = await coord.acquire("l", "b", 100, now_ms=1100)
        assert taken.epoch > lease.epoch
        assert await coord.holder("l") == taken
        assert (await coord.acquire("other", "c", 100, now_ms=1000)).holder == "c"

    run(scenario)


def test_the_same_holder_keeps_its_epoch_expired_or_not(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        lease = await coord.acquire("l", "a", 100, now_ms=1000)
        for now_ms in (1050, 5000):
            again = await coord.acquire("l", "a", 100, now_ms=now_ms)
            assert again == Lease("l", "a", lease.epoch, now_ms + 100)

    run(scenario)


def test_a_stolen_lease_fences_the_one_it_was_stolen_from(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        lease = await coord.acquire("l", "a", 100, now_ms=1000)
        stolen = await coord.acquire("l", "b", 100, now_ms=1001, steal=True)
        assert stolen.epoch > lease.epoch
        with pytest.raises(Fenced, match="replaced by epoch"):
            await coord.renew(lease, 100, now_ms=1002)
        await coord.release(lease)
        assert await coord.holder("l") == stolen

    run(scenario)


def test_an_epoch_never_goes_back_not_even_after_release(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        epochs = []
        for holder in ("a", "a", "b", "a"):
            lease = await coord.acquire("l", holder, 100, now_ms=1000)
            epochs.append(lease.epoch)
            await coord.release(lease)
            assert await coord.holder("l") is None
            await coord.release(lease)
        assert epochs == sorted(set(epochs))

    run(scenario)


def test_renewing_extends_even_what_has_expired_but_not_what_is_gone(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        lease = await coord.acquire("l", "a", 100, now_ms=1000)
        renewed = await coord.renew(lease, 100, now_ms=1050)
        assert renewed == Lease("l", "a", lease.epoch, 1150)
        assert await coord.holder("l") == renewed
        late = await coord.renew(lease, 100, now_ms=9000)
        assert late.expires_at_ms == 9100
        await coord.release(late)
        with pytest.raises(Fenced, match="released"):
            await coord.renew(late, 100, now_ms=9001)
        with pytest.raises(Fenced, match="never granted"):
            await coord.renew(Lease("unknown", "a", 1, 0), 100, now_ms=1)

    run(scenario)


def test_a_guard_is_fenced_by_a_new_holder_and_not_by_time(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        lease = await coord.acquire("l", "a", 1, now_ms=1000)
        await coord.commit([Write("k", b"expired but not replaced")], guard=lease)
        newer = await coord.acquire("l", "b", 100, now_ms=2000)
        with pytest.raises(Fenced, match="epoch"):
            await coord.commit([Write("k", b"stale")], guard=lease)
        revision = await coord.commit([Write("k", b"newer")], guard=newer)
        with pytest.raises(Fenced):  # Told before the compare that does not hold either.
            await coord.commit([Write("k", b"stale")], compares=[Compare("k", 0)], guard=lease)
        assert await coord.get("k") == Entry("k", b"newer", revision)
        await coord.release(newer)
        with pytest.raises(Fenced, match="released"):
            await coord.commit([Write("k", b"released")], guard=newer)
        with pytest.raises(Fenced):
            await coord.commit([Write("k", b"forged")], guard=Lease("l", "c", newer.epoch + 1, 9999))
        assert await coord.get("k") == Entry("k", b"newer", revision)

    run(scenario)


def test_one_of_many_wins_a_lease(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        calls = [coord.acquire("l", f"h{i}", 100, now_ms=1000) for i in range(16)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        winners = [result for result in results if isinstance(result, Lease)]
        assert len(winners) == 1
        assert all(isinstance(result, Lease | LeaseHeld) for result in results)
        assert await coord.holder("l") == winners[0]

    run(scenario)


# --- what is refused --------------------------------------------------------------------------------


def test_limits_are_kept_and_named(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        await coord.commit([Write(f"k{i}", b"") for i in range(100)])
        await put(coord, "big", bytes(MIB))
        before = await coord.commit([])
        refused: list[tuple[list[Write], str]] = [
            ([Write(f"n{i}", b"") for i in range(101)], "101 writes"),
            ([Write("huge", bytes(MIB + 1))], "'huge'"),
            ([Write("twice", b"1"), Write("twice", None)], "'twice'"),
            ([Write("", b"")], "empty"),
            ([Write("\udcff", b"")], "Unicode"),
            ([Write("k" * 4097, b"")], "4097"),
        ]
        for writes, named in refused:
            with pytest.raises(CoordError, match=named):
                await coord.commit(writes)
        with pytest.raises(CoordError, match="101 compares"):
            await coord.commit([], compares=[Compare(f"n{i}", 0) for i in range(101)])
        assert await coord.commit([]) == before
        big = await coord.get("big")
        assert big is not None
        assert big.value == bytes(MIB)

    run(scenario)


def test_what_makes_no_sense_is_a_named_error(run: Run) -> None:
    async def scenario(coord: Coordination) -> None:
        calls: list[tuple[Callable[[], Awaitable[object]], str]] = [
            (lambda: coord.get(""), "empty key"),
            (lambda: coord.get("\udc80"), "Unicode"),
            (lambda: coord.list("\udc80"), "Unicode"),
            (lambda: coord.list("", after="\udc80"), "Unicode"),
            (lambda: coord.list("", limit=0), "limit"),
            (lambda: coord.acquire("", "a", 1, now_ms=0), "lease name"),
            (lambda: coord.acquire("l", "", 1, now_ms=0), "lease holder"),
            (lambda: coord.acquire("l", "a", 0, now_ms=0), "0 ms"),
            (lambda: coord.acquire("l", "a", 1, now_ms=-1), "-1"),
            (lambda: coord.acquire("l", "a", 1, now_ms=2**63), "9223"),
            (lambda: coord.holder(""), "lease name"),
        ]
        for call, named in calls:
            with pytest.raises(CoordError, match=named):
                await call()
        for revision in (-1, 2**63):
            with pytest.raises(CoordError, match="revision"):
                await anext(coord.watch("", since_revision=revision))
        with pytest.raises(Conflict):
            await coord.commit([Write("a", b"")], compares=[Compare("a", 2**70)])
        assert await keys(coord.list("", limit=2**70)) == []

    run(scenario)
