"""Every error Millrace raises on purpose, grouped by what a handler would do.

::

    MillraceError                 exit 1 unless said otherwise
    ├── SpecError                 a world or pipeline file is wrong              exit 2
    ├── UsageError                a command names something that isn't there     exit 2
    ├── PolicyRefused             a rule forbids it; nothing was moved           exit 3
    ├── SourceError               one source object can't be read as it should
    │   └── SourceChanged         it is not the object the plan was made from
    ├── TransformError            a transform failed on its own account
    │   └── Nondeterministic      two runs of one transform on one input differ
    ├── QuarantineExceeded        more bad records than the spec allows
    ├── RunStopped                the run ended before its work was done
    ├── StoreError                a store did not do what was asked
    │   ├── NotFound              no such object
    │   ├── AlreadyExists         a create-only put lost
    │   ├── PreconditionFailed    a compare-and-swap put lost, or the version read is not the one asked for
    │   ├── AccessDenied          credentials or permissions
    │   ├── NoSpace               the store is full
    │   ├── ReadOnly              the store takes no writes
    │   ├── Unsupported           the store lacks the operation
    │   ├── Corrupt               bytes read back are not the bytes written
    │   ├── Unavailable           a fault that may pass                          retryable
    │   └── TimedOut              no answer in time                              retryable
    └── CoordError                the coordination store
        ├── Conflict              a compare in a transaction did not hold
        ├── Fenced                the epoch a write carries is no longer the newest
        └── LeaseHeld             somebody else holds the lease

A message is one sentence that names the thing (file, record, field, store, node) and, where there is one,
the way out. It never contains a secret. Errors cross process borders as :class:`millrace.core.messages.Failure`.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AccessDenied",
    "AlreadyExists",
    "Conflict",
    "CoordError",
    "Corrupt",
    "Fenced",
    "LeaseHeld",
    "MillraceError",
    "NoSpace",
    "Nondeterministic",
    "NotFound",
    "PolicyRefused",
    "PreconditionFailed",
    "QuarantineExceeded",
    "ReadOnly",
    "RunStopped",
    "SourceChanged",
    "SourceError",
    "SpecError",
    "StoreError",
    "TimedOut",
    "TransformError",
    "Unavailable",
    "Unsupported",
    "UsageError",
]


class MillraceError(Exception):
    """Anything Millrace refuses or fails at, as one sentence.

    Attributes:
        exit_code: What the CLI exits with.
        retryable: Whether the same call may succeed if it is simply made again.
    """

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """The class name: the word used in logs, reports and ``--json``."""
        return type(self).__name__


class SpecError(MillraceError):
    """A world or pipeline file is wrong. The message begins with ``file:line: field``."""

    exit_code = 2


class UsageError(MillraceError):
    """A command names something that isn't there, or asks for what can't be asked."""

    exit_code = 2


class PolicyRefused(MillraceError):
    """A rule forbids it. Raised before a byte moves.

    Attributes:
        rule: The rule's name, as it is written in the spec (``replicas``, ``min_clouds``, ``allow`` ...).
    """

    exit_code = 3

    def __init__(self, message: str, *, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class SourceError(MillraceError):
    """A source object can't be read as what the spec says it is. Permanent: reading again won't help."""


class SourceChanged(SourceError):
    """A source object is not the one the plan was made from: it changed or disappeared."""


class TransformError(MillraceError):
    """A transform raised, hung, died or returned what it must not."""


class Nondeterministic(TransformError):
    """A transform gave two outputs for one input."""


class QuarantineExceeded(MillraceError):
    """More records or chunks are bad than the spec's ``quarantine`` allows."""


class RunStopped(MillraceError):
    """The run ended before its work was done, because it was told to."""


class StoreError(MillraceError):
    """A store did not do what was asked.

    Attributes:
        store: The store's name or URL.
        key: The object's key, or ``""``.
    """

    def __init__(self, message: str, *, store: str = "", key: str = "") -> None:
        super().__init__(message)
        self.store = store
        self.key = key


class NotFound(StoreError):
    """No such object."""


class AlreadyExists(StoreError):
    """A create-only put found an object there."""


class PreconditionFailed(StoreError):
    """The object's version is not the one the caller named."""


class AccessDenied(StoreError):
    """Credentials are missing or do not allow it."""


class NoSpace(StoreError):
    """The store is full."""


class ReadOnly(StoreError):
    """The store takes no writes."""


class Unsupported(StoreError):
    """The store can't do this operation honestly."""


class Corrupt(StoreError):
    """The bytes read are not the bytes their digest names."""


class Unavailable(StoreError):
    """A fault that may pass: a refused connection, a 5xx, an interrupted body."""

    retryable = True


class TimedOut(StoreError):
    """No answer in the time allowed."""

    retryable = True


class CoordError(MillraceError):
    """The coordination store failed or refused."""


class Conflict(CoordError):
    """A compare in a transaction did not hold: somebody else wrote first."""


class Fenced(CoordError):
    """The epoch this write carries is not the newest: its holder has been replaced."""


class LeaseHeld(CoordError):
    """Somebody else holds the lease.

    Attributes:
        holder: Who.
        expires_at_ms: Until when, in milliseconds since 1970, if it is not renewed.
    """

    def __init__(self, message: str, *, holder: str = "", expires_at_ms: int = 0) -> None:
        super().__init__(message)
        self.holder = holder
        self.expires_at_ms = expires_at_ms
