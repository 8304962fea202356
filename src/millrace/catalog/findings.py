"""What ``verify`` says: a finding for each thing that is wrong, and counts of all that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Fault", "Finding", "VerifyProgress", "VerifyReport"]


class Fault(StrEnum):
    """What can be wrong with an object of a version.

    The first three speak of one replica, the others of where an object lies.
    """

    MISSING = "missing"
    ROTTEN = "rotten"
    UNREADABLE = "unreadable"
    UNDER_REPLICATED = "under-replicated"
    FORBIDDEN = "forbidden"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        dataset: ``name@3``.
        object: The object's key, the same in every store.
        store: Whose replica; empty when it is about the object as a whole.
        verdict: What is wrong, in a word.
        detail: What is wrong, in a sentence.
        repaired: Whether it no longer is.
        repair: What was done about it, or why nothing could be; empty when nobody asked.
    """

    dataset: str
    object: str
    store: str
    verdict: Fault
    detail: str
    repaired: bool = False
    repair: str = ""


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far it is. An object here is one replica; bytes are those of replicas."""

    objects_done: int
    objects_total: int
    bytes_done: int
    bytes_total: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Everything that was found, and what became of it.

    Attributes:
        dataset: ``name@3``.
        digest: The version's.
        objects: Shards and the manifest's own objects that were looked at.
        replicas: Of them.
        bytes: Of those replicas, as they should be.
        whole: Replicas whose bytes were read back and are right. This and the next five are as found,
            before any repair.
        missing: Replicas that are not there.
        rotten: Replicas whose bytes are others.
        unreadable: Replicas whose store failed.
        under_replicated: Objects with fewer whole, legal replicas than their policy asks for.
        forbidden: Replicas that lie where their policy forbids.
        lost: Objects without any whole copy anywhere.
        restored: Replicas that were written and read back.
        findings: Each thing that is wrong, in the manifest's order.
    """

    dataset: str
    digest: str
    objects: int
    replicas: int
    bytes: int
    whole: int
    missing: int
    rotten: int
    unreadable: int
    under_replicated: int
    forbidden: int
    lost: int
    restored: int
    findings: tuple[Finding, ...]

    @property
    def is_whole(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return all(finding.repaired for finding in self.findings)

    @property
    def verdict(self) -> str:
        """``whole`` or ``damaged``: how it stands now."""
        return "whole" if self.is_whole else "damaged"
