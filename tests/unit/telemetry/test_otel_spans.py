"""Spans built from records, without a network: which spans there are, their times, parents, links and status."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode

from server.telemetry.otel_spans import SpanBuilder
from server.telemetry.trace import BatchTrace, Record, RequestTrace, ShadowTrace, TraceContext

EPOCH = 1_700_000_000_000_000_000


def request(number: int, protocol: str = "http") -> RequestTrace:
    """A request that was received at 100 and queued at 120, on a wall clock that began at EPOCH."""
    context = TraceContext(number, number * 10, parent_id=number * 100)
    return RequestTrace(
        context, protocol, 100, "id-1", 110, 120, finished_ns=300, encoded_ns=310, model="m", wall_offset_ns=EPOCH
    )


def run(*members: RequestTrace, started_ns: int = 150, code: str = "ok") -> BatchTrace:
    batch = joined(*members, started_ns=started_ns)
    batch.assembled_ns, batch.computed_ns, batch.finished_ns = started_ns + 10, started_ns + 60, started_ns + 70
    batch.code = code
    return batch


def joined(*members: RequestTrace, started_ns: int = 150) -> BatchTrace:
    batch = BatchTrace("m", "1", 8, tuple(member.context for member in members), started_ns)
    for member in members:
        member.batches.append(batch)
    return batch


def build(*records: Record) -> list[ReadableSpan]:
    builder = SpanBuilder(Resource({}), lambda protocol, code: 200 if code == "ok" else 503)
    return [span for record in records for span in builder.spans(record)]


def named(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    (span,) = [span for span in spans if span.name == name]
    return span


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time - EPOCH, span.end_time - EPOCH


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def test_a_served_request_has_four_spans_at_the_recorded_times() -> None:
    record = request(1)
    run(record)
    spans = build(record)
    assert {span.name: times(span) for span in spans} == {
        "request": (100, 310),
        "queue": (120, 150),
        "compute": (160, 210),
        "batch": (150, 220),
    }
    assert [(event.name, event.timestamp - EPOCH) for event in named(spans, "request").events] == [
        ("decoded", 110),
        ("finished", 300),
    ]
    assert {span.name: span.kind for span in spans if span.kind is not SpanKind.INTERNAL} == {
        "request": SpanKind.SERVER
    }


def test_a_shared_batch_is_one_span_under_its_first_member_linked_to_all() -> None:
    one, two = request(1), request(2)
    batch = run(one, two)
    spans = build(two, one)  # the order in which they finish does not matter
    span = named(spans, "batch")
    assert span.context is not None
    assert span.parent is not None
    assert (span.context.trace_id, span.context.span_id, span.parent.span_id) == (1, batch.span_id, 10)
    assert [(link.context.trace_id, link.context.span_id) for link in span.links] == [(1, 10), (2, 20)]
    computes = [span for span in spans if span.name == "compute"]
    assert [compute.links[0].context for compute in computes] == [span.context, span.context]
    assert {compute.parent.span_id for compute in computes if compute.parent} == {10, 20}


def test_a_request_that_never_left_the_queue_has_no_batch() -> None:
    record = request(1)
    record.code = "queue_timeout"
    spans = build(record)
    assert [span.name for span in spans] == ["request", "queue"]
    assert times(named(spans, "queue")) == (120, 300)
    assert named(spans, "request").status.status_code is StatusCode.ERROR


def test_a_request_refused_before_the_queue_is_one_span() -> None:
    record = RequestTrace(
        TraceContext(1, 2), "http", 100, finished_ns=105, code="invalid_argument", wall_offset_ns=EPOCH
    )
    (span,) = build(record)
    assert (span.name, span.parent, times(span)) == ("request", None, (100, 105))
    assert attributes(span)["error.type"] == "invalid_argument"
    assert span.status.status_code is StatusCode.UNSET, "the caller's mistake is no error of the server's span"


def test_a_member_run_again_alone_shows_both_runs() -> None:
    bad, good = request(1), request(2)
    run(bad, good, code="runtime_failure")
    again = run(good, started_ns=230)
    spans = build(bad, good)
    batches = [span for span in spans if span.name == "batch"]
    assert [(times(span)[0], span.status.status_code, len(span.links)) for span in batches] == [
        (150, StatusCode.ERROR, 2),
        (230, StatusCode.UNSET, 1),
    ]
    of_good = [span for span in spans if span.name == "compute" and span.parent and span.parent.span_id == 20]
    assert [times(span) for span in of_good] == [(160, 210), (240, 290)]
    ids = [attributes(span).get("tidegate.batch.id") for span in spans if span.name == "request"]
    assert ids[1] == f"{again.span_id:016x}"


def test_a_batch_still_running_is_left_to_its_next_member() -> None:
    gone, served = request(1), request(2)
    batch = joined(gone, served)
    gone.code = "cancelled"
    assert [span.name for span in build(gone)] == ["request", "queue"]
    batch.assembled_ns, batch.computed_ns, batch.finished_ns = 160, 210, 220
    assert [span.name for span in build(served)] == ["request", "queue", "compute", "batch"]


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (
            "http",
            {
                "http.request.method": "POST",
                "http.route": "/v2/models/{model}/infer",
                "http.response.status_code": 200,
            },
        ),
        (
            "grpc",
            {
                "rpc.system": "grpc",
                "rpc.service": "inference.GRPCInferenceService",
                "rpc.method": "ModelInfer",
                "rpc.grpc.status_code": 200,
            },
        ),
    ],
)
def test_attributes_follow_the_conventions(protocol: str, expected: dict[str, object]) -> None:
    record = request(1, protocol)
    record.version, record.arm, record.rows = "3", "stable", 2
    batch = run(record)
    assert attributes(named(build(record), "request")) == expected | {
        "tidegate.model.name": "m",
        "tidegate.model.version": "3",
        "tidegate.arm": "stable",
        "tidegate.rows": 2,
        "tidegate.id": "id-1",
        "tidegate.batch.id": f"{batch.span_id:016x}",
        "tidegate.batch.rows": 8,
    }


def test_a_copy_at_a_shadow_is_a_marked_span_linked_to_the_primarys_request() -> None:
    primary = request(3)
    context = TraceContext(primary.context.trace_id, 77, primary.context.span_id)
    shadow = ShadowTrace(context, "m", "9", 400, 500, "id-1", 1, 420, 480, "runtime_failure", EPOCH)
    spans = build(primary, shadow)
    span, parent = named(spans, "shadow"), named(spans, "request")
    assert (span.context.trace_id, span.context.span_id) == (3, 77)
    assert span.parent is not None
    assert span.parent.span_id == parent.context.span_id
    (link,) = span.links
    assert link.context.span_id == parent.context.span_id
    assert times(span) == (400, 500)
    assert [(event.name, event.timestamp - EPOCH) for event in span.events] == [("started", 420), ("computed", 480)]
    assert attributes(span) == {
        "shadow": True,
        "tidegate.id": "id-1",
        "tidegate.rows": 1,
        "tidegate.model.name": "m",
        "tidegate.model.version": "9",
        "error.type": "runtime_failure",
    }
    assert span.status.status_code is StatusCode.ERROR
    assert "shadow" not in attributes(parent)
