"""A world's datasets as a tree of files: ``stdlib@3/000000.arrow``. Coroutines for the loop the world lives on.

Beside datasets there are other branches, such as checkpoints; each is a :class:`Branch`.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.versions import label, list_datasets, resolve
from millrace.core.errors import UsageError
from millrace.core.facts import ReplicaPage, VersionRecord
from millrace.core.manifest import Encoding
from millrace.core.model import Digest, shard_key
from millrace.core.replicas import fetch
from millrace.wiring.world import OpenWorld

__all__ = ["Branch", "Datasets", "Info", "Part", "Shelf", "Tree", "directory"]

Info = dict[str, Any]
"""What ``fsspec`` calls an info: ``name``, ``size`` in bytes, ``type`` (``file`` or ``directory``), and what else is
known, such as ``digest`` and ``rows``."""

_MANIFESTS_KEPT: Final = 16
_PAGES_KEPT: Final = 4
"""1 MB each."""
_FIGURES_MIN: Final = 6
_SUFFIX: Final[Mapping[Encoding, str]] = {
    "arrow": ".arrow",
    "parquet": ".parquet",
    "webdataset": ".tar",
    "mds": ".mds",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a file that is fetched and verified as a whole.

    Attributes:
        digest: SHA-256 of its bytes.
        size_bytes: Its length.
        fetch: Reads it from any true replica.
    """

    digest: str
    size_bytes: int
    fetch: Callable[[], Awaitable[memoryview]]


class Branch(Protocol):
    """Some of the tree. Paths have no protocol, no leading and no trailing ``/``.

    Every method raises ``FileNotFoundError`` with a sentence for what isn't there.
    """

    async def info(self, path: str) -> Info:
        """Describe a file or a directory."""

    async def children(self, path: str) -> list[Info]:
        """What a directory holds, in order; a file's is the file itself."""

    async def parts(self, path: str) -> tuple[Part, ...]:
        """What a file consists of, in order. Raises ``IsADirectoryError`` for a directory."""

    def forget(self) -> None:
        """Look again at what may have changed."""


def directory(path: str, **more: Any) -> Info:
    """The info of a directory."""
    return {"name": path, "size": 0, "type": "directory", **more}


class Tree:
    """The whole: datasets at the root, and other branches each below a name of its own.

    Args:
        datasets: What has no other branch's name.
        branches: By the first part of their paths. Listed at the root while they hold something.
    """

    def __init__(self, datasets: Branch, branches: Mapping[str, Branch]) -> None:
        self._datasets = datasets
        self._branches = branches

    async def info(self, path: str) -> Info:
        """See :class:`Branch`."""
        return await self._of(path).info(path)

    async def children(self, path: str) -> list[Info]:
        """See :class:`Branch`."""
        found = await self._of(path).children(path)
        if not path:
            found += [await b.info(name) for name, b in self._branches.items() if await b.children(name)]
        return found

    async def parts(self, path: str) -> tuple[Part, ...]:
        """See :class:`Branch`."""
        return await self._of(path).parts(path)

    def forget(self) -> None:
        """See :class:`Branch`."""
        for branch in (self._datasets, *self._branches.values()):
            branch.forget()

    def _of(self, path: str) -> Branch:
        return self._branches.get(path.partition("/")[0], self._datasets)


class Shelf:
    """Verified parts that were read lately, the last used kept longest.

    Args:
        bytes_max: What it holds at most; or the newest part alone, where that is larger.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._kept: OrderedDict[str, memoryview] = OrderedDict()
        self._bytes = 0
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def get(self, part: Part) -> memoryview:
        """A part's bytes; two who ask at once have it fetched once.

        Raises:
            StoreError: no whole replica can be read.
        """
        turn = self._turns.setdefault(part.digest, asyncio.Lock())
        async with turn:
            if part.digest in self._kept:
                self._kept.move_to_end(part.digest)
                return self._kept[part.digest]
            data = (await part.fetch()).toreadonly()
            self._kept[part.digest] = data
            self._bytes += len(data)
            while self._bytes > self._bytes_max and len(self._kept) > 1:
                self._bytes -= len(self._kept.popitem(last=False)[1])
            return data


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard of an opened version: its file's name, and where the manifest has it."""

    name: str
    segment: int
    index: int


class _Files:
    """The files of one version, in dataset order.

    They are numbered from 0, with a suffix that says what they are. :meth:`name` and :meth:`find` are the only places
    that know.
    """

    def __init__(self, manifest: OpenManifest) -> None:
        self._ends = list(itertools.accumulate(ref.shards for ref in manifest.root.segments))
        self._figures = max(_FIGURES_MIN, len(str(manifest.root.shards - 1)))
        self._suffix = _SUFFIX[manifest.root.encoding]

    def name(self, segment: int, index: int) -> str:
        """Of shard ``index`` of a segment."""
        before = self._ends[segment - 1] if segment else 0
        return f"{before + index:0{self._figures}}{self._suffix}"

    def find(self, name: str) -> _Shard | None:
        """The shard of this name, if there is one."""
        number = name.removesuffix(self._suffix)
        if not (number.isascii() and number.isdecimal()) or int(number) >= (self._ends[-1] if self._ends else 0):
            return None
        segment = bisect.bisect_right(self._ends, int(number))
        index = int(number) - (self._ends[segment - 1] if segment else 0)
        return _Shard(name, segment, index) if self.name(segment, index) == name else None


