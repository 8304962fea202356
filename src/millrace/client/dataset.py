"""A dataset version, opened for training: ``millrace.open("name")``."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import getpid
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.readers import reading
from millrace.catalog.versions import label, resolve
from millrace.client.formats import FormatName
from millrace.client.recipe import LoaderOptions, build_loader, size_option
from millrace.client.session import Session, session_at, session_for
from millrace.client.source import VersionSource, read_index
from millrace.core.errors import MillraceError, UsageError
from millrace.core.facts import VersionRecord
from millrace.core.keys import manifest_key
from millrace.core.model import Digest, StoreSite
from millrace.decide.prices import egress_price
from millrace.feed.cache import BlockCache
from millrace.feed.events import FeedEvent
from millrace.feed.index import BlockIndex
from millrace.feed.loader import Loader
from millrace.feed.receipt import Traffic
from millrace.feed.replicas import ReplicaReader
from millrace.wiring.surroundings import cache_folder

__all__ = ["Dataset", "open_dataset"]

_NUMBERS: Final = itertools.count()
_GB: Final = 1e9


@dataclass(frozen=True)
class _Opened:
    """What is open of a version."""

    manifest: OpenManifest
    sites: Mapping[str, StoreSite]
    index: BlockIndex
    source: VersionSource
    reader: ReplicaReader


class Dataset:
    """One version of a dataset, for reading. Made by :func:`open_dataset`.

    While it is open, garbage collection leaves the version alone.

    Attributes:
        label: ``name@3``; for one opened by its manifest's URL the first letters of the digest.
        digest: The manifest's: the version's true name.
        events: What went wrong while reading, in one sentence each.
    """

    def __init__(
        self, reference: str, *, world: Path | None = None, cache: Path | bool | None = None, cache_limit: str | int
    ) -> None:
        """See :func:`open_dataset`."""
        self._arguments = (reference, world, cache, cache_limit)
        is_url = "://" in reference
        self._session: Session = session_at(reference) if is_url else session_for(world)
        self.events: list[FeedEvent] = []
        self._closed = False
        self._closing: asyncio.Event | None = None
        self._holding: concurrent.futures.Future[None] | None = None
        clock = self._session.world.clock
        self.cache: BlockCache | None = None
        if cache is not False:
            folder = cache_folder() if cache is None or cache is True else Path(cache)
            limit = size_option("cache_limit", cache_limit)
            self.cache = BlockCache(folder, limit_bytes=limit, clock=clock, on_event=self.events.append)
        self._record: VersionRecord | None = None
        if is_url:
            digest = _digest_in(reference)
            self.label = digest[:12]
            self._opened = self._session.call(self._open(digest))
        else:
            self._record = self._session.call(resolve(self._session.world.coord, reference))
            self.label = label(self._record)
            self._opened = self._session.call(self._open(self._record))
            self._holding = self._session.start(self._claim(self._record))
        self.digest: Digest = self._opened.manifest.digest

    @property
    def schema(self) -> pa.Schema:
        """Of its rows."""
        return self._opened.index.schema

    @property
    def index(self) -> BlockIndex:
        """Its blocks."""
        return self._opened.index

    @property
    def source(self) -> VersionSource:
        """Its blocks, to be read."""
        return self._opened.source

    @property
    def session(self) -> Session:
        """The open world it is read through."""
        return self._session

    def __len__(self) -> int:
        """Rows."""
        return self._opened.index.total_rows

    def __repr__(self) -> str:
        return f"<millrace dataset {self.label}: {len(self)} rows, {', '.join(self.schema.names)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the same version again: a digest, not a name whose head may have moved."""
        reference, world, cache, limit = self._arguments
        if self._record is not None:
            reference = f"{self._record.dataset}@{self.digest}"
            world = self._session.world.file
        return _reopen, (reference, world, cache, limit)

    def loader(
        self,
        batch_size: int = 32,
        *,
        seed: int = 0,
        shuffle: bool | str = True,
        rank: int | None = None,
        world_size: int | None = None,
        replication: int = 1,
        drop_last: bool = False,
        columns: Sequence[str] | None = None,
        format: FormatName | None = None,
        decode: Mapping[str, Callable[[Any], Any]] | None = None,
        lanes: int | None = None,
        window: int | None = None,
        prefetch: str | int = "256MB",
        memory: str | int | None = None,
        quarantine: float | str = 0.01,
        pin_memory: bool = False,
    ) -> Loader:
        """Batches for one rank. See ``docs/feeding.md``.

        Args:
            batch_size: Rows in a *global* batch: over all ranks. Each rank gets its share of it.
            seed: 0 to 2**64 - 1. The order is a function of the version, the seed and the epoch alone.
            shuffle: ``True`` or ``"window"``; ``"full"``: over all rows, for what fits into memory; ``"blocks"``:
                blocks in random order, batches mostly views of them; ``False``: the dataset's order.
            rank: Which of ``world_size``. Default: as ``torch.distributed`` or the launcher's variables say.
            world_size: How many ranks there are; goes with ``rank``.
            replication: Ranks in a group that get the same rows (tensor parallel).
            drop_last: Leave out the last batch of an epoch if it isn't full.
            columns: Which; default all.
            format: ``"torch"``, ``"numpy"``, ``"jax"`` or ``"arrow"``; default torch if it is installed, else numpy.
            decode: Column to a function from a row's value (bytes, text, array) to an array or number. Rows it
                raises on are set aside.
            lanes: Of the order; default from the version's size. See ``docs/design/feed-order.md``.
            window: Blocks that are mixed in each lane; default from the version's size.
            prefetch: Bytes on their way into the cache ahead of their use.
            memory: Bytes of blocks in memory; default what the shuffle window needs.
            quarantine: Share of an epoch's rows that may be set aside before it is an error.
            pin_memory: For torch: copy into page-locked memory if there is a device.

        Raises:
            UsageError: something here doesn't fit; says what, and what would.
        """
        options = LoaderOptions(
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            rank=rank,
            world_size=world_size,
            replication=replication,
            drop_last=drop_last,
            columns=None if columns is None else tuple(columns),
            format=format,
            decode=dict(decode or {}),
            lanes=lanes,
            window=window,
            prefetch=prefetch,
            memory=memory,
            quarantine=quarantine,
            pin_memory=pin_memory,
        )
        return build_loader((self,), None, options)

    def traffic(self) -> tuple[Traffic, ...]:
        """What was read from each store since it was opened, and what that costs."""
        world = self._session.world
        found = []
        for name, moved in sorted(self._opened.reader.traffic().items()):
            site = self._opened.sites[name]
            price = egress_price(site.cloud, site.region, world.spec.here)
            dollars = None if price is None else price.dollars * (moved.bytes_useful + moved.bytes_wasted) / _GB
            found.append(
                Traffic(
                    name, site.cloud, site.region, moved.bytes_useful + moved.bytes_wasted, moved.bytes_wasted, dollars
                )
            )
        return tuple(found)

    def close(self) -> None:
        """Give up the claim on the version. Loaders made of it can't read any more. Safe to call twice."""
        if not self._closed and not self._session.closed:
            self._session.call(self._close())
        self._closed = True

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _open(self, version: VersionRecord | Digest) -> _Opened:
        world = self._session.world
        readable = await world.readable()
        opened = await open_manifest(world.coord, readable.stores, readable.sites, version, near=world.near)
        index = await read_index(opened)
        reader = ReplicaReader(
            readable.stores,
            readable.sites,
            here=world.spec.here,
            price=lambda s: p.dollars if (p := egress_price(s.cloud, s.region, world.spec.here)) else 0.0,
            clock=world.clock,
            rng=random.Random(),  # noqa: S311  (jitter, not a secret)
            on_event=self.events.append,
        )
        source = VersionSource(opened, index, reader, self._session.background)
        return _Opened(opened, {site.name: site for site in readable.sites}, index, source, reader)

    async def _close(self) -> None:
        await self._opened.reader.aclose()
        if self._closing is not None and self._holding is not None:
            self._closing.set()
            with contextlib.suppress(MillraceError):  # a claim that can't be taken away ends by itself
                await asyncio.wrap_future(self._holding)

    async def _claim(self, record: VersionRecord) -> None:
        self._closing = asyncio.Event()
        who = f"{socket.gethostname()}-{getpid()}-feed-{next(_NUMBERS)}"
        async with reading(self._session.world.coord, record, who, self._session.world.clock):
            await self._closing.wait()


