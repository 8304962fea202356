"""What every coordination store refuses and decides alike: limits, names, leases and fences. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from millrace.core.errors import CoordError, Fenced, LeaseHeld
from millrace.core.ports import Compare, Lease, Write

__all__ = [
    "KEY_BYTES_MAX",
    "TOMBSTONES_MAX",
    "VALUE_BYTES_MAX",
    "WRITES_MAX",
    "LeaseState",
    "check_commit",
    "check_fence",
    "check_key",
    "check_lease_terms",
    "check_limit",
    "check_prefix",
    "check_revision",
    "granted",
    "stands",
]

KEY_BYTES_MAX = 4096
"""Longest key, lease name or holder, in UTF-8 bytes."""

VALUE_BYTES_MAX = 1 << 20
"""Largest value: etcd takes requests of 1.5 MiB at most, and this leaves room for the rest of one."""

WRITES_MAX = 100
"""Most writes in one commit: etcd's default is 128 operations."""

TOMBSTONES_MAX = 10_000
"""How many deletions are remembered for watches, unless said otherwise."""

_INT_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class LeaseState:
    """What a store keeps of a lease name for ever, so that its epoch never goes back."""

    lease: Lease
    released: bool = False


def check_key(key: str, what: str = "key") -> bytes:
    """The UTF-8 form of a key, a lease name or a holder.

    Raises:
        CoordError: It is empty, longer than ``KEY_BYTES_MAX``, or has no UTF-8 form.
    """
    encoded = check_prefix(key, what)
    if not encoded:
        raise CoordError(f"an empty {what} was given to the coordination store; name it")
    if len(encoded) > KEY_BYTES_MAX:
        raise CoordError(
            f"{what} {key[:60]!r}... has {len(encoded)} bytes and the coordination store takes {KEY_BYTES_MAX}; "
            "use a digest of the long part"
        )
    return encoded


def check_prefix(prefix: str, what: str = "prefix") -> bytes:
    """The UTF-8 form of a prefix or of a place to start after, which may be empty.

    Its bytes sort as its characters do, so both kinds of store agree on the order.

    Raises:
        CoordError: It has no UTF-8 form (a file name that was not UTF-8, for one).
    """
    try:
        return prefix.encode()
    except UnicodeEncodeError as error:
        raise CoordError(f"{what} {prefix[:60]!r} is not valid Unicode; escape it before using it as a key") from error


def check_limit(limit: int) -> int:
    """A page size that any store can take. Raises ``CoordError`` under 1."""
    if limit < 1:
        raise CoordError(f"a list limit of {limit} was asked of the coordination store; it has to be at least 1")
    return min(limit, _INT_MAX)


def check_revision(revision: int) -> int:
    """A revision to watch from. Raises ``CoordError`` when there can't be such a one."""
    if not 0 <= revision <= _INT_MAX:
        raise CoordError(f"revision {revision} can't be watched from; use 0 or one that the coordination store gave")
    return revision


def check_commit(writes: Sequence[Write], compares: Sequence[Compare]) -> None:
    """Refuse what etcd would refuse, before anything is touched.

    Raises:
        CoordError: Over ``WRITES_MAX`` writes or compares, a value over ``VALUE_BYTES_MAX``, one key written
            twice, or a key that can't be one. The message names the key.
    """
    for count, what in ((len(writes), "writes"), (len(compares), "compares")):
        if count > WRITES_MAX:
            raise CoordError(f"a commit of {count} {what} is over the {WRITES_MAX} a transaction takes; split it")
    seen: set[str] = set()
    for write in writes:
        check_key(write.key)
        if write.key in seen:
            raise CoordError(f"key {write.key!r} is written twice in one commit; write it once")
        seen.add(write.key)
        if write.value is not None and len(write.value) > VALUE_BYTES_MAX:
            raise CoordError(
                f"the value of key {write.key!r} has {len(write.value)} bytes and the coordination store takes "
                f"{VALUE_BYTES_MAX}; put it in an object and keep its digest here"
            )
    for compare in compares:
        check_key(compare.key)


def check_lease_terms(name: str, holder: str, ttl_ms: int, now_ms: int) -> None:
    """Refuse a lease without a name, a holder or a future. Raises ``CoordError``."""
    check_key(name, "lease name")
    check_key(holder, "lease holder")
    if ttl_ms < 1 or not 0 <= now_ms <= _INT_MAX - ttl_ms:
        raise CoordError(f"lease {name!r} can't be had for {ttl_ms} ms from {now_ms}; ask for at least 1 ms from now")


def granted(state: LeaseState | None, name: str, holder: str, ttl_ms: int, *, now_ms: int, steal: bool) -> Lease:
    """The lease that ``holder`` gets, given what is known of ``name``.

    The epoch starts at 1, stays for the holder of an unreleased lease (expired or not), and otherwise is one
    more than ever before. A lease is expired from ``expires_at_ms`` on.

    Raises:
        LeaseHeld: Somebody else holds it, it has not expired, and ``steal`` is not given.
    """
    expires_at_ms = now_ms + ttl_ms
    if state is None:
        return Lease(name, holder, 1, expires_at_ms)
    current = state.lease
    if not state.released:
        if current.holder == holder:
            return replace(current, expires_at_ms=expires_at_ms)
        if now_ms < current.expires_at_ms and not steal:
            raise LeaseHeld(
                f"lease {name!r} is held by {current.holder} for another {current.expires_at_ms - now_ms} ms; "
                "wait for it, or stop that holder",
                holder=current.holder,
                expires_at_ms=current.expires_at_ms,
            )
    return Lease(name, holder, current.epoch + 1, expires_at_ms)


def stands(state: LeaseState | None, lease: Lease) -> bool:
    """Whether ``lease`` is still the newest grant of its name. Expiry doesn't matter: only a new holder does."""
    return (
        state is not None
        and not state.released
        and (state.lease.epoch, state.lease.holder) == (lease.epoch, lease.holder)
    )


def check_fence(state: LeaseState | None, lease: Lease) -> None:
    """Raise ``Fenced``, saying by whom, unless ``lease`` stands."""
    if stands(state, lease):
        return
    ours = f"lease {lease.name!r}: epoch {lease.epoch} of {lease.holder}"
    if state is None:
        raise Fenced(f"{ours} was never granted here; acquire the lease first")
    if state.released and state.lease.epoch == lease.epoch:
        raise Fenced(f"{ours} was released; acquire the lease again")
    newest = state.lease
    raise Fenced(f"{ours} was replaced by epoch {newest.epoch} of {newest.holder}; stop this writer")
