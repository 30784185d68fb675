"""router.rollout.evidence: the formulas against counting all outcomes, and numbers at the ends of their range."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from router.rollout.evidence import (
    BETTER,
    BLOCK_NS,
    WORSE,
    WORSE_PRIOR,
    Mixture,
    OneArm,
    RatioInterval,
    RestartMixture,
    TwoArms,
    block_increments,
    label_increments,
    log_add,
    rate_increments,
    unstarted,
)
from router.rollout.spec import NS_PER_S


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


class Increments:
    """One way to gain evidence: by labels, or in blocks at a suggested rate."""

    def __init__(self, bound: float, factors: tuple[float, ...], rate: float | None = None) -> None:
        self.bound, self.factors, self.rate = bound, factors, rate

    def __call__(self, row: TwoArms) -> list[float]:
        if self.rate is None:
            return label_increments(row, self.bound, self.factors)
        return block_increments(row, self.bound, self.factors, self.rate)


def expectations(n_c: int, n_s: int, p_c: float, p_s: float, increments: Increments) -> list[float]:
    """E[exp(increment)] of every alternative, over all outcomes of two binomials."""
    total = [0.0] * len(increments.factors)
    for k_c, k_s in itertools.product(range(n_c + 1), range(n_s + 1)):
        chance = binomial(n_c, k_c, p_c) * binomial(n_s, k_s, p_s)
        found = increments(TwoArms(n_c, k_c, n_s, k_s))
        total = [value + chance * math.exp(one) for value, one in zip(total, found, strict=True)]
    return total


@pytest.mark.parametrize("rate", [None, 0.3, 0.8])
@pytest.mark.parametrize(("n_c", "n_s"), [(3, 20), (9, 9), (20, 3)])
@pytest.mark.parametrize("p_s", [0.01, 0.3, 0.7])
def test_no_increment_gains_on_average_under_the_null(n_c: int, n_s: int, p_s: float, rate: float | None) -> None:
    """At the bound and on the null's side of it, at every event rate, whatever rate was suggested."""
    for bound, factors, ratios in ((1.2, WORSE, (0.5, 1.0, 1.2)), (2.0, BETTER, (2.0, 3.0))):
        for ratio in ratios:
            if ratio * p_s < 1:
                found = expectations(n_c, n_s, ratio * p_s, p_s, Increments(bound, factors, rate))
                assert max(found) <= 1 + 1e-9


def test_labels_of_rare_events_lose_next_to_nothing_at_the_bound() -> None:
    found = expectations(10, 30, 0.0012, 0.001, Increments(1.2, WORSE[:4]))[:4]
    assert min(found) > 0.999


def test_the_block_form_sees_frequent_events_that_labels_hardly_see() -> None:
    row = TwoArms(200, 150, 200, 100)
    assert max(block_increments(row, 1.2, WORSE, 0.6)) > 1.3 * max(label_increments(row, 1.2, WORSE)) > 0


def test_label_increments_are_the_documented_likelihood_ratios() -> None:
    row = TwoArms(10, 3, 90, 5)
    share, bound = 0.1, 1.2
    theta_0 = share * bound / (share * bound + 1 - share)
    for factor, found in zip(WORSE, label_increments(row, bound, WORSE), strict=True):
        theta = share * bound * factor / (share * bound * factor + 1 - share)
        wanted = 3 * math.log(theta / theta_0) + 5 * math.log((1 - theta) / (1 - theta_0))
        assert found == pytest.approx(wanted, rel=1e-12)


def test_rate_increments_are_bernoulli_likelihood_ratios() -> None:
    for factor, found in zip(WORSE, rate_increments(OneArm(100, 7), 0.02, WORSE), strict=True):
        odds = factor * 0.02 / 0.98
        rate = odds / (1 + odds)
        wanted = 7 * math.log(rate / 0.02) + 93 * math.log((1 - rate) / 0.98)
        assert found == pytest.approx(wanted, rel=1e-12)


def test_nothing_is_learned_where_one_arm_has_nothing() -> None:
    for row in (
        TwoArms(0, 0, 100, 9),
        TwoArms(100, 9, 0, 0),
        TwoArms(0, 0, 0, 0),
        TwoArms(5, 5, 5, 5, 0.0),
        TwoArms(5, 5, 5, 5, 1.0),
    ):
        assert label_increments(row, 1.2, WORSE) == [0.0] * len(WORSE)
    assert block_increments(TwoArms(0, 0, 100, 90), 1.2, WORSE, 0.5) == [0.0] * len(WORSE)
    assert label_increments(TwoArms(100, 0, 100, 0), 1.2, WORSE) == [0.0] * len(WORSE)


