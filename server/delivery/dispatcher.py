"""Takes due deliveries out of the outbox and has the sinks send them, on threads of their own.

Each sink has its own few threads, so that a receiver that hangs holds up nobody else's events. A thread claims a
delivery (a lease on disk), sends, and writes the outcome; when nothing is due it waits for the next time something is,
for a word that an event was put, or for ``poll_s``, as other processes put events and revive dead ones too.

Any number of dispatchers may work on one store. When one dies, what it had leased is due again as soon as another one
on its host sees that, and else when the lease ends. Nothing is sent that could not be leased before: with a full disk
events wait, and are not sent again and again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from server.delivery.backoff import GiveUp, RetryPolicy, after_failure
from server.delivery.base import Delivered, Failed, Outcome, Refused, Sink
from server.delivery.owners import is_gone, own_name
from server.outbox import Lease, Outbox, State

log = structlog.get_logger("tidegate.delivery")

#: A lease outlasts the sink's own timeout by this: time to look up names and to write the outcome.
_LEASE_MARGIN_S: Final = 30.0
#: Waits after a failure of the store: the first, doubled up to the last, in seconds.
_STORE_BACKOFF_S: Final = (0.1, 5.0)
_TIDY_S: Final = 600.0
_CENSUS_S: Final = 1.0


@dataclass(slots=True)
class Counts:
    """What became of attempts at one sink, in the life of a dispatcher. Written under its lock."""

    delivered: int = 0
    failed: int = 0
    dead: int = 0


class Dispatcher:
    """The threads. ``start`` is called once; ``stop`` may be called again when it was cut short.

    ``draw`` gives the jitter of delays, uniform in 0..1. ``lease_margin_s`` and ``poll_s`` are shorter in tests.
    """

    def __init__(
        self,
        outbox: Outbox,
        sinks: Sequence[Sink],
        *,
        retry: RetryPolicy | None = None,
        threads_per_sink: int = 2,
        poll_s: float = 1.0,
        lease_margin_s: float = _LEASE_MARGIN_S,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._outbox = outbox
        self._sinks = tuple(sinks)
        self._retry = retry or RetryPolicy()
        self._threads_per_sink = threads_per_sink
        self._poll_s = poll_s
        self._lease_margin_s = lease_margin_s
        self._draw = draw
        self._owner = own_name()
        self._changed = threading.Condition()
        self._wakes = 0  # grows with every wake, so that one that comes early is not missed
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._unwatch: Callable[[], None] = lambda: None
        #: Per sink; the numbers only grow.
        self.counts: dict[str, Counts] = {sink.name: Counts() for sink in self._sinks}
        #: (sink, state) -> deliveries, as of a moment ago: read from the store between deliveries.
        self.census: dict[tuple[str, State], int] = {}

    @property
    def refused(self) -> int:
        """Events that the outbox had no room for."""
        return self._outbox.refused

    def start(self) -> None:
        """Begin to deliver."""
        self._unwatch = self._outbox.watch(self.wake)
        lanes = [(self._lane, sink) for sink in self._sinks for _ in range(self._threads_per_sink)]
        self._threads = [
            threading.Thread(target=run, args=(sink,), name=f"tidegate-deliver-{sink.name}", daemon=True)
            for run, sink in lanes
        ]
        self._threads.append(threading.Thread(target=self._keep_house, name="tidegate-outbox", daemon=True))
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """Look for due deliveries now. Never waits for the disk."""
        with self._changed:
            self._wakes += 1
            self._changed.notify_all()

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Claim nothing more and finish what is being sent, for at most ``timeout_s``; False when that was too short.

        What is cut off stays leased and is tried again by whoever comes, once the lease has ended.
        """
        self._unwatch()
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        cut_off = [thread.name for thread in self._threads if thread.is_alive()]
        if cut_off:
            log.warning("delivery_cut_off", threads=cut_off)
        return not cut_off

    # -- delivering -----------------------------------------------------------------------------------------------

    def _lane(self, sink: Sink) -> None:
        trouble = _Trouble("outbox_unavailable", sink=sink.name)
        look, seen = True, 0  # whether there may be something to claim; the wakes that the last look answered
        while not self._stopping:
            if look:
                seen = self._wakes
            try:
                lease = self._claim(sink) if look else None
                wait_s = 0.0 if lease is not None else self._until_due(sink)
            except Exception as error:  # noqa: BLE001 - logged; the next look may be better
                self._pause(trouble.again(error))
                look = True
                continue
            trouble.over()
            if lease is not None:
                self._settle(lease, self._sent(sink, lease))
            look = wait_s <= 0 or self._wait(seen, min(wait_s, self._poll_s))

    def _claim(self, sink: Sink) -> Lease | None:
        return self._outbox.claim(
            sink.name, self._owner, self._lease_s(sink),
            max_attempts=self._retry.max_attempts, horizon_s=self._horizon_s(sink),
        )  # fmt: skip

    def _lease_s(self, sink: Sink) -> float:
        return sink.timeout_s + self._lease_margin_s

    def _horizon_s(self, sink: Sink) -> float:
        """The sum and not the longer one: a clock set back a little must not end a lease early."""
        return self._lease_s(sink) + self._retry.longest_s

    def _until_due(self, sink: Sink) -> float:
        """Seconds until there is something to claim, by a look that writes nothing."""
        due_s = self._outbox.next_due_s(sink.name, horizon_s=self._horizon_s(sink))
        return self._poll_s if due_s is None else due_s

    def _sent(self, sink: Sink, lease: Lease) -> Outcome:
        try:
            return sink.send(lease.message)
        except Exception as error:  # a sink's mistake costs an attempt, not the thread
            log.error("sink_broken", sink=sink.name, id=lease.message.id, exc_info=error)
            return Failed(f"the sink itself failed: {type(error).__name__}")

    def _settle(self, lease: Lease, outcome: Outcome) -> None:
        """Write the outcome, however often that takes while the lease is ours."""
        trouble = _Trouble("outcome_not_written", sink=lease.sink, id=lease.message.id)
        until = time.monotonic() + self._lease_margin_s
        while True:
            try:
                self._write(lease, outcome)
            except Exception as error:  # noqa: BLE001 - logged; what is not written is sent again
                self._pause(trouble.again(error))
                if self._stopping or time.monotonic() > until:
                    return  # the lease ends and the event is sent again: better twice than never
            else:
                return

    def _write(self, lease: Lease, outcome: Outcome) -> None:
        count = self.counts[lease.sink]
        match outcome:
            case Delivered():
                self._outbox.delivered(lease)
                self._count(count, delivered=1)
            case Refused(reason):
                self._give_up(lease, reason)
            case Failed(reason, retry_after_s):
                step = after_failure(self._retry, lease.attempts, self._draw(), retry_after_s)
                if isinstance(step, GiveUp):
                    self._give_up(lease, f"{reason} ({step.reason})")
                    return
                self._outbox.failed(lease, reason, step.delay_s)
                self._count(count, failed=1)
                log.info(
                    "delivery_failed", sink=lease.sink, id=lease.message.id, type=lease.message.type,
                    attempt=lease.attempts, reason=reason, retry_in_s=round(step.delay_s, 3),
                )  # fmt: skip

    def _give_up(self, lease: Lease, reason: str) -> None:
        if self._outbox.dead(lease, reason):
            self._count(self.counts[lease.sink], failed=1, dead=1)
            message = lease.message
            log.error(
                "delivery_dead", sink=lease.sink, id=message.id, type=message.type, subject=message.subject,
                attempts=lease.attempts, reason=reason,
            )  # fmt: skip

    def _count(self, counts: Counts, *, delivered: int = 0, failed: int = 0, dead: int = 0) -> None:
        with self._changed:
            counts.delivered += delivered
            counts.failed += failed
            counts.dead += dead

    # -- house-keeping --------------------------------------------------------------------------------------------

    def _keep_house(self) -> None:
        """Take the census that metrics show, take over from the dead, and now and then let old events go."""
        trouble = _Trouble("outbox_untidy")
        tidy_at = time.monotonic()
        while not self._stopping:
            try:
                if time.monotonic() >= tidy_at:
                    self._outbox.tidy([sink.name for sink in self._sinks])
                    tidy_at = time.monotonic() + _TIDY_S
                self._take_over()
                self.census = self._outbox.census()
            except Exception as error:  # noqa: BLE001 - logged
                self._pause(trouble.again(error))
            else:
                trouble.over()
                self._pause(_CENSUS_S)

    def _take_over(self) -> None:
        gone = [owner for owner in self._outbox.lease_owners() if is_gone(owner)]
        for owner in gone:
            self._outbox.end_leases(owner)
            log.info("leases_ended", owner=owner)
        if gone:
            self.wake()

    # -- waiting --------------------------------------------------------------------------------------------------

    def _wait(self, seen: int, timeout_s: float) -> bool:
        """Until a wake later than ``seen`` or the stop (True), or until the time is over (False)."""
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping or self._wakes != seen, timeout_s)

    def _pause(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping, timeout_s)


class _Trouble:
    """Failures in a row, of the store as a rule: logged when they begin, with growing pauses."""

    def __init__(self, event: str, **fields: str) -> None:
        self._event = event
        self._fields = fields
        self._pause_s = 0.0

    def again(self, error: Exception) -> float:
        """Another one; how long to wait after it."""
        if not self._pause_s:
            log.error(self._event, error=str(error), exc_info=error, **self._fields)
        first, last = _STORE_BACKOFF_S
        self._pause_s = min(max(first, 2 * self._pause_s), last)
        return self._pause_s

    def over(self) -> None:
        self._pause_s = 0.0
