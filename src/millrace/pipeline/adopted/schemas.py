"""One schema for all files of an adopted dataset."""

from __future__ import annotations

import pyarrow as pa

from millrace.core.errors import SourceError
from millrace.core.manifest import Encoding

__all__ = ["CommonSchema"]

_WAY_OUT = "make the files agree, or adopt them as two datasets with --include and --exclude"


class CommonSchema:
    """The schema that files added one after the other have in common.

    Tars may have different extensions: a sample without one has a null there. All else must be equal in names, order
    and types.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._first = ""
        self._fields: dict[str, pa.DataType] = {}
        self._order: list[str] = []

    def add(self, path: str, schema: pa.Schema) -> None:
        """Another file.

        Raises:
            SourceError: it differs; names it, the column, and the file it differs from.
        """
        if not self._first:
            self._first, self._order = path, list(schema.names)
            self._fields = {f.name: f.type for f in schema}
            return
        if self._encoding == "webdataset":
            self._fields.update((f.name, f.type) for f in schema)
            return
        found = {f.name: f.type for f in schema}
        for name, kind in self._fields.items():
            if name not in found:
                raise self._differs(path, f"column {name!r} is missing, but it is {kind}")
            if found[name] == kind or self._is_open(found[name]):
                continue
            if not self._is_open(kind):
                raise self._differs(path, f"column {name!r} is {found[name]}, but {kind}")
            self._fields[name] = found[name]
        extra = next((name for name in found if name not in self._fields), None)
        if extra is not None:
            raise self._differs(path, f"column {extra!r} ({found[extra]}) is there, but not")
        if list(schema.names) != self._order:
            at = next(i for i, name in enumerate(self._order) if schema.names[i] != name)
            raise self._differs(path, f"column {at + 1} is {schema.names[at]!r}, but {self._order[at]!r}")

    @property
    def schema(self) -> pa.Schema:
        """What they have in common."""
        if self._encoding == "webdataset":
            key, *extensions = self._fields
            return pa.schema([(name, self._fields[name]) for name in (key, *sorted(extensions))])
        return pa.schema([(name, self._fields[name]) for name in self._order])

    def _is_open(self, kind: pa.DataType) -> bool:
        """Whether an MDS shard of no samples couldn't tell."""
        return self._encoding == "mds" and bool(pa.types.is_null(kind))

    def _differs(self, path: str, what: str) -> SourceError:
        return SourceError(f"{path}: {what} in {self._first}; {_WAY_OUT}")
