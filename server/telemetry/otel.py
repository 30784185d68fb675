"""OpenTelemetry export: finished trace records and metric snapshots go out as OTLP/HTTP, off the hot path.

``otel``, ``otel_spans`` and ``otel_metrics`` are the only importers of opentelemetry. Two daemon threads, one per
signal, wake at an interval, convert what is there and hand it to the exporter of the extra ``[otlp]``. A receiver
that is down, slow or wrong costs a log line a minute and, once the sink is full, dropped and counted records; never a
request.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol
from urllib.parse import urlsplit

from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from server.errors import ConfigError
from server.telemetry.log import get_logger
from server.telemetry.metrics import MetricsRegistry
from server.telemetry.otel_metrics import metrics_data
from server.telemetry.otel_spans import SpanBuilder, StatusOf
from server.telemetry.trace import SpanSink

log = get_logger(__name__)

#: Records turned into spans and sent at once; bounds the time this thread holds the interpreter.
_CHUNK: Final = 256
_LOG_EVERY_S: Final = 60.0
#: What closing waits for a receiver that has not been answering.
_HOPELESS_S: Final = 1.0


@dataclass(slots=True, frozen=True)
class OtlpOptions:
    """Where telemetry goes. ``endpoint`` is the receiver's base URL: ``/v1/traces`` and ``/v1/metrics`` are added."""

    endpoint: str
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 10.0
    spans_interval_s: float = 1.0
    metrics_interval_s: float = 30.0
    service_name: str = "tidegate"
    service_version: str = ""
    #: More resource attributes, as ``deployment.environment.name``.
    resource: Mapping[str, str] = field(default_factory=dict)


