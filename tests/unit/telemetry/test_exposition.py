"""The metrics page: both formats exactly, escapes, and an independent parser's reading of it."""

from __future__ import annotations

import pytest

from server.telemetry.exposition import negotiate, render
from server.telemetry.metrics import MetricsRegistry
from server.telemetry.snapshot import Exemplar, FamilySnapshot, HistogramValue, Snapshot

HISTOGRAM = HistogramValue(
    (1_000_000, 2_500_000), 10**9, (2, 0, 1), 5_000_000, {0: Exemplar(0xABC, 0xDEF, 900_000, 1700000000.25)}
)


def page() -> Snapshot:
    return [
        FamilySnapshot("jobs_total", "Jobs\nso far.", "counter", ("k",), {("b",): 2, ("a",): 1}),
        FamilySnapshot("nv_inference_count", "Rows.", "counter", (), {(): 3}),
        FamilySnapshot("load", "Load.", "gauge", (), {(): 0.5}),
        FamilySnapshot("took_seconds", "Took.", "histogram", ("m",), {("x",): HISTOGRAM}),
    ]


TEXT = """\
# HELP jobs_total Jobs\\nso far.
# TYPE jobs_total counter
jobs_total{k="a"} 1
jobs_total{k="b"} 2
# HELP nv_inference_count Rows.
# TYPE nv_inference_count counter
nv_inference_count 3
# HELP load Load.
# TYPE load gauge
load 0.5
# HELP took_seconds Took.
# TYPE took_seconds histogram
took_seconds_bucket{m="x",le="0.001"} 2
took_seconds_bucket{m="x",le="0.0025"} 2
took_seconds_bucket{m="x",le="+Inf"} 3
took_seconds_sum{m="x"} 0.005
took_seconds_count{m="x"} 3
"""

EXEMPLAR = f'# {{trace_id="{"0" * 29}abc",span_id="{"0" * 13}def"}} 0.0009 1700000000.250'


def test_prometheus_text() -> None:
    assert render(page(), openmetrics=False).decode() == TEXT


def test_openmetrics() -> None:
    expected = (
        TEXT.replace("HELP jobs_total", "HELP jobs")
        .replace("TYPE jobs_total", "TYPE jobs")
        .replace("TYPE nv_inference_count counter", "TYPE nv_inference_count unknown")
        .replace('le="0.001"} 2', f'le="0.001"}} 2 {EXEMPLAR}')
    )
    assert render(page(), openmetrics=True).decode() == expected + "# EOF\n"


def test_labels_and_help_are_escaped() -> None:
    nasty = 'a"b\\c\nd'
    family = FamilySnapshot("x", 'say "hi"\\\n', "gauge", ("k",), {(nasty,): 1})
    assert render([family], openmetrics=False).decode() == (
        '# HELP x say "hi"\\\\\\n\n# TYPE x gauge\nx{k="a\\"b\\\\c\\nd"} 1\n'
    )
    assert '# HELP x say \\"hi\\"\\\\\\n\n' in render([family], openmetrics=True).decode()


def test_a_name_that_is_not_unicode_does_not_break_the_page() -> None:
    family = FamilySnapshot("x", "", "gauge", ("model",), {("caf\udce9",): 1})
    assert b'x{model="caf?"} 1\n' in render([family], openmetrics=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [(float("inf"), "+Inf"), (float("-inf"), "-Inf"), (float("nan"), "NaN"), (10**30, "1" + "0" * 30), (1e-5, "1e-05")],
)
def test_unusual_numbers(value: float, text: str) -> None:
    family = FamilySnapshot("x", "", "gauge", (), {(): value})
    assert render([family], openmetrics=False).decode().splitlines()[-1] == f"x {text}"


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain", False),
        ("text/html, application/xhtml+xml, */*;q=0.8", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1", True),
        ("Application/OpenMetrics-Text; version=1.0.0; q=0.6, text/plain; q=0.5", True),
        ("application/openmetrics-text;q=0.4,text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much", False),
    ],
)
def test_the_format_is_negotiated(accept: str, openmetrics: bool) -> None:
    assert negotiate(accept) is openmetrics


def registry_with_everything() -> MetricsRegistry:
    registry = MetricsRegistry()
    registry.counter("jobs_total", "Jobs.", ("k",)).labels('q"\\\n').inc(2)
    registry.counter("nv_inference_count", "Rows.").labels().inc(3)
    registry.gauge("load", 'The "load".').labels().set(0.25)
    histogram = registry.histogram("took_seconds", "Took.", ("m",), (1_000, 10_000), 10**9).labels("x")
    histogram.observe_traced(900, 1, 2)
    histogram.observe(20_000)
    return registry


@pytest.mark.parametrize("openmetrics", [False, True])
def test_an_independent_parser_reads_the_same_numbers(openmetrics: bool) -> None:
    pytest.importorskip("prometheus_client", reason="the parser used as oracle is not installed")
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as strict
    from prometheus_client.parser import text_string_to_metric_families as plain

    text = registry_with_everything().render(openmetrics=openmetrics).decode()
    samples = [sample for family in (strict if openmetrics else plain)(text) for sample in family.samples]
    values = {(sample.name, tuple(sample.labels.items())): sample.value for sample in samples}
    # That library's reader of the older format adds the suffix to every counter.
    rows = "nv_inference_count" if openmetrics else "nv_inference_count_total"
    assert values == {
        ("jobs_total", (("k", 'q"\\\n'),)): 2,
        (rows, ()): 3,
        ("load", ()): 0.25,
        ("took_seconds_bucket", (("m", "x"), ("le", "1e-06"))): 1,
        ("took_seconds_bucket", (("m", "x"), ("le", "1e-05"))): 1,
        ("took_seconds_bucket", (("m", "x"), ("le", "+Inf"))): 2,
        ("took_seconds_sum", (("m", "x"),)): 20_900 / 1e9,
        ("took_seconds_count", (("m", "x"),)): 2,
    }
    exemplars = [sample.exemplar.labels for sample in samples if sample.exemplar]
    assert exemplars == ([{"trace_id": f"{1:032x}", "span_id": f"{2:016x}"}] if openmetrics else [])
