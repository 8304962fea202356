"""What the operating system says, as the errors the rest of Millrace knows."""

from __future__ import annotations

import errno

from millrace.core.errors import AccessDenied, NoSpace, NotFound, ReadOnly, StoreError, Unavailable, Unsupported

__all__ = ["disk_error", "not_found"]

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DENIED = frozenset({errno.EACCES, errno.EPERM})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO})
_MISSHAPEN = frozenset({errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.EINVAL})
_LOCKLESS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})


def not_found(store: str, key: str, path: str) -> NotFound:
    """No such object."""
    return NotFound(f"store {store} has no object {key!r} (no file {path!r}); check its name", store=store, key=key)


def disk_error(problem: OSError, *, store: str, key: str, path: str, writing: bool) -> StoreError:
    """Choose the kind for a failed system call.

    Args:
        problem: What the system call raised.
        store: The store's name.
        key: The object, or ``""``.
        path: The file or directory it was about.
        writing: Whether an object was being written: a missing directory means another thing then.
    """
    code = problem.errno or 0
    words = problem.strerror or "unknown error"
    at = f"{path!r}" if not key else f"{key!r} ({path!r})"
    verb = "write" if writing else "read"
    kind: type[StoreError]
    if code in _FULL:
        kind, sentence = NoSpace, f"store {store} has no space left for {at}; free some, or add a store"
    elif code == errno.EROFS:
        kind, sentence = ReadOnly, f"store {store} is read-only, so {at} can't be written; mount it for writing"
    elif code in _DENIED:
        kind, sentence = (
            AccessDenied,
            f"store {store}: permission denied to {verb} {at}; give this user access, or exclude it",
        )
    elif not writing and (code in _ABSENT or code == errno.ENAMETOOLONG):
        return not_found(store, key, path)
    elif writing and code in _MISSHAPEN:
        kind, sentence = (
            Unsupported,
            f"store {store} can't hold {at}: {words.lower()}; a disk can't have an object and a folder "
            "of one name, nor a part longer than 255 bytes: choose another key",
        )
    elif code in _LOCKLESS:
        kind, sentence = (
            Unsupported,
            f"store {store} lies on a file system without locks ({words.lower()} at {at}); use another one",
        )
    elif code == errno.ELOOP:
        # Not Unavailable: links don't untie themselves, so trying again would only take time.
        kind, sentence = StoreError, f"store {store}: {at} is a link that leads to itself; remove or exclude it"
    else:
        kind, sentence = (
            Unavailable,
            f"store {store} could not {verb} {at}: {words.lower()}; look at the disk, then try again",
        )
    return kind(sentence, store=store, key=key)
