"""The named metrics of the product, bound per model version, and the purity of what the gateway imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.telemetry.instruments import Telemetry
from server.telemetry.snapshot import HistogramValue, Points, Value
from server.telemetry.trace import RequestTrace, SpanSink, TraceContext, TraceGate

ROOT = Path(__file__).parents[3]


def points(telemetry: Telemetry, name: str) -> Points:
    return next(family.points for family in telemetry.metrics.snapshot() if family.name == name)


def count(value: Value) -> int:
    assert isinstance(value, HistogramValue)
    return value.count


def served() -> Telemetry:
    telemetry = Telemetry.create("0.1.0")
    model = telemetry.model("m", "1")
    model.batch_done(2, 1_000, 50_000, 2_000)
    model.request_done("stable", "http", "ok", 90_000, 20_000, 1_000, 50_000, 2_000, 1)
    model.request_done("canary", "grpc", "ok", 95_000, 0, 1_000, 50_000, 2_000, 1, TraceContext(5, 6))
    model.request_done("stable", "http", "queue_timeout", 70_000, 70_000, 0, 0, 0, 1)
    model.request_done("stable", "http", "invalid_argument", 7_000, 0, 0, 0, 0, 1)
    return telemetry


def test_one_call_per_request_feeds_statistics_and_histograms() -> None:
    telemetry = served()
    assert {key: count(value) for key, value in points(telemetry, "tidegate_request_duration_seconds").items()} == {
        ("m", "1", "stable", "http", "ok"): 1,
        ("m", "1", "canary", "grpc", "ok"): 1,
        ("m", "1", "stable", "http", "queue_timeout"): 1,
        ("m", "1", "stable", "http", "invalid_argument"): 1,
    }
    assert count(points(telemetry, "tidegate_queue_duration_seconds")["m", "1"]) == 3
    assert count(points(telemetry, "tidegate_compute_duration_seconds")["m", "1"]) == 1
    rows = points(telemetry, "tidegate_batch_rows")["m", "1"]
    assert isinstance(rows, HistogramValue)
    assert (rows.count, rows.total) == (1, 2)
    stats = telemetry.stats_for("m", "1")
    assert (stats.success_count, stats.fail_count, stats.execution_count) == (2, 2, 1)
    assert points(telemetry, "nv_inference_request_success")["m", "1"] == 2


def test_requests_are_counted_by_what_their_labels_say_whichever_objects_say_it() -> None:
    telemetry = Telemetry.create("0.1.0")
    model = telemetry.model("m", "1")
    for arm, protocol, code in (("stable", "http", "ok"), ("canary", "http", "ok"), ("canary", "grpc", "cancelled")):
        for _ in range(2):  # strings that are equal, and not the same
            own_arm, own_protocol, own_code = ("".join(list(one)) for one in (arm, protocol, code))
            model.request_done(arm, protocol, code, 90_000, 20_000, 1_000, 50_000, 2_000, 1)
            model.request_done(own_arm, own_protocol, own_code, 90_000, 20_000, 1_000, 50_000, 2_000, 1)
    model.request_done("", "", "", 1, 0, 0, 0, 0, 1)
    assert {key: count(value) for key, value in points(telemetry, "tidegate_request_duration_seconds").items()} == {
        ("m", "1", "stable", "http", "ok"): 4,
        ("m", "1", "canary", "http", "ok"): 4,
        ("m", "1", "canary", "grpc", "cancelled"): 4,
        ("m", "1", "", "", ""): 1,
    }


def test_a_sampled_request_leaves_an_exemplar() -> None:
    value = points(served(), "tidegate_request_duration_seconds")["m", "1", "canary", "grpc", "ok"]
    assert isinstance(value, HistogramValue)
    assert [(e.trace_id, e.span_id, e.value) for e in value.exemplars.values()] == [(5, 6, 95_000)]


@pytest.mark.parametrize(
    "name",
    [
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_count",
        "nv_inference_exec_count",
        "nv_inference_request_duration_us",
        "nv_inference_queue_duration_us",
        "nv_inference_compute_input_duration_us",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_compute_output_duration_us",
        "nv_inference_pending_request_count",
        "tidegate_request_duration_seconds",
        "tidegate_queue_duration_seconds",
        "tidegate_compute_duration_seconds",
        "tidegate_batch_rows",
        "tidegate_pending_requests",
        "tidegate_rejected_total",
        "tidegate_route_total",
        "tidegate_config_generation",
        "tidegate_build_info",
        "process_cpu_seconds_total",
    ],
)
@pytest.mark.parametrize("openmetrics", [False, True])
def test_every_public_name_is_on_the_page(name: str, openmetrics: bool) -> None:
    telemetry = served()
    telemetry.rejected("too_many_requests").inc()
    telemetry.instruments.route.labels("m", "1", "stable", "default").inc()
    telemetry.instruments.config_generation.labels("applied").set(1)
    page = telemetry.metrics.render(openmetrics=openmetrics).decode()
    assert any(line.startswith((f"{name}{{", f"{name} ", f"{name}_bucket{{")) for line in page.splitlines())


def test_a_model_is_bound_once_until_it_is_forgotten() -> None:
    telemetry = served()
    bound = telemetry.model("m", "1")
    assert telemetry.model("m", "1") is bound
    assert telemetry.all_stats() == [bound.stats]
    telemetry.forget("m", "1")
    assert 'model="m"' not in telemetry.metrics.render().decode()
    assert telemetry.model("m", "1").stats.success_count == 0


def test_the_queue_tells_how_many_wait() -> None:
    telemetry = Telemetry.create("0.1.0")
    waiting = ["a", "b"]
    telemetry.stats_for("m", "1").pending = lambda: len(waiting)
    assert 'tidegate_pending_requests{model="m",version="1"} 2\n' in telemetry.metrics.render().decode()
    waiting.clear()
    assert 'tidegate_pending_requests{model="m",version="1"} 0\n' in telemetry.metrics.render().decode()


def test_lost_traces_are_on_the_page() -> None:
    sink = SpanSink(capacity=1)
    telemetry = Telemetry.create("0.1.0", TraceGate(1.0), sink)
    for number in (1, 2, 3):
        sink.offer(RequestTrace(TraceContext(number, number), "http", number))
    assert len(sink.take(10)) == 1
    assert 'tidegate_trace_dropped_total{reason="full"} 2\n' in telemetry.metrics.render().decode()
    assert 'tidegate_trace_dropped_total{reason="full"} 0\n' in Telemetry.create("0.1.0").metrics.render().decode()


def test_what_the_gateway_imports_brings_no_framework() -> None:
    program = """
import sys
import server.telemetry.instruments
heavy = {"opentelemetry", "google", "structlog", "starlette", "uvicorn", "grpc", "pydantic", "onnxruntime"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")
