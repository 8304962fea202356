"""Peak memory of a process and all that descend from it, sampled from /proc.

Resident sets are summed every 20 ms. A page that several processes share would then count several times, so at
each new high (and every two seconds anyhow) the proportional set size is read as well: it counts a shared page
once. All of that takes a few percent of a core, from every contestant alike. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryPeak", "TreeWatch", "adopt_orphans", "descendants"]

_EVERY_S = 0.02
_PSS_EVERY_S = 0.1
"""At a new high, not sooner than this after the last look: walking a gigabyte's pages takes some 30 ms."""
_PSS_ANYHOW_EVERY_S = 2.0
_NEW_HIGH = 1.01
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class MemoryPeak:
    """The highest moment of a process tree, in MB of 1,000,000 bytes.

    Attributes:
        pss_mb: Proportional set size, summed: what the tree really held.
        anonymous_mb, mapped_mb: Its two parts at that moment: private memory, and pages of files or shared memory.
        rss_mb: The highest sum of resident sets; shared pages count once for each process.
        processes: The most there were at once.
    """

    pss_mb: float
    anonymous_mb: float
    mapped_mb: float
    rss_mb: float
    processes: int


def adopt_orphans() -> None:
    """Let grandchildren whose parent ends become children of this process, so that none is overlooked."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class _Tree:
    """Which processes descend from this one."""

    def __init__(self) -> None:
        self._root = os.getpid()
        self._inside: dict[int, bool] = {self._root: True}

    def members(self) -> list[int]:
        there = {int(name) for name in os.listdir("/proc") if name.isdigit()}
        for pid in self._inside.keys() - there:
            del self._inside[pid]
        for pid in sorted(there - self._inside.keys()):  # a process is judged once, when it is first seen
            self._judge(pid)
        return [pid for pid, inside in self._inside.items() if inside and pid != self._root]

    def _judge(self, pid: int) -> bool:
        known = self._inside.get(pid)
        if known is None:
            parent = _parent(pid)
            known = parent > 0 and self._judge(parent)
            self._inside[pid] = known
        return known


def descendants() -> list[int]:
    """The living processes that descend from this one."""
    return _Tree().members()


class TreeWatch:
    """Watches this process's descendants until ``stop``. Start the process to measure after it."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._pss = self._anonymous = self._rss = 0
        self._processes = 0
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)
        self._thread.start()

    def stop(self) -> MemoryPeak:
        """The peak since the start."""
        self._ended.set()
        self._thread.join()
        mapped = self._pss - self._anonymous
        return MemoryPeak(self._pss / 1e6, self._anonymous / 1e6, mapped / 1e6, self._rss / 1e6, self._processes)

    def _watch(self) -> None:
        tree = _Tree()
        page = os.sysconf("SC_PAGE_SIZE")
        looked_at_s, looked_at_rss = 0.0, 0
        while not self._ended.wait(_EVERY_S):
            members = tree.members()
            rss = sum(_resident_pages(pid) for pid in members) * page
            self._rss = max(self._rss, rss)
            self._processes = max(self._processes, len(members))
            now = time.monotonic()
            since_s = now - looked_at_s
            if (rss > looked_at_rss * _NEW_HIGH and since_s > _PSS_EVERY_S) or since_s > _PSS_ANYHOW_EVERY_S:
                looked_at_s, looked_at_rss = now, max(rss, looked_at_rss)
                sizes = [_proportional(pid) for pid in members]
                pss = sum(size for size, _ in sizes)
                if pss > self._pss:
                    self._pss, self._anonymous = pss, sum(size for _, size in sizes)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except OSError:  # it ended between the listing and here
        return 0


def _resident_pages(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_bytes().split()[1])
    except (OSError, IndexError):
        return 0


def _proportional(pid: int) -> tuple[int, int]:
    """Bytes in all, and of them anonymous."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_bytes().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(b":")[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
    return sizes.get(b"Pss", 0), sizes.get(b"Pss_Anon", 0)
