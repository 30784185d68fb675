"""What every look measures: bins from running sums of cells, the Kolmogorov-Smirnov distance at the ends of cells, PSI;
each by itself, and all with one call."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
from numba import types
from numpy import int32, int64

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_I64, _I32, _U16 = read_only(types.int64), read_only(types.int32), read_only(types.uint16)
_SUMMED: Final = (_I64, _I32, _U16)
#: Of the reference and of the window.
_SIDES: Final = [(expected, found) for expected in (_I32, _I64) for found in _SUMMED]
_FLAGS = read_only(types.boolean)
_OUT, _WHOLE = types.Array(types.float64, 1, "C"), types.Array(types.int64, 1, "C")
#: Products that a signed integer of 32 bits holds.
_FEW: Final = 2.0**31


# --- bins ------------------------------------------------------------------------------------------------------------


@helper
def _fold(running: Array, last: Array, bin_of: Array, run_start: Array, out: Array) -> None:
    out[:] = 0
    for f in range(run_start.size - 1):
        before = int64(0)
        for r in range(run_start[f], run_start[f + 1]):
            upto = int64(running[last[r]])
            out[bin_of[r]] += upto - before
            before = upto


@kernel(*[(summed, _I64, _I32, _I64, _WHOLE) for summed in _SUMMED], brief=True)
def fold(running: Array, last: Array, bin_of: Array, run_start: Array, out: Array) -> None:
    """``out[b]`` = how many values are in the cells of bin b, by running sums of cells (``kernels.windows``).

    Bins are made of runs of neighbours: run r, which ends with cell ``last[r]``, belongs to bin ``bin_of[r]``; those of
    column f are ``run_start[f]`` to ``run_start[f + 1]``. ``out`` is overwritten.
    """
    _fold(running, last, bin_of, run_start, out)


@helper
def _sizes(running: Array, missing_cell: Array, rows: Array, missing: Array) -> None:
    for f in range(rows.size):
        rows[f] = running[missing_cell[f]]
        missing[f] = rows[f] - int64(running[missing_cell[f] - 1])


@kernel(*[(summed, _I64, _I32, _I64, _I64, _WHOLE, _WHOLE, _WHOLE) for summed in _SUMMED], brief=True)
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
    _sizes(running, missing_cell, rows, missing)


# --- distances -------------------------------------------------------------------------------------------------------


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


@helper
def _ks(expected: Array, found: Array, start: Array, low: Array) -> None:
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


@kernel(*[(*sides, _I64, _OUT) for sides in _SIDES])
def ks_distance(expected: Array, found: Array, start: Array, low: Array) -> None:
    """``low`` of ``kernels.ks.ks_interval`` alone, from running sums (``kernels.windows``) of the reference and of the
    window."""
    _ks(expected, found, start, low)


@helper
def _totals(reference: Array, window: Array) -> tuple[int, int, int, bool]:
    """(reference rows, window rows, bins where either has any, do both have rows) of the bins of one column."""
    m = 0
    n = 0
    bins = 0
    for b in range(reference.size):
        m += reference[b]
        n += window[b]
        bins += reference[b] + window[b] > 0
    return m, n, bins, m > 0 and n > 0


@helper
def _psi(
    reference: Array, window: Array, start: Array, leave_out: int, out: Array, part: Array, occupied: Array
) -> None:
    part[:] = 0.0
    ratios = np.empty(part.size)
    for f in range(out.size):
        first = start[f]
        last = start[f + 1] - leave_out
        expected = reference[first:last]
        found = window[first:last]
        summand = part[first:last]
        ratio = ratios[first:last]
        m, n, bins, defined = _totals(expected, found)
        occupied[f] = bins
        if not defined:
            out[f] = np.nan
            continue
        for b in range(expected.size):
            p = (expected[b] + 0.5) / (m + 0.5 * bins)
            q = (found[b] + 0.5) / (n + 0.5 * bins)
            summand[b] = q - p if expected[b] + found[b] > 0 else 0.0
            ratio[b] = q / p if expected[b] + found[b] > 0 else 1.0
        total = 0.0
        for b in range(expected.size):  # apart from the above, which are vector instructions
            summand[b] *= math.log(ratio[b])
            total += summand[b]
        out[f] = total


@kernel((_I64, _I64, _I64, types.int64, _OUT, _OUT, _WHOLE), brief=True)
def psi(
    reference: Array, window: Array, start: Array, leave_out: int, out: Array, part: Array, occupied: Array
) -> None:
    """``out[f]`` = sum over bins of (q - p) ln(q / p), in nats; ``part[b]`` is bin b's own summand.

    Column f has the bins ``start[f]:start[f + 1]`` of both samples. p and q are shares after 1/2 was added to the
    counts of both sides, in the ``occupied[f]`` bins where either side has any. The last ``leave_out`` bins of each
    column do not take part. NaN where one sample has no row.
    """
    _psi(reference, window, start, leave_out, out, part, occupied)


# --- both ------------------------------------------------------------------------------------------------------------

_DISTANCES, _SIZES = types.Array(types.float64, 2, "C"), types.Array(types.int64, 2, "C")


_PLACES = (_I64, _FLAGS, _I64, _I32, _I64, _I64)


@kernel(*[(*_PLACES, _DISTANCES, _SIZES, expected, _I64, found) for expected, found in _SIDES])
def measure(
    start: Array,
    discrete: Array,
    last: Array,
    bin_of: Array,
    run_start: Array,
    bin_start: Array,
    distances: Array,
    sizes: Array,
    expected: Array,
    reference: Array,
    found: Array,
) -> bool:
    """What ``ks_distance``, ``tally`` and ``psi`` find, for every look: ``distances`` are KS (NaN for ``discrete``
    columns) and PSI, ``sizes`` the window's rows, its missing ones and the occupied bins, each by column. Whether all
    sizes are what they were before.

    ``expected`` and ``found`` are running sums of the reference and of the window, ``reference`` counts of its bins.
    """
    low = distances[0]
    _ks(expected, found, start, low)
    for f in range(low.size):
        low[f] = np.nan if discrete[f] else low[f]
    bins = np.empty_like(reference)
    _fold(found, last, bin_of, run_start, bins)
    before = sizes.copy()
    _sizes(found, start[1:] - 1, sizes[0], sizes[1])
    _psi(reference, bins, bin_start, 0, distances[1], np.empty(bins.size), sizes[2])
    same = True
    for f in range(low.size):
        for k in range(sizes.shape[0]):
            same = same and sizes[k, f] == before[k, f]
    return same
