"""What an object store answers, as the errors the rest of Millrace knows."""

from __future__ import annotations

import re

from obstore import exceptions as obs

from millrace.core.errors import (
    AccessDenied,
    AlreadyExists,
    NoSpace,
    NotFound,
    PreconditionFailed,
    StoreError,
    TimedOut,
    Unavailable,
    Unsupported,
)

__all__ = ["OBSTORE_ERRORS", "cloud_error", "status_of"]

OBSTORE_ERRORS = (obs.BaseError, FileNotFoundError, NotImplementedError, ValueError, OSError)
"""All that an obstore call raises for reasons that lie outside this program."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9_.-]{1,64})</Code>")
_FULL = frozenset({"QuotaExceeded", "QuotaExceededException", "XMinioStorageFull", "InsufficientStorage"})
# Not just "timeout": the text also tells the settings, retry_timeout among them.
_TIMED_OUT = re.compile(r"operation timed out|TimedOut|deadline has elapsed")
# Two conditional writes met; which one won isn't decided yet, so this is no AlreadyExists.
_UNDECIDED = frozenset({"ConditionalRequestConflict", "OperationAborted"})
_METADATA = ("169.254.169.254", "169.254.170.2", "metadata.google.internal")


def status_of(problem: Exception) -> int:
    """The HTTP status the server answered with, or 0 if there was none."""
    found = _STATUS.search(str(problem))
    return int(found[1]) if found else 0


def cloud_error(problem: Exception, *, store: str, key: str, doing: str) -> StoreError:
    """Choose the kind for a failed request.

    The text of ``problem`` holds URLs, and those may hold signatures: only the status and the error code
    of the answer go into the sentence. Raise the result ``from None`` for the same reason.

    Args:
        problem: What obstore raised.
        store: The store's name.
        key: The object, or ``""``.
        doing: A verb: ``read``, ``write``, ``list`` ...
    """
    text = str(problem)
    status = status_of(problem)
    found = _CODE.search(text)
    code = found[1] if found else ""
    at = repr(key) if key else "its objects"
    answer = f"the server answered {status} {code}".rstrip() if status else "the server did not answer"
    kind, sentence = _kind(problem, text, status, code, at, f"could not {doing} {at}: {answer}")
    return kind(f"store {store} {sentence}", store=store, key=key)


def _kind(
    problem: Exception, text: str, status: int, code: str, at: str, could_not: str
) -> tuple[type[StoreError], str]:
    if code in {"NoSuchBucket", "ContainerNotFound"}:
        return NotFound, f"{could_not}: there is no such bucket; make it, or correct the store's URL"
    if code in _UNDECIDED:
        return Unavailable, f"{could_not}: another writer is at it; try again"
    if code in _FULL or status == 507:
        return NoSpace, f"has no space left for {at}; free some, or add a store"
    if isinstance(problem, obs.AlreadyExistsError):
        return AlreadyExists, f"already has {at}; read it, or put it under another key"
    if isinstance(problem, obs.PreconditionError | obs.NotModifiedError) or status == 412:
        return PreconditionFailed, f"holds another version of {at}: it changed; list or read it again"
    if isinstance(problem, FileNotFoundError) or status == 404:
        return NotFound, f"has no object {at}; check its name"
    if isinstance(problem, obs.PermissionDeniedError | obs.UnauthenticatedError) or status in {401, 403}:
        return AccessDenied, f"{could_not}; check the credentials and what they allow"
    if any(address in text for address in _METADATA):
        return AccessDenied, f"found no credentials for {at}; set them, or set the option anonymous"
    if isinstance(problem, obs.InvalidPathError | ValueError):
        return Unsupported, f"can't hold {at}: a key there has no control characters and no empty part; rename it"
    if isinstance(problem, obs.NotSupportedError | NotImplementedError) or status == 501:
        return Unsupported, f"{could_not}; it lacks this operation: use another store for it"
    if isinstance(problem, obs.UnknownConfigurationKeyError):
        return StoreError, "was given a credential it does not know; look at their names"
    if not status and _TIMED_OUT.search(text):
        return TimedOut, f"{could_not} in time; try again"
    if status in {408, 425, 429} or status >= 500 or not status:
        return Unavailable, f"{could_not}; try again"
    return StoreError, f"{could_not}; look at the store's URL and options"
