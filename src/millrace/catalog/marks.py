"""The marks: objects that nobody named when a collection looked, and since when, in pages of coordination keys.

A header at ``gc/marks`` says how many pages there are; it is taken away before the pages are written and put back
after them, so that a collection that dies in between leaves no marks rather than some of two kinds.
"""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from millrace.catalog.versions import entries
from millrace.core.errors import CoordError
from millrace.core.keys import GC_MARKS
from millrace.core.ports import Coordination, Lease, Write

__all__ = ["load_marks", "store_marks"]

_PAGE_MARKS: Final = 16_384
"""33 bytes each, 0.7 MB in base64."""
_MARK_BYTES: Final = 33
_DELETES_AT_ONCE: Final = 100


async def load_marks(coord: Coordination) -> dict[bytes, int]:
    """When each object was first found to be unnamed: one letter for its kind and 32 bytes of digest, to the time.

    Raises:
        CoordError: a page can't be read; names it.
    """
    marks: dict[bytes, int] = {}
    if await coord.get(GC_MARKS) is None:
        return marks
    async for entry in entries(coord, f"{GC_MARKS}/", page=8):
        try:
            page = json.loads(entry.value)
            since_ms, packed = int(page["since_ms"]), base64.b64decode(page["objects"], validate=True)
        except (ValueError, KeyError, TypeError) as error:
            raise CoordError(f"the record at {entry.key} is not a page of marks: {error}") from error
        for i in range(0, len(packed), _MARK_BYTES):
            marks[packed[i : i + _MARK_BYTES]] = since_ms
    return marks


async def store_marks(coord: Coordination, marks: Mapping[bytes, int], *, at_ms: int, guard: Lease) -> None:
    """Replace all marks.

    Raises:
        Fenced: ``guard`` does not stand.
    """
    await coord.commit([Write(GC_MARKS, None)], guard=guard)
    by_time: dict[int, list[bytes]] = defaultdict(list)
    for mark, since_ms in marks.items():
        by_time[since_ms].append(mark)
    pages = 0
    for since_ms in sorted(by_time):
        group = sorted(by_time[since_ms])
        for i in range(0, len(group), _PAGE_MARKS):
            packed = base64.b64encode(b"".join(group[i : i + _PAGE_MARKS])).decode()
            value = json.dumps({"since_ms": since_ms, "objects": packed}).encode()
            await coord.commit([Write(_page_key(pages), value)], guard=guard)
            pages += 1
    stale = [e.key async for e in entries(coord, f"{GC_MARKS}/", page=8) if e.key >= _page_key(pages)]
    for i in range(0, len(stale), _DELETES_AT_ONCE):
        await coord.commit([Write(key, None) for key in stale[i : i + _DELETES_AT_ONCE]], guard=guard)
    await coord.commit([Write(GC_MARKS, json.dumps({"at_ms": at_ms, "pages": pages}).encode())], guard=guard)


def _page_key(page: int) -> str:
    return f"{GC_MARKS}/{page:06d}"
