"""The shadow lane: copies of answered requests go to another version, and its answers are compared with the primary's.

The shell around ``router.shadow`` (what waits, what goes, what is dropped and why) and ``router.breaker``: it reads the
clock, copies, sends, times and hands over. Sampling is the router's, comparing is ``monitor.compare``'s, and the target
has a batcher and an engine of its own, apart from those that answer callers.

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
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

import structlog

from monitor.compare import CompareSpec, Pair, PairedComparison, Verdict
from router.breaker import REFUSED, Breaker, BreakerPolicy, Outcome
from router.shadow import ShadowBudget
from router.shadow import ShadowLane as Waiting
from server.batching.batcher import CallLater, CallSoon, TimerHandle, Work
from server.checks import fit_inputs
from server.errors import Draining, QueueFull, TidegateError
from server.telemetry.instruments import ShadowTelemetry
from server.telemetry.trace import ShadowTrace, TraceContext, new_span_id
from server.types import Clock, ModelSpec, Tensor

log = structlog.get_logger("shadow")

_NS: Final = 10**9
#: While the primary is loaded, how often the lane looks whether it still is.
_LOOK_AGAIN_S: Final = 0.05
#: A hanging shadow gives few outcomes: five, within a minute, are enough to judge it by, and one probe to try it again.
SHADOW_BREAKER: Final = BreakerPolicy(window_ns=60 * _NS, min_requests=5, probes=1, open_ns=30 * _NS)
#: What an element of a BYTES tensor takes beside its characters.
_ELEMENT_BYTES: Final = 64

#: ``captured(client_id, tidegate_id, spec, rows, outputs, status, latency_ns)``: records what a shadow answered.
Captured: TypeAlias = Callable[[str, str, ModelSpec, int, Sequence[Tensor] | None, str, int], None]
#: Runs one job later, on another thread; False when it has no room, and the job is never run.
Offload: TypeAlias = Callable[[Callable[[], None]], bool]


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
    trace: TraceContext | None
    client_id: str

    def own(self) -> None:
        """Let go of the received body and the whole batch that its tensors may be views on."""
        self.inputs = [_owned(tensor) for tensor in self.inputs]
        self.outputs = [_owned(tensor) for tensor in self.outputs]

    def size(self) -> int:
        """Bytes held, once it owns them."""
        return sum([_size(tensor.data) for tensor in self.inputs]) + sum([_size(t.data) for t in self.outputs])


@dataclass(slots=True, eq=False)
class _Flight:
    """One request on its way. ``item`` None: it is over, by its time or by the lane's end."""

    item: _Item | None
    batcher: ShadowBatcher
    spec: ModelSpec
    term: int
    work: Work | None = None
    timer: TimerHandle | None = None


