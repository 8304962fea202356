"""Where replicas go: weighted rendezvous hashing under a policy that is a wall.

Each store gets a score for each digest, from a hash of both and the store's weight; the best legal ones win.
Adding or losing a store moves only the replicas that must move. (Thaler and Ravishankar 1998 for rendezvous
hashing; Schindelhauer and Schomaker 2005 for the logarithmic weights.)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from millrace.core.errors import PolicyRefused
from millrace.core.model import Digest, StoreSite
from millrace.core.spec import Placement

__all__ = ["Refusal", "legal", "place", "refusals", "score"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rule that can't be kept, and the stores that stand in the way.

    Attributes:
        rule: As the spec calls it: ``replicas``, ``min_clouds``, ``allow``, ``deny``.
        sentence: What is wrong and the way out.
    """

    rule: str
    sentence: str


def legal(site: StoreSite, policy: Placement) -> Refusal | None:
    """Why this store may hold nothing of a dataset under ``policy``; None if it may.

    Every path a byte can take asks here: planning, copying, repairing, exporting manifests.
    """
    if site.jurisdiction in policy.deny:
        return Refusal("deny", f"{site.name} lies in {site.jurisdiction}, which placement.deny forbids")
    if policy.allow is not None and site.jurisdiction not in policy.allow:
        allowed = ", ".join(policy.allow) or "nothing"
        return Refusal("allow", f"{site.name} lies in {site.jurisdiction}; placement.allow permits {allowed}")
    return None


def refusals(sites: Iterable[StoreSite], policy: Placement) -> tuple[Refusal, ...]:
    """Every rule that can't be met with these stores. Empty when placement is possible."""
    everything = list(sites)
    barred = [r for s in everything if (r := legal(s, policy)) is not None]
    allowed = [s for s in everything if legal(s, policy) is None]
    names = ", ".join(s.name for s in allowed) or "none"
    why = f" ({'; '.join(r.sentence for r in barred)})" if barred else ""
    found: list[Refusal] = []
    if len(allowed) < policy.replicas:
        found.append(
            Refusal(
                "replicas",
                f"placement.replicas is {policy.replicas} but policy permits "
                f"{_count(len(allowed), 'store')}: {names}{why}; "
                f"add stores to the world or ask for fewer replicas",
            )
        )
    clouds = sorted({s.cloud for s in allowed})
    if len(clouds) < policy.min_clouds:
        found.append(
            Refusal(
                "min_clouds",
                f"placement.min_clouds is {policy.min_clouds} but the permitted stores are in "
                f"{_count(len(clouds), 'cloud')}: "
                f"{', '.join(clouds) or 'none'}{why}; add a store in another cloud or lower min_clouds",
            )
        )
    return tuple(found)


def score(digest: Digest, site: StoreSite) -> float:
    """How much a store wants an object: the smaller, the more. Exponential with rate ``weight``."""
    h = hashlib.sha256(f"{digest}\0{site.name}".encode()).digest()
    uniform = (int.from_bytes(h[:8], "big") + 0.5) / 2.0**64
    return -math.log(uniform) / site.weight


def place(
    digest: Digest,
    sites: Sequence[StoreSite],
    policy: Placement,
    *,
    near: str | None = None,
    keep: Collection[str] = (),
    without: Collection[str] = (),
) -> tuple[StoreSite, ...]:
    """The stores that should hold ``digest``: exactly ``policy.replicas`` of them, the best first.

    Args:
        digest: What is placed.
        sites: Every store there is, in any order.
        policy: Replicas, clouds and residency.
        near: A cloud that gets the first replica if policy lets it.
        keep: Names of stores that hold it already and are preferred: what is legal of them stays.
        without: Names of stores that can't be used now.

    Raises:
        PolicyRefused: it can't be done within the rules; names the rule and the stores.
    """
    usable = [s for s in sites if s.name not in without]
    found = refusals(usable, policy)
    if found:
        out = f" ({', '.join(sorted(without))} can't be used now)" if without else ""
        raise PolicyRefused(f"{found[0].sentence}{out}", rule=found[0].rule)
    ranked = sorted(
        (s for s in usable if legal(s, policy) is None),
        key=lambda s: (s.name not in keep, score(digest, s), s.name),
    )
    first = next((s for s in ranked if s.cloud == near), None)
    if first is not None:
        # Only the first replica is drawn to the near cloud; the others are free of it.
        ranked = [first, *(s for s in ranked if s is not first)]
    return _spread(ranked, policy)


def _spread(ranked: Sequence[StoreSite], policy: Placement) -> tuple[StoreSite, ...]:
    """The first ``replicas`` of ``ranked`` that still let ``min_clouds`` be reached."""
    chosen: list[StoreSite] = []
    clouds: set[str] = set()
    for site in ranked:
        if len(chosen) == policy.replicas:
            break
        missing_clouds = policy.min_clouds - len(clouds | {site.cloud})
        slots_left = policy.replicas - len(chosen) - 1
        if slots_left >= missing_clouds:
            chosen.append(site)
            clouds.add(site.cloud)
    return tuple(chosen)


def _count(n: int, noun: str) -> str:
    return f"only {n} {noun}" if n == 1 else f"only {n} {noun}s" if n else f"no {noun}"
