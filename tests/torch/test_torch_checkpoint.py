"""State dicts through torch.distributed.checkpoint: one process, several, and from several to one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import millrace  # noqa: E402
from millrace.core.errors import StoreError, UsageError  # noqa: E402
from millrace.feed.torch.checkpoint import load_state, ranks, save_state, save_together  # noqa: E402

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
  azure: {regions: {westeurope: {jurisdiction: eu, stores: {az-main: {url: "file://./world/azure"}}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "world.yaml").write_text(WORLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    return tmp_path


def trained(seed: int, steps: int = 3) -> tuple[Any, Any]:
    """A model and its optimiser after a few steps."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 1))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        optimiser.step()
    return model, optimiser


def state_of(model: Any, optimiser: Any, **more: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimiser.state_dict(), **more}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else bool(one == other)


def test_a_state_comes_back_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    state = state_of(*trained(1), epoch=3, names=["a", "b"])
    save_state(state, tmp_path / "one")
    save_state(state, tmp_path / "two")
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }
    other = state_of(*trained(2), epoch=0, names=["x", "y"])
    assert not same(other, state)
    load_state(other, tmp_path / "one")
    assert same(other, state)
    assert ranks() == (0, 1)


def test_a_training_loop_goes_on_from_its_checkpoint(folder: Path) -> None:
    model, optimiser = trained(1)
    with millrace.checkpoints("run-7") as ckpts:
        saved = ckpts.save(3, state_of(model, optimiser, step=3), loader={"row": 24})
        assert ckpts.save(3, state_of(model, optimiser, step=3), loader={"row": 24}) == saved
        assert not list((folder / ".millrace" / "staging" / "run-7").iterdir())
    with millrace.checkpoints("run-7") as ckpts:
        found = ckpts.latest()
        assert found is not None
        fresh, its_optimiser = trained(2)
        state = state_of(fresh, its_optimiser, step=0)
        found.load_into(state)
        fresh.load_state_dict(state["model"])
        its_optimiser.load_state_dict(state["optim"])
    assert state["step"] == 3
    assert found.loader_state == {"row": 24}
    assert same(state_of(fresh, its_optimiser), state_of(model, optimiser))


class Counter:
    """What has a state of its own, as torch.distributed.checkpoint wants it."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_what_has_a_state_of_its_own_is_asked_for_it(folder: Path) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(1, {"model": trained(1)[0], "counter": Counter(5)})
        counter, model = Counter(0), trained(2)[0]
        ckpts.get(1).load_into({"model": model, "counter": counter})
    assert counter.at == 5
    assert same(model.state_dict(), trained(1)[0].state_dict())


def test_what_does_not_fit_is_said(folder: Path) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(1, {"a": torch.zeros(3)})
        (folder / "plain").mkdir()
        (folder / "plain" / "file").write_text("x")
        ckpts.save(2, folder / "plain")
        with pytest.raises(StoreError, match=r"can't be loaded: rank 0: .*Missing key.*other"):
            ckpts.get(1).load_into({"other": torch.zeros(3)})
        with pytest.raises(StoreError, match=r"can't be loaded: rank 0: Size mismatch"):
            ckpts.get(1).load_into({"a": torch.zeros(4)})
        with pytest.raises(UsageError, match=r"was not written by torch\.distributed\.checkpoint"):
            ckpts.get(2).load_into({"a": torch.zeros(3)})
        with pytest.raises(StoreError, match=r"the state can't be written to .*rank 0: "):
            ckpts.save(3, {"a": lambda: 0})
        assert not list((folder / ".millrace" / "staging" / "run-7").iterdir())
        assert [line.step for line in ckpts.list()] == [2, 1]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"the state can't be written to .*file/folder"):
        save_state({"a": torch.zeros(3)}, tmp_path / "file" / "folder")
    with pytest.raises(StoreError, match=r"rank 0 failed: FileNotFoundError"):
        save_together({}, lambda: Path((tmp_path / "nowhere").read_text()), lambda _, __: None)


# --- several ranks ------------------------------------------------------------------------------------------------

COMMON = """
    import os, sys, json, pathlib
    import torch, torch.distributed as dist
    import millrace
    from millrace.core.errors import MillraceError
    import millrace.feed.torch.checkpoint as states
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method="file://" + os.path.abspath(sys.argv[3]), rank=rank, world_size=size)
    def say(**what):
        print(json.dumps(what), flush=True)
