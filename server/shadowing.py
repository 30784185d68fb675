"""The shadow lane: copies of answered requests go to another version, and its answers are compared with the primary's.

Owns the bounded queue, the budget, the breaker and the hand-over to the comparison. Sampling is the router's, comparing
is ``monitor.compare``'s, and the target has a batcher and an engine of its own, apart from those that answer callers.

**What a caller can notice: nothing.** ``offer`` comes after the answer and does a few checks, one copy of what is a
view on a larger buffer, and an append; sending starts on a later turn of the loop, runs are on the target's threads,
comparing on a worker. A shadow that fails, hangs, is slow or answers garbage is counted, and after a while left alone.

**Memory.** A queued or running request holds at most ``max_body_bytes`` (inputs and the primary's outputs together),
and the queue drops its oldest: the lane holds at most ``(queue + in_flight) * max_body_bytes``. A run that hangs keeps
its own inputs until it ends, which are those of at most ``in_flight`` requests more.

**A slot** is taken when a request is sent, and given back when its comparison is done, it failed, or its time is over.
Nothing is ever sent twice.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import structlog

from monitor.compare import CompareSpec, Pair, PairedComparison, Verdict
from server.batching.batcher import CallLater, CallSoon, TimerHandle, Work
from server.checks import fit_inputs
from server.errors import Draining, QueueFull, TidegateError
from server.telemetry.instruments import ShadowTelemetry
from server.types import Clock, ModelSpec, Tensor

log = structlog.get_logger("shadow")

_NS: Final = 10**9
#: A second's worth of the budget may come at once in this part of a second.
_BURST_NS: Final = _NS // 10
#: What an element of a BYTES tensor takes beside its characters.
_ELEMENT_BYTES: Final = 64

#: Runs one job later, on another thread; False when it has no room, and the job is never run.
Offload: TypeAlias = Callable[[Callable[[], None]], bool]


@dataclass(slots=True, frozen=True)
class ShadowBudget:
    """What a shadow may cost. ``max_body_bytes`` bounds one request's inputs and the primary's outputs together;
    ``yield_above_load``: over this load of the primary (0..1) the shadow stands back."""

    rps: float = 50.0
    in_flight: int = 4
    queue: int = 256
    max_body_bytes: int = 1024 * 1024
    timeout_s: float = 2.0
    yield_above_load: float = 0.7


@dataclass(slots=True, frozen=True)
class BreakerSpec:
    """Opens after ``consecutive`` failures, or ``failures`` among the last 32 outcomes; one probe after ``open_s``."""

    consecutive: int = 5
    failures: int = 16
    open_s: float = 30.0


class Breaker:
    """Whether a shadow is asked at all. Pure: times are given in monotonic ns."""

    def __init__(self, spec: BreakerSpec) -> None:
        self._spec = spec
        self._history = 0  # one bit per outcome, the newest lowest; 1 is a failure
        self._open_until_ns = 0  # 0: closed
        self._probing = False

    def allows(self, now: int) -> bool:
        """Closed, or open for long enough that one request may try."""
        return not self._open_until_ns or (now >= self._open_until_ns and not self._probing)

    def started(self) -> None:
        """A request that was allowed is on its way."""
        self._probing = self._open_until_ns != 0

    def ended(self, now: int, *, failed: bool) -> None:
        """How a request ended. Whatever was sent before the breaker opened no longer matters after it closed."""
        if self._open_until_ns and not failed:
            self._close()
            return
        self._history = ((self._history << 1) | failed) & 0xFFFFFFFF
        if self._open_until_ns or self._over():
            self._open_until_ns = now + int(self._spec.open_s * _NS)
            self._probing = False

    def state(self, now: int) -> str:
        """closed | open | half_open, for reports."""
        if not self._open_until_ns:
            return "closed"
        return "half_open" if now >= self._open_until_ns else "open"

    def _over(self) -> bool:
        newest = (1 << self._spec.consecutive) - 1
        return self._history & newest == newest or self._history.bit_count() >= self._spec.failures

    def _close(self) -> None:
        self._history = self._open_until_ns = 0
        self._probing = False


class ShadowBatcher(Protocol):
    """What the lane needs of a batcher: one whose runs are never on the loop (``server.batching.offloop``)."""

    def submit(self, work: Work) -> None: ...
    def cancel(self, work: Work) -> None: ...


class ShadowTarget(Protocol):
    """A loaded version; ``server.gateway.Served`` is one."""

    @property
    def spec(self) -> ModelSpec: ...
    @property
    def batcher(self) -> Any: ...


@dataclass(slots=True)
class _Item:
    """One answered request: what the shadow will be asked, and what the primary said."""

    id: str
    inputs: list[Tensor]
    batched: bool
    outputs: list[Tensor]
    compute_ns: int
    batch_rows: int


@dataclass(slots=True, eq=False)
class _Flight:
    """One request on its way. ``item`` None: it is over, by its time or by the lane's end."""

    item: _Item | None
    batcher: ShadowBatcher
    work: Work | None = None
    timer: TimerHandle | None = None


