"""Sums of doubles without rounding, as whole numbers: they add, subtract and merge in any order to the same bits.

Every finite double is a whole number of 2^-1126 (a 53-bit mantissa times a power of two that is -1126 at least), so a
sum of doubles is a Python int, and only the last step, from that int to a double, rounds.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from monitor.types import Array

#: Minus the binary exponent of the unit.
_SCALE: Final = 1126
_MANTISSA: Final = 53
#: The mantissa is summed in two halves: 2^26 of them do not fill a double.
_HALF: Final = 26
_MOST: Final = 1 << 25


def exact_sum(values: Array) -> int:
    """The sum of a vector of finite doubles in units of 2^-1126."""
    total = 0
    for start in range(0, len(values), _MOST):
        mantissa, exponent = np.frexp(np.asarray(values[start : start + _MOST], "f8"))
        whole = np.ldexp(mantissa, _MANTISSA).astype("i8")
        shifts, places = np.unique(exponent, return_inverse=True)
        high = np.bincount(places, weights=whole >> _HALF, minlength=len(shifts))
        low = np.bincount(places, weights=whole & ((1 << _HALF) - 1), minlength=len(shifts))
        for shift, upper, lower in zip(shifts.tolist(), high.tolist(), low.tolist(), strict=True):
            total += ((int(upper) << _HALF) + int(lower)) << (shift + _SCALE - _MANTISSA)
    return total


def exact_square_sum(values: Array) -> int:
    """The sum of squares, themselves not rounded either, in units of 2^-2252."""
    mantissa, exponent = np.frexp(np.asarray(values, "f8"))
    whole = np.ldexp(mantissa, _MANTISSA).astype("i8").tolist()
    shifts = (exponent + (_SCALE - _MANTISSA)).tolist()
    return sum([(number * number) << (2 * shift) for number, shift in zip(whole, shifts, strict=True)])


def mean(total: int, count: int) -> float:
    """A sum over a count, correctly rounded; NaN for none."""
    return total / (count << _SCALE) if count else float("nan")


def squared_deviation(squares: int, total: int, count: int) -> float:
    """Sum of squares around the mean from ``exact_square_sum`` and ``exact_sum``: no digits cancel."""
    return (squares * count - total * total) / (count << (2 * _SCALE)) if count else float("nan")


def moments(total: int, squares: int, count: int) -> tuple[float, float]:
    """(mean, unbiased variance) from ``exact_sum`` of values and of their squares; NaN where there are too few."""
    if count < 2:
        return mean(total, count), float("nan")
    return mean(total, count), max(0.0, squared_deviation(squares << _SCALE, total, count)) / (count - 1)
