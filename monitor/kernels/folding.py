"""Running sums of cells to counts of bins."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64, _I32 = read_only(types.int64), read_only(types.int32)
_OUT = types.Array(types.int64, 1, "C")
_SUMMED = (types.int64, types.int32, types.uint16)


@helper
def _fold(running: Array, last: Array, bin_of: Array, run_start: Array, out: Array) -> None:
    out[:] = 0
    for f in range(run_start.size - 1):
        before = int64(0)
        for r in range(run_start[f], run_start[f + 1]):
            upto = int64(running[last[r]])
            out[bin_of[r]] += upto - before
            before = upto


@kernel(*[(read_only(summed), _I64, _I32, _I64, _OUT) for summed in _SUMMED], brief=True)
def fold(running: Array, last: Array, bin_of: Array, run_start: Array, out: Array) -> None:
    """``out[b]`` = how many values are in the cells of bin b, by running sums of cells (``kernels.windows``).

    Bins are made of runs of neighbours: run r, which ends with cell ``last[r]``, belongs to bin ``bin_of[r]``; those of
    column f are ``run_start[f]`` to ``run_start[f + 1]``. ``out`` is overwritten.
    """
    _fold(running, last, bin_of, run_start, out)


@kernel(*[(read_only(summed), _I64, _I32, _I64, _I64, _OUT, _OUT, _OUT) for summed in _SUMMED], brief=True)
def tally(
    running: Array,
    last: Array,
    bin_of: Array,
    run_start: Array,
    missing_cell: Array,
    bins: Array,
    rows: Array,
    missing: Array,
) -> None:
    """``fold`` into ``bins``; and per column f its ``rows[f]`` and how many of them are ``missing[f]``, which its last
    cell, ``missing_cell[f]``, counts."""
    _fold(running, last, bin_of, run_start, bins)
    for f in range(rows.size):
        rows[f] = running[missing_cell[f]]
        missing[f] = rows[f] - int64(running[missing_cell[f] - 1])
