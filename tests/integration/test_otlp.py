"""OTLP export against a real receiver: a small HTTP server that decodes what arrives by OpenTelemetry's own schema."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AGGREGATION_TEMPORALITY_CUMULATIVE, Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server.errors import ConfigError
from server.telemetry.instruments import Telemetry
from server.telemetry.log import configure
from server.telemetry.otel import OtlpExport, OtlpOptions
from server.telemetry.trace import BatchTrace, RequestTrace, SpanSink, TraceContext, TraceGate
from tests.support.otlp import Receiver

CALLER_ONE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CALLER_TWO = "00-1bf7651916cd43dd8448eb211c80319c-c8ad6b7169203331-01"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def no_thread_outlives_its_test() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("otlp-"):
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    running = Receiver()
    yield running
    running.close()


def options(url: str, **changes: object) -> OtlpOptions:
    settings: dict[str, object] = {"spans_interval_s": 0.02, "metrics_interval_s": 0.02, "service_version": "9.9"}
    return OtlpOptions(url, **(settings | changes))  # type: ignore[arg-type]


def start(gate: TraceGate, headers: dict[str, str]) -> TraceContext | None:
    return gate.start(headers.get("traceparent", "").encode(), headers)


def begin(gate: TraceGate, traceparent: str | None, tracestate: str | None = None) -> RequestTrace:
    headers = {"traceparent": traceparent, "tracestate": tracestate}
    context = start(gate, {name: value for name, value in headers.items() if value is not None})
    assert context is not None
    now = time.monotonic_ns()
    return RequestTrace(context, "grpc", now, "tg-1", now + 10, now + 20, model="m", version="1", arm="stable", rows=1)


def serve(sink: SpanSink, *members: RequestTrace) -> None:
    """What the gateway and the batcher write for one batch of these sampled members and some unsampled ones."""
    now = time.monotonic_ns()
    contexts = tuple(member.context for member in members)
    batch = BatchTrace("m", "1", 8, contexts, now, now + 1_000, now + 51_000, now + 52_000)
    for member in members:
        member.batches.append(batch)
        member.finished_ns, member.encoded_ns = now + 60_000, now + 61_000
        sink.offer(member)


def plain(values: object) -> dict[str, object]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in values}  # type: ignore[attr-defined]


def test_spans_arrive_with_the_callers_trace_the_right_parents_and_links(receiver: Receiver) -> None:
    gate, sink = TraceGate(1.0), SpanSink()
    before_wall_ns = time.time_ns()
    one, two, root = begin(gate, CALLER_ONE, "vendor=x"), begin(gate, CALLER_TWO), begin(gate, None)
    started_wall_ns = time.time_ns()
    export = OtlpExport(options(receiver.url), sink=sink, status_of=lambda protocol, code: 0)
    export.start()
    serve(sink, one, two, root)
    assert export.close()

    spans = receiver.spans()
    assert sorted(span.name for span in spans) == ["batch"] + ["compute"] * 3 + ["queue"] * 3 + ["request"] * 3
    assert len({span.span_id for span in spans}) == len(spans)
    requests = {span.trace_id.hex(): span for span in spans if span.name == "request"}
    for member, caller in ((one, CALLER_ONE), (two, CALLER_TWO)):
        request = requests[caller[3:35]]
        assert request.parent_span_id.hex() == caller[36:52]
        assert request.span_id.hex() == member.context.header()[36:52], "traceresponse names this span"
        assert request.kind == Span.SPAN_KIND_SERVER
        assert request.status.code == Status.STATUS_CODE_UNSET
        # Of two clocks that the system may have slewed against each other since.
        assert before_wall_ns - 10**8 < request.start_time_unix_nano < started_wall_ns + 10**8
        assert plain(request.attributes)["rpc.grpc.status_code"] == 0
    assert requests[f"{root.context.trace_id:032x}"].parent_span_id == b""
    assert requests[CALLER_ONE[3:35]].trace_state == "vendor=x"

    (batch,) = [span for span in spans if span.name == "batch"]
    assert batch.parent_span_id.hex() == f"{one.context.span_id:016x}"
    assert [(link.trace_id.hex(), link.span_id.hex()) for link in batch.links] == [
        (f"{m.context.trace_id:032x}", f"{m.context.span_id:016x}") for m in (one, two, root)
    ]
    assert plain(batch.attributes)["tidegate.batch.rows"] == 8
    for span in (span for span in spans if span.name in ("queue", "compute")):
        request = requests[span.trace_id.hex()]
        assert span.parent_span_id == request.span_id
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
        if span.name == "compute":
            assert [link.span_id for link in span.links] == [batch.span_id]
            assert span.end_time_unix_nano - span.start_time_unix_nano == 50_000


def test_spans_leave_while_the_server_runs(receiver: Receiver) -> None:
    sink = SpanSink()
    export = OtlpExport(options(receiver.url), sink=sink)
    export.start()
    try:
        with receiver.arrived:
            serve(sink, begin(TraceGate(1.0), CALLER_ONE))
            assert receiver.arrived.wait_for(lambda: len(receiver.spans()) == 4, timeout=30)
    finally:
        assert export.close()


def test_resource_headers_and_paths(receiver: Receiver) -> None:
    sink = SpanSink()
    settings = options(
        receiver.url + "/", headers={"authorization": "Bearer t"}, service_name="scores", resource={"team": "ml"}
    )
    export = OtlpExport(settings, sink=sink)
    export.start()
    serve(sink, begin(TraceGate(1.0), None))
    assert export.close()
    assert [(h["path"], h["authorization"], h["content-type"]) for h in receiver.headers] == [
        ("/v1/traces", "Bearer t", "application/x-protobuf")
    ]
    attributes = plain(receiver.traces[0].resource_spans[0].resource.attributes)
    assert (attributes["service.name"], attributes["service.version"], attributes["team"]) == ("scores", "9.9", "ml")
    assert attributes["service.instance.id"]


def test_many_records_leave_in_several_requests(receiver: Receiver) -> None:
    sink, gate = SpanSink(), TraceGate(1.0)
    for _ in range(600):
        serve(sink, begin(gate, None))
    export = OtlpExport(options(receiver.url), sink=sink)
    export.start()
    assert export.close()
    assert len(receiver.traces) == 3
    assert len(receiver.spans()) == 4 * 600
    assert (sink.dropped, sink.undelivered, len(sink)) == (0, 0, 0)


def test_nothing_is_exported_for_what_is_not_sampled(receiver: Receiver) -> None:
    gate, sink = TraceGate(0.0), SpanSink()
    assert start(gate, {}) is None
    assert start(gate, {"traceparent": CALLER_ONE[:-1] + "0"}) is None
    export = OtlpExport(options(receiver.url), sink=sink)
    export.start()
    assert export.close()
    assert receiver.headers == []


# --- Metrics -----------------------------------------------------------------------------------------------------


def measured() -> Telemetry:
    telemetry = Telemetry.create("9.9")
    model = telemetry.model("m", "1")
    model.batch_done(2, 1_000, 50_000, 2_000)
    model.request_done("stable", "http", "ok", 90_000, 20_000, 1_000, 50_000, 2_000, 1)
    model.request_done("stable", "http", "ok", 3_000_000, 20_000, 1_000, 50_000, 2_000, 1, TraceContext(0xAB, 0xCD))
    telemetry.stats_for("m", "1").pending = lambda: 4
    return telemetry


def metric(receiver: Receiver, name: str) -> Metric:
    (found,) = [
        metric
        for resource in receiver.metrics[-1].resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
    ]
    return found


def test_metrics_arrive_under_the_same_names_and_with_the_same_numbers(receiver: Receiver) -> None:
    telemetry = measured()
    export = OtlpExport(options(receiver.url), registry=telemetry.metrics)
    export.start()
    assert export.close()

    success = metric(receiver, "nv_inference_request_success").sum
    assert (success.is_monotonic, success.aggregation_temporality) == (True, AGGREGATION_TEMPORALITY_CUMULATIVE)
    assert plain(success.data_points[0].attributes) == {"model": "m", "version": "1"}
    assert success.data_points[0].as_int == 2
    assert success.data_points[0].start_time_unix_nano == telemetry.metrics.started_wall_ns
    assert metric(receiver, "tidegate_pending_requests").gauge.data_points[0].as_int == 4

    (point,) = metric(receiver, "tidegate_request_duration_seconds").histogram.data_points
    assert plain(point.attributes) == {
        "model": "m",
        "version": "1",
        "arm": "stable",
        "protocol": "http",
        "code": "ok",
    }
    assert point.count == 2
    assert point.sum == pytest.approx(0.00309)
    assert not point.HasField("min")
    assert not point.HasField("max")
    filled = {point.explicit_bounds[index]: count for index, count in enumerate(point.bucket_counts[:-1]) if count}
    assert filled == {0.0001: 1, 0.005: 1}
    assert [(e.trace_id.hex(), e.span_id.hex(), e.as_double) for e in point.exemplars] == [
        (f"{0xAB:032x}", f"{0xCD:016x}", 0.003)
    ]


def test_both_signals_leave_and_a_closing_export_sends_the_last_numbers(receiver: Receiver) -> None:
    telemetry, sink = measured(), SpanSink()
    export = OtlpExport(options(receiver.url, metrics_interval_s=3600), sink=sink, registry=telemetry.metrics)
    export.start()
    serve(sink, begin(TraceGate(1.0), None))
    telemetry.rejected("draining").inc(3)
    assert export.close()
    assert {headers["path"] for headers in receiver.headers} == {"/v1/traces", "/v1/metrics"}
    assert metric(receiver, "tidegate_rejected_total").sum.data_points[0].as_int == 3


# --- Receivers that do not do their part ---------------------------------------------------------------------------


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Callable[[], list[dict[str, object]]]]:
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    configure("json", "debug", fd)
    yield lambda: [json.loads(line) for line in path.read_text().splitlines() if '"logger":"urllib3' not in line]
    os.close(fd)


def offered_quickly(sink: SpanSink, count: int) -> float:
    """Offer ``count`` records; the longest time one offer took, in seconds."""
    gate = TraceGate(1.0)
    worst = 0.0
    for _ in range(count):
        record = begin(gate, None)
        before = time.perf_counter()
        sink.offer(record)
        worst = max(worst, time.perf_counter() - before)
    return worst


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that stays ours and refuses: bound, not listening."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_receiver_that_is_down_costs_records_and_one_log_line(
    refusing: int, logged: Callable[[], list[dict[str, object]]]
) -> None:
    sink = SpanSink(capacity=500)
    export = OtlpExport(options(f"http://127.0.0.1:{refusing}", timeout_s=0.05), sink=sink)
    export.start()
    until, took = time.monotonic() + 60, [offered_quickly(sink, 2_000)]
    while sink.dropped < 1_000:  # offers do not wait for exports: however fast those fail, they are overtaken
        assert time.monotonic() < until
        took.append(offered_quickly(sink, 2_000))
    assert min(took) < 0.5, "the longest offer of a round: the machine may stop one, waiting would be in each"
    before = time.monotonic()
    assert not export.close(timeout_s=5)
    assert time.monotonic() - before < 4
    assert sink.undelivered > 0
    (line,) = logged()
    assert (line["event"], line["level"], line["signal"]) == ("otlp_export_failed", "warning", "traces")
    assert "spans" in str(line["reason"])


def test_a_receiver_that_never_answers_does_not_hold_up_shutdown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        sink = SpanSink(capacity=50)
        export = OtlpExport(options(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=30), sink=sink)
        export.start()
        serve(sink, begin(TraceGate(1.0), None))
        silent.settimeout(10)
        peer, _ = silent.accept()  # the exporter is now waiting for an answer that does not come
        with peer:
            assert offered_quickly(sink, 200) < 5
            assert sink.dropped == 150
            before = time.monotonic()
            assert not export.close(timeout_s=0.5)
            assert time.monotonic() - before < 10


def test_a_receiver_that_refuses_and_then_takes_is_told_as_resumed(
    logged: Callable[[], list[dict[str, object]]],
) -> None:
    answers = [400, 400, 200]
    receiver = Receiver(lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    sink = SpanSink()
    export = OtlpExport(options(receiver.url), sink=sink)
    export.start()
    try:
        with receiver.arrived:
            deadline = time.monotonic() + 30
            while not receiver.traces and time.monotonic() < deadline:
                serve(sink, begin(TraceGate(1.0), None))
                receiver.arrived.wait(0.05)
        assert export.close()
    finally:
        receiver.close()
    assert receiver.traces
    assert sink.undelivered > 0
    assert [line["event"] for line in logged()] == ["otlp_export_failed", "otlp_export_resumed"]


# --- Set-up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", ["", "collector:4318", "ftp://collector", "http://", "http://[", "http://a:port"])
def test_a_malformed_endpoint_is_a_configuration_error(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="OTLP endpoint"):
        OtlpExport(OtlpOptions(endpoint), sink=SpanSink())


def test_a_missing_extra_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for signal in ("trace", "metric"):
        monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.http.{signal}_exporter", None)
    with pytest.raises(ConfigError, match=r"tidegate\[otlp\]"):
        OtlpExport(OtlpOptions("http://127.0.0.1:4318"), sink=SpanSink())
    with pytest.raises(ConfigError, match=r"tidegate\[otlp\]"):
        OtlpExport(OtlpOptions("http://127.0.0.1:4318"), registry=Telemetry.create("0").metrics)
