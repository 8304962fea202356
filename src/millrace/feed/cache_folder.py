"""The folder a cache lies in: whose it is, what is where in it, and whether it is still the same disk.

::

    FOLDER/millrace-cache-1/
        ledger              how much is kept; its lock is held by whoever makes room
        ab/ab12...          the blocks, by the first two letters of their names
        tmp/                what is being written
        locks/ab12...       one for each block that is being fetched, while it is
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from pathlib import Path

from millrace.core.errors import UsageError

__all__ = ["CacheFolder", "prepare_folder"]

_LAYOUT = "millrace-cache-1"
_WAY_OUT = "name a folder of this user on a local disk (cache=)"


class CacheFolder:
    """Paths in a cache that was found usable.

    Attributes:
        folder: As the user named it.
        root: The folder within it that is the cache's alone.
    """

    def __init__(self, folder: Path, root: str, device: int) -> None:
        self.folder = folder
        self.root = root
        self.ledger = os.path.join(root, "ledger")
        self.tmp = os.path.join(root, "tmp")
        self.locks = os.path.join(root, "locks")
        self._device = device

    def block(self, name: str) -> str:
        """The file of a block."""
        return f"{self.root}/{name[:2]}/{name}"

    def lock(self, name: str) -> str:
        """The lock file of a block."""
        return f"{self.locks}/{name}"

    def check(self) -> None:
        """Make sure that this is still the disk the cache began on; make what was removed from it anew.

        Raises:
            OSError: ENODEV if it is another disk now (a mount came or went: what would be written there would lie
                where nobody expects it); otherwise as the system says.
        """
        try:
            if os.stat(self.tmp).st_dev == self._device and os.path.isdir(self.locks):
                return
        except (FileNotFoundError, NotADirectoryError):
            pass
        there = self.folder
        while not there.exists() and there != there.parent:
            there = there.parent
        if os.stat(there).st_dev != self._device:
            raise OSError(errno.ENODEV, "its file system is not mounted there any more", str(self.folder))
        try:
            prepare_folder(self.folder)
        except UsageError as problem:
            raise OSError(errno.EACCES, str(problem), str(self.folder)) from problem


def prepare_folder(folder: Path) -> CacheFolder:
    """Make the folder of a cache, or find it usable.

    What lies in a cache is believed. So nobody else may be able to put something there: the folder must be this
    user's or root's, and if everyone can write to it, no one may rename what is another's (the sticky bit, as on
    ``/tmp``). Root may use anybody's.

    Raises:
        UsageError: It can't be made or written, is no folder, is another user's, or anybody's. Names the folder, the
            cause and the way out.
    """
    folder = Path(os.path.abspath(folder))
    root = folder / _LAYOUT
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        _check_owner(folder, os.stat(folder), ours_only=False)
        _made(root)
        found = os.lstat(root)
        _check_owner(root, found, ours_only=True)
        _try_writing(root)
        for name in ("tmp", "locks"):
            _made(root / name)
    except FileExistsError:
        raise UsageError(f"the cache {str(folder)!r} is not a folder; {_WAY_OUT}") from None
    except OSError as problem:
        raise UsageError(_refusal(folder, problem)) from problem
    return CacheFolder(folder, str(root), found.st_dev)


def _made(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)


def _try_writing(root: Path) -> None:
    """Raise what the system says to a write there; a disk that is only full is for the evictor."""
    probe = root / f".probe-{secrets.token_hex(8)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        os.unlink(probe)
    except OSError as problem:
        if problem.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise


def _check_owner(folder: Path, found: os.stat_result, *, ours_only: bool) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise FileExistsError(folder)
    us = os.geteuid()
    if us == 0:
        return
    if found.st_uid != us and (ours_only or found.st_uid != 0):
        raise UsageError(
            f"the cache {str(folder)!r} belongs to another user (uid {found.st_uid}, this is {us}), who could put "
            f"wrong data there; {_WAY_OUT}"
        )
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise UsageError(
            f"every user of this machine can change the cache {str(folder)!r}, and so the data; "
            f"take that away (chmod o-w), or {_WAY_OUT}"
        )


def _refusal(folder: Path, problem: OSError) -> str:
    words = (problem.strerror or str(problem)).lower()
    if problem.errno == errno.EROFS:
        return f"the cache {str(folder)!r} lies on a read-only disk; mount it for writing, or {_WAY_OUT}"
    if problem.errno in {errno.EACCES, errno.EPERM}:
        return f"this user may not write to the cache {str(folder)!r}: {words}; give it access, or {_WAY_OUT}"
    if problem.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"the cache {str(folder)!r} can't be made on a full disk: {words}; free some space, or {_WAY_OUT}"
    if problem.errno in {errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.EIO, errno.ETIMEDOUT}:
        return f"the disk of the cache {str(folder)!r} does not work: {words}; mount it again, or {_WAY_OUT}"
    return f"the cache {str(folder)!r} can't be used: {words}; {_WAY_OUT}"
