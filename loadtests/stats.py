"""Intervals that hold whatever the distribution: of a median, and of the ratio between two sets of measurements."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95
#: Sets of more values than this are as wide as their quantiles say: the exact count would take long and change nothing.
_MOST: Final = 60


@dataclass(slots=True, frozen=True)
class Estimate:
    """A value and bounds around it. ``confidence`` is what the bounds really hold with."""

    value: float
    low: float
    high: float
    confidence: float

    def text(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the median that hold with ``CONFIDENCE`` or more; the whole range where there are too few values."""
    found = median(values)
    return found.low, found.high


def median(values: Sequence[float]) -> Estimate:
    """The median with bounds by order statistics. The whole range, with its true confidence, where values are few."""
    ordered, count = sorted(values), len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0.0)
    outside, rank = 2 * 0.5**count, 0
    while rank + 1 < count / 2 and outside + 2 * math.comb(count, rank + 1) * 0.5**count <= 1 - CONFIDENCE:
        rank += 1
        outside += 2 * math.comb(count, rank) * 0.5**count
    return Estimate(statistics.median(ordered), ordered[rank], ordered[-1 - rank], max(0.0, 1 - outside))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """What ``values`` are of ``base``, from rounds in which both were measured: the median of the rounds' ratios."""
    pairs = zip(values, base, strict=True)
    return median([value / unit for value, unit in pairs if unit > 0 and math.isfinite(value) and math.isfinite(unit)])


def ratio(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """What ``values`` are of ``base``, where the two were measured apart.

    The median of all ratios (Hodges and Lehmann 1963, in logarithms), with the bounds that belong to the rank-sum test
    of Mann and Whitney: the shift between two distributions of one shape. All values must be positive.
    """
    quotients = sorted(value / unit for value in values for unit in base)
    if not quotients:
        return Estimate(math.nan, math.nan, math.nan, 0.0)
    rank, outside = _rank_sum_cut(min(len(values), _MOST), min(len(base), _MOST))
    if len(values) > _MOST or len(base) > _MOST:
        rank = _normal_cut(len(values), len(base))
    return Estimate(statistics.median(quotients), quotients[rank], quotients[-1 - rank], 1 - outside)


def _rank_sum_cut(m: int, n: int) -> tuple[int, float]:
    """How many of the ``m * n`` ordered pairs may be cut off at each end, and the chance that is then outside."""
    counts = _rank_sum_counts(m, n)
    every = math.comb(m + n, n)
    rank, below = 0, counts[0]
    while rank + 1 < m * n / 2 and 2 * (below + counts[rank + 1]) <= (1 - CONFIDENCE) * every:
        rank += 1
        below += counts[rank]
    return rank, min(1.0, 2 * below / every)


def _rank_sum_counts(m: int, n: int) -> list[int]:
    """Orders of ``m`` and ``n`` values by their U statistic: coefficients of the Gaussian binomial (m + n over n)."""
    size = m * n + 1
    counts = [1] + [0] * (size - 1)
    for i in range(1, n + 1):
        for u in range(size - 1, m + i - 1, -1):  # times 1 - q ** (m + i)
            counts[u] -= counts[u - m - i]
        for u in range(i, size):  # over 1 - q ** i
            counts[u] += counts[u - i]
    return counts


def _normal_cut(m: int, n: int) -> int:
    z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return max(0, math.floor(m * n / 2 - z * math.sqrt(m * n * (m + n + 1) / 12)) - 1)
