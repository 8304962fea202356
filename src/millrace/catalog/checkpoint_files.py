"""A checkpoint as files in a folder: what is in it, cut into parts, and written back. Plain functions of paths."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from millrace.core.errors import MillraceError, NoSpace, SourceChanged, StoreError, UsageError
from millrace.core.facts import CheckpointManifest
from millrace.core.model import Digest

__all__ = [
    "Item",
    "Tree",
    "disk_trouble",
    "hash_file",
    "is_restored",
    "prepare",
    "read_span",
    "scan",
    "still_the_same",
    "sync_tree",
    "write_span",
]

_HASH_BYTES: Final = 1 << 20
_HUGE_FROM_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a folder that is to be saved.

    Attributes:
        path: Relative, ``/`` between parts.
        size_bytes: As it was found.
        mtime_ns: As it was found; it must be so still when all is read.
    """

    path: str
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder that is to be saved.

    Attributes:
        root: Where it is.
        files: In the order of their paths.
        folders: Those that nothing lies in.
    """

    root: Path
    files: tuple[Item, ...]
    folders: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(item.size_bytes for item in self.files)


def scan(root: Path) -> Tree:
    """Every file of a folder, and below. A link to a file inside the folder is taken for that file.

    Raises:
        UsageError: there is no such folder, nothing is in it, or something that can't be saved: a socket, a pipe, a
            device, a link that leads out or to a folder, a name that isn't UTF-8; names it.
    """
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "is not there"
        raise UsageError(f"{root} {what}; give the folder that holds the state to be saved")
    inside = os.path.realpath(root)
    files: list[Item] = []
    folders: list[str] = []
    todo = [""]
    while todo:
        at = todo.pop()
        found = list(_entries(root, at))
        for entry in found:
            path = f"{at}/{entry.name}" if at else entry.name
            if _look(root, inside, path, entry, files):
                todo.append(path)
        if at and not found:
            folders.append(at)
    if not files:
        raise UsageError(f"{root} holds no file; a checkpoint of nothing would be taken for a state")
    return Tree(root, tuple(sorted(files, key=lambda f: f.path)), tuple(sorted(folders)))


def _entries(root: Path, at: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(root / at) as entries:
            yield from entries
    except OSError as error:
        raise UsageError(f"{root / at} can't be read: {error.strerror}; mend its permissions") from error


def _look(root: Path, inside: str, path: str, entry: os.DirEntry[str], files: list[Item]) -> bool:
    """Note a file; gives whether this is a folder to go into."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{os.fsencode(path)!r} in {root} is not a name in UTF-8; rename it") from None
    try:
        if entry.is_symlink():
            leads_to = os.path.realpath(entry.path)
            if os.path.commonpath((leads_to, inside)) != inside:
                raise UsageError(f"{root / path} is a link that leads out of {root}; put the file itself there")
            if not os.path.isfile(leads_to):
                raise UsageError(f"{root / path} is a link to no file; remove it, or put the file itself there")
        elif entry.is_dir():
            return True
        status = entry.stat()
    except OSError as error:
        raise UsageError(f"{root / path} can't be looked at: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{root / path} is neither a file nor a folder, so it can't be saved; keep it elsewhere")
    files.append(Item(path, status.st_size, status.st_mtime_ns))
    return False


def read_span(root: Path, item: Item, start: int, length: int) -> tuple[memoryview, Digest]:
    """Bytes ``[start, start + length)`` of a file, and their SHA-256.

    Raises:
        SourceChanged: it is shorter now.
        UsageError: it can't be read.
    """
    view = _room(length)
    done = 0
    try:
        handle = os.open(root / item.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while done < length and (got := os.preadv(handle, [view[done:]], start + done)):
                done += got
        finally:
            os.close(handle)
    except FileNotFoundError:
        raise _changed(root, item) from None
    except OSError as error:
        raise UsageError(f"{root / item.path} can't be read: {error.strerror}") from error
    if done < length:
        raise _changed(root, item)
    return view, Digest(hashlib.sha256(view).hexdigest())


def _room(length: int) -> memoryview:
    """Memory for a part: in huge pages where there are any, as faulting in small ones takes as long as hashing."""
    if length < _HUGE_FROM_BYTES:
        return memoryview(bytearray(length))
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def hash_file(path: Path) -> tuple[Digest, int]:
    """SHA-256 and length of a whole file, in little memory.

    Raises:
        OSError: it can't be read.
    """
    digest = hashlib.sha256()
    size_bytes = 0
    buffer = memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(buffer):
            digest.update(buffer[:got])
            size_bytes += got
    return Digest(digest.hexdigest()), size_bytes


def still_the_same(tree: Tree) -> None:
    """Whether no file was touched since ``tree`` was made.

    Raises:
        SourceChanged: one was; names it.
    """
    for item in tree.files:
        try:
            now = os.stat(tree.root / item.path)
        except OSError:
            raise _changed(tree.root, item) from None
        if (now.st_size, now.st_mtime_ns) != (item.size_bytes, item.mtime_ns):
            raise _changed(tree.root, item)


def _changed(root: Path, item: Item) -> SourceChanged:
    return SourceChanged(
        f"{root / item.path} changed while it was being saved; write to another folder until save() has returned"
    )


# --- back to files ------------------------------------------------------------------------------------


def is_restored(root: Path, manifest: CheckpointManifest) -> bool:
    """Whether the folder holds exactly the checkpoint: every file hashed, and nothing else."""
    try:
        tree = scan(root)
        if {f.path: f.size_bytes for f in tree.files} != {f.path: f.size_bytes for f in manifest.files}:
            return False
        return all(hash_file(root / f.path)[0] == f.digest for f in manifest.files)
    except (OSError, MillraceError):
        return False


def prepare(root: Path, manifest: CheckpointManifest) -> None:
    """Make the folders of a checkpoint and its files, empty.

    Raises:
        StoreError: it can't be written; ``NoSpace`` when that is why.
    """
    with disk_trouble(root):
        for folder in manifest.folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for file in manifest.files:
            path = root / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("xb").close()


def write_span(path: Path, start: int, data: memoryview) -> None:
    """Write a part of a file at its place.

    Raises:
        StoreError: it can't be written; ``NoSpace`` when that is why.
    """
    with disk_trouble(path):
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(handle, data[done:], start + done)
        finally:
            os.close(handle)


def sync_tree(root: Path) -> None:
    """Have every file and folder below ``root``, and itself, reach the disk.

    Raises:
        StoreError: it can't; ``NoSpace`` when that is why.
    """
    with disk_trouble(root):
        for folder, _, names in os.walk(root):
            for path in (*(os.path.join(folder, name) for name in names), folder):
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


@contextlib.contextmanager
def disk_trouble(path: Path) -> Iterator[None]:
    """An ``OSError`` of the body as an error of ours that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(f"there is no space left for {path}; free some, or name another folder") from error
        raise StoreError(f"{path} can't be written: {error.strerror}") from error
