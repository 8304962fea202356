"""FeedDataLoader: the same batches with any number of workers, and an account of what was handed out."""

from __future__ import annotations

import json
import multiprocessing
import operator
import os
import pickle
import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from millrace.client.dataset import Dataset
from millrace.client.mix import mix
from millrace.core.errors import MillraceError, QuarantineExceeded, UsageError
from millrace.feed.receipt import merge_receipts
from millrace.feed.torch import FeedDataLoader, FeedDataset

Reference = dict[int, list[list[int]]]
BROKEN = (17, 101, 150)
WHY = "decode['note'] raised JSONDecodeError: Expecting value: line 1 column 1 (char 0)"


def loader_of(ds: Dataset, **options: Any) -> FeedDataLoader:
    return FeedDataLoader(ds.loader, **{"batch_size": 10, "seed": 3, **options})


def ids(batches: Any) -> list[list[int]]:
    return [batch["id"].tolist() for batch in batches]


# --- without workers ------------------------------------------------------------------------------------------------


def test_it_is_a_data_loader_of_tensors(ds: Dataset, reference: Reference) -> None:
    with loader_of(ds) as loader:
        assert isinstance(loader, DataLoader)
        assert len(loader) == 21
        assert isinstance(loader.dataset, FeedDataset)
        batches = list(loader)
    assert ids(batches) == reference[0]
    first = batches[0]
    assert first["x"].dtype == torch.float32
    assert torch.equal(first["x"], (first["id"].float() / 2)[:, None].expand(-1, 4))
    assert first["tokens"].offsets.diff().tolist() == [i % 5 for i in first["id"].tolist()]
    assert first["text"] == [f"row {i}" for i in first["id"].tolist()]


def test_epochs_follow_each_other_and_states_are_the_loaders(ds: Dataset, reference: Reference) -> None:
    with loader_of(ds) as loader, ds.loader(10, seed=3, format="numpy") as plain:
        assert ids(loader) == reference[0]
        assert loader.epoch == 1
        for batch, same in zip(loader, plain, strict=False):
            assert len(batch["id"]) == len(same["id"])
            plain.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            assert plain.state_dict() == loader.state_dict()
            break
        assert ids(loader) == reference[1][1:]
        loader.set_epoch(3)
        assert ids(loader) == reference[3]


def test_a_function_for_batches(ds: Dataset, reference: Reference) -> None:
    with loader_of(ds, collate_fn=operator.itemgetter("id")) as loader:
        assert [batch.tolist() for batch in loader] == reference[0]


def test_the_programs_random_numbers_stay_its_own(ds: Dataset) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with loader_of(ds) as loader:
        next(iter(loader))
    assert torch.equal(torch.get_rng_state(), state)


