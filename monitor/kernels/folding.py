"""Counts of cells to counts of bins, and rates."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.int64, 1, "C")


@kernel((_I64, read_only(types.int32), _OUT))
def fold(cells: Array, bin_of: Array, out: Array) -> None:
    """``out[b]`` = sum of the cells whose ``bin_of`` is b. ``out`` is overwritten."""
    out[:] = 0
    for c in range(cells.size):
        out[bin_of[c]] += cells[c]


@kernel((_OUT, read_only(types.int32), types.int64))
def accumulate(total: Array, pane: Array, sign: int) -> None:
    """``total += sign * pane``: a pane enters a window, or leaves it."""
    for c in range(total.size):
        total[c] += sign * pane[c]
