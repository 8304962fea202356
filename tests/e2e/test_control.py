"""pause, resume, stop, status and runs, from another process than the one that works."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Write = Callable[..., str]
Launch = Callable[..., Any]

FILES = 8
HEARD_S = 2.0
"""By then a run has heard what was asked of it: twice what it promises."""
GATED = (
    "import pathlib, time\n"
    "gate = pathlib.Path({!r})\n"
    "def f(batch):\n"
    "    while not (gate / batch.column('path')[0].as_py()).exists() and not (gate / 'all').exists():\n"
    "        time.sleep(0.01)\n"
    "    return batch\n"
)


@pytest.fixture
def gate(folder: Path) -> Path:
    """A folder in which a file opens the way for the chunk of that name, and ``all`` for every one."""
    for i in range(FILES):
        (folder / "data" / f"{i}.txt").write_text(str(i) * 4000)
    (folder / "gate").mkdir()
    (folder / "gated.py").write_text(GATED.format(str(folder / "gate")))
    return folder / "gate"


@pytest.fixture
def name(pipeline: Write, gate: Path) -> str:
    return pipeline(chunk=4096, transforms=[{"python": "gated:f"}])


@pytest.fixture
def working(launch: Launch, name: str, gate: Path) -> Any:
    """A run of 8 chunks by one worker, of which two are done and the third waits at the gate."""
    run = launch("run", name, "--workers", "1")
    run.begun()
    (gate / "0.txt").touch()
    (gate / "1.txt").touch()
    run.until_tasks(2)
    return run


def state(cli: Cli, run: int = 1) -> str:
    said = cli("status", str(run), "--json")
    assert said.code == 0, said.err
    found: str = said.json["state"]
    return found


def test_pause_lets_nothing_new_begin(working: Any, cli: Cli, gate: Path) -> None:
    assert state(cli) == "running"
    said = cli("pause", "1")
    assert said.code == 0, said.err
    assert "run 1 is pausing" in said.out
    time.sleep(HEARD_S)
    (gate / "all").touch()
    working.until_tasks(3)  # the one in flight is finished
    time.sleep(1.0)
    assert working.finished_tasks(1) == 3
    status = cli("status", "1", "--json").json
    assert (status["state"], status["asked"]) == ("paused", "pause")
    assert (status["progress"]["phase"], status["progress"]["done"]) == ("main", 3)
    assert "run 1 of dataset d: paused" in cli("status", "1").out
    assert cli("runs", "--json").json[0]["state"] == "paused"
    assert cli("pause", "1").code == 0, "asking twice does no harm"

    said = cli("resume", "1")
    assert said.code == 0, said.err
    assert "goes on" in said.out
    ended = working.end()
    assert ended.code == 0, ended.err
    assert state(cli) == "done"
    assert cli("verify", "d").code == 0


def test_stop_finishes_what_is_in_flight(working: Any, cli: Cli, gate: Path, name: str) -> None:
    said = cli("stop", "1", "--json")
    assert said.json == {"run": 1, "asked": "stop"}
    time.sleep(HEARD_S)
    assert working.process.poll() is None, "a chunk is in flight"
    (gate / "all").touch()
    ended = working.end()
    assert ended.code == 1
    assert "run 1 was stopped" in ended.err
    assert f"3 of {FILES} chunks done and kept" in ended.err
    assert f"millrace run {name} goes on from there" in ended.err
    status = cli("status", "1", "--json").json
    assert (status["state"], status["report"]["chunks_done"]) == ("stopped", 3)

    again = cli("run", name, "--json")
    assert again.code == 0, again.err
    assert "run 1 of dataset d goes on" in again.err
    assert (again.json["run"], again.json["rows"]) == (1, FILES)
    assert state(cli) == "done"


def test_stop_and_ctrl_c_end_a_paused_run(working: Any, cli: Cli, gate: Path, launch: Launch, name: str) -> None:
    cli("pause", "1")
    time.sleep(HEARD_S)
    (gate / "all").touch()
    working.until_tasks(3)
    assert cli("stop", "1").code == 0
    assert working.end().code == 1
    assert state(cli) == "stopped"

    (gate / "all").unlink()
    run = launch("run", name, "--workers", "1")
    assert "goes on" in run.begun(), "and what was asked of the attempt before is forgotten"
    run.until_workers(1)
    cli("pause", "1")
    run.kill(signal.SIGINT)
    assert run.end().code == 130
    assert state(cli) == "stopped"


def test_a_run_that_does_not_run_takes_no_orders(cli: Cli, folder: Path, pipeline: Write) -> None:
    (folder / "data" / "a.txt").write_text("hello")
    assert cli("run", pipeline()).code == 0
    for command in ("pause", "resume", "stop"):
        said = cli(command, "1")
        assert said.code == 2
        assert "run 1 is not running, it is done" in said.err
        said = cli(command, "2", "--json")
        assert said.code == 2
        assert "there is no run 2" in said.err
        assert said.json["error"]["exit_code"] == 2
    (folder / "broken.py").write_text("def f(batch):\n    raise ValueError('no')\n")
    assert cli("run", pipeline(transforms=[{"python": "broken:f"}], attempts=1), "--workers", "1").code == 1
    said = cli("stop", "2")
    assert said.code == 2
    assert "it is failed" in said.err
    assert "millrace run pipeline.yaml" in said.err


def test_a_killed_run_is_interrupted(working: Any, cli: Cli, gate: Path, name: str) -> None:
    working.kill()
    working.end()
    assert state(cli) == "interrupted"
    assert cli("runs", "--json").json[0]["state"] == "interrupted"
    assert f"continue it with: millrace run {name}" in cli("status", "1").out
    for command in ("pause", "resume", "stop"):
        said = cli(command, "1")
        assert said.code == 2
        assert "it is interrupted" in said.err
        assert f"millrace run {name}" in said.err
    (gate / "all").touch()
    again = cli("run", name, "--json")
    assert again.code == 0, again.err
    assert again.json["run"] == 1
    assert again.json["rows"] == FILES


def test_fresh_begins_anew(working: Any, cli: Cli, gate: Path, name: str) -> None:
    working.kill()
    working.end()
    (gate / "all").touch()
    again = cli("run", name, "--fresh", "--json")
    assert again.code == 0, again.err
    assert "run 2 of dataset d begins" in again.err
    assert again.json["run"] == 2
    assert [(r["run"], r["state"]) for r in cli("runs", "--json").json] == [(1, "superseded"), (2, "done")]
    said = cli("stop", "1")
    assert said.code == 2
    assert "superseded" in said.err


def test_another_spec_supersedes(working: Any, cli: Cli, gate: Path, name: str, pipeline: Write) -> None:
    working.kill()
    working.end()
    (gate / "all").touch()
    other = pipeline("other.yaml", chunk=8192, transforms=[{"python": "gated:f"}])
    again = cli("run", other, "--json")
    assert again.code == 0, again.err
    assert again.json["run"] == 2
    assert [(r["run"], r["state"]) for r in cli("runs", "--json").json] == [(1, "superseded"), (2, "done")]
    third = cli("run", name, "--json")
    assert third.code == 0, third.err
    assert (third.json["run"], third.json["version"]) == (3, 2)


def test_what_runs_and_status_tell_a_script(cli: Cli, folder: Path, pipeline: Write) -> None:
    assert cli("runs", "--json").json == []
    assert "no run was made" in cli("runs").out
    for i in range(3):
        (folder / "data" / f"{i}.txt").write_text("hello" * 1000)
    report = cli("run", pipeline(chunk=4096), "--json").json
    assert {"run", "state", "dataset", "version", "digest", "chunks", "rows", "shards", "bytes_in", "bytes_out"} < set(
        report
    )
    assert {"replicas", "quarantined", "seconds", "stages"} < set(report)
    assert {s["stage"] for s in report["stages"]} == {"ingest", "pack", "distribute", "persist"}
    assert all({"seconds", "mb_per_s"} < set(s) for s in report["stages"])
    (line,) = cli("runs", "--json").json
    assert line == cli("status", "1", "--json").json
    assert (line["run"], line["dataset"], line["state"], line["pipeline_file"]) == (1, "d", "done", "pipeline.yaml")
    assert line["report"]["digest"] == report["digest"]
    assert line["created_at_ms"] <= line["ended_at_ms"]
    assert line["progress"] is None
    assert report["digest"] in cli("status", "1").out
    assert "pipeline.yaml" in cli("runs").out
