"""loadtests.stats: intervals cover as often as they say, and their ranks are those of the tables."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats as scipy_stats

from loadtests import stats


def test_ranks_of_the_median_are_those_of_the_sign_test() -> None:
    # Published tables of the sign test's interval at 95 %: the whole range up to 8 values, then one less at each end.
    assert stats.interval([1, 2, 3, 4, 5, 6]) == (1, 6)
    assert stats.interval(list(range(1, 10))) == (2, 8)
    assert stats.interval(list(range(1, 26))) == (8, 18)


def test_true_confidence_of_few_values_is_told() -> None:
    assert stats.median([4.0]).confidence == 0
    assert stats.median([4.0, 5.0, 6.0]).confidence == pytest.approx(0.75)
    assert stats.median(range(6)).confidence == pytest.approx(1 - 2 / 64)


def test_nothing_has_no_median() -> None:
    assert math.isnan(stats.median([]).value)
    assert math.isnan(stats.ratio([], [1.0]).value)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 3), (2, 5), (6, 4)])
def test_rank_sum_counts_are_those_of_all_orders(m: int, n: int) -> None:
    counted: Counter[int] = Counter()
    for places in itertools.combinations(range(m + n), m):
        counted[sum(places) - m * (m - 1) // 2] += 1
    assert stats._rank_sum_counts(m, n) == [counted[u] for u in range(m * n + 1)]


def test_interval_of_a_ratio_is_that_of_the_rank_sum_test() -> None:
    random = np.random.default_rng(5)
    a, b = random.lognormal(0, 0.2, 8), random.lognormal(0.3, 0.2, 7)
    found = stats.ratio(b.tolist(), a.tolist())
    # Just inside the bounds the test does not reject, just outside it does.
    for bound, inside in ((found.low, 1 + 1e-9), (found.high, 1 - 1e-9)):
        inner = scipy_stats.mannwhitneyu(b / (bound * inside), a, method="exact").pvalue
        outer = scipy_stats.mannwhitneyu(b / (bound / inside), a, method="exact").pvalue
        assert outer <= 0.05 < inner
    assert found.low < found.value < found.high


def test_ratio_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(6)
    hits = 0
    for _ in range(400):
        a, b = random.lognormal(0, 0.3, 6), random.lognormal(math.log(2), 0.3, 6)
        found = stats.ratio(b.tolist(), a.tolist())
        hits += found.low <= 2 <= found.high
    assert hits >= 0.93 * 400


def test_many_values_have_narrow_bounds() -> None:
    random = np.random.default_rng(7)
    a, b = random.lognormal(0, 0.1, 200), random.lognormal(math.log(1.5), 0.1, 100)
    found = stats.ratio(b.tolist(), a.tolist())
    assert 1.4 < found.low < 1.5 < found.high < 1.6


def test_paired_rounds_cancel_what_hits_both() -> None:
    slow = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0]
    found = stats.paired_ratio([2 * x for x in slow], slow)
    assert (found.low, found.value, found.high) == (2, 2, 2)


def test_rounds_without_a_value_are_left_out() -> None:
    assert stats.paired_ratio([2.0, math.nan, 6.0], [1.0, 1.0, 2.0]).value == 2.5
