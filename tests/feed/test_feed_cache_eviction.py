"""The law of who leaves a full cache, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.feed.eviction import LATE_S, SOON_S, CachedBlock, choose_victims

NOW_S = 1_700_000_000.0

CACHES = st.lists(
    st.builds(
        lambda size, delta: (size, NOW_S + delta),
        st.integers(1, 1000),
        st.one_of(
            st.floats(-3 * LATE_S, 3 * LATE_S),
            st.sampled_from([-LATE_S, -0.0, SOON_S, SOON_S + 1, -LATE_S - 1, 1e9, -1e9]),
        ),
    ),
    max_size=40,
).map(lambda found: [CachedBlock(f"{i:064x}", size, need) for i, (size, need) in enumerate(found)])


def kind(block: CachedBlock) -> str:
    ahead_s = block.needed_s - NOW_S
    if ahead_s < -LATE_S:
        return "late"
    if ahead_s > SOON_S:
        return "far"
    return "just over" if ahead_s <= 0 else "soon"


@given(CACHES, st.integers(-10, 30_000))
def test_enough_goes_and_no_more(blocks: list[CachedBlock], free: int) -> None:
    victims = choose_victims(blocks, free_bytes=free, now_s=NOW_S)
    assert len(set(victims)) == len(victims)
    assert set(victims) <= set(blocks)
    freed = sum(v.size_bytes for v in victims)
    if free <= 0:
        assert victims == []
    elif freed < free:
        assert set(victims) == set(blocks)
    else:
        assert freed - victims[-1].size_bytes < free


@given(CACHES, st.integers(1, 30_000), st.randoms())
def test_the_order_they_lie_in_does_not_matter(blocks: list[CachedBlock], free: int, dice: object) -> None:
    mixed = list(blocks)
    dice.shuffle(mixed)  # type: ignore[attr-defined]
    assert choose_victims(mixed, free_bytes=free, now_s=NOW_S) == choose_victims(blocks, free_bytes=free, now_s=NOW_S)


@given(CACHES, st.integers(1, 30_000))
def test_what_stays_is_needed_before_what_goes(blocks: list[CachedBlock], free: int) -> None:
    victims = choose_victims(blocks, free_bytes=free, now_s=NOW_S)
    stay = set(blocks) - set(victims)
    order = ["late", "far", "just over", "soon"]
    for gone in victims:
        for kept in stay:
            assert order.index(kind(gone)) <= order.index(kind(kept))
            if kind(gone) == kind(kept):
                if kind(gone) in {"far", "soon"}:
                    assert gone.needed_s >= kept.needed_s, "of what lies ahead, the latest leaves first"
                else:
                    assert gone.needed_s <= kept.needed_s, "of what is over, the oldest leaves first"


@given(CACHES, st.integers(1, 2_000), st.integers(0, 2_000))
def test_more_room_takes_more_of_the_same(blocks: list[CachedBlock], free: int, more: int) -> None:
    few = choose_victims(blocks, free_bytes=free, now_s=NOW_S)
    many = choose_victims(blocks, free_bytes=free + more, now_s=NOW_S)
    assert many[: len(few)] == few


def test_the_table_read_aloud() -> None:
    needs = {"dead": -3600, "older": -400, "hour": 3600, "minute": 60, "used": -100, "just": -1, "ten": 10, "next": 1}
    names = {f"{i:064x}": name for i, name in enumerate(needs)}
    blocks = [CachedBlock(n, 1, NOW_S + needs[names[n]]) for n in names]
    order = [names[v.name] for v in choose_victims(blocks, free_bytes=100, now_s=NOW_S)]
    assert order == ["dead", "older", "hour", "minute", "used", "just", "ten", "next"]
