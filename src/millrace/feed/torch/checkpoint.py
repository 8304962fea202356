"""State dicts to folders and back through torch.distributed.checkpoint, with or without a process group.

With a process group every rank calls the same function; each writes its own files to one folder that all of them
must see, and one of them, the first, commits. What fails on one rank is raised on all, so that none waits in vain.
"""

from __future__ import annotations

import errno
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from millrace.core.errors import MillraceError, NoSpace, StoreError, UsageError

__all__ = ["load_state", "load_together", "ranks", "save_state", "save_together"]

T = TypeVar("T")

StateDict = MutableMapping[str, Any]

_SEEN_S: Final = 10.0
"""How long a folder made by another machine may take to show up: network disks remember that it wasn't there."""


class _Writer(dcp.FileSystemWriter):  # type: ignore[misc]
    """Writes nothing that differs between two saves of one state: no id of the save, no path."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id="", save_id="")


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if _grouped() else (0, 1)


def save_state(state_dict: StateDict, folder: Path) -> None:
    """Write a state dict to a folder: every rank its part, if there is a process group.

    The files are not synced: who keeps them makes them durable.

    Raises:
        StoreError: it can't be written; ``NoSpace`` when that is why.
    """
    with _torch_errors(f"the state can't be written to {folder}"), _quiet():
        # Already in the kernel's cache when they are copied from here; syncing them too would cost as much again.
        dcp.save(dict(state_dict), storage_writer=_Writer(folder, sync_files=False))


def load_state(state_dict: StateDict, folder: Path) -> None:
    """Load a folder into a state dict of the same keys, in place; it may be sharded over other ranks than it was.

    Raises:
        UsageError: the folder holds no such state.
        StoreError: it doesn't fit this state dict.
    """
    if not (folder / ".metadata").is_file():
        raise UsageError(f"{folder} was not written by torch.distributed.checkpoint; read its files from path()")
    loaded = dict(state_dict)
    with _torch_errors(f"the state in {folder} can't be loaded"), _quiet():
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(folder))
    state_dict.update(loaded)


def save_together(state_dict: StateDict, make_folder: Callable[[], Path], commit: Callable[[Path, int], T]) -> T:
    """Write a state dict to one folder, each rank its part, and commit it once.

    Args:
        state_dict: Every rank's own.
        make_folder: Makes a new folder; called on the first rank.
        commit: Called with the folder and the number of ranks, on the first rank, when all have written. What it
            gives is given on every rank, so it can be pickled.

    Raises:
        UsageError: a rank doesn't see the folder.
        MillraceError: what failed on any of the ranks.
    """
    rank, size = ranks()
    folder = Path(_from_first(lambda: str(make_folder())))
    try:
        _on_all(lambda: _check_seen(folder))
        _on_all(lambda: save_state(state_dict, folder), collective=True)
        return _from_first(lambda: commit(folder, size))
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def load_together(state_dict: StateDict, what: str, make_folder: Callable[[], Path]) -> None:
    """Load a folder into a state dict, on every rank.

    Args:
        state_dict: Every rank's own.
        what: Names what is loaded: it must be the same on every rank.
        make_folder: Gives the folder; called on every rank, since they may not share a disk.

    Raises:
        UsageError: the ranks would load different things.
        MillraceError: what failed on any of the ranks.
    """
    wanted = _gathered(what)
    if len(set(wanted)) > 1:
        others = "; ".join(f"rank {i}: {one}" for i, one in enumerate(wanted[:8]))
        raise UsageError(f"the ranks would load different checkpoints ({others}); have one decide, and tell the others")
    folder = _on_all(make_folder)
    _on_all(lambda: load_state(state_dict, folder), collective=True)


# --- all ranks as one -------------------------------------------------------------------------------------------


def _grouped() -> bool:
    return bool(dist.is_available() and dist.is_initialized())


def _gathered(value: T) -> list[T]:
    if not _grouped():
        return [value]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _from_first(work: Callable[[], T]) -> T:
    """What ``work`` gives on the first rank, on all of them; so with what it raises."""
    outcome: list[Any] = [None]
    if ranks()[0] == 0:
        try:
            outcome = [(work(), None)]
        except MillraceError as error:
            outcome = [(None, error)]
        except Exception as error:  # or the other ranks would wait for the broadcast
            outcome = [(None, StoreError(f"rank 0 failed: {type(error).__name__}: {error}"))]
    if _grouped():
        dist.broadcast_object_list(outcome, src=0)
    value, failure = outcome[0]
    if failure is not None:
        raise failure
    result: T = value
    return result


def _on_all(work: Callable[[], T], *, collective: bool = False) -> T:
    """What ``work`` gives here, once it worked on every rank.

    Args:
        work: Called on every rank.
        collective: It is a collective that fails on all ranks if it fails on one: its error says enough.
    """
    value: T | None = None
    failure: MillraceError | None = None
    try:
        value = work()
    except MillraceError as error:
        failure = error
    if collective:
        if failure is not None:
            raise failure
    else:
        failures = [(i, e) for i, e in enumerate(_gathered(failure)) if e is not None]
        if failures:
            said = "; ".join(str(e) if ranks()[1] == 1 else f"rank {i}: {e}" for i, e in failures[:8])
            raise type(failures[0][1])(said)
    return value  # type: ignore[return-value]


def _check_seen(folder: Path) -> None:
    deadline_s = time.monotonic() + _SEEN_S
    while not folder.is_dir():
        if time.monotonic() > deadline_s:
            raise UsageError(
                f"on {socket.gethostname()} there is no {folder}, which the first rank made: all ranks write to one "
                "folder, so the world's 'state' must be a folder on a disk that they share"
            )
        time.sleep(0.05)


# --- what torch says ----------------------------------------------------------------------------------------------


@contextmanager
def _torch_errors(what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        said = {rank: failure for rank, (failure, _) in error.failures.items()}
        full = any(_is_full(failure) for failure in said.values())
        words = "; ".join(f"rank {rank}: {_brief(failure)}" for rank, failure in sorted(said.items())[:8])
        raise (NoSpace if full else StoreError)(f"{what}: {words}") from error


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is no process group: that is as good a way as any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
