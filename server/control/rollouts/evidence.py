"""From what was counted since the last look to the evidence of each gate, in the form that its kind takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from router.rollout.evidence import OneArm, TwoArms
from router.rollout.gates import Evidence, Level, Means
from router.rollout.spec import GateSpec, LevelGate, MeanGate, MismatchGate, RateGate, RatioGate, RolloutSpec
from router.sequential import Moments
from server.gateway.rollouts import EVENTS, Taken

#: The drift of a version now: (model, version, statistic) -> its highest score over all columns, None when unknown.
Levels: TypeAlias = Callable[[str, str, str], float | None]


@dataclass(slots=True)
class PairCounts:
    """How many shadow pairs were told of already, by what was counted."""

    seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    def news(self, source: str, report: Mapping[str, Any]) -> OneArm:
        """The pairs since the last call; a comparison that began anew is taken from its beginning."""
        units, total = _pairs(source, report)
        before = self.seen.get(source, (0, 0))
        if before[0] > units or before[1] > total:
            before = (0, 0)
        self.seen[source] = (units, total)
        return OneArm(units - before[0], min(float(total - before[1]), float(units - before[0])))


def _pairs(source: str, report: Mapping[str, Any]) -> tuple[int, int]:
    """(units, how many disagree): pairs, or the rows whose largest element is compared."""
    if source == "disagree":
        return int(report["pairs"]), int(report["disagreeing"])
    outputs = report["outputs"].values()
    rows = sum(int(output["argmax_rows"]) for output in outputs)
    return rows, rows - sum(int(output["argmax_agreeing"]) for output in outputs)


@dataclass(slots=True)
class Look:
    """One look at everything that is known. ``comparison``: the shadow's report, while there is a shadow."""

    spec: RolloutSpec
    model: str
    taken: Taken
    levels: Levels
    pairs: PairCounts
    comparison: Mapping[str, Any] | None = None

    def evidence(self) -> dict[str, Evidence]:
        """By gate; gates that nothing new is known for are left out."""
        return {name: found for name, gate in self.spec.gates for found in self._of(gate)}

    def _of(self, gate: GateSpec) -> Iterator[Evidence]:
        match gate:
            case RatioGate():
                yield from self._ratio(gate.source)
            case RateGate(paired=True):
                if self.comparison is not None:
                    yield self.pairs.news(gate.source, self.comparison)
            case RateGate():
                yield self._alone(gate.source)
            case MeanGate():
                yield self._means(gate.source)
            case LevelGate():
                value = self.levels(self.model, self.spec.candidate, gate.source)
                if value is not None:
                    yield Level(value)
            case MismatchGate():
                yield self.taken.keys

    def _ratio(self, source: str) -> Iterator[Evidence]:
        if source in EVENTS:
            if rows := self.taken.rows[source]:
                yield rows
            return
        ours, theirs = self._outcomes(source, True), self._outcomes(source, False)
        if ours or theirs:
            yield TwoArms(len(ours), _events(ours), len(theirs), _events(theirs))

    def _alone(self, source: str) -> OneArm:
        if source in EVENTS:
            return self.taken.alone[source]
        ours = self._outcomes(source, True)
        return OneArm(len(ours), float(_events(ours)))

    def _means(self, source: str) -> Means:
        moments = Moments(), Moments()
        for arm, is_candidate in zip(moments, (True, False), strict=True):
            for value in self._outcomes(source, is_candidate):
                arm.add(value)
        return Means(*moments)

    def _outcomes(self, name: str, is_candidate: bool) -> list[float]:
        return [value for ours, named, value in self.taken.outcomes if ours is is_candidate and named == name]


def _events(values: list[float]) -> int:
    """Binary outcomes that are so."""
    return sum(value > 0 for value in values)
