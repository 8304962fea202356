"""What contestants that copy files have in common: three folders, and what must be in each."""

from __future__ import annotations

from bench.digests import Tally, tally_files
from bench.entry import Job

__all__ = ["COPIES", "tally"]

COPIES = ("one", "two", "three")


def tally(job: Job) -> list[Tally]:
    """Every piece of every file of each copy."""
    return [tally_files(job.out / name) for name in COPIES]
