"""From a pipeline file to a plan: what would be done, and what policy refuses."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from millrace.core.errors import PolicyRefused, SpecError
from millrace.core.facts import Lineage
from millrace.core.messages import Phase
from millrace.core.spec import Pipeline
from millrace.core.specfile import locate
from millrace.decide.placement import Refusal, refusals
from millrace.decide.scheduler import SchedulerRules
from millrace.pipeline.plan import Plan, plan_sources
from millrace.pipeline.process import Chain, count_barriers
from millrace.wiring.lineage import identity_of, lineage_of
from millrace.wiring.world import OpenWorld, folder_of, open_sources, read_pipeline

__all__ = ["Planned", "check_policy", "compile_chains", "make_plan", "on_path"]

_BYTES_A_PARTITION = 4_000_000_000
_PARTITIONS_MAX = 256


@dataclass(frozen=True)
class Planned:
    """All that is known before a run begins.

    Attributes:
        file: The pipeline file.
        refused: Rules that can't be met; a run with any is not begun.
        partitions: Into how many parts the keys of a ``dedup`` or ``unique`` are divided.
    """

    file: Path
    pipeline: Pipeline
    plan: Plan
    lineage: Lineage
    identity: str
    refused: tuple[Refusal, ...]
    partitions: int

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The run's phases: two for each barrier, then main and persist."""
        before = [
            phase
            for barrier in range(count_barriers(self.pipeline.transforms))
            for phase in (Phase("survey", barrier, len(self.plan)), Phase("resolve", barrier, self.partitions))
        ]
        return (*before, Phase("main", 0, len(self.plan)), Phase("persist", 0, 1))

    def rules(self, order_seed: int | None) -> SchedulerRules:
        """What the scheduler goes by."""
        return SchedulerRules(
            attempts=self.pipeline.attempts,
            quarantine_share=self.pipeline.quarantine.limit,
            quarantine_chunks=self.pipeline.quarantine.chunks,
            bytes_total=self.plan.total_bytes,
            order_seed=order_seed,
        )


async def make_plan(world: OpenWorld, file: Path, *, progress: Callable[[int], None] | None = None) -> Planned:
    """Read the pipeline file, list its sources, cut them and ask policy. Moves nothing.

    Raises:
        UsageError, SpecError: the file, a source or a transform is wrong.
        SourceError: a source can't be listed or isn't what its format says.
    """
    pipeline, base = read_pipeline(file), folder_of(file)
    on_path(base)
    refused = refusals(world.sites, pipeline.placement)
    sources = open_sources(pipeline, base)
    try:
        plan = await plan_sources(pipeline, sources, progress=progress)
    finally:
        for store in sources:
            await store.aclose()
    _check_transforms(pipeline, plan, file)
    lineage = lineage_of(pipeline, plan, base)
    return Planned(
        file=file,
        pipeline=pipeline,
        plan=plan,
        lineage=lineage,
        identity=identity_of(lineage),
        refused=refused,
        partitions=max(1, min(_PARTITIONS_MAX, plan.total_bytes // _BYTES_A_PARTITION)),
    )


def check_policy(planned: Planned) -> None:
    """Refuse what policy refuses, before a byte moves.

    Raises:
        PolicyRefused: names every rule that can't be met.
    """
    if planned.refused:
        raise PolicyRefused("\n".join(r.sentence for r in planned.refused), rule=planned.refused[0].rule)


def compile_chains(pipeline: Pipeline, plan: Plan, base: Path) -> list[Chain | None]:
    """The transforms, compiled for each source's schema.

    Raises:
        SpecError, TransformError: one can't be compiled; names it.
    """
    if not pipeline.transforms:
        return [None for _ in pipeline.sources]
    # A module of the user's that prints as it is imported must not write into our results.
    with contextlib.redirect_stdout(sys.stderr):
        return [Chain.build(pipeline.transforms, base=base, schema=schema) for schema in plan.source_schemas]


def _check_transforms(pipeline: Pipeline, plan: Plan, file: Path) -> None:
    """Compile the transforms once here, so that what is wrong with them is known before anything is begun."""
    try:
        chains = compile_chains(pipeline, plan, folder_of(file))
    except SpecError as error:
        field, separator, sentence = str(error).partition(": ")
        if not separator or not field.startswith("transforms."):
            raise
        line = locate(file.read_text(encoding="utf-8"), field)
        raise SpecError(f"{file}:{line}: {field}: {sentence}") from error
    for chain in chains:
        if chain is not None:
            chain.close()


def on_path(base: Path) -> None:
    """Let transform modules beside the pipeline file be imported."""
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
