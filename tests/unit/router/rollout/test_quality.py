"""router.rollout.quality: passed, failed and undecided, against scipy's and hand-worked numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from router.rollout.quality import (
    Finding,
    Status,
    flips,
    latency,
    missing,
    monotonic,
    non_inferior,
    overall,
    slices,
    slices_not_worse,
    superior,
    within,
)

RNG = np.random.default_rng(9)
LOSS = RNG.gamma(2.0, 1.0, 3_000)


@pytest.mark.parametrize(
    ("extra", "status"), [(-0.05, Status.PASSED), (0.05, Status.FAILED), (0.0021, Status.UNDECIDED)]
)
def test_losses_better_worse_and_not_known(extra: float, status: Status) -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, len(LOSS))
    found = non_inferior(LOSS + extra + noise, LOSS)
    assert found.status is status
    assert found.evidence["limit"] == pytest.approx(0.001 * LOSS.mean())


def test_pairing_finds_what_two_means_would_not() -> None:
    assert non_inferior(LOSS + 0.01, LOSS).status is Status.FAILED
    assert non_inferior(LOSS, LOSS).status is Status.PASSED


def test_the_interval_is_that_of_the_paired_t() -> None:
    difference = np.random.default_rng(2).normal(0.1, 1.0, 2_000)
    found = non_inferior(LOSS[:2_000] + difference, LOSS[:2_000])
    t = stats.t.interval(0.9, 1_999, difference.mean(), stats.sem(difference))
    assert (found.evidence["low"], found.evidence["high"]) == (
        pytest.approx(t[0], abs=0.004),
        pytest.approx(t[1], abs=0.004),
    )


def test_losses_that_are_not_numbers_or_not_there() -> None:
    broken = LOSS.copy()
    broken[5] = np.nan
    assert non_inferior(broken, LOSS).status is Status.FAILED
    assert non_inferior(LOSS, broken).status is Status.UNDECIDED
    assert non_inferior(LOSS[:10], LOSS[:10]).status is Status.UNDECIDED
    with pytest.raises(ValueError, match="one value per row"):
        non_inferior(LOSS, LOSS[:-1])


def test_groups_by_their_least_and_their_gap() -> None:
    """Hand-worked: accuracies 0.9 and 0.7 with 10 rows each, selection and true positive rates by mask."""
    right = np.array([1] * 9 + [0] + [1] * 7 + [0] * 3, float)
    group = np.array(["a"] * 10 + ["b"] * 10)
    found = slices(right, group, min_score=0.7, max_gap=0.21, min_rows=1)
    assert found.status is Status.PASSED
    assert (found.evidence["min"], found.evidence["gap"]) == (pytest.approx(0.7), pytest.approx(0.2))
    assert slices(right, group, min_score=0.71, min_rows=1).status is Status.FAILED
    assert slices(right, group, max_gap=0.19, min_rows=1).status is Status.FAILED
    label = np.array(([1, 0] * 10), bool)
    only = slices(right, group, rows=label, min_rows=1)
    assert only.evidence["groups"] == {"a": pytest.approx(1.0), "b": pytest.approx(0.8)}


def test_small_groups_are_named_and_not_passed() -> None:
    right, group = np.ones(410), np.array(["a"] * 205 + ["b"] * 200 + ["c"] * 5)
    found = slices(right, group, min_score=0.5)
    assert found.status is Status.UNDECIDED
    assert found.evidence["left_out"] == ["c"]
    assert slices(right[:5], group[:5]).status is Status.UNDECIDED
    assert slices(right[:405], group[:405], min_score=0.5).status is Status.PASSED


@pytest.mark.parametrize(("differ", "status"), [(0, Status.PASSED), (60, Status.FAILED), (12, Status.UNDECIDED)])
def test_flips_by_exact_bounds(differ: int, status: Status) -> None:
    clean = np.zeros(1_000, int)
    noisy = clean.copy()
    noisy[:differ] = 1
    found = flips(clean, noisy)
    assert found.status is status
    exact = stats.binomtest(differ, 1_000).proportion_ci(0.9, "exact")
    assert (found.evidence["low"], found.evidence["high"]) == (pytest.approx(exact.low), pytest.approx(exact.high))


def test_flips_of_everything_and_of_too_little() -> None:
    assert flips(np.zeros(50), np.ones(50)).status is Status.FAILED
    assert flips(np.zeros(5), np.ones(5)).status is Status.UNDECIDED


@pytest.mark.parametrize(
    ("values", "status"),
    [([0.0, 1.0], Status.PASSED), ([0.5, 1.1], Status.FAILED), ([0.5, np.nan], Status.FAILED), ([], Status.UNDECIDED)],
)
def test_bounds(values: list[float], status: Status) -> None:
    assert within(np.array(values), 0.0, 1.0).status is status


def test_monotonicity() -> None:
    base = np.array([1.0, 2.0, 3.0])
    assert monotonic(base, base + np.array([0, 0.1, 0.2])).status is Status.PASSED
    found = monotonic(base, base + np.array([0.1, -0.1, np.nan]))
    assert (found.status, found.evidence["first"]) == (Status.FAILED, [1, 2])
    assert monotonic(base, base - 1, increasing=False).status is Status.PASSED
    assert monotonic(base[:0], base[:0]).status is Status.UNDECIDED


def test_latency_from_interleaved_timings() -> None:
    champion = np.random.default_rng(4).lognormal(0, 0.2, 2_000)
    assert latency(champion * 1.02, champion).status is Status.PASSED
    assert latency(champion * 1.6, champion).status is Status.FAILED
    assert latency(champion[:100], champion[:100]).status is Status.UNDECIDED
    assert latency(champion, champion * 0).status is Status.UNDECIDED
    other = np.random.default_rng(5).lognormal(0, 0.2, 2_000) * 1.2
    assert latency(other, champion).status is Status.UNDECIDED


STATUSES: list[tuple[list[Any], Status]] = [
    ([Status.PASSED, Status.PASSED], Status.PASSED),
    ([Status.PASSED, Status.UNDECIDED], Status.UNDECIDED),
    ([Status.UNDECIDED, Status.FAILED], Status.FAILED),
    ([], Status.UNDECIDED),
]


@pytest.mark.parametrize(("statuses", "status"), STATUSES)
def test_the_whole_passes_only_when_all_do(statuses: list[Status], status: Status) -> None:
    assert overall([Finding("g", one, "") for one in statuses]) is status


def test_a_gate_without_its_data_asks() -> None:
    assert missing("quality", "holdout").reason == "not decidable: there is no holdout"


def test_superior_wants_an_interval_under_zero() -> None:
    noise = np.random.default_rng(1).normal(0, 0.1, len(LOSS))
    assert superior(LOSS - 0.05 + noise, LOSS).status is Status.PASSED
    assert superior(LOSS + 0.05 + noise, LOSS).status is Status.FAILED
    assert superior(LOSS + noise - noise.mean(), LOSS).status is Status.UNDECIDED
    assert superior(LOSS, LOSS).status is Status.FAILED
    assert superior(LOSS[:5], LOSS[:5]).status is Status.UNDECIDED


def test_one_group_that_is_worse_fails_the_slices() -> None:
    group = np.array(["a", "b", "c"] * 1_000)
    worse = LOSS + np.where(group == "b", 0.3, 0.0)
    found = slices_not_worse(worse, LOSS, group)
    assert (found.status, found.reason.split(":")[0]) == (Status.FAILED, "b")
    assert {name: one["status"] for name, one in found.evidence["groups"].items()} == {
        "a": "passed", "b": "failed", "c": "passed",
    }  # fmt: skip
    assert found.evidence["groups"]["b"]["rows"] == 1_000
    assert slices_not_worse(LOSS, LOSS, group).status is Status.PASSED
    broken = np.where(group == "c", np.nan, LOSS)
    assert slices_not_worse(broken, LOSS, group).status is Status.FAILED
    assert slices_not_worse(LOSS, broken, group).status is Status.UNDECIDED


def test_small_groups_beside_the_champion_are_named() -> None:
    group = np.array(["large"] * 2_990 + ["small"] * 10)
    found = slices_not_worse(LOSS, LOSS, group)
    assert (found.status, found.evidence["left_out"]) == (Status.UNDECIDED, ["small"])
    assert slices_not_worse(LOSS[:10], LOSS[:10], group[:10]).status is Status.UNDECIDED
    with pytest.raises(ValueError, match="one loss and one group"):
        slices_not_worse(LOSS, LOSS, group[:-1])


def test_the_interval_is_scipys_bootstrap_and_covers_as_often_as_it_says() -> None:
    """300 skewed samples of 200: each end misses the truth in 5 %, within what chance and skewness allow."""
    rng, misses = np.random.default_rng(8), np.zeros(2)
    for seed in range(300):
        difference = rng.gamma(2.0, 0.5, 200) - 1.0
        told = non_inferior(difference, np.zeros(200), seed=seed).evidence
        misses += (told["low"] > 0, told["high"] < 0)
    low, high = stats.binomtest(30, 600).proportion_ci(0.999)
    assert misses.sum() / 600 == pytest.approx((low + high) / 2, abs=(high - low) / 2 + 0.01)
    assert (misses / 300 < 0.11).all()
    theirs = stats.bootstrap(
        (difference,), np.mean, n_resamples=4_000, confidence_level=0.9, method="percentile", rng=1
    ).confidence_interval
    assert (told["low"], told["high"]) == (pytest.approx(theirs.low, abs=0.01), pytest.approx(theirs.high, abs=0.01))
