"""What a key may look like, the same for every store, so that an object can move between any two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from millrace.core.errors import Unsupported
from millrace.core.ports import Bytes, RangeRequest

__all__ = [
    "HIDDEN_DIR",
    "PutMode",
    "check_key",
    "check_prefix",
    "check_put",
    "check_range",
    "flat_pieces",
    "same_bytes",
]

HIDDEN_DIR = ".millrace-tmp"
"""The folder a disk store keeps its temporary files and its lock in. Never a part of a key, never listed."""

PutMode = Literal["overwrite", "create"]

_COMPARE_BYTES = 1 << 20


def check_key(key: str, store: str) -> str:
    """Give ``key`` back if it is one.

    A key is a relative path with ``/`` between its parts: not empty, no empty part, no ``.`` or ``..``, no NUL,
    and letters that UTF-8 can write.

    Raises:
        Unsupported: It is not one; the sentence says what is wrong with it.
    """
    fault = _fault(key, key.split("/"))
    if not key:
        fault = "it is empty"
    elif not fault and ("//" in key or key[0] == "/" or key[-1] == "/"):
        fault = "it has an empty part"
    if fault:
        raise Unsupported(f"store {store}: {key!r} can't be a key: {fault}; use a relative path", store=store, key=key)
    return key


def check_prefix(prefix: str, store: str) -> str:
    """Give ``prefix`` back if keys can start with it. Unlike a key it may be empty or end in ``/``.

    Raises:
        Unsupported: No key can start so.
    """
    # The last part may be the beginning of a longer one: "a/." is one of "a/.hidden".
    fault = _fault(prefix, prefix.split("/")[:-1])
    if not fault and (prefix[:1] == "/" or "//" in prefix):
        fault = "it has an empty part"
    if fault:
        raise Unsupported(f"store {store}: no key starts with {prefix!r}: {fault}", store=store, key=prefix)
    return prefix


def check_put(mode: PutMode, if_version: str | None, store: str, key: str) -> None:
    """Refuse a put that asks for two conditions that exclude each other.

    Raises:
        Unsupported: ``mode="create"`` together with ``if_version``.
    """
    if mode == "create" and if_version is not None:
        message = f"store {store}: {key!r} can't be put create-only and with if_version at once; choose one"
        raise Unsupported(message, store=store, key=key)


def check_range(request: RangeRequest, store: str) -> RangeRequest:
    """Give ``request`` back if its key is one and its numbers are not negative.

    Raises:
        Unsupported: They are.
    """
    check_key(request.key, store)
    if request.start < 0 or (request.length is not None and request.length < 0):
        message = (
            f"store {store}: {request.key!r} can't be read from {request.start} for {request.length} bytes; "
            "count from 0 at its beginning"
        )
        raise Unsupported(message, store=store, key=request.key)
    return request


def flat_pieces(data: Sequence[Bytes]) -> list[memoryview]:
    """The pieces that are not empty, as flat views of bytes. Copies only a piece that isn't contiguous."""
    views = []
    for piece in data:
        view = memoryview(piece)
        if not view.nbytes:
            continue
        if not view.contiguous:
            view = memoryview(view.tobytes())
        views.append(view if view.format == "B" and view.ndim == 1 else view.cast("B"))
    return views


def same_bytes(data: Sequence[Bytes], whole: memoryview) -> bool:
    """Whether the pieces, concatenated, are exactly ``whole``."""
    pieces = flat_pieces(data)
    if sum(len(piece) for piece in pieces) != len(whole):
        return False
    at = 0
    for piece in pieces:
        for start in range(0, len(piece), _COMPARE_BYTES):
            # Comparing two memoryviews goes element by element; two bytes objects go through memcmp.
            part = bytes(piece[start : start + _COMPARE_BYTES])
            if part != bytes(whole[at : at + len(part)]):
                return False
            at += len(part)
    return True


def _fault(path: str, parts: Sequence[str]) -> str:
    if "\0" in path:
        return "it holds a NUL"
    try:
        path.encode()
    except UnicodeEncodeError:
        return "it is not valid UTF-8"
    for part in parts:
        if part in {".", ".."}:
            return f"it has a part {part!r}"
    if HIDDEN_DIR in parts:
        return f"{HIDDEN_DIR} is kept for temporary files"
    return ""
