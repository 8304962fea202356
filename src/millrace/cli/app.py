"""The ``millrace`` command: its subcommands, and how errors leave it.

Exit codes: 0 done, 1 the work failed, 2 the command or a spec was wrong, 3 refused by policy, 130 Ctrl-C.
Errors go to stderr as sentences that name the thing and the way out; with ``--json`` also as JSON on stdout.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import typer

from millrace.cli.output import Output
from millrace.core.errors import MillraceError

__all__ = ["app", "main", "perform", "perform_now"]

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


def perform(output: Output, work: Callable[[], Coroutine[Any, Any, T]], *, interrupted: str = "interrupted") -> T:
    """Run a command's coroutine; an error of ours becomes its sentence and its exit code.

    Args:
        output: Where the sentence goes.
        work: The command.
        interrupted: What to say when Ctrl-C or SIGTERM ended it.
    """
    return perform_now(output, lambda: asyncio.run(work()), interrupted=interrupted)


def perform_now(output: Output, work: Callable[[], T], *, interrupted: str = "interrupted") -> T:
    """The same for a command that isn't a coroutine."""
    try:
        with _terminated_like_interrupted():
            return work()
    except MillraceError as error:
        output.error(error)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        output.say(interrupted)
        raise typer.Exit(INTERRUPTED) from None


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, as supervisors send it, ends a command as Ctrl-C does: what it holds is let go of."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """The entry point."""
    try:
        import millrace.cli.adopt
        import millrace.cli.catalog
        import millrace.cli.checkpoints
        import millrace.cli.demo
        import millrace.cli.feed
        import millrace.cli.init
        import millrace.cli.runs  # noqa: F401
    except KeyboardInterrupt:  # the libraries take a second to load
        sys.exit(INTERRUPTED)

    app()
