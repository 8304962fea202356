"""Formats by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from millrace.core.errors import UsageError
from millrace.pipeline.formats.arrow import ARROW
from millrace.pipeline.formats.csv import CSV
from millrace.pipeline.formats.files import FILES
from millrace.pipeline.formats.jsonl import JSONL
from millrace.pipeline.formats.lines import LINES
from millrace.pipeline.formats.mds import MDS
from millrace.pipeline.formats.parquet import PARQUET
from millrace.pipeline.formats.text import TEXT
from millrace.pipeline.formats.webdataset import WEBDATASET
from millrace.pipeline.records import Format

__all__ = ["FORMATS", "format_named"]

FORMATS: Final[Mapping[str, Format]] = {
    form.name: form for form in (TEXT, LINES, JSONL, CSV, PARQUET, ARROW, WEBDATASET, MDS, FILES)
}


def format_named(name: str) -> Format:
    """The format that a spec calls ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}; there are {', '.join(sorted(FORMATS))}")
    return FORMATS[name]
