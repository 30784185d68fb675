"""The join of labels and the metrics of joined rows, done the slow, obvious way: dicts, loops and definitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple


class Predicted(NamedTuple):
    """Something that was answered at ``now_ns`` under these ids; one prediction per row."""

    ids: tuple[str, ...]
    group: tuple[str, str, str]
    values: tuple[float, ...]
    now_ns: int


class Labelled(NamedTuple):
    id: str
    row: int
    value: float
    now_ns: int


@dataclass
class Joins:
    """(group, prediction, label, predicted_ns, labelled_ns) per joined row, in order, and the counts."""

    rows: list[tuple[tuple[str, str, str], float, float, int, int]] = field(default_factory=list)
    duplicate: int = 0
    conflicting: int = 0
    late: int = 0
    unknown: int = 0
    repeated_ids: int = 0
    expired: int = 0
    held_dropped: int = 0


class NaiveJoin:
    """Everything that was ever said, in a list; what is still remembered is decided anew at every step."""

    def __init__(self, *, capacity: int, max_age: int, late: int, hold: int, hold_labels: int) -> None:
        self._capacity, self._max_age, self._late = capacity, max_age, late
        self._hold, self._hold_labels = hold, hold_labels
        self._known: list[tuple[Predicted, dict[int, float]]] = []
        self._held: list[Labelled] = []
        self.found = Joins()

    def run(self, events: Iterable[Predicted | Labelled], now_ns: int) -> Joins:
        for event in events:
            self._age(event.now_ns)
            if isinstance(event, Predicted):
                self._predict(event)
            else:
                self._label(event)
        self._age(now_ns)
        return self.found

    def _age(self, now_ns: int) -> None:
        while self._known and self._known[0][0].now_ns < now_ns - self._max_age:
            self._forget()
        while self._held and self._held[0].now_ns < now_ns - self._hold:
            self._held.pop(0)
            self.found.unknown += 1

    def _forget(self) -> None:
        event, labels = self._known.pop(0)
        self.found.expired += len(event.values) - len(labels)

    def _find(self, request_id: str) -> tuple[Predicted, dict[int, float]] | None:
        """The newest prediction of that id, unless it was forgotten."""
        return next((known for known in reversed(self._known) if request_id in known[0].ids), None)

    def _predict(self, event: Predicted) -> None:
        self.found.repeated_ids += sum(self._find(name) is not None for name in set(event.ids))
        while sum(len(known.values) for known, _ in self._known) + len(event.values) > self._capacity:
            before = self.found.repeated_ids
            names = set(event.ids)
            owned = [name for name in names if self._find(name) is self._known[0]]
            self._forget()
            self.found.repeated_ids = before - len(owned)
        self._known.append((event, {}))
        for label in [label for label in self._held if label.id in event.ids]:
            self._held.remove(label)
            self._label(label)

    def _label(self, label: Labelled) -> None:
        known = self._find(label.id)
        if known is None:
            if len(self._held) >= self._hold_labels:
                self.found.held_dropped += 1
                self.found.unknown += 1
                self._held.pop(0)
            self._held.append(label)
            return
        event, labels = known
        if not 0 <= label.row < len(event.values):
            self.found.unknown += 1
        elif label.row in labels:
            self.found.duplicate += labels[label.row] == label.value
            self.found.conflicting += labels[label.row] != label.value
        else:
            labels[label.row] = label.value
            self.found.late += label.now_ns - event.now_ns > self._late
            value = event.values[label.row]
            self.found.rows.append((event.group, value, label.value, event.now_ns, label.now_ns))


def exact_sum(values: Iterable[float]) -> Fraction:
    return sum((Fraction(value) for value in values), Fraction(0))


def auc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Of all pairs of one positive and one negative, the share in which the positive's score is higher."""
    wins = 0.0
    high = [s for s, p in zip(scores, positive, strict=True) if p]
    low = [s for s, p in zip(scores, positive, strict=True) if not p]
    for a in high:
        for b in low:
            wins += 1.0 if a > b else 0.5 if a == b else 0.0
    return wins / (len(high) * len(low)) if high and low else math.nan


def expected_auc(scores: Sequence[float], chances: Sequence[float]) -> float:
    """The same pairs, each weighted by the chance that it is one of a positive and a negative."""
    wins = total = 0.0
    for i, (a, p) in enumerate(zip(scores, chances, strict=True)):
        for j, (b, q) in enumerate(zip(scores, chances, strict=True)):
            if i != j:
                total += p * (1 - q)
                wins += p * (1 - q) * (1.0 if a > b else 0.5 if a == b else 0.0)
    return wins / total if total else math.nan


def delong_variance(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Variance of the AUC from the placements of each row among the other class, by definition."""
    high = [s for s, p in zip(scores, positive, strict=True) if p]
    low = [s for s, p in zip(scores, positive, strict=True) if not p]

    def placed(a: float, b: float) -> float:
        return 1.0 if a > b else 0.5 if a == b else 0.0

    ups = [sum(placed(a, b) for b in low) / len(low) for a in high]
    downs = [sum(placed(a, b) for a in high) / len(high) for b in low]
    return _variance(ups) / len(ups) + _variance(downs) / len(downs)


def _variance(values: Sequence[float]) -> float:
    center = sum(values) / len(values)
    return sum((value - center) ** 2 for value in values) / (len(values) - 1)


def ece(scores: Sequence[float], positive: Sequence[bool], bins: int) -> float:
    """Expected calibration error over bins of equal width."""
    held: dict[int, list[Any]] = {}
    for score, hit in zip(scores, positive, strict=True):
        held.setdefault(min(int(score * bins), bins - 1), []).append((score, hit))
    gaps = [abs(sum(h for _, h in rows) - sum(s for s, _ in rows)) for rows in held.values()]
    return sum(gaps) / len(scores)
