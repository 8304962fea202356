"""What a command says: tables and sentences for people, one JSON document for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from millrace.core.errors import MillraceError

__all__ = ["Output"]


class Output:
    """Where a command's words go.

    Results go to stdout, progress and errors to stderr. With ``as_json`` stdout gets one document and nothing else.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    @property
    def live(self) -> bool:
        """Whether to draw a live view: on a terminal, not for scripts."""
        return self.err.is_terminal and not self.as_json

    def say(self, sentence: str) -> None:
        """A sentence on the way, to stderr."""
        self.err.print(Text(sentence))

    def line(self, text: str, style: str = "") -> None:
        """A line of the result; nothing with ``as_json``."""
        if not self.as_json:
            self.out.print(Text(text, style=style))

    def document(self, value: Any) -> None:
        """The result for a script; nothing without ``as_json``."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
        """A table of the result; nothing with ``as_json``."""
        if self.as_json:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(str(cell)) for cell in row))
        self.out.print(table)

    def error(self, error: MillraceError) -> None:
        """An error of ours: its sentence to stderr, and its kind for scripts."""
        for sentence in str(error).splitlines():
            self.err.print(Text.assemble(("error: ", "bold red"), sentence))
        self.document({"error": {"kind": error.kind, "message": str(error), "exit_code": error.exit_code}})
