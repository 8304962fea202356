"""Prices of reading: the published ones, free where it is, none where nobody publishes one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.decide.prices import egress_price

REGIONS = {
    "aws": ["us-east-1", "us-east-2", "us-west-2", "eu-central-1", "ap-northeast-1", "sa-east-1"],
    "gcp": ["us-central1", "northamerica-northeast1", "europe-west1", "asia-east1", "southamerica-east1"],
    "azure": ["eastus", "westeurope", "uksouth", "japaneast", "brazilsouth", "canadacentral"],
    "ibm": ["us-south", "eu-de"],
    "onprem": ["lab"],
}
SITES = [(cloud, region) for cloud, regions in REGIONS.items() for region in regions]


@pytest.mark.parametrize(
    ("cloud", "region", "here", "dollars"),
    [
        ("aws", "us-east-1", None, 0.09),
        ("aws", "us-east-1", "gcp/us-central1", 0.09),
        ("aws", "us-east-1", "onprem/lab", 0.09),
        ("aws", "sa-east-1", None, 0.15),
        ("aws", "ap-southeast-1", "azure/eastus", 0.12),
        ("aws", "us-east-1", "aws/eu-central-1", 0.02),
        ("aws", "us-east-2", "aws/us-east-1", 0.01),
        ("aws", "us-east-2", "aws/us-west-2", 0.02),
        ("aws", "ap-south-1", "aws/us-east-1", 0.086),
        ("aws", "us-east-1", "aws/ap-south-1", 0.02),
        ("gcp", "asia-east1", None, 0.12),
        ("gcp", "us-central1", "gcp/northamerica-northeast1", 0.02),
        ("gcp", "europe-west1", "gcp/europe-west4", 0.02),
        ("gcp", "us-central1", "gcp/europe-west1", 0.05),
        ("gcp", "us-central1", "gcp/australia-southeast1", 0.08),
        ("gcp", "asia-east1", "gcp/southamerica-east1", 0.14),
        ("azure", "westeurope", None, 0.087),
        ("azure", "southeastasia", None, 0.12),
        ("azure", "brazilsouth", "aws/sa-east-1", 0.181),
        ("azure", "eastus", "azure/canadacentral", 0.02),
        ("azure", "westeurope", "azure/uksouth", 0.02),
        ("azure", "eastus", "azure/westeurope", 0.05),
        ("azure", "japaneast", "azure/eastus", 0.08),
        ("azure", "brazilsouth", "azure/eastus", 0.181),
        ("ibm", "us-south", None, 0.09),
        ("ibm", "us-south", "ibm/eu-de", 0.0),
    ],
)
def test_the_list(cloud: str, region: str, here: str | None, dollars: float) -> None:
    price = egress_price(cloud, region, here)
    assert price is not None
    assert price.dollars == dollars


@given(site=st.sampled_from(SITES), here=st.sampled_from([None, "", "nowhere", *("/".join(s) for s in SITES)]))
def test_what_holds_everywhere(site: tuple[str, str], here: str | None) -> None:
    price = egress_price(*site, here)
    if here == "/".join(site):
        assert price is not None
        assert price.dollars == 0.0
    elif site[0] == "onprem":
        assert price is None
    else:
        assert price is not None
        assert 0 <= price.dollars <= 0.2
        assert price.as_of == "undated" or len(price.as_of) == len("2026-01")
        outside = egress_price(*site, None)
        assert outside is not None
        assert price.dollars <= outside.dollars or site[0] == "gcp"  # between far regions that one is dearer


def test_clouds_nobody_prices() -> None:
    assert egress_price("onprem", "lab", "aws/us-east-1") is None
    assert egress_price("anywhere", "anywhere", None) is None
    free = egress_price("onprem", "lab", "onprem/lab")
    assert free is not None
    assert free.dollars == 0.0
