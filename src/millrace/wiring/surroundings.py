"""What the environment says to a feed: which rank this is, and where blocks are cached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from millrace.core.errors import UsageError

__all__ = ["cache_folder", "rank_and_world"]

_VARIABLES: Final = (
    ("RANK", "WORLD_SIZE"),  # torchrun, Lightning, accelerate
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # of srun's step: a batch script, which is one process, has no such
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are, by the usual launchers' variables; ``(0, 1)`` without any.

    Raises:
        UsageError: one of a pair is set without the other, or isn't a number.
    """
    for rank, world in _VARIABLES:
        found = os.environ.get(rank), os.environ.get(world)
        if found == (None, None):
            continue
        if None in found:
            there, lacking = (rank, world) if found[1] is None else (world, rank)
            if there.startswith("SLURM"):  # in an allocation, and not started by srun
                continue
            raise UsageError(f"${there} is set and ${lacking} isn't; set both, or give rank= and world_size=")
        try:
            return int(str(found[0])), int(str(found[1]))
        except ValueError as error:
            raise UsageError(
                f"${rank}={found[0]!r} and ${world}={found[1]!r} are not two numbers; give rank= and world_size="
            ) from error
    return 0, 1


def cache_folder() -> Path:
    """Where blocks are cached by default: ``$MILLRACE_CACHE``, or ``millrace`` in the user's cache folder."""
    named = os.environ.get("MILLRACE_CACHE")
    if named:
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "millrace"
