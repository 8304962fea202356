"""A world file, opened: its stores, its coordination and its scratch space."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, ValidationError

from millrace.coord.memory import MemoryCoordination
from millrace.coord.sqlite import SqliteCoordination
from millrace.core.errors import NotFound, StoreError, UsageError
from millrace.core.facts import AdoptedStore
from millrace.core.model import StoreSite
from millrace.core.ports import Coordination, Store
from millrace.core.spec import Pipeline, Source, World
from millrace.core.specfile import parse_spec
from millrace.pipeline.globs import path_filter
from millrace.stores.layers import RetryPlan
from millrace.stores.layers.sealed import Sealed
from millrace.stores.open import Layers
from millrace.stores.open import open as open_store
from millrace.stores.walk import WalkRules
from millrace.telemetry.metrics import StoreMetrics
from millrace.wiring.adopted import AdoptedStores, Readable
from millrace.wiring.clock import SystemClock
from millrace.wiring.memory import settle_memory

__all__ = [
    "OpenWorld",
    "folder_of",
    "open_bare",
    "open_sources",
    "open_stores",
    "open_world",
    "read_pipeline",
    "read_world",
]

M = TypeVar("M", bound=BaseModel)

_WORLD_FILE: Final = "world.yaml"


@dataclass(frozen=True)
class OpenWorld:
    """Everything a command works with.

    Attributes:
        file: The world file.
        spec: What it says.
        sites: Its stores as decisions see them.
        near: The cloud this machine is in, if the file says so.
        stores: Its stores by name, in their layers.
        adopted: Places whose files were adopted; see :meth:`readable`.
        work: Where runs keep plans and task outputs.
        coord: Heads, ledgers, leases.
    """

    file: Path
    spec: World
    sites: tuple[StoreSite, ...]
    near: str | None
    stores: Mapping[str, Store]
    adopted: AdoptedStores
    work: Store
    coord: Coordination
    clock: SystemClock

    async def readable(self) -> Readable:
        """All that datasets are read from, adopted places included, as they are known now.

        What is written or placed goes to ``stores`` by ``sites``; what is read comes from these.
        """
        return await self.adopted.beside(self.stores, self.sites)


def read_world(file: Path | None) -> tuple[Path, World]:
    """The world file: the one given, ``$MILLRACE_WORLD``, or ``world.yaml`` here or in a folder above.

    Raises:
        UsageError: there is none.
        SpecError: it is wrong.
    """
    if file is None:
        named = os.environ.get("MILLRACE_WORLD")
        file = Path(named) if named else _found_above()
    return file, _read(World, file, "world")


def read_pipeline(file: Path) -> Pipeline:
    """A pipeline file.

    Raises:
        UsageError: it can't be read.
        SpecError: it is wrong.
    """
    return _read(Pipeline, file, "pipeline")


def folder_of(file: Path) -> Path:
    """The folder that relative paths in ``file`` start from."""
    return file.resolve().parent


@contextlib.asynccontextmanager
async def open_world(file: Path | None) -> AsyncIterator[OpenWorld]:
    """Open a world for one command, and close it again.

    Raises:
        UsageError, SpecError: the file isn't there or is wrong.
        CoordError: its coordination file can't be used.
    """
    settle_memory()
    file, spec = read_world(file)
    base = folder_of(file)
    state = _state_folder(file, base / spec.state)
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        coord = SqliteCoordination(state / "coord.db")
        stack.push_async_callback(coord.aclose)
        stores = open_stores(spec, base)
        work = open_work(state)
        adopted = AdoptedStores(coord, open_adopted, spec.sites())
        stack.push_async_callback(adopted.aclose)
        for store in (*stores.values(), work):
            stack.push_async_callback(store.aclose)
        yield OpenWorld(
            file=file,
            spec=spec,
            sites=spec.sites(),
            near=spec.here.partition("/")[0] if spec.here else None,
            stores=stores,
            adopted=adopted,
            work=work,
            coord=coord,
            clock=clock,
        )


@contextlib.asynccontextmanager
async def open_bare(url: str) -> AsyncIterator[OpenWorld]:
    """A world of one store, to read what lies in it: no file, nothing kept.

    Args:
        url: The store's root; relative ``file://`` URLs start from the working directory.

    Raises:
        UsageError: it is no URL of a store.
    """
    settle_memory()
    try:
        spec = World.model_validate(
            {
                "clouds": {
                    "anywhere": {"regions": {"anywhere": {"jurisdiction": "any", "stores": {"url": {"url": url}}}}}
                }
            }
        )
    except ValidationError as error:
        raise UsageError(f"{url!r} is not a store's URL: {error.errors()[0]['msg']}") from error
    clock = SystemClock()
    coord = MemoryCoordination()
    stores = open_stores(spec, Path.cwd())
    work = open_store("memory://work", name="work", base=Path.cwd(), layers=_layers())
    async with contextlib.AsyncExitStack() as stack:
        for store in (*stores.values(), work):
            stack.push_async_callback(store.aclose)
        yield OpenWorld(
            file=Path(url),
            spec=spec,
            sites=spec.sites(),
            near=None,
            stores=stores,
            adopted=AdoptedStores(coord, open_adopted, spec.sites()),
            work=work,
            coord=coord,
            clock=clock,
        )


def _state_folder(file: Path, state: Path) -> Path:
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{file}: state: {state} can't be made: {error.strerror}; name another folder") from error
    return state


def open_stores(spec: World, base: Path) -> dict[str, Store]:
    """Every store of a world, in its layers; nothing is contacted yet."""
    layers = _layers()
    return {
        name: open_store(s.url, name=name, options=s.options, base=base, layers=layers, credentials=_credentials(s.url))
        for name, s in spec.stores().items()
    }


def open_work(state: Path) -> Store:
    """The scratch space of runs."""
    return open_store("file://./work", name="work", base=state, layers=_layers())


def open_adopted(fact: AdoptedStore) -> Store:
    """A place whose files were adopted, to read from; nothing is contacted yet.

    Raises:
        UsageError: it can't be opened here.
    """
    store = open_store(
        fact.url,
        name=fact.name,
        options=fact.options,
        layers=_layers(),
        source=WalkRules(must_exist=True),
        credentials=_credentials(fact.url),
    )
    return Sealed(store, name=fact.name)


def open_sources(pipeline: Pipeline, base: Path) -> list[Store]:
    """The store of each source, for reading; nothing is contacted yet."""
    return [open_source(source, base, name=f"source {i}") for i, source in enumerate(pipeline.sources)]


def open_source(source: Source, base: Path, *, name: str) -> Store:
    """One source's store, for reading; nothing is contacted yet."""
    wanted = path_filter(source)

    def on_broken(path: str, error: StoreError) -> None:
        """What can't be listed is an error only where the source wants it, or what may lie below it."""
        is_folder = not isinstance(error, NotFound)  # what is not found is a link to nothing
        if wanted.matches(path) or (is_folder and not wanted.dir_pruned(path)):
            raise error

    return open_store(
        source.url,
        name=name,
        options=source.options,
        base=base,
        layers=_layers(),
        source=WalkRules(prune=wanted.dir_pruned, on_broken=on_broken, must_exist=True),
        credentials=_credentials(source.url),
    )