class ShadowLane:
    """One shadow of one model. On the loop only, but for ``report``; ``monitor.compare.prepare`` has been called.

    ``target`` None: the version is not loaded. ``load`` gives the primary's load in 0..1. ``offload`` runs comparisons.
    ``captured``: who records answers, None: nobody.
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
        breaker: BreakerPolicy = SHADOW_BREAKER,
        traced: Callable[[ShadowTrace], None] | None = None,
        captured: Captured | None = None,
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
        self._traced = traced
        self._captured = captured
        self._breaker = Breaker(breaker)
        #: What waits, and how many places are taken: on their way, or being compared.
        self._waiting: Waiting[_Item] = Waiting(budget)
        self._flights: set[_Flight] = set()
        self._published: Counter[str] = Counter()
        self._pump_due = False
        self._look: TimerHandle | None = None
        self._closed = False

    # --- for the gateway -------------------------------------------------------------------------------------

    def offer(self, tidegate_id: str, work: Work, trace: TraceContext | None = None, client_id: str = "") -> None:
        """Take a copy of a request that was sampled, after it was answered. Never raises for what is in it.

        ``work``: what the primary's batcher has answered. ``trace``: the primary's span, when it is traced.
        ``client_id``: the request's own, by which it is captured.
        """
        if self._closed:
            return
        if work.outputs is None:
            self._drop("primary_failed")
        elif self.target is None:
            self._drop("no_model")
        else:
            self._offer(_item(tidegate_id, work, work.outputs, trace, client_id))

    def primary_failed(self) -> None:
        """A sampled request that the primary has not answered: there is nothing to compare with."""
        if not self._closed:
            self._drop("primary_failed")

    def _offer(self, item: _Item) -> None:
        refused = self._waiting.offer(item, item.size(), self._load(), self._clock())
        if refused:
            self._publish(refused)
            return
        item.own()
        self._pump_soon()

    # --- sending ---------------------------------------------------------------------------------------------

    def _pump_soon(self) -> None:
        if not self._pump_due:
            self._pump_due = True
            self._call_soon(self._pump)

    def _pump(self) -> None:
        """Send while there is room."""
        self._pump_due = False
        if self._closed:
            return
        while (item := self._waiting.take(self._load(), self._clock())) is not None:
            self._send(item)
        if self._waiting and self._waiting.in_flight < self.budget.in_flight and self._look is None:
            self._look = self._call_later(_LOOK_AGAIN_S, self._look_again)  # the primary is loaded: nothing wakes us
        for reason in self._waiting.dropped:
            self._publish(reason)

    def _look_again(self) -> None:
        self._look = None
        self._pump()

    def _send(self, item: _Item) -> None:
        """Hand an item that has a place to the shadow's batcher, or count why not and give the place back."""
        target, term = self.target, self._breaker.admit(self._clock())
        if target is None or term == REFUSED:
            self._waiting.drop("no_model" if target is None else "breaker")
            self._settle(term, Outcome.UNKNOWN)
            self._waiting.done()
            return
        flight = _Flight(item, target.batcher, target.spec, term)
        try:
            inputs, rows = fit_inputs(target.spec, item.inputs)
            flight.work = Work(inputs, rows, partial(self._answered, flight))
            flight.batcher.submit(flight.work)
        except TidegateError as error:
            self._not_taken(error)
            self._settle(term, Outcome.UNKNOWN)
            self._waiting.done()
            return
        self._telemetry.sent()
        self._flights.add(flight)
        flight.timer = self._call_later(self.budget.timeout_ns / _NS, partial(self._expired, flight))

    def _not_taken(self, error: TidegateError) -> None:
        if isinstance(error, QueueFull):
            self._waiting.drop("queue")
        elif isinstance(error, Draining):
            self._waiting.drop("no_model")
        else:  # a signature that does not take what the primary takes
            self._telemetry.failed(error.code)

    def _settle(self, term: int, outcome: Outcome) -> None:
        if term != REFUSED:
            self._breaker.settle(term, outcome, self._clock())

    def _expired(self, flight: _Flight) -> None:
        """Too slow: its place and its memory are free again, whatever the engine does."""
        self._tell(flight, "version_timeout")
        if self._withdraw(flight):
            self._waiting.drop("timeout")
            self._settle(flight.term, Outcome.FAILED)
            self._waiting.done()
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
        item = flight.item
        self._tell(flight, "ok" if work.error is None else work.error.code)
        if item is None or not self._withdraw(flight):
            return
        if work.outputs is None:
            self._telemetry.failed(work.error.code if work.error is not None else "internal")
            self._settle(flight.term, Outcome.FAILED)
            self._waiting.done()
        else:
            self._settle(flight.term, Outcome.OK)
            self._hand_over(_pair(item, work))
        self._pump()

    def _tell(self, flight: _Flight, code: str) -> None:
        """A request is over at the shadow: tell who records answers and, of one whose primary is traced, who traces."""
        item, work = flight.item, flight.work
        if item is None or work is None:
            return
        if self._captured is not None:
            outputs, latency_ns = None if code != "ok" else work.outputs, self._clock() - work.enqueued_ns
            self._captured(item.client_id, item.id, flight.spec, work.rows, outputs, code, latency_ns)
        if self._traced is None or item.trace is None:
            return
        primary, spec = item.trace, flight.spec
        context = TraceContext(primary.trace_id, new_span_id(), primary.span_id)
        self._traced(
            ShadowTrace(
                context, spec.name, spec.version, work.enqueued_ns, self._clock(), item.id, work.rows,
                work.started_ns, work.computed_ns, code,
            )
        )  # fmt: skip

    def _hand_over(self, pair: Pair) -> None:
        """To the worker; the place is taken until it has compared."""
        if not self._offload(partial(self._compare, pair)):
            self._waiting.drop("queue")
            self._waiting.done()

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
        if verdict is None:
            self._telemetry.failed("internal")
        else:
            self._telemetry.compared(verdict.kinds, verdict.max_abs, verdict.nonfinite, verdict.latency_ratio)
        self._waiting.done()
        self._pump()

    # --- counting --------------------------------------------------------------------------------------------

    def _drop(self, reason: str) -> None:
        self._waiting.drop(reason)
        self._publish(reason)

    def _publish(self, reason: str) -> None:
        """Bring the metric up to what was counted where the decisions are made."""
        counted = self._waiting.dropped[reason]
        if counted != self._published[reason]:
            self._telemetry.dropped(reason, counted - self._published[reason])
            self._published[reason] = counted

    # --- for the operator ------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Everything that is known of this shadow, as plain values; from any thread."""
        flying = len(self._flights)
        return {
            "breaker": self._breaker.state.value,
            "queued": len(self._waiting),
            "in_flight": flying,
            "comparing": max(0, self._waiting.in_flight - flying),
            **self._telemetry.read(),
            "comparison": self.comparison.report(),
        }

    def held_bytes(self) -> int:
        """Bytes of tensors that the lane holds, queued and on their way."""
        flying = [flight.item.size() for flight in self._flights if flight.item is not None]
        return self._waiting.waiting_bytes + sum(flying)

    def detach(self) -> ShadowTarget | None:
        """Have no target any more; gives it back. Nothing is on its way to it then: its batcher may be closed."""
        target, self.target = self.target, None
        for flight in tuple(self._flights):
            self._withdraw(flight)
            self._waiting.drop("no_model")
            self._settle(flight.term, Outcome.UNKNOWN)
            self._waiting.done()
        self._pump()
        self._publish("no_model")
        return target

    def close(self) -> None:
        """Forget what is queued and on its way, and take nothing more; the target's batcher may be closed then."""
        self._closed = True
        self._waiting.clear("no_model")
        self._publish("no_model")
        if self._look is not None:
            self._look.cancel()
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


def _item(tidegate_id: str, work: Work, outputs: list[Tensor], trace: TraceContext | None, client_id: str) -> _Item:
    inputs = [tensor for tensor in work.inputs if tensor is not None]
    compute_ns = work.computed_ns - work.assembled_ns
    return _Item(tidegate_id, inputs, work.rows > 0, outputs, compute_ns, work.batch_rows, trace, client_id)


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


def _size(data: Any) -> int:
    if isinstance(data, list):
        return sum(map(len, data)) + _ELEMENT_BYTES * len(data)
    return data.nbytes if isinstance(data, memoryview) else len(data)


def _owned(tensor: Tensor) -> Tensor:
    """The tensor without the received body or the whole batch that it may be a view on."""
    if isinstance(tensor.data, bytes | list):
        return tensor
    return Tensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
