"""A training process that saves and is killed, again and again: what was acknowledged is there, and whole."""

from __future__ import annotations

import json
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]

KILLS = 9
WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
  azure: {regions: {westeurope: {jurisdiction: eu, stores: {az-main: {url: "file://./world/azure"}}}}}
"""
# Every file says of which step it is, so that a mixture would show; one is the same in all of them.
TRAINER = """
import pathlib, sys
import millrace

ckpts = millrace.checkpoints("run-7", keep_last=2)
found = ckpts.latest()
step = found.step if found else 0
if found:
    assert found.loader_state == {"row": step * 32}, found.loader_state
print("from", step, flush=True)
for step in range(step + 1, step + 1 + int(sys.argv[1])):
    root = pathlib.Path("state") / str(step)
    (root / "optim").mkdir(parents=True, exist_ok=True)
    for name in ("model", "optim/one", "optim/two"):
        (root / name).write_bytes(f"{name} {step:09}".encode() * 12_000)
    (root / "vocabulary").write_bytes(b"words" * 50_000)
    ckpts.save(step, root, loader={"row": step * 32})
    print("saved", step, flush=True)
if len(sys.argv) > 2:
    ckpts.wait()
    ckpts.prune()
ckpts.close()
"""


def start(folder: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, *args],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )


def check(cli: Cli, folder: Path, acknowledged: int) -> int:
    """The newest checkpoint, restored by a command of its own, is of one step and not older than was promised."""
    out = folder / "out"
    said = cli("checkpoints", "run-7", "--restore", "latest", "--into", str(out), "--json")
    if said.code:
        assert acknowledged == 0, said.err
        assert "there is no checkpoint of run-7" in said.err
        return 0
    step = int(said.json["step"])
    assert step >= acknowledged
    assert said.json["loader_state"] == {"row": step * 32}
    assert said.json["notes"] == []
    for name in ("model", "optim/one", "optim/two"):
        assert (out / name).read_bytes() == f"{name} {step:09}".encode() * 12_000
    assert (out / "vocabulary").read_bytes() == b"words" * 50_000
    shutil.rmtree(out)
    return step


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_saved_survives_every_kill(folder: Path, cli: Cli) -> None:
    (folder / "world.yaml").write_text(WORLD)
    dice = random.Random(7)
    acknowledged = 0
    for kill in range(KILLS):
        process = start(folder, "1000")
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == f"from {acknowledged}\n", process.stderr.read()
        for _ in range(dice.randrange(4)):
            acknowledged = int(process.stdout.readline().split()[1])
        time.sleep(dice.uniform(0, 0.12))
        process.kill()
        # What was said before the kill and not read yet was promised as well.
        for line in process.stdout.read().splitlines():
            acknowledged = int(line.split()[1])
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        if kill % 4 == 3:  # the records are a help, no more
            for file in (folder / ".millrace").glob("coord.db*"):
                file.unlink()
        acknowledged = check(cli, folder, acknowledged)
    assert acknowledged > 0, "nothing was ever saved"
    last = start(folder, "2", "and replicate")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert out.splitlines()[-1] == f"saved {acknowledged + 2}"
    verified = cli("checkpoints", "run-7", "--verify", "--json")
    assert verified.code == 0, verified.out
    assert [c["step"] for c in verified.json["checkpoints"]] == [acknowledged + 2, acknowledged + 1]
    assert all(set(c["stores"].values()) == {"whole"} and len(c["stores"]) >= 3 for c in verified.json["checkpoints"])
    # Of all that was begun nothing is left here but what the newest needs.
    manifest = json.loads(next((folder / ".millrace" / "checkpoints" / "run-7").glob("0*.json")).read_text())
    named = {part["digest"] for file in manifest["checkpoint"]["files"] for part in file["parts"]}
    left = {p.name for p in (folder / ".millrace" / "checkpoints" / "run-7" / "objects").rglob("*") if p.is_file()}
    assert left == named


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_processes_save_to_one_name_at_once(folder: Path, cli: Cli) -> None:
    (folder / "world.yaml").write_text(WORLD)
    script = TRAINER.replace("keep_last=2", "keep_last=None").replace(
        "for step in range(step + 1, step + 1 + int(sys.argv[1])):",
        "sys.stdin.readline()\nfor step in range(int(sys.argv[1]), 40, 2):",
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(i), "and replicate"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in (20, 21)
    ]
    for process in both:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 60)[0]
        assert process.stdout.readline() == "from 0\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    verified = cli("checkpoints", "run-7", "--verify", "--json")
    assert verified.code == 0, verified.out
    assert [c["step"] for c in verified.json["checkpoints"]] == list(range(39, 19, -1))
    assert check(cli, folder, 39) == 39
