"""Counters, gauges and histograms cheap enough for the hot path, and the registry that publishes them.

A *family* is one metric name with its label names; a *child* is one combination of label values. Bind a child once
(``family.labels(...)``) and keep it: ``inc`` and ``observe`` are then a few attribute operations without any look-up.

Cardinality is bounded by construction: label values come from loaded models and from enumerations of our own (arm,
protocol, error code, reason), never from text that a client sent. ``forget`` drops a model that is gone.

Threads: a child is written by one thread, the loop that owns it. Any thread may read, and sees each number as it was
a moment ago. Several loops or processes have a registry each; their snapshots are merged (``snapshot.merge``).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from server.telemetry import exposition
from server.telemetry.snapshot import (
    Exemplar,
    FamilySnapshot,
    HistogramValue,
    Kind,
    Merge,
    Number,
    Points,
    Snapshot,
    Value,
)

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")

#: Upper bounds for request, queue and compute times in ns: 10 us to 30 s, about 2.2x apart.
DURATION_BOUNDS_NS: Final = (
    *(step * 10**power for power in range(3, 9) for step in (10, 25, 50)),
    10 * 10**9,
    30 * 10**9,
)
#: Upper bounds for rows per batch: powers of two.
ROWS_BOUNDS: Final = tuple(1 << power for power in range(11))

#: Yields whole families when a snapshot is taken: values that live elsewhere and are only read then.
Collector: TypeAlias = Callable[[], Iterable[FamilySnapshot]]


class Counter:
    """A whole number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        self.value += amount

    def read(self) -> Value:
        return self.value


class Gauge:
    """A number that goes up and down."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Number = 0

    def set(self, value: Number) -> None:
        self.value = value

    def inc(self, amount: Number = 1) -> None:
        self.value += amount

    def dec(self, amount: Number = 1) -> None:
        self.value -= amount

    def read(self) -> Value:
        return self.value


class Histogram:
    """Counts per bucket and a sum. Values are whole numbers in the raw unit (ns, rows) and stay exact."""

    __slots__ = ("_above", "_bounds", "_counts", "_exemplars", "_last", "_per_unit", "_total", "_up_to")

    def __init__(self, bounds: tuple[int, ...], per_unit: int) -> None:
        self._bounds = bounds
        self._per_unit = per_unit
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0
        #: By bucket: the fields of its exemplar.
        self._exemplars: dict[int, tuple[int, int, int, float]] = {}
        #: The bucket of the newest value, which is most often the next one's too, and its bounds.
        self._last = 0
        self._above = self._up_to = 0

    def observe(self, value: int) -> None:
        if not self._above < value <= self._up_to:
            self._seek(value)
        counts, last = self._counts, self._last
        counts[last] = counts[last] + 1  # for ``+=`` the compiled program would make an object of the 1
        self._total += value

    def _seek(self, value: int) -> None:
        """Find the bucket of a value. That of the largest values, and of 0, are looked for each time."""
        last = self._last = _bucket(self._bounds, value)
        self._above = self._bounds[last - 1] if last else 0
        self._up_to = self._bounds[last] if last < len(self._bounds) else 0

    def observe_traced(self, value: int, trace_id: int, span_id: int) -> None:
        """``observe`` and keep the observation as its bucket's exemplar. For sampled requests."""
        self.observe(value)
        self._exemplars[_bucket(self._bounds, value)] = (trace_id, span_id, value, time.time())

    def read(self) -> Value:
        exemplars = {bucket: Exemplar(*fields) for bucket, fields in tuple(self._exemplars.items())}
        return HistogramValue(self._bounds, self._per_unit, tuple(self._counts), self._total, exemplars)


def _bucket(bounds: tuple[int, ...], value: int) -> int:
    """The first bucket whose upper bound is not below ``value``; ``bisect_left``, as steps that compile well."""
    low, high = 0, len(bounds)
    while low < high:
        middle = (low + high) >> 1
        if bounds[middle] < value:
            low = middle + 1
        else:
            high = middle
    return low


class _Child(Protocol):
    def read(self) -> Value: ...


