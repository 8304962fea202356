"""The ports: what the rest of Millrace asks of the outside world, and nothing about how it is done.

Each port has one conformance suite under ``tests/conformance``; a new adapter is done when that is green.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from millrace.core.messages import Grant, NodeEvent, PhaseInputs
from millrace.core.model import Digest

__all__ = [
    "Bytes",
    "Capabilities",
    "Change",
    "Clock",
    "Compare",
    "Content",
    "Coordination",
    "Entry",
    "Fleet",
    "Lease",
    "ObjectInfo",
    "RangeRequest",
    "Store",
    "Write",
]

Bytes = bytes | bytearray | memoryview
"""What a store takes and gives. Reads give ``memoryview`` so that nobody copies to slice."""


class Clock(Protocol):
    """The time, as an argument."""

    def now_ms(self) -> int:
        """Wall time in milliseconds since 1970: for records people read, and lease expiry."""

    def monotonic_s(self) -> float:
        """Seconds from an arbitrary start that never go backwards: for measuring and waiting."""


# --- stores ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as a store describes it.

    Attributes:
        key: Relative to the store's root, ``/`` between parts, never starting with ``/``.
        size_bytes: Its length.
        version: An opaque string that changes when the object does: an ETag, a generation, or
            ``mtime_ns-size`` on a disk.
        modified_ms: When it last changed, milliseconds since 1970.
    """

    key: str
    size_bytes: int
    version: str
    modified_ms: int


@dataclass(frozen=True, slots=True)
class RangeRequest:
    """Bytes ``[start, start + length)`` of one object; ``length`` None means to the end.

    ``version``, when given, must be the object's or the read raises ``PreconditionFailed``.
    """

    key: str
    start: int = 0
    length: int | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can be trusted with.

    Attributes:
        create_only: Two writers that both create one key: exactly one wins, the other hears ``AlreadyExists``.
        compare_and_swap: A put that names the version it replaces fails when that is no longer the version.
    """

    create_only: bool
    compare_and_swap: bool


@dataclass(frozen=True, slots=True)
class Content:
    """What an object's bytes are: the proof behind a receipt.

    Attributes:
        digest: SHA-256 of all of them, as they were read back.
        size_bytes: How many there were.
    """

    digest: Digest
    size_bytes: int


class Store(Protocol):
    """A durable place for objects in one site. See ``docs/design/stores.md`` for the laws.

    Every method raises only :class:`millrace.core.errors.StoreError` and its kinds, with ``store`` and
    ``key`` set. A cancelled call leaves no task, file handle or half-written visible object behind.
    """

    @property
    def url(self) -> str:
        """Where it is, without credentials."""

    async def capabilities(self) -> Capabilities:
        """Probe, once, what conditional puts are worth here. The probe cleans up after itself."""

    async def put(
        self,
        key: str,
        data: Sequence[Bytes],
        *,
        mode: Literal["overwrite", "create"] = "overwrite",
        if_version: str | None = None,
    ) -> ObjectInfo:
        """Write one object, atomically: a reader sees the old bytes, the new bytes or nothing, never a part.

        Durable when it returns. ``data`` is concatenated; the pieces are not copied first where the
        backend allows. ``mode="create"`` raises ``AlreadyExists`` if the key is there. ``if_version``
        raises ``PreconditionFailed`` unless the object's version is exactly that.
        """

    async def get(self, key: str, *, version: str | None = None) -> memoryview:
        """The whole object. Raises ``NotFound``; ``PreconditionFailed`` if ``version`` is not the object's."""

    async def get_range(
        self, key: str, start: int, length: int | None = None, *, version: str | None = None
    ) -> memoryview:
        """Bytes ``[start, start + length)``, cut off at the object's end; ``length`` None means to the end.

        A ``start`` at or past the end gives an empty view.
        """

    async def read_many(self, requests: Sequence[RangeRequest]) -> list[memoryview]:
        """Several ranges of several objects, in the order asked for. Made for many small ones.

        The first failure is raised; nothing is left running.
        """

    async def content(self, key: str) -> Content:
        """Read one object back, whole, and hash it where it is read: in bounded memory, whatever its size.

        Never answered from what the store says of itself: not an ETag, not a checksum it keeps.
        Raises ``NotFound``.
        """

    async def head(self, key: str) -> ObjectInfo:
        """Describe one object. Raises ``NotFound``."""

    def list(self, prefix: str = "") -> AsyncIterator[Sequence[ObjectInfo]]:
        """Every object whose key starts with ``prefix``, in pages, in no promised order, never one twice."""

    async def delete(self, key: str) -> None:
        """Remove one object. Removing what isn't there is not an error."""

    async def aclose(self) -> None:
        """Let go of connections and threads. The store is not used afterwards."""


