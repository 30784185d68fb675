"""Natural logarithms of tail probabilities, precise far out where the probability itself is no double any more; and the
two tests of a look, which are held against them."""

from __future__ import annotations

import math
from typing import Any, Final, TypeAlias

import numpy as np
from numba import types

from monitor.kernels._jit import helper, kernel, read_only

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_F64 = read_only(types.float64)
_OUT = types.Array(types.float64, 1, "C")
_TABLE = types.Array(types.float64, 2, "C", readonly=True)
_LOG_P = types.Array(types.float64, 2, "C")
_FLAGS = types.Array(types.boolean, 2, "C")
_TOLD = types.Array(types.float32, 2, "C")
_LN_10: Final = math.log(10.0)
_TINY: Final = 1e-300
_EPSILON: Final = 1e-16
_MOST_TERMS: Final = 100_000


@helper
def _kolmogorov(v: float) -> float:
    if not v > 0.03:  # P is 1 to the last bit
        return 0.0
    if v < 1.0:
        total = 0.0
        for k in range(1, 8):
            term = math.exp(-((2 * k - 1) ** 2) * math.pi**2 / (8 * v * v))
            if total + term == total:  # so it is with all that follow
                break
            total += term
        return math.log1p(-math.sqrt(2 * math.pi) / v * total)
    total = 1.0
    for k in range(2, 8):
        sign = 1.0 if k % 2 == 1 else -1.0
        term = math.exp(-2.0 * (k * k - 1) * v * v)
        if total + sign * term == total:
            break
        total += sign * term
    return math.log(2.0) - 2.0 * v * v + math.log(total)


@helper
def _chi_square(x: float, degrees: float, log_gamma: float) -> float:
    """``log_gamma`` is ``lgamma(degrees / 2)``."""
    a = degrees / 2
    v = x / 2
    if not (v > 0 and a > 0):
        return 0.0
    front = a * math.log(v) - v - log_gamma
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
        return math.log1p(-min(total * math.exp(front), 1.0 - 1e-16))
    b = v + 1 - a
    c = 1 / _TINY
    d = 1 / b
    h = d
    for i in range(1, _MOST_TERMS):
        an = -i * (i - a)
        b += 2
        d = an * d + b
        d = 1 / (d if abs(d) > _TINY else _TINY)
        c = b + an / c
        c = c if abs(c) > _TINY else _TINY
        h *= d * c
        if abs(d * c - 1) < _EPSILON * 4:
            break
    return min(front + math.log(h), 0.0)


@kernel((_F64, _OUT), brief=True)
def kolmogorov_log_tail(x: Array, out: Array) -> None:
    """``out[i]`` = ln P(K > x[i]), K the limit of sqrt(n) D: 2 sum (-1)^(k-1) exp(-2 k^2 x^2). NaN gives 0.

    Below x = 1 that series converges badly; there its theta-function twin of P(K <= x) is summed.
    """
    for i in range(x.size):
        out[i] = _kolmogorov(x[i])


@kernel((_F64, _F64, _OUT), brief=True)
def chi_square_log_tail(x: Array, degrees: Array, out: Array) -> None:
    """``out[i]`` = ln P(X > x[i]), X chi-square with ``degrees[i]`` > 0 degrees of freedom (not only whole ones).

    The regularised incomplete gamma function: its series below the mean, its continued fraction (Lentz) above. NaN,
    or no degree of freedom, gives 0.
    """
    for i in range(x.size):
        log_gamma = math.lgamma(degrees[i] / 2) if degrees[i] > 0 else 0.0
        out[i] = _chi_square(x[i], degrees[i], log_gamma)


@kernel((_F64, _F64, _TABLE, _TABLE, _LOG_P, _FLAGS, _TOLD), brief=True)
def judge_columns(
    distance: Array, index: Array, ks: Array, psi: Array, log_p: Array, flags: Array, told: Array
) -> bool:
    """Both tests of every column: ``log_p`` (KS, PSI), ``flags`` (real, over, quiet) and what is ``told`` of a look
    (PSI, its critical value, KS, its critical value, log10 of the smaller p), each by column. Whether no column is over
    and all are quiet.

    KS ``distance`` and PSI ``index``. The table of each test has rows by column: size, log level, log p over which it
    is quiet, the least effect to be over, the effect below which it is quiet, and the critical value; that of PSI then
    inflation and degrees of freedom. ``drift.judge`` says what these are.
    """
    known = 0.0
    log_gamma = 0.0
    calm = True
    for f in range(distance.size):
        if psi[7, f] != known:  # most columns have as many bins as the one before
            known = psi[7, f]
            log_gamma = math.lgamma(known / 2) if known > 0 else 0.0
        ks_log_p = _kolmogorov(distance[f] * ks[0, f])
        psi_log_p = _chi_square(index[f] * psi[0, f] / psi[6, f], known, log_gamma)
        ks_real = ks_log_p < ks[1, f]
        psi_real = psi_log_p < psi[1, f]
        log_p[0, f] = ks_log_p
        log_p[1, f] = psi_log_p
        flags[0, f] = ks_real or psi_real
        flags[1, f] = (ks_real and distance[f] >= ks[3, f]) or (psi_real and index[f] >= psi[3, f])
        ks_quiet = ks_log_p > ks[2, f] or distance[f] < ks[4, f]
        flags[2, f] = ks_quiet and (psi_log_p > psi[2, f] or index[f] < psi[4, f])
        calm = calm and flags[2, f] and not flags[1, f]
        told[0, f] = index[f]
        told[1, f] = psi[5, f]
        told[2, f] = distance[f]
        told[3, f] = ks[5, f]
        told[4, f] = min(psi_log_p, ks_log_p) / _LN_10
    return calm
