"""Finished trace records as OpenTelemetry spans.

``request`` (server kind, child of the caller's span), under it ``queue`` and ``compute``, and ``shadow`` (marked so,
and linked to the request) for a copy that went to another version; and one ``batch`` per run of
the engine, however many of its members were sampled. The batch hangs under its first sampled member and is linked to
all of them, and every ``compute`` is linked to its batch, so each is found from the others.

Spans are built as finished records, not through a tracer: their ids and times exist before the SDK sees them (the
caller got the request's span id in ``traceresponse``), and half of a tracer's cost is the bookkeeping of live spans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from server.telemetry.trace import BatchTrace, Record, RequestTrace, ShadowTrace, TraceContext, new_span_id

#: (protocol, error code or "ok") -> the number that the protocol answers with.
StatusOf: TypeAlias = Callable[[str, str], int]
Attributes: TypeAlias = dict[str, str | int | float | bool]

SCOPE: Final = InstrumentationScope("tidegate")
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
#: Codes for which the caller, not the server, is at fault: by convention a server span is then not in error.
_CALLERS_FAULT: Final = frozenset(
    {
        "invalid_argument",
        "input_rejected",
        "payload_too_large",
        "unsupported_encoding",
        "not_found",
        "model_not_found",
        "version_not_found",
        "unimplemented",
        "failed_precondition",
        "cancelled",
    }
)
_PROTOCOL_ATTRIBUTES: Final[dict[str, Attributes]] = {
    "http": {"http.request.method": "POST", "http.route": "/v2/models/{model}/infer"},
    "grpc": {"rpc.system": "grpc", "rpc.service": "inference.GRPCInferenceService", "rpc.method": "ModelInfer"},
}
_STATUS_ATTRIBUTE: Final = {"http": "http.response.status_code", "grpc": "rpc.grpc.status_code"}


class SpanBuilder:
    """Makes the spans of one finished record. One thread."""

    def __init__(self, resource: Resource, status_of: StatusOf | None = None) -> None:
        self._resource = resource
        self._status_of = status_of

    def spans(self, record: Record) -> Iterator[ReadableSpan]:
        """``request``, then what happened below it, then each batch that no other member has brought yet.

        Of a copy at a shadow, ``shadow`` alone.
        """
        if isinstance(record, ShadowTrace):
            yield self._shadow(record)
            return
        request = _span_context(record.context)
        yield self._request(record, request)
        if record.queued_ns:
            yield self._queue(record, request)
        for batch in record.batches:
            if batch.computed_ns:
                yield self._compute(record, batch, request)
            if batch.finished_ns and not batch.exported:
                batch.exported = True
                yield self._batch(record, batch)

    def _shadow(self, record: ShadowTrace) -> ReadableSpan:
        primary = SpanContext(record.context.trace_id, record.context.parent_id, False, _SAMPLED)
        attributes = _model_attributes(record.model, record.version) | _error(record.code)
        attributes |= {"shadow": True, "tidegate.rows": record.rows, "tidegate.id": record.tidegate_id}
        marks = (("started", record.started_ns), ("computed", record.computed_ns))
        return ReadableSpan(
            "shadow",
            _span_context(record.context),
            parent=primary,
            resource=self._resource,
            attributes=attributes,
            events=[Event(name, timestamp=at + record.wall_offset_ns) for name, at in marks if at],
            links=(Link(primary),),
            status=_status(record.code),
            start_time=record.sent_ns + record.wall_offset_ns,
            end_time=record.finished_ns + record.wall_offset_ns,
            instrumentation_scope=SCOPE,
        )

    def _request(self, record: RequestTrace, context: SpanContext) -> ReadableSpan:
        end_ns = max(record.finished_ns, record.encoded_ns, record.received_ns)
        marks = (("decoded", record.decoded_ns), ("finished", record.finished_ns))
        return ReadableSpan(
            "request",
            context,
            parent=_caller(record.context),
            resource=self._resource,
            attributes=self._request_attributes(record),
            events=[Event(name, timestamp=at + record.wall_offset_ns) for name, at in marks if at],
            kind=SpanKind.SERVER,
            status=_status(record.code),
            start_time=record.received_ns + record.wall_offset_ns,
            end_time=end_ns + record.wall_offset_ns,
            instrumentation_scope=SCOPE,
        )

    def _request_attributes(self, record: RequestTrace) -> Attributes:
        attributes = dict(_PROTOCOL_ATTRIBUTES.get(record.protocol, {}))
        if self._status_of is not None and record.protocol in _STATUS_ATTRIBUTE:
            attributes[_STATUS_ATTRIBUTE[record.protocol]] = self._status_of(record.protocol, record.code)
        attributes |= _error(record.code) | _model_attributes(record.model, record.version)
        attributes["tidegate.arm"] = record.arm
        attributes["tidegate.rows"] = record.rows
        attributes["tidegate.id"] = record.tidegate_id
        if record.batches:
            attributes |= _batch_attributes(record.batches[-1])
        return {key: value for key, value in attributes.items() if value != ""}

    def _queue(self, record: RequestTrace, request: SpanContext) -> ReadableSpan:
        left_ns = record.batches[0].started_ns if record.batches else record.finished_ns
        return self._child("queue", record, request, record.queued_ns, left_ns, {})

    def _compute(self, record: RequestTrace, batch: BatchTrace, request: SpanContext) -> ReadableSpan:
        start_ns = batch.assembled_ns or batch.started_ns
        link = Link(_batch_context(batch))
        return self._child("compute", record, request, start_ns, batch.computed_ns, _batch_attributes(batch), (link,))

    def _child(
        self,
        name: str,
        record: RequestTrace,
        request: SpanContext,
        start_ns: int,
        end_ns: int,
        attributes: Attributes,
        links: Sequence[Link] = (),
    ) -> ReadableSpan:
        context = SpanContext(request.trace_id, new_span_id(), False, _SAMPLED, request.trace_state)
        return ReadableSpan(
            name,
            context,
            parent=request,
            resource=self._resource,
            attributes=attributes,
            links=links,
            start_time=start_ns + record.wall_offset_ns,
            end_time=max(start_ns, end_ns) + record.wall_offset_ns,
            instrumentation_scope=SCOPE,
        )

    def _batch(self, record: RequestTrace, batch: BatchTrace) -> ReadableSpan:
        return ReadableSpan(
            "batch",
            _batch_context(batch),
            parent=_span_context(batch.members[0]),
            resource=self._resource,
            attributes=_model_attributes(batch.model, batch.version) | _batch_attributes(batch) | _error(batch.code),
            links=[Link(_span_context(member)) for member in batch.members],
            status=_status(batch.code),
            start_time=batch.started_ns + record.wall_offset_ns,
            end_time=batch.finished_ns + record.wall_offset_ns,
            instrumentation_scope=SCOPE,
        )


def _span_context(context: TraceContext) -> SpanContext:
    return SpanContext(context.trace_id, context.span_id, False, _SAMPLED, _trace_state(context.tracestate))


def _caller(context: TraceContext) -> SpanContext | None:
    if not context.parent_id:
        return None
    return SpanContext(context.trace_id, context.parent_id, True, _SAMPLED, _trace_state(context.tracestate))


def _batch_context(batch: BatchTrace) -> SpanContext:
    return SpanContext(batch.members[0].trace_id, batch.span_id, False, _SAMPLED)


def _trace_state(value: str) -> TraceState | None:
    return TraceState.from_header([value]) if value else None


def _model_attributes(model: str, version: str) -> Attributes:
    return {"tidegate.model.name": model, "tidegate.model.version": version}


def _batch_attributes(batch: BatchTrace) -> Attributes:
    return {"tidegate.batch.id": f"{batch.span_id:016x}", "tidegate.batch.rows": batch.rows}


def _error(code: str) -> Attributes:
    return {} if code == "ok" else {"error.type": code}


def _status(code: str) -> Status:
    failed = code != "ok" and code not in _CALLERS_FAULT
    return Status(StatusCode.ERROR, code) if failed else Status(StatusCode.UNSET)
