"""The two-sample Kolmogorov-Smirnov distance from counts of cells: at the ends of cells, and as a certain interval."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
from numba import types
from numpy import int32, int64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64, _I32, _U16 = read_only(types.int64), read_only(types.int32), read_only(types.uint16)
#: Products that a signed integer of 32 bits holds.
_FEW: Final = 2.0**31
_OUT = types.Array(types.float64, 1, "C")


@helper
def _largest_of_few(expected: Array, found: Array, m: int64, n: int64) -> float:
    """The largest ``|expected n - found m|`` where m n, and with it every term, is below 2**31."""
    m32 = int32(m)
    n32 = int32(n)
    top = int32(0)
    bottom = int32(0)
    for c in range(expected.size):
        ahead = int32(int32(int32(expected[c]) * n32) - int32(int32(found[c]) * m32))
        top = ahead if ahead > top else top
        bottom = ahead if ahead < bottom else bottom
    return max(np.float64(top), -np.float64(bottom))


@helper
def _largest(expected: Array, found: Array, m: float, n: float, scratch: Array) -> float:
    """The same in doubles, exact below 2**53. The largest by halving what is left to be compared: of doubles only that
    becomes vector instructions."""
    distance = scratch[: expected.size]
    for c in range(expected.size):
        distance[c] = abs(expected[c] * n - found[c] * m)
    left = distance.size
    while left > 1:
        half = left >> 1
        lower = distance[:half]
        upper = distance[left - half : left]
        for c in range(half):
            lower[c] = lower[c] if lower[c] > upper[c] else upper[c]
        left -= half
    return float(distance[0])


@kernel(*[(expected, found, _I64, _OUT) for expected in (_I32, _I64) for found in (_U16, _I32, _I64)])
def ks_distance(expected: Array, found: Array, start: Array, low: Array) -> None:
    """``low`` of ``ks_interval`` alone, from running sums (``kernels.windows``) of the reference and of the window: for
    every look."""
    longest = 0
    for f in range(low.size):
        longest = max(longest, start[f + 1] - start[f])
    scratch = np.empty(longest)
    for f in range(low.size):
        before = expected[start[f] : start[f + 1] - 1]
        now = found[start[f] : start[f + 1] - 1]
        m = int64(before[before.size - 1])
        n = int64(now[now.size - 1])
        whole = np.float64(m) * np.float64(n)
        if whole == 0:
            low[f] = np.nan
        elif whole < _FEW:
            low[f] = _largest_of_few(before, now, m, n) / whole
        else:
            low[f] = _largest(before, now, np.float64(m), np.float64(n), scratch) / whole


@kernel((_I64, _I64, _I64, _OUT, _OUT))
def ks_interval(reference: Array, window: Array, start: Array, low: Array, high: Array) -> None:
    """``low[f] <= D <= high[f]`` for the values behind the cells of column f; NaN when one side has no value.

    At the ends of every cell both distribution functions are known: ``low`` is their largest distance there. Inside a
    gap that holds r of m and w of n values, the distance is largest when all r come before all w, or after: ``high``
    takes both. A gap where one side has nothing adds nothing, so with all distinct reference values as knots
    ``low == high == D``, ties included. The last cell of a column (missing) is left out.
    """
    for f in range(low.size):
        # Slices: an index that counts up from 0 needs no check for a negative one.
        expected = reference[start[f] : start[f + 1] - 1]
        found = window[start[f] : start[f + 1] - 1]
        m = np.float64(expected.sum())
        n = np.float64(found.sum())
        if m == 0 or n == 0:
            low[f] = np.nan
            high[f] = np.nan
            continue
        # All times m n, so exact below 2**53: the difference of the distribution functions, its extremes at the ends of
        # cells, and the extremes that it may have inside a gap.
        ahead = 0.0
        top = 0.0
        bottom = 0.0
        most = 0.0
        least = 0.0
        for k in range(expected.size >> 1):
            r = np.float64(expected[2 * k]) * n
            w = np.float64(found[2 * k]) * m
            most = max(most, ahead + r)
            least = min(least, ahead - w)
            ahead += r - w
            top = max(top, ahead)
            bottom = min(bottom, ahead)
            ahead += np.float64(expected[2 * k + 1]) * n - np.float64(found[2 * k + 1]) * m
            top = max(top, ahead)
            bottom = min(bottom, ahead)
        last = expected.size - 1
        most = max(most, ahead + np.float64(expected[last]) * n)
        least = min(least, ahead - np.float64(found[last]) * m)
        low[f] = max(top, -bottom) / (m * n)
        high[f] = max(top, -bottom, most, -least) / (m * n)
