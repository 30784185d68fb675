"""A breaker per version: it opens when too many attempts fail, and lets a few through later to see if they do better.

Closed: everything passes; attempts and failures are counted over a sliding window, and when at least ``min_requests``
have ended and the share of failures reaches ``open_at``, it opens. Open: nothing passes for ``open_ns``. Half-open:
``probes`` attempts pass; when all of them have succeeded it closes with clean counts, and when one fails it opens
again. A probe that ends without a verdict (its caller left) gives its place back; when all places are taken by probes
that do not end, they are given out anew after another ``open_ns``.

Attempts carry the term in which they began, so that one that began before the breaker opened cannot close it.
Time is handed in, and a breaker is told every attempt before any retry or fallback: these hide nothing from it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from router.types import FULL_SHARE
from router.window import SlidingCounts

_BUCKETS: Final = 10
REFUSED: Final = 0


@dataclass(slots=True, frozen=True)
class BreakerPolicy:
    """When to open, for how long, and how many probes decide. ``open_at`` is in 1/10,000."""

    window_ns: int = 10_000_000_000
    min_requests: int = 20
    open_at: int = 5_000
    probes: int = 5
    open_ns: int = 10_000_000_000

    def __post_init__(self) -> None:
        if self.window_ns < _BUCKETS or self.open_ns < 1 or self.min_requests < 1 or self.probes < 1:
            raise ValueError(f"wanted positive times and counts, got {self}")
        if not 0 < self.open_at <= FULL_SHARE:
            raise ValueError(f"open_at: wanted over 0% to 100%, got {self.open_at / 100:g}%")


class State(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Outcome(enum.Enum):
    """How an attempt ended. UNKNOWN says nothing of the version: cancelled, or refused for the request's own fault."""

    OK = "ok"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Breaker:
    """The breaker of one version."""

    __slots__ = ("_counts", "_free", "_passed", "_since_ns", "_term", "policy", "state")

    def __init__(self, policy: BreakerPolicy) -> None:
        self.policy = policy
        self.state = State.CLOSED
        self._counts = SlidingCounts(policy.window_ns, _BUCKETS)
        self._term = 1
        self._since_ns = 0
        self._free = 0
        self._passed = 0

    def admit(self, now_ns: int) -> int:
        """Let an attempt through: the term to settle it with, or REFUSED. Every term given must be settled once."""
        if self.state is State.CLOSED:
            return self._term
        if now_ns - self._since_ns >= self.policy.open_ns:
            self._give_places(now_ns)
        if self.state is State.OPEN or not self._free:
            return REFUSED
        self._free -= 1
        return self._term

    def settle(self, term: int, outcome: Outcome, now_ns: int) -> bool:
        """Take in how an attempt ended; True when the breaker changed its state by it."""
        if term != self._term:
            return False
        if self.state is State.CLOSED:
            return self._count(outcome, now_ns)
        return self._probed(outcome, now_ns)

    def _count(self, outcome: Outcome, now_ns: int) -> bool:
        if outcome is Outcome.UNKNOWN:
            return False
        failed = outcome is Outcome.FAILED
        counts, policy = self._counts, self.policy
        counts.add(1, failed, now_ns)
        ended, failures = counts.first, counts.second
        if not failed or ended < policy.min_requests or failures * FULL_SHARE < policy.open_at * ended:
            return False
        self._enter(State.OPEN, now_ns)
        return True

    def _probed(self, outcome: Outcome, now_ns: int) -> bool:
        if outcome is Outcome.UNKNOWN:
            self._free = min(self._free + 1, self.policy.probes - self._passed)
            return False
        if outcome is Outcome.FAILED:
            self._enter(State.OPEN, now_ns)
            return True
        self._passed += 1
        if self._passed < self.policy.probes:
            return False
        self._enter(State.CLOSED, now_ns)
        return True

    def _give_places(self, now_ns: int) -> None:
        if self.state is State.OPEN:
            self._enter(State.HALF_OPEN, now_ns)
        elif not self._free:
            self._free = self.policy.probes - self._passed
            self._since_ns = now_ns

    def _enter(self, state: State, now_ns: int) -> None:
        self.state = state
        self._since_ns = now_ns
        self._term += 1
        self._free = self.policy.probes
        self._passed = 0
        self._counts.clear()
