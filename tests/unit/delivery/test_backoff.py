"""Waits between attempts: bounds, growth, and the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.delivery.backoff import GiveUp, RetryPolicy, TryAgain, after_failure
from server.errors import InvalidArgument

POLICY = RetryPolicy(first_s=1.0, cap_s=100.0, max_attempts=20, max_retry_after_s=60.0)


def delay(attempts: int, jitter: float = 1.0, retry_after_s: float | None = None) -> float:
    step = after_failure(POLICY, attempts, jitter, retry_after_s)
    assert isinstance(step, TryAgain)
    return step.delay_s


def test_the_bound_doubles_up_to_the_cap() -> None:
    assert [delay(attempts) for attempts in range(1, 11)] == [1, 2, 4, 8, 16, 32, 64, 100, 100, 100]


def test_jitter_spreads_from_nothing_to_the_bound() -> None:
    assert [delay(5, jitter) for jitter in (0.0, 0.25, 1.0)] == [0.0, 4.0, 16.0]


def test_what_the_receiver_asks_for_is_waited_first_within_its_bound() -> None:
    assert delay(1, 0.5, 10.0) == 10.5
    assert delay(1, 0.5, 1e12) == 60.5
    assert delay(1, 0.5, -5.0) == 0.5


def test_the_last_attempt_is_the_last() -> None:
    assert isinstance(after_failure(POLICY, 19, 0.0, None), TryAgain)
    assert after_failure(POLICY, 20, 0.0, 5.0) == GiveUp("attempt 20 of 20")
    assert isinstance(after_failure(POLICY, 21, 0.0, None), GiveUp)


@given(st.integers(1, 10**9), st.floats(0, 1), st.none() | st.floats(allow_nan=False))
def test_no_delay_is_over_its_bounds(attempts: int, jitter: float, asked: float | None) -> None:
    policy = RetryPolicy(max_attempts=10**9 + 1)
    step = after_failure(policy, attempts, jitter, asked)
    assert isinstance(step, TryAgain)
    assert 0 <= step.delay_s <= policy.cap_s + policy.max_retry_after_s


def test_the_defaults_try_for_about_a_day() -> None:
    policy = RetryPolicy()
    steps = [after_failure(policy, attempts, 0.5, None) for attempts in range(1, policy.max_attempts)]
    hours = sum(step.delay_s for step in steps if isinstance(step, TryAgain)) / 3600
    assert 23 < hours < 26


@pytest.mark.parametrize("wrong", [{"first_s": 0.0}, {"first_s": 2.0, "cap_s": 1.0}, {"max_attempts": 0}])
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        RetryPolicy(**wrong)
