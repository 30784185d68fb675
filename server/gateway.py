"""The one use case: take a request, decide who answers, batch it, answer. Synchronous and transport-free.

Owns admission, the current routing table, and every call in flight. Everything here runs on the loop thread; engines
run behind the batcher. Who takes a request settles it exactly once: a ``_Call`` ends by its batch's result, by its own
error, by its deadline or by a cancel, whichever comes first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import getrandbits
from typing import Protocol, cast

import structlog

from router.errors import BadVersion, RoutingError, UnknownModel, UnknownVersion
from router.table import RoutingTable
from router.types import ModelRoutes, RouteDecision, RouteQuery
from server.batching.batcher import Batcher, Work
from server.checks import check_request, queue_terms
from server.codec.classification import classify
from server.errors import (
    DeadlineExceeded,
    Draining,
    InvalidArgument,
    ModelNotFound,
    ModelNotReady,
    TidegateError,
    TooManyRequests,
    VersionNotFound,
)
from server.runtime.base import ModelOptions
from server.telemetry.instruments import Instruments, ModelTelemetry, Telemetry
from server.telemetry.metrics import Counter
from server.telemetry.trace import BatchTrace, RequestTrace, TraceContext
from server.types import (
    Clock,
    Decision,
    InferenceRequest,
    InferenceResponse,
    ModelSpec,
    Permit,
    Reply,
    RequestedOutput,
    RequestHead,
    RequestLimits,
    Tensor,
    Ticket,
)

log = structlog.get_logger("gateway")

_UNKNOWN_SIZE_BYTES = 1024 * 1024
#: Refusals of a version's own queue, counted beside those of admission.
_SHED = frozenset({"queue_full", "queue_timeout"})


class TimerHandle(Protocol):
    """What ``call_later`` gives back."""

    def cancel(self) -> None: ...


CallSoon = Callable[..., object]
CallLater = Callable[[float, Callable[[], None]], TimerHandle]


@dataclass(slots=True, eq=False)
class Served:
    """One loaded version as the gateway uses it. ``calls`` counts the requests that hold it."""

    spec: ModelSpec
    batcher: Batcher
    options: ModelOptions
    telemetry: ModelTelemetry
    instruments: Instruments
    calls: int = 0
    on_idle: Callable[[], None] | None = None
    routes: dict[tuple[str, str], Counter] = field(default_factory=dict)

    def routed(self, arm: str, reason: str) -> None:
        """Count one routing decision for this version."""
        counter = self.routes.get((arm, reason))
        if counter is None:
            labels = (self.spec.name, self.spec.version, arm, reason)
            counter = self.routes[arm, reason] = self.instruments.route.labels(*labels)
        counter.inc()

    def release(self) -> None:
        """One request less; tells whoever waits for the last one."""
        self.calls -= 1
        if self.calls == 0 and self.on_idle is not None:
            on_idle, self.on_idle = self.on_idle, None
            on_idle()


@dataclass(slots=True, frozen=True)
class AdmissionLimits:
    """How much may be in flight in the whole process; over it a request is refused before its body is read."""

    max_requests: int = 4096
    max_bytes: int = 2 * 1024 * 1024 * 1024
    retry_after_s: float = 1.0


@dataclass(slots=True, eq=False)
class GatewayPermit:
    """A place among the requests in flight, with the bytes it may hold."""

    head: RequestHead
    tidegate_id: str
    trace: TraceContext | None
    _gateway: Gateway
    _bytes: int
    _released: bool = field(default=False)

    @property
    def traceresponse(self) -> str | None:
        """The ``traceresponse`` header of a sampled request."""
        return None if self.trace is None else self.trace.header()

    def release(self) -> None:
        """Give the place back. Twice is harmless."""
        if not self._released:
            self._released = True
            self._gateway.give_back(self._bytes)


class Gateway:
    """Admission, routing table, calls. Implements ``server.types.Port``."""

    def __init__(
        self,
        *,
        limits: RequestLimits,
        admission: AdmissionLimits,
        telemetry: Telemetry,
        clock: Clock,
        call_soon: CallSoon,
        call_later: CallLater,
    ) -> None:
        self.limits = limits
        self.admission = admission
        self.telemetry = telemetry
        self.clock = clock
        self.call_later = call_later
        self._sampled = _Sampled(telemetry, call_soon)
        self.table: RoutingTable[Served] = RoutingTable({}, 0)
        #: Models known but not served: name -> why (loading, failed...). Kept by the control.
        self.unready: dict[str, str] = {}
        self._requests = 0
        self._bytes = 0
        self._closed = False
        self._id_prefix = os.urandom(8).hex()
        self._ids = 0
        self.on_empty: Callable[[], None] | None = None

    # -- admission ----------------------------------------------------------------------------------------------

    def admit(self, head: RequestHead) -> GatewayPermit:
        """Take or refuse from the head alone. Raises TidegateError naming the limit or the model."""
        if self._closed:
            raise self.refuse(Draining("the server is shutting down", retry_after_s=self.admission.retry_after_s))
        if self._requests >= self.admission.max_requests:
            raise self.refuse(
                TooManyRequests(
                    f"{self._requests} requests are in flight, the limit is {self.admission.max_requests}",
                    retry_after_s=self.admission.retry_after_s,
                )
            )
        size = _UNKNOWN_SIZE_BYTES if head.content_length is None else head.content_length
        if self._bytes + size > self.admission.max_bytes:
            raise self.refuse(
                TooManyRequests(
                    f"requests in flight hold {self._bytes} bytes, {size} more would pass the limit of "
                    f"{self.admission.max_bytes}",
                    retry_after_s=self.admission.retry_after_s,
                )
            )
        if head.model:
            self.served(head.model, head.version)
        self._requests += 1
        self._bytes += size
        self._ids += 1
        gate = self.telemetry.gate
        trace = None if gate is None else gate.start(head.metadata.get("traceparent"), head.metadata.get("tracestate"))
        return GatewayPermit(head, f"{self._id_prefix}-{self._ids:x}", trace, self, size)

    def refuse(self, error: TidegateError) -> TidegateError:
        """Count a refusal by its reason."""
        self.telemetry.rejected(error.code).inc()
        return error

    def give_back(self, size: int) -> None:
        """A permit was released."""
        self._requests -= 1
        self._bytes -= size
        if self._requests == 0 and self.on_empty is not None:
            self.on_empty()

    @property
    def requests_in_flight(self) -> int:
        return self._requests

    def close(self) -> None:
        """Refuse everything from now on; what is in flight goes on."""
        self._closed = True

    # -- the use case -------------------------------------------------------------------------------------------

    def handle(self, permit: Permit, request: InferenceRequest, reply: Reply) -> Ticket:
        """Route, check, batch and run one request. Never raises: every outcome reaches ``reply``."""
        call = _Call(self, cast("GatewayPermit", permit), request, reply)
        try:
            call.start()
        except TidegateError as error:
            call.fail(error)
        except Exception:
            log.exception("request_failed", id=permit.tidegate_id, model=request.model)
            call.fail(TidegateError(f"internal error, id {permit.tidegate_id}"))
        return call

    def route(self, request: InferenceRequest, head: RequestHead) -> RouteDecision[Served]:
        """The version that answers this request."""
        query = RouteQuery(request.model, request.version, head.metadata, request.parameters, request.id)
        try:
            return self.table.resolve(query, getrandbits(64))
        except RoutingError as error:
            raise self._translate(error) from None

    def _translate(self, error: RoutingError) -> TidegateError:
        if isinstance(error, BadVersion):
            return InvalidArgument(
                f"version of model '{_shown(error.model)}' must be a positive whole number, "
                f"got '{_shown(error.version)}'"
            )
        if isinstance(error, UnknownVersion):
            served = ", ".join(error.served)
            return VersionNotFound(
                f"Request for unknown model: '{_shown(error.model)}' version {error.version} is not found; "
                f"versions served: {served}"
            )
        if isinstance(error, UnknownModel):
            reason = self.unready.get(error.model)
            if reason is not None:
                return ModelNotReady(
                    f"model '{error.model}' is not ready: {reason}", retry_after_s=self.admission.retry_after_s
                )
            return ModelNotFound(f"Request for unknown model: '{_shown(error.model)}' is not found")
        return InvalidArgument(str(error))

    def routes(self, model: str) -> ModelRoutes[Served]:
        """Routes of one model, or ModelNotFound / ModelNotReady."""
        try:
            return self.table.routes(model)
        except RoutingError as error:
            raise self._translate(error) from None

    def served(self, model: str, version: str) -> Served:
        """One served version; "" means the stable one. Nothing is routed."""
        try:
            return self.table.lookup(model, version)
        except RoutingError as error:
            raise self._translate(error) from None

    def traced(self, record: RequestTrace, work: Work | None) -> None:
        """Hand on the record of a sampled request that is over."""
        self._sampled.add(record, work)

    def publish(self, table: RoutingTable[Served]) -> None:
        """Swap the routing table. Requests that hold a version of the old one finish there."""
        self.table = table
        self.telemetry.instruments.config_generation.labels("applied").set(table.generation)


class _Sampled:
    """Sampled requests of one turn of the loop. Members of one batch end in the same turn and share its record."""

    def __init__(self, telemetry: Telemetry, call_soon: CallSoon) -> None:
        self._telemetry = telemetry
        self._call_soon = call_soon
        self._records: list[RequestTrace] = []
        self._batches: dict[tuple[str, str, int], BatchTrace] = {}

    def add(self, record: RequestTrace, work: Work | None) -> None:
        if not self._records:
            self._call_soon(self._hand_over)
        self._records.append(record)
        if work is not None and work.batch_id:
            record.batches.append(self._batch(record, work))

    def _batch(self, record: RequestTrace, work: Work) -> BatchTrace:
        key = (record.model, record.version, work.batch_id)
        batch = self._batches.get(key)
        if batch is None:
            batch = self._batches[key] = BatchTrace(
                record.model, record.version, work.batch_rows, (), work.started_ns,
                work.assembled_ns, work.computed_ns, work.finished_ns,
            )  # fmt: skip
        batch.members += (record.context,)
        return batch

    def _hand_over(self) -> None:
        sink = self._telemetry.sink
        if sink is not None:
            for record in self._records:
                sink.offer(record)
        self._records.clear()
        self._batches.clear()


def _record(
    permit: GatewayPermit, context: TraceContext, decision: Decision, work: Work | None, code: str, now: int
) -> RequestTrace:
    queued = 0 if work is None else work.enqueued_ns
    return RequestTrace(
        context,
        permit.head.protocol,
        permit.head.received_ns,
        permit.tidegate_id,
        decoded_ns=queued,
        queued_ns=queued,
        finished_ns=now,
        model=decision.model,
        version=decision.version,
        arm=decision.arm,
        rows=0 if work is None else work.rows,
        code=code,
    )


@dataclass(slots=True)
class _Routed:
    """Where a request went: the version that it holds, and which of its outputs are answered with (None: all)."""

    served: Served
    decision: Decision
    picked: list[int] | None = None


class _Call:
    """One request from ``handle`` to its single end."""

    __slots__ = ("_done", "_gateway", "_permit", "_reply", "_request", "_routed", "_timer", "_work")

    def __init__(self, gateway: Gateway, permit: GatewayPermit, request: InferenceRequest, reply: Reply) -> None:
        self._gateway = gateway
        self._permit = permit
        self._request = request
        self._reply = reply
        self._done = False
        self._routed: _Routed | None = None
        self._work: Work | None = None
        self._timer: TimerHandle | None = None

    def start(self) -> None:
        """Route, check, submit. Raises TidegateError for what cannot be taken; the caller then calls ``fail``."""
        gateway, request, head = self._gateway, self._request, self._permit.head
        route = gateway.route(request, head)
        served = route.target
        served.calls += 1
        routed = self._routed = _Routed(served, Decision(route.model, route.version, route.arm, route.generation))
        served.routed(route.arm, route.reason)
        inputs, rows, routed.picked = check_request(request, served.spec)
        priority, timeout_us = queue_terms(request.parameters)
        work = Work(inputs, rows, partial(self._finished, routed), head.deadline_ns, priority, timeout_us)
        if head.deadline_ns:
            left_ns = head.deadline_ns - gateway.clock()
            if left_ns <= 0:
                raise DeadlineExceeded("the deadline had passed when the request arrived")
            self._timer = gateway.call_later(left_ns / 1e9, self._expired)
        served.batcher.submit(work)
        self._work = work

    def cancel(self) -> None:
        """The caller went away: queued work is dropped, running work's result is thrown away. No reply follows."""
        if not self._done:
            self._withdraw()
            self._settle("cancelled")

    def fail(self, error: TidegateError) -> None:
        """End with an error, if not ended yet."""
        if not self._done:
            self._settle(error.code)
            self._reply.finish(error)

    def _expired(self) -> None:
        if not self._done:
            self._withdraw()
            self.fail(DeadlineExceeded("the deadline passed before the model had answered"))

    def _withdraw(self) -> None:
        if self._work is not None and self._routed is not None:
            self._routed.served.batcher.cancel(self._work)

    def _finished(self, routed: _Routed, work: Work) -> None:
        """The batcher is done with this request's work."""
        if self._done:
            return
        if work.outputs is None:
            self.fail(work.error or TidegateError("internal error"))
            return
        try:
            response = self._respond(routed, work.outputs)
        except TidegateError as error:
            self.fail(error)
            return
        self._settle("ok")
        self._reply.message(response, routed.decision)
        self._reply.finish(None)

    def _respond(self, routed: _Routed, outputs: list[Tensor]) -> InferenceResponse:
        spec, request = routed.served.spec, self._request
        if routed.picked is not None:
            pairs = zip(routed.picked, request.outputs, strict=True)
            outputs = [_chosen(outputs[i], spec, i, want) for i, want in pairs]
        return InferenceResponse(spec.name, spec.version, request.id, outputs)

    def _settle(self, code: str) -> None:
        """Everything that the end of a request owes, whichever end it was."""
        self._done = True
        if self._timer is not None:
            self._timer.cancel()
        if self._routed is None:
            self._gateway.telemetry.rejected(code).inc()
        else:
            if code in _SHED:
                self._gateway.telemetry.rejected(code).inc()
            self._count(self._routed, code)
            self._routed.served.release()
        # Work and call hold each other: cut, so that tensors go now and not when the collector next comes by.
        self._work = None

    def _count(self, routed: _Routed, code: str) -> None:
        head, work, trace = self._permit.head, self._work, self._permit.trace
        now = self._gateway.clock()
        queue_ns = input_ns = infer_ns = output_ns = rows = 0
        if work is not None and work.computed_ns:
            queue_ns = work.started_ns - work.enqueued_ns
            input_ns = work.assembled_ns - work.started_ns
            infer_ns = work.computed_ns - work.assembled_ns
            output_ns = work.finished_ns - work.computed_ns
            rows = work.rows or 1
        routed.served.telemetry.request_done(
            routed.decision.arm, head.protocol, code, now - head.received_ns,
            queue_ns, input_ns, infer_ns, output_ns, rows, trace,
        )  # fmt: skip
        if trace is not None:
            self._gateway.traced(_record(self._permit, trace, routed.decision, work, code, now), work)


def _chosen(tensor: Tensor, spec: ModelSpec, index: int, want: RequestedOutput) -> Tensor:
    if not want.classification:
        return tensor
    return classify(tensor, want.classification, spec.outputs[index].labels, batched=spec.max_batch_size > 0)


def _shown(name: str) -> str:
    """A caller's own words, cut to a length that may be echoed."""
    return name if len(name) <= 128 else f"{name[:128]}..."
