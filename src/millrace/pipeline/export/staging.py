"""A directory that appears whole or not at all.

Everything is written to ``<directory>.partial-XXXXXXXX`` beside it, synced, and renamed at the end, so an export that
is interrupted leaves nothing under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from millrace.core.errors import AccessDenied, NoSpace, ReadOnly, StoreError, UsageError

__all__ = ["Parts", "Staging"]


class Staging:
    """A directory in the making.

    Attributes:
        directory: Where it will be.
        path: Where it is until then.
        files: What was made in it, relative to it, in order.
    """

    def __init__(self, directory: Path) -> None:
        """Make the partial directory.

        Raises:
            UsageError: the target exists and is not an empty directory.
            StoreError: the disk refuses.
        """
        directory = Path(os.path.abspath(directory))
        if not directory.name:
            raise UsageError(f"{directory} can't be the target of an export; name a directory that is absent or empty")
        self.directory = directory
        self.path = directory.with_name(f"{directory.name}.partial-{secrets.token_hex(4)}")
        self.files: list[str] = []
        with self.on_disk():
            self._require_free()
            directory.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()

    def _require_free(self) -> None:
        if self.directory.is_symlink() or (self.directory.exists() and not self.directory.is_dir()):
            raise UsageError(f"{self.directory} exists and is no directory; name one that is absent or empty")
        if self.directory.exists() and any(self.directory.iterdir()):
            raise UsageError(f"{self.directory} is not empty; name a directory that is absent or empty")

    @contextlib.contextmanager
    def on_disk(self) -> Iterator[None]:
        """Turns what the operating system says into a sentence that names the directory."""
        try:
            yield
        except OSError as err:
            kind: type[StoreError] = StoreError
            if err.errno in (errno.ENOSPC, errno.EDQUOT):
                kind = NoSpace
            elif err.errno == errno.EROFS:
                kind = ReadOnly
            elif err.errno in (errno.EACCES, errno.EPERM):
                kind = AccessDenied
            why = err.strerror or str(err)
            raise kind(f"export to {self.directory} failed: {why}; nothing was left there", store="") from err

    def new(self, name: str) -> Path:
        """The path of a file to be made, its folder there already."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.files.append(name)
        return path

    def publish(self) -> tuple[str, ...]:
        """Sync the folders and rename the whole to its final name. Files have been synced by who wrote them.

        Raises:
            UsageError: somebody has put something there meanwhile.
        """
        with self.on_disk():
            for folder, _, _ in os.walk(self.path, topdown=False):
                sync(Path(folder))
            try:
                self.path.rename(self.directory)
            except OSError as err:
                self._require_free()
                raise err from None
            sync(self.directory.parent)
        return tuple(self.files)

    def discard(self) -> None:
        """Remove what was written, unless it has been published."""
        shutil.rmtree(self.path, ignore_errors=True)


class Parts:
    """Numbered files, one after the other.

    Attributes:
        handle: The file being written, or None between two.
    """

    def __init__(self, staging: Staging, prefix: str, ending: str) -> None:
        """Files will be called ``<prefix>00000<ending>`` and so on."""
        self.handle: BinaryIO | None = None
        self._staging, self._prefix, self._ending = staging, prefix, ending
        self._count = 0
        self._path = staging.path

    def current(self) -> BinaryIO:
        """The file being written, opened if there is none."""
        if self.handle is None:
            self._path = self._staging.new(f"{self._prefix}{self._count:05}{self._ending}")
            self._count += 1
            self.handle = self._path.open("xb", buffering=1_000_000)
        return self.handle

    def seal(self) -> None:
        """Close the file and sync it. Nothing happens when there is none."""
        handle, self.handle = self.handle, None
        if handle is not None:
            handle.close()
            sync(self._path)

    def abandon(self) -> None:
        """Close the file, whatever becomes of it."""
        handle, self.handle = self.handle, None
        if handle is not None:
            with contextlib.suppress(OSError):
                handle.close()


def sync(path: Path) -> None:
    """Make a file or a folder durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
