"""What monitors find as metric families of bounded size.

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

from monitor.types import WindowFigures
from server.telemetry.snapshot import FamilySnapshot, Points

_ARM: Final = ("model", "version", "arm")
_COLUMN: Final = (*_ARM, "feature", "window")

#: Family -> (what it says, which figures are added up).
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
    """The figures of a version, and how many of its columns are to be shown."""

    model: str
    version: str
    windows: Sequence[WindowFigures]
    top: int


def drift_families(watched: Iterable[Watched]) -> tuple[FamilySnapshot, ...]:
    """All drift gauges of these versions; undefined statistics have no sample."""
    points: dict[str, Points] = {name: {} for name in (*_FAMILIES, *_LARGEST, _ALARM)}
    for one in watched:
        windows = sorted(one.windows, key=attrgetter("arm"))
        for arm, of_arm in groupby(windows, attrgetter("arm")):
            _fill(points, (one.model, one.version, arm), list(of_arm), one.top)
    found = [_family(name, text, _COLUMN, points[name]) for name, (text, _) in _FAMILIES.items()]
    found += [_family(name, text, (*_ARM, "window"), points[name]) for name, (text, _) in _LARGEST.items()]
    found.append(_family(_ALARM, "1 while a column is in alarm.", (*_ARM, "feature"), points[_ALARM]))
    return tuple(found)


def _family(name: str, text: str, labels: tuple[str, ...], points: Points) -> FamilySnapshot:
    return FamilySnapshot(name, text, "gauge", labels, points, "max")


def _fill(points: dict[str, Points], arm: tuple[str, str, str], windows: Sequence[WindowFigures], top: int) -> None:
    alarmed = {name for window in windows for name in window.in_alarm}
    shown = _leading(windows, alarmed, top)
    for name in shown:
        points[_ALARM][(*arm, name)] = int(name in alarmed)
    for window in windows:
        for family, (_, fields) in _FAMILIES.items():
            for name, value in _defined(window, fields):
                if name in shown:
                    points[family][(*arm, name, window.window)] = value
        for family, (_, field) in _LARGEST.items():
            values = [value for _, value in _defined(window, (field,))]
            if values:
                points[family][(*arm, window.window)] = max(values)


def _defined(window: WindowFigures, fields: Sequence[str]) -> list[tuple[str, float]]:
    """(column, sum of the fields) where that is defined."""
    values: list[float] = sum([getattr(window, field) for field in fields]).tolist()
    return [(name, value) for name, value in zip(window.columns, values, strict=True) if not math.isnan(value)]


def _leading(windows: Sequence[WindowFigures], alarmed: set[str], top: int) -> set[str]:
    """The columns that are shown."""
    evidence: dict[str, float] = {}
    for window in windows:
        for name, found in zip(window.columns, window.evidence.tolist(), strict=True):
            evidence[name] = max(found, evidence.get(name, 0.0))
    ranked = sorted(evidence, key=lambda name: (name not in alarmed, -evidence[name], name))
    return set(ranked[:top])
