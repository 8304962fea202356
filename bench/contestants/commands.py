"""Copies by what lies on every machine: ``cp`` and ``sha256sum``, or ``rclone`` with its checksums.

Variants: ``cp`` runs one command after the other, as a person would type them; ``rclone`` uses two transfers and two
checkers at once. Both hash the source once and hold each copy against that list. Neither fsyncs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any

from bench.contestants.copies import COPIES, tally
from bench.entry import Job, enter

_VERSIONS = {"cp": ["cp", "--version"], "rclone": ["rclone", "version"]}


def _cp(job: Job) -> None:
    sums = job.scratch / "SHA256SUMS"
    with sums.open("wb") as file:
        subprocess.run(["sha256sum", *(path.name for path in job.inputs)], cwd=job.source, stdout=file, check=True)
    for name in COPIES:
        subprocess.run(["cp", "-r", job.source, job.out / name], check=True)
        subprocess.run(["sha256sum", "--check", "--quiet", sums], cwd=job.out / name, check=True)


def _rclone(job: Job) -> None:
    sums = job.scratch / "SHA256SUMS"
    common = ["--config", "", "--transfers", f"{job.workers}", "--checkers", f"{job.workers}"]
    with sums.open("wb") as file:
        subprocess.run(["rclone", *common, "hashsum", "sha256", job.source], stdout=file, check=True)
    for name in COPIES:
        subprocess.run(["rclone", *common, "--checksum", "copy", job.source, job.out / name], check=True)
        subprocess.run(
            ["rclone", *common, "--log-level", "ERROR", "checksum", "sha256", sums, job.out / name], check=True
        )


def work(job: Job) -> Mapping[str, Any]:
    {"cp": _cp, "rclone": _rclone}[job.variant](job)
    done = subprocess.run(_VERSIONS[job.variant], capture_output=True, text=True, check=True)
    return {"versions": done.stdout.splitlines()[0]}


if __name__ == "__main__":
    enter(work, tally, versions="")
