"""What ``millrace plan`` shows: computed from the plan and the policy, without touching a store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from millrace.core.model import digest_of
from millrace.core.units import count, format_bytes
from millrace.decide.placement import Refusal, place
from millrace.wiring.planning import Planned
from millrace.wiring.world import OpenWorld

__all__ = ["PlanSummary", "StoreShare", "summarise"]

_SAMPLES = 1000


@dataclass(frozen=True, slots=True)
class StoreShare:
    """What one store would get.

    Attributes:
        share: Of all replicas, 0 to 1, found by placing 1,000 made-up digests.
        bytes: If the output is as large as the input.
    """

    cloud: str
    store: str
    jurisdiction: str
    share: float
    bytes: int


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a run would do."""

    dataset: str
    sources: tuple[str, ...]
    objects: int
    bytes_in: int
    chunks: int
    phases: tuple[str, ...]
    stores: tuple[StoreShare, ...]
    refused: tuple[Refusal, ...]
    identity: str
    note: str

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def summarise(world: OpenWorld, planned: Planned) -> PlanSummary:
    """Put the plan into numbers."""
    policy = planned.pipeline.placement
    counts = dict.fromkeys((s.name for s in world.sites), 0)
    if not planned.refused:
        for i in range(_SAMPLES):
            for site in place(digest_of(str(i).encode()), world.sites, policy, near=world.near):
                counts[site.name] += 1
    total = planned.plan.total_bytes
    stores = tuple(
        StoreShare(
            cloud=site.cloud,
            store=site.name,
            jurisdiction=site.jurisdiction,
            share=counts[site.name] / (_SAMPLES * policy.replicas),
            bytes=total * counts[site.name] // _SAMPLES,
        )
        for site in world.sites
        if counts[site.name]
    )
    return PlanSummary(
        dataset=planned.pipeline.dataset,
        sources=tuple(
            f"{s['url']} as {s['format']}: {count(s['objects'], 'object')}, {format_bytes(s['bytes'])}"
            for s in planned.lineage.sources
        ),
        objects=planned.plan.total_objects,
        bytes_in=total,
        chunks=len(planned.plan),
        phases=tuple(f"{p.name} ({p.tasks})" for p in planned.phases),
        stores=stores,
        refused=planned.refused,
        identity=planned.identity,
        note=f"{policy.replicas} replicas in at least {policy.min_clouds} clouds",
    )
