"""From what was counted since the last look to the evidence of each gate, in the form that its kind takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from router.rollout.evidence import OneArm
from router.rollout.gates import Evidence, Level
from router.rollout.spec import EVENTS, GateSpec, LevelGate, MeanGate, MismatchGate, RateGate, RatioGate, RolloutSpec
from server.gateway.rollouts import Taken


@dataclass(slots=True, frozen=True)
class Reading:
    """A level, by rows of up to ``until_ns`` (wall clock). The same time again is the same rows again."""

    value: float
    until_ns: int


#: The drift of a version: (model, version, statistic, since) -> its highest score over all columns, by rows that came
#: after ``since`` (wall clock, ns) alone; None when there are too few of them.
Levels: TypeAlias = Callable[[str, str, str, int], Reading | None]


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
    """One look at everything that is known. ``levels``: those that rows have come for since the look before, by
    statistic. ``comparison``: the shadow's report, while there is a shadow."""

    spec: RolloutSpec
    taken: Taken
    levels: Mapping[str, float]
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
                yield from self._alone(gate.source)
            case MeanGate():
                if (heard := self.taken.outcomes.get(gate.source)) is not None:
                    yield heard.means
            case LevelGate():
                if (value := self.levels.get(gate.source)) is not None:
                    yield Level(value)
            case MismatchGate():
                yield self.taken.keys

    def _ratio(self, source: str) -> Iterator[Evidence]:
        heard = self.taken.outcomes.get(source)
        rows = self.taken.rows[source] if source in EVENTS else () if heard is None else heard.rows
        if rows:
            yield rows

    def _alone(self, source: str) -> Iterator[Evidence]:
        if source in EVENTS:
            yield self.taken.alone[source]
        elif (heard := self.taken.outcomes.get(source)) is not None:
            yield heard.alone
