"""The monitor's kernels done the slow, obvious way: one value at a time, exact fractions where that is cheap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def cell(value: float, knots: Sequence[float]) -> int:
    """The cell of one value: 2j in the gap below knot j, 2j + 1 on it, 2K + 1 for NaN."""
    if math.isnan(value):
        return 2 * len(knots) + 1
    below = sum(knot < value for knot in knots)
    return 2 * below + (below < len(knots) and knots[below] == value)


def cell_counts(values: Sequence[float], knots: Sequence[float]) -> list[int]:
    counts = [0] * (2 * len(knots) + 2)
    for value in values:
        counts[cell(value, knots)] += 1
    return counts


def ks_distance(reference: Array, window: Array) -> float:
    """sup |F - G| of two samples; NaN left out."""
    a, b = reference[~np.isnan(reference)], window[~np.isnan(window)]
    if not len(a) or not len(b):
        return math.nan
    points = np.unique(np.concatenate([a, b]))
    return max(abs(float((a <= x).mean()) - float((b <= x).mean())) for x in points)


def ks_interval(reference: Sequence[int], window: Sequence[int]) -> tuple[Fraction, Fraction]:
    """(least, largest) sup |F - G| of values behind cells of one column, the last of which (missing) is left out: in
    every gap all values of one sample may lie before all of the other."""
    m, n = sum(reference[:-1]), sum(window[:-1])
    low = high = f = g = Fraction(0)
    for cell, (r, w) in enumerate(zip(reference[:-1], window[:-1], strict=True)):
        if cell % 2 == 0:
            high = max(high, abs(f + Fraction(r, m) - g), abs(g + Fraction(w, n) - f))
        f, g = f + Fraction(r, m), g + Fraction(w, n)
        low = max(low, abs(f - g))
    return low, max(low, high)


def psi(reference: Sequence[int], window: Sequence[int]) -> float:
    """With 1/2 added to every bin that either side occupies."""
    pairs = [(r, w) for r, w in zip(reference, window, strict=True) if r + w > 0]
    m, n = sum(r for r, _ in pairs), sum(w for _, w in pairs)
    if not m or not n:
        return math.nan
    total = 0.0
    for r, w in pairs:
        p, q = (r + 0.5) / (m + 0.5 * len(pairs)), (w + 0.5) / (n + 0.5 * len(pairs))
        total += (q - p) * math.log(q / p)
    return total


def log_tail_kolmogorov(v: float) -> float:
    """Seven terms of the series, of which one converges fast on each side of 1."""
    if v < 1:
        total = sum(math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8 * v * v)) for k in range(1, 8))
        return math.log1p(-math.sqrt(2 * math.pi) / v * total)
    total = sum((-1.0) ** (k - 1) * math.exp(-2.0 * (k * k - 1) * v * v) for k in range(1, 8))
    return math.log(2.0) - 2.0 * v * v + math.log(total)


def bin_of(value: float, edges: Sequence[float]) -> int:
    """Right-closed bins: the number of edges below the value; missing is the last."""
    return len(edges) + 1 if math.isnan(value) else sum(edge < value for edge in edges)


def wasserstein(reference: Array, window: Array, low: float, high: float) -> float:
    """Of two samples, after values outside [low, high] were moved to its ends."""
    a, b = reference[~np.isnan(reference)], window[~np.isnan(window)]
    a, b = np.clip(a, low, high), np.clip(b, low, high)
    points = np.unique(np.concatenate([a, b]))
    return sum(abs(float((a <= x).mean()) - float((b <= x).mean())) * float(y - x) for x, y in pairwise(points))


class Alarms:
    """One column's alarm, from the whole history of looks each time: (window, over, quiet)."""

    def __init__(self, k: int, m: int, clear_looks: int) -> None:
        self.k, self.m, self.clear_looks = k, m, clear_looks
        self.looks: list[tuple[str, bool, bool]] = []
        self.active = False
        self.episodes = 0

    def look(self, window: str, over: bool, quiet: bool) -> str:
        self.looks.append((window, over, quiet))
        own = [o for name, o, _ in self.looks if name == window]
        if not self.active:
            if over and sum(own[-self.m :]) >= self.k:
                self.active = True
                self.episodes += 1
                return "raised"
            return ""
        for name in {name for name, _, _ in self.looks}:
            last = [q for other, _, q in self.looks if other == name][-self.clear_looks :]
            if len(last) < self.clear_looks or not all(last):
                return ""
        self.active = False
        return "cleared"
