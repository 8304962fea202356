"""What Prometheus is told. Every metric is registered in a registry that is passed in."""

from __future__ import annotations

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram

__all__ = ["StoreMetrics"]

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class StoreMetrics:
    """Calls of stores, by store name and method. Make one for each registry.

    - ``millrace_store_seconds{store,op}``: a histogram; its ``_count`` is the number of calls, failed ones too;
    - ``millrace_store_errors_total{store,op,kind}``: calls that failed, by the error's kind or ``Cancelled``;
    - ``millrace_store_retries_total{store,op,kind}``: attempts that failed and were made again;
    - ``millrace_store_bytes_total{store,direction}``: ``read`` and ``written``.

    Args:
        registry: Where the metrics are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "millrace_store_seconds",
            "Seconds a store's call took, retries included.",
            ("store", "op"),
            buckets=_SECONDS,
            registry=registry,
        )
        self._errors = Counter(
            "millrace_store_errors", "Calls of a store that failed.", ("store", "op", "kind"), registry=registry
        )
        self._retries = Counter(
            "millrace_store_retries", "Attempts that were made again.", ("store", "op", "kind"), registry=registry
        )
        self._bytes = Counter(
            "millrace_store_bytes", "Bytes through a store.", ("store", "direction"), registry=registry
        )

    def done(self, store: str, op: str, seconds: float) -> None:
        """A call succeeded."""
        self._seconds.labels(store, op).observe(seconds)

    def failed(self, store: str, op: str, kind: str, seconds: float) -> None:
        """A call failed."""
        self._seconds.labels(store, op).observe(seconds)
        self._errors.labels(store, op, kind).inc()

    def retried(self, store: str, op: str, kind: str) -> None:
        """An attempt failed and will be made again."""
        self._retries.labels(store, op, kind).inc()

    def moved(self, store: str, direction: Literal["read", "written"], size_bytes: int) -> None:
        """Bytes went through."""
        if size_bytes:
            self._bytes.labels(store, direction).inc(size_bytes)
