"""The transcripts in ``scenarios/``: each is played, and must come out as it is written.

``MILLRACE_REGENERATE=1 pytest tests/decide/test_scenarios.py`` writes them anew; the diff is what to review.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_a_scenario_comes_out_as_it_is_written(path: Path, play: Callable[[str], str]) -> None:
    written = path.read_text()
    played = play(written)
    if os.environ.get("MILLRACE_REGENERATE"):
        path.write_text(played)
    else:
        assert played == written


def test_there_are_scenarios_to_play() -> None:
    assert len(SCENARIOS) >= 28
