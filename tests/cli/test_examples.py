"""Each example runs as it stands, and gives what its README says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped,unused-ignore]
import pytest
import yaml

from millrace.cli.schema import SpecKind, json_schema

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MILLRACE = (sys.executable, "-m", "millrace")
MADE = ("world", ".millrace", "__pycache__", "cache", "saved.npz", "out", "restored")  # by who ran them in place


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy, so that runs leave nothing in the repository."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns(*MADE))
    return tmp_path / "examples"


def _millrace(*args: str, cwd: Path) -> Any:
    done = subprocess.run([*MILLRACE, *args, "--json"], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_clean_text(folder: Path) -> None:
    report = _millrace("run", "pipeline.yaml", "--workers", "1", cwd=folder / "clean_text")
    assert (report["rows_in"], report["duplicates"], report["quarantined"]) == (4, 1, 1)
    assert report["quarantine"][0]["path"] == "more/fragment.txt"
    _millrace("export", "clean-text", "out", "--format", "jsonl", cwd=folder / "clean_text")
    rows = [json.loads(line) for line in (folder / "clean_text" / "out" / "part-00000.jsonl").read_text().splitlines()]
    tokens = [token for row in rows for token in row["tokens"]]
    assert {len(row["tokens"]) for row in rows} == {64}
    text = bytes(token for token in tokens if token < 256).decode()
    assert "the miller counts the sacks." in text
    assert text.count("The wheel goes round") == 1


def test_web_logs(folder: Path) -> None:
    report = _millrace("run", "pipeline.yaml", "--workers", "1", cwd=folder / "web_logs")
    assert (report["rows"], report["quarantined"]) == (4, 1)
    assert report["quarantine"][0]["path"] == "2026-03/02.jsonl"
    shown = _millrace("show", "web-logs", cwd=folder / "web_logs")
    assert {store["jurisdiction"] for store in shown["stores"] if store["shards"]} == {"us"}
    _millrace("export", "web-logs", "out", "--format", "jsonl", cwd=folder / "web_logs")
    rows = [json.loads(line) for line in (folder / "web_logs" / "out" / "part-00000.jsonl").read_text().splitlines()]
    assert [row["page"] for row in rows] == ["/home", "/docs", "/docs/start", "/blog"]


def test_backup(folder: Path) -> None:
    _millrace("run", "pipeline.yaml", "--workers", "1", cwd=folder / "backup")
    _millrace("export", "backup", "restored", "--format", "files", cwd=folder / "backup")
    restored = folder / "backup" / "restored"
    there = {p.relative_to(restored).as_posix(): p.read_bytes() for p in restored.rglob("*") if p.is_file()}
    things = folder / "backup" / "things"
    assert there == {name: (things / name).read_bytes() for name in ("sacks.csv", "deep/a note.txt", "empty")}


def test_feed_goes_on_after_every_kind_of_stop(folder: Path) -> None:
    where = folder / "feed"
    _millrace("run", "pipeline.yaml", "--workers", "1", cwd=where)

    def train(*args: str, code: int = 0) -> list[str]:
        done = subprocess.run([sys.executable, "train.py", *args], cwd=where, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout.splitlines()

    undisturbed = train()
    assert len(undisturbed) == 6
    losses = [float(line.split()[3].rstrip(",")) for line in undisturbed]
    assert losses == sorted(losses, reverse=True)
    assert all(", 75 rows, " in line for line in undisturbed)
    assert train() == ["goes on at epoch 6, row 0"]  # there is nothing left to do

    (where / "saved.npz").unlink()
    lines = [line for steps in ("3", "7", "10") for line in train("--stop-after", steps, code=1)]
    lines += train()
    assert "goes on at epoch 0, row 40" in lines
    assert list(dict.fromkeys(line for line in lines if line.startswith("epoch"))) == undisturbed


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda f: f.relative_to(EXAMPLES).as_posix())
def test_editors_can_check_them(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    named = file.parent / text.splitlines()[0].partition("$schema=")[2]
    kind = SpecKind(named.stem)
    assert json.loads(named.read_text(encoding="utf-8")) == json_schema(kind)
    jsonschema.Draft202012Validator(json_schema(kind)).validate(yaml.safe_load(text))
