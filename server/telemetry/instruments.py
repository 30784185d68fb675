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


class ShadowInstruments:
    """The families of shadow versions, which appear in no other. ``model``, ``version``: the shadow's own."""

    def __init__(self, registry: MetricsRegistry) -> None:
        self.requests = registry.counter("tidegate_shadow_requests_total", "Requests sent to a shadow.", _MODEL)
        self.pairs = registry.counter("tidegate_shadow_pairs_total", "Answers compared with the primary's.", _MODEL)
        self.dropped = registry.counter(
            "tidegate_shadow_dropped_total",
            "Sampled requests that were not compared (reason: queue, rps, body, load, timeout, no_model, "
            "primary_failed or breaker).",
            (*_MODEL, "reason"),
        )
        self.errors = registry.counter(
            "tidegate_shadow_errors_total", "Requests that a shadow failed (code: the error's code).", (*_MODEL, "code")
        )
        self.disagreements = registry.counter(
            "tidegate_shadow_disagreements_total",
            "Pairs that disagree (kind: missing, datatype, shape, tolerance or argmax).",
            (*_MODEL, "kind"),
        )
        self.nonfinite = registry.counter(
            "tidegate_shadow_nonfinite_total", "Elements that only one of a pair has as NaN or infinite.", _MODEL
        )
        self.max_abs_diff = registry.gauge(
            "tidegate_shadow_max_abs_diff", "Largest finite difference to the primary's outputs.", _MODEL, merge="max"
        )
        self.latency_ratio = registry.gauge(
            "tidegate_shadow_latency_ratio",
            "Mean compute time divided by the primary's, at equal batch sizes.",
            _MODEL,
            merge="max",
        )


class ShadowTelemetry:
    """What one shadow version counts, bound once."""

    __slots__ = ("_dropped", "_errors", "_instruments", "_labels", "_max_abs_diff", "_pairs", "_requests")

    def __init__(self, instruments: ShadowInstruments, model: str, version: str) -> None:
        self._instruments = instruments
        self._labels = (model, version)
        self._requests = instruments.requests.labels(model, version)
        self._pairs = instruments.pairs.labels(model, version)
        self._max_abs_diff = instruments.max_abs_diff.labels(model, version)
        self._dropped: dict[str, Counter] = {}
        self._errors: dict[str, Counter] = {}

    def sent(self) -> None:
        self._requests.inc()

    def dropped(self, reason: str, count: int = 1) -> None:
        """Requests that are not compared, by one of our own reasons."""
        counter = self._dropped.get(reason)
        if counter is None:
            counter = self._dropped[reason] = self._instruments.dropped.labels(*self._labels, reason)
        counter.inc(count)

    def failed(self, code: str) -> None:
        """One error of the shadow, by its code."""
        counter = self._errors.get(code)
        if counter is None:
            counter = self._errors[code] = self._instruments.errors.labels(*self._labels, code)
        counter.inc()

    def compared(self, kinds: tuple[str, ...], max_abs: float, nonfinite: int, latency_ratio: float | None) -> None:
        """One pair, with every way in which it disagrees. ``latency_ratio``: that of all pairs so far."""
        self._pairs.inc()
        for kind in kinds:
            self._instruments.disagreements.labels(*self._labels, kind).inc()
        if nonfinite:
            self._instruments.nonfinite.labels(*self._labels).inc(nonfinite)
        if max_abs > self._max_abs_diff.value:
            self._max_abs_diff.set(max_abs)
        if latency_ratio is not None:
            self._instruments.latency_ratio.labels(*self._labels).set(latency_ratio)

    def read(self) -> dict[str, object]:
        """The counts so far: sent, dropped by reason, errors by code."""
        return {
            "sent": self._requests.value,
            "dropped": {reason: counter.value for reason, counter in tuple(self._dropped.items())},
            "errors": {code: counter.value for code, counter in tuple(self._errors.items())},
        }


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
        self.attempts = registry.counter(
            "tidegate_attempts_total",
            "Attempts by how they ended, before any retry or fallback (code: ok or the error's code).",
            (*_MODEL, "arm", "code"),
        )
        self.drain_cancelled = registry.counter(
            "tidegate_drain_cancelled_total",
            "Requests that held a replaced version to the end of the drain, and were cancelled then.",
            ("model",),
        )
        self.config_generation = registry.gauge(
            "tidegate_config_generation", "Configuration generation (kind: applied or seen).", ("kind",), merge="min"
        )
        self.shadow = ShadowInstruments(registry)
        build = registry.gauge("tidegate_build_info", "What is running; always 1.", ("version", "python"), merge="max")
        build.labels(version, platform.python_version()).set(1)


class _Requests:
    """Requests that are counted as the same, and how long they took."""

    __slots__ = ("arm", "code", "durations", "protocol")

    def __init__(self, arm: str, protocol: str, code: str, durations: Histogram) -> None:
        self.arm = arm
        self.protocol = protocol
        self.code = code
        self.durations = durations


class ModelTelemetry:
    """Everything one model version counts, bound once: get it at load time, keep it, call it per request and batch."""

    __slots__ = ("_batch_rows", "_compute", "_last", "_queue", "_request", "_requests", "stats")

    def __init__(self, stats: ModelStats, instruments: Instruments) -> None:
        labels = (stats.model, stats.version)
        self.stats = stats
        self._queue = instruments.queue.labels(*labels)
        self._compute = instruments.compute.labels(*labels)
        self._batch_rows = instruments.batch_rows.labels(*labels)
        self._request: Family[Histogram] = instruments.request
        self._requests: dict[tuple[str, str, str], Histogram] = {}
        #: What was counted last: most often the next request is counted as the same.
        self._last: _Requests | None = None

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
        last = self._last
        if last is None or last.arm is not arm or last.protocol is not protocol or last.code is not code:
            last = self._last = _Requests(arm, protocol, code, self._find((arm, protocol, code)))
        histogram = last.durations
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

    def _find(self, key: tuple[str, str, str]) -> Histogram:
        histogram = self._requests.get(key)
        if histogram is None:
            histogram = self._requests[key] = self._request.labels(self.stats.model, self.stats.version, *key)
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

    def shadow(self, model: str, version: str) -> ShadowTelemetry:
        """The counters of one version as a shadow; its requests are in none of the other counts."""
        return ShadowTelemetry(self.instruments.shadow, model, version)

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
