"""``millrace://`` for ``fsspec``: what reads files through it reads datasets, verified, from any true replica.

``millrace://`` lists the datasets, ``millrace://stdlib@3/`` the shards of a version in order, ``millrace://stdlib/``
those of the newest, and ``millrace://checkpoints/run-7/1200/`` the files of a checkpoint. Nothing can be written
through it.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, NoReturn, TypeVar

from fsspec import AbstractFileSystem
from fsspec.spec import make_instance

from millrace.client.checkpoint_tree import ROOT, CheckpointTree
from millrace.client.checkpoints import open_depot
from millrace.client.session import Session, session_for
from millrace.client.tree import Datasets, Info, Part, Shelf, Tree
from millrace.core.errors import ReadOnly
from millrace.core.spec import Placement
from millrace.wiring.world import OpenWorld

__all__ = ["KEPT_BYTES_MAX", "MillraceFile", "MillraceFileSystem"]

T = TypeVar("T")

KEPT_BYTES_MAX: Final = 256_000_000
"""Verified shards a process keeps at most, beside the one that each open file reads; or one, where that is larger."""


@dataclass(frozen=True)
class _Mounted:
    """What all instances of a process share of one world."""

    tree: Tree
    shelf: Shelf = field(default_factory=lambda: Shelf(KEPT_BYTES_MAX))


def _mount(world: OpenWorld) -> _Mounted:
    depot = open_depot(world, "any", Placement(replicas=1, min_clouds=1))  # open as long as the session is
    return _Mounted(Tree(Datasets(world), {ROOT: CheckpointTree(depot)}))


_mounted: weakref.WeakKeyDictionary[Session, _Mounted] = weakref.WeakKeyDictionary()


class MillraceFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """Datasets and checkpoints as read-only files.

    A shard is fetched whole at the first read of it, from the nearest replica whose bytes are those that its SHA-256
    names, and kept in memory: see :data:`KEPT_BYTES_MAX`. So are the files of checkpoints, large ones in parts. An
    instance may be used from several threads, and pickled; a child that was forked makes one of its own.

    Args:
        world: The world file; None means ``$MILLRACE_WORLD``, or ``world.yaml`` in the working directory or above.
        storage_options: What every ``fsspec`` filesystem takes.

    Raises:
        FileNotFoundError: (any method) there is no such dataset, version or file.
        ReadOnly: (any method that writes).
        UsageError, SpecError: (at the first use) there is no world file or it is wrong.
        StoreError: (when reading) no whole replica is left; says why for each store.
    """

    protocol: ClassVar[str] = "millrace"
    cachable: ClassVar[bool] = True
    root_marker: ClassVar[str] = ""

    def __init__(self, world: str | os.PathLike[str] | None = None, **storage_options: Any) -> None:
        super().__init__(**storage_options)
        self._world = None if world is None else Path(world).absolute()
        self._session: Session | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """The same world in another process, wherever that was started."""
        world = self._world if self._session is None else self._session.world.file.absolute()
        options = dict(self.storage_options)
        return make_instance, (type(self), (), options if world is None else {**options, "world": str(world)})

    # --- reading ------------------------------------------------------------------------------------------

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return "/".join(part for part in str(super()._strip_protocol(path)).split("/") if part)

    def info(self, path: str, **kwargs: Any) -> Info:
        """``name``, ``size``, ``type``, of files ``digest``, and of versions and shards ``digest`` and ``rows``."""
        path = self._strip_protocol(path)
        return self._call(self._mount().tree.info(path))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        """Datasets by name, a version's shards in the dataset's order, or what is in a folder of checkpoints."""
        path = self._strip_protocol(path)
        found = self._call(self._mount().tree.children(path))
        return found if detail else [info["name"] for info in found]

    def exists(self, path: str, **kwargs: Any) -> bool:
        """Whether it is there. Unlike the base's, a world that can't be read is an error and not an absence."""
        return self._type(path) is not None

    def isfile(self, path: str) -> bool:
        """Whether it is a shard, or a file of a checkpoint."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Whether it is the root, a version, or a folder of checkpoints."""
        return self._type(path) == "directory"

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """Bytes ``[start, end)`` of a file; negative ones count from its end."""
        with self._open(path) as file:
            first, past, _ = slice(start, end).indices(file.size)
            file.seek(first)
            return file.read(max(0, past - first))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Look again at what names and steps mean now, for all instances of this process with this world."""
        super().invalidate_cache(path)
        if self._session is not None:
            self._call(_forget(self._mount()))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> MillraceFile:
        if mode not in {"rb", "r"}:
            self._refuse(path)
        path = self._strip_protocol(path)
        return MillraceFile(self, path, self._call(self._mount().tree.parts(path)))

    def _part(self, part: Part) -> memoryview:
        """A part's bytes, verified."""
        return self._call(self._mount().shelf.get(part))

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    # --- the world ----------------------------------------------------------------------------------------

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._session is not None
        return self._session.call(work)

    def _mount(self) -> _Mounted:
        if self._session is None:
            self._session = session_for(self._world)
        found = _mounted.get(self._session)
        return found if found is not None else _mounted.setdefault(self._session, _mount(self._session.world))

    # --- what is refused ----------------------------------------------------------------------------------

    def _refuse(self, path: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise ReadOnly(
            f"millrace://{self._strip_protocol(path)} can't be written: millrace:// is for reading; "
            "versions are made by millrace run and removed by millrace rm, checkpoints by millrace.checkpoints(name)",
            key=self._strip_protocol(path),
        )

    mkdir = makedirs = rmdir = touch = pipe_file = cp_file = rm_file = _rm = _refuse

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        self._refuse(rpath)


class MillraceFile(io.BufferedIOBase):
    """A file open for reading. Nothing is fetched before the first read; of its parts, one is held at a time.

    Attributes:
        path: In the tree.
        size: Bytes.
        mode: ``rb``.
    """

    mode: ClassVar[str] = "rb"

    def __init__(self, fs: MillraceFileSystem, path: str, parts: tuple[Part, ...]) -> None:
        self.path = self.name = path
        self.size = sum(part.size_bytes for part in parts)
        self._fs = fs
        self._parts = parts
        self._at = 0
        self._held: tuple[int, memoryview] | None = None

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position."""
        self._check_open()
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go there; reading past the end gives nothing."""
        self._check_open()
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}.get(whence)
        if start is None or start + offset < 0:
            raise ValueError(f"{self.path} can't be positioned at {offset} from {whence}")
        self._at = start + offset
        return self._at

    def read(self, size: int | None = -1, /) -> bytes:
        """The next ``size`` bytes, fewer only at the end; all that are left when it is negative or None."""
        return bytes(self.read_buffer(size))

    def read1(self, size: int = -1, /) -> bytes:
        """As :meth:`read`."""
        return self.read(size)

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``; gives how many bytes there were."""
        target = memoryview(buffer).cast("B")
        data = self.read_buffer(len(target))
        target[: len(data)] = data
        return len(data)

    def readinto1(self, buffer: Any, /) -> int:
        """As :meth:`readinto`."""
        return self.readinto(buffer)

    def read_buffer(self, size: int | None = -1) -> memoryview:
        """As :meth:`read`, without a copy where the bytes lie in one part: this is what ``pyarrow`` reads with.

        Raises:
            StoreError: no whole replica is left.
        """
        data = self._range(self._at, self.size if size is None or size < 0 else min(self._at + size, self.size))
        self._at += len(data)
        return data

    def peek(self, size: int = 0, /) -> bytes:
        """Some of what comes next, for ``readline``."""
        return bytes(self._range(self._at, min(self._at + max(size, io.DEFAULT_BUFFER_SIZE), self.size)))

    def close(self) -> None:
        """Let go of the bytes."""
        self._held = None
        super().close()

    def _range(self, start: int, end: int) -> memoryview:
        self._check_open()
        pieces = []
        first = 0
        for i, part in enumerate(self._parts):
            low, high = max(start - first, 0), min(end - first, part.size_bytes)
            if low < high:
                pieces.append(self._part(i)[low:high])
            first += part.size_bytes
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _part(self, i: int) -> memoryview:
        held = self._held
        if held is None or held[0] != i:
            held = self._held = (i, self._fs._part(self._parts[i]))
        return held[1]

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"{self.path} is closed")


async def _forget(mounted: _Mounted) -> None:
    mounted.tree.forget()
