"""What was found of loaders, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench.feed.harness import Figures
from bench.tables import Table

__all__ = ["of_aims", "of_rates", "of_resuming"]

_SHUFFLES = 0.95
"""Spread of a batch from which on a loader counts as one that really shuffles."""


def of_rates(name: str, title: str, found: Sequence[Figures]) -> Table:
    """Batches a second, fastest first, and how far Millrace is ahead."""
    ours = _ours(found)
    lines = []
    for figures in sorted(_done(found), key=lambda figures: -figures.rate):
        low, high = figures.rate_span
        gigabytes = statistics.median(rate["bytes_s"] for rate in figures.rates) / 1e9
        peak = figures.peak
        lines.append(
            (
                _name(figures),
                _text(figures.rate),
                f"{_text(low)} to {_text(high)}",
                f"{gigabytes:.2f}",
                f"{ours.rate / figures.rate:.2f}" if ours else "-",
                f"{figures.whole['spread']:.2f}",
                *((f"{p:,.0f}" for p in (peak.pss_mb, peak.anonymous_mb, peak.mapped_mb)) if peak else ("-",) * 3),
            )
        )
    head = ("", "batches/s", "min to max", "GB/s", "Millrace / it", "spread", "peak MB", "anonymous", "mapped")
    return Table(name, title, head, (*lines, *_without(found, len(head))), _notes(found))


def of_resuming(name: str, title: str, found: Sequence[Figures]) -> Table:
    """Milliseconds to the first batch, from the beginning and from states; lost and repeated rows at half."""
    shown = [figures for figures in _done(found) if figures.feeder.at]
    at = sorted({share for figures in shown for share in figures.after})
    lines = []
    for figures in sorted(shown, key=lambda figures: statistics.median(figures.first_s)):
        times = [_milliseconds(figures.resumed.get(share, [])) for share in at]
        half = figures.after.get(0.5)
        rest = (
            (f"{half['lost']:,}", f"{half['repeated']:,}", f"{figures.whole['state_bytes']:,}") if half else ("-",) * 3
        )
        lines.append((_name(figures), _milliseconds(figures.first_s), *times, *rest))
    head = ("", "first batch, ms", *(f"resumed at {share:.0%}, ms" for share in at), "lost", "repeated", "state, bytes")
    return Table(name, title, head, tuple(lines))


def of_aims(name: str, title: str, found: Mapping[str, Sequence[Figures]]) -> Table:
    """Where Millrace stands beside the best of each sort, a line for each workload."""
    lines = []
    for workload, all_of_it in found.items():
        ours, done = _ours(all_of_it), _done(all_of_it)
        if ours is None:
            continue
        library = _fastest([f for f in done if f.feeder.kind == "library" and f.whole["spread"] >= _SHUFFLES])
        hand = _fastest([f for f in done if f.feeder.kind == "hand"])
        limit = _fastest([f for f in done if f.feeder.kind == "limit"])
        lines.append(
            (
                workload,
                _text(ours.rate),
                *(text for other in (library, hand) for text in _beside(ours, other)),
                f"{ours.rate / limit.rate:.2f}" if limit else "-",
                f"{ours.whole['spread']:.2f}",
                f"{1000 * statistics.median(ours.first_s):.0f}",
                f"{ours.peak.pss_mb:,.0f}" if ours.peak else "-",
            )
        )
    head = (
        *("", "Millrace, batches/s", "fastest library that shuffles", "Millrace / it"),
        *("fastest by hand", "Millrace / it", "of the limit", "spread", "first batch, ms", "peak MB"),
    )
    note = f"A library really shuffles if the spread of its batches is at least {_SHUFFLES}. The limit: see below."
    return Table(name, title, head, tuple(lines), (note,))


def _beside(ours: Figures, other: Figures | None) -> tuple[str, str]:
    if other is None:
        return "-", "-"
    return f"{other.name}: {_text(other.rate)}", f"{ours.rate / other.rate:.2f}"


def _fastest(found: Sequence[Figures]) -> Figures | None:
    return max(found, key=lambda figures: figures.rate, default=None)


def _done(found: Sequence[Figures]) -> list[Figures]:
    return [figures for figures in found if figures.rates and not figures.failed]


def _ours(found: Sequence[Figures]) -> Figures | None:
    """Millrace as it is by default: the first of its ways."""
    first = next((figures for figures in found if figures.feeder.kind == "ours"), None)
    return first if first in _done(found) else None


def _name(figures: Figures) -> str:
    return f"**{figures.name}**" if figures.feeder.kind == "ours" else figures.name


def _without(found: Sequence[Figures], width: int) -> list[tuple[str, ...]]:
    rest = [figures for figures in found if figures not in _done(found)]
    return [(_name(f), "skipped" if f.skipped else "failed", *[""] * (width - 2)) for f in rest]


def _notes(found: Sequence[Figures]) -> tuple[str, ...]:
    done = _done(found)
    notes = []
    if done:
        notes.append(f"Runs of each: {max(len(figures.rates) for figures in done)}.")
        notes.append(f"Versions: {'; '.join(sorted({figures.rates[0]['versions'] for figures in done}))}.")
    for figures in done:
        lost, repeated = figures.whole["lost"], figures.whole["repeated"]
        if lost or repeated:
            notes.append(f"{figures.name}: of an epoch's rows {lost:,} never came and {repeated:,} came again.")
        short = [at for at, after in figures.after.items() if after["lost"] or after["repeated"]]
        if short:
            counts = [f"{figures.after[at]['lost']:,} and {figures.after[at]['repeated']:,}" for at in short]
            shares = ", ".join(f"{at:.0%}" for at in short)
            notes.append(f"{figures.name}: resumed at {shares}, rows lost and repeated: {', '.join(counts)}.")
    notes += [f"{figures.name}: skipped, {figures.skipped}." for figures in found if figures.skipped]
    notes += [f"{figures.name}: failed, {figures.failed}" for figures in found if figures.failed]
    return tuple(notes)


def _milliseconds(seconds: Sequence[float | None]) -> str:
    known = [1000 * second for second in seconds if second is not None]
    if not known:
        return "-"
    middle = f"{statistics.median(known):.1f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.1f} to {max(known):.1f})"


def _text(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