"""


def together(folder: Path, body: str, size: int = 2) -> list[list[str]]:
    """Run the same script on so many ranks; what each of them said, line by line."""
    script = textwrap.dedent(COMMON) + textwrap.dedent(body) + "\ndist.destroy_process_group()\n"
    meeting = folder / f"meeting-{len(list(folder.glob('meeting-*')))}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(rank), str(size), str(meeting)],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        assert process.returncode == 0, err
        said.append(out.splitlines())
    return said


@pytest.mark.slow
def test_two_ranks_save_one_checkpoint_and_one_process_loads_it(folder: Path) -> None:
    said = together(
        folder,
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        whole = torch.arange(48.0).reshape(8, 6)
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (size,)), [Shard(0)])
        ckpts = millrace.checkpoints("run-7")
        saved = ckpts.save(5, {"w": sharded, "b": torch.ones(3), "step": 5}, loader={"row": 160})
        dist.barrier()
        again = ckpts.latest()
        empty = distribute_tensor(torch.zeros(8, 6), sharded.device_mesh, [Shard(0)])
        into = {"w": empty, "b": torch.zeros(3), "step": 0}
        again.load_into(into)
        ok = torch.equal(into["w"].to_local(), sharded.to_local()) and torch.equal(into["b"], torch.ones(3))
        say(digest=saved.digest, files=saved.files, ok=ok, step=into["step"])
        ckpts.wait(5)
        ckpts.close()
        """,
    )
    assert said[0] == said[1]
    assert '"ok": true' in said[0][0]
    assert '"files": 3' in said[0][0]  # one of each rank, and the metadata
    with millrace.checkpoints("run-7") as ckpts:
        found = ckpts.latest()
        assert found is not None
        state = {"w": torch.zeros(8, 6), "b": torch.zeros(3), "step": 0}
        found.load_into(state)
    assert torch.equal(state["w"], torch.arange(48.0).reshape(8, 6))
    assert (state["step"], found.loader_state) == (5, {"row": 160})
    assert len(list((folder / "world").glob("*/checkpoints/run-7/0*.json"))) == 3


@pytest.mark.slow
def test_what_fails_on_one_rank_is_raised_on_all(folder: Path) -> None:
    said = together(
        folder,
        """
        def tried(what):
            try:
                what()
            except MillraceError as error:
                say(kind=error.kind, said=str(error))
            else:
                say(kind="none")
        ckpts = millrace.checkpoints("run-7")
        tried(lambda: ckpts.save(1, {"a": torch.ones(2), "bad": (lambda: 0) if rank else 1}))
        tried(lambda: ckpts.save(1, {"a": torch.ones(2)}, loader={"x": {1, 2}}))
        tried(lambda: ckpts.save(1, {"a": torch.ones(2)}))
        tried(lambda: ckpts.save(1, {"a": torch.zeros(2)}))
        tried(lambda: ckpts.save(2, {"a": torch.zeros(2)}))
        tried(lambda: ckpts.get(1 + rank).load_into({"a": torch.zeros(2)}))
        # Ranks that don't share a disk: a path that leads elsewhere on each of them.
        states._SEEN_S = 0.2
        here = pathlib.Path(f"disk-{rank}").absolute()
        here.mkdir()
        os.chdir(here)
        def make():
            os.mkdir("staging")
            return pathlib.Path("staging")
        tried(lambda: states.save_together({"a": torch.ones(2)}, make, lambda folder, size: 0))
        say(left=os.listdir(here))
        ckpts.close()
        """,
    )
    assert said[0] == said[1]
    kinds = [line.partition('"kind": "')[2].partition('"')[0] for line in said[0]]
    assert kinds[:7] == ["StoreError", "UsageError", "none", "UsageError", "none", "UsageError", "UsageError"]
    assert "rank 1: " in said[0][0]
    assert "the loader's state can't be kept" in said[0][1]
    assert "overwrite=True" in said[0][3]
    assert "the ranks would load different checkpoints (rank 0: step 1 (" in said[0][5]
    assert "rank 1: on " in said[0][6]
    assert "must be a folder on a disk that they share" in said[0][6]
    assert said[0][7] == '{"left": []}'
