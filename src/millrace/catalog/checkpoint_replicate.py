"""Replicating a checkpoint under the policy: every object read back from every store, and the manifest last."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from millrace.catalog.checkpoint_depot import Budget, Depot
from millrace.catalog.checkpoint_manifest import encode_manifest, identity, key_of, parts_of
from millrace.catalog.checkpoint_parts import each_within, read_part
from millrace.catalog.checkpoint_survey import change_record
from millrace.catalog.crew import at_once
from millrace.core.errors import PolicyRefused, StoreError
from millrace.core.facts import CheckpointManifest, CheckpointRecord
from millrace.core.keys import checkpoint_object
from millrace.core.model import Digest, digest_of
from millrace.core.ports import Lease
from millrace.decide.placement import legal, place, score
from millrace.pipeline.distribute import Blob, put_verified

__all__ = ["Replication", "note", "replicate"]


@dataclass(frozen=True, slots=True)
class Replication:
    """What an attempt to replicate a checkpoint came to.

    Attributes:
        step: Of the checkpoint.
        stores: Store name to when it was read back whole there.
        failed: Store name to why it is not there.
        short: Why the policy is not met; empty when it is.
    """

    step: int
    stores: Mapping[str, int]
    failed: Mapping[str, str]
    short: str = ""


async def replicate(depot: Depot, manifest: CheckpointManifest, *, held: Collection[str] = ()) -> Replication:
    """Have the policy's stores hold it; where one fails, another that policy allows.

    All checkpoints of a name go to the same stores, so that a file that several of them have is there once.

    Args:
        depot: Whose.
        manifest: Which.
        held: Stores that have it already, as far as is known; preferred, and read back all the same.

    Raises:
        StoreError: its bytes can't be read from anywhere any more.
    """
    work = _Work(depot, manifest)
    short = ""
    while True:
        targets, short = _targets(depot, {*held, *work.done}, set(work.failed))
        missing = [name for name in targets if name not in work.done]
        if not missing:
            lacking = short and f"{len(work.done)} of {depot.policy.replicas} replicas are made; {short}"
            return Replication(manifest.step, dict(work.done), dict(work.failed), lacking)
        await work.copy(missing)


def _targets(depot: Depot, have: set[str], without: set[str]) -> tuple[list[str], str]:
    """Where it should be, and why that is not all the policy asks for."""
    sites = [site for site in depot.sites if site.name in depot.stores]
    wanted = digest_of(depot.name.encode())
    try:
        return [s.name for s in place(wanted, sites, depot.policy, near=depot.near, keep=have, without=without)], ""
    except PolicyRefused as error:
        allowed = [s for s in sites if s.name not in without and legal(s, depot.policy) is None]
        # Fewer copies than the policy asks for are better than fewer still; never more.
        allowed.sort(key=lambda s: (s.name not in have, score(wanted, s)))
        return [s.name for s in allowed[: depot.policy.replicas]], str(error)


class _Work:
    def __init__(self, depot: Depot, manifest: CheckpointManifest) -> None:
        self._depot = depot
        self._manifest = manifest
        self.done: dict[str, int] = {}
        self.failed: dict[str, str] = {}

    async def copy(self, names: Sequence[str]) -> None:
        """Put it into all of these stores at once; which of them have it then stands in ``done``."""
        live = set(names)
        budget = Budget()

        async def part(one: tuple[Digest, int]) -> None:
            digest, size_bytes = one
            if not live:
                return
            async with budget.take(size_bytes):
                # From the local store while it lasts; else from any other, so that a replica too few is made up for.
                data, _ = await read_part(self._depot, digest, self._depot.readable())
                await self._put(live, Blob(digest, checkpoint_object(self._depot.name, digest), size_bytes, [data]))

        await each_within(budget, parts_of(self._manifest).items(), part)
        data = encode_manifest(self._manifest)
        await self._put(live, Blob(digest_of(data), key_of(self._manifest), len(data), [data]))
        self.done.update((name, self._depot.clock.now_ms()) for name in live)

    async def _put(self, live: set[str], blob: Blob) -> None:
        async def one(name: str) -> None:
            try:
                await put_verified(self._depot.store(name), blob)
            except StoreError as error:
                self.failed.setdefault(name, f"{error.kind}: {error}")
                live.discard(name)

        await at_once([one(name) for name in sorted(live)])


async def note(depot: Depot, manifest: CheckpointManifest, result: Replication, guard: Lease) -> None:
    """Write down what was read back where.

    Raises:
        Fenced: another process took over; it writes down what it finds.
    """
    digest = identity(manifest)

    def noted(before: CheckpointRecord | None) -> CheckpointRecord:
        if before is None:
            before = CheckpointRecord(
                name=manifest.name,
                step=manifest.step,
                digest=digest,
                created_at_ms=manifest.created_at_ms,
                size_bytes=manifest.size_bytes,
                files=len(manifest.files),
                placement=depot.policy.model_dump(mode="json"),
            )
        if before.digest != digest:
            return before  # written over meanwhile
        return before.model_copy(
            update={
                "stores": {n: at for n, at in {**before.stores, **result.stores}.items() if n not in result.failed},
                "state": "local" if result.short else "replicated",
                "placement": depot.policy.model_dump(mode="json"),
            }
        )

    await change_record(depot, manifest.step, noted, guard=guard)
