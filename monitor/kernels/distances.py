"""Jensen-Shannon, L-infinity and chi-square from counts of bins; no smoothing."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.float64, 1, "C")


@kernel((_I64, _I64, _I64, _OUT))
def jensen_shannon(reference: Array, window: Array, start: Array, out: Array) -> None:
    """``out[f]`` = the Jensen-Shannon distance: root of the divergence in bits, 0..1. NaN when one side is empty."""
    for f in range(out.size):
        m = 0
        n = 0
        for b in range(start[f], start[f + 1]):
            m += reference[b]
            n += window[b]
        if m == 0 or n == 0:
            out[f] = np.nan
            continue
        total = 0.0
        for b in range(start[f], start[f + 1]):
            p = reference[b] / m
            q = window[b] / n
            middle = (p + q) / 2
            if p > 0:
                total += p * math.log2(p / middle)
            if q > 0:
                total += q * math.log2(q / middle)
        out[f] = math.sqrt(max(total / 2, 0.0))


@kernel((_I64, _I64, _I64, _OUT))
def l_infinity(reference: Array, window: Array, start: Array, out: Array) -> None:
    """``out[f]`` = the largest difference of a bin's share, 0..1. NaN when one side is empty."""
    for f in range(out.size):
        m = 0
        n = 0
        for b in range(start[f], start[f + 1]):
            m += reference[b]
            n += window[b]
        if m == 0 or n == 0:
            out[f] = np.nan
            continue
        largest = 0.0
        for b in range(start[f], start[f + 1]):
            largest = max(largest, abs(reference[b] / m - window[b] / n))
        out[f] = largest


@kernel((_I64, _I64, _I64, _OUT, types.Array(types.int64, 1, "C")))
def chi_square(reference: Array, window: Array, start: Array, out: Array, occupied: Array) -> None:
    """``out[f]`` = Pearson's statistic of homogeneity of the two samples over the ``occupied[f]`` bins that hold any
    row, without continuity correction. NaN when one side is empty.
    """
    for f in range(out.size):
        m = 0
        n = 0
        bins = 0
        for b in range(start[f], start[f + 1]):
            m += reference[b]
            n += window[b]
            if reference[b] + window[b] > 0:
                bins += 1
        occupied[f] = bins
        if m == 0 or n == 0:
            out[f] = np.nan
            continue
        total = 0.0
        for b in range(start[f], start[f + 1]):
            both = reference[b] + window[b]
            if both > 0:
                difference = reference[b] / m - window[b] / n
                total += difference * difference / both
        out[f] = total * m * n
