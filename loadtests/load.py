"""Load in a closed and in an open loop, over lanes that are open already.

**Closed**: each lane is kept full; a request follows the answer to the one before it. The server sets the pace, so what
waits outside while the server stalls is never seen: read it for capacity and cost.

**Open**: requests are due at times that were fixed beforehand, whatever the server does. Latency counts from the time
a request was *due*, also when the generator was late or no lane was free, so that a stall is paid by every request that
it delayed (no coordinated omission). What the generator itself did late is counted apart, in ``late``.

A request belongs to the measured window by the time it was due (closed: sent). One that has no answer at the end of the
grace time is in the latencies with the time it had waited until then, so that percentiles cannot look better for it.
Lanes that owe an answer are not to be used by another loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal

from loadtests.histogram import Histogram
from loadtests.lanes import OK, Lane

Arrivals = Literal["poisson", "constant"]

UNANSWERED: Final = "unanswered"
UNSENT: Final = "unsent"
LATE_NS: Final = 1_000_000
_GRACE_S: Final = 10.0
_SECOND_NS: Final = 1_000_000_000
#: The loop's timers are exact to a millisecond; the rest is spent turning, where the generator has a core to itself.
_TIMER_NS: Final = 2_000_000
#: Requests that wait for a lane. What is due beyond that is not sent, and counted so.
_BACKLOG: Final = 200_000


@dataclass(slots=True)
class Taken:
    """What one window measured. ``completed`` are good answers that came within it, for rates and costs."""

    seconds: float = 0.0
    completed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)
    #: Open loop: how long after its due time each request was handed to a connection.
    late: Histogram = field(default_factory=Histogram)


def _nothing() -> None:
    """Nobody wants to know."""


class _Loop:
    """The window, and the account of each request."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        on_begin: Callable[[], object] = _nothing,
        on_end: Callable[[], object] = _nothing,
        grace_s: float = _GRACE_S,
    ) -> None:
        self._lanes = lanes
        self._on_begin, self._on_end = on_begin, on_end
        self._grace_s = grace_s
        self._taken = Taken()
        self._under_way: Counter[int] = Counter()  # by the time they were due
        self._begin_ns = 0
        self._end_ns: float = math.inf  # until it has come
        self._measuring = self._ended = self._over = False
        self._idle = asyncio.Event()
        for lane in lanes:
            lane.sink = self

    async def run(self, ramp_s: float, seconds: float) -> Taken:
        """One ramp, which is not measured, and one window. Every request has ended or is given up afterwards."""
        start_ns = time.perf_counter_ns()
        self._begin_ns = start_ns + int(ramp_s * _SECOND_NS)
        self._start(start_ns, ramp_s, seconds)
        await self._until(self._begin_ns)
        begun_ns = time.perf_counter_ns()
        self._measuring = True
        self._on_begin()
        await self._until(self._begin_ns + int(seconds * _SECOND_NS))
        self._on_end()
        self._measuring, self._ended = False, True
        self._end_ns = time.perf_counter_ns()
        self._taken.seconds = (self._end_ns - begun_ns) / _SECOND_NS
        await self._settle()
        return self._taken

    async def _until(self, ns: int) -> None:
        await asyncio.sleep(max(0.0, (ns - time.perf_counter_ns()) / _SECOND_NS))

    async def _settle(self) -> None:
        """Wait for what is under way; what stays is counted as it is."""
        self._check_idle()
        try:
            async with asyncio.timeout(self._grace_s):
                await self._idle.wait()
        except TimeoutError:
            now = time.perf_counter_ns()
            for due_ns, count in self._under_way.items():
                for _ in range(count):
                    self._account(due_ns, UNANSWERED, now)
        self._give_up()
        self._over = True

    def answered(self, lane: Lane, due_ns: int, outcome: str) -> None:
        now = time.perf_counter_ns()
        if self._over:
            return  # counted as unanswered
        if not self._under_way[due_ns]:
            raise RuntimeError("a request was answered twice, or was never sent")
        self._under_way[due_ns] -= 1
        if not self._under_way[due_ns]:
            del self._under_way[due_ns]
        if self._measuring and outcome == OK:
            self._taken.completed += 1
        self._account(due_ns, outcome, now)
        self._room(lane, now)
        if self._ended:
            self._check_idle()

    def _account(self, due_ns: int, outcome: str, now: int) -> None:
        if self._begin_ns <= due_ns < self._end_ns:
            self._taken.latency.record(now - due_ns)
            self._taken.outcomes[outcome] += 1

    def _send(self, lane: Lane, due_ns: int) -> None:
        self._under_way[due_ns] += 1
        lane.send(due_ns)

    def _check_idle(self) -> None:
        if not self._under_way:
            self._idle.set()

    def _start(self, start_ns: int, ramp_s: float, seconds: float) -> None:
        raise NotImplementedError

    def _room(self, lane: Lane, now: int) -> None:
        """``lane`` can take a request."""
        raise NotImplementedError

    def _give_up(self) -> None:
        """The end of the grace time."""


