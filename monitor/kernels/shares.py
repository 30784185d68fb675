"""Shares of a window's rows that one cell each counts."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64, _F64 = read_only(types.int64), read_only(types.float64)


@kernel(
    *[(read_only(counts), _I64, _I64, _I64, _F64, types.float64) for counts in (types.int64, types.int32, types.uint16)]
)
def any_exceeds(cells: Array, at: Array, rows: Array, column: Array, allowed: Array, margin: float) -> bool:
    """Whether some check's share of its column's rows, in cell ``at[i]``, is over ``allowed[i]`` by ``margin`` or more.

    ``column[i]`` is the column of check i, of which there are as many as ``at`` has; without rows the share is 0.
    """
    over = 0
    for i in range(at.size):
        over += cells[at[i]] / max(rows[column[i]], 1) - allowed[i] >= margin
    return over > 0
