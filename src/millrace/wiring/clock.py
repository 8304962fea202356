"""The real clock, and who this process is."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

__all__ = ["SystemClock", "holder_is_alive", "this_holder"]


class SystemClock:
    """The machine's time."""

    def now_ms(self) -> int:
        """Wall time, milliseconds since 1970."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Seconds that never go backwards."""
        return time.monotonic()


def this_holder() -> str:
    """This process, unmistakably: host, process id and when it started."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def holder_is_alive(holder: str) -> bool:
    """Whether the process behind a lease may still run. Of another machine's nothing is known: then yes."""
    host, _, rest = holder.rpartition(":")[0].rpartition(":")
    pid, started = rest, holder.rpartition(":")[2]
    if host != socket.gethostname() or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot: tells it from a later one with the same id.

    Field 22 of /proc/PID/stat (proc(5)); counted from behind the name, which may hold anything. A process that is
    only a zombie counts as gone. Elsewhere than on Linux it is unknown, and equal for all.
    """
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "gone" if fields[0] in {"Z", "X"} else fields[19]
    return "gone" if Path("/proc/self/stat").exists() else "unknown"
