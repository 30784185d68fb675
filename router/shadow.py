"""The lane of one shadow: which copies wait, which are sent, and which are dropped and why. No I/O: a shell sends them.

Sampling is the routing decision's part (``RouteDecision.shadows``). What a lane takes never stands in the primary's
way: copies come after the primary's answer, the queue is bounded in number and bytes and drops its oldest first, a
rate bounds what is taken, few are in flight at once, and while the primary is loaded nothing is sent.

Drops are counted by reason: ``primary_failed``, ``no_model``, ``breaker`` (said by the shell), ``body``, ``load``,
``rps`` (refused), ``queue`` (pushed out by a newer copy), ``timeout`` (waited for too long to be of use).
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

T = TypeVar("T")

_NS_PER_S: Final = 1_000_000_000
#: How long a lane may save up its rate: at most a tenth of a second's worth is taken at once.
_BURST_NS: Final = _NS_PER_S // 10


@dataclass(slots=True, frozen=True)
class ShadowBudget:
    """Bounds of one lane. ``rps`` 0: no bound on the rate. ``yield_above_load`` is a fraction of the primary's limit.

    Memory held by waiting copies is at most ``max_queue_bytes``, and at most ``queue * max_body_bytes``.
    """

    rps: float = 50.0
    in_flight: int = 4
    queue: int = 256
    max_body_bytes: int = 1024 * 1024
    max_queue_bytes: int = 64 * 1024 * 1024
    timeout_ns: int = 2 * _NS_PER_S
    yield_above_load: float = 0.7

    def __post_init__(self) -> None:
        counts = (self.in_flight, self.queue, self.max_body_bytes, self.max_queue_bytes, self.timeout_ns)
        if min(counts) < 1 or not self.rps >= 0 or not self.yield_above_load > 0:
            raise ValueError(f"wanted positive bounds, got {self}")


@dataclass(slots=True)
class _Waiting(Generic[T]):
    copy: T
    size: int
    since_ns: int


class ShadowLane(Generic[T]):
    """Copies of requests on their way to one shadow. ``T`` is whatever the shell needs to send one."""

    __slots__ = ("_bytes", "_next_ns", "_queue", "_step_ns", "budget", "dropped", "in_flight", "sent")

    def __init__(self, budget: ShadowBudget) -> None:
        self.budget = budget
        self.sent = 0
        self.in_flight = 0
        self.dropped: Counter[str] = Counter()
        self._queue: deque[_Waiting[T]] = deque()
        self._bytes = 0
        self._step_ns = round(_NS_PER_S / budget.rps) if budget.rps else 0
        self._next_ns = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def waiting_bytes(self) -> int:
        return self._bytes

    def offer(self, copy: T, size: int, load: float, now_ns: int) -> str:
        """Take a copy of ``size`` bytes, or say why not ("" when taken). ``load``: the primary's, 1.0 at its limit."""
        reason = self._refusal(size, load, now_ns)
        if reason:
            self.dropped[reason] += 1
            return reason
        self._queue.append(_Waiting(copy, size, now_ns))
        self._bytes += size
        while len(self._queue) > self.budget.queue or self._bytes > self.budget.max_queue_bytes:
            self._pop("queue")
        return ""

    def _refusal(self, size: int, load: float, now_ns: int) -> str:
        budget = self.budget
        if size > min(budget.max_body_bytes, budget.max_queue_bytes):
            return "body"
        if load > budget.yield_above_load:
            return "load"
        if self._step_ns:
            if self._next_ns > now_ns + max(_BURST_NS - self._step_ns, 0):
                return "rps"
            self._next_ns = max(self._next_ns, now_ns) + self._step_ns
        return ""

    def take(self, load: float, now_ns: int) -> T | None:
        """The copy to be sent now, if any: its ``done`` must follow. Copies that waited too long go first."""
        queue = self._queue
        while queue and now_ns - queue[0].since_ns > self.budget.timeout_ns:
            self._pop("timeout")
        if not queue or self.in_flight >= self.budget.in_flight or load > self.budget.yield_above_load:
            return None
        self.in_flight += 1
        self.sent += 1
        return self._pop("")

    def done(self) -> None:
        """A copy that was taken has ended, however it ended."""
        self.in_flight -= 1

    def drop(self, reason: str) -> None:
        """Count a copy that the shell did not offer, or gave up after ``take`` (``done`` is still owed for that)."""
        self.dropped[reason] += 1

    def clear(self, reason: str) -> None:
        """Drop everything that waits, for example because the version is gone."""
        while self._queue:
            self._pop(reason)

    def _pop(self, reason: str) -> T:
        waiting = self._queue.popleft()
        self._bytes -= waiting.size
        if reason:
            self.dropped[reason] += 1
        return waiting.copy
