"""A world's checkpoints as a tree of files: ``checkpoints/run-7/1200/model/layer-0.bin``."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Final

from millrace.catalog.checkpoint_depot import Depot
from millrace.catalog.checkpoint_manifest import check_name
from millrace.catalog.checkpoint_parts import read_part
from millrace.catalog.checkpoint_survey import Known, read_manifest, records_of, survey
from millrace.client.tree import Info, Part, directory
from millrace.core.errors import Unavailable, UsageError
from millrace.core.facts import CheckpointFile, CheckpointManifest
from millrace.core.model import Digest
from millrace.core.spec import Placement

__all__ = ["ROOT", "CheckpointTree"]

ROOT: Final = "checkpoints"
"""The first part of every path here. A dataset of that name is reached as ``checkpoints@1``."""

_MANIFESTS_KEPT: Final = 16
_STEP: Final = re.compile(r"0|[1-9][0-9]{0,10}")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint whose manifest was read.

    Attributes:
        files: By path.
        folders: Every folder in it, also those that only files tell of.
    """

    depot: Depot
    known: Known
    manifest: CheckpointManifest
    files: dict[str, CheckpointFile]
    folders: frozenset[str]


class CheckpointTree:
    """Every series a directory, its steps directories in it, and in these the files that were saved.

    A step is the checkpoint that it was when it was first asked for, until :meth:`forget`, so that a reader gets all
    files of one, whatever is saved meanwhile.

    Args:
        depot: The checkpoints of any name; others are asked for as this one with their names.
    """

    def __init__(self, depot: Depot) -> None:
        self._any = depot
        self._opened: OrderedDict[tuple[str, str], _Opened] = OrderedDict()

    def forget(self) -> None:
        """Look again at what a step holds."""
        self._opened.clear()

    async def info(self, path: str) -> Info:
        """Describe a directory or a file."""
        parts = path.split("/")[1:]
        if not parts:
            return directory(path)
        if len(parts) == 1:
            await self._steps(await self._depot(parts[0]))
            return directory(path)
        opened = await self._open(parts[0], parts[1])
        inside = "/".join(parts[2:])
        if inside in opened.files:
            return _file_info(path, opened.files[inside])
        if inside in opened.folders:
            return directory(path, **({} if inside else {"created": opened.manifest.created_at_ms / 1000}))
        raise FileNotFoundError(f"there is no file {inside!r} in the checkpoint of step {parts[1]} of {parts[0]}")

    async def children(self, path: str) -> list[Info]:
        """The series, a series' steps from the oldest on, or what is in a folder of a checkpoint, by name."""
        parts = path.split("/")[1:]
        if not parts:
            return [directory(f"{path}/{name}") for name in await self._names()]
        if len(parts) == 1:
            return [directory(f"{path}/{step}") for step in sorted(await self._steps(await self._depot(parts[0])))]
        info = await self.info(path)
        if info["type"] == "file":
            return [info]
        opened = await self._open(parts[0], parts[1])
        base = f"{parts[0]}/{parts[1]}"
        inside = "".join(f"{part}/" for part in parts[2:])
        names = {
            inside + below.removeprefix(inside).partition("/")[0]
            for below in (*opened.files, *opened.folders)
            if below.startswith(inside) and below != inside
        }
        return [await self.info(f"{ROOT}/{base}/{name}") for name in sorted(names - {""})]

    async def parts(self, path: str) -> tuple[Part, ...]:
        """The objects that hold a file."""
        if (await self.info(path))["type"] != "file":
            raise IsADirectoryError(f"millrace://{path} is a directory; name one of the files in it")
        _, name, step, inside = path.split("/", 3)
        opened = await self._open(name, step)
        return tuple(_part(opened, Digest(p.digest), p.size_bytes) for p in opened.files[inside].parts)

    async def _names(self) -> list[str]:
        names: list[str] = []
        after = ""
        while page := await self._any.coord.list(f"{ROOT}/", after=after, limit=1):
            names.append(page[0].key.split("/")[1])
            after = f"{ROOT}/{names[-1]}0"  # "0" follows "/": past all records of this name
        return names

    async def _depot(self, name: str) -> Depot:
        """The checkpoints of one name, under the policy of its newest."""
        try:
            depot = replace(self._any, name=check_name(name))
        except UsageError as error:
            raise FileNotFoundError(str(error)) from error
        records = await records_of(depot)
        if not records:
            return depot
        return replace(depot, policy=Placement.model_validate(records[max(records)].placement))

    async def _steps(self, depot: Depot) -> dict[int, Known]:
        """The checkpoint that counts, of every step that a store lists or a record tells of.

        Raises:
            FileNotFoundError: there is none.
            Unavailable: that can't be told.
        """
        found = await survey(depot, tolerant=True)
        steps: dict[int, Known] = {}
        for known in found.known:
            steps.setdefault(known.step, known)
        if not steps and found.failed:
            why = "; ".join(f"{store}: {error}" for store, error in found.failed.items())
            raise Unavailable(
                f"it can't be told whether there are checkpoints of {depot.name}: {why}; bring the stores back"
            )
        if not steps:
            raise FileNotFoundError(f"there are no checkpoints of {depot.name!r}")
        return steps

    async def _open(self, name: str, step: str) -> _Opened:
        key = (name, step)
        opened = self._opened.get(key)
        if opened is None:
            depot = await self._depot(name)
            steps = await self._steps(depot)
            if not _STEP.fullmatch(step) or int(step) not in steps:
                newest = ", ".join(str(s) for s in sorted(steps, reverse=True)[:12])
                raise FileNotFoundError(f"{name} has no checkpoint of step {step}; the newest are {newest}")
            known = steps[int(step)]
            manifest = await read_manifest(depot, known, also=depot.readable())
            files = {file.path: file for file in manifest.files}
            opened = self._opened[key] = _Opened(depot, known, manifest, files, _folders(manifest))
        self._opened.move_to_end(key)
        while len(self._opened) > _MANIFESTS_KEPT:
            self._opened.popitem(last=False)
        return opened


def _folders(manifest: CheckpointManifest) -> frozenset[str]:
    found = {""}
    for path in (*manifest.folders, *(file.path.rpartition("/")[0] for file in manifest.files)):
        while path not in found:
            found.add(path)
            path = path.rpartition("/")[0]
    return frozenset(found)


def _file_info(path: str, file: CheckpointFile) -> Info:
    return {"name": path, "size": file.size_bytes, "type": "file", "digest": file.digest}


def _part(opened: _Opened, digest: Digest, size_bytes: int) -> Part:
    async def read() -> memoryview:
        names = tuple(dict.fromkeys((*opened.known.stores, *opened.depot.readable())))
        data, _ = await read_part(opened.depot, digest, names)
        return data

    return Part(digest, size_bytes, read)
