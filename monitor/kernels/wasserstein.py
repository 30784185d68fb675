"""Wasserstein-1 over the reference's range, from counts of cells."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_F64 = read_only(types.float64)
_OUT = types.Array(types.float64, 1, "C")


@kernel((_I64, _I64, _I64, _F64, _I64, _OUT, _OUT, _OUT))
def wasserstein(
    reference: Array,
    window: Array,
    start: Array,
    knots: Array,
    knot_start: Array,
    low: Array,
    middle: Array,
    high: Array,
) -> None:
    """The integral of |F - G| between the first and the last finite knot of column f, within ``low`` and ``high``.

    That is the distance after values outside were moved to the nearest of the two. F - G is known at the knots; in a
    gap with r of m and w of n values it stays within [a - w/n, a + r/m], a being its value at the gap's left end.
    ``middle`` takes it as a straight line. NaN when one side has no value or there is no finite knot.
    """
    for f in range(low.size):
        first = start[f]
        last = start[f + 1] - 1
        k0 = knot_start[f]
        count = knot_start[f + 1] - k0
        m = 0
        n = 0
        for c in range(first, last):
            m += reference[c]
            n += window[c]
        finite = 0
        for j in range(count):
            finite += math.isfinite(knots[k0 + j])
        if m == 0 or n == 0 or finite == 0:
            low[f] = np.nan
            middle[f] = np.nan
            high[f] = np.nan
            continue
        least = 0.0
        line = 0.0
        most = 0.0
        fm = np.float64(m)
        fn = np.float64(n)
        whole = fm * fn
        balance = 0.0  # F - G at the left end, times m n; exact below 2**53, so that equal shares give exactly 0
        for j in range(count):
            r = reference[first + 2 * j] / fm
            w = window[first + 2 * j] / fn
            a = balance / whole
            balance += reference[first + 2 * j] * fn - window[first + 2 * j] * fm
            b = balance / whole
            width = knots[k0 + j] - knots[k0 + j - 1] if j > 0 else 0.0
            if j > 0 and math.isfinite(width):
                bottom = a - w
                top = a + r
                most += width * max(abs(bottom), abs(top))
                if bottom > 0 or top < 0:
                    least += width * min(abs(bottom), abs(top))
                if a * b >= 0:
                    line += width * (abs(a) + abs(b)) / 2
                else:
                    line += width * (a * a + b * b) / (2 * (abs(a) + abs(b)))
            balance += reference[first + 2 * j + 1] * fn - window[first + 2 * j + 1] * fm
        low[f] = least
        middle[f] = line
        high[f] = most
