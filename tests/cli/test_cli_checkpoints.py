"""``millrace checkpoints``: what it lists, verifies, pins and gives back, and how it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import millrace
from millrace.cli.app import main

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
"""
Said = tuple[int, str, str]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    """``run("run-7", "--json")`` in a world where ``run-7`` has steps 5 and 10."""
    (tmp_path / "world.yaml").write_text(WORLD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "state").mkdir()
    with millrace.checkpoints("run-7", placement={"replicas": 2}) as ckpts:
        for step in (5, 10):
            (tmp_path / "state" / "weights").write_text(f"of step {step}")
            ckpts.save(step, "state", {"row": step})

    def call(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["millrace", "checkpoints", *args])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err, err
        return code, out, err

    return call


def test_listing_and_pinning(run: Callable[..., Said]) -> None:
    code, out, _ = run("run-7")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["step", "10", "5"]
    code, out, _ = run("run-7", "--pin", "5", "--json")
    told = json.loads(out)
    assert code == 0
    assert [(c["step"], c["pinned"], c["state"], len(c["stores"])) for c in told["checkpoints"]] == [
        (10, False, "replicated", 2),
        (5, True, "replicated", 2),
    ]
    assert "yes" in run("run-7")[1]
    assert run("run-7", "--unpin", "5")[0] == 0
    assert "yes" not in run("run-7")[1]
    code, _, err = run("run-7", "--pin", "7")
    assert (code, "has no checkpoint of step 7" in err) == (2, True)
    code, out, _ = run("other")
    assert (code, out) == (0, "there is no checkpoint of other in what can be reached\n")


def test_verifying_exits_with_one_while_anything_is_wrong(run: Callable[..., Said], tmp_path: Path) -> None:
    assert run("run-7", "--verify")[0] == 0
    manifest = next((tmp_path / "world" / "aws" / "checkpoints" / "run-7").glob("*10-*.json"))
    digest = json.loads(manifest.read_text())["checkpoint"]["files"][0]["digest"]
    (manifest.parent / "objects" / digest[:2] / digest).write_text("of step 11")
    code, out, _ = run("run-7", "--verify")
    assert code == 1
    assert "step 10: whole in this machine, gcp-main\n" in out
    assert f"step 10 in aws-main: checkpoints/run-7/objects/{digest[:2]}/{digest} is missing or rotten\n" in out
    shutil.rmtree(tmp_path / "world" / "aws")
    code, out, _ = run("run-7", "--verify", "--json")
    stores = {c["step"]: c["stores"] for c in json.loads(out)["checkpoints"]}
    assert code == 1
    assert stores[5]["aws-main"] == "it was replicated there and is not listed any more"
    assert stores[5]["gcp-main"] == "whole"


def test_restoring(run: Callable[..., Said], tmp_path: Path) -> None:
    code, out, _ = run("run-7", "--restore", "latest", "--into", "out")
    assert (code, out) == (0, "step 10 of run-7: 1 file, 10 B, under out\n")
    assert (tmp_path / "out" / "weights").read_text() == "of step 10"
    code, out, _ = run("run-7", "--restore", "5", "--into", "five", "--json")
    told = json.loads(out)
    assert (code, told["step"], told["loader_state"], told["bytes"]) == (0, 5, {"row": 5}, 9)
    code, _, err = run("run-7", "--restore", "5", "--into", "five")
    assert (code, "is there already and not an empty folder" in err) == (2, True)
    assert (tmp_path / "five" / "weights").read_text() == "of step 5"
    code, out, _ = run("nothing", "--restore", "latest", "--into", "new", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (2, "UsageError")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("run-7", "--pin", "5", "--verify"), "four different things"),
        (("run-7", "--restore", "5"), "belong together"),
        (("run-7", "--into", "x"), "belong together"),
        (("run-7", "--restore", "newest", "--into", "x"), "takes a step or latest, not 'newest'"),
        (("run-7", "--pin", "five"), "valid integer"),
        (("run-7", "--pin", "-3"), "a number from 0"),
        (("Run 7",), "is not a name"),
        ((), "NAME"),
    ],
)
def test_what_cannot_be_asked_is_refused(run: Callable[..., Said], args: tuple[str, ...], says: str) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert says in err
