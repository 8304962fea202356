"""demo: it holds, it leaves what it was asked to, and it says so when something did not hold."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace.catalog.findings import VerifyReport
from millrace.catalog.verify import verify
from millrace.cli.demo import CLOUDS, Demo
from millrace.cli.output import Output
from millrace.core.errors import MillraceError

MILLRACE = (sys.executable, "-m", "millrace")


def _corpus(folder: Path) -> Path:
    for i in range(400):
        file = folder / "corpus" / f"package {i % 4}" / f"module_{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'"""Module {i}."""\n' + "".join(f"value_{i}_{k} = {k * i}\n" for k in range(200)))
    return folder / "corpus"


def test_every_claim_holds(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()
    shown = Demo(world, _corpus(tmp_path), Output(as_json=True), workers=1)
    asyncio.run(shown.play())
    assert [claim.text for claim in shown.claims if not claim.held] == []
    assert len(shown.claims) == 8
    assert len(shown.digest) == 64
    for cloud in CLOUDS:
        assert list((world / "clouds" / cloud).rglob("*.arrow")), f"{cloud} is empty"


def test_a_repair_that_is_not_one_is_noticed(tmp_path: Path) -> None:
    world = tmp_path / "world"
    world.mkdir()

    async def forgetful(*args: Any, repair: bool, **options: Any) -> VerifyReport:
        return await verify(*args, repair=False, **options)

    shown = Demo(world, _corpus(tmp_path), Output(as_json=True), workers=1, check=forgetful)
    asyncio.run(shown.play())
    failed = [claim.text for claim in shown.claims if not claim.held]
    assert len(failed) == 3, failed
    assert any("bit for bit" in text for text in failed)


def test_a_corpus_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    shown = Demo(tmp_path, tmp_path / "nowhere", Output(as_json=True), workers=1)
    with pytest.raises(MillraceError, match="nowhere"):
        asyncio.run(shown.play())


def test_keep_wants_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = subprocess.run([*MILLRACE, "demo", "--keep", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = subprocess.run([*MILLRACE, "demo", "--json", "--keep", str(kept)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["held"] is True
    verified = subprocess.run(
        [*MILLRACE, "verify", "stdlib", "--json"], cwd=kept, capture_output=True, text=True, check=True
    )
    assert json.loads(verified.stdout)["digest"] == said["digest"]
