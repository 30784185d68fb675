"""Natural logarithms of tail probabilities, precise far out where the probability itself is no double any more."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_F64 = read_only(types.float64)
_OUT = types.Array(types.float64, 1, "C")
_TINY: Final = 1e-300
_EPSILON: Final = 1e-16
_MOST_TERMS: Final = 100_000


@kernel((_F64, _OUT))
def kolmogorov_log_tail(x: Array, out: Array) -> None:
    """``out[i]`` = ln P(K > x[i]), K the limit of sqrt(n) D: 2 sum (-1)^(k-1) exp(-2 k^2 x^2). NaN gives 0.

    Below x = 1 that series converges badly; there its theta-function twin of P(K <= x) is summed.
    """
    for i in range(x.size):
        v = x[i]
        if not v > 0.03:  # P is 1 to the last bit
            out[i] = 0.0
        elif v < 1.0:
            total = 0.0
            for k in range(1, 8):
                total += math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8 * v * v))
            out[i] = math.log1p(-math.sqrt(2 * math.pi) / v * total)
        else:
            total = 1.0
            for k in range(2, 8):
                sign = 1.0 if k % 2 == 1 else -1.0
                total += sign * math.exp(-2.0 * (k * k - 1) * v * v)
            out[i] = math.log(2.0) - 2.0 * v * v + math.log(total)


@kernel((_F64, _F64, _OUT))
def chi_square_log_tail(x: Array, degrees: Array, out: Array) -> None:
    """``out[i]`` = ln P(X > x[i]), X chi-square with ``degrees[i]`` > 0 degrees of freedom (not only whole ones).

    The regularised incomplete gamma function: its series below the mean, its continued fraction (Lentz) above. NaN,
    or no degree of freedom, gives 0.
    """
    for i in range(x.size):
        a = degrees[i] / 2
        v = x[i] / 2
        if not (v > 0 and a > 0):
            out[i] = 0.0
            continue
        front = a * math.log(v) - v - math.lgamma(a)
        if v < a + 1:
            term = 1.0 / a
            total = term
            k = a
            for _ in range(_MOST_TERMS):
                k += 1
                term *= v / k
                total += term
                if term < total * _EPSILON:
                    break
            out[i] = math.log1p(-min(total * math.exp(front), 1.0 - 1e-16))
        else:
            b = v + 1 - a
            c = 1 / _TINY
            d = 1 / b
            h = d
            for k in range(1, _MOST_TERMS):
                an = -k * (k - a)
                b += 2
                d = an * d + b
                d = 1 / (d if abs(d) > _TINY else _TINY)
                c = b + an / c
                c = c if abs(c) > _TINY else _TINY
                h *= d * c
                if abs(d * c - 1) < _EPSILON * 4:
                    break
            out[i] = min(front + math.log(h), 0.0)
