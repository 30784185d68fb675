"""Sums without rounding: named cases; tests/property/test_label_join.py has the general ones."""

from __future__ import annotations

import math

import numpy as np

from monitor.exact import exact_square_sum, exact_sum, mean, moments, squared_deviation


def test_nothing_cancels() -> None:
    values = np.array([1e300, 1.0, -1e300, 5e-324])
    assert mean(exact_sum(values), 1) == 1.0
    assert mean(exact_sum(values[[0, 2, 3]]), 1) == 5e-324


def test_none() -> None:
    assert exact_sum(np.empty(0)) == 0
    assert math.isnan(mean(0, 0))
    assert math.isnan(squared_deviation(0, 0, 0))
    assert all(math.isnan(value) for value in moments(0, 0, 0))


def test_the_spread_of_numbers_far_from_zero() -> None:
    values = 1e9 + np.array([-1e-3, 0.0, 1e-3])
    exact = squared_deviation(exact_square_sum(values), exact_sum(values), 3)
    assert abs(exact - float(np.sum((values - values.mean()) ** 2))) < 1e-12


def test_moments() -> None:
    values = np.random.default_rng(0).random(100)
    found = moments(exact_sum(values), exact_sum(values**2), 100)
    assert np.allclose(found, (values.mean(), values.var(ddof=1)), rtol=1e-12)
