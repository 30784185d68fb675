"""Counts of cells to counts of bins."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numba import types
from numpy import int64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64 = read_only(types.int64)
_OUT = types.Array(types.int64, 1, "C")
_COUNTED = (types.int64, types.int32, types.uint16)


@helper
def _fold(cells: Array, start: Array, bin_of: Array, out: Array) -> None:
    out[:] = 0
    for r in range(bin_of.size):
        run = cells[start[r] : start[r + 1]]
        total = int64(0)
        for c in range(run.size):
            total += int64(run[c])
        out[bin_of[r]] += total


@kernel(*[(read_only(counts), _I64, read_only(types.int32), _OUT) for counts in _COUNTED])
def fold(cells: Array, start: Array, bin_of: Array, out: Array) -> None:
    """``out[b]`` = sum of the cells in bin b, which ``bin_of[r]`` is for cells ``start[r]`` to ``start[r + 1]``.

    Bins are made of neighbours, so runs are few and their sums are vector instructions. ``out`` is overwritten.
    """
    _fold(cells, start, bin_of, out)


@kernel(*[(read_only(counts), _I64, read_only(types.int32), _I64, _I64, _OUT, _OUT, _OUT) for counts in _COUNTED])
def tally(
    cells: Array,
    start: Array,
    bin_of: Array,
    bin_start: Array,
    missing_cell: Array,
    bins: Array,
    rows: Array,
    missing: Array,
) -> None:
    """``fold`` into ``bins``; and per column f, whose bins begin at ``bin_start[f]``, its ``rows[f]`` and how many of
    them are ``missing[f]``, which cell ``missing_cell[f]`` counts."""
    _fold(cells, start, bin_of, bins)
    for f in range(rows.size):
        rows[f] = bins[bin_start[f] : bin_start[f + 1]].sum()
        missing[f] = cells[missing_cell[f]]