def test_the_weight_that_has_not_started_falls_and_never_ends() -> None:
    weights = [unstarted(block) for block in range(100_000)]
    assert sum(WORSE_PRIOR) == pytest.approx(1)
    assert weights[0] == pytest.approx(0.55)
    assert all(later < earlier for earlier, later in itertools.pairwise(weights))
    assert weights[60] == pytest.approx(0.02)
    assert weights[-1] > 0


def test_a_restart_mixture_begins_at_one_and_is_the_sum_of_its_definition() -> None:
    mixture = RestartMixture()
    assert mixture.log_e == pytest.approx(0, abs=1e-12)
    rng = np.random.default_rng(5)
    rows = [TwoArms(10, int(rng.binomial(10, 0.1)), 90, int(rng.binomial(90, 0.1))) for _ in range(200)]
    masses = [0.45 * part for part in WORSE_PRIOR]
    before = 0.55
    for number, row in enumerate(rows, start=1):
        found = label_increments(row, 1.2, WORSE)
        mixture.add(found, BLOCK_NS // 2)
        left = unstarted(number // 2)
        masses = [
            (mass + part * (before - left)) * math.exp(gain)
            for mass, part, gain in zip(masses, WORSE_PRIOR, found, strict=True)
        ]
        before = left
        assert mixture.log_e == pytest.approx(math.log(sum(masses) + left), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("scale", [1, 10**9])
def test_huge_counts_stay_finite(scale: int) -> None:
    for row in (
        TwoArms(scale, scale, scale, 0),
        TwoArms(scale, 0, scale, scale),
        TwoArms(1, 1, scale, scale),
        TwoArms(scale, scale, scale, scale),
    ):
        mixture, interval = RestartMixture(), RatioInterval()
        for _ in range(20):
            mixture.add(label_increments(row, 1.2, WORSE), 3_600 * NS_PER_S)
            mixture.add(block_increments(row, 1.2, WORSE, 0.99), NS_PER_S)
            interval.add(row)
        assert math.isfinite(mixture.log_e)
        low, high = interval.interval(0.05)
        assert 0 <= low <= (high or math.inf)
    certificate = Mixture()
    certificate.add(rate_increments(OneArm(scale, scale), 0.5, BETTER))
    assert math.isfinite(certificate.log_e)


def test_log_add_at_the_ends() -> None:
    assert log_add(-math.inf, -math.inf) == -math.inf
    assert log_add(-math.inf, 3.0) == 3.0
    assert log_add(1e300, -1e300) == 1e300
    assert log_add(0.0, 0.0) == pytest.approx(math.log(2))


def test_the_interval_holds_the_ratio_all_the_time() -> None:
    """100 streams of 200 looks: those whose interval ever misses the true ratio are no more than alpha allows."""
    rng = np.random.default_rng(11)
    missed = 0
    for _ in range(100):
        interval = RatioInterval()
        out = False
        for _ in range(200):
            share = rng.choice([0.05, 0.3])
            n_c = int(rng.binomial(200, share))
            interval.add(TwoArms(n_c, int(rng.binomial(n_c, 0.03)), 200 - n_c, int(rng.binomial(200 - n_c, 0.02))))
            low, high = interval.interval(0.05)
            out = out or not low <= 1.5 <= (high or math.inf)
        missed += out
    assert missed <= 5
    assert (high or math.inf) / low < 3


def test_the_interval_is_everything_before_there_is_evidence() -> None:
    assert RatioInterval().interval(0.05) == (0.0, None)


@pytest.mark.parametrize("bad", [(-1, 0, 5, 0), (5, 6, 5, 0), (5, 0, 5, -1), (1, 0, 1, 0, 1.5), (1, 0, 1, 0, math.nan)])
def test_counts_that_cannot_be_are_refused(bad: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        TwoArms(*bad)


@pytest.mark.parametrize("bad", [(5, 6.0), (-1, 0.0), (5, -0.1), (5, math.nan)])
def test_totals_that_cannot_be_are_refused(bad: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="wanted a total"):
        OneArm(*bad)
