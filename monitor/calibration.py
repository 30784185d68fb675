"""When is a difference more than chance: levels, tails, and how much rows depend on each other.

**Level.** A window is looked at once per pane. With one false alarm allowed per ``ERT`` looks, F columns and S windows,
a column's test may fire by chance once in ERT x F x S looks. Columns with an order have two tests, PSI and KS, each at
half of that; the others have PSI alone and all of it. Neighbouring looks share rows, which only makes alarms rarer.

**Tails**, closed form. Under no drift, with n rows against m of the reference:

* ``sqrt(n m / (n + m)) D`` is at most Kolmogorov's distribution (less with ties);
* ``PSI / (1/n + 1/m)`` is chi-square with one degree of freedom fewer than there are bins.

**Dependence.** Both hold for independent rows. Rows that follow each other in time are often alike; counts then vary
more, as if there were fewer rows. ``calibrate`` measures it on time-ordered traffic without drift: the traffic is cut
into blocks longer than the dependence, and the variance of the blocks' sums is compared with that of independent rows
(it is, exactly, the variance that a block bootstrap gives, without its noise of resampling). The tail of a supremum is
ruled by the place that varies most, so KS is deflated by the largest inflation of the distribution function; PSI is a
sum of squares with weights, the eigenvalues of the bins' covariance, and is compared with the largest weight times a
chi-square of equal mean. The largest eigenvalue of a covariance *estimated* from few blocks is far too large (about 1.5
for independent rows); so a direction is taken from some blocks and its variance from others, the cross-validated
eigenvalue of Bun, Bouchaud and Potters (2017). ``Inflation`` watches the same on live traffic, so that nobody takes
p-values of dependent rows for calibrated ones unwarned.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from monitor.errors import CalibrationError, StateError
from monitor.kernels import tails
from monitor.kernels.distances import add_chi_square
from monitor.layout import Layout
from monitor.types import HOUR_NS, AlarmRules, Array, Window, WindowCounts

#: Above this, p-values that assume independent rows are not called calibrated.
INFLATION_LIMIT: Final = 1.5
#: Blocks that a calibration is based on: the relative error of a variance is about sqrt(2 / blocks).
_BLOCKS: Final = 128
_LEAST_BLOCK: Final = 16
#: Parts of the blocks that are held out in turn when the largest weight of the PSI is measured.
_FOLDS: Final = 8
#: Variance may still grow by this from half the block length; by more, and the blocks are too short.
_STILL_GROWING: Final = 1.25
#: Places of the distribution function that are looked at: shares 0.05, 0.10, ... of the rows.
_PLACES: Final = np.arange(1, 20) / 20
#: Degrees of freedom times pairs of panes before a live inflation is believed.
_ENOUGH: Final = 400


def looks_per_false_alarm(rules: AlarmRules, window: Window, counts: WindowCounts) -> float:
    """The ERT in looks of this window, at least 1. Where its unit is not the window's, by the window's own traffic."""
    span_ns = max(1, counts.end_ns - counts.start_ns)
    if rules.ert_hours:
        look_ns = window.pane if window.unit == "time" else span_ns * window.pane / window.length
        return max(1.0, rules.ert_hours * HOUR_NS / look_ns)
    look_rows = window.pane if window.unit == "rows" else counts.rows * window.pane / window.length
    return max(1.0, rules.ert_rows / max(1.0, look_rows))


def log_level(rules: AlarmRules, window: Window, counts: WindowCounts, tests: int, windows: int) -> float:
    """ln of the p that one of ``tests`` (columns, times what traffic is cut into) may have by chance in one look.

    Never over 0.05; halve it where a column has two tests.
    """
    looks = looks_per_false_alarm(rules, window, counts) * max(1, tests) * max(1, windows)
    return -math.log(max(looks, 20.0))


def log_tail_chi_square(x: Array, degrees: Array) -> Array:
    """ln P(X > x), X chi-square with ``degrees`` degrees of freedom; 0 where x is NaN or there are none."""
    out = np.empty(len(x))
    tails.chi_square_log_tail(np.ascontiguousarray(x, "f8"), np.ascontiguousarray(degrees, "f8"), out)
    return out


def effective(n: Array, m: Array) -> Array:
    """n m / (n + m), 0 where a side is empty."""
    wide_n, wide_m = np.asarray(n, "f8"), np.asarray(m, "f8")
    return np.asarray(wide_n * wide_m / np.maximum(wide_n + wide_m, 1.0))


def critical_ks(log_p: Array, n: Array, m: Array, inflation: Array) -> Array:
    """The distances whose p is ``exp(log_p)``: ``sqrt(-ln(p / 2) / 2)`` (the tail's first term; p <= 0.05 leaves less
    than 1e-6 to the others) over ``sqrt(n m / (n + m) / inflation)``. Infinite where a side is empty."""
    size = effective(n, m)
    return np.asarray(
        np.where(size > 0, np.sqrt((math.log(2.0) - log_p) / 2 * inflation / np.maximum(size, 1e-9)), np.inf)
    )


def critical_psi(log_p: Array, n: Array, m: Array, degrees: Array, inflation: Array) -> Array:
    """The PSIs whose p is ``exp(log_p)`` with ``degrees`` degrees of freedom. Infinite where a side is empty."""
    size = effective(n, m)
    pairs = zip(np.asarray(log_p, "f8").tolist(), np.asarray(degrees, "f8").tolist(), strict=True)
    quantiles = np.array([_chi_square_quantile(p, k) for p, k in pairs])
    return np.asarray(np.where((size > 0) & (degrees > 0), quantiles * inflation / np.maximum(size, 1e-9), np.inf))


@functools.lru_cache(maxsize=4096)
def _chi_square_quantile(log_p: float, degrees: float) -> float:
    """The value whose tail is ``exp(log_p)``, by bisection."""
    if degrees <= 0:
        return math.inf
    # The tail is at most exp(log_p) here (Laurent and Massart 2000, lemma 1).
    low, high = 0.0, degrees + 2 * math.sqrt(-degrees * log_p) - 2 * log_p
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if log_tail_chi_square(np.array([middle]), np.array([degrees]))[0] > log_p else (low, middle)
        )
    return high


# --- dependence ------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True, eq=False)
class Calibration:
    """Inflation per column of the layout, 1 for independent rows.

    ``psi`` is the largest weight of the PSI's squares, and ``psi_degrees`` the share of the nominal degrees of freedom
    to be used with it; their product is the mean weight. ``settled`` is False where longer blocks still varied more:
    rows depend on each other over more rows than the traffic given can show.
    """

    sha256: str
    rows: int
    block_rows: int
    ks: Array
    psi: Array
    psi_degrees: Array
    settled: Array

    @classmethod
    def none(cls, layout: Layout) -> Calibration:
        """What holds for independent rows."""
        one = np.ones(len(layout.columns))
        return cls(layout.sha256, 0, 0, one, one, one, one > 0)

    @property
    def psi_mean(self) -> Array:
        """How many times as much counts of bins vary as those of independent rows, on average over the bins."""
        return np.asarray(self.psi * self.psi_degrees)

    def to_dict(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256,
            "rows": self.rows,
            "block_rows": self.block_rows,
            **{name: getattr(self, name).tolist() for name in ("ks", "psi", "psi_degrees", "settled")},
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Calibration:
        """Raises CalibrationError when the values are not what ``to_dict`` gives."""
        try:
            ks, psi, degrees = vectors = [np.array(found[name], "f8") for name in ("ks", "psi", "psi_degrees")]
            settled = np.array(found["settled"], bool)
            sizes = {vector.shape for vector in (*vectors, settled)}
            if len(sizes) != 1 or not all(np.isfinite(v).all() and (v > 0).all() for v in vectors):
                raise ValueError("vectors")
            return cls(str(found["sha256"]), int(found["rows"]), int(found["block_rows"]), ks, psi, degrees, settled)
        except (KeyError, TypeError, ValueError):
            raise CalibrationError("the calibration is damaged") from None


def calibrate(layout: Layout, table: Mapping[str, Any]) -> Calibration:
    """Measure dependence on drift-free traffic in the order of time: one 1-D array per column, by column name.

    Raises CalibrationError when there are too few rows.
    """
    rows = min((len(values) for values in table.values()), default=0)
    block = rows // _BLOCKS
    if block < _LEAST_BLOCK:
        raise CalibrationError(f"calibration needs at least {_BLOCKS * _LEAST_BLOCK} rows in order, got {rows}")
    estimates = [
        _column_inflation(layout, place, codes, block) for place, (codes, _) in enumerate(_codes(layout, table))
    ]
    ks, psi, degrees, settled = (np.array(values) for values in zip(*estimates, strict=True))
    return Calibration(layout.sha256, rows, block, ks, psi, degrees, settled)


def _codes(layout: Layout, table: Mapping[str, Any]) -> list[tuple[Array, int]]:
    return layout.codes_of(dict(table))


def _column_inflation(layout: Layout, place: int, codes: Array, block: int) -> tuple[float, float, float, bool]:
    found = layout.columns[place]
    places, count = _places(codes[codes < len(found.counts) - 1], len(found.counts) - 1)
    ks, half = (_variance_ratio(places, count, size) for size in (block, block // 2))
    psi, degrees = _psi_inflation(found.bin_of[codes], len(found.bins), block)
    settled = ks <= max(INFLATION_LIMIT, _STILL_GROWING * half)
    return max(1.0, ks), max(1.0, psi), degrees, settled


def _places(codes: Array, cells: int) -> tuple[Array, int]:
    """Which of ``_PLACES`` intervals of the distribution each value is in, and how many intervals there are."""
    if not len(codes):
        return codes, 1
    share = np.cumsum(np.bincount(codes, minlength=cells)) / len(codes)
    edges = np.unique(np.searchsorted(share, _PLACES))
    edges = edges[share[edges] < 1]
    return np.searchsorted(edges, codes), len(edges) + 1


def _variance_ratio(places: Array, count: int, block: int) -> float:
    """The largest variance of block sums over a quarter of a row each: what Kolmogorov's tail assumes is 1 at most."""
    below = np.cumsum(_block_sums(places, count, block), axis=1)[:, :-1]
    if len(below) < 2 or not below.shape[1]:
        return 1.0
    return float(below.var(axis=0, ddof=1).max() / (block * 0.25))


