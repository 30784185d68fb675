"""What the monitor costs: the request path's part, and the drain thread's per value.

    python -m loadtests.monitor_cost [--seconds 10] [--output FILE.json]

Rounds of all measurements are interleaved, so that a slow spell of the machine hits all alike; the least and the
median CPU time of the rounds are shown. 30 float32 columns, a reference of 50,000 rows, unless a row says otherwise.

Targets: ``offer`` at most 1 us per batch and 0.02 us per row; counting a value at most 12 times a plain copy, and with
200 columns at most 1.5 times what it is with 30. ``loadtests.drift_figures`` holds the same against other libraries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitor.drift.base import Pair
from monitor.drift.judge import judge
from monitor.engine import Monitor
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.tap import Item, Tap
from monitor.types import Array

COLUMNS = 30
#: Batches per round of an offer.
OFFERS = 500


@dataclass
class Measured:
    """One round of a measurement: ``run`` is timed and does ``work`` units of it; ``after`` is not."""

    unit: str
    run: Callable[[], object]
    work: int
    after: Callable[[], object] = lambda: None


@dataclass
class Scores:
    data: bytes


def values(rows: int, columns: int = COLUMNS) -> Array:
    """Normal, log-normal, rounded and few-valued columns, as a table of features has."""
    rng = np.random.default_rng(rows)
    out = rng.standard_normal((rows, columns)).astype("f4")
    third = columns // 3
    out[:, third : 2 * third] = np.exp(out[:, third : 2 * third])
    out[:, -5:-2] = np.round(out[:, -5:-2] * 3)
    out[:, -2:] = rng.integers(0, 5, (rows, 2))
    return out


def offers(rows: int, members: int) -> Measured:
    """``OFFERS`` batches of ``rows`` rows in ``members`` pieces into a tap, which is emptied outside the clock."""
    tap = Tap([("x", 0, False)], [("y", 0, False)], max_rows=1 << 30, max_bytes=1 << 40)
    pieces = [memoryview(piece.tobytes()) for piece in np.array_split(values(rows), members)]
    inputs, outputs = [pieces], [Scores(np.zeros(rows).tobytes())]

    def run() -> None:
        for _ in range(OFFERS):
            tap.offer(rows, inputs, outputs, 0)

    return Measured("us/batch", run, OFFERS, lambda: tap.take(1 << 40))


def counting(columns: int, rows: int, knots: int | None = 1024) -> Measured:
    table = values(rows, columns)
    layout = Layout(ReferenceProfile.from_arrays({"x": values(50_000, columns)}, knots=knots))
    counts = np.zeros(layout.cells, "i4")
    return Measured("ns/value", lambda: layout.count([table], counts), rows * columns)


def whole_way(rows: int) -> Measured:
    """Blocks through the monitor: counting, panes, windows and looks."""
    monitor = Monitor("m", "1", ReferenceProfile.from_arrays({"x": values(50_000)}))
    blocks = [Item(0, "stable", 4000, 0, [[values(4000).tobytes()]])] * (rows // 4000)
    return Measured("ns/value", lambda: monitor.ingest(monitor.keys, blocks), rows * COLUMNS)


def statistics_of(rows: int) -> Measured:
    """PSI and KS of a window of raw rows: counting from nothing, both statistics, both p-values."""
    layout, table = Layout(ReferenceProfile.from_arrays({"x": values(50_000)})), values(rows)
    monitor = Monitor("m", "1", layout.profile)

    def run() -> None:
        counts = np.zeros(layout.cells, "i4")
        layout.count([table], counts)
        judge(Pair(layout, layout.reference, counts), monitor.settings.rules, -15.0, monitor.judge.calibration)

    return Measured("ms", run, 1)


def copying(rows: int) -> Measured:
    table = values(rows)
    target = np.empty_like(table)
    return Measured("ns/value", lambda: np.copyto(target, table), table.size)


def measurements() -> dict[str, Measured]:
    found = {
        f"offer {rows} rows in {members} parts": offers(rows, members)
        for rows, members in ((1, 1), (8, 1), (32, 1), (8, 8), (32, 32), (128, 128))
    }
    for columns, rows in ((5, 100_000), (30, 100_000), (200, 20_000)):
        found[f"count {rows:,} x {columns}"] = counting(columns, rows)
    found["count 100,000 x 30, all knots"] = counting(COLUMNS, 100_000, None)
    found["copy 100,000 x 30"] = copying(100_000)
    found["whole way, looks every 500 rows"] = whole_way(100_000)
    return found | {f"PSI + KS of {rows:,} rows": statistics_of(rows) for rows in (1000, 10_000, 100_000)}


SCALE = {"us/batch": 1e-3, "ns/value": 1.0, "ms": 1e-6}


def measure(seconds: float) -> dict[str, dict[str, Any]]:
    rounds = measurements()
    taken: dict[str, list[float]] = {name: [] for name in rounds}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, taken.values())) < 3:
        for name, one in rounds.items():
            began = time.thread_time_ns()
            one.run()
            taken[name].append((time.thread_time_ns() - began) / one.work * SCALE[one.unit])
            one.after()
    return {
        name: {"unit": rounds[name].unit, "least": min(samples), "median": statistics.median(samples)}
        for name, samples in taken.items()
    }


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seconds", type=float, default=10.0)
    options.add_argument("--output", type=Path)
    chosen = options.parse_args()
    result = measure(chosen.seconds)
    for name, row in result.items():
        print(f"{name:34} {row['least']:9.3f} {row['median']:9.3f} {row['unit']}")
    one, many = result["offer 1 rows in 1 parts"], result["offer 128 rows in 128 parts"]
    per_row = (many["least"] - one["least"]) / 127
    print(f"{'offer: per batch / per further row':34} {one['least']:.3f} us / {per_row:.4f} us")
    ratio = result["count 100,000 x 30"]["least"] / result["copy 100,000 x 30"]["least"]
    print(f"{'count over copy':34} {ratio:9.1f} x")
    wide = result["count 20,000 x 200"]["least"] / result["count 100,000 x 30"]["least"]
    print(f"{'200 columns over 30, per value':34} {wide:9.2f} x")
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
