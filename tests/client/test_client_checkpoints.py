"""``millrace.checkpoints`` as a training loop uses it: plain calls, real folders, four clouds on this disk."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import millrace
from millrace.client.checkpoints import Checkpoints
from millrace.client.session import session_for
from millrace.core.errors import (
    Corrupt,
    MillraceError,
    PolicyRefused,
    SpecError,
    StoreError,
    TimedOut,
    Unavailable,
    UsageError,
)

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
  azure: {regions: {westeurope: {jurisdiction: eu, stores: {az-main: {url: "file://./world/azure"}}}}}
  ibm: {regions: {us-south: {jurisdiction: us, stores: {ibm-main: {url: "file://./world/ibm"}}}}}
"""
STORES = ("aws", "gcp", "azure", "ibm")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "world.yaml").write_text(WORLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    return tmp_path


@pytest.fixture
def state(folder: Path) -> Callable[[int], Path]:
    """A folder to save, that depends on the step alone."""

    def write(step: int) -> Path:
        root = folder / "state"
        shutil.rmtree(root, ignore_errors=True)
        (root / "optim").mkdir(parents=True)
        (root / "model.bin").write_bytes(b"%08d" % step * 20_000)
        (root / "optim" / "same.bin").write_bytes(b"same" * 10)
        return root

    return write


class Loader:
    """Anything with a state."""

    def state_dict(self) -> dict[str, Any]:
        return {"position": 4096, "epoch": 2}


def holders(folder: Path, step: int) -> list[str]:
    return [s for s in STORES if list((folder / "world" / s / "checkpoints" / "run-7").glob(f"{step:012d}-*.json"))]


def test_a_training_run_saves_and_goes_on_from_there(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as first:
        assert first.latest() is None
        for step in (100, 200, 300, 400):
            saved = first.save(step, state(step), loader=Loader())
            assert (saved.step, saved.files, saved.size_bytes) == (step, 2, 160_040)
    # What lies at the end of the block is where policy wants it.
    second = millrace.checkpoints("run-7")
    try:
        assert [line.step for line in second.list()] == [400, 300, 200]
        assert all(line.state == "replicated" and len(line.stores) == 3 for line in second.list())
        found = second.latest()
        assert found is not None
        assert (found.step, found.digest) == (400, saved.digest)
        assert found.loader_state == {"position": 4096, "epoch": 2}
        assert found.files == ("model.bin", "optim/same.bin")
        assert len(found.stores) == 4  # and this machine
        assert (found.path() / "model.bin").read_bytes() == b"00000400" * 20_000
        assert found.path() == found.path()
        assert repr(found) == f"Checkpoint('run-7', step=400, digest='{saved.digest[:8]}')"
        assert second.get(300).path(folder / "three") == folder / "three"
        assert (folder / "three" / "model.bin").read_bytes() == b"00000300" * 20_000
        with pytest.raises(UsageError, match="three is there already"):
            second.get(300).path(str(folder / "three"))
        with pytest.raises(UsageError, match="has no checkpoint of step 100, there is 400, 300, 200"):
            second.get(100)
    finally:
        second.close()
        second.close()


def test_what_a_user_changed_in_the_folder_is_not_given_out_again(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(1, state(1))
        found = ckpts.latest()
        assert found is not None
        (found.path() / "model.bin").write_bytes(b"oh")
        assert (found.path() / "model.bin").read_bytes() == b"00000001" * 20_000


def test_everything_here_is_lost_and_a_cloud_too(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(7, state(7), {"at": 1})
    (folder / "other").mkdir()
    text = WORLD.replace("./world/", "../world/")
    (folder / "other" / "world.yaml").write_text(text)
    shutil.rmtree(folder / "world" / holders(folder, 7)[0])
    found = millrace.checkpoints("run-7", world="other/world.yaml").latest()
    assert found is not None
    assert (found.step, found.loader_state) == (7, {"at": 1})
    assert found.path().is_relative_to(folder / "other" / ".millrace")
    assert (found.path() / "model.bin").read_bytes() == b"00000007" * 20_000


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_newest_gives_way_to_an_older_one(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(1, state(1))
        ckpts.save(2, state(2))
        ckpts.wait()
        for root in (folder / ".millrace", *(folder / "world" / s for s in STORES)):
            for manifest in (root / "checkpoints" / "run-7").glob("000000000002-*"):
                told = json.loads(manifest.read_text())["checkpoint"]
                digest = next(f["digest"] for f in told["files"] if f["path"] == "model.bin")
                spoil(manifest.parent / "objects" / digest[:2] / digest)
        found = ckpts.latest()
        assert found is not None
        assert found.step == 1
        assert "step 2 was passed over" in found.notes[0]
        with pytest.raises(Corrupt):
            ckpts.get(2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_stores_that_take_no_writes_are_named(folder: Path, state: Callable[[int], Path]) -> None:
    (folder / "world").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    _named(folder, state)
    (folder / "world").chmod(0o755)


def test_stores_that_are_no_folders_are_named(folder: Path, state: Callable[[int], Path]) -> None:
    (folder / "world").write_text("a file where the clouds should be")
    _named(folder, state)
    (folder / "world").unlink()
    with millrace.checkpoints("run-7") as ckpts:  # goes on where the first could not
        assert [(d.step, len(d.stores)) for d in ckpts.wait(3)] == [(3, 3)]


def _named(folder: Path, state: Callable[[int], Path]) -> None:
    ckpts = millrace.checkpoints("run-7")
    try:
        ckpts.save(3, state(3))
        with pytest.raises(StoreError) as caught:
            ckpts.wait()
        assert all(name in str(caught.value) for name in ("aws-main", "gcp-main", "az-main", "ibm-main"))
        with pytest.raises(TimedOut, match=r"after 0\.1 s step 3 of run-7"):
            ckpts.wait(timeout_s=0.1)
        assert holders(folder, 3) == []
    finally:
        ckpts.close()


def test_the_end_of_the_block_says_what_could_not_be_replicated(folder: Path, state: Callable[[int], Path]) -> None:
    (folder / "world").write_text("")
    with (
        pytest.raises(MillraceError, match="step 3 of run-7 is not replicated"),
        millrace.checkpoints("run-7") as ckpts,
    ):
        ckpts.save(3, state(3))
    with pytest.raises(KeyError, match="own"), millrace.checkpoints("run-7"):
        raise KeyError("own")  # is not hidden, nor waited for


def test_only_what_the_policy_allows(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7", placement={"replicas": 3, "deny": ["eu"]}) as ckpts:
        ckpts.save(1, state(1))
    assert holders(folder, 1) == ["aws", "gcp", "ibm"]
    with pytest.raises(PolicyRefused, match=r"placement\.replicas is 5 but policy permits only 4 stores"):
        millrace.checkpoints("run-7", placement={"replicas": 5})


def test_pins_and_retention(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7", keep_last=1) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state(step))
            if step == 1:
                ckpts.pin(1)
            ckpts.wait()
        assert [(line.step, line.pinned) for line in ckpts.list()] == [(3, False), (1, True)]
        ckpts.unpin(1)
        assert [known.step for known in ckpts.prune().dropped] == [1]
        with pytest.raises(UsageError, match="has no checkpoint of step 1"):
            ckpts.pin(1)
    with millrace.checkpoints("run-7", keep_last=1, keep_for="7d") as ckpts:
        for step in (4, 5, 6):
            ckpts.save(step, state(step))
            ckpts.wait()
        assert [line.step for line in ckpts.list()] == [6, 5, 4, 3]


def test_what_is_wrong_is_said(folder: Path, state: Callable[[int], Path]) -> None:
    for name in ("", "a/b", "Run 7", None):
        with pytest.raises(UsageError, match="name"):
            millrace.checkpoints(name)  # type: ignore[arg-type]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep_last": 0}, "keep_last=0 would keep no checkpoint"),
        ({"keep_for": "a while"}, "keep_for: 'a while' is not a duration"),
        ({"keep_for": -5}, "keep_for: -5 is not a duration"),
        ({"placement": {"copies": 3}}, "placement.copies: Extra inputs"),
        ({"placement": {"replicas": 1, "min_clouds": 2}}, "placement: 2 clouds can't be reached"),
    ]
    for options, says in wrong:
        with pytest.raises(UsageError, match=says):
            millrace.checkpoints("run-7", **options)
    with pytest.raises((UsageError, SpecError), match="nowhere"):
        millrace.checkpoints("run-7", world="nowhere.yaml")
    with millrace.checkpoints("run-7") as ckpts:
        (folder / "empty").mkdir()
        saves: list[tuple[Any, Any, Any, str]] = [
            (-1, state(1), None, "a number from 0 to"),
            (1, folder / "nowhere", None, "nowhere is not there"),
            (1, "empty", None, "holds no file"),
            (1, 42, None, "a checkpoint is a folder or a state dict, not int"),
            (1, state(1), {"x": {1}}, "the loader's state can't be kept"),
        ]
        for step, what, loader, says in saves:
            with pytest.raises(UsageError, match=says):
                ckpts.save(step, what, loader)
        with pytest.raises(UsageError, match="no checkpoint of step 9"):
            ckpts.wait(9)
        ckpts.save(1, state(1))
        with pytest.raises(UsageError, match="overwrite=True"):
            ckpts.save(1, state(2))
        ckpts.save(1, state(2), overwrite=True)
        found = ckpts.latest()
        assert found is not None
        assert (found.path() / "model.bin").read_bytes() == b"00000002" * 20_000
        with pytest.raises(UsageError, match=r"torch"):
            found.load_into({})


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is here")
def test_without_torch_a_state_dict_is_refused(folder: Path) -> None:
    with millrace.checkpoints("run-7") as ckpts, pytest.raises(UsageError, match="need the library torch"):
        ckpts.save(1, {"model": 1})


def test_one_world_serves_several_series(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as one, millrace.checkpoints("run-8") as two:
        assert isinstance(one, Checkpoints)
        one.save(1, state(1))
        two.save(2, state(2))
        first, second = one.latest(), two.latest()
        assert first is not None
        assert second is not None
        assert (first.step, second.step) == (1, 2)
    assert session_for(folder / "world.yaml") is session_for(None)


def test_all_stores_away_is_told_from_nothing_there(folder: Path, state: Callable[[int], Path]) -> None:
    with millrace.checkpoints("run-7") as ckpts:
        ckpts.save(1, state(1))
    shutil.rmtree(folder / ".millrace" / "checkpoints")
    (folder / "world").rename(folder / "away")
    (folder / "world").mkdir()
    for name in STORES:
        (folder / "world" / name).mkdir()
        (folder / "world" / name / "checkpoints").symlink_to("checkpoints")
    with millrace.checkpoints("run-7") as ckpts, pytest.raises(Unavailable, match="step 1 was passed over"):
        ckpts.latest()
