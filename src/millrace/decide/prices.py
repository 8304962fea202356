"""What it costs to read data out of a site: published list prices, each with where it is from and how sure it is.

Only what leaves a cloud over the internet, at the first paid tier, and what moves between regions of one cloud.
Tiers, waivers and volumes come with the price book.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["EgressPrice", "egress_price"]

Part = Literal["america", "europe", "asia", "south"]


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
_INTERNET: Final[Mapping[str, EgressPrice]] = {
    "aws": EgressPrice(0.09, "2023-04", "high"),
    "gcp": EgressPrice(0.12, "2026-09", "high"),
    "azure": EgressPrice(0.087, "2026-01", "medium"),
    "ibm": EgressPrice(0.09, "undated", "low"),
}
_AWS_INTERNET: Final[Mapping[str, float]] = {
    "ap-northeast-1": 0.114,
    "ap-southeast-2": 0.114,
    "ap-south-1": 0.1093,
    "ap-southeast-1": 0.12,
    "sa-east-1": 0.15,
}
_AWS_REGIONS: Final[Mapping[str, float]] = {
    "ap-south-1": 0.086,
    "ap-northeast-1": 0.09,
    "ap-southeast-1": 0.09,
    "ap-southeast-2": 0.098,
    "sa-east-1": 0.138,
}
_AWS_PAIR: Final = frozenset({"us-east-1", "us-east-2"})
_AZURE_INTERNET: Final[Mapping[Part, float]] = {"asia": 0.12, "south": 0.181}
# What names of regions contain. The others are in North America.
_PARTS: Final[Mapping[str, Mapping[Part, tuple[str, ...]]]] = {
    "gcp": {"europe": ("europe-",), "asia": ("asia-", "australia-"), "south": ("southamerica-",)},
    "azure": {
        "europe": (
            *("europe", "uk", "france", "germany", "norway", "sweden", "switzerland", "poland", "italy", "spain"),
            *("austria", "belgium", "denmark", "finland", "greece"),
        ),
        "asia": ("asia", "japan", "korea", "india", "australia", "newzealand", "africa", "uae", "qatar", "israel"),
        "south": ("brazil", "chile"),
    },
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
    internet = _INTERNET.get(cloud)
    if internet is None:
        return None
    if cloud == own_cloud:
        return _between(cloud, region, own_region)
    if cloud == "aws":
        return EgressPrice(_AWS_INTERNET.get(region, internet.dollars), internet.as_of, internet.confidence)
    if cloud == "azure":
        dollars = _AZURE_INTERNET.get(_part(cloud, region), internet.dollars)
        return EgressPrice(dollars, internet.as_of, internet.confidence)
    return internet


def _between(cloud: str, store: str, reader: str) -> EgressPrice:
    """From one region of a cloud to another."""
    if cloud == "ibm":
        return EgressPrice(0.0, "undated", "low")
    if cloud == "aws":
        if {store, reader} == _AWS_PAIR:
            return EgressPrice(0.01, "2023-04", "high")
        return EgressPrice(_AWS_REGIONS.get(store, 0.02), "2023-04", "high")
    parts = {_part(cloud, store), _part(cloud, reader)}
    if cloud == "gcp":
        dollars = 0.14 if "south" in parts else 0.08 if "asia" in parts else 0.05 if len(parts) > 1 else 0.02
        return EgressPrice(dollars, "2024-06", "high")
    if _part(cloud, store) == "south":  # no price between regions is known: that of the internet, which is more
        return EgressPrice(_AZURE_INTERNET["south"], "2026-01", "low")
    dollars = 0.08 if _part(cloud, store) == "asia" else 0.05 if len(parts) > 1 else 0.02
    return EgressPrice(dollars, "2024-01", "medium")


def _part(cloud: str, region: str) -> Part:
    for part, words in _PARTS[cloud].items():
        if any(word in region for word in words):
            return part
    return "america"
