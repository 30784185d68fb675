"""The population stability index from counts of bins."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.float64, 1, "C")


@kernel((_I64, _I64, _I64, types.int64, _OUT, _OUT, types.Array(types.int64, 1, "C")))
def psi(
    reference: Array, window: Array, start: Array, leave_out: int, out: Array, part: Array, occupied: Array
) -> None:
    """``out[f]`` = sum over bins of (q - p) ln(q / p), in nats; ``part[b]`` is bin b's own summand.

    p and q are shares after 1/2 was added to the counts of both sides, in the ``occupied[f]`` bins where either side
    has any. The last ``leave_out`` bins of each column do not take part. NaN when one side has no row at all.
    """
    for f in range(out.size):
        first = start[f]
        last = start[f + 1] - leave_out
        m = 0
        n = 0
        bins = 0
        for b in range(first, start[f + 1]):
            part[b] = 0.0
        for b in range(first, last):
            m += reference[b]
            n += window[b]
            if reference[b] + window[b] > 0:
                bins += 1
        occupied[f] = bins
        if m == 0 or n == 0:
            out[f] = np.nan
            continue
        total = 0.0
        for b in range(first, last):
            if reference[b] + window[b] > 0:
                p = (reference[b] + 0.5) / (m + 0.5 * bins)
                q = (window[b] + 0.5) / (n + 0.5 * bins)
                part[b] = (q - p) * math.log(q / p)
                total += part[b]
        out[f] = total