class ShadowLane:
    """One shadow of one model. On the loop only, but for ``report``; ``monitor.compare.prepare`` has been called.

    ``target`` None: the version is not loaded. ``load`` gives the primary's load in 0..1. ``offload`` runs comparisons.
    """

    def __init__(
        self,
        target: ShadowTarget | None,
        *,
        budget: ShadowBudget,
        compare: CompareSpec,
        telemetry: ShadowTelemetry,
        clock: Clock,
        call_soon: CallSoon,
        call_soon_threadsafe: CallSoon,
        call_later: CallLater,
        load: Callable[[], float],
        offload: Offload,
        breaker: BreakerSpec = BreakerSpec(),
    ) -> None:
        self.target = target
        self.budget = budget
        self.comparison = PairedComparison(compare)
        self._telemetry = telemetry
        self._clock = clock
        self._call_soon = call_soon
        self._call_soon_threadsafe = call_soon_threadsafe
        self._call_later = call_later
        self._load = load
        self._offload = offload
        self._breaker = Breaker(breaker)
        self._queue: deque[_Item] = deque()
        self._flights: set[_Flight] = set()
        self._comparing = 0
        self._interval_ns = int(_NS / budget.rps)
        self._due_ns = 0
        self._pump_due = False
        self._closed = False

    # --- for the gateway -------------------------------------------------------------------------------------

    def offer(self, tidegate_id: str, work: Work) -> None:
        """Take a copy of a request that was sampled, after it was answered. Never raises for what is in it.

        ``work``: what the primary's batcher has answered.
        """
        outputs = work.outputs
        if self._closed:
            return
        if outputs is None:
            self._telemetry.dropped("primary_failed")
            return
        refusal = self._refusal(work, outputs)
        if refusal:
            self._telemetry.dropped(refusal)
            return
        if len(self._queue) >= self.budget.queue:
            self._queue.popleft()
            self._telemetry.dropped("queue")
        inputs = [_owned(tensor) for tensor in work.inputs if tensor is not None]
        compute_ns = work.computed_ns - work.assembled_ns
        self._queue.append(
            _Item(tidegate_id, inputs, work.rows > 0, [_owned(t) for t in outputs], compute_ns, work.batch_rows)
        )
        if not self._pump_due:
            self._pump_due = True
            self._call_soon(self._pump)

    def primary_failed(self) -> None:
        """A sampled request that the primary has not answered: there is nothing to compare with."""
        if not self._closed:
            self._telemetry.dropped("primary_failed")

    def _refusal(self, work: Work, outputs: list[Tensor]) -> str:
        """Why this request is not taken; "" when it is, and a place in the rate is then used."""
        now = self._clock()
        if self.target is None:
            return "no_model"
        if not self._breaker.allows(now):
            return "breaker"
        if now < self._due_ns - _BURST_NS:
            return "rps"
        if self._load() > self.budget.yield_above_load:
            return "load"
        if _held_bytes(work.inputs) + _held_bytes(outputs) > self.budget.max_body_bytes:
            return "body"
        self._due_ns = max(self._due_ns, now) + self._interval_ns
        return ""

    # --- sending ---------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send while there is room. What cannot go now because of the primary or the shadow is not kept for later."""
        self._pump_due = False
        while self._queue and self._busy() < self.budget.in_flight:
            item = self._queue.popleft()
            reason = self._hindrance()
            if reason:
                self._telemetry.dropped(reason)
            else:
                self._send(item)

    def _busy(self) -> int:
        return len(self._flights) + self._comparing

    def _hindrance(self) -> str:
        if self.target is None:
            return "no_model"
        if not self._breaker.allows(self._clock()):
            return "breaker"
        return "load" if self._load() > self.budget.yield_above_load else ""

    def _send(self, item: _Item) -> None:
        target = self.target
        if target is None:
            return
        flight = _Flight(item, target.batcher)
        try:
            inputs, rows = fit_inputs(target.spec, item.inputs)
            flight.work = Work(inputs, rows, partial(self._answered, flight))
            flight.batcher.submit(flight.work)
        except QueueFull:
            self._telemetry.dropped("queue")
        except Draining:
            self._telemetry.dropped("no_model")
        except TidegateError as error:  # a signature that does not take what the primary takes
            self._telemetry.failed(error.code)
        else:
            self._telemetry.sent()
            self._breaker.started()
            self._flights.add(flight)
            flight.timer = self._call_later(self.budget.timeout_s, partial(self._expired, flight))

    def _expired(self, flight: _Flight) -> None:
        """Too slow: its slot and its memory are free again, whatever the engine does."""
        if self._withdraw(flight):
            self._telemetry.dropped("timeout")
            self._breaker.ended(self._clock(), failed=True)
            self._pump()

    def _withdraw(self, flight: _Flight) -> bool:
        """Forget a request on its way; False when it was over already."""
        if flight not in self._flights:
            return False
        self._flights.remove(flight)
        flight.item = None
        if flight.work is not None:
            flight.batcher.cancel(flight.work)
            flight.work = None
        if flight.timer is not None:
            flight.timer.cancel()
        return True

    # --- answers ---------------------------------------------------------------------------------------------

    def _answered(self, flight: _Flight, work: Work) -> None:
        item, now = flight.item, self._clock()
        if item is None or not self._withdraw(flight):
            return
        if work.outputs is None:
            self._telemetry.failed(work.error.code if work.error is not None else "internal")
            self._breaker.ended(now, failed=True)
        else:
            self._breaker.ended(now, failed=False)
            self._hand_over(_pair(item, work))
        self._pump()

    def _hand_over(self, pair: Pair) -> None:
        if self._offload(partial(self._compare, pair)):
            self._comparing += 1
        else:
            self._telemetry.dropped("queue")

    def _compare(self, pair: Pair) -> None:
        """On the worker: compare, and tell the loop."""
        verdict: Verdict | None = None
        try:
            verdict = self.comparison.add(pair)
        except Exception as error:  # the boundary: whatever a shadow answered must not end the worker
            log.error("shadow_compare_failed", id=pair.id, exc_info=error)
        with suppress(RuntimeError):  # the loop is closed: nobody counts any more
            self._call_soon_threadsafe(self._compared, verdict)

    def _compared(self, verdict: Verdict | None) -> None:
        self._comparing -= 1
        if verdict is None:
            self._telemetry.failed("internal")
        else:
            self._telemetry.compared(verdict.kinds, verdict.max_abs, verdict.nonfinite, verdict.latency_ratio)
        self._pump()

    # --- for the operator ------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Everything that is known of this shadow, as plain values; from any thread."""
        return {
            "breaker": self._breaker.state(self._clock()),
            "queued": len(self._queue),
            "in_flight": len(self._flights),
            "comparing": self._comparing,
            **self._telemetry.read(),
            "comparison": self.comparison.report(),
        }

    def held_bytes(self) -> int:
        """Bytes of tensors that the lane holds, queued and on their way."""
        flying = [flight.item for flight in self._flights if flight.item is not None]
        return sum(_held_bytes(item.inputs) + _held_bytes(item.outputs) for item in [*self._queue, *flying])

    def close(self) -> None:
        """Forget what is queued and on its way, and take nothing more; the target's batcher may be closed then."""
        self._closed = True
        self._queue.clear()
        for flight in tuple(self._flights):
            self._withdraw(flight)


