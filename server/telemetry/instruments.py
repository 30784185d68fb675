"""Tidegate's own metrics by name, bound per model version, and the one object the gateway is handed.

Everything here is plain Python: the gateway and the batcher import it, and no tracing or web library comes with it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.telemetry import process_metrics
from server.telemetry.metrics import DURATION_BOUNDS_NS, ROWS_BOUNDS, Counter, Family, Histogram, MetricsRegistry
from server.telemetry.snapshot import FamilySnapshot
from server.telemetry.stats import ModelStats, nv_families
from server.telemetry.trace import SpanSink, TraceContext, TraceGate

_NS = 10**9
_MODEL = ("model", "version")


class Instruments:
    """The metric families of ``surface``; one per registry."""

    def __init__(self, registry: MetricsRegistry, version: str) -> None:
        self.request = registry.histogram(
            "tidegate_request_duration_seconds",
            "Whole time of a request, by outcome (code: ok or the error's code).",
            (*_MODEL, "arm", "protocol", "code"),
            DURATION_BOUNDS_NS,
            _NS,
        )
        self.queue = registry.histogram(
            "tidegate_queue_duration_seconds", "Time a request waited for its batch.", _MODEL, DURATION_BOUNDS_NS, _NS
        )
        self.compute = registry.histogram(
            "tidegate_compute_duration_seconds", "Time of one run of the engine.", _MODEL, DURATION_BOUNDS_NS, _NS
        )
        self.batch_rows = registry.histogram("tidegate_batch_rows", "Rows in one batch.", _MODEL, ROWS_BOUNDS)
        self.rejected = registry.counter(
            "tidegate_rejected_total",
            "Requests refused before they were routed (reason: the error's code).",
            ("reason",),
        )
        self.route = registry.counter("tidegate_route_total", "Routing decisions.", (*_MODEL, "arm", "reason"))
        self.config_generation = registry.gauge(
            "tidegate_config_generation", "Configuration generation (kind: applied or seen).", ("kind",), merge="min"
        )
        build = registry.gauge("tidegate_build_info", "What is running; always 1.", ("version", "python"), merge="max")
        build.labels(version, platform.python_version()).set(1)


class ModelTelemetry:
    """Everything one model version counts, bound once: get it at load time, keep it, call it per request and batch."""

    __slots__ = ("_batch_rows", "_compute", "_queue", "_request", "_requests", "stats")

    def __init__(self, stats: ModelStats, instruments: Instruments) -> None:
        labels = (stats.model, stats.version)
        self.stats = stats
        self._queue = instruments.queue.labels(*labels)
        self._compute = instruments.compute.labels(*labels)
        self._batch_rows = instruments.batch_rows.labels(*labels)
        self._request: Family[Histogram] = instruments.request
        self._requests: dict[tuple[str, str, str], Histogram] = {}

    def request_done(
        self,
        arm: str,
        protocol: str,
        code: str,
        total_ns: int,
        queue_ns: int,
        compute_input_ns: int,
        compute_infer_ns: int,
        compute_output_ns: int,
        rows: int,
        trace: TraceContext | None = None,
    ) -> None:
        """Count one finished request. ``code`` is "ok" or the error's code; stage times are 0 where not reached."""
        key = (arm, protocol, code)
        histogram = self._requests.get(key) or self._bind(key)
        if trace is None:
            histogram.observe(total_ns)
        else:
            histogram.observe_traced(total_ns, trace.trace_id, trace.span_id)
        if queue_ns or code == "ok":
            self._queue.observe(queue_ns)
        self.stats.request_done(
            code == "ok", total_ns, queue_ns, compute_input_ns, compute_infer_ns, compute_output_ns, rows, code
        )

    def batch_done(self, rows: int, input_ns: int, infer_ns: int, output_ns: int) -> None:
        """Count one run of the engine."""
        self.stats.batch_done(rows, input_ns, infer_ns, output_ns)
        self._batch_rows.observe(rows)
        self._compute.observe(infer_ns)

    def _bind(self, key: tuple[str, str, str]) -> Histogram:
        arm, protocol, code = key
        histogram = self._request.labels(self.stats.model, self.stats.version, arm, protocol, code)
        self._requests[key] = histogram
        return histogram


@dataclass(slots=True)
class Telemetry:
    """What the gateway is given. ``gate`` None: nothing is traced; then ``sink`` is None too."""

    metrics: MetricsRegistry
    instruments: Instruments
    gate: TraceGate | None = None
    sink: SpanSink | None = None
    _models: dict[tuple[str, str], ModelTelemetry] = field(default_factory=dict)

    @classmethod
    def create(cls, version: str, gate: TraceGate | None = None, sink: SpanSink | None = None) -> Telemetry:
        """A registry with every family of ours, the process's own numbers and the statistics behind ``nv_*``."""
        registry = MetricsRegistry()
        telemetry = cls(registry, Instruments(registry, version), gate, sink)
        registry.collect(telemetry._statistics)
        registry.collect(process_metrics.collect)
        return telemetry

    def model(self, model: str, version: str) -> ModelTelemetry:
        """The counters of one loaded version; the same object for the same names until it is forgotten."""
        key = (model, version)
        bound = self._models.get(key)
        if bound is None:
            bound = self._models[key] = ModelTelemetry(ModelStats(model, version), self.instruments)
        return bound

    def stats_for(self, model: str, version: str) -> ModelStats:
        return self.model(model, version).stats

    def all_stats(self) -> list[ModelStats]:
        """Statistics of every version that is counted, by name and version."""
        return [bound.stats for _, bound in sorted(self._models.items(), key=lambda item: item[0])]

    def rejected(self, reason: str) -> Counter:
        """The counter of requests refused for one reason (an error's code)."""
        return self.instruments.rejected.labels(reason)

    def forget(self, model: str, version: str) -> None:
        """Drop every series of a version that is gone."""
        self._models.pop((model, version), None)
        self.metrics.forget(model=model, version=version)

    def _statistics(self) -> Iterator[FamilySnapshot]:
        yield from nv_families(self.all_stats())
        lost = (0, 0) if self.sink is None else (self.sink.dropped, self.sink.undelivered)
        yield FamilySnapshot(
            "tidegate_trace_dropped_total",
            "Sampled requests that reached no receiver (reason: full or export).",
            "counter",
            ("reason",),
            {("full",): lost[0], ("export",): lost[1]},
        )
