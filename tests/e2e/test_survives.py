"""Killed, stopped and taken up again: one digest in the end, nothing lost, nothing left running."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]
Launch = Callable[..., Any]

FILES = 40
FEW = 12
SLOW = "import time\ndef f(batch):\n    time.sleep({})\n    return batch\n"
TINY: dict[str, Any] = {
    "chunk": 4096,
    "shards": {"size": 1024, "block_rows": 4},
    "placement": {"replicas": 3, "min_clouds": 2},
}


def corpus(folder: Path, files: int) -> None:
    """One file a chunk, every fourth equal to the one before it; and a transform that takes its time."""
    for i in range(files):
        (folder / "data" / f"{i:02}.txt").write_text(f"file {i - (i % 4 == 3)} " + "y" * 3000)
    (folder / "slow.py").write_text(SLOW.format(0.05))


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
def test_twenty_kills_change_nothing(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    """Of the whole process group, and of the main process alone: its workers then end by themselves."""
    corpus(folder, FILES)
    digest = undisturbed(cli, folder, pipeline, **slow())
    dice = random.Random(20)
    kills = seen = 0
    while kills < 20:
        run = launch("run", "pipeline.yaml", "--workers", "2")
        if kills % 5 in {1, 4}:
            time.sleep(dice.uniform(0.1, 1.2))  # while it starts, or lists, or takes its lease
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
    for i in range(150):
        (folder / "data" / f"{i:03}.bin").write_bytes(random.Random(i).randbytes(4000))
    fields = {**TINY, "sources": [{"url": "file://./data", "format": "files"}]}
    digest = undisturbed(cli, folder, pipeline, **fields)
    dice = random.Random(6)
    seen = 0
    for _ in range(5):
        run = launch("run", "pipeline.yaml")
        run.until_tasks(seen + dice.randrange(1, 20))
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
def test_kills_while_the_version_is_added(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    """From the moment the manifest is durable: the version is added once, or by the next attempt, never twice."""
    for i in range(20):
        (folder / "data" / f"{i:02}.txt").write_text(f"{i}" * 3000)
    digest = undisturbed(cli, folder, pipeline, **TINY)
    dice = random.Random(4)
    number = 1
    for attempt in range(6):
        run = launch("run", pipeline(**TINY, dataset=f"d{attempt}"))
        while run.process.poll() is None and not run.finished_tasks(number, "persist"):
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.03))
        run.kill()
        run.end()
        said = cli("run", "pipeline.yaml", "--json")
        assert said.code == 0, said.err
        assert (said.json["digest"], said.json["version"]) == (digest, 1)
        (found,) = [d for d in cli("datasets", "--json").json if d["dataset"] == f"d{attempt}"]
        assert (found["versions"], found["newest"]["digest"]) == (1, digest)
        if said.json["run"] != number:
            assert said.json["unchanged"], "the first was killed when all was done"
            assert cli("status", str(number), "--json").json["state"] == "done"
        assert cli("verify", f"d{attempt}").code == 0
        number = said.json["run"] + 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_that_are_killed_are_replaced(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    corpus(folder, FEW)
    digest = undisturbed(cli, folder, pipeline, **slow(attempts=50))
    dice = random.Random(8)
    run = launch("run", "pipeline.yaml", "--workers", "2", "--json")
    kills = 0
    while kills < 6:
        run.until_workers(1)
        run.until_tasks(3 * kills)
        time.sleep(dice.uniform(0, 0.3))
        workers = run.workers()
        if workers:
            os.kill(dice.choice(workers), signal.SIGKILL)
            kills += 1
    said = run.end()
    assert said.code == 0, said.err
    assert said.json["digest"] == digest
    assert said.json["chunks_done"] == FEW
    whole(cli, digest)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(
    launch: Launch, cli: Cli, folder: Path, pipeline: Write, number: signal.Signals
) -> None:
    corpus(folder, FEW)
    run = launch("run", pipeline(**slow()), "--workers", "2")
    assert "run 1 of dataset d begins" in run.begun()
    run.until_tasks(3)
    run.kill(number)
    said = run.end()
    assert said.code == 130, said.err
    assert "millrace run pipeline.yaml goes on from there" in said.err
    assert "Traceback" not in said.err
    status = cli("status", "1", "--json").json
    assert (status["state"], status["report"]["state"]) == ("stopped", "stopped")
    assert run.finished_tasks(1) >= 3
    again = cli("run", "pipeline.yaml", "--json")
    assert again.code == 0, again.err
    assert "run 1 of dataset d goes on" in again.err
    whole(cli, again.json["digest"])


def test_a_signal_to_the_main_process_alone(launch: Launch, folder: Path, pipeline: Write) -> None:
    """As a supervisor sends it."""
    corpus(folder, FEW)
    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.until_tasks(1)
    run.process.send_signal(signal.SIGTERM)
    said = run.end()
    assert said.code == 130, said.err
    assert "goes on from there" in said.err


def test_ctrl_c_while_threads_work(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    for i in range(150):
        (folder / "data" / f"{i:03}.bin").write_bytes(random.Random(i).randbytes(4000))
    run = launch("run", pipeline(**TINY, sources=[{"url": "file://./data", "format": "files"}]))
    run.until_tasks(5)
    run.kill(signal.SIGINT)
    said = run.end()
    assert said.code == 130, said.err
    assert "goes on from there" in said.err
    assert "Traceback" not in said.err
    assert cli("run", "pipeline.yaml").code == 0
    assert cli("verify", "d").code == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.03, 0.3])
def test_one_ctrl_c_after_the_other(launch: Launch, cli: Cli, folder: Path, pipeline: Write, pause_s: float) -> None:
    """Whatever the second one cuts short: no traceback, no process, and the run can be taken up again."""
    corpus(folder, 2)
    (folder / "slow.py").write_text(SLOW.format(20))
    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.begun()
    run.until_workers(2)
    for _ in range(3):
        run.kill(signal.SIGINT)
        time.sleep(pause_s)
    said = run.end()
    assert said.code in {130, -signal.SIGINT}, said.err  # the latter when all is said and Python is on its way out
    assert "goes on from there" in said.err
    assert "Traceback" not in said.err
    assert cli("status", "1", "--json").json["state"] in {"stopped", "interrupted"}
    (folder / "slow.py").write_text(SLOW.format(0))
    assert cli("run", "pipeline.yaml", "--workers", "1").code == 0


@pytest.fixture
def silent() -> Iterator[tuple[str, threading.Event]]:
    """A server that takes a request and never answers: its URL, and whether somebody asked."""
    asked = threading.Event()
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])
                    asked.set()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_sources_are_listed(
    launch: Launch, cli: Cli, pipeline: Write, silent: tuple[str, threading.Event], number: signal.Signals
) -> None:
    url, asked = silent
    options = {"endpoint": url, "region": "us-east-1", "anonymous": True, "path_style": True}
    run = launch("run", pipeline(sources=[{"url": "s3://bucket/here", "format": "text", "options": options}]))
    run.until(asked.is_set, "the listing")
    run.kill(number)
    said = run.end()
    assert said.code == 130, said.err
    assert "interrupted" in said.err
    assert "Traceback" not in said.err
    assert cli("runs", "--json").json == []


def test_ctrl_c_while_a_transform_is_imported(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    (folder / "heavy.py").write_text(
        "import pathlib, time\npathlib.Path('there').touch()\ntime.sleep(2)\ndef f(batch):\n    return batch\n"
    )
    run = launch("run", pipeline(transforms=[{"python": "heavy:f"}]))
    run.until((folder / "there").exists, "the import of the transform")
    run.kill(signal.SIGINT)
    said = run.end()
    assert said.code == 130, said.err
    assert "Traceback" not in said.err
    assert cli("runs", "--json").json == []


def test_a_cloud_that_vanishes_between_two_attempts(launch: Launch, cli: Cli, folder: Path, pipeline: Write) -> None:
    """What the ledger says is done was read back then; what is gone since is for verify to find and repair."""
    corpus(folder, FEW)
    run = launch("run", pipeline(**slow()), "--workers", "2")
    run.until_tasks(6, phase="main")
    run.kill()
    run.end()
    shutil.rmtree(folder / "world" / "gcp")
    again = cli("run", "pipeline.yaml", "--json")
    assert again.code == 0, again.err
    assert cli("verify", "d").code == 1
    assert cli("verify", "d", "--repair").code == 0
    whole(cli, again.json["digest"])