class OtlpExport:
    """Sends traces and metrics until closed. ``sink`` or ``registry`` None: that signal is not exported.

    Start it in the process that serves, after any fork. Raises ConfigError for a malformed endpoint, or when the
    extra is not installed.
    """

    def __init__(
        self,
        options: OtlpOptions,
        *,
        sink: SpanSink | None = None,
        registry: MetricsRegistry | None = None,
        status_of: StatusOf | None = None,
    ) -> None:
        base = _base_url(options.endpoint)
        resource = _resource(options)
        self._chatter = _ExporterLog()
        self._workers: list[_Worker] = []
        if sink is not None:
            spans = _SpanSender(_span_exporter(base, options), sink, SpanBuilder(resource, status_of))
            self._workers.append(_Worker("traces", spans, options.spans_interval_s, self._chatter))
        if registry is not None:
            metrics = _MetricSender(_metric_exporter(base, options), registry, resource)
            self._workers.append(_Worker("metrics", metrics, options.metrics_interval_s, self._chatter))

    def start(self) -> None:
        self._chatter.install()
        for worker in self._workers:
            worker.start()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Send what is left and stop, within ``timeout_s``; True when everything was taken in time.

        A receiver that failed last time is given one second only. Close what was started, once.
        """
        deadline = time.monotonic() + timeout_s
        for worker in self._workers:
            worker.stop()
        ended = [worker.join(deadline) for worker in self._workers]
        if all(ended):
            self._chatter.remove()
        return all(ended) and not any(worker.failing for worker in self._workers)


# --- Threads and failures ----------------------------------------------------------------------------------------


class _Sender(Protocol):
    """One signal. ``send`` blocks and tells whether the receiver took everything, None when there was nothing to send;
    ``shutdown`` cuts a retry short.
    """

    def send(self) -> bool | None: ...

    def shutdown(self) -> None: ...


class _Worker:
    """Calls a sender at an interval, and once more at the end, on a daemon thread of its own."""

    def __init__(self, signal: str, sender: _Sender, interval_s: float, chatter: _ExporterLog) -> None:
        self._signal = signal
        self._sender = sender
        self._interval_s = interval_s
        self._chatter = chatter
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"otlp-{signal}", daemon=True)
        self._failures = 0
        self._told = False
        self._told_at = -math.inf

    @property
    def failing(self) -> bool:
        return self._failures > 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def join(self, deadline: float) -> bool:
        """Wait for the last sending, then give it up; True when the thread has ended."""
        left_s = deadline - time.monotonic()
        self._wait(min(left_s, _HOPELESS_S) if self.failing else left_s)
        self._sender.shutdown()
        self._wait(min(deadline - time.monotonic(), _HOPELESS_S))
        return not self._thread.is_alive()

    def _wait(self, seconds: float) -> None:
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self._send()
        self._send()

    def _send(self) -> None:
        try:
            taken = self._sender.send()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: told below, at most once a minute
            self._chatter.last = f"{type(error).__name__}: {error}"
            taken = False
        if taken:
            self._recovered()
        elif taken is not None:
            self._failed()

    def _failed(self) -> None:
        self._failures += 1
        if time.monotonic() - self._told_at >= _LOG_EVERY_S:
            self._told, self._told_at = True, time.monotonic()
            log.warning("otlp_export_failed", signal=self._signal, failures=self._failures, reason=self._chatter.last)

    def _recovered(self) -> None:
        if self._told:
            log.info("otlp_export_resumed", signal=self._signal, failures=self._failures)
        self._told, self._failures = False, 0


class _ExporterLog(logging.Handler):
    """Takes the exporter library's own log lines (one per attempt at a dead receiver) and keeps the last."""

    def __init__(self) -> None:
        super().__init__()
        self.last = ""
        self._logger = logging.getLogger("opentelemetry.exporter")

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()

    def install(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def remove(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True


class _SpanSender:
    def __init__(self, exporter: SpanExporter, sink: SpanSink, builder: SpanBuilder) -> None:
        self._exporter = exporter
        self._sink = sink
        self._builder = builder
        self.shutdown = exporter.shutdown

    def send(self) -> bool | None:
        """Send what is in the sink now. A chunk that fails is lost; the rest stays in the sink for the next time."""
        if not len(self._sink):
            return None
        for _ in range(-(-len(self._sink) // _CHUNK)):
            records = self._sink.take(_CHUNK)
            spans = [span for record in records for span in self._builder.spans(record)]
            if self._exporter.export(spans) is not SpanExportResult.SUCCESS:
                self._sink.undelivered += len(records)
                return False
        return True


class _MetricSender:
    def __init__(self, exporter: MetricExporter, registry: MetricsRegistry, resource: Resource) -> None:
        self._exporter = exporter
        self._registry = registry
        self._resource = resource

    def send(self) -> bool:
        data = metrics_data(self._registry.snapshot(), self._resource, self._registry.started_wall_ns, time.time_ns())
        return self._exporter.export(data) is MetricExportResult.SUCCESS

    def shutdown(self) -> None:
        self._exporter.shutdown()


# --- Set-up ------------------------------------------------------------------------------------------------------


def _base_url(endpoint: str) -> str:
    try:
        url = urlsplit(endpoint)
        well_formed = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:
        well_formed = False
    if not well_formed:
        raise ConfigError(f"the OTLP endpoint must be a URL such as http://collector:4318, got {endpoint!r}")
    return endpoint.rstrip("/")


def _resource(options: OtlpOptions) -> Resource:
    own = {
        "service.name": options.service_name,
        "service.version": options.service_version,
        "service.instance.id": str(uuid.uuid4()),
    }
    return Resource.create({**{key: value for key, value in own.items() if value}, **options.resource})


def _span_exporter(base: str, options: OtlpOptions) -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise _extra_missing() from error
    return OTLPSpanExporter(f"{base}/v1/traces", headers=dict(options.headers), timeout=options.timeout_s)


def _metric_exporter(base: str, options: OtlpOptions) -> MetricExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    except ImportError as error:
        raise _extra_missing() from error
    return OTLPMetricExporter(f"{base}/v1/metrics", headers=dict(options.headers), timeout=options.timeout_s)


def _extra_missing() -> ConfigError:
    return ConfigError("OTLP export is configured but its package is not installed: pip install 'tidegate[otlp]'")
