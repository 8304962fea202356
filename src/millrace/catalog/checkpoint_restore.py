"""A checkpoint back as a folder of files: verified as it is written, and there at once or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Final

from millrace.catalog.checkpoint_depot import Budget, Depot
from millrace.catalog.checkpoint_files import disk_trouble, is_restored, prepare, sync_tree, write_span
from millrace.catalog.checkpoint_manifest import key_of
from millrace.catalog.checkpoint_parts import each_within, read_part
from millrace.core.errors import UsageError
from millrace.core.facts import CheckpointManifest
from millrace.core.model import Digest

__all__ = ["folder_name", "kept_folder", "restore", "tidy"]

_LOOK_S: Final = 0.1
_IDLE_S: Final = 3600.0
"""How long a restored folder outlives the last time it was handed out, once its checkpoint is gone."""


def folder_name(manifest: CheckpointManifest) -> str:
    """What a restored checkpoint's folder is called: its step and the first letters of its digest."""
    return key_of(manifest).rpartition("/")[2].removesuffix(".json")


async def restore(depot: Depot, manifest: CheckpointManifest, target: Path) -> None:
    """Write it to ``target``, which is empty or not there yet. Durable when it returns.

    Raises:
        UsageError: something is there already.
        StoreError: it can't be read whole, or not be written. Nothing is left of it then.
    """
    target = await asyncio.to_thread(_free_place, target)
    await _build(depot, manifest, target, target.with_name(f".{target.name}.{secrets.token_hex(4)}.part"))


async def kept_folder(depot: Depot, manifest: CheckpointManifest, base: Path) -> Path:
    """Its folder under ``base``: the one that is there, if every byte of it is still true, or a new one.

    Processes that want the same one wait for each other.

    Raises:
        StoreError: it can't be read whole, or not be written.
    """
    target = base / folder_name(manifest)
    with disk_trouble(base):
        os.makedirs(base, exist_ok=True)
    async with _alone(base / f".{target.name}.lock"):
        if not await asyncio.to_thread(is_restored, target, manifest):
            part = base / f".{target.name}.part"
            for old in (part, target):  # what a killed process left, and what somebody changed
                await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)
            await _build(depot, manifest, target, part)
        with disk_trouble(target):
            os.utime(target)
    return target


async def _build(depot: Depot, manifest: CheckpointManifest, target: Path, part: Path) -> None:
    budget = Budget()
    names = depot.readable()

    async def one(piece: tuple[Path, int, Digest, int]) -> None:
        path, start, digest, size_bytes = piece
        async with budget.take(size_bytes):
            data, _ = await read_part(depot, digest, names)
            await asyncio.to_thread(write_span, path, start, data)

    try:
        await asyncio.to_thread(prepare, part, manifest)
        await each_within(budget, _pieces(manifest, part), one)
        await asyncio.to_thread(sync_tree, part)
        with disk_trouble(target):
            os.rename(part, target)
    except BaseException:
        await asyncio.to_thread(shutil.rmtree, part, ignore_errors=True)
        raise


def _pieces(manifest: CheckpointManifest, root: Path) -> Sequence[tuple[Path, int, Digest, int]]:
    found = []
    for file in manifest.files:
        start = 0
        for part in file.parts:
            found.append((root / file.path, start, Digest(part.digest), part.size_bytes))
            start += part.size_bytes
    return found


def _free_place(target: Path) -> Path:
    target = target.absolute()
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is there already and not an empty folder; name another")
    with disk_trouble(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    return target


@contextlib.asynccontextmanager
async def _alone(lock: Path) -> AsyncIterator[None]:
    """Hold a lock file; the kernel drops the lock with the process."""
    with disk_trouble(lock):
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(_LOOK_S)
        yield
    finally:
        os.close(handle)


def tidy(base: Path, keep: Collection[str], *, now_s: float) -> None:
    """Remove restored folders that nobody asked for in the last hour and whose checkpoints are gone.

    Args:
        base: Where they are.
        keep: Names of folders to leave alone.
        now_s: Seconds since 1970.
    """
    if not base.is_dir():
        return
    for path in base.iterdir():
        name = path.name.removeprefix(".").partition(".")[0] if path.name.startswith(".") else path.name
        with contextlib.suppress(OSError):  # the next time
            if name not in keep and path.stat().st_mtime + _IDLE_S < now_s:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
