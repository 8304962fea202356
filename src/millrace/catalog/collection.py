"""What a garbage collection found and did: counts for each store, and why what was left was left."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["GcReport", "Heap", "Kept", "StoreCollected", "Tally"]


@dataclass(slots=True)
class Heap:
    """Some objects and their bytes, being counted."""

    objects: int = 0
    bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """One more."""
        self.objects += 1
        self.bytes += size_bytes


@dataclass(frozen=True, slots=True)
class Kept:
    """Objects that nobody names and that are still there, and why."""

    why: str
    objects: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StoreCollected:
    """What became of one store.

    Attributes:
        store: Its name, or ``(work)`` for the scratch of runs.
        named_objects: Left because somebody names them.
        marked_objects, marked_bytes: Marked now; a later sweep may delete them.
        deleted_objects, deleted_bytes: Gone.
        kept: What a sweep left though nobody names it, by reason.
        unknown_objects: Files that are not of a kind Millrace writes: never touched.
    """

    store: str
    named_objects: int
    marked_objects: int
    marked_bytes: int
    deleted_objects: int
    deleted_bytes: int
    kept: tuple[Kept, ...]
    unknown_objects: int


@dataclass(frozen=True, slots=True)
class GcReport:
    """One pass over all stores.

    Attributes:
        stores: Each store, then the scratch.
        replica_pages: Pages of removed versions that were deleted.
        claims: Claims of readers long gone that were deleted.
        failed: Store name to why it could not be gone through; what was left of it was left alone.
    """

    stores: tuple[StoreCollected, ...]
    replica_pages: int
    claims: int
    failed: dict[str, str]

    @property
    def marked_objects(self) -> int:
        """In all stores."""
        return sum(s.marked_objects for s in self.stores)

    @property
    def deleted_objects(self) -> int:
        """In all stores."""
        return sum(s.deleted_objects for s in self.stores)

    @property
    def deleted_bytes(self) -> int:
        """In all stores."""
        return sum(s.deleted_bytes for s in self.stores)


@dataclass(slots=True)
class Tally:
    """A store's counts while a pass goes on."""

    store: str
    named: Heap = field(default_factory=Heap)
    marked: Heap = field(default_factory=Heap)
    deleted: Heap = field(default_factory=Heap)
    unknown: Heap = field(default_factory=Heap)
    kept: dict[str, Heap] = field(default_factory=dict)

    def keep(self, why: str, size_bytes: int) -> None:
        """One more object that stays for this reason."""
        self.kept.setdefault(why, Heap()).add(size_bytes)

    def done(self) -> StoreCollected:
        """As a value."""
        return StoreCollected(
            store=self.store,
            named_objects=self.named.objects,
            marked_objects=self.marked.objects,
            marked_bytes=self.marked.bytes,
            deleted_objects=self.deleted.objects,
            deleted_bytes=self.deleted.bytes,
            kept=tuple(Kept(why, heap.objects, heap.bytes) for why, heap in sorted(self.kept.items())),
            unknown_objects=self.unknown.objects,
        )
