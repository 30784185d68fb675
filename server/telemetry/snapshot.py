"""What the metrics were at one moment: plain values that can be rendered, exported, pickled and merged by addition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

Number: TypeAlias = int | float
Kind: TypeAlias = Literal["counter", "gauge", "histogram"]
#: How several processes' values of one series become one. Counters and histograms always add.
Merge: TypeAlias = Literal["sum", "min", "max"]


@dataclass(slots=True, frozen=True)
class Exemplar:
    """One observation and the span it came from. ``value`` is in the raw unit, ``wall_s`` is Unix time."""

    trace_id: int
    span_id: int
    value: Number
    wall_s: float


@dataclass(slots=True, frozen=True)
class HistogramValue:
    """Counts per bucket (not cumulative, the last one above all bounds) and the sum, both in the raw unit.

    A bound is inclusive. What is published is the raw number divided by ``per_unit``: 10**9 for nanoseconds that are
    published as seconds. Raw integers keep merging exact.
    """

    bounds: tuple[int, ...]
    per_unit: int
    counts: tuple[int, ...]
    total: Number
    exemplars: dict[int, Exemplar] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: HistogramValue) -> HistogramValue:
        if (self.bounds, self.per_unit) != (other.bounds, other.per_unit):
            raise ValueError("histograms with different bounds cannot be added")
        return replace(
            self,
            counts=tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)),
            total=self.total + other.total,
            exemplars=self.exemplars | other.exemplars,
        )


Value: TypeAlias = Number | HistogramValue
#: Label values, in the order of the label names -> value.
Points: TypeAlias = dict[tuple[str, ...], Value]


@dataclass(slots=True, frozen=True)
class FamilySnapshot:
    """One metric name: its label names, and one value per combination of label values."""

    name: str
    help: str
    kind: Kind
    label_names: tuple[str, ...]
    points: Points
    merge: Merge = "sum"


Snapshot: TypeAlias = list[FamilySnapshot]


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """One snapshot of several processes: series with equal labels are added (gauges may ask for min or max)."""
    merged: dict[str, FamilySnapshot] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        known = merged.get(family.name)
        merged[family.name] = _combine(known, family) if known else family
    return list(merged.values())


def _combine(left: FamilySnapshot, right: FamilySnapshot) -> FamilySnapshot:
    if (left.kind, left.label_names) != (right.kind, right.label_names):
        raise ValueError(f"metric {left.name} has a different kind or labels in another process")
    points: Points = dict(left.points)
    for labels, value in right.points.items():
        points[labels] = _fold(left.merge, points[labels], value) if labels in points else value
    return replace(left, points=points)


def _fold(how: Merge, left: Value, right: Value) -> Value:
    if isinstance(left, HistogramValue) or isinstance(right, HistogramValue):
        if not (isinstance(left, HistogramValue) and isinstance(right, HistogramValue)):
            raise ValueError("a histogram cannot be merged with a number")
        return left + right
    if how == "sum":
        return left + right
    return min(left, right) if how == "min" else max(left, right)
