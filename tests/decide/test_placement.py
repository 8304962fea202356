"""Placement's laws. Policy is a wall; the hash decides only within it.

The law of movement, which holds whether ``min_clouds`` binds or not: adding one store brings at most one replica of
an object to another place, and that place is the new store; losing one moves only the replica it held. The sets of
stores that ``replicas`` and ``min_clouds`` permit are the independent sets of a matroid (the elongation of the
partition matroid of clouds), and the greedy choice is its best base; a base changes by one exchange.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from millrace.core.errors import PolicyRefused
from millrace.core.model import Digest, StoreSite, digest_of
from millrace.core.spec import Placement
from millrace.decide.placement import legal, place, refusals, score

CLOUDS = ("aws", "gcp", "azure", "ibm")
LAWS = ("us", "eu", "ch")


def digest(number: int) -> Digest:
    return digest_of(b"%d" % number)


@st.composite
def worlds(draw: st.DrawFn, *, most: int = 9) -> list[StoreSite]:
    count = draw(st.integers(1, most))
    return [
        StoreSite(
            f"s{i}",
            draw(st.sampled_from(CLOUDS)),
            draw(st.sampled_from(["r1", "r2"])),
            draw(st.sampled_from(LAWS)),
            draw(st.sampled_from([1.0, 1.0, 1.0, 0.1, 3.0, 1000.0])),
        )
        for i in range(count)
    ]


@st.composite
def policies(draw: st.DrawFn) -> Placement:
    replicas = draw(st.integers(1, 5))
    return Placement(
        replicas=replicas,
        min_clouds=draw(st.integers(1, min(4, replicas))),
        allow=draw(st.none() | st.lists(st.sampled_from(LAWS), max_size=3, unique=True).map(tuple)),
        deny=draw(st.lists(st.sampled_from(LAWS), max_size=1).map(tuple)),
    )


near_clouds = st.none() | st.sampled_from([*CLOUDS, "nowhere"])
digests = st.integers(0, 10**6).map(digest)


def names(sites: tuple[StoreSite, ...]) -> set[str]:
    return {s.name for s in sites}


def possible(sites: list[StoreSite], policy: Placement) -> None:
    assume(not refusals(sites, policy))


@given(digests, worlds(), policies(), near_clouds, st.sets(st.integers(0, 8).map("s{}".format)))
def test_what_is_placed_keeps_every_rule(
    d: Digest, sites: list[StoreSite], policy: Placement, near: str | None, keep: set[str]
) -> None:
    possible(sites, policy)
    chosen = place(d, sites, policy, near=near, keep=keep)
    assert len(chosen) == len(names(chosen)) == policy.replicas
    assert len({s.cloud for s in chosen}) >= policy.min_clouds
    for site in chosen:
        assert site in sites
        assert policy.allow is None or site.jurisdiction in policy.allow
        assert site.jurisdiction not in policy.deny
    if any(s.cloud == near and legal(s, policy) is None for s in sites):
        assert chosen[0].cloud == near


@given(worlds(), policies())
def test_placement_is_possible_exactly_when_nothing_is_refused(sites: list[StoreSite], policy: Placement) -> None:
    allowed = [s for s in sites if legal(s, policy) is None]
    can_be_done = len(allowed) >= policy.replicas and len({s.cloud for s in allowed}) >= policy.min_clouds
    assert can_be_done == (not refusals(sites, policy))
    if not can_be_done:
        with pytest.raises(PolicyRefused):
            place(digest(0), sites, policy)


@given(digests, worlds(), policies(), near_clouds, st.randoms(use_true_random=False))
def test_the_order_of_the_stores_means_nothing(
    d: Digest, sites: list[StoreSite], policy: Placement, near: str | None, random: object
) -> None:
    possible(sites, policy)
    shuffled = list(sites)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert place(d, sites, policy, near=near) == place(d, shuffled, policy, near=near)


@given(digests, worlds(), policies(), near_clouds, st.data())
def test_a_new_store_takes_at_most_one_replica_and_nothing_else_moves(
    d: Digest, sites: list[StoreSite], policy: Placement, near: str | None, data: st.DataObject
) -> None:
    new = data.draw(st.sampled_from(sites))
    before = [s for s in sites if s is not new]
    possible(before, policy)
    old_places, new_places = names(place(d, before, policy, near=near)), names(place(d, sites, policy, near=near))
    assert new_places - old_places <= {new.name}
    assert len(old_places - new_places) <= 1


@given(digests, worlds(), policies(), near_clouds, st.data())
def test_a_lost_store_moves_only_what_it_held(
    d: Digest, sites: list[StoreSite], policy: Placement, near: str | None, data: st.DataObject
) -> None:
    lost = data.draw(st.sampled_from(sites))
    left = [s for s in sites if s is not lost]
    possible(left, policy)
    before, after = names(place(d, sites, policy, near=near)), names(place(d, left, policy, near=near))
    assert before - after == before & {lost.name}
    assert after == names(place(d, sites, policy, near=near, without={lost.name}))


@given(digests, worlds(), policies(), near_clouds)
def test_keeping_what_is_there_is_a_fixed_point(
    d: Digest, sites: list[StoreSite], policy: Placement, near: str | None
) -> None:
    possible(sites, policy)
    chosen = names(place(d, sites, policy, near=near))
    assert names(place(d, sites, policy, near=near, keep=chosen)) == chosen


@given(digests, worlds(), policies(), st.data())
def test_stores_that_hold_it_and_can_stay_do_stay(
    d: Digest, sites: list[StoreSite], policy: Placement, data: st.DataObject
) -> None:
    """As many of them as there is room for, while ``min_clouds`` can still be reached."""
    possible(sites, policy)
    held = data.draw(st.sets(st.sampled_from([s.name for s in sites]), max_size=policy.replicas))
    allowed = [s for s in sites if s.name in held and legal(s, policy) is None]
    stay = names(place(d, sites, policy, keep=held)) & held
    room = policy.replicas - max(0, policy.min_clouds - len({s.cloud for s in allowed}))
    assert len(stay) == min(len(allowed), room)


@given(digests, worlds(most=6), policies(), st.data())
def test_a_store_that_can_not_be_used_is_not_used(
    d: Digest, sites: list[StoreSite], policy: Placement, data: st.DataObject
) -> None:
    without = data.draw(st.sets(st.sampled_from([s.name for s in sites])))
    left = [s for s in sites if s.name not in without]
    try:
        chosen = names(place(d, sites, policy, without=without))
    except PolicyRefused as refused:
        assert refusals(left, policy)
        chosen, sentence = set(), str(refused)
        assert not without or f"({', '.join(sorted(without))} can't be used now)" in sentence
    assert not chosen & without


# --- how much goes where ------------------------------------------------------------------------------


def shares(sites: list[StoreSite], policy: Placement, count: int) -> dict[str, float]:
    held = dict.fromkeys((s.name for s in sites), 0)
    for i in range(count):
        for site in place(digest(i), sites, policy):
            held[site.name] += 1
    return {name: n / count for name, n in held.items()}


def test_weights_are_shares() -> None:
    """One replica of 4,000 fixed objects: each store within four standard deviations of its weight."""
    weights = {"a": 1.0, "b": 2.0, "c": 5.0, "d": 0.5}
    sites = [StoreSite(n, n, "r", "us", w) for n, w in weights.items()]
    found = shares(sites, Placement(replicas=1, min_clouds=1), 4000)
    total = sum(weights.values())
    chi_square = 0.0
    for name, weight in weights.items():
        p = weight / total
        assert abs(found[name] - p) < 4 * (p * (1 - p) / 4000) ** 0.5
        chi_square += 4000 * (found[name] - p) ** 2 / p
    assert chi_square < 16.3  # 3 degrees of freedom, one in a thousand


def test_equal_stores_get_equal_shares_with_three_replicas() -> None:
    sites = [StoreSite(f"s{i}", CLOUDS[i % 4], "r", "us") for i in range(8)]
    found = shares(sites, Placement(replicas=3, min_clouds=2), 3000)
    assert sum(found.values()) == pytest.approx(3)
    assert all(abs(share - 3 / 8) < 0.04 for share in found.values())


def test_a_new_store_gets_its_share_and_no_more() -> None:
    """Of 3,000 objects with three replicas in five stores, a sixth like them takes half of one replica each."""
    sites = [StoreSite(f"s{i}", CLOUDS[i % 4], "r", "us") for i in range(6)]
    policy = Placement(replicas=3, min_clouds=2)
    moved = sum(
        len(names(place(digest(i), sites, policy)) - names(place(digest(i), sites[:5], policy))) for i in range(3000)
    )
    assert moved / 3000 == pytest.approx(0.5, abs=0.05)


def test_a_weight_that_changes_moves_objects_one_way_only() -> None:
    sites = [StoreSite(f"s{i}", CLOUDS[i % 4], "r", "us") for i in range(5)]
    heavier = [replace(sites[0], weight=2.0), *sites[1:]]
    policy = Placement(replicas=2, min_clouds=1)
    for i in range(500):
        before, after = names(place(digest(i), sites, policy)), names(place(digest(i), heavier, policy))
        assert after - before <= {"s0"}


def test_scores_are_these_for_ever() -> None:
    """A release must not move everybody's shards."""
    sites = [StoreSite(f"s{i}", CLOUDS[i % 4], "r", "us") for i in range(6)]
    policy = Placement(replicas=3, min_clouds=2)
    assert score(digest(0), sites[0]) == pytest.approx(1.680655103440703)
    assert [[s.name for s in place(digest(i), sites, policy)] for i in range(4)] == [
        ["s5", "s3", "s4"],
        ["s3", "s0", "s5"],
        ["s1", "s3", "s4"],
        ["s0", "s1", "s4"],
    ]


