"""Two plots as inline SVG: shares of bins beside each other, and a statistic over time with its thresholds.

Drawn in user units and scaled to the page. Every mark tells its values on hover by a ``<title>``. Colours come from
classes of the page's style; reference and now differ in lightness too, so that they can be told apart in print.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from server.pages.markup import Html, el, join
from server.pages.numbers import decimal, moment, number, percent, ticks, time_pattern, whole

#: Bins drawn at most: of more, those that differ most, and the others as one.
MOST_BINS: Final = 24
#: Points drawn at most per line; of points that share a place the highest is kept, so that no peak is lost.
MOST_POINTS: Final = 40
_WIDTH: Final = 400.0
_LABEL_CHARS: Final = 20


# --- shares of bins --------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Bin:
    label: str
    reference: float
    now: float


def bin_bars(found: Mapping[str, Any]) -> Html | None:
    """Horizontal bars, two a bin: ``bins`` (labels), ``reference`` and ``window`` (shares). None if empty."""
    bins = _fewer(
        [Bin(str(label), number(a), number(b)) for label, a, b in _rows(found, "bins", "reference", "window")]
    )
    if not bins:
        return None
    left, top, step = 132.0, 6.0, 19.0
    bottom = top + step * len(bins)
    most = max([share for b in bins for share in (b.reference, b.now) if math.isfinite(share)], default=0.0) or 1.0
    scale = (_WIDTH - left - 28) / most
    grid = [_vertical(left + tick * scale, top, bottom, percent(tick)) for tick in ticks(most)]
    bars = [_bar(b, left, top + i * step, scale) for i, b in enumerate(bins)]
    title = el("text", "share of rows in each bin", x=left, y=bottom + 29, class_="axis")
    return _figure("Shares of rows by bin, reference and now", bottom + 36, *grid, *bars, title)


def _rows(found: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """Equal places of several lists together, as far as the shortest goes."""
    return list(zip(*[found.get(key) or () for key in keys], strict=False))


def _fewer(bins: list[Bin]) -> list[Bin]:
    if len(bins) <= MOST_BINS:
        return bins
    ranked = sorted(range(len(bins)), key=lambda i: -_apart(bins[i]))
    kept, rest = sorted(ranked[: MOST_BINS - 1]), ranked[MOST_BINS - 1 :]
    other = Bin(
        f"{len(rest)} other bins", math.fsum(bins[i].reference for i in rest), math.fsum(bins[i].now for i in rest)
    )
    return [*[bins[i] for i in kept], other]


def _apart(found: Bin) -> float:
    difference = abs(found.now - found.reference)
    return difference if math.isfinite(difference) else 0.0


def _bar(found: Bin, left: float, y: float, scale: float) -> Html:
    told = el("title", f"{found.label}: reference {percent(found.reference)}, now {percent(found.now)}")
    label = found.label if len(found.label) <= _LABEL_CHARS else found.label[: _LABEL_CHARS - 1] + "…"
    return el(
        "g",
        told,
        el("text", label, x=left - 6, y=y + 12, class_="end"),
        _box(left, y + 2, found.reference * scale, 6, "reference"),
        _box(left, y + 8, found.now * scale, 7, "now"),
    )


def _box(x: float, y: float, width: float, height: float, class_: str) -> Html | None:
    if not (math.isfinite(width) and width > 0):
        return None
    return el("rect", x=x, y=y, width=max(width, 0.5), height=float(height), class_=class_)


def _vertical(x: float, top: float, bottom: float, label: str) -> Html:
    line = el("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")
    return join(line, el("text", label, x=x, y=bottom + 14, class_="middle"))


# --- a statistic over time -------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Point:
    t: int
    value: float
    threshold: float
    alarm: bool


@dataclass(slots=True, frozen=True)
class _Frame:
    """Where values go: ``left..right`` is the time, ``bottom..top`` the statistic from 0 to ``most``."""

    start: int
    span: int
    most: float
    left: float = 44.0
    right: float = _WIDTH - 12
    top: float = 8.0
    bottom: float = 132.0

    def x(self, t: int) -> float:
        return self.left + (self.right - self.left) * (t - self.start) / self.span

    def y(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * value / self.most


def over_time(found: Mapping[str, Any], statistic: str, floor: float = math.nan) -> Html | None:
    """A line of ``psi`` or ``ks``, its threshold, the effect floor, and spans in alarm shaded; None without points."""
    points = _points(found, statistic)
    most = _top(points, floor)
    if math.isnan(most):
        return None
    frame = _Frame(points[0].t, max(1, points[-1].t - points[0].t), most)
    name = statistic.upper()
    return _figure(
        f"{name} over time",
        166.0,
        *[_shade(frame, first, last) for first, last in _spans(points)],
        *[_horizontal(frame, tick) for tick in ticks(frame.most, 3)],
        *_time_ticks(frame),
        el("path", d=_path(frame, [(p.t, p.threshold) for p in points]), class_="threshold"),
        _floor(frame, floor),
        el("path", d=_path(frame, [(p.t, p.value) for p in points]), class_="line"),
        *[_hover(frame, points, i, name) for i in range(len(points))],
        el("text", f"{name}, time in UTC", x=frame.left, y=163.0, class_="axis"),
    )


def _top(points: list[Point], floor: float) -> float:
    """Where the axis ends, NaN without values. Thresholds of windows that were nearly empty may leave the picture."""
    values = [p.value for p in points if math.isfinite(p.value)]
    if not values:
        return math.nan
    limits = sorted([p.threshold for p in points if math.isfinite(p.threshold)])
    usual = limits[len(limits) // 2] if limits else 0.0
    return 1.08 * max([*values, usual, floor if math.isfinite(floor) else 0.0]) or 1.0


def _points(found: Mapping[str, Any], statistic: str) -> list[Point]:
    times, values = found.get("t") or (), found.get(statistic) or ()
    size = min(len(times), len(values))
    thresholds = _padded(found.get(f"{statistic}_threshold"), size)
    alarms = _padded(found.get("in_alarm"), size)
    rows = zip(times, values, thresholds, alarms, strict=False)
    points = [Point(whole(t), number(value), number(limit), bool(alarm)) for t, value, limit, alarm in rows]
    points.sort(key=lambda point: point.t)
    return _thinned(points)


def _padded(values: Sequence[Any] | None, size: int) -> list[Any]:
    given = list(values or ())[:size]
    return given + [None] * (size - len(given))


def _thinned(points: list[Point]) -> list[Point]:
    if len(points) <= MOST_POINTS:
        return points
    size = len(points) / MOST_POINTS
    groups = [points[int(i * size) : int((i + 1) * size)] for i in range(MOST_POINTS)]
    return [_highest(group) for group in groups]


def _highest(group: list[Point]) -> Point:
    top = max(group, key=lambda p: p.value if math.isfinite(p.value) else -1.0)
    return Point(top.t, top.value, top.threshold, any(p.alarm for p in group))


def _spans(points: list[Point]) -> list[tuple[int, int]]:
    """First and last time of each run of points in alarm."""
    spans: list[tuple[int, int]] = []
    before = False
    for point in points:
        if point.alarm:
            spans = [*spans[:-1], (spans[-1][0], point.t)] if before else [*spans, (point.t, point.t)]
        before = point.alarm
    return spans


def _shade(frame: _Frame, first: int, last: int) -> Html:
    left, right = frame.x(first) - 2, frame.x(last) + 2
    told = el("title", f"in alarm from {moment(first)} to {moment(last)}")
    height = frame.bottom - frame.top
    return el("rect", told, x=left, y=frame.top, width=right - left, height=height, class_="span")


def _horizontal(frame: _Frame, value: float) -> Html:
    y = frame.y(value)
    line = el("line", x1=frame.left, x2=frame.right, y1=y, y2=y, class_="grid")
    return join(line, el("text", f"{value:g}", x=frame.left - 5, y=y + 3.5, class_="end"))


def _time_ticks(frame: _Frame) -> list[Html]:
    pattern = time_pattern(frame.span)
    places = [(0.0, "start"), (0.5, "middle"), (1.0, "end")]
    return [
        el(
            "text",
            moment(frame.start + int(share * frame.span), pattern),
            x=frame.left + share * (frame.right - frame.left),
            y=frame.bottom + 14,
            class_=anchor,
        )
        for share, anchor in places
    ]


def _floor(frame: _Frame, floor: float) -> Html | None:
    if not math.isfinite(floor):
        return None
    y = frame.y(floor)
    told = el("title", f"effect floor {decimal(floor)}")
    return el("line", told, x1=frame.left, x2=frame.right, y1=y, y2=y, class_="floor")


def _path(frame: _Frame, values: Sequence[tuple[int, float]]) -> str:
    """A path with gaps where there is no value; a lone point is a short stroke."""
    parts: list[str] = []
    before = False
    for t, value in values:
        known = math.isfinite(value) and value <= frame.most
        if known:
            parts.append(f"{'L' if before else 'M'}{frame.x(t):.1f} {frame.y(value):.1f}{'' if before else 'h.1'}")
        before = known
    return "".join(parts)


def _hover(frame: _Frame, points: list[Point], i: int, name: str) -> Html:
    """An invisible strip around a point that tells its values."""
    x = frame.x(points[i].t)
    left = (frame.x(points[i - 1].t) + x) / 2 if i else frame.left
    right = (frame.x(points[i + 1].t) + x) / 2 if i + 1 < len(points) else frame.right
    limit = f", threshold {decimal(points[i].threshold)}" if math.isfinite(points[i].threshold) else ""
    told = el("title", f"{moment(points[i].t, '%m-%d %H:%M:%S')}: {name} {decimal(points[i].value)}{limit}")
    strip = f"M{left:.1f} {frame.top:g}H{max(right, left + 1):.1f}V{frame.bottom:g}H{left:.1f}"
    return el("path", told, d=strip, class_="hover")


def _figure(label: str, height: float, *marks: Html | None) -> Html:
    return el("svg", *marks, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", aria_label=label)
