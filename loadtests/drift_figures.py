"""The drift monitor's figures against its peers, in one interleaved run.

    python -m loadtests.drift_figures [--peers PYTHON] [--rounds 15] [--with-evidently] [--output FILE.json]

30 columns, a reference of 50,000 rows, windows of 1,000, 10,000 and 100,000 rows. Every contender has a process of its
own, waits while the others work, and is asked for one window at a time, round after round, so that a slow spell of the
machine hits all alike. CPU time of the whole process counts. A ratio is that of the same round; its median is shown
with the tenth and the ninetieth percentile. Peers come from an environment of their own
(``loadtests/requirements-drift-peers.txt``); those that are absent are named and left out.

The second part is within one process, interleaved as well: counting per value against a plain copy of the same rows,
200 columns against 30, one look's evaluation, and the size of a pane.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.monitor_cost import Measured, copying, counting, values
from monitor.calibration import Calibration
from monitor.drift.base import Pair
from monitor.drift.judge import judge
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.types import AlarmRules

COLUMNS, REFERENCE = 30, 50_000
SIZES = (1000, 10_000, 100_000)
WORKER = Path(__file__).with_name("drift_contenders.py")
#: Those that run in this environment; the others in that of the peers.
OWN = ("tidegate", "scipy", "numpy")
PEERS = ("alibi-detect", "nannyml", "datasketches")
#: Seconds that one answer may take before a contender is given up.
PATIENCE = 120.0
#: At 10,000 rows a contender is to take at least this many times as long.
FASTER = {"scipy": 35.0, "alibi-detect": 25.0, "nannyml": 10.0, "datasketches": 3.0}


class Contender:
    """A process that times one window at a time."""

    def __init__(self, name: str, python: str) -> None:
        self.name = name
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            # -P: the modules beside the worker are not to stand for packages that its libraries import.
            [python, "-P", str(WORKER), name, str(COLUMNS), str(REFERENCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **threads},
        )
        self.problem = ""
        self._check(self._line())

    def run(self, rows: int) -> float | None:
        """CPU seconds of one window; None when it is of no use any more."""
        if self.problem or self._process.stdin is None:
            return None
        self._process.stdin.write(f"{rows}\n")
        self._process.stdin.flush()
        line = self._line()
        if not line:
            self.problem = f"gave no answer for {rows} rows within {PATIENCE:.0f} s"
            return None
        return float(line)

    def _line(self) -> str:
        """The next line, empty when none came in time."""
        if self._process.stdout is None:
            return ""
        limit = threading.Timer(PATIENCE, self._process.kill)
        limit.start()
        try:
            return self._process.stdout.readline().strip()
        finally:
            limit.cancel()

    def _check(self, said: str) -> None:
        if said != "ready":
            self.problem = said or "did not start"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Least, median, and the percentiles that stand for the spread."""
    low, middle, high = np.percentile(samples, [10, 50, 90]).tolist()
    return {"least": min(samples), "median": middle, "p10": low, "p90": high}


# --- against the peers -----------------------------------------------------------------------------------------------


def against_peers(names: Sequence[str], peers: Path, rounds: int) -> dict[str, Any]:
    """CPU seconds of every contender at every size, and their ratios to ours."""
    contenders = start(names, peers)
    taken: dict[str, dict[int, list[float]]] = {one.name: {rows: [] for rows in SIZES} for one in contenders}
    try:
        for done in range(rounds):
            for rows in SIZES:
                for one in contenders:
                    seconds = one.run(rows) if done == 0 or one.name != "evidently" else None
                    if seconds is not None:
                        taken[one.name][rows].append(seconds)
    finally:
        for one in contenders:
            one.close()
    for one in contenders:
        if one.problem:
            print(f"{one.name}: {one.problem}")
    if not all(taken.get("tidegate", {0: []}).values()):
        sys.exit("our own part did not run, so that there is nothing to compare with")
    return {
        name: {
            str(rows): {
                "cpu_ms": spread([seconds * 1e3 for seconds in samples]),
                "over_ours": ratios(samples, taken["tidegate"][rows]),
            }
            for rows, samples in sizes.items()
            if samples
        }
        for name, sizes in taken.items()
    }


def start(names: Sequence[str], peers: Path) -> list[Contender]:
    found = []
    for name in names:
        if name not in OWN and not peers.exists():
            print(f"{name}: absent, there is no {peers}")
            continue
        one = Contender(name, sys.executable if name in OWN else str(peers))
        if one.problem:
            print(f"{name}: {one.problem}")
            one.close()
        else:
            found.append(one)
    return found