def test_near_draws_one_replica_and_no_more() -> None:
    sites = [StoreSite(f"s{i}", CLOUDS[i % 4], "r", "us") for i in range(8)]
    policy = Placement(replicas=3, min_clouds=2)
    near = [place(digest(i), sites, policy, near="ibm") for i in range(1000)]
    assert all(chosen[0].cloud == "ibm" for chosen in near)
    others = sum(s.cloud == "ibm" for chosen in near for s in chosen[1:]) / 2000
    assert 0.02 < others < 1 / 7  # the other one there has its own chance, the worse one of two


def test_near_is_a_wish_and_policy_a_wall() -> None:
    sites = [StoreSite("a", "aws", "r", "us"), StoreSite("b", "gcp", "r", "eu"), StoreSite("c", "ibm", "r", "eu")]
    chosen = place(digest(0), sites, Placement(replicas=2, min_clouds=2, allow=("eu",)), near="aws")
    assert names(chosen) == {"b", "c"}


# --- refusals -----------------------------------------------------------------------------------------

US = [StoreSite("aws-1", "aws", "e", "us"), StoreSite("aws-2", "aws", "w", "us")]
EU = StoreSite("az-1", "azure", "n", "eu")


@pytest.mark.parametrize(
    ("sites", "policy", "rule", "sentence"),
    [
        (
            US,
            Placement(replicas=3, min_clouds=1),
            "replicas",
            "placement.replicas is 3 but policy permits only 2 stores: aws-1, aws-2; "
            "add stores to the world or ask for fewer replicas",
        ),
        (
            [*US, EU],
            Placement(replicas=3, min_clouds=2, allow=("us",)),
            "replicas",
            "placement.replicas is 3 but policy permits only 2 stores: aws-1, aws-2 "
            "(az-1 lies in eu; placement.allow permits us); add stores to the world or ask for fewer replicas",
        ),
        (
            US,
            Placement(replicas=2, min_clouds=2),
            "min_clouds",
            "placement.min_clouds is 2 but the permitted stores are in only 1 cloud: aws; "
            "add a store in another cloud or lower min_clouds",
        ),
        (
            [EU],
            Placement(replicas=1, min_clouds=1, allow=("eu",), deny=("eu",)),
            "replicas",
            "placement.replicas is 1 but policy permits no store: none "
            "(az-1 lies in eu, which placement.deny forbids); add stores to the world or ask for fewer replicas",
        ),
        (
            [EU],
            Placement(replicas=1, min_clouds=1, allow=()),
            "replicas",
            "placement.replicas is 1 but policy permits no store: none "
            "(az-1 lies in eu; placement.allow permits nothing); add stores to the world or ask for fewer replicas",
        ),
    ],
)
def test_a_refusal_names_the_rule_and_the_stores(
    sites: list[StoreSite], policy: Placement, rule: str, sentence: str
) -> None:
    with pytest.raises(PolicyRefused) as caught:
        place(digest(0), sites, policy)
    assert (caught.value.rule, str(caught.value)) == (rule, sentence)
    assert caught.value.exit_code == 3


def test_both_rules_are_told_of_when_both_are_broken() -> None:
    found = refusals(US, Placement(replicas=3, min_clouds=2))
    assert [r.rule for r in found] == ["replicas", "min_clouds"]


def test_a_store_out_of_use_is_named_beside_the_rule() -> None:
    with pytest.raises(PolicyRefused, match=r"\(aws-2 can't be used now\)"):
        place(digest(0), [*US, EU], Placement(replicas=3, min_clouds=2), without={"aws-2"})
