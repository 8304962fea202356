"""A checkpoint's manifest as it lies in a store: JSON that carries the proof of its own bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from millrace.core.errors import Corrupt, UsageError
from millrace.core.facts import CheckpointFile, CheckpointManifest, CheckpointPart
from millrace.core.keys import checkpoint_folder, checkpoint_manifest
from millrace.core.model import Digest, digest_of
from millrace.core.spec import Name

__all__ = [
    "STEP_MAX",
    "ManifestKey",
    "check_name",
    "check_step",
    "decode_manifest",
    "encode_manifest",
    "identity",
    "json_safe",
    "key_of",
    "parse_key",
    "parts_of",
]

STEP_MAX: Final = 10**11 - 1
"""So that every manifest's key begins with a 0 after the folder, and one listing finds them without the objects."""

_LOADER_STATE_BYTES: Final = 16 * 2**20
_BEFORE: Final = b'{"sha256":"'
_BETWEEN: Final = b'","checkpoint":'
_AFTER: Final = b"}"
_HEAD_BYTES: Final = len(_BEFORE) + 64 + len(_BETWEEN)
_NAMES: Final[TypeAdapter[str]] = TypeAdapter(Name)
_VALUES: Final[TypeAdapter[Any]] = TypeAdapter(Any)
_KEY: Final = re.compile(r"(\d{12})-([0-9a-f]{8})\.json")


@dataclass(frozen=True, slots=True)
class ManifestKey:
    """A manifest's place in a store, and what it says.

    Attributes:
        key: The whole key.
        step: Of the checkpoint.
        mark: The first 8 letters of its digest.
    """

    key: str
    step: int
    mark: str


def check_name(name: object) -> str:
    """Give ``name`` back if it is one, as datasets have them.

    Raises:
        UsageError: it isn't; says what a name is.
    """
    try:
        return _NAMES.validate_python(name)
    except ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UsageError(f"checkpoints: {what}") from None


def check_step(step: object) -> int:
    """Give ``step`` back if it is one.

    Raises:
        UsageError: it isn't a whole number from 0 to ``STEP_MAX``.
    """
    if isinstance(step, bool) or not hasattr(step, "__index__"):
        raise UsageError(f"a checkpoint's step is a whole number, not {step!r}")
    number = int(step.__index__())
    if not 0 <= number <= STEP_MAX:
        raise UsageError(f"a checkpoint's step is a number from 0 to {STEP_MAX}, not {number}")
    return number


def json_safe(state: object, what: str) -> Any:
    """``state`` as JSON gives it back.

    Raises:
        UsageError: JSON can't hold it, or would change it; or it is over 16 MiB.
    """
    try:
        text = json.dumps(state, allow_nan=False, ensure_ascii=False).encode()
        # As it is read later: by a parser that has a limit of its own on how deep things lie in each other.
        back = _VALUES.validate_json(b"[[%b]]" % text)[0][0]
    except (TypeError, ValueError, RecursionError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise UsageError(f"{what} can't be kept in a checkpoint: {why}; give what JSON can hold") from error
    if back != (dict(state) if isinstance(state, Mapping) else state):
        raise UsageError(
            f"{what} can't be kept in a checkpoint: JSON would change it (tuples become lists, numbers that are keys "
            "become text); give what JSON holds as it is"
        )
    if len(text) > _LOADER_STATE_BYTES:
        raise UsageError(f"{what} takes {len(text)} bytes as JSON, over {_LOADER_STATE_BYTES}; save it as a file")
    return back


def identity(manifest: CheckpointManifest) -> Digest:
    """The checkpoint's digest: of all that the manifest says but when it was made."""
    return digest_of(_canonical(manifest.model_dump(mode="json", exclude={"created_at_ms"})))


def key_of(manifest: CheckpointManifest) -> str:
    """Where the manifest lies in every store."""
    return checkpoint_manifest(manifest.name, manifest.step, identity(manifest))


def parse_key(name: str, key: str) -> ManifestKey | None:
    """What a key says, if it is a manifest's of this name."""
    match = _KEY.fullmatch(key.removeprefix(checkpoint_folder(name)))
    return ManifestKey(key, int(match[1]), match[2]) if match else None


def parts_of(manifest: CheckpointManifest) -> dict[Digest, int]:
    """Every object the checkpoint needs, each once, with its size, in the order of the files."""
    return {Digest(part.digest): part.size_bytes for file in manifest.files for part in file.parts}


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    """The manifest's object: ``{"sha256": ..., "checkpoint": ...}``, the digest being that of the second's bytes."""
    body = _canonical(manifest.model_dump(mode="json"))
    return b"".join((_BEFORE, digest_of(body).encode(), _BETWEEN, body, _AFTER))


def decode_manifest(data: bytes | memoryview, *, key: str) -> CheckpointManifest:
    """The manifest in ``data``.

    Raises:
        Corrupt: it isn't one, its bytes aren't those it was written with, or it isn't the one ``key`` names.
    """
    raw = bytes(data)
    body = raw[_HEAD_BYTES : -len(_AFTER)]
    if raw != b"".join((_BEFORE, digest_of(body).encode(), _BETWEEN, body, _AFTER)):
        raise Corrupt(f"{key} is not the checkpoint's manifest that was written there", key=key)
    try:
        manifest = CheckpointManifest.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        where = ".".join(str(p) for p in detail["loc"])
        raise Corrupt(f"{key} is no checkpoint this version can read: {where}: {detail['msg']}", key=key) from error
    if key_of(manifest) != key:
        raise Corrupt(f"{key} holds the manifest of {key_of(manifest)}", key=key)
    for file in manifest.files:
        _check_file(file, key)
    for folder in manifest.folders:
        _check_path(folder, key)
    return manifest


def _check_file(file: CheckpointFile, key: str) -> None:
    _check_path(file.path, key)
    if sum(part.size_bytes for part in file.parts) != file.size_bytes or any(not p.size_bytes for p in file.parts):
        raise Corrupt(f"{key}: the parts of {file.path!r} don't make {file.size_bytes} bytes", key=key)
    if file.parts[1:] == () and file.parts != _only(file):
        raise Corrupt(f"{key}: the one part of {file.path!r} is not the file", key=key)


def _only(file: CheckpointFile) -> tuple[CheckpointPart, ...]:
    return (CheckpointPart(digest=file.digest, size_bytes=file.size_bytes),) if file.size_bytes else ()


def _check_path(path: str, key: str) -> None:
    """A manifest from a store that others write to must not reach out of the folder it is restored to."""
    if "\0" in path or any(part in {"", ".", ".."} for part in path.split("/")):
        raise Corrupt(f"{key} names {path!r}, which is no path inside a checkpoint", key=key)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
