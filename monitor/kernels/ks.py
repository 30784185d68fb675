"""The two-sample Kolmogorov-Smirnov distance from counts of cells, as a certain interval."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.float64, 1, "C")


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