def _psi_inflation(bins: Array, count: int, block: int) -> tuple[float, float]:
    """(largest weight, share of the degrees of freedom) of the bins' standardised covariance, each weight at least 1 on
    average."""
    shares = np.bincount(bins, minlength=count) / len(bins)
    used = np.flatnonzero(shares > 0)
    if len(used) < 2:
        return 1.0, 1.0
    sums = _block_sums(bins, count, block)[:, used] / np.sqrt(block * shares[used])
    sums -= sums.mean(axis=0)
    mean = max(1.0, float((sums**2).sum()) / (len(sums) - 1) / (len(used) - 1))
    largest = max(mean, _largest_weight(sums))
    return largest, max(mean / largest, 1 / (len(used) - 1))


def _largest_weight(sums: Array) -> float:
    """The largest eigenvalue of the covariance of centred rows, without the bias of taking the direction that varies
    most from the rows that it is measured on."""
    of = np.arange(len(sums)) * _FOLDS // len(sums)
    squares = 0.0
    for part in range(_FOLDS):
        _, directions = np.linalg.eigh(sums[of != part].T @ sums[of != part])
        squares += float(((sums[of == part] @ directions[:, -1]) ** 2).sum())
    return squares / (len(sums) - 1)


def _block_sums(values: Array, count: int, block: int) -> Array:
    """How often each of ``count`` values is in each whole block of consecutive rows: (blocks, count)."""
    blocks = len(values) // block
    of = np.arange(blocks * block) // block
    return np.bincount(of * count + values[: blocks * block], minlength=blocks * count).reshape(blocks, count)


