"""Drift reports as metric families of bounded size.

Of each version and arm at most ``top`` columns have series: those in alarm first, then those with the strongest
evidence in any window. The largest PSI and KS over *all* columns stand in families of their own (``..._max``), so that
what a bound leaves out cannot hide. The bound on series is versions x arms (8) x windows (8) x ``top`` for each family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Final

from monitor.types import ColumnScore, DriftReport, WindowReport
from server.telemetry.snapshot import FamilySnapshot, Points

_ARM: Final = ("model", "version", "arm")
_COLUMN: Final = (*_ARM, "feature", "window")

#: Family -> (what it says, which fields of a score are added up).
_FAMILIES: Final = {
    "tidegate_drift_psi": ("Population stability index of a window against the reference.", ("psi",)),
    "tidegate_drift_ks": ("Kolmogorov-Smirnov distance of a window from the reference, its lower bound.", ("ks_low",)),
    "tidegate_drift_ks_pvalue": ("p-value of that distance for independent rows.", ("ks_p",)),
    "tidegate_drift_missing_ratio": ("Share of missing values in a window.", ("missing",)),
    "tidegate_drift_out_of_range_ratio": ("Share of values outside the reference's range.", ("below", "above")),
    "tidegate_drift_new_category_ratio": ("Share of values that the reference does not have.", ("new_category",)),
}
_LARGEST: Final = {
    "tidegate_drift_psi_max": ("Largest PSI over all columns.", "psi"),
    "tidegate_drift_ks_max": ("Largest KS distance over all columns, a lower bound.", "ks_low"),
}
_ALARM: Final = "tidegate_drift_alarm"


@dataclass(slots=True, frozen=True)
class Watched:
    """A report and how many of its columns are to be shown."""

    report: DriftReport
    top: int


def drift_families(watched: Iterable[Watched]) -> tuple[FamilySnapshot, ...]:
    """All drift gauges of these reports; undefined statistics have no sample."""
    points: dict[str, Points] = {name: {} for name in (*_FAMILIES, *_LARGEST, _ALARM)}
    for one in watched:
        windows = sorted(one.report.windows, key=attrgetter("arm"))
        for arm, of_arm in groupby(windows, attrgetter("arm")):
            _fill(points, (one.report.model, one.report.version, arm), list(of_arm), one.top)
    found = [_family(name, text, _COLUMN, points[name]) for name, (text, _) in _FAMILIES.items()]
    found += [_family(name, text, (*_ARM, "window"), points[name]) for name, (text, _) in _LARGEST.items()]
    found.append(_family(_ALARM, "1 while a column is in alarm.", (*_ARM, "feature"), points[_ALARM]))
    return tuple(found)


def _family(name: str, text: str, labels: tuple[str, ...], points: Points) -> FamilySnapshot:
    return FamilySnapshot(name, text, "gauge", labels, points, "max")


def _fill(points: dict[str, Points], arm: tuple[str, str, str], windows: Sequence[WindowReport], top: int) -> None:
    alarmed = {name for window in windows for name in window.in_alarm}
    shown = _leading(windows, alarmed, top)
    for name in shown:
        points[_ALARM][(*arm, name)] = int(name in alarmed)
    for window in windows:
        for score in window.scores:
            if score.column in shown:
                _score(points, (*arm, score.column, window.window), score)
        for family, (_, field) in _LARGEST.items():
            values = [value for score in window.scores if not math.isnan(value := getattr(score, field))]
            if values:
                points[family][(*arm, window.window)] = max(values)


def _score(points: dict[str, Points], labels: tuple[str, ...], score: ColumnScore) -> None:
    for family, (_, fields) in _FAMILIES.items():
        value = sum([getattr(score, field) for field in fields])
        if not math.isnan(value):
            points[family][labels] = value


def _leading(windows: Sequence[WindowReport], alarmed: set[str], top: int) -> set[str]:
    """The columns that are shown."""
    evidence: dict[str, float] = {}
    for window in windows:
        for verdict in window.verdicts:
            evidence[verdict.column] = max(verdict.ratio, evidence.get(verdict.column, 0.0))
    ranked = sorted(evidence, key=lambda name: (name not in alarmed, -evidence[name], name))
    return set(ranked[:top])
