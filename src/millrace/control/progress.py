"""How far a run is, how fast it goes and when it will be done."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from millrace.core.facts import RunProgress
from millrace.core.messages import Phase, TaskDone
from millrace.core.ports import Clock
from millrace.decide.scheduler import RunState

__all__ = ["ProgressMeter"]

_WINDOW_S = 20.0


class ProgressMeter:
    """Counts input bytes through the phases that read input, and their rate over the last 20 s.

    Args:
        phases: Of the run.
        bytes_total: Of input; each survey reads it once more.
        workers: Shown as they are.
        clock: The time.
    """

    def __init__(self, phases: Sequence[Phase], bytes_total: int, workers: int, clock: Clock) -> None:
        self._passes = sum(1 for p in phases if p.kind in {"survey", "main"})
        self._bytes_total = bytes_total
        self._workers = workers
        self._clock = clock
        self._bytes_in_phase = 0
        self._passes_before = -1
        self._recent: deque[tuple[float, int]] = deque([(clock.monotonic_s(), 0)])
        self._bytes_here = 0
        self._published_at = float("-inf")

    def enter(self, phase: Phase) -> None:
        """A phase begins."""
        if phase.kind in {"survey", "main"}:
            self._passes_before += 1
            self._bytes_in_phase = 0

    def finished(self, event: TaskDone) -> None:
        """A task is done."""
        if event.grant.task.phase.startswith(("survey", "main")):
            self._bytes_here += event.facts.bytes_in
            self._bytes_in_phase += event.facts.bytes_in
            now = self._clock.monotonic_s()
            self._recent.append((now, self._bytes_here))
            while len(self._recent) > 2 and self._recent[0][0] < now - _WINDOW_S:
                self._recent.popleft()

    def read(self, state: RunState) -> RunProgress:
        """The progress now."""
        now = self._clock.monotonic_s()
        since, earlier = self._recent[0]
        rate = (self._bytes_here - earlier) / (now - since) if now > since else 0.0
        total = self._bytes_total * self._passes
        in_main = state.phase.kind in {"main", "persist"}
        done = state.totals.bytes_in + self._bytes_total * (self._passes - 1) if in_main else self._before()
        left = max(0, total - done)
        return RunProgress(
            phase=state.phase.name,
            done=state.done_in_phase,
            tasks=state.phase.tasks,
            bytes_done=min(done, total),
            bytes_total=total,
            rows=state.totals.rows_out,
            quarantined=state.totals.quarantined,
            bytes_per_s=rate,
            eta_s=left / rate if rate > 0 else None,
            workers=self._workers,
            at_ms=self._clock.now_ms(),
        )

    def due(self, every_s: float) -> bool:
        """Whether it is time to tell other terminals; says yes once each ``every_s``."""
        now = self._clock.monotonic_s()
        if now - self._published_at < every_s:
            return False
        self._published_at = now
        return True

    def _before(self) -> int:
        return self._bytes_total * max(0, self._passes_before) + self._bytes_in_phase