def _layers() -> Layers:
    return Layers(
        rng=random.Random(),  # noqa: S311  (jitter, not a secret)
        retry=RetryPlan(),
        metrics=StoreMetrics(CollectorRegistry()),
    )


def _credentials(url: str) -> dict[str, str] | None:
    """What the environment says, by obstore's names. The full chains come with the clouds."""
    if url.startswith("s3://"):
        names = {
            "access_key_id": "AWS_ACCESS_KEY_ID",
            "secret_access_key": "AWS_SECRET_ACCESS_KEY",
            "session_token": "AWS_SESSION_TOKEN",
        }
    elif url.startswith("az://"):
        names = {"account_name": "AZURE_STORAGE_ACCOUNT_NAME", "account_key": "AZURE_STORAGE_ACCOUNT_KEY"}
    elif url.startswith("gs://"):
        names = {"service_account": "GOOGLE_APPLICATION_CREDENTIALS"}
    else:
        return None
    found = {name: os.environ[variable] for name, variable in names.items() if os.environ.get(variable)}
    return found or None


def _found_above() -> Path:
    here = Path.cwd()
    for folder in _upwards(here):
        if (folder / _WORLD_FILE).is_file():
            file = folder / _WORLD_FILE
            return file.relative_to(here) if folder == here else file
    raise UsageError(f"there is no {_WORLD_FILE} here or above; name one with --world, or make one with: millrace init")


def _upwards(folder: Path) -> Iterator[Path]:
    yield folder
    yield from folder.parents


def _read(model: type[M], file: Path, what: str) -> M:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        near = sorted(p.name for p in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        there = f"; there: {', '.join(near)}" if near else "; make one with: millrace init"
        raise UsageError(f"there is no {what} file {file}{there}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text: byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"the {what} file {file} can't be read: {error.strerror}") from error
    return parse_spec(model, text, file=str(file))
