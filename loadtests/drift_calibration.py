"""How often the drift rules cry wolf, and how late they see what is there: simulated streams, the shipped code.

    python -m loadtests.drift_calibration [--full] [--output FILE.json]

30 columns, a reference of 50,000 rows, panes of 500 rows, one false alarm allowed per million rows. Folk rules stand
beside ours at persistence 1 and floor 0; "as shipped" is the default rules (two scales, 2 of 3 looks, minimum effect,
quality checks beside the drift tests) at the same rate of false alarms. Without ``--full`` every table is there with
fewer draws, in about a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monitor.calibration import (
    Calibration,
    calibrate,
    log_tail_chi_square,
)
from monitor.drift.base import Pair
from monitor.drift.judge import judge
from monitor.judging import Judge
from monitor.layout import Layout
from monitor.panes import PaneStore
from monitor.profile import ReferenceProfile
from monitor.types import Alarm, AlarmRules, Array, Settings, WindowCounts, rows_window

COLUMNS, REFERENCE, PANE = 30, 50_000, 500
WINDOWS = tuple(rows_window(length, PANE) for length in (1000, 5000, 10_000))
#: One false alarm per million rows.
ERT_ROWS = 1_000_000
ERT_LOOKS = ERT_ROWS // PANE
NAMES = [f"x{i}" for i in range(COLUMNS)]
SHIPPED = Settings(rules=AlarmRules(ert_rows=ERT_ROWS))
SHIFTS = [
    ("mean 0.1 sd, all 30", COLUMNS, 0.1, 1.0),
    ("mean 0.25 sd, all 30", COLUMNS, 0.25, 1.0),
    ("mean 0.5 sd, all 30", COLUMNS, 0.5, 1.0),
    ("mean 0.1 sd, 1 of 30", 1, 0.1, 1.0),
    ("mean 0.25 sd, 1 of 30", 1, 0.25, 1.0),
    ("mean 0.5 sd, 1 of 30", 1, 0.5, 1.0),
    ("sd x 1.25, 1 of 30", 1, 0.0, 1.25),
    ("sd x 1.5, 1 of 30", 1, 0.0, 1.5),
]
#: Changes that are to be seen within 2,000 rows.
SHARP = [SHIFTS[4], SHIFTS[7]]
WEAKEST = SHIFTS[3]


@dataclass
class Looks:
    """What was seen at each look of one window: (looks, columns) each; ``pane[i]`` is when look i was."""

    pane: list[int]
    ks: list[Array]
    psi: list[Array]
    ks_log_p: list[Array]
    psi_log_p: list[Array]


class Stream:
    """One simulated stream run through panes, statistics and the shipped rules."""

    def __init__(self, layout: Layout, calibration: Calibration | None = None, settings: Settings = SHIPPED) -> None:
        self.layout = layout
        self.looks = {window.name: Looks([], [], [], [], []) for window in WINDOWS}
        self.alarms: list[tuple[int, Alarm]] = []
        self.judge = Judge(layout, settings, calibration)
        self.store = PaneStore(layout, WINDOWS, on_look=self._look)
        self.panes = 0
        self._judged = {window.name for window in settings.windows}

    def _look(self, counts: WindowCounts) -> None:
        pair = Pair(self.layout, self.layout.reference, counts.cells)
        judged = judge(pair, SHIPPED.rules, -math.log(ERT_LOOKS * COLUMNS), self.judge.calibration)
        seen = self.looks[counts.window]
        seen.pane.append(self.panes)
        seen.ks.append(judged.ks_low)
        seen.psi.append(judged.psi.value)
        seen.ks_log_p.append(judged.ks_log_p)
        seen.psi_log_p.append(judged.psi_log_p)
        if counts.window in self._judged:
            self.alarms.extend((self.panes, alarm) for alarm in self.judge.look_at_all("stable", counts))

    def push(self, rows: Array) -> None:
        """One pane of rows."""
        self.panes += 1
        self.store.add([rows], len(rows), 0)

    def matrix(self, window: str, name: str) -> Array:
        return np.array(getattr(self.looks[window], name))


class Source:
    """Normal columns, AR(1) when ``phi`` > 0, that change after ``change`` panes."""

    def __init__(self, seed: int, phi: float = 0.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._phi = phi
        self._state = self._rng.standard_normal(COLUMNS)

    def rows(self, shifted: int = 0, mean: float = 0.0, sd: float = 1.0) -> Array:
        values = self._rng.standard_normal((PANE, COLUMNS), dtype="f4")
        if self._phi:
            values = self._filtered(values.astype("f8"))
        if shifted:
            values[:, :shifted] = values[:, :shifted] * sd + mean
        return np.ascontiguousarray(values, "f4")

    def _filtered(self, noise: Array) -> Array:
        scale = math.sqrt(1 - self._phi**2)
        out = np.empty_like(noise)
        for i in range(len(noise)):
            self._state = self._phi * self._state + scale * noise[i]
            out[i] = self._state
        return out


def new_layout(seed: int) -> Layout:
    """A reference of its own for each stream, as models have."""
    values = np.random.default_rng(10_000 + seed).standard_normal((REFERENCE, COLUMNS), dtype="f4")
    return Layout(ReferenceProfile.from_arrays({"x": values}, names={"x": NAMES}))


def rules() -> dict[str, Callable[[Stream, str], Array]]:
    """Name -> does it alarm, per look. Folk first, ours at the end."""
    log05 = math.log(0.05)
    level = -math.log(ERT_LOOKS * COLUMNS)

    def p(stream: Stream, window: str) -> Array:
        return stream.matrix(window, "ks_log_p")

    def both(stream: Stream, window: str, budget: float) -> Array:
        half = level + math.log(budget / 2)
        found = (p(stream, window) < half) | (stream.matrix(window, "psi_log_p") < half)
        return np.asarray(found.any(axis=1))

    return {
        "KS p < .05 on any column": lambda s, w: (p(s, w) < log05).any(axis=1),
        "KS Bonferroni .05 per look": lambda s, w: (p(s, w) < log05 - math.log(COLUMNS)).any(axis=1),
        "KS Benjamini-Hochberg .05 per look": lambda s, w: _benjamini_hochberg(p(s, w)),
        "PSI >= 0.1 on any column": lambda s, w: (s.matrix(w, "psi") >= 0.1).any(axis=1),
        "PSI >= 0.25 on any column": lambda s, w: (s.matrix(w, "psi") >= 0.25).any(axis=1),
        "KS p < .05 on half the columns": lambda s, w: np.asarray((p(s, w) < log05).mean(axis=1) >= 0.5),
        "KS p < 1/(ERT F)": lambda s, w: (p(s, w) < level).any(axis=1),
        "PSI p < 1/(ERT F)": lambda s, w: (s.matrix(w, "psi_log_p") < level).any(axis=1),
        "ours: both tests, half each": lambda s, w: both(s, w, 1.0),
    }


def _benjamini_hochberg(log_p: Array) -> Array:
    ranked = np.sort(log_p, axis=1)
    return np.asarray((ranked <= np.log(0.05 * np.arange(1, COLUMNS + 1) / COLUMNS)).any(axis=1))


def two_scales(stream: Stream) -> list[int]:
    """Panes at which either of the windows of 1,000 and 10,000 rows alarms, each with half the budget."""
    half = -math.log(ERT_LOOKS * COLUMNS * 4)
    found: set[int] = set()
    for window in (WINDOWS[0].name, WINDOWS[2].name):
        over = (stream.matrix(window, "ks_log_p") < half) | (stream.matrix(window, "psi_log_p") < half)
        found |= {stream.looks[window].pane[i] for i in np.flatnonzero(over.any(axis=1))}
    return sorted(found)


def episodes(panes: list[int], gap: int) -> int:
    """Alarms that are further apart than one window."""
    return sum(1 for i, pane in enumerate(panes) if i == 0 or pane - panes[i - 1] > gap)


# --- tables ----------------------------------------------------------------------------------------------------------


def psi_null(draws: int) -> list[dict[str, float]]:
    """PSI of two samples of the same distribution: its mean, the size of the chi-square test, and of the folk rule."""
    rng = np.random.default_rng(0)
    found = []
    print("\nPSI under no drift, reference of 50,000 rows")
    print("bins rows | mean (chi-square's) | size of the nominal 0.1 % test | share >= 0.1 | >= 0.25")
    for bins in (10, 20):
        for n in (100, 200, 500, 1000, 5000, 10_000, 100_000):
            values = _simulated_psi(rng, bins, n, draws)
            log_p = log_tail_chi_square(values / (1 / n + 1 / REFERENCE), np.full(draws, bins - 1.0))
            row = {
                "bins": bins,
                "rows": n,
                "mean": float(values.mean()),
                "chi_square_mean": (bins - 1) * (1 / n + 1 / REFERENCE),
                "size_of_0.001": float((log_p < math.log(0.001)).mean()),
                "at_least_0.1": float((values >= 0.1).mean()),
                "at_least_0.25": float((values >= 0.25).mean()),
            }
            found.append(row)
            print(
                f"{bins:4} {n:6} | {row['mean']:.4f} ({row['chi_square_mean']:.4f}) | {row['size_of_0.001']:.4f} | "
                f"{row['at_least_0.1']:.4f} | {row['at_least_0.25']:.4f}"
            )
    return found


def _simulated_psi(rng: np.random.Generator, bins: int, n: int, draws: int) -> Array:
    even = np.full(bins, 1 / bins)
    p = (rng.multinomial(REFERENCE, even, draws) + 0.5) / (REFERENCE + 0.5 * bins)
    q = (rng.multinomial(n, even, draws) + 0.5) / (n + 0.5 * bins)
    return np.asarray(((q - p) * np.log(q / p)).sum(axis=1))


def no_drift(streams: int, rows: int) -> dict[str, Any]:
    """False alarms: share of tumbling windows in alarm, and episodes of the sliding window per million rows."""
    total: dict[str, list[float]] = {}
    shipped = scales = 0
    for seed in range(streams):
        stream, source = Stream(new_layout(seed)), Source(seed)
        for _ in range(rows // PANE):
            stream.push(source.rows())
        for window in WINDOWS:
            for name, rule in rules().items():
                over = rule(stream, window.name)
                panes = [stream.looks[window.name].pane[i] for i in np.flatnonzero(over)]
                tumbling = over[:: window.panes]
                sums = total.setdefault(f"{window.length}|{name}", [0, 0, 0])
                sums[0] += int(tumbling.sum())
                sums[1] += len(tumbling)
                sums[2] += episodes(panes, window.panes)
        scales += episodes(two_scales(stream), WINDOWS[2].panes)
        shipped += sum(1 for _, alarm in stream.alarms if alarm.state == "raised")
    millions = streams * rows / 1e6
    table = {key: {"windows": a / b, "episodes_per_1M": c / millions} for key, (a, b, c) in total.items()}
    print(f"\nNo drift, {millions:g} M rows: share of windows in alarm / episodes per million rows (1 is allowed)")
    for name in rules():
        cells = [table[f"{window.length}|{name}"] for window in WINDOWS]
        print(f"{name:36} " + "  ".join(f"{c['windows']:7.4f} / {c['episodes_per_1M']:6.1f}" for c in cells))
    print(f"{'ours: two scales':36} {scales / millions:.2f} per million   as shipped: {shipped / millions:.2f}")
    return {"rules": table, "two_scales_per_1M": scales / millions, "shipped_per_1M": shipped / millions}


def detection(runs: int, shifts: list[tuple[str, int, float, float]]) -> dict[str, Any]:
    """Runs that saw the change within 50,000 rows, and the median delay in rows; the change comes after 10,000 rows."""
    before, after = 20, 100
    found: dict[str, Any] = {}
    shown = ("PSI >= 0.1 on any column", "PSI >= 0.25 on any column", "KS p < .05 on half the columns")
    print(f"\nDetected of {runs} (median delay in rows)")
    for shift, columns, mean, sd in shifts:
        delays: dict[str, list[int]] = {}
        first_right = 0
        for run in range(runs):
            stream, source = Stream(new_layout(1000 + run)), Source(1000 + run)
            for pane in range(before + after):
                stream.push(source.rows(*((columns, mean, sd) if pane >= before else ())))
            for window in WINDOWS:
                for name, rule in rules().items():
                    panes = [stream.looks[window.name].pane[i] for i in np.flatnonzero(rule(stream, window.name))]
                    delays.setdefault(f"{window.length}|{name}", []).append(_delay(panes, before))
            delays.setdefault("two scales", []).append(_delay(two_scales(stream), before))
            raised = [(pane, alarm) for pane, alarm in stream.alarms if alarm.state == "raised" and pane > before]
            delays.setdefault("as shipped", []).append(_delay([pane for pane, _ in raised], before))
            first_right += bool(raised) and int(raised[0][1].column[1:]) < columns
        found[shift] = {name: _summary(values) for name, values in delays.items()} | {"right_column": first_right}
        cells = [f"10000|{name}" for name in shown]
        cells += [f"{w}|{rule}" for w in (1000, 10_000) for rule in ("KS p < 1/(ERT F)", "ours: both tests, half each")]
        cells += ["two scales", "as shipped"]
        print(f"{shift:22} " + "  ".join(_shown(found[shift][cell]) for cell in cells))
    print(
        "columns: PSI .1 (10k), PSI .25 (10k), half the columns (10k), KS alone 1k, ours 1k, KS alone 10k, ours 10k, "
        "two scales, as shipped"
    )
    return found


def power(runs: int) -> dict[str, Any]:
    """The weakest change in the shortest window, over so many runs that chance and a loss of power can be told apart.

    A tenth of a standard deviation is half of the distance that 1,000 rows can prove, so that it is seen only when
    chance helps; a share of 12 runs says little. Two tests at half the budget each are a price that KS alone, with all
    of it, does not pay; PSI is what it buys (changes of spread).
    """
    (cells,) = detection(runs, [WEAKEST]).values()
    found = {}
    print(
        f"{WEAKEST[0]}, 1,000 rows: share of {runs} runs that saw it, with its 95 % interval, and so of 12 runs all 12"
    )
    for rule in ("KS p < 1/(ERT F)", "ours: both tests, half each"):
        seen = cells[f"1000|{rule}"]["detected"]
        low, high = _wilson(seen, runs)
        found[rule] = {"detected": seen, "runs": runs, "low": low, "high": high}
        print(
            f"{rule:30} {seen / runs:.3f} ({low:.3f} to {high:.3f}); 12 of 12 in {(seen / runs) ** 12:.0%} of all tries"
        )
    return found


def _wilson(hits: float, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    z = 1.96
    middle = (hits + z * z / 2) / (of + z * z)
    half = z / (of + z * z) * math.sqrt(hits * (of - hits) / of + z * z / 4)
    return middle - half, middle + half


def _delay(panes: list[int], before: int) -> int:
    return next(((pane - before) * PANE for pane in panes if pane > before), -1)


def _summary(delays: list[int]) -> dict[str, float]:
    seen = sorted(delay if delay >= 0 else 10**9 for delay in delays)
    return {"detected": sum(delay >= 0 for delay in delays), "median": seen[len(seen) // 2]}


def _shown(cell: dict[str, float]) -> str:
    return f"{cell['detected']:3} ({cell['median']:5})" if cell["median"] < 10**9 else f"{cell['detected']:3} (    -)"


def dependent_rows(looks: int, history_rows: int) -> dict[str, Any]:
    """Share of looks in alarm on AR(1) streams without drift, before and after calibration on their own past."""
    found: dict[str, Any] = {}
    print("\nAR(1) streams without drift: share of looks in alarm (floor 0, persistence 1)")
    for phi in (0.5, 0.9):
        layout, source = new_layout(77), Source(77, phi)
        past = np.concatenate([source.rows() for _ in range(history_rows // PANE)])
        calibration = calibrate(layout, {name: past[:, i] for i, name in enumerate(NAMES)})
        plain, deflated = Stream(layout), Stream(layout, calibration)
        for _ in range(looks):
            rows = source.rows()
            plain.push(rows)
            deflated.push(rows)
        ours = rules()["ours: both tests, half each"]
        row = {
            f"{window.length}": [float(ours(s, window.name).mean()) for s in (plain, deflated)] for window in WINDOWS
        }
        row["inflation"] = [float(calibration.ks.mean()), float(calibration.psi.mean())]
        row["shipped_alarms"] = [float(len(s.alarms)) for s in (plain, deflated)]
        found[f"phi {phi}"] = row
        print(f"phi {phi}: " + "  ".join(f"{k}: {a:.3f} -> {b:.4f}" for k, (a, b) in row.items()))
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--full", action="store_true", help="the whole tables, with 10 M rows without drift")
    options.add_argument("--output", type=Path)
    tables: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "psi-null": (lambda: psi_null(4000), lambda: psi_null(40_000)),
        "no-drift": (lambda: no_drift(2, 250_000), lambda: no_drift(10, 1_000_000)),
        "detection": (lambda: detection(3, SHIFTS), lambda: detection(12, SHIFTS)),
        "dependent": (lambda: dependent_rows(200, 100_000), lambda: dependent_rows(1000, 150_000)),
        "power": (lambda: power(24), lambda: power(150)),
        "hundred-runs": (lambda: detection(10, SHARP), lambda: detection(100, SHARP)),
    }
    options.add_argument("--only", choices=tables, action="append", help="this table; may be repeated")
    chosen = options.parse_args()
    began = time.perf_counter()
    result = {name: tables[name][chosen.full]() for name in chosen.only or tables}
    print(f"\n{time.perf_counter() - began:.0f} s")
    if chosen.output:
        chosen.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
