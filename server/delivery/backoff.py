"""When a delivery that failed is tried again, and when it never is. Pure: numbers in, a decision out."""

from __future__ import annotations

from dataclasses import dataclass

from server.errors import InvalidArgument


@dataclass(slots=True, frozen=True)
class RetryPolicy:
    """Attempts in all, and the waits between them: full jitter below a bound that doubles up to ``cap_s``.

    With the defaults attempts go on for about a day. ``max_retry_after_s`` bounds what a receiver may ask for.
    """

    first_s: float = 1.0
    cap_s: float = 600.0
    max_attempts: int = 300
    max_retry_after_s: float = 3600.0

    def __post_init__(self) -> None:
        if not (0 < self.first_s <= self.cap_s and self.max_attempts >= 1 and self.max_retry_after_s >= 0):
            raise InvalidArgument(f"a retry policy wants 0 < first_s <= cap_s and at least one attempt, got {self}")

    @property
    def longest_s(self) -> float:
        """No wait is longer."""
        return self.cap_s + self.max_retry_after_s


@dataclass(slots=True, frozen=True)
class TryAgain:
    """Wait ``delay_s``, then try again."""

    delay_s: float


@dataclass(slots=True, frozen=True)
class GiveUp:
    """Never try again, because ``reason``."""

    reason: str


def after_failure(policy: RetryPolicy, attempts: int, jitter: float, retry_after_s: float | None) -> TryAgain | GiveUp:
    """What follows the failure of attempt number ``attempts`` (from 1).

    The delay is ``jitter`` (uniform in 0..1) times ``min(cap_s, first_s * 2 ** (attempts - 1))``: full jitter, which
    spreads the retries of many senders best. What the receiver asked for, within the policy's bound, is waited first.
    """
    if attempts >= policy.max_attempts:
        return GiveUp(f"attempt {attempts} of {policy.max_attempts}")
    # The exponent is bounded, as a float is: 2 ** 64 s is over any cap that makes sense.
    bound_s = min(policy.cap_s, policy.first_s * 2.0 ** min(attempts - 1, 64))
    asked_s = min(max(0.0, retry_after_s or 0.0), policy.max_retry_after_s)
    return TryAgain(asked_s + jitter * bound_s)
