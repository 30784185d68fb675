"""The metrics page: Prometheus text 0.0.4 and OpenMetrics 1.0 from one snapshot, and the choice between the two.

A name is the same in both. OpenMetrics wants counters to end in ``_total``; Triton's ``nv_inference_*`` do not, and
renaming them would break every dashboard the moment a scraper asks for the newer format, so there they are declared
``unknown`` instead of ``counter``, which puts no demand on the name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from server.telemetry.snapshot import Exemplar, FamilySnapshot, HistogramValue, Number, Snapshot

TEXT_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def negotiate(accept: str) -> bool:
    """True when an ``Accept`` header prefers OpenMetrics to plain text."""
    openmetrics = plain = 0.0
    for entry in accept.split(","):
        media, _, parameters = entry.partition(";")
        match media.strip().lower():
            case "application/openmetrics-text":
                openmetrics = max(openmetrics, _quality(parameters))
            case "text/plain":
                plain = max(plain, _quality(parameters))
    return openmetrics > 0 and openmetrics >= plain


def _quality(parameters: str) -> float:
    for parameter in parameters.split(";"):
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def render(snapshot: Snapshot, *, openmetrics: bool) -> bytes:
    """The whole page, ending in a newline (OpenMetrics: in ``# EOF`` and a newline)."""
    lines: list[str] = []
    for family in snapshot:
        lines += _family(family, openmetrics)
    if openmetrics:
        lines.append("# EOF")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


def _family(family: FamilySnapshot, openmetrics: bool) -> Iterator[str]:
    name, kind = _declared(family, openmetrics)
    yield f"# HELP {name} {_escape_help(family.help, openmetrics)}"
    yield f"# TYPE {name} {kind}"
    for values, value in sorted(family.points.items(), key=lambda point: point[0]):
        labels = ",".join(f'{key}="{_escape(text)}"' for key, text in zip(family.label_names, values, strict=True))
        if isinstance(value, HistogramValue):
            yield from _histogram(family.name, labels, value, openmetrics)
        else:
            yield f"{family.name}{_braced(labels)} {_number(value)}"


def _declared(family: FamilySnapshot, openmetrics: bool) -> tuple[str, str]:
    if not openmetrics or family.kind != "counter":
        return family.name, family.kind
    base = family.name.removesuffix("_total")
    return (base, "counter") if base != family.name else (base, "unknown")


def _histogram(name: str, labels: str, value: HistogramValue, openmetrics: bool) -> Iterator[str]:
    prefix = f"{labels}," if labels else ""
    running = 0
    for index, count in enumerate(value.counts):
        running += count
        bound = _number(value.bounds[index] / value.per_unit) if index < len(value.bounds) else "+Inf"
        line = f'{name}_bucket{{{prefix}le="{bound}"}} {running}'
        exemplar = value.exemplars.get(index) if openmetrics else None
        yield line + _exemplar(exemplar, value.per_unit) if exemplar else line
    yield f"{name}_sum{_braced(labels)} {_number(value.total / value.per_unit)}"
    yield f"{name}_count{_braced(labels)} {running}"


def _exemplar(exemplar: Exemplar, per_unit: int) -> str:
    labels = f'trace_id="{exemplar.trace_id:032x}",span_id="{exemplar.span_id:016x}"'
    return f" # {{{labels}}} {_number(exemplar.value / per_unit)} {exemplar.wall_s:.3f}"


def _braced(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str, openmetrics: bool) -> str:
    if openmetrics:
        return _escape(text)
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: Number) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
    return repr(value)