Child = TypeVar("Child", bound=_Child)


class Family(Generic[Child]):
    """One metric name and its children."""

    def __init__(
        self,
        name: str,
        help_text: str,
        kind: Kind,
        label_names: tuple[str, ...],
        make: Callable[[], Child],
        merge: Merge,
    ) -> None:
        self.name = name
        self._help = help_text
        self._kind = kind
        self._label_names = label_names
        self._make = make
        self._merge = merge
        self._children: dict[tuple[str, ...], Child] = {}

    def labels(self, *values: str) -> Child:
        """The child for these label values, in the order of the label names; made on first use."""
        child = self._children.get(values)
        if child is None:
            if len(values) != len(self._label_names):
                raise ValueError(f"{self.name} has labels {self._label_names}, got {len(values)} values")
            child = self._children[values] = self._make()
        return child

    def forget(self, labels: dict[str, str]) -> None:
        """Drop every child that carries all of these labels."""
        if not labels.keys() <= set(self._label_names):
            return
        wanted = [(self._label_names.index(name), value) for name, value in labels.items()]
        for values in tuple(self._children):
            if all(values[index] == value for index, value in wanted):
                del self._children[values]

    def snapshot(self) -> FamilySnapshot:
        # tuple() of a dict's items runs no Python code, so a child added by another thread cannot interrupt it.
        points: Points = {values: child.read() for values, child in tuple(self._children.items())}
        return FamilySnapshot(self.name, self._help, self._kind, self._label_names, points, self._merge)


class MetricsRegistry:
    """All families of one process. A wrong or repeated name is a mistake in our code: ValueError."""

    def __init__(self) -> None:
        #: Unix time from which every counter here counts.
        self.started_wall_ns: Final = time.time_ns()
        self._families: dict[str, Family[Counter] | Family[Gauge] | Family[Histogram]] = {}
        self._collectors: list[Collector] = []

    def counter(self, name: str, help_text: str, labels: tuple[str, ...] = ()) -> Family[Counter]:
        family = Family(name, help_text, "counter", labels, Counter, "sum")
        self._add(family, labels)
        return family

    def gauge(self, name: str, help_text: str, labels: tuple[str, ...] = (), merge: Merge = "sum") -> Family[Gauge]:
        family = Family(name, help_text, "gauge", labels, Gauge, merge)
        self._add(family, labels)
        return family

    def histogram(
        self, name: str, help_text: str, labels: tuple[str, ...], bounds: tuple[int, ...], per_unit: int = 1
    ) -> Family[Histogram]:
        """``bounds`` ascend, in the raw unit; what is published is the raw number divided by ``per_unit``."""
        if not bounds or list(bounds) != sorted(set(bounds)):
            raise ValueError(f"{name}: bounds must ascend strictly and not be empty, got {bounds}")
        family = Family(name, help_text, "histogram", labels, lambda: Histogram(bounds, per_unit), "sum")
        self._add(family, labels)
        return family

    def collect(self, collector: Collector) -> None:
        """Ask ``collector`` for whole families whenever a snapshot is taken: pull-style values."""
        self._collectors.append(collector)

    def forget(self, **labels: str) -> None:
        """Drop every series that carries all of these labels, as ``forget(model="m", version="3")`` after an unload."""
        for family in self._families.values():
            family.forget(labels)

    def snapshot(self) -> Snapshot:
        own = [family.snapshot() for family in tuple(self._families.values())]
        return own + [family for collector in self._collectors for family in collector()]

    def render(self, *, openmetrics: bool = False) -> bytes:
        """The metrics page of this process."""
        return exposition.render(self.snapshot(), openmetrics=openmetrics)

    def _add(self, family: Family[Counter] | Family[Gauge] | Family[Histogram], labels: tuple[str, ...]) -> None:
        if not _NAME.fullmatch(family.name) or family.name in self._families:
            raise ValueError(f"metric name {family.name!r} is malformed or taken")
        if not all(_LABEL.fullmatch(label) and label != "le" for label in labels):
            raise ValueError(f"metric {family.name} has a malformed or reserved label in {labels}")
        self._families[family.name] = family
