"""Ranks of torch.distributed: found by the loader, and one receipt of all of them. Real processes, gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from millrace.client.dataset import Dataset
from millrace.core.errors import UsageError
from millrace.feed.receipt import Receipt, merge_receipts
from millrace.feed.torch import gather_receipts

RANK = """\
import json, sys
import torch.distributed as dist
import millrace
from millrace.core.errors import MillraceError
from millrace.feed.torch import FeedDataLoader, gather_receipts

if __name__ == "__main__":
    world, rank, size, workers, uneven = sys.argv[1], *map(int, sys.argv[2:])
    dist.init_process_group("gloo", init_method=f"file://{world}.{size}.{uneven}", rank=rank, world_size=size)
    ds = millrace.open("rows", world=world, cache=False)
    loader = FeedDataLoader(ds.loader, batch_size=10, seed=3, num_workers=workers)
    ids = []
    for step, batch in enumerate(loader):
        ids.append(batch["id"].tolist())
        if uneven and step == 5 + rank:
            break
    try:
        said = gather_receipts(loader).plain()
    except MillraceError as error:
        said = str(error)
    print(json.dumps({"ids": ids, "said": said, "share": loader.receipt().share, "state": loader.state_dict()}))
    loader.close()
    dist.destroy_process_group()
"""


def run_ranks(world: Path, folder: Path, size: int, *, workers: int = 0, uneven: bool = False) -> list[Any]:
    """What each rank says."""
    script = folder / "rank.py"
    script.write_text(RANK)
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(world), str(rank), str(size), str(workers), str(int(uneven))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    return said


def test_ranks_are_found_and_their_receipts_gathered(
    world: Path, ds: Dataset, reference: dict[int, list[list[int]]], tmp_path: Path
) -> None:
    ranks = run_ranks(world, tmp_path, 2, workers=1)
    # Their workers know nothing of torch.distributed: they belong to the rank that started them.
    assert [rank["share"] for rank in ranks] == [[r, 2, 1] for r in range(2)]
    steps = [sorted(chain(*shares)) for shares in zip(*(rank["ids"] for rank in ranks), strict=True)]
    assert steps == [sorted(step) for step in reference[0]]
    assert all(rank["state"] == ranks[0]["state"] for rank in ranks)
    receipts = [Receipt.from_plain(rank["said"]) for rank in ranks]
    assert receipts == [receipts[0]] * 2
    assert receipts[0].complete
    assert receipts[0].share is None
    with ds.loader(10, seed=3, format="numpy", rank=0, world_size=1) as alone:
        assert receipts[0].proof == alone.expected(0).proof


def test_ranks_that_stand_elsewhere_are_told_so_on_every_rank(world: Path, tmp_path: Path) -> None:
    said = [rank["said"] for rank in run_ranks(world, tmp_path, 2, uneven=True)]
    assert said == [said[0]] * 2
    assert "the receipts overlap between 0 and 60" in said[0]


def test_without_a_process_group_it_is_the_own_receipt(ds: Dataset) -> None:
    with ds.loader(10, seed=3, format="numpy", rank=0, world_size=1) as loader:
        next(iter(loader))
        assert gather_receipts(loader).proof == merge_receipts([loader.receipt()]).proof


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lone_rank_of_two_is_not_taken_for_all(ds: Dataset, rank: int) -> None:
    with ds.loader(10, seed=3, format="numpy", rank=rank, world_size=2) as loader:
        list(loader)
        with pytest.raises(UsageError, match="are missing; merge those of every rank"):
            gather_receipts(loader)
