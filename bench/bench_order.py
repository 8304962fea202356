"""The order of a feed alone: how random, how local, how fast, and how small at a billion rows.

    python -m bench.bench_order                        # everything: some five minutes
    python -m bench.bench_order --part scale           # one of statistics, spread, reads, speed, scale
    python -m bench.bench_order --write docs/design/feed-order.md

No byte of a dataset is read: blocks are numbers of rows. The targets: a position located in about 60 to 80 ns, in calls
of 2,000 to 8,000; at a billion rows an order made and its first batch located in under 200 ms, in far under 600 MB.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics as middle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from bench import order_statistics
from bench.tables import Table, show, write_page
from millrace.feed.cipher import mix64
from millrace.feed.mixing import MixedOrder, Stage, Stream, plan_streams
from millrace.feed.order import EpochOrder, Order, OrderPlan, Shuffle, plan_order
from millrace.feed.share import Sharing
from millrace.feed.tally import RowTally

Int64s = npt.NDArray[np.int64]
NODES = (1, 2, 4, 8, 64)
ODD_NODES = (3, 5, 6, 7, 12, 48)
COUNTS = (2000, 4096, 8192, 65_536)
TOKEN_BYTES = 8192
TURNS, CALLS_A_TURN = 12, 25
BILLION = 1_000_000_000
ROOT = Path(__file__).resolve().parent.parent


def spread() -> list[Table]:
    """200,000 rows of 8 KB in 1,000 blocks: row ids in a batch beside those of a full shuffle."""
    rows = np.full(1000, 200, np.int64)
    first = np.cumsum(rows) - rows

    def measured(plan: OrderPlan) -> tuple[float, float, float]:
        order = EpochOrder(plan, rows, manifest="m", epoch=0)
        found = order.locate(np.arange(order.rows))
        ids = first[found.block] + found.row
        of = [ids[: len(ids) // b * b].reshape(-1, b).std(axis=1, ddof=1).mean() for b in (32, 256)]
        blocks = np.sort(found.block.reshape(-1, 32), axis=1)
        return of[0], of[1], 1 + (np.diff(blocks, axis=1) > 0).sum(axis=1).mean()

    full = measured(OrderPlan(1, Shuffle.FULL, 64, 1000))
    body = [("full shuffle", "-", "-", "1.00", "1.00", f"{full[2]:.1f}", "1,638")]
    for lanes in (1, 4, 8, 16, 32, 64, 128):
        for window in (1, 4, 16):
            one, many, blocks = measured(OrderPlan(1, Shuffle.WINDOW, lanes, window))
            held = lanes * window * 200 * TOKEN_BYTES / 1e6
            line = ("", str(lanes), str(window), f"{one / full[0]:.3f}", f"{many / full[1]:.3f}", f"{blocks:.1f}")
            body.append((*line, f"{held:,.0f}"))
    for held in (2000, 20_000, 100_000):
        ids = _buffered(200_000, held)
        of = [ids[: len(ids) // b * b].reshape(-1, b).std(axis=1, ddof=1).mean() for b in (32, 256)]
        few = 1 + (np.diff(np.sort(ids.reshape(-1, 32) // 200, axis=1), axis=1) > 0).sum(axis=1).mean()
        line = (f"buffer of {held:,} rows", "-", "-", f"{of[0] / full[0]:.3f}", f"{of[1] / full[1]:.3f}", f"{few:.1f}")
        body.append((*line, f"{held * TOKEN_BYTES / 1e6:,.0f}"))
    plain = measured(OrderPlan(1, Shuffle.BLOCKS, 1, 1))
    body.append(("blocks", "-", "-", f"{plain[0] / full[0]:.3f}", f"{plain[1] / full[1]:.3f}", f"{plain[2]:.1f}", "2"))
    default = plan_order(rows, rows * TOKEN_BYTES, seed=1, shuffle=Shuffle.WINDOW)
    head = ("", "lanes", "window", "spread, batch 32", "batch 256", "blocks in a batch of 32", "MB in windows")
    notes = (f"The default for this dataset is {default.lanes} lanes and a window of {default.window} blocks.",)
    return [Table("order-spread", "Spread of row ids in a batch, of a full shuffle's", head, tuple(body), notes)]


def _buffered(rows: int, held: int) -> Int64s:
    """A shuffle buffer: rows come in sequence, and each takes the place of one that is drawn and goes out."""
    generator = np.random.default_rng(1)
    buffer = np.arange(held)
    out = np.empty(rows, np.int64)
    drawn = generator.integers(0, held, rows - held)
    for number, place in enumerate(drawn):
        out[number], buffer[place] = buffer[place], held + number
    out[rows - held :] = generator.permutation(buffer)
    return out


def reads() -> list[Table]:
    """Blocks that all nodes fetch together, over the blocks there are, by simulating every position of an epoch."""
    tables: list[Table] = []
    for title, nodes in (("Read amplification", NODES), ("Read amplification, other numbers of nodes", ODD_NODES)):
        body = []
        for blocks, each, block_mb in ((100, 512, 4), (1000, 200, 1.6384), (10_000, 64, 1), (100_000, 64, 4)):
            rows = np.full(blocks, each, np.int64)
            plan = plan_order(rows, np.full(blocks, int(block_mb * 1e6)), seed=1, shuffle=Shuffle.WINDOW)
            order = EpochOrder(plan, rows, manifest="m", epoch=0)
            block = order.locate(np.arange(order.rows)).block
            for name, batch, a_node in (("32 a node", 0, 32), ("64", 64, 0), ("1,024", 1024, 0), ("1,000", 1000, 0)):
                cells = [f"{_read(block, blocks, order, Sharing(batch + a_node * n, 0, n)):.3f}" for n in nodes]
                dataset = f"{blocks * block_mb / 1000:g} GB in {blocks:,} blocks"
                body.append((dataset, f"{plan.lanes} x {plan.window}", name, *cells))
        head = ("dataset", "lanes x window", "batch", *(f"{n} node{'s' * (n > 1)}" for n in nodes))
        tables.append(Table(f"order-reads-{len(tables) + 1}", title, head, tuple(body)))
    return tables


def _read(block: Int64s, blocks: int, order: Order, sharing: Sharing) -> float:
    touched = 0
    steps = sharing.steps(order.rows)
    for rank in range(sharing.world_size):
        own = Sharing(sharing.batch_size, rank, sharing.world_size)
        seen = np.zeros(blocks, bool)
        positions, _ = own.positions(0, steps, rows=order.rows, lanes=order.lanes)
        seen[block[positions]] = True
        touched += int(seen.sum())
    return touched / blocks


Call = Callable[[int], object]
"""Does it once, at a place that follows from a number."""


def speed() -> list[Table]:
    """Every cell in turn, again and again, and the least of each: what else the machine does only ever adds to it."""
    cells = _cells()
    least = dict.fromkeys(cells, math.inf)
    for turn in range(TURNS):
        for (name, count), work in cells.items():
            for number in range(CALLS_A_TURN):
                start = time.perf_counter()
                work(turn * CALLS_A_TURN + number)
                least[name, count] = min(least[name, count], (time.perf_counter() - start) / count * 1e9)
    names = dict.fromkeys(name for name, _ in cells)
    body = [(name, *(f"{least[name, c]:.0f}" if (name, c) in least else "-" for c in COUNTS)) for name in names]
    head = ("ns a position, in calls of", *(f"{count:,}" for count in COUNTS))
    return [Table("order-speed", "Locating", head, tuple(body))]


def _cells() -> dict[tuple[str, int], Call]:
    cells: dict[tuple[str, int], Call] = {}
    for blocks, uneven in ((1000, False), (1000, True), (1_000_000, False), (1_000_000, True)):
        rows = np.full(blocks, 1024, np.int64)
        if uneven:
            rows = np.random.default_rng(1).integers(1, 2048, blocks)
        for shuffle in (Shuffle.WINDOW, Shuffle.FULL):
            plan = plan_order(rows, rows * 1024, seed=1, shuffle=shuffle)
            order = EpochOrder(plan, rows, manifest="m", epoch=0)
            layout = f"{blocks:,} blocks, {'1 to 2,047' if uneven else '1,024'} rows each, {shuffle.value}"
            cells |= {(layout, count): _locating(order, count) for count in COUNTS}
    rows = np.full(1000, 1024, np.int64)
    stages = [Stage(1_000_000, (0.6, 0.3, 0.1))]
    plans = plan_streams([(rows, rows * 1024)] * 3, stages, seed=1, shuffle=Shuffle.WINDOW)
    mixture = MixedOrder([Stream(p, rows, "m") for p in plans], stages, seed=1, epoch=0)
    cells |= {("mixture of 3", count): _locating(mixture, count) for count in COUNTS}
    for world in (2, 8):
        name = f"the share of 1 of {world} ranks, 32 rows a step"
        cells |= {(name, count): _sharing(Sharing(32 * world, 1, world), count) for count in COUNTS}
    cells |= {("tally of rows", count): _tallying(count) for count in COUNTS}
    keys = np.arange(65_536, dtype=np.uint64)
    sorting = "instead: a window of 65,536 rows sorted by hashes"
    cells[sorting, 65_536] = lambda number: np.argsort(mix64(keys + np.uint64(number)))
    return cells


def _locating(order: Order, count: int) -> Call:
    starts = np.random.default_rng(2).integers(0, order.rows - count, TURNS * CALLS_A_TURN)
    span = np.arange(count, dtype=np.int64)
    return lambda number: order.locate(starts[number] + span)


def _sharing(sharing: Sharing, count: int) -> Call:
    return lambda number: sharing.positions(number * 7, count // 32, rows=BILLION, lanes=64)


def _tallying(count: int) -> Call:
    tally, rows, stream = RowTally(), np.arange(count), np.zeros(count, np.int32)
    return lambda number: tally.add(rows, stream, rows)


def scale() -> list[Table]:
    """A billion rows in blocks of 1,024, in this process: run it in a fresh one."""
    before_mb = _peak_mb()
    blocks = -(-BILLION // 1024)
    even = np.full(blocks, 1024, np.int64)
    even[-1] = BILLION - 1024 * (blocks - 1)
    uneven = np.random.default_rng(1).integers(1, 2048, blocks)
    generator = np.random.default_rng(3)
    body = []
    for name, rows, row_bytes in (
        ("rows of 1 KB", even, 1024),
        ("rows of 8 KB", even, TOKEN_BYTES),
        ("rows of 1 KB, uneven blocks", uneven, 1024),
    ):
        lengths = rows * row_bytes
        made, located, busy = [], [], []
        for epoch in range(15):
            start, used = time.perf_counter(), time.process_time()
            plan = plan_order(rows, lengths, seed=1, shuffle=Shuffle.WINDOW)
            order = EpochOrder(plan, rows, manifest="m", epoch=epoch)
            ready = time.perf_counter()
            busy.append((time.process_time() - used) * 1e3)
            first = int(generator.integers(0, order.rows - 32))
            order.locate(np.arange(first, first + 32))
            located.append((time.perf_counter() - ready) * 1e3)
            made.append((ready - start) * 1e3)
        line = (name, f"{order.rows:,}", f"{plan.lanes} x {plan.window}", f"{middle.median(made):.0f}")
        span = f"{min(made):.0f} to {max(made):.0f}"
        body.append((*line, span, f"{middle.median(busy):.0f}", f"{middle.median(located):.2f}", f"{_peak_mb():.0f}"))
    head = (
        "",
        "rows",
        "lanes x window",
        "made, ms",
        "of 15 epochs",
        "of the processor, ms",
        "first batch of 32 at a random position, ms",
        "peak MB",
    )
    generator = np.random.default_rng(4)
    start = time.perf_counter()
    generator.permutation(10_000_000)
    listed = time.perf_counter() - start
    notes = (
        f"{os.getloadavg()[0]:.1f} processes wanted the {os.cpu_count()} cores of the machine meanwhile.",
        f"A list instead: numpy's permutation of a hundredth of it, 10,000,000 rows, took {listed * 1e3:,.0f} ms and "
        "80 MB.",
        f"Resident memory of the whole process, of which {before_mb:.0f} MB are Python, NumPy and the imports, and "
        f"{(even.nbytes * 3 + uneven.nbytes) / 1e6:.0f} MB the columns of blocks that this measurement holds.",
    )
    return [Table("order-scale", "A billion rows", head, tuple(body), notes)]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


PARTS: dict[str, Callable[[], list[Table]]] = {
    "statistics": order_statistics.statistics,
    "spread": spread,
    "reads": reads,
    "speed": speed,
    "scale": scale,
}


def _in_fresh_process(part: str) -> list[Table]:
    command = [sys.executable, "-m", "bench.bench_order", "--part", part, "--here", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [
        Table(t["name"], t["title"], tuple(t["head"]), tuple(map(tuple, t["rows"])), tuple(t["notes"]))
        for t in json.loads(done.stdout)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=sorted(PARTS), action="append", help="all where none is named")
    parser.add_argument("--statistics", action="append_const", dest="part", const="statistics", help="the part alone")
    parser.add_argument("--json", action="store_true", help="the tables as JSON on stdout")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into their places in a page")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json)
    tables: list[Table] = []
    for part in options.part or PARTS:
        found = PARTS[part]() if options.here else _in_fresh_process(part)
        tables += found
        if not options.json:
            for table in found:
                show(console, table)
    if options.json:
        print(json.dumps([table.plain() for table in tables], indent=2))
    if options.write is not None and (lost := write_page(options.write, tables)):
        print(f"{options.write} has no place for {', '.join(lost)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
