"""Listing a directory tree as objects. Blocking; written for a million files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from stat import S_ISDIR
from threading import Event

from millrace.core.errors import NotFound, StoreError
from millrace.core.ports import ObjectInfo
from millrace.stores.disk_errors import disk_error
from millrace.stores.keys import HIDDEN_DIR
from millrace.stores.threads import Stop, Stopped

__all__ = ["Walk", "WalkRules"]

_PAGE_OBJECTS = 4096

_Chain = tuple[tuple[int, int], object] | None
"""The (device, inode) of a directory and the chain of the one it was reached from."""


@dataclass(frozen=True, slots=True)
class WalkRules:
    """How a listing treats what isn't a plain file.

    Attributes:
        follow_symlinks: List what links lead to; otherwise links are passed over.
        prune: Called with a directory's path relative to the root; True means: do not go in.
        on_broken: Called with the path relative to the root, and the error, for what can't be listed: a link
            that leads nowhere or back to a directory it lies in, a directory without permission, a name that
            is not UTF-8 (the path then holds surrogate escapes). Return to pass over it, raise to stop. When
            None, the error is raised.
        must_exist: A root that isn't there is an error, not an empty store.
    """

    follow_symlinks: bool = True
    prune: Callable[[str], bool] | None = None
    on_broken: Callable[[str, StoreError], None] | None = None
    must_exist: bool = False


class Walk:
    """One listing of the regular files under a root.

    Pipes, sockets and devices are not objects and are passed over, as is a file that goes away meanwhile.

    Args:
        root: An absolute path.
        store: The store's name, for errors.
        rules: What to do about links and what can't be listed.

    Attributes:
        stop: Looked at between two entries; whoever asks for the next page sets it first.
    """

    def __init__(self, root: str, store: str, rules: WalkRules) -> None:
        self.stop: Stop = Event()
        self._root = root
        self._store = store
        self._rules = rules

    def pages(self, prefix: str) -> Generator[list[ObjectInfo], None, None]:
        """Every file whose path, relative to the root, starts with ``prefix``, at most 4,096 at a time.

        Raises:
            StoreError: see :class:`WalkRules`; ``AccessDenied`` for permissions.
            Stopped: ``stop`` was set.
        """
        start, _, beginning = prefix.rpartition("/")
        try:
            root_chain = self._chain_to(self._root)
            chain = self._chain_below(root_chain, start)
        except (FileNotFoundError, NotADirectoryError) as problem:
            if self._rules.must_exist and not os.path.isdir(self._root):
                message = f"store {self._store}: there is no directory {self._root!r}; check the URL"
                raise NotFound(message, store=self._store) from problem
            return
        except OSError as problem:
            raise self._error(start, problem) from problem
        page: list[ObjectInfo] = []
        # Names wait here, not open directories: one handle is open at a time, however deep the tree is.
        todo: list[tuple[str, _Chain]] = [(start, chain)]
        while todo:
            relative, chain = todo.pop()
            for info in self._directory(relative, chain, beginning, todo):
                page.append(info)
                if len(page) >= _PAGE_OBJECTS:
                    yield page
                    page = []
            beginning = ""
        if page:
            yield page

    def _directory(
        self, relative: str, chain: _Chain, beginning: str, todo: list[tuple[str, _Chain]]
    ) -> Iterator[ObjectInfo]:
        """The files of one directory; its directories go to ``todo``."""
        before = f"{relative}/" if relative else ""
        try:
            entries = os.scandir(os.path.join(self._root, relative) if relative else self._root)
        except (FileNotFoundError, NotADirectoryError):
            return  # removed since its name was read
        except OSError as problem:
            self._broken(relative, self._error(relative, problem))
            return
        follow = self._rules.follow_symlinks
        with entries:
            for entry in entries:
                if self.stop.is_set():
                    raise Stopped
                name = entry.name
                if beginning and not name.startswith(beginning):
                    continue
                try:
                    if entry.is_file(follow_symlinks=follow):
                        if not name.isascii() and not self._is_utf8(before + name):
                            continue
                        found = entry.stat(follow_symlinks=follow)
                        mtime_ns = found.st_mtime_ns
                        size = found.st_size
                        yield ObjectInfo(before + name, size, f"{mtime_ns}-{size}", mtime_ns // 1_000_000)
                    elif entry.is_dir(follow_symlinks=follow):
                        self._enter(before + name, entry, chain, todo)
                    elif follow and entry.is_symlink():
                        self._link(before + name, entry.path)
                except FileNotFoundError:
                    continue  # removed since its name was read
                except OSError as problem:
                    self._broken(before + name, self._error(before + name, problem))

    def _enter(self, relative: str, entry: os.DirEntry[str], chain: _Chain, todo: list[tuple[str, _Chain]]) -> None:
        if entry.name == HIDDEN_DIR:
            return
        if self._rules.prune is not None and self._rules.prune(relative):
            return
        if not relative.isascii() and not self._is_utf8(relative):
            return
        found = entry.stat(follow_symlinks=self._rules.follow_symlinks)
        here = (found.st_dev, found.st_ino)
        if self._rules.follow_symlinks and _holds(chain, here):
            what = "a link to" if entry.is_symlink() else "reached, through a link, inside"
            message = (
                f"store {self._store}: {relative!r} ({entry.path!r}) is {what} a directory it lies in, "
                "so it has no end; exclude it"
            )
            self._broken(relative, StoreError(message, store=self._store, key=relative))
            return
        todo.append((relative, (here, chain)))

    def _link(self, relative: str, path: str) -> None:
        """Say so if a link leads to nothing. What it leads to otherwise is a pipe, a socket or a device."""
        try:
            os.stat(path)
        except FileNotFoundError:
            message = (
                f"store {self._store}: the link {relative!r} ({path!r}) leads to nothing; "
                "mend it, remove it or exclude it"
            )
            self._broken(relative, NotFound(message, store=self._store, key=relative))

    def _is_utf8(self, relative: str) -> bool:
        try:
            relative.encode()
        except UnicodeEncodeError:
            message = (
                f"store {self._store}: the name {os.fsencode(relative)!r} under {self._root!r} is not valid UTF-8; "
                "rename or exclude it"
            )
            self._broken(relative, StoreError(message, store=self._store, key=ascii(relative)))
            return False
        return True

    def _broken(self, relative: str, error: StoreError) -> None:
        if self._rules.on_broken is None:
            raise error
        self._rules.on_broken(relative, error)

    def _error(self, relative: str, problem: OSError) -> StoreError:
        path = os.path.join(self._root, relative)
        return disk_error(problem, store=self._store, key=relative, path=path, writing=False)

    def _chain_to(self, directory: str) -> _Chain:
        """The root and all above it: a link to any of them leads back here."""
        above: list[tuple[int, int]] = []
        at = os.path.realpath(directory, strict=True)
        while True:
            found = os.stat(at)
            if at == os.path.realpath(directory) and not S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), at)
            above.append((found.st_dev, found.st_ino))
            if at == os.path.dirname(at):
                break
            at = os.path.dirname(at)
        chain: _Chain = None
        for one in reversed(above):
            chain = (one, chain)
        return chain

    def _chain_below(self, chain: _Chain, start: str) -> _Chain:
        path = self._root
        for part in start.split("/") if start else ():
            path = os.path.join(path, part)
            found = os.stat(path)
            if not S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            chain = ((found.st_dev, found.st_ino), chain)
        return chain


def _holds(chain: _Chain, wanted: tuple[int, int]) -> bool:
    link: object = chain
    while isinstance(link, tuple):
        if link[0] == wanted:
            return True
        link = link[1]
    return False
