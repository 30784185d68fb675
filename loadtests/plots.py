"""A result as one HTML page without any other file: latency by percentile, and cost by column, for each row.

The horizontal axis of the first is that of HDR histograms: each step to the right has a tenth of the requests left, so
that the tail gets as much room as the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from loadtests import stats
from loadtests.crew import Sample
from loadtests.histogram import Histogram, highest
from loadtests.results import Result
from server.pages.markup import Html, el, join
from server.pages.numbers import decimal, ticks
from server.pages.shell import page

_WIDTH: Final = 400.0
_LEFT: Final = 132.0
_TOP: Final = 8.0
_BOTTOM: Final = 150.0
_PLOT_LEFT: Final = 52.0
_PERCENTILES: Final = (0.0, 90.0, 99.0, 99.9, 99.99)
#: Eight that stay apart under every common colour blindness (Okabe and Ito), and dashes for more.
_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#77818c", "#b8a800")
_RULES: Final = ".swatch{display:inline-block;width:12px;height:12px}" + "".join(
    f".c{i}{{stroke:{colour};fill:none;stroke-width:1.8}}.b{i}{{fill:{colour}}}" for i, colour in enumerate(_COLOURS)
)


def page_of(result: Result) -> str:
    """The whole document."""
    facts = [
        ("CPU", result.machine.get("cpu")),
        ("cores", result.machine.get("usable_cores")),
        ("kernel", result.machine.get("kernel")),
        ("Python", result.machine.get("python")),
        ("commit", result.machine.get("commit")),
        ("started", result.started_at),
        ("load average", f"{result.load_start:.2f} to {result.load_end:.2f}"),
    ]
    return page(
        f"Load test: {result.name}",
        el("h1", f"Load test: {result.name}"),
        el("dl", *[join(el("dt", name), el("dd", value)) for name, value in facts]),
        *[_row(name, columns) for name, columns in result.cells.items()],
        rules=_RULES,
    )


def _row(name: str, columns: Mapping[str, Sequence[Sample]]) -> Html:
    merged = {column: _merged(samples) for column, samples in columns.items()}
    costs = {column: stats.median(_finite(s.cpu_us for s in samples)) for column, samples in columns.items()}
    rates = {column: stats.median([s.rate for s in samples]) for column, samples in columns.items()}
    plots = [_curves(merged), _bars("us of server CPU a request", costs), _bars("good answers a second", rates)]
    key = [join(_swatch(place), column, " ") for place, column in enumerate(columns)]
    return el("section", el("h2", name), el("p", *key), el("div", *[p for p in plots if p], class_="plots"))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _merged(samples: Sequence[Sample]) -> Histogram:
    merged = Histogram()
    for sample in samples:
        merged.add(sample.latency)
    return merged


def _swatch(place: int) -> Html:
    box = el("rect", x=0.0, y=0.0, width=10.0, height=10.0, class_=f"b{place % len(_COLOURS)}")
    return el("svg", box, viewBox="0 0 10 10", width="12", height="12", role="img", aria_label="", class_="swatch")


# --- latency by percentile -------------------------------------------------------------------------------------------


def curve(histogram: Histogram) -> list[tuple[float, float]]:
    """(decades of requests left behind, ms): a point for each bucket, (0, least) first."""
    points, seen = [], 0
    for index, count in histogram.buckets():
        left = 1 - seen / histogram.count
        points.append((-math.log10(left), highest(index) / 1e6))
        seen += count
    if points:
        points.append((math.log10(histogram.count), histogram.greatest_ns / 1e6))
    return points


def _curves(merged: Mapping[str, Histogram]) -> Html | None:
    found = {column: curve(histogram) for column, histogram in merged.items() if histogram.count}
    if not found:
        return None
    most_x = max(points[-1][0] for points in found.values()) or 1.0
    values = [y for points in found.values() for _, y in points if y > 0]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(decades: float) -> float:
        return _PLOT_LEFT + (_WIDTH - 12 - _PLOT_LEFT) * decades / most_x

    def y(ms: float) -> float:
        place = (math.log10(max(ms, 10.0**low)) - low) / (high - low)
        return _BOTTOM - (_BOTTOM - _TOP) * place

    marks = [_level(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)]
    for percentile in _PERCENTILES:
        decades = -math.log10(1 - percentile / 100)
        if decades <= most_x:
            marks.append(_upright(x(decades), f"{percentile:g}%"))
    for place, (column, points) in enumerate(found.items()):
        path = "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in points)
        marks.append(el("path", el("title", column), d=path, class_=f"c{place % len(_COLOURS)}"))
    marks.append(el("text", "latency in ms by share of requests", x=_PLOT_LEFT, y=_BOTTOM + 29))
    return _figure("Latency by percentile", _BOTTOM + 36, marks)


def _level(y: float, label: str) -> Html:
    line = el("line", x1=_PLOT_LEFT, x2=_WIDTH - 12, y1=y, y2=y, class_="grid")
    return join(line, el("text", label, x=_PLOT_LEFT - 5, y=y + 3.5, class_="end"))


def _upright(x: float, label: str) -> Html:
    line = el("line", x1=x, x2=x, y1=_TOP, y2=_BOTTOM, class_="grid")
    return join(line, el("text", label, x=x, y=_BOTTOM + 14, class_="middle"))


# --- bars ------------------------------------------------------------------------------------------------------------


def _bars(label: str, values: Mapping[str, stats.Estimate]) -> Html | None:
    """A bar for each column, with the interval of its median as a line over its end."""
    known = {column: found for column, found in values.items() if math.isfinite(found.value)}
    most = max((found.high for found in known.values()), default=0.0)
    if most <= 0:
        return None
    scale, step = (_WIDTH - _LEFT - 28) / most, 19.0
    bottom = _TOP + step * len(values)
    marks = [_tick(_LEFT + tick * scale, bottom, decimal(tick)) for tick in ticks(most)]
    for place, column in enumerate(values):
        if column in known:
            marks.append(_bar(column, known[column], place, _TOP + step * place, scale))
    marks.append(el("text", label, x=_LEFT, y=bottom + 29))
    return _figure(label, bottom + 36, marks)


def _tick(x: float, bottom: float, label: str) -> Html:
    line = el("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid")
    return join(line, el("text", label, x=x, y=bottom + 14, class_="middle"))


def _bar(column: str, found: stats.Estimate, place: int, y: float, scale: float) -> Html:
    low, high = _LEFT + found.low * scale, _LEFT + found.high * scale
    return el(
        "g",
        el("title", f"{column}: {found.text(1)}"),
        el("text", column[:20], x=_LEFT - 6, y=y + 12, class_="end"),
        el(
            "rect",
            x=_LEFT,
            y=y + 3,
            width=max(found.value * scale, 0.5),
            height=11.0,
            class_=f"b{place % len(_COLOURS)}",
        ),
        el("line", x1=low, x2=high, y1=y + 8.5, y2=y + 8.5, class_="threshold"),
    )


def _figure(label: str, height: float, marks: Sequence[Html]) -> Html:
    return el("svg", *marks, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", aria_label=label)
