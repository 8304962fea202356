"""``millrace.checkpoints``: what a training loop saves, and finds again."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Coroutine, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Final, Literal, Protocol, Self, TypeVar

from pydantic import ValidationError

from millrace.catalog.checkpoint_depot import Depot
from millrace.catalog.checkpoint_manifest import check_name, check_step, identity, json_safe
from millrace.catalog.checkpoint_replicate import Replication
from millrace.catalog.checkpoint_restore import kept_folder, restore
from millrace.catalog.checkpoint_retention import Keep, Retained
from millrace.catalog.checkpoint_save import Saving
from millrace.catalog.checkpoint_whole import Whole, at_step, newest
from millrace.catalog.checkpoints import CheckpointLine, Series, check_policy, list_checkpoints, pin
from millrace.client.session import session_for
from millrace.core.errors import UsageError
from millrace.core.facts import CheckpointManifest
from millrace.core.spec import Placement
from millrace.core.units import parse_duration_s
from millrace.stores.local import LocalStore
from millrace.wiring.clock import holder_is_alive, this_holder
from millrace.wiring.world import OpenWorld, folder_of

__all__ = ["Checkpoint", "Checkpoints", "Saved", "checkpoints", "open_depot", "state_folder"]

T = TypeVar("T")

_STALE_S: Final = 7 * 86400.0
"""After so long a staging folder is taken for abandoned, even one of another machine."""


class Session(Protocol):
    """An open world on an event loop in another thread; see :class:`millrace.client.session.Session`."""

    @property
    def world(self) -> OpenWorld:
        """The open world."""

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done, and wait for it."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a save made durable on this machine.

    Attributes:
        step: Of the training run.
        digest: What it is: SHA-256 over its files, its step and the loader's state.
        size_bytes, files: What it holds.
    """

    step: int
    digest: str
    size_bytes: int
    files: int


def state_folder(world: OpenWorld) -> Path:
    """Where a world keeps its own state on this machine."""
    return folder_of(world.file) / world.spec.state


def open_depot(world: OpenWorld, name: str, policy: Placement) -> Depot:
    """The checkpoints of ``name`` in an open world. Whoever asks closes ``depot.local``.

    Raises:
        UsageError: ``name`` isn't a name.
    """
    return Depot(
        name=check_name(name),
        coord=world.coord,
        stores=world.stores,
        sites=world.sites,
        local=LocalStore(state_folder(world), name="local"),
        policy=policy,
        near=world.near,
        clock=world.clock,
        who=this_holder(),
        alive=holder_is_alive,
    )


class Checkpoint:
    """A checkpoint of which every byte was found true when it was looked for.

    Attributes:
        step: Of the training run.
        digest: What it is.
        loader_state: What the loader's ``state_dict`` gave, for ``load_state_dict``; None if none was saved.
        created_at_ms: When it was saved, milliseconds since 1970.
        size_bytes: Of all files.
        files: Their paths, in order.
        stores: The stores that list it.
        notes: Sentences about what was passed over to find it: newer ones that aren't whole, stores that don't answer.
    """

    def __init__(self, session: Session, depot: Depot, whole: Whole, restored: Path) -> None:
        manifest = whole.manifest
        self.step = manifest.step
        self.digest: str = identity(manifest)
        self.loader_state: Any = manifest.loader_state
        self.created_at_ms = manifest.created_at_ms
        self.size_bytes = manifest.size_bytes
        self.files = tuple(file.path for file in manifest.files)
        self.stores = whole.stores
        self.notes = whole.notes
        self._session = session
        self._depot = depot
        self._manifest: CheckpointManifest = manifest
        self._restored = restored

    def path(self, into: str | os.PathLike[str] | None = None) -> Path:
        """The checkpoint as a folder on this machine: there whole, every byte verified, or not at all.

        Args:
            into: Where to; must be empty or absent. None means a folder that Millrace looks after: it is read back
                each time, made anew if anything in it was changed, and goes when retention drops the checkpoint.

        Raises:
            UsageError: something is at ``into`` already.
            StoreError: it can't be read whole any more, or not be written.
        """
        if into is None:
            return self._session.call(kept_folder(self._depot, self._manifest, self._restored))
        target = Path(into)
        self._session.call(restore(self._depot, self._manifest, target))
        return target

    def load_into(self, state_dict: MutableMapping[str, Any]) -> None:
        """Load it into a state dict of the same keys, in place, with torch.distributed.checkpoint.

        With a process group every rank calls it, for the same checkpoint; it may have been saved by another number of
        ranks. This unpickles what was saved, so it is for states that you or those you trust have saved.

        Raises:
            UsageError: it wasn't saved by torch.distributed.checkpoint, or the ranks would load different ones.
            StoreError: it can't be read whole any more, or doesn't fit.
        """
        _torch().load_together(state_dict, f"step {self.step} ({self.digest[:8]})", self.path)

    def __repr__(self) -> str:
        return f"Checkpoint({self._depot.name!r}, step={self.step}, digest={self.digest[:8]!r})"


