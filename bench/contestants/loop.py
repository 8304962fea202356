"""Copies by a bare loop: read once, hash, write three times, then read and hash each copy.

Variants: ``""`` leaves the bytes in the page cache, ``fsync`` asks for each file and folder to be durable, as
Millrace does, and ``threads`` is the latter with as many files at once as Millrace has workers.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.contestants.copies import COPIES, tally
from bench.entry import Job, enter

_BUFFER_BYTES = 8_000_000


def _copy(source: Path, targets: list[Path], *, durable: bool) -> None:
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    digest = hashlib.sha256()
    outs = [path.open("wb", buffering=0) for path in targets]
    with source.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
            for out in outs:
                out.write(buffer[:length])
    for out in outs:
        if durable:
            os.fsync(out.fileno())
        out.close()
    for path in targets:
        again = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while length := file.readinto(buffer):
                again.update(buffer[:length])
        if again.digest() != digest.digest():
            raise ValueError(f"{path} is not what was read")


def work(job: Job) -> Mapping[str, Any]:
    folders = [job.out / name for name in COPIES]
    for folder in folders:
        folder.mkdir()
    durable = job.variant != ""
    with ThreadPoolExecutor(job.workers if job.variant == "threads" else 1) as pool:
        list(pool.map(lambda p: _copy(p, [f / p.name for f in folders], durable=durable), job.inputs))
    if durable:
        for folder in folders:
            descriptor = os.open(folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return {}


if __name__ == "__main__":
    enter(work, tally, versions=f"Python {platform.python_version()}")
