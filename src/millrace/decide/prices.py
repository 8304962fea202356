"""What it costs to read data out of a site: published list prices, each with where it is from and how sure it is.

Only what leaves a cloud over the internet, at the first paid tier, and what moves between regions of one cloud.
Tiers, waivers and volumes come with the price book.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["EgressPrice", "egress_price"]


@dataclass(frozen=True, slots=True)
class EgressPrice:
    """Dollars a GB (10^9 bytes) that leaves a site.

    Attributes:
        dollars: A GB.
        as_of: Year and month of the list price, or ``undated``.
        confidence: How sure it is.
    """

    dollars: float
    as_of: str
    confidence: Literal["high", "medium", "low"]


_FREE: Final = EgressPrice(0.0, "2026-01", "high")
_INTERNET: Final = {
    "aws": EgressPrice(0.09, "2023-04", "high"),
    "gcp": EgressPrice(0.12, "2026-09", "high"),
    "azure": EgressPrice(0.087, "2026-01", "medium"),
    "ibm": EgressPrice(0.09, "undated", "low"),
}
_REGIONS: Final = {
    "aws": EgressPrice(0.02, "2023-04", "high"),
    "gcp": EgressPrice(0.02, "2024-06", "high"),
    "azure": EgressPrice(0.02, "2024-01", "medium"),
    "ibm": EgressPrice(0.0, "undated", "low"),
}


def egress_price(cloud: str, region: str, here: str | None) -> EgressPrice | None:
    """What a GB costs that is read in a site from here.

    Args:
        cloud: The store's.
        region: The store's.
        here: ``cloud/region`` of the reader; None when it isn't known, which counts as outside of every cloud.

    Returns:
        None for clouds without a list price (``onprem``, or any other name).
    """
    own_cloud, _, own_region = (here or "").partition("/")
    if (cloud, region) == (own_cloud, own_region):
        return _FREE
    return (_REGIONS if cloud == own_cloud else _INTERNET).get(cloud)
