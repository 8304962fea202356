"""Which files of a directory are adopted, and as what: by how their names end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from millrace.core.errors import SourceError, UsageError
from millrace.core.manifest import Encoding
from millrace.core.model import SourceObject

__all__ = ["Chosen", "choose"]

_ENDINGS: Final[Mapping[str, Encoding]] = {
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".arrows": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".tar": "webdataset",
    ".mds": "mds",
}
_COMPRESSED: Final = re.compile(
    r"(\.(parquet|arrow|feather|tar|mds)\.(gz|zst|zstd|bz2|br|xz|snappy|lz4))|\.(tgz|tzst|tbz2|txz)", re.IGNORECASE
)
_INDEX: Final = "index.json"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is adopted.

    Attributes:
        encoding: As what.
        files: In order.
        left_out: Paths of the others that were seen.
    """

    encoding: Encoding
    files: tuple[SourceObject, ...]
    left_out: tuple[str, ...]


def choose(
    listed: Sequence[SourceObject], *, url: str, encoding: Encoding | None = None, included: bool = False
) -> Chosen:
    """Choose the files to adopt.

    Those whose names end as files of one format do. Unless they were chosen by globs, no part of their path may begin
    with ``_`` or ``.``, as Spark, pyarrow and others pass over those. With globs and a format, all are taken.

    Args:
        listed: All files that globs left, in order.
        url: Where, for sentences.
        encoding: The format; None finds it from the names.
        included: Whether include globs chose them.

    Raises:
        UsageError: there are none, or of several formats.
        SourceError: one is compressed as a whole; names it.
    """
    if included and encoding is not None:
        kept = [obj for obj in listed if _base(obj.path) != _INDEX or encoding != "mds"]
    else:
        visible = [obj for obj in listed if included or not _is_hidden(obj.path)]
        encoding = encoding or _only_format(visible, url)
        kept = [obj for obj in visible if _format_of(obj.path) == encoding or _compressed(obj.path, encoding)]
    if not kept:
        raise UsageError(
            f"{url} has no {encoding} files: of {len(listed)} seen, none is named like one; "
            f"choose them with --include, or name another --format"
        )
    packed = next((obj for obj in kept if _COMPRESSED.search(obj.path)), None)
    if packed is not None:
        raise SourceError(
            f"{packed.path} is compressed as a whole, so that no part of it can be read alone; decompress it, exclude "
            "it, or ingest it with millrace run"
        )
    taken = {obj.path for obj in kept}
    return Chosen(encoding, tuple(kept), tuple(obj.path for obj in listed if obj.path not in taken))


def _only_format(listed: Sequence[SourceObject], url: str) -> Encoding:
    found = Counter(_format_of(obj.path) or _compressed_format(obj.path) for obj in listed)
    found.pop(None, None)
    if len(found) > 1:
        words = ", ".join(f"{count} {name}" for name, count in sorted(found.items(), key=str))
        raise UsageError(f"{url} holds files of several formats ({words}); name one with --format")
    for name in found:
        if name is not None:
            return name
    example = f", such as {listed[0].path}" if listed else ""
    raise UsageError(
        f"{url} has no file that is named like Parquet, Arrow, a tar or MDS ({len(listed)} others{example}); "
        "name the format with --format and the files with --include"
    )


def _format_of(path: str) -> Encoding | None:
    name = _base(path).lower()
    return next((encoding for ending, encoding in _ENDINGS.items() if name.endswith(ending)), None)


def _compressed_format(path: str) -> Encoding | None:
    match = _COMPRESSED.search(_base(path))
    if match is None:
        return None
    return _ENDINGS[f".{match[2].lower()}"] if match[2] else "webdataset"


def _compressed(path: str, encoding: Encoding) -> bool:
    return _compressed_format(path) == encoding


def _is_hidden(path: str) -> bool:
    return any(part[:1] in {"_", "."} for part in path.split("/"))


def _base(path: str) -> str:
    return path.rsplit("/", 1)[-1]