class Datasets:
    """Every dataset a directory, its newest version's shards the files in it; ``name@3`` another version's.

    A name without a version is the version that was newest when it was first asked for, so that a listing and the
    files opened after it are of one version, until :meth:`forget`.
    """

    def __init__(self, world: OpenWorld) -> None:
        self._world = world
        self._versions: dict[str, VersionRecord] = {}
        self._manifests: OrderedDict[str, OpenManifest] = OrderedDict()
        self._pages: OrderedDict[tuple[Digest, int], ReplicaPage | None] = OrderedDict()

    def forget(self) -> None:
        """Names without a version mean the newest again."""
        self._versions.clear()

    async def info(self, path: str) -> Info:
        """Describe the root, a version or a shard."""
        if not path:
            return directory("")
        reference, _, name = path.partition("/")
        version, manifest = await self._open(reference)
        if not name:
            return _version_info(path, version)
        return await self._shard_info(reference, manifest, self._find(path, version, manifest))

    async def children(self, path: str) -> list[Info]:
        """The datasets, or a version's shards."""
        if not path:
            lines = await list_datasets(self._world.coord)
            return [_version_info(line.name, line.newest) for line in lines]
        if "/" in path:
            return [await self.info(path)]
        _, manifest = await self._open(path)
        files = _Files(manifest)
        found = []
        for i in range(len(manifest)):
            segment = await manifest.segment(i)
            found += [
                {
                    "name": f"{path}/{files.name(i, k)}",
                    "size": int(segment.sizes[k]),
                    "type": "file",
                    "digest": segment.digest(k),
                    "rows": int(segment.rows[k]),
                }
                for k in range(len(segment))
            ]
        return found

    async def parts(self, path: str) -> tuple[Part, ...]:
        """A shard: one part."""
        if (await self.info(path))["type"] != "file":
            raise IsADirectoryError(f"millrace://{path} is a directory; name one of the files in it")
        version, manifest = await self._open(path.partition("/")[0])
        shard = self._find(path, version, manifest)
        segment = await manifest.segment(shard.segment)
        digest = segment.digest(shard.index)

        async def read() -> memoryview:
            page = await self._page(manifest, shard.segment)
            known = page.entries[shard.index] if page is not None else None
            key = known.key if known is not None else shard_key(digest)  # adopted ones lie under keys of their own
            stores = (await self._world.readable()).stores
            return await fetch(stores, key, digest, manifest.names(known))

        return (Part(digest, int(segment.sizes[shard.index]), read),)

    async def _open(self, reference: str) -> tuple[VersionRecord, OpenManifest]:
        version = self._versions.get(reference)
        if version is None:
            try:
                version = await resolve(self._world.coord, reference)
            except UsageError as error:
                raise FileNotFoundError(str(error)) from error
            self._versions[reference] = version
        manifest = self._manifests.get(version.digest)
        if manifest is None:
            world = self._world
            readable = await world.readable()
            manifest = await open_manifest(world.coord, readable.stores, readable.sites, version, near=world.near)
            self._manifests[version.digest] = manifest
        _keep_newest(self._manifests, version.digest, _MANIFESTS_KEPT)
        return version, manifest

    async def _page(self, manifest: OpenManifest, segment: int) -> ReplicaPage | None:
        key = (manifest.digest, segment)
        if key not in self._pages:
            self._pages[key] = await manifest.replicas(segment)
        page = self._pages[key]
        _keep_newest(self._pages, key, _PAGES_KEPT)
        return page

    def _find(self, path: str, version: VersionRecord, manifest: OpenManifest) -> _Shard:
        files = _Files(manifest)
        shard = files.find(path.partition("/")[2])
        if shard is None:
            last = len(manifest) - 1
            there = (
                f"{files.name(0, 0)} to {files.name(last, manifest.root.segments[last].shards - 1)}"
                if manifest.root.shards
                else "nothing: it has no rows"
            )
            raise FileNotFoundError(f"there is no file {path!r}; in {label(version)} there is {there}")
        return shard

    async def _shard_info(self, reference: str, manifest: OpenManifest, shard: _Shard) -> Info:
        segment = await manifest.segment(shard.segment)
        return {
            "name": f"{reference}/{shard.name}",
            "size": int(segment.sizes[shard.index]),
            "type": "file",
            "digest": segment.digest(shard.index),
            "rows": int(segment.rows[shard.index]),
        }


def _version_info(path: str, version: VersionRecord) -> Info:
    return directory(path, version=version.version, digest=version.digest, rows=version.rows)


def _keep_newest(kept: OrderedDict[Any, Any], key: object, count: int) -> None:
    kept.move_to_end(key)
    while len(kept) > count:
        kept.popitem(last=False)
