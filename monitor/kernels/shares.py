"""Shares of a window's rows that one cell each counts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int64

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64, _F64 = read_only(types.int64), read_only(types.float64)


@kernel(
    *[
        (_I64, _I64, _I64, _F64, types.float64, read_only(summed), _I64)
        for summed in (types.int64, types.int32, types.uint16)
    ],
    brief=True,
)
def any_exceeds(
    at: Array, before: Array, column: Array, allowed: Array, margin: float, running: Array, rows: Array
) -> bool:
    """Whether some check's share of its column's rows, in cell ``at[i]``, is over ``allowed[i]`` by ``margin`` or more.

    ``running``: sums of cells (``kernels.windows``); ``before[i]`` is the cell before ``at[i]`` in its column, -1 where
    there is none. ``column[i]`` is the column of check i, of which there are as many as ``at`` has; without rows the
    share is 0.
    """
    over = 0
    for i in range(at.size):
        count = int64(running[at[i]]) - (int64(running[before[i]]) if before[i] >= 0 else 0)
        over += count / max(rows[column[i]], 1) - allowed[i] >= margin
    return over > 0