class Inflation:
    """Live: how much more consecutive panes differ than panes of independent rows would, per column.

    The mean of Pearson's statistic between neighbours over its degrees of freedom; slow changes hardly count. Covers
    dependence shorter than a pane.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._before: Array | None = None
        self._sum = np.zeros(len(layout.columns))
        self._degrees = np.zeros(len(layout.columns))

    def add(self, pane: Array) -> None:
        """The running sums of cells of one closed pane; panes without rows are passed over."""
        bins = self._layout.bins.fold(pane)
        before, self._before = self._before, bins
        if before is None:
            return
        add_chi_square(before, bins, self._layout.bin_start, self._sum, self._degrees)

    def estimate(self) -> Array:
        """Per column, 1 while too little was seen."""
        known = self._degrees >= _ENOUGH
        return np.asarray(np.where(known, self._sum / np.maximum(self._degrees, 1.0), 1.0))

    def state(self) -> Sequence[list[float]]:
        """Plain values for ``restore``."""
        return self._sum.tolist(), self._degrees.tolist(), [] if self._before is None else self._before.tolist()

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Raises StateError when the values are not those of this layout."""
        found = [np.array(values, "f8") for values in state]
        bins = int(self._layout.bin_start[-1])
        if [len(values) for values in found[:2]] != [len(self._sum)] * 2 or len(found[2]) not in (0, bins):
            raise StateError("the state's inflation is of other columns")
        self._sum, self._degrees = found[:2]
        self._before = found[2].astype("i8") if len(found[2]) else None
