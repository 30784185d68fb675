"""The kernels of ``monitor.kernels.compare`` written for reading: Python numbers, numpy and definitions only."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from typing import Any

import numpy as np

Values = Any


def float_differences(primary: Values, shadow: Values, abs_tol: float, rel_tol: float) -> tuple[int, int, float, float]:
    over, nonfinite, distances, relatives = 0, 0, [0.0], [0.0]
    for p, s in zip(map(float, primary), map(float, shadow), strict=True):
        if p == s or (math.isnan(p) and math.isnan(s)):
            continue
        if not (math.isfinite(p) and math.isfinite(s)):
            over += 1
            nonfinite += 1
            continue
        exact = abs(Fraction(p) - Fraction(s))
        distance = float(min(exact, Fraction(sys.float_info.max)))
        distances.append(distance)
        relatives.append(float(exact / max(abs(Fraction(p)), abs(Fraction(s)))))
        over += distance > abs_tol + rel_tol * abs(p)
    return over, nonfinite, max(distances), max(relatives)


def integer_differences(primary: Values, shadow: Values) -> tuple[int, float]:
    gaps = [abs(int(p) - int(s)) for p, s in zip(primary, shadow, strict=True)]
    return sum(gap != 0 for gap in gaps), float(max(gaps, default=0))


def argmax_agreement(primary: Values, shadow: Values, width: int) -> int:
    first, second = primary.reshape(-1, width), shadow.reshape(-1, width)
    return int(sum(np.argmax(p) == np.argmax(s) for p, s in zip(first, second, strict=True)))


def ks_two_sample(first: Values, second: Values) -> float:
    if not len(first) or not len(second):
        return 0.0
    return float(max(abs(np.mean(first <= at) - np.mean(second <= at)) for at in np.concatenate((first, second))))
