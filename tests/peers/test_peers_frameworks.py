"""The examples for Lightning, the Hugging Face Trainer and JAX: run as they stand, stopped, and resumed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, with the dataset that they train on."""
    copy = tmp_path_factory.mktemp("frameworks") / "examples"
    shutil.copytree(EXAMPLES, copy, ignore=shutil.ignore_patterns("world", ".millrace", "cache", "__pycache__"))
    command = [sys.executable, "-m", "millrace", "run", "pipeline.yaml", "--workers", "1"]
    subprocess.run(command, cwd=copy / "flour", check=True, capture_output=True)
    return copy


def needs(*libraries: str) -> None:
    """Without importing them here: they are slow to import, and the example is another process."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")


def run(folder: Path, *args: str) -> list[str]:
    done = subprocess.run([sys.executable, "train.py", *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_lightning_saves_the_loaders_place_and_resumes_in_the_middle_of_an_epoch(examples: Path) -> None:
    needs("lightning")
    folder = examples / "lightning"
    whole = run(folder)
    assert len(whole) == 40
    assert run(folder, "--resume", "checkpoints/step=25.ckpt") == whole[25:], "step 25 is row 288 of epoch 1"


def test_lightning_with_a_worker(examples: Path) -> None:
    needs("lightning")
    folder = examples / "lightning"
    whole = run(folder, "--steps", "20")
    assert run(folder, "--steps", "20", "--workers", "1", "--resume", "checkpoints/step=10.ckpt") == whole[10:]


def test_the_trainer_saves_the_feeds_place_and_resumes_in_the_middle_of_an_epoch(examples: Path) -> None:
    needs("transformers", "accelerate")
    folder = examples / "hf_trainer"
    whole = [line for line in run(folder) if line.startswith("loss")]
    assert len(whole) == 40
    resumed = run(folder, "--resume", "out/checkpoint-25")
    assert [line for line in resumed if line.startswith("loss")] == whole[25:]


def test_jax_goes_on_from_a_state(examples: Path) -> None:
    needs("jax")
    lines = run(examples / "jax")
    losses = [json.loads(line)["loss"] for line in lines if line.startswith("{")]
    assert len(losses) == 30
    assert losses[-1] < losses[0] / 4
    assert [line for line in lines if line.startswith("epoch")] == [
        "epoch 0: each row once: True",
        "epoch 1: each row once: True",
    ]
