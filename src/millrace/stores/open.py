"""From a URL to a store in its layers."""

from __future__ import annotations

import asyncio
import os
import random
import re
import stat
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote_to_bytes

from millrace.core.errors import StoreError, UsageError
from millrace.core.ports import Store
from millrace.stores.layers import Limit, Metrics, Retry, RetryPlan, Timeout, TimeoutPlan
from millrace.stores.local import LocalStore
from millrace.stores.memory import MemoryRegistry, MemoryStore
from millrace.stores.walk import WalkRules
from millrace.telemetry.metrics import StoreMetrics

__all__ = ["Layers", "layered", "open"]

_CLOUDS = ("s3", "gs", "az")
_LATER = ("cos", "hdfs")
_KNOWN = "memory://, file://, s3://, gs:// and az://"
_BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """What is put around a store.

    From the outside in: ``Metrics(Retry(Limit(Timeout(inside(adapter)))))``. Metrics see what the caller sees,
    retries included. Limit lies inside Retry, so that a call that waits to be repeated holds no place, and
    outside Timeout, so that waiting for a place does not use up a call's time.

    Attributes:
        rng: The dice of the retries' jitter.
        retry: How often and how long to repeat.
        timeout: How long one attempt may take.
        concurrent: Attempts under way at once.
        metrics: Where to report; None for nowhere.
        inside: Put directly around the adapter: faults, in tests and in the lab.
        sleep: Waits so many seconds.
        monotonic_s: Seconds that never go backwards.
    """

    rng: random.Random
    retry: RetryPlan = field(default_factory=RetryPlan)
    timeout: TimeoutPlan = field(default_factory=TimeoutPlan)
    concurrent: int = 16
    metrics: StoreMetrics | None = None
    inside: Callable[[Store], Store] | None = None
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    monotonic_s: Callable[[], float] = time.monotonic


def layered(store: Store, *, name: str, layers: Layers) -> Store:
    """Put the layers around ``store``, in the order of :class:`Layers`."""
    if layers.inside is not None:
        store = layers.inside(store)
    metrics = layers.metrics

    def report(op_name: str, error: StoreError) -> None:
        if metrics is not None:
            metrics.retried(name, op_name, error.kind)

    store = Timeout(store, name=name, plan=layers.timeout)
    store = Limit(store, name=name, concurrent=layers.concurrent)
    store = Retry(
        store,
        name=name,
        rng=layers.rng,
        plan=layers.retry,
        sleep=layers.sleep,
        monotonic_s=layers.monotonic_s,
        on_retry=report,
    )
    return store if metrics is None else Metrics(store, name=name, metrics=metrics, monotonic_s=layers.monotonic_s)


def open(
    url: str,
    *,
    name: str,
    options: Mapping[str, Any] | None = None,
    base: str | os.PathLike[str] | None = None,
    layers: Layers | None = None,
    source: WalkRules | None = None,
    memory: MemoryRegistry | None = None,
    credentials: Mapping[str, str] | None = None,
    credential_provider: Any = None,
) -> Store:
    """Open the store a URL names.

    - ``memory://NAME``: in memory, shared by all stores opened with one ``memory`` registry.
    - ``file:///abs/path``, ``file://./relative`` and ``file://../relative``: a directory. What follows ``file://``
      is percent-decoded (``%20`` is a space, ``%25`` a percent sign); nothing else is special, not ``?``, not ``#``.
    - ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX``, ``az://CONTAINER/PREFIX``: taken letter by letter, as keys are.

    Args:
        url: Where. Never with credentials.
        name: The store's name in the world, for errors and metrics.
        options: Of cloud stores: ``endpoint``, ``region``, ``anonymous``, ``path_style``, ``account``, ``emulator``.
        base: The directory that relative paths start from.
        layers: What to put around it; None gives the bare adapter.
        source: The store is only read: how to list it. A ``file://`` URL may then name one file, which is the
            one object.
        memory: Where ``memory://`` contents live; None gives fresh, empty ones.
        credentials: Of cloud stores, by obstore's names.
        credential_provider: Of cloud stores: obstore's callback for credentials that expire.

    Raises:
        UsageError: the URL, an option or a credential is wrong, or a library is missing.
    """
    scheme, separator, rest = url.partition("://")
    options = options or {}
    store: Store
    if not separator or scheme not in ("memory", "file", *_CLOUDS, *_LATER):
        what = f"its scheme {scheme!r} is not known" if separator else f"its URL {url!r} has no scheme"
        raise UsageError(f"store {name}: {what}; known are {_KNOWN}")
    if scheme in _LATER:
        raise UsageError(f"store {name}: {scheme}:// comes in a later version; known are {_KNOWN}")
    if scheme in _CLOUDS:
        store = _open_cloud(url, name, options, credentials, credential_provider)
    else:
        if options:
            raise UsageError(f"store {name}: {scheme}:// takes no options, not {', '.join(sorted(options))}")
        if scheme == "memory":
            if not rest:
                raise UsageError(f"store {name}: memory:// needs a name; write memory://NAME")
            store = MemoryStore(rest, contents=None if memory is None else memory.contents(rest))
        else:
            store = _open_file(_file_path(rest, name, base), name, source)
    return store if layers is None else layered(store, name=name, layers=layers)


def _open_cloud(
    url: str,
    name: str,
    options: Mapping[str, Any],
    credentials: Mapping[str, str] | None,
    credential_provider: Any,
) -> Store:
    try:
        # Lazily: obstore is an extra, and who keeps data on disks doesn't need it.
        from millrace.stores.cloud import CloudStore
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "obstore":
            raise
        message = f"store {name}: cloud stores need the library obstore; run: pip install 'millrace[cloud]'"
        raise UsageError(message) from missing
    return CloudStore(url, name=name, options=options, credentials=credentials, credential_provider=credential_provider)


def _file_path(rest: str, name: str, base: str | os.PathLike[str] | None) -> str:
    """The path of ``file://REST``, absolute."""
    if _BAD_PERCENT.search(rest):
        raise UsageError(f"store {name}: in file://{rest} a % is not followed by two digits; write %25 for a %")
    path = os.fsdecode(unquote_to_bytes(rest))
    if "\0" in path:
        raise UsageError(f"store {name}: file://{rest} holds a NUL; no path does")
    if path.startswith("/"):
        return os.path.normpath(path)
    if path.split("/", 1)[0] not in {".", ".."}:
        message = (
            f"store {name}: file://{rest} names a host; write file:///{rest} for an absolute path "
            f"or file://./{rest} for one relative to the file it stands in"
        )
        raise UsageError(message)
    if base is None:
        raise UsageError(f"store {name}: file://{rest} is relative, and nothing says to what; write an absolute path")
    return os.path.normpath(os.path.join(os.path.abspath(base), path))


def _open_file(path: str, name: str, source: WalkRules | None) -> Store:
    if source is None:
        return LocalStore(path, name=name)
    only = None
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            path, only = os.path.split(path)
    except OSError:
        pass  # the first call that needs it says what is wrong with it
    return LocalStore(
        path,
        name=name,
        follow_symlinks=source.follow_symlinks,
        prune=source.prune,
        on_broken=source.on_broken,
        must_exist=source.must_exist,
        only=only,
    )
