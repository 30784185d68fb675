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
        first = start[f]
        last = start[f + 1] - 1
        m = 0
        n = 0
        for c in range(first, last):
            m += reference[c]
            n += window[c]
        if m == 0 or n == 0:
            low[f] = np.nan
            high[f] = np.nan
            continue
        fm = np.float64(m)
        fn = np.float64(n)
        r = 0.0  # reference values so far, times n; exact below 2**53
        w = 0.0  # window values so far, times m
        least = 0.0
        most = 0.0
        for c in range(first, last):
            r_before = r
            w_before = w
            r += np.float64(reference[c]) * fn
            w += np.float64(window[c]) * fm
            least = max(least, abs(r - w))
            if (c - first) & 1 == 0:
                most = max(most, r - w_before, w - r_before)
        low[f] = least / (fm * fn)
        high[f] = max(least, most) / (fm * fn)
