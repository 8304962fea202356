"""Killed, stopped and taken up again: one digest in the end, nothing lost, nothing left running."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]
Launch = Callable[..., Any]

FILES = 40
SLOW = "import time\ndef f(batch):\n    time.sleep({})\n    return batch\n"
TINY: dict[str, Any] = {
    "chunk": 4096,
    "shards": {"size": 1024, "block_rows": 4},
    "placement": {"replicas": 3, "min_clouds": 2},
}


@pytest.fixture
def corpus(folder: Path) -> Path:
    """One file a chunk, every fourth equal to another."""
    for i in range(FILES):
        (folder / "data" / f"{i:02}.txt").write_text(f"file {i - i % 4 // 3} " + "y" * 3000)
    (folder / "slow.py").write_text(SLOW.format(0.05))
    return folder / "data"


def slow(**more: Any) -> dict[str, Any]:
    return {**TINY, "transforms": [{"python": "slow:f"}, {"dedup": ["text"]}], **more}


def undisturbed(cli: Cli, folder: Path, pipeline: Write, **fields: Any) -> str:
    """The digest that an untroubled run of the same pipeline gives, in a world of its own."""
    text = (folder / "world.yaml").read_text()
    (folder / "calm.yaml").write_text(text.replace("./world/", "./calm/") + "state: ./.calm\n")
    said = cli("run", pipeline(**fields), "--world", "calm.yaml", "--json")
    assert said.code == 0, said.err
    digest: str = said.json["digest"]
    return digest


def whole(cli: Cli, digest: str, run: int = 1) -> None:
    """Run ``run`` is done with this digest, and every replica is true."""
    report = cli("verify", "d", "--json")
    assert report.code == 0, report.out
    assert report.json["digest"] == digest
    assert report.json["whole"] == report.json["replicas"] > 0
    status = cli("status", str(run), "--json").json
    assert status["state"] == "done"
    assert status["report"]["digest"] == digest
    assert [r["run"] for r in cli("runs", "--json").json] == list(range(1, run + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, corpus: Path
) -> None:
    """Of the whole process group, and of the main process alone: its workers then end by themselves."""
    digest = undisturbed(cli, folder, pipeline, **slow())
    dice = random.Random(20)
    kills = seen = 0
    while kills < 20:
        run = launch("run", "pipeline.yaml", "--workers", "2")
        if kills % 5 == 4:
            time.sleep(dice.uniform(0.2, 2.0))  # while it starts, or lists, or takes its lease
        else:
            run.until_tasks(seen + dice.randrange(1, 4))
            time.sleep(dice.uniform(0, 0.15))
        assert run.process.poll() is None, "there was too little work for 20 kills"
        if kills % 3 == 2:
            run.process.kill()
        else:
            run.kill()
        assert run.end().code == -signal.SIGKILL
        assert run.finished_tasks(1) >= seen, "what was in the ledger is gone"
        seen = run.finished_tasks(1)
        kills += 1
    last = launch("run", "pipeline.yaml", "--workers", "2", "--json").end()
    assert last.code == 0, last.err
    assert "run 1 of dataset d goes on" in last.err
    assert last.json["run"] == 1
    assert last.json["digest"] == digest
    assert last.json["chunks_done"] == FILES
    assert last.json["duplicates"] == FILES // 4
    whole(cli, digest)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kills_without_transforms(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    """Tasks are threads of the process that is killed, and the moments lie in writing and reading back."""
    for i in range(400):
        (folder / "data" / f"{i:03}.bin").write_bytes(random.Random(i).randbytes(4000))
    fields = {**TINY, "sources": [{"url": "file://./data", "format": "files"}]}
    digest = undisturbed(cli, folder, pipeline, **fields)
    dice = random.Random(6)
    seen = 0
    for _ in range(6):
        run = launch("run", "pipeline.yaml")
        run.until_tasks(seen + dice.randrange(1, 40))
        time.sleep(dice.uniform(0, 0.05))
        if run.process.poll() is None:
            run.kill()
            assert run.end().code == -signal.SIGKILL
        seen = run.finished_tasks(1)
    last = launch("run", "pipeline.yaml", "--json").end()
    assert last.code == 0, last.err
    assert last.json["digest"] == digest
    assert cli("verify", "d").code == 0
    said = cli("export", "d", "out", "--format", "files")
    assert said.code == 0, said.err
    for file in (folder / "data").iterdir():
        assert (folder / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_that_are_killed_are_replaced(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, corpus: Path
) -> None:
    digest = undisturbed(cli, folder, pipeline, **slow(attempts=50))
    dice = random.Random(8)
    run = launch("run", "pipeline.yaml", "--workers", "2", "--json")
    kills = 0
    while kills < 8:
        run.until_workers(1)
        run.until_tasks(2 * kills)
        time.sleep(dice.uniform(0, 0.3))
        workers = run.workers()
        if workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1
    said = run.end()
    assert said.code == 0, said.err
    assert said.json["digest"] == digest
    assert said.json["chunks_done"] == FILES
    whole(cli, digest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, corpus: Path, number: signal.Signals
) -> None:
    run = launch("run", pipeline(**slow()), "--workers", "2")
    assert "run 1 of dataset d begins" in run.begun()
    run.until_tasks(3)
    run.kill(number)
    said = run.end()
    assert said.code == 130, said.err
    assert "millrace run pipeline.yaml goes on from there" in said.err
    assert "Traceback" not in said.err
    assert cli("status", "1", "--json").json["state"] == "stopped"
    done = run.finished_tasks(1)
    (folder / "slow.py").touch()
    again = cli("run", "pipeline.yaml", "--json")
    assert again.code == 0, again.err
    assert "run 1 of dataset d goes on" in again.err
    assert done >= 3
    whole(cli, again.json["digest"])


def test_a_signal_to_the_main_process_alone(launch: Launch, pipeline: Write, corpus: Path) -> None:
    """As a supervisor sends it."""
    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.until_tasks(1)
    run.process.send_signal(signal.SIGTERM)
    said = run.end()
    assert said.code == 130, said.err
    assert "goes on from there" in said.err


def test_a_second_ctrl_c_right_after(launch: Launch, cli: Cli, folder: Path, pipeline: Write, corpus: Path) -> None:
    (folder / "slow.py").write_text(SLOW.format(5))
    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.begun()
    run.until_workers(2)
    for pause_s in (0.0, 0.02, 0.1):
        run.kill(signal.SIGINT)
        time.sleep(pause_s)
    said = run.end()
    assert said.code == 130, said.err
    assert "Traceback" not in said.err
    (folder / "slow.py").write_text(SLOW.format(0))
    assert cli("run", "pipeline.yaml").code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sources_are_listed(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, number: signal.Signals
) -> None:
    """A pipe with a name where a file should be: listing is done, and finding the schema waits for its writer."""
    (folder / "data" / "a.csv").write_text("x\n1\n")
    (folder / "stuck.py").write_text("import pathlib, time\npathlib.Path('there').touch()\ntime.sleep(60)\n")
    name = pipeline(sources=[{"url": "file://./data", "format": "csv"}], transforms=[{"python": "stuck:f"}])
    run = launch("run", name)
    run.until((folder / "there").exists, "the import of the transform")
    run.kill(number)
    said = run.end()
    assert said.code == 130, said.err
    assert "Traceback" not in said.err
    assert cli("runs", "--json").json == []


def test_stores_that_vanish_between_two_attempts(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, corpus: Path
) -> None:
    """What the ledger says is done was read back then; what is gone since is for verify and repair to say."""
    import shutil

    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.until_tasks(FILES + 3)
    run.kill()
    run.end()
    shutil.rmtree(folder / "world" / "gcp", ignore_errors=True)
    again = cli("run", "pipeline.yaml", "--json")
    assert again.code == 0, again.err
    assert cli("verify", "d").code == 1
    repaired = cli("verify", "d", "--repair", "--json")
    assert repaired.code == 0, repaired.out
    whole(cli, again.json["digest"])
