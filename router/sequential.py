"""Statistics that stay valid however often one looks: intervals for means, and the test of a sample's proportions.

Plain arithmetic on sufficient statistics that add up over workers. Sources: Waudby-Smith et al., "Time-uniform central
limit theory and asymptotic confidence sequences" (arXiv 2103.06476); Lindon and Malek, "Anytime-valid inference for
multinomial count data" (NeurIPS 2022, arXiv 2011.03567).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, lgamma, log, sqrt
from typing import Final

#: Fewer observations in an arm than this, and the normal approximation behind an interval is not to be trusted.
MIN_OBSERVATIONS: Final = 30
#: The number of observations for which intervals are tightest.
BEST_AT: Final = 5_000
#: How strongly the prior of the proportions' test holds on to the proportions that were meant.
_CONCENTRATION: Final = 1_000.0


@dataclass(slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a stream of numbers (Welford), mergeable."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Take one number in."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self.squares += delta * (value - self.mean)

    def merge(self, other: Moments) -> None:
        """Take in everything that another has seen."""
        total = self.count + other.count
        if other.count:
            delta = other.mean - self.mean
            self.mean += delta * other.count / total
            self.squares += other.squares + delta * delta * self.count * other.count / total
            self.count = total

    @property
    def variance(self) -> float:
        """Of the stream, unbiased; 0 for fewer than two numbers."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0


@dataclass(slots=True, frozen=True)
class Estimate:
    """A value with its always-valid interval; ``low`` and ``high`` are None where there is too little to give one."""

    value: float
    low: float | None
    high: float | None


def radius(error: float, count: int, alpha: float, best_at: int = BEST_AT) -> float:
    """Half the width of the asymptotic confidence sequence of a mean.

    ``error`` is the standard error at ``count`` observations. The chance that the true mean is ever outside, at any
    of all looks, is at most ``alpha`` (asymptotically): with rho^2 = (-2 log alpha + log(-2 log alpha + 1)) / best_at,
    error * sqrt(n) * sqrt(2 (n rho^2 + 1) / (n^2 rho^2) * log(sqrt(n rho^2 + 1) / alpha)).
    """
    spent = -2 * log(alpha)
    rho2 = (spent + log(spent + 1)) / best_at
    scale = count * rho2 + 1
    return error * sqrt(count) * sqrt(2 * scale / (count * count * rho2) * log(sqrt(scale) / alpha))


def mean(sample: Moments, alpha: float) -> Estimate:
    """The mean of numbers. Numbers that have not differed yet say nothing of how they may: no interval."""
    return _around(sample.mean, _telling(sample), sample.variance / max(sample.count, 1), sample.count, alpha)


def mean_difference(treated: Moments, control: Moments, alpha: float) -> Estimate:
    """Mean of ``treated`` less mean of ``control``."""
    fewest = min(_telling(treated), _telling(control))
    spread = treated.variance / max(treated.count, 1) + control.variance / max(control.count, 1)
    return _around(treated.mean - control.mean, fewest, spread, treated.count + control.count, alpha)


def _telling(sample: Moments) -> int:
    return sample.count if sample.squares > 0 else 0


def rate(hits: int, count: int, alpha: float) -> Estimate:
    """A share of yes among yes and no."""
    return _clipped(_around(_share(hits, count), count, _rate_variance(hits, count), count, alpha), 0.0)


def rate_difference(treated: tuple[int, int], control: tuple[int, int], alpha: float) -> Estimate:
    """Rate of ``treated`` less rate of ``control``, each (hits, count)."""
    value = _share(*treated) - _share(*control)
    spread = _rate_variance(*treated) + _rate_variance(*control)
    return _clipped(_around(value, min(treated[1], control[1]), spread, treated[1] + control[1], alpha), -1.0)


def _share(hits: int, count: int) -> float:
    return hits / count if count else 0.0


def _rate_variance(hits: int, count: int) -> float:
    """Of the rate itself, taken a little towards a half: no yes among few must not look like certainty."""
    smoothed = (hits + 0.5) / (count + 1)
    return smoothed * (1 - smoothed) / max(count, 1)


def _around(value: float, fewest: int, variance: float, count: int, alpha: float) -> Estimate:
    if fewest < MIN_OBSERVATIONS:
        return Estimate(value, None, None)
    half = radius(sqrt(variance), count, alpha)
    return Estimate(value, value - half, value + half)


def _clipped(estimate: Estimate, floor: float) -> Estimate:
    if estimate.low is None or estimate.high is None:
        return estimate
    return Estimate(estimate.value, max(estimate.low, floor), min(estimate.high, 1.0))


def log_mismatch(counts: Sequence[int], shares: Sequence[float]) -> float:
    """Log of the evidence that units were not spread by ``shares`` (positive, summing to 1).

    The e-process G(A) / G(A + n) * prod G(a_i + n_i) / G(a_i) / prod p_i^n_i with a_i = 1000 p_i and A = 1000. If the
    spread is right, the chance that it ever reaches log(1 / alpha) is at most alpha.
    """
    total = sum(counts)
    evidence = lgamma(_CONCENTRATION) - lgamma(_CONCENTRATION + total)
    for count, share in zip(counts, shares, strict=True):
        prior = _CONCENTRATION * share
        evidence += lgamma(prior + count) - lgamma(prior) - count * log(share)
    return evidence


def evidence_of(log_value: float) -> float:
    """e to a power, infinite where that is more than a float holds."""
    return exp(log_value) if log_value < 700.0 else inf
