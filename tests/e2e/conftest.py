"""A world in a temporary folder, and the command line in this process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from millrace.cli.app import main

WORLD = """\
clouds:
  aws: {regions: {us-east-1: {jurisdiction: us, stores: {aws-main: {url: "file://./world/aws"}}}}}
  gcp: {regions: {us-central1: {jurisdiction: us, stores: {gcp-main: {url: "file://./world/gcp"}}}}}
  azure: {regions: {westeurope: {jurisdiction: eu, stores: {az-main: {url: "file://./world/azure"}}}}}
  ibm: {regions: {us-south: {jurisdiction: us, stores: {ibm-main: {url: "file://./world/ibm"}}}}}
"""


@dataclass(frozen=True)
class Said:
    """What a command printed and exited with."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A world with four clouds on this disk, and the working directory."""
    (tmp_path / "world.yaml").write_text(WORLD)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MILLRACE_WORLD", raising=False)
    return tmp_path


@pytest.fixture
def cli(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Said]]:
    """``cli("run", "pipeline.yaml")``: the command, in this process."""
    path = list(sys.path)

    def run(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["millrace", *args])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        for name, module in list(sys.modules.items()):  # a next command is a new process, in life
            if str(getattr(module, "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]
        importlib.invalidate_caches()
        assert "Traceback" not in err, err
        return Said(code, out, err)

    yield run
    sys.path[:] = path


@pytest.fixture
def spawn(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """The command as a process of its own, in its own process group."""

    def run(*args: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "millrace", *args],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "COLUMNS": "200"},
            **more,
        )

    return run


@pytest.fixture
def pipeline(folder: Path) -> Callable[..., str]:
    """Write pipeline.yaml from keyword arguments on top of small defaults; gives its name."""

    def write(name: str = "pipeline.yaml", **fields: Any) -> str:
        spec = {
            "dataset": "d",
            "sources": [{"url": "file://./data", "format": "text"}],
            "placement": {"replicas": 2, "min_clouds": 2},
            **fields,
        }
        (folder / name).write_text(json.dumps(spec))
        return name

    return write
