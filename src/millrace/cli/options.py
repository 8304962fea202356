"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["JsonOption", "PipelineArgument", "RunArgument", "WorldOption"]

WorldOption = Annotated[
    Path | None,
    typer.Option("--world", "-w", help="The world file. Default: $MILLRACE_WORLD, or world.yaml here or above."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, for scripts.")]
PipelineArgument = Annotated[Path, typer.Argument(help="The pipeline file.")]
RunArgument = Annotated[int, typer.Argument(help="The run's id, as `millrace runs` shows it.")]
