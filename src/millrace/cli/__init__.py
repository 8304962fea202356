"""The command line."""

from __future__ import annotations

from millrace.cli.app import main

__all__ = ["main"]