class CompareWorker:
    """One daemon thread that compares for all lanes, behind a queue of ``room`` jobs. ``submit`` is an ``Offload``."""

    def __init__(self, room: int = 64) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._work, name="tidegate-shadow-compare", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> bool:
        """Run ``job`` later; False when the queue is full. A job must not raise."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """End the thread after the jobs it has. Blocks that long."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # an idle worker keeps no tensors


def _pair(item: _Item, work: Work) -> Pair:
    return Pair(
        item.id,
        item.outputs,
        work.outputs or [],
        batched=item.batched,
        primary_ns=item.compute_ns,
        primary_batch_rows=item.batch_rows,
        shadow_ns=work.computed_ns - work.assembled_ns,
        shadow_batch_rows=work.batch_rows,
    )


def _held_bytes(tensors: list[Tensor | None] | list[Tensor]) -> int:
    return sum([_size(tensor.data) for tensor in tensors if tensor is not None])


def _size(data: Any) -> int:
    if isinstance(data, list):
        return sum(map(len, data)) + _ELEMENT_BYTES * len(data)
    return data.nbytes if isinstance(data, memoryview) else len(data)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor without the received body or the whole batch that it may be a view on."""
    if isinstance(tensor.data, bytes | list):
        return tensor
    return Tensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
