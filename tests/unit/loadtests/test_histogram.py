"""loadtests.histogram against numpy's percentiles, and its own promises."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.histogram import BITS, MOST_NS, Histogram, bucket, highest

WIDTH = 2.0**-BITS


def of(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(st.integers(0, MOST_NS))
def test_a_value_lies_in_its_bucket_which_is_narrow(value: int) -> None:
    end = highest(bucket(value))
    start = highest(bucket(value) - 1) + 1 if bucket(value) else 0
    assert start <= value <= end
    assert end - start <= WIDTH * value


def test_buckets_follow_each_other_without_a_gap() -> None:
    ends = [highest(index) for index in range(bucket(MOST_NS) + 1)]
    assert ends == sorted(set(ends))
    assert ends[-1] == MOST_NS
    assert all(bucket(end) == index and bucket(end + 1) == index + 1 for index, end in enumerate(ends[:-1]))


@pytest.mark.parametrize("percent", [0.1, 1, 25, 50, 90, 99, 99.9, 100])
def test_percentiles_are_those_of_numpy(percent: float) -> None:
    values = np.random.default_rng(3).lognormal(13, 1.5, 20_011).astype(int)
    exact = np.percentile(values, percent, method="inverted_cdf")
    found = of(values.tolist()).percentile(percent)
    assert exact <= found <= exact * (1 + WIDTH) + 1


def test_few_values_have_exact_ranks() -> None:
    histogram = of([10, 20, 30, 40])
    assert [histogram.percentile(p) for p in (0, 25, 26, 50, 75, 99.9, 100)] == [10, 10, 20, 20, 30, 40, 40]
    assert histogram.mean() == 25
    assert histogram.over(20) == 2


def test_the_greatest_is_not_exceeded() -> None:
    histogram = of([1_000_003, 999])
    assert histogram.percentile(100) == 1_000_003


def test_out_of_range_is_counted_at_the_ends() -> None:
    histogram = of([-5, MOST_NS + 10**6])
    assert [index for index, _ in histogram.buckets()] == [0, bucket(MOST_NS)]


def test_empty_has_no_percentile() -> None:
    assert math.isnan(Histogram().percentile(50))
    assert math.isnan(Histogram().mean())


@given(st.lists(st.integers(0, 10**10)), st.lists(st.integers(0, 10**10)))
def test_adding_is_counting_together(first: list[int], second: list[int]) -> None:
    together = of(first)
    together.add(of(second))
    assert together.to_json() == of(first + second).to_json()


@given(st.lists(st.integers(0, 10**10)))
def test_json_round_trip(values: list[int]) -> None:
    text = json.dumps(of(values).to_json())
    assert Histogram.from_json(json.loads(text)).to_json() == of(values).to_json()


@pytest.mark.parametrize(
    "change",
    [{"bits": BITS + 1}, {"count": 3}, {"buckets": [[10**9, 2]]}, {"buckets": [[-1, 2]]}, {"buckets": [[1, -2]]}],
)
def test_damaged_json_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="histogram"):
        Histogram.from_json({**of([5, 5]).to_json(), **change})
