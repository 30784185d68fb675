"""router.sequential: formulas against numbers worked out apart, and coverage under constant looking."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from router.sequential import (
    MIN_OBSERVATIONS,
    Estimate,
    Moments,
    evidence_of,
    log_mismatch,
    mean,
    mean_difference,
    radius,
    rate,
    rate_difference,
)


def moments(values: list[float]) -> Moments:
    found = Moments()
    for value in values:
        found.add(value)
    return found


def test_moments_are_those_of_numpy_and_merge() -> None:
    rng = random.Random(1)
    values = [1e9 + rng.gauss(0, 3) for _ in range(1_000)]
    whole = moments(values)
    assert whole.mean == pytest.approx(np.mean(values), rel=1e-15)
    assert whole.variance == pytest.approx(np.var(values, ddof=1), rel=1e-6)
    merged = moments(values[:300])
    merged.merge(moments(values[300:]))
    merged.merge(Moments())
    assert merged.count == 1_000
    assert (merged.mean, merged.variance) == (pytest.approx(whole.mean), pytest.approx(whole.variance, rel=1e-6))
    empty = Moments()
    empty.merge(whole)
    assert (empty.count, empty.mean, empty.squares) == (whole.count, whole.mean, whole.squares)


def test_the_radius_is_the_documented_formula() -> None:
    """se 0.01 at n = 1000, alpha 0.05, tightest at 5000: worked out step by step."""
    rho2 = (-2 * math.log(0.05) + math.log(-2 * math.log(0.05) + 1)) / 5_000
    assert rho2 == pytest.approx(0.001587, rel=1e-3)
    inner = 2 * (1_000 * rho2 + 1) / (1_000**2 * rho2) * math.log(math.sqrt(1_000 * rho2 + 1) / 0.05)
    assert radius(0.01, 1_000, 0.05) == pytest.approx(0.01 * math.sqrt(1_000) * math.sqrt(inner), rel=1e-12)
    assert radius(0.01, 1_000, 0.05) == pytest.approx(0.0337, rel=0.01)


def test_it_is_tightest_where_it_is_meant_to_be() -> None:
    widths = {n: radius(1 / math.sqrt(n), n, 0.05) * math.sqrt(n) for n in (100, 1_000, 5_000, 25_000, 250_000)}
    assert min(widths, key=widths.__getitem__) == 5_000
    assert widths[5_000] > 1.96


def test_too_few_give_no_interval() -> None:
    few, enough = MIN_OBSERVATIONS - 1, MIN_OBSERVATIONS
    assert rate(10, few, 0.05) == Estimate(10 / few, None, None)
    assert rate(0, 0, 0.05) == Estimate(0.0, None, None)
    assert rate(10, enough, 0.05).low is not None
    assert rate_difference((1, few), (1, 10_000), 0.05).low is None
    assert rate_difference((1, enough), (1, enough), 0.05).low is not None
    values = [float(n) for n in range(100)]
    assert mean(moments(values[:few]), 0.05).low is None
    assert mean_difference(moments(values), moments(values[:few]), 0.05).low is None


def test_no_variation_is_no_certainty() -> None:
    found = rate(0, 100, 0.05)
    assert found.low == 0.0
    assert found.high is not None
    assert found.high > 0.02
    assert mean(moments([0.0] * 100), 0.05) == Estimate(0.0, None, None)
    assert mean_difference(moments([0.0] * 100), moments([1.0, 2.0] * 50), 0.05).low is None


def test_intervals_stay_in_range() -> None:
    assert rate(40, 40, 0.05).high == 1.0
    difference = rate_difference((40, 40), (0, 40), 0.05)
    assert (difference.value, difference.high) == (1.0, 1.0)
    assert difference.low is not None
    assert difference.low > 0


@pytest.mark.parametrize("truth", [0.01, 0.1, 0.5])
def test_a_rate_is_covered_at_all_looks(truth: float) -> None:
    """Looking after every observation, at most alpha of all runs may ever miss the truth."""
    rng = np.random.default_rng(5)
    runs, missed = 300, 0
    for _ in range(runs):
        hits = np.cumsum(rng.random(4_000) < truth)
        looks = range(MIN_OBSERVATIONS, 4_001, 7)
        missed += any(not covers(rate(int(hits[n - 1]), n, 0.05), truth) for n in looks)
    assert missed <= 0.05 * runs + 2 * math.sqrt(runs * 0.05 * 0.95)


def test_a_difference_of_nothing_is_covered_at_all_looks_and_one_of_something_is_found() -> None:
    rng = np.random.default_rng(6)
    runs, missed, found = 150, 0, 0
    for _ in range(runs):
        a, b, c = (np.cumsum(rng.random(4_000) < p) for p in (0.1, 0.1, 0.16))
        looks = range(MIN_OBSERVATIONS, 4_001, 10)
        missed += any(not covers(rate_difference((int(a[n - 1]), n), (int(b[n - 1]), n), 0.05), 0.0) for n in looks)
        found += not covers(rate_difference((int(c[-1]), 4_000), (int(a[-1]), 4_000), 0.05), 0.0)
    assert missed <= 0.05 * runs + 2 * math.sqrt(runs * 0.05 * 0.95)
    assert found > 0.9 * runs


def covers(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def test_a_mean_and_its_difference() -> None:
    rng = random.Random(3)
    a = moments([rng.gauss(10, 2) for _ in range(2_000)])
    b = moments([rng.gauss(9, 2) for _ in range(2_000)])
    assert covers(mean(a, 0.05), 10)
    assert covers(mean_difference(a, b, 0.05), 1)
    assert not covers(mean_difference(a, b, 0.05), 0)


# --- proportions ---


def test_evidence_is_a_martingale() -> None:
    """The expectation over the next unit, under the right shares, is the evidence now."""
    shares = [0.2, 0.3, 0.5]
    counts = [31, 20, 77]
    after = 0.0
    for arm, share in enumerate(shares):
        more = list(counts)
        more[arm] += 1
        after += share * math.exp(log_mismatch(more, shares))
    assert after == pytest.approx(math.exp(log_mismatch(counts, shares)), rel=1e-9)
    assert log_mismatch([0, 0, 0], shares) == pytest.approx(0.0, abs=1e-9)


def test_lost_exposures_are_noticed_and_none_are_imagined() -> None:
    rng = np.random.default_rng(9)
    shares, level = [0.9, 0.1], math.log(1_000)
    for lost, alarmed in ((0.0, False), (0.1, True)):
        kept = 0.1 * (1 - lost) / (0.9 + 0.1 * (1 - lost))
        units = np.cumsum(rng.random(60_000) < kept)
        looks = range(500, 60_001, 500)
        assert alarmed == any(log_mismatch([n - int(units[n - 1]), int(units[n - 1])], shares) >= level for n in looks)


def test_overwhelming_evidence_is_infinite() -> None:
    assert evidence_of(0.0) == 1.0
    assert evidence_of(10_000.0) == math.inf
