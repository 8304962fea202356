"""Wrappers of one signature: each takes a store and is one. ``docs/design/stores.md`` says why in which order."""

from millrace.stores.layers.fault import Fault, FaultPlan, FaultRates
from millrace.stores.layers.layer import Layer, Op
from millrace.stores.layers.limit import Limit
from millrace.stores.layers.metrics import Metrics
from millrace.stores.layers.retry import Retry, RetryPlan
from millrace.stores.layers.timeout import Timeout, TimeoutPlan

__all__ = [
    "Fault",
    "FaultPlan",
    "FaultRates",
    "Layer",
    "Limit",
    "Metrics",
    "Op",
    "Retry",
    "RetryPlan",
    "Timeout",
    "TimeoutPlan",
]