# --- coordination ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A key with its value and the revision that wrote it. Revisions are one counter for the whole store."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """Holds when ``key`` was last written at ``revision``; 0 means the key must not exist."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class Write:
    """Set ``key`` to ``value``; ``value`` None deletes it."""

    key: str
    value: bytes | None


@dataclass(frozen=True, slots=True)
class Lease:
    """A grant for a limited time. ``epoch`` is the fencing token: it grows with every new holder of ``name``.

    ``expires_at_ms`` is by the clock of the coordination store's caller.
    """

    name: str
    holder: str
    epoch: int
    expires_at_ms: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch reports: ``entry.value`` is what was written; ``deleted`` when the key went away."""

    entry: Entry
    deleted: bool = False


class Coordination(Protocol):
    """A small, strongly consistent store of facts: heads, ledgers, leases. Bulk lies in objects.

    A value is at most 1 MiB and a transaction at most 100 writes, as etcd wants it.
    Methods raise :class:`millrace.core.errors.CoordError` and its kinds.
    """

    async def get(self, key: str) -> Entry | None:
        """The newest value of a key, or None."""

    async def list(self, prefix: str, *, after: str = "", limit: int = 1000) -> Sequence[Entry]:
        """Entries whose key starts with ``prefix`` and is greater than ``after``, in key order."""

    async def commit(
        self, writes: Sequence[Write], *, compares: Sequence[Compare] = (), guard: Lease | None = None
    ) -> int:
        """All of it or nothing; gives the new revision. Durable when it returns.

        Raises:
            Conflict: a compare did not hold; the message names the key.
            Fenced: ``guard`` is not the newest epoch of its lease name. (Expiry alone does not fence:
                a new holder does.)
        """

    def watch(self, prefix: str, *, since_revision: int = 0) -> AsyncIterator[Change]:
        """Every key under ``prefix`` as it changes after ``since_revision``, in order, until closed.

        Several changes of one key between two looks may arrive as the newest one only.
        """

    async def acquire(self, name: str, holder: str, ttl_ms: int, *, now_ms: int, steal: bool = False) -> Lease:
        """Take a lease: free, expired, already this holder's (then its epoch stays), or with ``steal``.

        A new holder gets a new epoch, greater than every earlier one of this name, also after release.

        Raises:
            LeaseHeld: somebody else has it and it has not expired.
        """

    async def renew(self, lease: Lease, ttl_ms: int, *, now_ms: int) -> Lease:
        """Extend it. Raises ``Fenced`` if it has a newer epoch or was released."""

    async def release(self, lease: Lease) -> None:
        """Give it back. A stale one is left alone, without an error."""

    async def holder(self, name: str) -> Lease | None:
        """Who holds it, expired or not; None if nobody ever did or it was released."""

    async def aclose(self) -> None:
        """Let go of the connection."""


# --- the fleet: where granted work runs --------------------------------------------------------------


class Fleet(Protocol):
    """The nodes, as the control loop sees them: grants go out, events come back. Nothing else crosses."""

    async def enter(self, inputs: PhaseInputs) -> None:
        """Tell every node, also those that join later, what the tasks of the phase that begins read."""

    async def send(self, grant: Grant) -> None:
        """Hand one granted task to its node. Never waits for the work."""

    async def events(self) -> Sequence[NodeEvent]:
        """Wait for at least one event; give all that are there."""

    async def aclose(self) -> None:
        """Stop what is in flight and let go of the processes."""
