"""A dataset version, opened for training: ``millrace.open("name")``."""

from __future__ import annotations

import contextlib
import random
import re
import weakref
from collections.abc import Mapping, MutableSequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from millrace.catalog.manifests import OpenManifest, open_manifest
from millrace.catalog.versions import label, resolve
from millrace.client.claim import claimed
from millrace.client.loadable import Loadable
from millrace.client.recipe import size_option
from millrace.client.session import Held, Session, session_at, session_for
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

_GB: Final = 1e9
_EVENTS_KEPT: Final = 1000
_DIGEST: Final = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _Opened:
    """What is open of a version."""

    manifest: OpenManifest
    sites: Mapping[str, StoreSite]
    index: BlockIndex
    source: VersionSource
    reader: ReplicaReader


class _Newest(list[FeedEvent]):
    """Bounded, and whole for whoever copies it while other threads append."""

    def append(self, event: FeedEvent) -> None:
        super().append(event)
        if len(self) >= 2 * _EVENTS_KEPT:
            del self[:-_EVENTS_KEPT]


class Dataset(Loadable):
    """One version of a dataset, for reading. Made by :func:`open_dataset`.

    While it is open, or a loader of it is, garbage collection leaves the version alone.

    Attributes:
        label: ``name@3``; for one opened by its manifest's URL the first letters of the digest.
        digest: The manifest's: the version's true name.
        cache: Its blocks on this machine's disk; None without, and when it was closed.
    """

    def __init__(
        self, reference: str, *, world: Path | None = None, cache: Path | bool | None = None, cache_limit: str | int
    ) -> None:
        """See :func:`open_dataset`."""
        # What is relative means the same in a process that opens it again from elsewhere.
        self._arguments = (reference, world, cache.absolute() if isinstance(cache, Path) else cache, cache_limit)
        root, named = _parts(reference) if "://" in reference else ("", None)
        self._session: Session = session_for(world) if named is None else session_at(root)
        self._events = _Newest()
        self._loaders: weakref.WeakSet[Loader] = weakref.WeakSet()
        self._closed = False
        self._claim: Held[None] | None = None
        open_world = self._session.world
        self.cache: BlockCache | None = None
        if cache is not False:
            folder = cache_folder() if cache is None or cache is True else cache
            limit = size_option("cache_limit", cache_limit)
            self.cache = BlockCache(folder, limit_bytes=limit, clock=open_world.clock, on_event=self._events.append)
        self._record: VersionRecord | None = None
        if named is None:
            self._record = self._session.call(resolve(open_world.coord, reference))
            self._claim = self._session.hold(claimed(open_world.coord, self._record, open_world.clock))
            weakref.finalize(self, self._claim.release_soon).atexit = False  # at the end the session does
        try:
            self._opened = self._session.call(self._open(self._record or Digest(named or "")))
        except BaseException:
            if self._claim is not None:
                self._claim.release_soon()
            raise
        self.digest: Digest = self._opened.manifest.digest
        self.label = self.digest[:12] if self._record is None else label(self._record)

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

    @property
    def events(self) -> tuple[FeedEvent, ...]:
        """What went wrong while reading, in one sentence each; the newest 1,000."""
        return tuple(self._events[-_EVENTS_KEPT:])

    @property
    def sink(self) -> MutableSequence[FeedEvent]:
        """Where readers of it tell what went wrong."""
        return self._events

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called, here or of its session."""
        return self._closed or self._session.closed

    def keep(self, loader: Loader) -> None:
        """Close ``loader`` too when this is closed."""
        self._loaders.add(loader)

    def close(self) -> None:
        """Close its loaders and give up the claim on the version. Safe to call twice, and in a forked child."""
        if self._session.background.forked:
            return
        for loader in list(self._loaders):
            loader.close()
        self.cache = None  # its threads end with the last read that uses it
        if not self.closed:
            self._session.call(self._opened.reader.aclose())
            if self._claim is not None:
                with contextlib.suppress(MillraceError):  # a claim that can't be taken away ends by itself
                    self._claim.release()
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
            on_event=self._events.append,
        )
        source = VersionSource(opened, index, reader, self._session.background)
        return _Opened(opened, {site.name: site for site in readable.sites}, index, source, reader)

    def _streams(self) -> tuple[tuple[Dataset, ...], None]:
        return (self,), None


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
    if not isinstance(reference, str):
        raise UsageError(f"millrace.open wants a name like 'stdlib' or 'stdlib@3', not {reference!r}")
    return _reopen(
        reference,
        None if world is None else Path(world),
        cache if cache is None or isinstance(cache, bool) else Path(cache),
        cache_limit,
    )


def _reopen(reference: str, world: Path | None, cache: Path | bool | None, limit: str | int) -> Dataset:
    return Dataset(reference, world=world, cache=cache, cache_limit=limit)


def _parts(url: str) -> tuple[str, Digest]:
    """A store's root and a manifest's digest."""
    root, _, name = url.rpartition("/manifests/")
    digest = name.removesuffix(".json")
    if not _DIGEST.fullmatch(digest) or url != f"{root}/{manifest_key(Digest(digest))}":
        raise UsageError(
            f"{url!r} is not a manifest's URL; that ends in manifests/<64 letters of its digest>.json below a store"
        )
    return root, Digest(digest)
