"""Paired outputs of two versions, compared element by element. Every vector is flat and contiguous.

Two values are *equal* when they compare equal or are both NaN. A pair of unequal values of which one is NaN or
infinite has no distance: it is counted as ``nonfinite`` and as over tolerance, and left out of the maxima, which
therefore are always finite.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Final

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

_LARGEST: Final = sys.float_info.max
_F32, _F64 = read_only(types.float32), read_only(types.float64)
_I64, _U64 = read_only(types.int64), read_only(types.uint64)
_REAL, _COUNT = types.float64, types.int64
_RESERVOIR = types.Array(types.float64, 2, "C")

#: A vector of one of the types that a kernel names.
Vector = np.ndarray[Any, np.dtype[Any]]


@kernel((_F32, _F32, _REAL, _REAL), (_F64, _F64, _REAL, _REAL))
def float_differences(primary: Vector, shadow: Vector, abs_tol: float, rel_tol: float) -> tuple[int, int, float, float]:
    """(over tolerance, nonfinite, largest absolute difference, largest relative difference) of two float vectors.

    Over tolerance: ``|p - s| > abs_tol + rel_tol * |p|``. Relative: ``|p - s| / max(|p|, |s|)``, in 0..2.
    A difference that no double holds counts as the largest double.
    """
    over = 0
    nonfinite = 0
    largest = 0.0
    largest_relative = 0.0
    for i in range(primary.size):
        p = np.float64(primary[i])
        s = np.float64(shadow[i])
        if p == s or (math.isnan(p) and math.isnan(s)):
            continue
        if not (math.isfinite(p) and math.isfinite(s)):
            over += 1
            nonfinite += 1
            continue
        scale = max(abs(p), abs(s))
        if scale > _LARGEST / 2:  # the difference may overflow, that of the halves cannot
            half = abs(p / 2 - s / 2)
            difference = min(half, _LARGEST / 2) * 2
            relative = half / (scale / 2)
        else:
            difference = abs(p - s)
            relative = difference / scale
        largest = max(largest, difference)
        largest_relative = max(largest_relative, relative)
        if difference > abs_tol + rel_tol * abs(p):
            over += 1
    return over, nonfinite, largest, largest_relative


@kernel((_I64, _I64), (_U64, _U64))
def integer_differences(primary: Vector, shadow: Vector) -> tuple[int, float]:
    """(unequal elements, largest absolute difference) of two integer vectors; exact up to the last conversion."""
    unequal = 0
    largest = np.uint64(0)
    for i in range(primary.size):
        p = primary[i]
        s = shadow[i]
        if p == s:
            continue
        unequal += 1
        # Modulo 2**64 the difference of the larger and the smaller is right whatever the signs are.
        gap = np.uint64(p) - np.uint64(s) if p > s else np.uint64(s) - np.uint64(p)
        largest = max(largest, gap)
    return unequal, float(largest)


@kernel((_F32, _F32, _COUNT), (_F64, _F64, _COUNT), (_I64, _I64, _COUNT), (_U64, _U64, _COUNT))
def argmax_agreement(primary: Vector, shadow: Vector, width: int) -> int:
    """Rows of ``width`` elements whose largest element stands at the same place. The first largest counts, and NaN is
    larger than any number, as for numpy. ``width`` divides the size."""
    agreeing = 0
    for start in range(0, primary.size, width):
        best_p = 0
        best_s = 0
        for j in range(1, width):
            p = primary[start + best_p]
            s = shadow[start + best_s]
            next_p = primary[start + j]
            next_s = shadow[start + j]
            if p == p and (next_p > p or next_p != next_p):  # noqa: PLR0124 - false for NaN, of any element type
                best_p = j
            if s == s and (next_s > s or next_s != next_s):  # noqa: PLR0124
                best_s = j
        if best_p == best_s:
            agreeing += 1
    return agreeing


_SAMPLING = (_RESERVOIR, _RESERVOIR, types.int64[::1], types.uint64[::1])


@kernel((_F32, _F32, *_SAMPLING), (_F64, _F64, *_SAMPLING))
def sample_pairs(
    primary: Vector, shadow: Vector, kept_primary: Vector, kept_shadow: Vector, seen: Vector, state: Vector
) -> None:
    """Offer every pair of elements to the uniform reservoir of its column (algorithm R).

    Element i belongs to column ``i % columns``; ``kept_*`` are [columns, capacity], ``seen`` counts the pairs offered
    to each column. Pairs with a NaN are left out. ``state`` is the xorshift64* generator's single word, not 0.
    """
    columns, capacity = kept_primary.shape
    word = state[0]
    for i in range(primary.size):
        p = np.float64(primary[i])
        s = np.float64(shadow[i])
        if math.isnan(p) or math.isnan(s):
            continue
        column = i % columns
        slot = seen[column]
        seen[column] += 1
        if slot >= capacity:
            word ^= word >> np.uint64(12)
            word ^= word << np.uint64(25)
            word ^= word >> np.uint64(27)
            drawn = (word * np.uint64(2685821657736338717)) >> np.uint64(1)
            slot = np.int64(drawn % np.uint64(slot + 1))
        if slot < capacity:
            kept_primary[column, slot] = p
            kept_shadow[column, slot] = s
    state[0] = word


@kernel((_F64, _F64))
def ks_two_sample(first: Vector, second: Vector) -> float:
    """The largest distance between two empirical distribution functions, in 0..1; 0 when either is empty.

    Both vectors are sorted ascending and without NaN.
    """
    if first.size == 0 or second.size == 0:
        return 0.0
    i = 0
    j = 0
    largest = 0.0
    while i < first.size and j < second.size:
        value = min(first[i], second[j])
        while i < first.size and first[i] == value:
            i += 1
        while j < second.size and second[j] == value:
            j += 1
        largest = max(largest, abs(i / first.size - j / second.size))
    return largest
