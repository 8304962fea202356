"""What a worker process builds when it starts: the same objects, from the same files."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from millrace.agent.tasks import Deadline, TaskContext, TaskRunner
from millrace.core.model import Digest, StoreSite
from millrace.core.spec import Pipeline, Placement, World
from millrace.decide.placement import place
from millrace.pipeline.distribute import Place
from millrace.pipeline.plan import Plan
from millrace.wiring.clock import SystemClock
from millrace.wiring.memory import settle_memory
from millrace.wiring.planning import compile_chains, on_path
from millrace.wiring.world import folder_of, open_sources, open_stores, open_work

__all__ = ["Setup", "placer"]


def placer(sites: Sequence[StoreSite], policy: Placement, near: str | None) -> Place:
    """The placement decision with everything but the object filled in."""

    def decide(digest: Digest, keep: Collection[str], without: Collection[str]) -> Sequence[str]:
        return [s.name for s in place(digest, sites, policy, near=near, keep=keep, without=without)]

    return decide


@dataclass(frozen=True)
class Setup:
    """Builds a ``TaskRunner``; picklable, so that a spawned process can.

    Attributes:
        world_file: For the folder that relative URLs start from.
        pipeline_file: For the folder that transform modules lie in.
        plan_file: The encoded plan; a file, because it may be large.

    """

    run: int
    node: str
    world: World
    world_file: Path
    pipeline: Pipeline
    pipeline_file: Path
    plan_file: Path
    partitions: int

    @contextlib.contextmanager
    def __call__(self, deadline: Deadline) -> Iterator[TaskRunner]:
        """The runner; its stores are closed by the process's end."""
        settle_memory()
        base = folder_of(self.pipeline_file)
        world_base = folder_of(self.world_file)
        on_path(base)
        plan = Plan.decode(self.plan_file.read_bytes())
        near = self.world.here.partition("/")[0] if self.world.here else None
        yield TaskRunner(
            TaskContext(
                run=self.run,
                node=self.node,
                pipeline=self.pipeline,
                plan=plan,
                chains=compile_chains(self.pipeline, plan, base),
                partitions=self.partitions,
                sources=open_sources(self.pipeline, base),
                stores=open_stores(self.world, world_base),
                work=open_work(world_base / self.world.state),
                place=placer(self.world.sites(), self.pipeline.placement, near),
                clock=SystemClock(),
                deadline=deadline,
            )
        )
