"""Jensen-Shannon, L-infinity and chi-square from counts of bins.

Column f has the bins ``start[f]:start[f + 1]`` of both samples. Every distance is NaN where one sample has no row.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.float64, 1, "C")
_OCCUPIED = types.Array(types.int64, 1, "C")


@helper
def _totals(reference: Array, window: Array) -> tuple[int, int, int, bool]:
    """(reference rows, window rows, bins where either has any, do both have rows) of the bins of one column."""
    m = 0
    n = 0
    bins = 0
    for b in range(reference.size):
        m += reference[b]
        n += window[b]
        bins += reference[b] + window[b] > 0
    return m, n, bins, m > 0 and n > 0


@kernel((_I64, _I64, _I64, _OUT))
def jensen_shannon(reference: Array, window: Array, start: Array, out: Array) -> None:
    """``out[f]`` = the Jensen-Shannon distance: root of the divergence in bits, 0..1."""
    for f in range(out.size):
        m, n, _, defined = _totals(reference[start[f] : start[f + 1]], window[start[f] : start[f + 1]])
        total = 0.0
        for b in range(start[f], start[f + 1] if defined else start[f]):
            p = reference[b] / m
            q = window[b] / n
            middle = (p + q) / 2
            if p > 0:
                total += p * math.log2(p / middle)
            if q > 0:
                total += q * math.log2(q / middle)
        out[f] = math.sqrt(max(total / 2, 0.0)) if defined else np.nan


@kernel((_I64, _I64, _I64, _OUT))
def l_infinity(reference: Array, window: Array, start: Array, out: Array) -> None:
    """``out[f]`` = the largest difference of a bin's share, 0..1."""
    for f in range(out.size):
        m, n, _, defined = _totals(reference[start[f] : start[f + 1]], window[start[f] : start[f + 1]])
        largest = 0.0
        for b in range(start[f], start[f + 1] if defined else start[f]):
            largest = max(largest, abs(reference[b] / m - window[b] / n))
        out[f] = largest if defined else np.nan


@helper
def _pearson(reference: Array, window: Array) -> tuple[float, int]:
    """(Pearson's statistic of one column's bins, NaN where a side has no row; how many of them hold any)."""
    m, n, bins, defined = _totals(reference, window)
    total = 0.0
    for b in range(reference.size if defined else 0):
        both = reference[b] + window[b]
        if both > 0:
            difference = reference[b] / m - window[b] / n
            total += difference * difference / both
    return total * m * n if defined else np.nan, bins


@kernel((_I64, _I64, _I64, _OUT, _OCCUPIED))
def chi_square(reference: Array, window: Array, start: Array, out: Array, occupied: Array) -> None:
    """``out[f]`` = Pearson's statistic of homogeneity of the two samples over the ``occupied[f]`` bins that hold any
    row, without continuity correction.
    """
    for f in range(out.size):
        out[f], occupied[f] = _pearson(reference[start[f] : start[f + 1]], window[start[f] : start[f + 1]])


@kernel((_I64, _I64, _I64, _OUT, _OUT), brief=True)
def add_chi_square(before: Array, now: Array, start: Array, total: Array, degrees: Array) -> None:
    """Add that statistic to ``total[f]`` and its degrees of freedom to ``degrees[f]``, where both have rows."""
    for f in range(total.size):
        found, bins = _pearson(before[start[f] : start[f + 1]], now[start[f] : start[f + 1]])
        if found == found:  # noqa: PLR0124 - not NaN
            total[f] += found
            degrees[f] += bins - 1.0