class Checkpoints:
    """The checkpoints of one name. A context manager: its end waits until all that was saved is replicated.

    Made by :func:`checkpoints`.
    """

    def __init__(self, session: Session, name: str, keep: Keep, policy: Placement) -> None:
        world = session.world
        check_policy(world.sites, policy)
        self.name = check_name(name)
        self._session = session
        self._state = state_folder(world)
        self._restored = self._state / "restored" / name
        self._staging = self._state / "staging" / name
        self._depot = open_depot(world, name, policy)
        self._series = session.call(_opened(self._depot, keep, self._restored))
        self._closed = False

    def save(
        self,
        step: int,
        state: str | os.PathLike[str] | MutableMapping[str, Any],
        loader: Any = None,
        *,
        overwrite: bool = False,
    ) -> Saved:
        """Save a folder or a state dict. Returns once it is durable on this machine; replication goes on behind it.

        Args:
            step: Of the training run, from 0.
            state: A folder, saved as it is; don't write to it until this returns. Or a state dict, written with
                torch.distributed.checkpoint: then, with a process group, every rank calls this.
            loader: A loader (anything with ``state_dict``), what its ``state_dict`` gave, or None.
            overwrite: Whether another checkpoint of this step gives way. Without it, saving the same again is no
                change, and saving something else is refused, unless what is there is damaged beyond help.

        Raises:
            UsageError: there is nothing to save, or something that can't be; or the step is taken.
            SourceChanged: a file changed meanwhile.
            StoreError: this machine can't hold it (``NoSpace``). Nothing of it is left then, and what was there is
                as it was.
        """
        step = check_step(step)

        def commit(folder: Path, kind: Literal["files", "torch"], world_size: int) -> Saved:
            saving = Saving(
                step,
                folder,
                loader_state=None if loader is None else json_safe(_state_of(loader), "the loader's state"),
                kind=kind,
                world_size=world_size,
                overwrite=overwrite,
            )
            manifest = self._session.call(self._series.save(saving))
            return Saved(step, identity(manifest), manifest.size_bytes, len(manifest.files))

        if isinstance(state, str | os.PathLike):
            return commit(Path(state), "files", 1)
        if not isinstance(state, MutableMapping):
            raise UsageError(
                f"a checkpoint is a folder or a state dict, not {type(state).__name__}; give a path, or a dict like "
                '{"model": model.state_dict()}'
            )
        together: Saved = _torch().save_together(
            state, self._new_staging, lambda folder, world_size: commit(folder, "torch", world_size)
        )
        return together

    def wait(self, step: int | None = None, timeout_s: float | None = None) -> tuple[Replication, ...]:
        """Until it is replicated as the policy wants.

        Args:
            step: Which; None for all that were saved and are not yet.
            timeout_s: How long to go on trying. None waits until each was tried once more.

        Returns:
            For each: the stores that hold it, and those that failed on the way.

        Raises:
            StoreError: it could not be; names the stores, and why. It is whole on this machine and tried again later.
            TimedOut: the time is up.
        """
        return self._session.call(self._series.wait(step, timeout_s=timeout_s))

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole in any store that can be reached, every file of it read and hashed.

        Returns:
            None when there is none.

        Raises:
            Corrupt: there are some, but none is whole.
            Unavailable: too many stores don't answer to tell.
        """
        whole = self._session.call(newest(self._depot))
        return None if whole is None else self._checkpoint(whole)

    def get(self, step: int) -> Checkpoint:
        """The checkpoint of one step.

        Raises:
            UsageError: there is none.
            StoreError: it is not whole in what can be reached.
        """
        return self._checkpoint(self._session.call(at_step(self._depot, check_step(step))))

    def list(self) -> tuple[CheckpointLine, ...]:
        """All there are, the newest first, as the stores that can be reached list them. Nothing is read back."""
        return self._session.call(list_checkpoints(self._depot))[0]

    def pin(self, step: int) -> None:
        """Have retention leave this one alone. Raises ``UsageError`` if there is none of this step."""
        self._session.call(pin(self._depot, step))

    def unpin(self, step: int) -> None:
        """Have retention treat this one as any other again. Raises ``UsageError`` if there is none of this step."""
        self._session.call(pin(self._depot, step, pinned=False))

    def prune(self) -> Retained:
        """Take away now what isn't to be kept. It happens by itself after each save."""
        return self._session.call(self._series.retain())

    def close(self) -> None:
        """Stop replicating. What isn't replicated stays on this machine, and whoever opens the name next goes on."""
        if not self._closed:
            self._closed = True
            self._session.call(self._series.aclose())
            self._session.call(self._depot.local.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for replication, unless the body failed; raises what :meth:`wait` raises."""
        try:
            if error is None:
                self.wait()
        finally:
            self.close()

    def _checkpoint(self, whole: Whole) -> Checkpoint:
        return Checkpoint(self._session, self._depot, whole, self._restored)

    def _new_staging(self) -> Path:
        """A new folder for a state dict, beside which nothing of dead processes stays."""
        self._staging.mkdir(parents=True, exist_ok=True)
        for old in self._staging.iterdir():
            with contextlib.suppress(OSError):  # another process removes it too
                stale = old.stat().st_mtime + _STALE_S < time.time()
                if stale or not holder_is_alive(old.name.partition("~")[0]):
                    shutil.rmtree(old, ignore_errors=True)
        folder = self._staging / f"{this_holder()}~{secrets.token_hex(4)}"
        folder.mkdir()
        return folder


def checkpoints(
    name: str,
    *,
    world: str | os.PathLike[str] | None = None,
    keep_last: int | None = 3,
    keep_for: str | float | None = None,
    placement: Placement | Mapping[str, Any] | None = None,
) -> Checkpoints:
    """The checkpoints of one training run, by its name.

    Args:
        name: As datasets are named: a-z, 0-9, ``.``, ``_``, ``-``.
        world: The world file; None means ``$MILLRACE_WORLD``, or ``world.yaml`` here or in a folder above.
        keep_last: So many of the newest are kept.
        keep_for: Those younger than this are kept as well: ``7d``, or seconds. What neither keeps goes after the next
            save, but never the newest that is whole, nor what is pinned. With both None all are kept.
        placement: Where replicas go, with the words of a pipeline file: ``{"replicas": 2, "min_clouds": 2}``.
            None means 3 replicas in 2 clouds.

    Raises:
        UsageError, SpecError: there is no world, or the name or another argument is wrong.
        PolicyRefused: the stores of the world can't meet the placement.
    """
    check_name(name)
    try:
        for_ms = None if keep_for is None else round(parse_duration_s(keep_for) * 1000)
    except ValueError as error:
        raise UsageError(f"keep_for: {error}") from None
    keep = Keep(keep_last, for_ms)
    try:
        policy = Placement.model_validate({} if placement is None else placement)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(("placement", *(str(part) for part in detail["loc"])))
        raise UsageError(f"{where}: {detail['msg'].removeprefix('Value error, ')}") from None
    return Checkpoints(session_for(None if world is None else Path(world)), name, keep, policy)


async def _opened(depot: Depot, keep: Keep, restored: Path) -> Series:
    series = Series(depot, keep, restored)
    await series.open()
    return series


def _state_of(loader: Any) -> Any:
    state_dict = getattr(loader, "state_dict", None)
    return state_dict() if callable(state_dict) else loader


def _torch() -> ModuleType:
    try:
        # Lazily: torch takes seconds to load, and who saves folders doesn't need it.
        import millrace.feed.torch.checkpoint as states
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] != "torch":
            raise
        raise UsageError("state dicts need the library torch; install it, or save a folder") from missing
    return states
