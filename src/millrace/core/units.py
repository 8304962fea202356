"""Sizes, durations and shares as people write them, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Final

__all__ = ["count", "format_bytes", "format_seconds", "parse_duration_s", "parse_share", "parse_size"]

_SIZES: Final[Mapping[str, int]] = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_DURATIONS: Final[Mapping[str, float]] = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER: Final = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)\s*")
_FIGURES_MAX: Final = 64


def _split(text: object, what: str, example: str) -> tuple[float, str]:
    is_scalar = isinstance(text, str | int | float) and not isinstance(text, bool)
    match = _NUMBER.fullmatch(str(text)) if is_scalar and len(str(text)) <= _FIGURES_MAX else None
    if match is None:
        raise ValueError(f"{repr(text)[:80]} is not {what}; write it like {example}")
    number = float(match[1])
    if number == math.inf:
        raise ValueError(f"{text!r} is beyond all bounds; write it like {example}")
    return number, match[2].lower()


def parse_size(text: object) -> int:
    """Bytes from ``64MB``, ``1.5 GiB`` or a plain number. KB is 1000 and KiB is 1024.

    Raises:
        ValueError: it isn't a size; the message shows how one is written.
    """
    number, unit = _split(text, "a size", "64MB or 64MiB")
    if unit not in _SIZES:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; sizes are in B, KB, MB, GB, TB, KiB, MiB, GiB or TiB")
    return round(number * _SIZES[unit])


def parse_duration_s(text: object) -> float:
    """Seconds from ``90s``, ``5m``, ``1.5h``, ``2d``, ``250ms`` or a plain number of seconds.

    Raises:
        ValueError: it isn't a duration; the message shows how one is written.
    """
    number, unit = _split(text, "a duration", "90s or 5m")
    if unit not in _DURATIONS:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; durations are in ms, s, m, h or d")
    return number * _DURATIONS[unit]


def parse_share(text: object) -> float:
    """A share between 0 and 1 from ``0.1%`` or ``0.001``.

    Raises:
        ValueError: it isn't a share, or lies outside of 0 to 100 %.
    """
    number, unit = _split(text, "a share", "0.1% or 0.001")
    if unit not in {"", "%"}:
        raise ValueError(f"{text!r} has an unknown unit {unit!r}; a share is written like 0.1% or 0.001")
    share = number / 100 if unit == "%" else number
    if share > 1:
        raise ValueError(f"{text!r} is more than everything; a share lies between 0% and 100%")
    return share


def format_bytes(size_bytes: float) -> str:
    """``1.5 GB``: decimal units, three figures (more only beyond 999 EB)."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if abs(size_bytes) < 999.5:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} EB" if abs(size_bytes) < 999.5 else f"{size_bytes:.0f} EB"


def format_seconds(seconds: float) -> str:
    """``1.2s``, ``3m 05s``, ``2h 07m``."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def count(number: int, noun: str) -> str:
    """``1 shard``, ``1,024 shards``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
