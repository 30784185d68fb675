"""router.retry: what follows a failure, and that retries never pass their budget."""

from __future__ import annotations

import random
from bisect import bisect_right

import pytest

from router.retry import Failure, Next, RetryBudget, RetryPolicy, next_attempt

S = 1_000_000_000
POLICY = RetryPolicy(
    retry_on=frozenset({"unavailable"}),
    max_retries=1,
    fallback_on=frozenset({"unavailable", "runtime_failure"}),
)


def failure(code: str, *, final: bool = False, retries: int = 0, can_fall_back: bool = False) -> Failure:
    return Failure(code, final, retries, can_fall_back)


@pytest.mark.parametrize(
    ("failed", "then"),
    [
        (failure("unavailable"), Next.RETRY),
        (failure("unavailable", retries=1), Next.ANSWER),
        (failure("unavailable", can_fall_back=True), Next.FALLBACK),
        (failure("runtime_failure", can_fall_back=True), Next.FALLBACK),
        (failure("runtime_failure"), Next.ANSWER),
        (failure("other", can_fall_back=True), Next.ANSWER),
        (failure("unavailable", final=True), Next.ANSWER),
        (failure("unavailable", final=True, can_fall_back=True), Next.ANSWER),
    ],
)
def test_what_follows(failed: Failure, then: Next) -> None:
    budget = RetryBudget(POLICY)
    assert next_attempt(POLICY, budget, failed, 0) is then
    assert budget.denied == 0


def test_fallbacks_are_not_paid_for_and_retries_are() -> None:
    budget = RetryBudget(POLICY)
    for _ in range(100):
        assert next_attempt(POLICY, budget, failure("unavailable", can_fall_back=True), 0) is Next.FALLBACK
    retried = [next_attempt(POLICY, budget, failure("unavailable"), 0) for _ in range(5)]
    assert retried == [Next.RETRY] * 3 + [Next.ANSWER] * 2
    assert budget.denied == 2


def test_the_budget_is_a_share_of_the_requests() -> None:
    budget = RetryBudget(POLICY)
    for _ in range(1_000):
        budget.request(0)
    assert sum(budget.take(S) for _ in range(500)) == 100
    assert sum(budget.take(30 * S) for _ in range(10)) == 3


def test_no_window_of_ten_seconds_ends_with_more_retries_than_its_share() -> None:
    rng = random.Random(7)
    budget = RetryBudget(POLICY)
    requests: list[int] = []
    retries: list[int] = []
    now = 1_000 * S + 123
    for _ in range(30_000):
        calm = (now // (7 * S)) % 2
        now += rng.randrange(10_000_000 if calm else 1_000_000)
        budget.request(now)
        requests.append(now)
        if rng.random() < 0.5 and not calm and budget.take(now):
            retries.append(now)
            in_window = len(requests) - bisect_right(requests, now - 10 * S)
            paid = len(retries) - bisect_right(retries, now - 10 * S)
            assert paid <= max(POLICY.min_concurrency, in_window * 0.1)
    assert len(retries) > 1_000


@pytest.mark.parametrize("bad", [{"max_retries": -1}, {"budget": 10_001}, {"min_concurrency": -1}, {"window_ns": 9}])
def test_policies_that_make_no_sense(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        RetryPolicy(**bad)
