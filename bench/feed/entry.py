"""What every loader's module is: steps that each run in a process of their own.

    python -m bench.feed.contestants.NAME STEP --data DIR --workload W --rows N [--variant TEXT] ...

- ``prepare`` writes the rows in the loader's own format into ``--data``; not timed.
- ``whole`` reads one epoch and counts: each row once, every byte right. It keeps the loader's state at each of
  ``--at`` (shares of the epoch) in ``--notes``. Not timed.
- ``rate`` gives the time to the first batch and batches a second.
- ``resume`` gives the time to the first batch from the state at ``--at``.
- ``after`` reads on from that state to the end and counts what was lost and what came twice; not timed.

Each prints one line of JSON that begins with ``{"bench"``. This runs in every peer's own environment: the standard
library, numpy and torch.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench.digests import Tally
from bench.entry import lap
from bench.feed.batches import Batch, as_array, touch
from bench.feed.rows import BATCH_ROWS, numbers, spread_of, tally_rows

__all__ = ["SEED", "Job", "Loader", "StateLoader", "enter"]

SEED = 17


@dataclass(frozen=True, slots=True)
class Job:
    """What to do.

    Attributes:
        data: The folder of the prepared rows; all variants of a module share it.
        workload: See ``bench.feed.rows``.
        rows: How many there are.
        variant: Which way of several.
        workers: Worker processes; 0 means that all happens in this one.
    """

    data: Path
    workload: str
    rows: int
    variant: str
    workers: int

    @property
    def processes(self) -> dict[str, Any]:
        """The options of torch's ``DataLoader`` for worker processes: they stay from epoch to epoch."""
        return {"num_workers": self.workers, "persistent_workers": self.workers > 0}

    @property
    def batches(self) -> int:
        """In an epoch."""
        return -(-self.rows // BATCH_ROWS)

    def files(self, pattern: str) -> list[Path]:
        """Those of the data that match, in order."""
        return sorted(self.data.glob(pattern))


class Loader(Protocol):
    """A loader at work; made from a ``Job``."""

    def epoch(self) -> Iterator[Batch]:
        """Batches of the next epoch, of 32 rows each but for the last."""
        ...


class StateLoader(Loader, Protocol):
    """One that can be stopped and resumed."""

    def state(self) -> Any:
        """What to go on from, after the batch that was given last; can be pickled."""
        ...

    def load(self, state: Any) -> None:
        """Let the next ``epoch`` be the rest of that one."""
        ...


@dataclass(frozen=True, slots=True)
class _Options:
    notes: Path
    at: tuple[float, ...]
    seconds: float
    warm_s: float

    def state_file(self, at: float) -> Path:
        return self.notes / f"state-{at:g}.pickle"

    @property
    def order_file(self) -> Path:
        return self.notes / "order.npy"


def enter(prepare: Callable[[Job], None], make: Callable[[Job], Loader], *, versions: str) -> None:
    """Run one step. Everything a module imports has been imported when clocks start.

    Args:
        prepare: Writes the data.
        make: A loader that hasn't begun.
        versions: Which libraries, for the page.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("step", choices=["prepare", *_STEPS])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--variant", default="")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--notes", type=Path)
    parser.add_argument("--at", type=float, action="append", default=[])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--warm", type=float, default=3.0)
    given = parser.parse_args()
    job = Job(given.data.resolve(), given.workload, given.rows, given.variant, given.workers)
    options = _Options(given.notes, tuple(given.at), given.seconds, given.warm)
    if given.step == "prepare":
        prepare(job)
        result: Mapping[str, Any] = {}
    else:
        result = _STEPS[given.step](job, make, options)
    print("\n" + json.dumps({"bench": given.step, "versions": versions, **result}), flush=True)
    if job.workers:  # some never end by themselves, and would keep the pipe open that this is read from
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(0)


def _whole(job: Job, make: Callable[[Job], Loader], options: _Options) -> Mapping[str, Any]:
    options.notes.mkdir(parents=True, exist_ok=True)
    loader: Any = make(job)
    wanted = {max(1, round(at * job.batches)): at for at in options.at}
    states = hasattr(loader, "state") and not job.workers
    found: list[Any] = []
    tally = Tally()
    state_bytes = 0
    for count, batch in enumerate(loader.epoch(), 1):
        found.append(_numbers(batch))
        tally.add(_tally(job, batch))
        if states and count in wanted:
            kept = pickle.dumps(loader.state())
            state_bytes = max(state_bytes, len(kept))
            options.state_file(wanted[count]).write_bytes(kept)
    order = np.concatenate(found)
    np.save(options.order_file, order)
    lost, repeated = _missing(order, job.rows)
    return {
        "lost": lost,
        "repeated": repeated,
        "batch_rows": sorted({len(part) for part in found[:-1]}),
        "tally": tally.plain(),
        "spread": spread_of(order),
        "states": bool(states),
        "state_bytes": state_bytes,
    }


def _after(job: Job, make: Callable[[Job], Loader], options: _Options) -> Mapping[str, Any]:
    (at,) = options.at
    before = np.load(options.order_file)[: max(1, round(at * job.batches)) * BATCH_ROWS]
    whole = np.load(options.order_file)
    loader = _resumed(job, make, options)
    parts = [_numbers(batch) for batch in loader.epoch()]
    rest = np.concatenate([*parts, np.empty(0, np.int64)])
    lost, repeated = _missing(np.concatenate([before, rest]), job.rows)
    return {"lost": lost, "repeated": repeated, "same": bool(np.array_equal(rest, whole[len(before) :]))}


def _rate(job: Job, make: Callable[[Job], Loader], options: _Options) -> Mapping[str, Any]:
    import_mb = _resident_mb()
    gc.collect()
    seconds = lap()
    loader = make(job)
    batches = _endless(loader)
    touch(next(batches))
    first_s = seconds()
    now = time.perf_counter
    ends = now() + options.warm_s
    for _ in range(job.batches):  # an epoch, or a while
        touch(next(batches))
        if now() >= ends:
            break
    count = 0
    size = 0
    begun = now()
    ends = begun + options.seconds
    while True:
        batch = next(batches)
        touch(batch)
        count += 1
        size += batch.values.nbytes
        done = now()
        if done >= ends:
            break
    return {
        "first_s": first_s,
        "rate": count / (done - begun),
        "bytes_s": size / (done - begun),
        "batches": count,
        "import_mb": import_mb,
    }


def _resume(job: Job, make: Callable[[Job], Loader], options: _Options) -> Mapping[str, Any]:
    gc.collect()
    seconds = lap()
    batch = next(_resumed(job, make, options).epoch(), None)
    if batch is None:  # its shuffle buffer was forgotten, and nothing was left to fill it
        return {"first_s": None}
    touch(batch)
    return {"first_s": seconds()}


_STEPS = {"whole": _whole, "rate": _rate, "resume": _resume, "after": _after}


def _resumed(job: Job, make: Callable[[Job], Loader], options: _Options) -> Loader:
    loader: Any = make(job)
    (at,) = options.at
    loader.load(pickle.loads(options.state_file(at).read_bytes()))
    return loader  # type: ignore[no-any-return]


def _endless(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader.epoch()


def _numbers(batch: Batch) -> Any:
    return numbers(as_array(batch.values), None if batch.offsets is None else as_array(batch.offsets))


def _tally(job: Job, batch: Batch) -> Tally:
    """Also checks that the batch is what was agreed on."""
    values = as_array(batch.values)
    if job.workload == "tokens":
        if values.dtype != np.uint16 or values.ndim != 2:
            raise TypeError(f"tokens came as {values.dtype} of shape {values.shape}")
        offsets = (np.arange(len(values) + 1) * values.shape[1] * 2).tolist()
        return tally_rows(values.reshape(-1).view(np.uint8).data, offsets, None)
    if values.dtype != np.uint8 or as_array(batch.offsets).dtype != np.int64:
        raise TypeError(f"bytes came as {values.dtype}, offsets as {batch.offsets.dtype}")
    kinds = None
    if job.workload == "mix":
        if as_array(batch.kinds).dtype != np.uint8:
            raise TypeError(f"kinds came as {batch.kinds.dtype}")
        kinds = as_array(batch.kinds).tolist()
    return tally_rows(values.data, as_array(batch.offsets).tolist(), kinds)


def _missing(order: Any, rows: int) -> tuple[int, int]:
    """How many rows never came, and how many came again."""
    times = np.bincount(order, minlength=rows)
    return int((times == 0).sum()), int((times - 1).clip(0).sum())


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6
