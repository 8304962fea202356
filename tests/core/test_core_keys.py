"""Keys sort as numbers do, and nobody's keys lie under another's prefix."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.core import keys
from millrace.core.model import Chunk, SourceObject, digest_of, shard_key

D = digest_of(b"x")
numbers = st.integers(0, 99_999_999)


def test_the_keys_are_those_the_module_promises() -> None:
    assert keys.dataset_head("a") == "datasets/a/head"
    assert keys.dataset_version("a", 3) == "datasets/a/versions/00000003"
    assert keys.run_record(7) == "runs/00000007/record"
    assert keys.run_control(7) == "runs/00000007/control"
    assert keys.run_progress(7) == "runs/00000007/progress"
    assert keys.ledger_page(7, "main", 2) == "runs/00000007/ledger/main/000002"
    assert keys.replica_page(D, 5) == f"replicas/{D}/000005"
    assert keys.replica_page(D, "meta") == f"replicas/{D}/meta"
    assert keys.reader(D, "r") == f"readers/{D}/r"
    assert (keys.run_lease(7), keys.dataset_lease("a")) == ("run/00000007", "dataset/a")
    assert (keys.manifest_key(D), keys.segment_key(D)) == (f"manifests/{D}.json", f"manifests/segments/{D}.arrow")
    assert (keys.work_plan(7), keys.task_output(7, "main", D)) == (
        "runs/00000007/plan.arrow",
        f"runs/00000007/main/{D}",
    )
    assert shard_key(D) == f"shards/{D[:2]}/{D}.arrow"


@given(numbers, numbers)
def test_runs_and_versions_sort_as_numbers(a: int, b: int) -> None:
    for key in (keys.run_record, lambda n: keys.dataset_version("d", n)):
        assert (key(a) < key(b)) == (a < b)


@given(numbers, numbers)
def test_no_run_lies_under_the_prefix_of_another(a: int, b: int) -> None:
    assert keys.run_record(a).startswith(keys.run_prefix(b)) == (a == b)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 999_999))
def test_no_phase_lies_under_the_prefix_of_another(a: int, b: int, page: int) -> None:
    ours = keys.ledger_page(1, f"survey-{a}", page)
    assert ours.startswith(keys.ledger_prefix(1, f"survey-{b}")) == (a == b)


def test_a_chunk_says_what_it_is() -> None:
    one, two = SourceObject("a.txt", 100, "v"), SourceObject("b.txt", 50, "v")
    assert Chunk(0, 0, (one,), 0, 100).describe() == "a.txt"
    assert Chunk(0, 0, (one,), 10, 100).describe() == "a.txt bytes 10-99"
    assert Chunk(0, 0, (one, two), 0, 150).describe() == "a.txt and 1 more"
    assert Chunk(0, 0, (), 0, 0).describe() == "nothing"
    assert not Chunk(0, 0, (one, two), 0, 150).is_range
    assert Chunk(0, 0, (one,), 0, 99).is_range
