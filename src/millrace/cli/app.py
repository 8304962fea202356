"""The ``millrace`` command: its subcommands, and how errors leave it.

Exit codes: 0 done, 1 the work failed, 2 the command or a spec was wrong, 3 refused by policy, 130 Ctrl-C.
Errors go to stderr as sentences that name the thing and the way out; with ``--json`` also as JSON on stdout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import typer

from millrace.cli.output import Output
from millrace.core.errors import MillraceError

__all__ = ["app", "main", "perform"]

T = TypeVar("T")

INTERRUPTED = 130

app = typer.Typer(
    name="millrace",
    help="Air-traffic control for ML training data: verified shards, in enough clouds, in a reproducible order.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def perform(output: Output, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a command's coroutine; an error of ours becomes its sentence and its exit code."""
    try:
        return asyncio.run(work())
    except MillraceError as error:
        output.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        output.say("interrupted")
        raise typer.Exit(INTERRUPTED) from None


def main() -> None:
    """The entry point."""
    import millrace.cli.catalog
    import millrace.cli.demo
    import millrace.cli.init
    import millrace.cli.runs  # noqa: F401

    app()
