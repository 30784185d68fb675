"""What follows a failed attempt: another try, stable instead, or the error. And how many tries are affordable.

An arm that fails is answered by stable, once per request and without a budget, for a broken candidate must not cost
its users anything. Otherwise the same version is tried again, if the error is of the kind that passes, within the
request's own limit and a budget for all: retries started in the window stay within a share of the requests in it, so
that retries cannot turn a struggling version into a dead one. Counting the attempt comes before asking here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from router.types import FULL_SHARE
from router.window import SlidingCounts

_BUCKETS: Final = 10


@dataclass(slots=True, frozen=True)
class RetryPolicy:
    """Which error codes are worth another try of the same version, or stable's answer, and how often.

    ``budget`` is in 1/10,000 of the requests in the window. ``min_concurrency`` retries per window are affordable
    whatever the traffic, so that a quiet model can retry at all.
    """

    retry_on: frozenset[str] = frozenset()
    max_retries: int = 0
    fallback_on: frozenset[str] = frozenset()
    budget: int = 1_000
    min_concurrency: int = 3
    window_ns: int = 10_000_000_000

    def __post_init__(self) -> None:
        if self.max_retries < 0 or self.min_concurrency < 0 or self.window_ns < _BUCKETS:
            raise ValueError(f"wanted counts of 0 or more and a window of {_BUCKETS} ns or more, got {self}")
        if not 0 <= self.budget <= FULL_SHARE:
            raise ValueError(f"budget: wanted 0% to 100%, got {self.budget / 100:g}%")


class Next(enum.Enum):
    """What the shell does after a failed attempt."""

    ANSWER = "answer"
    RETRY = "retry"
    FALLBACK = "fallback"


@dataclass(slots=True)
class Failure:
    """A failed attempt. ``final``: the request itself is at fault, or its caller or its time is gone.

    ``retries`` counts those of this request so far; ``can_fall_back``: its decision has a fallback (which one that
    already fell back has not).
    """

    code: str
    final: bool
    retries: int
    can_fall_back: bool


class RetryBudget:
    """Requests and retries over the window, of one model or one version.

    Requests are counted over a bucket less than the window and retries over a bucket more, so that the budget holds
    for the window exactly, wherever its edges lie among the buckets.
    """

    __slots__ = ("_floor", "_requests", "_retries", "_share", "denied")

    def __init__(self, policy: RetryPolicy) -> None:
        bucket_ns = policy.window_ns // _BUCKETS
        self._requests = SlidingCounts(bucket_ns * (_BUCKETS - 1), _BUCKETS - 1)
        self._retries = SlidingCounts(policy.window_ns, _BUCKETS)
        self._share = policy.budget
        self._floor = policy.min_concurrency
        #: Retries that were worth it but not affordable.
        self.denied = 0

    def request(self, now_ns: int) -> None:
        """A request began (its first attempt; retries are counted by ``take``)."""
        self._requests.add(1, 0, now_ns)

    def take(self, now_ns: int) -> bool:
        """Pay for one retry, if it is affordable."""
        requests, retries = self._requests, self._retries
        requests.advance(now_ns)
        retries.advance(now_ns)
        if retries.first >= max(self._floor, requests.first * self._share // FULL_SHARE):
            self.denied += 1
            return False
        retries.add(1, 0, now_ns)
        return True


def next_attempt(policy: RetryPolicy, budget: RetryBudget, failure: Failure, now_ns: int) -> Next:
    """What follows a failed attempt. RETRY has been paid for when it is returned."""
    if failure.final:
        return Next.ANSWER
    if failure.can_fall_back and failure.code in policy.fallback_on:
        return Next.FALLBACK
    worth_it = failure.code in policy.retry_on and failure.retries < policy.max_retries
    return Next.RETRY if worth_it and budget.take(now_ns) else Next.ANSWER
