"""Finding the records that a batch fails for: halve it until they stand alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from millrace.core.errors import TransformError
from millrace.pipeline.process.rows import Rows

__all__ = ["Isolated", "RecordFault", "isolate"]

T = TypeVar("T")


class RecordFault(Exception):
    """A call failed for some record among those it was given. Never leaves this package.

    Attributes:
        reason: One sentence.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Isolated(Generic[T]):
    """What came of a batch.

    Attributes:
        results: Of the pieces that went well, in order.
        faults: The single records that fail, in order, with the reason.
    """

    results: list[T] = field(default_factory=list)
    faults: list[tuple[Rows, str]] = field(default_factory=list)


def isolate(rows: Rows, attempt: Callable[[Rows], T], *, label: str) -> Isolated[T]:
    """Call ``attempt`` on the batch; where it raises ``RecordFault``, on ever smaller halves.

    A batch of n rows with k bad ones costs about ``2 k log2(n)`` calls.

    Raises:
        TransformError: a failure of several records does not happen to any of them alone.
    """
    found: Isolated[T] = Isolated()
    _isolate(rows, attempt, label, found)
    return found


def _isolate(rows: Rows, attempt: Callable[[Rows], T], label: str, found: Isolated[T]) -> None:
    try:
        found.results.append(attempt(rows))
    except RecordFault as fault:
        if rows.count == 1:
            found.faults.append((rows, fault.reason))
            return
        before = len(found.faults)
        half = rows.count // 2
        _isolate(rows.slice(0, half), attempt, label, found)
        _isolate(rows.slice(half, rows.count - half), attempt, label, found)
        if len(found.faults) == before:
            raise TransformError(
                f"{label} failed on {rows.count} records together ({fault.reason}) and on none of them alone; "
                "a transform must treat each record on its own"
            ) from fault
