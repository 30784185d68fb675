"""A metrics snapshot as OpenTelemetry metrics, under the same names as on the metrics page.

Counters become cumulative monotonic sums, gauges gauges, histograms explicit-bucket histograms with their exemplars.
"""

from __future__ import annotations

from typing import Final, cast

from opentelemetry.sdk.metrics import Exemplar as OtelExemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from server.telemetry.snapshot import Exemplar, FamilySnapshot, HistogramValue, Number, Snapshot

_SCOPE: Final = InstrumentationScope("tidegate")
_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE
#: The wire format leaves minimum and maximum out when there is none; the SDK's class types them as always there.
_ABSENT: Final = cast("float", None)


def metrics_data(snapshot: Snapshot, resource: Resource, start_ns: int, now_ns: int) -> MetricsData:
    """The whole snapshot; counted from ``start_ns`` to ``now_ns``, both Unix time."""
    metrics = [_metric(family, start_ns, now_ns) for family in snapshot if family.points]
    scope = ScopeMetrics(_SCOPE, metrics, schema_url="")
    return MetricsData([ResourceMetrics(resource, [scope], schema_url="")])


def _metric(family: FamilySnapshot, start_ns: int, now_ns: int) -> Metric:
    numbers: list[NumberDataPoint] = []
    histograms: list[HistogramDataPoint] = []
    for values, value in family.points.items():
        attributes = dict(zip(family.label_names, values, strict=True))
        if isinstance(value, HistogramValue):
            histograms.append(_histogram(attributes, value, start_ns, now_ns))
        else:
            numbers.append(NumberDataPoint(attributes, start_ns, now_ns, value))
    return Metric(family.name, family.help, "", _data(family, numbers, histograms))


def _data(
    family: FamilySnapshot, numbers: list[NumberDataPoint], histograms: list[HistogramDataPoint]
) -> Sum | Gauge | Histogram:
    if family.kind == "histogram":
        return Histogram(histograms, _CUMULATIVE)
    return Sum(numbers, _CUMULATIVE, is_monotonic=True) if family.kind == "counter" else Gauge(numbers)


def _histogram(attributes: dict[str, str], value: HistogramValue, start_ns: int, now_ns: int) -> HistogramDataPoint:
    return HistogramDataPoint(
        attributes,
        start_ns,
        now_ns,
        count=value.count,
        sum=value.total / value.per_unit,
        bucket_counts=value.counts,
        explicit_bounds=[bound / value.per_unit for bound in value.bounds],
        min=_ABSENT,
        max=_ABSENT,
        exemplars=[_exemplar(exemplar, value.per_unit) for exemplar in value.exemplars.values()],
    )


def _exemplar(exemplar: Exemplar, per_unit: int) -> OtelExemplar:
    published: Number = exemplar.value / per_unit
    return OtelExemplar({}, published, int(exemplar.wall_s * 1e9), exemplar.span_id, exemplar.trace_id)