def open_dataset(
    reference: str,
    *,
    world: Path | str | None = None,
    cache: Path | str | bool | None = None,
    cache_limit: str | int = "50GB",
) -> Dataset:
    """Open a version of a dataset.

    Args:
        reference: ``name`` (the newest), ``name@3``, ``name@digest``, or the URL of a manifest
            (``s3://bucket/prefix/manifests/<digest>.json``), which needs no world file.
        world: The world file; default ``$MILLRACE_WORLD``, or ``world.yaml`` here or above.
        cache: A folder for blocks, shared by all processes of this machine; default ``$MILLRACE_CACHE`` or
            ``~/.cache/millrace``. ``False``: no cache on disk.
        cache_limit: How large it may grow.

    Raises:
        UsageError: there is no such world, dataset or version; or the cache folder can't be used.
        StoreError: no whole replica of its manifest can be read.
    """
    return _reopen(
        reference,
        None if world is None else Path(world),
        cache if cache is None or isinstance(cache, bool) else Path(cache),
        cache_limit,
    )


def _reopen(reference: str, world: Path | None, cache: Path | bool | None, limit: str | int) -> Dataset:
    return Dataset(reference, world=world, cache=cache, cache_limit=limit)


def _digest_in(url: str) -> Digest:
    name = url.rpartition("/")[2].removesuffix(".json")
    if not url.endswith(manifest_key(Digest(name))) or len(name) != 64:
        raise UsageError(
            f"{url!r} is not a manifest's URL; that ends in manifests/<64 letters of its digest>.json below a store"
        )
    return Digest(name)