def ratios(samples: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Of the same rounds; ``of_least``: of the least times of all rounds."""
    paired = [a / b for a, b in zip(samples, ours, strict=False)]
    return {**spread(paired), "of_least": min(samples) / min(ours)}


def show_peers(found: dict[str, Any]) -> None:
    print(
        "\n| CPU ms (least / median), times ours (median, 10 % to 90 %) | " + " | ".join(f"{n:,} rows" for n in SIZES)
    )
    print("| --- |" + " --- |" * len(SIZES))
    for name, sizes in found.items():
        print(f"| {name} | " + " | ".join(_cell(name, sizes.get(str(rows))) for rows in SIZES) + " |")


def _cell(name: str, found: dict[str, dict[str, float]] | None) -> str:
    if found is None:
        return "-"
    cpu, over = found["cpu_ms"], found["over_ours"]
    times = "" if name == "tidegate" else f", {over['median']:.1f}x ({over['p10']:.1f} to {over['p90']:.1f})"
    return f"{cpu['least']:.2f} / {cpu['median']:.2f}{times}"


# --- by ourselves ----------------------------------------------------------------------------------------------------


def looking(rows: int) -> Measured:
    """PSI and KS with p-values of all columns, from counts: what one look costs."""
    layout = Layout(ReferenceProfile.from_arrays({"x": values(REFERENCE)}))
    counts = np.zeros(layout.cells, "i4")
    layout.count([values(rows)], counts)
    rules, none = AlarmRules(), Calibration.none(layout)

    def run() -> object:
        return judge(Pair(layout, layout.reference, counts), rules, -15.0, none)

    return Measured("ms", run, 1)


def alone(rounds: int) -> dict[str, list[float]]:
    """CPU per value (ns) or per look (ms) of each measurement, by round."""
    measured: dict[str, Measured] = {
        "copy": copying(100_000),
        "count 30": counting(COLUMNS, 100_000),
        "count 200": counting(200, 20_000),
        "look": looking(10_000),
    }
    taken: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(rounds):
        for name, one in measured.items():
            began = time.thread_time_ns()
            one.run()
            spent = time.thread_time_ns() - began
            taken[name].append(spent / one.work * (1.0 if one.unit == "ns/value" else 1e-6))
    return taken


@dataclass(frozen=True)
class Figure:
    """A figure and what it is to be: ``limit`` at most, or at least where ``least`` is set."""

    name: str
    value: float
    limit: float
    least: bool = False
    detail: str = ""

    @property
    def held(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    def show(self) -> None:
        bound = f"at {'least' if self.least else 'most'} {self.limit:g}"
        print(f"{self.name:46} {self.value:8.2f}  {bound:13} {'held' if self.held else 'MISSED':6}  {self.detail}")


def figures(peers: dict[str, Any], own: dict[str, list[float]]) -> list[Figure]:
    found = [
        Figure(
            f"{name} over ours at 10,000 rows", over["median"], limit, True, f"{over['p10']:.1f} to {over['p90']:.1f}"
        )
        for name, limit in FASTER.items()
        if (over := peers.get(name, {}).get("10000", {}).get("over_ours"))
    ]
    megabytes = Layout(ReferenceProfile.from_arrays({"x": values(REFERENCE)})).cells * 4 / 1e6
    per_value = ratios(own["count 30"], own["copy"])
    wide = ratios(own["count 200"], own["count 30"])
    return [
        *found,
        Figure("ns per value over those of a plain copy", per_value["of_least"], 12.0, detail=_around(per_value)),
        Figure("200 columns over 30, per value", wide["of_least"], 1.5, detail=_around(wide)),
        Figure("MB of counts per pane", megabytes, 0.5),
    ]


def _around(found: dict[str, float]) -> str:
    return f"by round {found['median']:.2f} ({found['p10']:.2f} to {found['p90']:.2f})"


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--peers", type=Path, default=Path(".venv-drift-peers/bin/python"), help="their interpreter")
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--with-evidently", action="store_true", help="one round of it: half a minute more")
    options.add_argument("--output", type=Path)
    chosen = options.parse_args()
    names = [*OWN, *PEERS, *(["evidently"] if chosen.with_evidently else [])]
    peers = against_peers(names, chosen.peers, chosen.rounds)
    show_peers(peers)
    own = alone(max(chosen.rounds, 15))
    print()
    for name, samples in own.items():
        unit = "ms" if name == "look" else "ns/value"
        print(f"{name:46} {min(samples):8.3f} {float(np.median(samples)):8.3f} {unit} (least, median)")
    found = figures(peers, own)
    for one in found:
        one.show()
    if chosen.output:
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        result = {"machine": machine, "peers": peers, "alone": {name: spread(samples) for name, samples in own.items()}}
        result["figures"] = {one.name: {"value": one.value, "limit": one.limit, "held": one.held} for one in found}
        chosen.output.write_text(json.dumps(result, indent=1))
    sys.exit(0 if all(one.held for one in found) else 1)


if __name__ == "__main__":
    main()