def test_pinning_without_a_device_is_no_error(ds: Dataset, reference: Reference) -> None:
    with loader_of(ds, pin_memory=True) as loader:
        assert ids(loader) == reference[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_workers": -1}, "-1 can't be a number of workers"),
        ({"num_workers": True}, "True can't be a number of workers"),
        ({"num_workers": 1, "multiprocessing_context": "fork"}, "can't be forked: .* say 'spawn' or 'forkserver'"),
        (
            {"num_workers": 1, "multiprocessing_context": multiprocessing.get_context("fork")},
            "workers of a feed can't be forked",
        ),
        ({"multiprocessing_context": "spawn"}, "multiprocessing_context= is for workers"),
        ({"sampler": [1]}, "sampler= is not for a feed"),
        ({"in_order": False}, "in_order= is not for a feed"),
        ({"num_workers": 1, "decode": {"note": lambda v: v}}, "can't be sent .*must stand at the top of a module"),
        ({"batch_size": 0}, "batch_size=0 can't be"),
    ],
)
def test_what_cannot_be_is_refused(ds: Dataset, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        loader_of(ds, **options)


# --- with workers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(ds: Dataset) -> Iterator[FeedDataLoader]:
    """A loader with two workers that stay."""
    with loader_of(ds, num_workers=2, persistent_workers=True) as loader:
        yield loader


def test_workers_give_the_same_batches_epoch_after_epoch(two: FeedDataLoader, reference: Reference) -> None:
    two.set_epoch(0)
    for epoch in range(3):
        assert two.epoch == epoch
        kept = list(two)
        assert ids(kept) == reference[epoch]
        assert all(torch.equal(b["x"], (b["id"].float() / 2)[:, None].expand(-1, 4)) for b in kept)
        receipt = two.receipt()
        assert receipt.complete
        assert receipt.proof == two.expected().proof
        assert receipt.epoch == epoch
    assert two.stats()["blocks_loaded"] > 0


def test_it_stops_and_resumes_at_every_batch(two: FeedDataLoader, ds: Dataset, reference: Reference) -> None:
    """What workers made ahead of the last batch that was handed out is neither lost nor repeated."""
    with ds.loader(10, seed=3, format="numpy") as plain:
        for stop in range(len(reference[1])):
            two.set_epoch(1)
            plain.set_epoch(1)
            assert ids(islice(two, stop)) == ids(islice(plain, stop)) == reference[1][:stop]
            assert two.state_dict() == plain.state_dict()
            assert two.receipt().proof == plain.receipt().proof
            if stop % 2:
                assert ids(two) == reference[1][stop:], "a loop that is left early goes on where it stopped"
                assert two.receipt().complete
                assert two.receipt().proof == two.expected(1).proof
            else:
                two.set_epoch(0)
                two.load_state_dict(json.loads(json.dumps(plain.state_dict())))
                assert ids(two) == reference[1][stop:]
                assert (two.receipt().begin, two.receipt().whole) == (10 * stop, True)


def test_one_loop_at_a_time(two: FeedDataLoader, reference: Reference) -> None:
    two.set_epoch(0)
    first = iter(two)
    assert next(first)["id"].tolist() == reference[0][0]
    second = iter(two)
    with pytest.raises(UsageError, match="overtaken"):
        next(first)
    assert ids(second) == reference[0][1:]


def kill_and_go_on(worker: Any, batches: Iterator[Any], got: list[Any]) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    worker.join(60)  # torch raises where it hears of a child's death: here, most likely
    got.extend(batch["id"].tolist() for batch in batches)


def test_a_worker_that_dies_is_an_error_and_the_next_loop_goes_on(ds: Dataset, reference: Reference) -> None:
    others = multiprocessing.active_children()
    with loader_of(ds, num_workers=1) as loader:
        batches = iter(loader)
        got = [next(batches)["id"].tolist()]
        (worker,) = (child for child in multiprocessing.active_children() if child not in others)
        with pytest.raises(RuntimeError, match=r"exited unexpectedly|killed by signal"):
            kill_and_go_on(worker, batches, got)
        del batches
        assert len(got) < 21
        assert got + ids(loader) == reference[0]
        assert loader.receipt().complete


def test_forkserver_and_workers_that_end_with_their_epoch(ds: Dataset, reference: Reference) -> None:
    with loader_of(ds, num_workers=1, multiprocessing_context="forkserver") as loader:
        assert ids(loader) == reference[0]
        assert ids(loader) == reference[1]
        assert loader.receipt().proof == loader.expected(1).proof


def test_rows_that_cannot_be_decoded_are_named_by_workers_too(ds: Dataset) -> None:
    options = {"columns": ["id", "note"], "decode": {"note": json.loads}, "quarantine": 1.0}
    with loader_of(ds, **options) as alone, loader_of(ds, num_workers=2, **options) as shared:
        before = len(ds.events)
        notes = [b["note"].tolist() for b in shared]
        assert len(ds.events) == before, "it happened in other processes"
        told = [event.sentence for event in shared.events[before:]]
        assert sorted(told) == [f"row {row} of rows@1 is set aside: {WHY}" for row in sorted(BROKEN, key=str)]
        assert notes == [b["note"].tolist() for b in alone]
        receipt = shared.receipt()
        assert receipt.proof == alone.receipt().proof
        assert receipt.complete
        assert sorted(q.row for q in receipt.quarantined) == list(BROKEN)


def test_what_a_worker_fails_with_is_raised_here(ds: Dataset) -> None:
    with (
        loader_of(ds, columns=["text"], decode={"text": json.loads}, num_workers=1) as loader,
        pytest.raises(QuarantineExceeded, match=r"^\d+ rows of epoch 0 can't be given") as caught,
    ):
        list(loader)
    assert isinstance(caught.value, MillraceError)
    assert caught.value.__notes__ == ["in worker process 0 of the loader"]


def test_ranks_with_workers_share_every_step(ds: Dataset, two: FeedDataLoader, reference: Reference) -> None:
    """Two ranks with a worker each stop; one rank with two workers goes on."""
    ranks = [loader_of(ds, rank=r, world_size=2, num_workers=1) for r in range(2)]
    done = 8
    loops = [iter(rank) for rank in ranks]
    steps = [ids(islice(loop, done)) for loop in loops]
    assert [sorted(a + b) for a, b in zip(*steps, strict=True)] == [sorted(step) for step in reference[0][:done]]
    assert ranks[0].state_dict() == ranks[1].state_dict()
    parts = [rank.receipt() for rank in ranks]
    two.load_state_dict(ranks[0].state_dict())
    assert ids(two) == reference[0][done:]
    assert merge_receipts([*parts, two.receipt()]).proof == two.expected(0).proof
    for rank in ranks:
        rank.close()
        with pytest.raises(UsageError, match="closed"):
            iter(rank)


# --- FeedDataset in torch's own DataLoader --------------------------------------------------------------------------


def test_torchs_own_loader_with_workers_keeps_the_order(ds: Dataset, reference: Reference) -> None:
    dataset = FeedDataset(ds.loader, batch_size=10, seed=3)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="spawn", persistent_workers=True
    )
    assert len(loader) == 21
    assert ids(loader) == reference[0]
    assert ids(loader) == reference[1]
    dataset.set_epoch(3)
    assert ids(loader) == reference[3]
    with ds.loader(10, seed=3) as plain:
        plain.set_epoch(2)
        next(iter(plain))
        dataset.load_state_dict(plain.state_dict())
    assert ids(loader) == reference[2][1:]


def test_torchs_own_loader_without_workers(ds: Dataset, reference: Reference) -> None:
    dataset = FeedDataset(ds.loader, batch_size=10, seed=3)
    loader = DataLoader(dataset, batch_size=None)
    assert ids(loader) == reference[0]
    dataset.set_epoch(2)
    assert ids(loader) == reference[2]


def test_a_forked_worker_is_told_so(ds: Dataset) -> None:
    dataset = FeedDataset(ds.loader, batch_size=10, seed=3)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(UsageError, match="forked from one that has Millrace open"):
        next(iter(loader))


def test_a_mix_is_loaded_the_same_way(ds: Dataset) -> None:
    mixed = mix({"a": ds, "b": ds}, weights={"a": 3, "b": 1}, rows=100)
    assert len(pickle.loads(pickle.dumps(mixed.loader)).__self__) == 100
    with FeedDataLoader(mixed.loader, batch_size=8, seed=5) as loader, mixed.loader(8, seed=5) as plain:
        assert ids(loader) == ids(plain)
        assert loader.receipt().proof == plain.receipt().proof
