"""Two gloo processes train, are killed, and one goes on from the checkpoint: the losses are those of an unbroken run.

This is ``examples/torch_ddp`` as it stands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS_AN_EPOCH = 16
KILLED_AT = 22


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example's folder in a copy, with its dataset made."""
    copy = tmp_path / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("world", ".millrace", "cache", "__pycache__"))
    command = [sys.executable, "-m", "millrace", "run", "pipeline.yaml", "--workers", "1"]
    subprocess.run(command, cwd=copy / "flour", check=True, capture_output=True)
    return copy / "torch_ddp"


def losses(lines: Iterable[str]) -> dict[int, float]:
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {line["step"]: line["loss"] for line in found}


def finished(command: list[str], folder: Path) -> list[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_on_two_processes_and_resumed_on_one(folder: Path) -> None:
    train = [sys.executable, "train.py"]
    killed: list[str] = []
    with subprocess.Popen(
        [*train, "--processes", "2", "--steps", "1000"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            killed.append(line)
            if f'"step": {KILLED_AT},' in line:
                os.killpg(process.pid, signal.SIGKILL)
    assert KILLED_AT in losses(killed)

    last = max(losses(killed)) + 12
    resumed = finished([*train, "--steps", str(last)], folder)
    went_on = re.fullmatch(r"goes on from step (\d+), row (\d+) of epoch (\d+)", resumed[0])
    assert went_on
    step, row, epoch = map(int, went_on.groups())
    assert step >= KILLED_AT - 5
    assert (epoch * STEPS_AN_EPOCH + row // 32, row % 32) == (step, 0)
    assert row > 0, "in the middle of an epoch"

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    whole = finished([*torchrun, "train.py", "--name", "unbroken", "--steps", str(last)], folder)
    reference = losses(whole)
    assert sorted(reference) == list(range(1, last + 1))
    assert sorted(losses(resumed)) == list(range(step + 1, last + 1))
    for n, loss in [*losses(killed).items(), *losses(resumed).items()]:
        assert abs(loss - reference[n]) < 1e-9, f"step {n}"
    assert "epoch 0: rows 0 to 483, each once: True" in whole
    assert any(re.match(rf"epoch {epoch}: rows {row} to 483, each once: True", line) for line in resumed)