class Closed(_Loop):
    """Every lane has as many requests under way as it can. The ramp fills one lane after the other."""

    def _start(self, start_ns: int, ramp_s: float, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        for place, lane in enumerate(self._lanes):
            loop.call_later(ramp_s * place / len(self._lanes), self._fill, lane)

    def _fill(self, lane: Lane) -> None:
        for _ in range(lane.width):
            self._room(lane, time.perf_counter_ns())

    def _room(self, lane: Lane, now: int) -> None:
        if not self._ended:
            self._send(lane, now)


class Open(_Loop):
    """Requests at ``rate`` a second, when they are due."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        rate: float,
        arrivals: Arrivals = "poisson",
        *,
        seed: int = 1,
        spin: bool = False,
        on_begin: Callable[[], object] = _nothing,
        on_end: Callable[[], object] = _nothing,
        grace_s: float = _GRACE_S,
    ) -> None:
        """``spin``: turn instead of sleeping over the last milliseconds; for a generator with a core to itself."""
        super().__init__(lanes, on_begin, on_end, grace_s)
        self._rate, self._arrivals, self._seed, self._spin = rate, arrivals, seed, spin
        self._free: deque[Lane] = deque()
        self._backlog: deque[int] = deque()
        self._due: Iterator[int] = iter(())
        self._next_ns: int | None = None

    def _start(self, start_ns: int, ramp_s: float, seconds: float) -> None:
        widest = max((lane.width for lane in self._lanes), default=0)
        self._free.extend(lane for place in range(widest) for lane in self._lanes if place < lane.width)
        steps = due_times(self._rate, self._arrivals, ramp_s, seconds, self._seed)
        self._due = (start_ns + offset for offset in steps)
        self._next_ns = next(self._due, None)
        self._pump()

    def _pump(self) -> None:
        """Send all that is due, and come back when more is."""
        loop, now = asyncio.get_running_loop(), time.perf_counter_ns()
        while self._next_ns is not None and self._next_ns <= now:
            self._dispatch(self._next_ns, now)
            self._next_ns = next(self._due, None)
        if self._next_ns is None:
            return
        wait_ns = self._next_ns - now
        if wait_ns > _TIMER_NS:
            loop.call_later((wait_ns - _TIMER_NS) / _SECOND_NS if self._spin else wait_ns / _SECOND_NS, self._pump)
        elif self._spin:
            loop.call_soon(self._pump)
        else:
            loop.call_later(wait_ns / _SECOND_NS, self._pump)

    def _dispatch(self, due_ns: int, now: int) -> None:
        if self._free:
            self._hand(self._free.popleft(), due_ns, now)
        elif len(self._backlog) < _BACKLOG:
            self._backlog.append(due_ns)
        else:
            self._account(due_ns, UNSENT, now)

    def _hand(self, lane: Lane, due_ns: int, now: int) -> None:
        if self._begin_ns <= due_ns < self._end_ns:
            self._taken.late.record(now - due_ns)
        self._send(lane, due_ns)

    def _room(self, lane: Lane, now: int) -> None:
        if self._backlog:
            self._hand(lane, self._backlog.popleft(), now)
        else:
            self._free.append(lane)

    def _check_idle(self) -> None:
        if not (self._under_way or self._backlog or self._next_ns is not None):
            self._idle.set()

    def _give_up(self) -> None:
        now = time.perf_counter_ns()
        for due_ns in self._backlog:
            self._account(due_ns, UNSENT, now)
        self._backlog.clear()
        self._next_ns = None


def due_times(rate: float, arrivals: Arrivals, ramp_s: float, seconds: float, seed: int = 1) -> Iterator[int]:
    """When requests are due, in ns from the start, in order; the same for the same arguments.

    The rate rises from 0 to ``rate`` a second over ``ramp_s`` and then stays for ``seconds``. A process of one arrival
    per unit on average is stretched by the inverse of the expected number of arrivals until t, which is
    ``rate * t**2 / (2 * ramp_s)`` in the ramp and ``rate * (t - ramp_s / 2)`` after it.
    """
    random = Random(seed)
    in_ramp, units = rate * ramp_s / 2, 0.0
    while True:
        units += random.expovariate(1.0) if arrivals == "poisson" else 1.0
        if units < in_ramp:
            at = math.sqrt(2 * ramp_s * units / rate)
        else:
            at = ramp_s / 2 + units / rate
        if at >= ramp_s + seconds:
            return
        yield int(at * _SECOND_NS)
