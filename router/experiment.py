"""One experiment's books: who was exposed, what each arm did, what came of it, and a report that may be read any time.

Three kinds of counts, kept apart because they answer different questions:

- requests: attempts, failures and latency of each arm, plain counts. Requests of one user are alike, so no interval is
  drawn around their rates.
- units: every distinct key (or single request, where there is no key) counts once, with the outcome of its first
  attempt. Units are drawn independently, which is what intervals and the sample-ratio test need.
- outcomes: each unit's feedback, settled when its window has passed since its exposure. Feedback that comes later is
  counted as late and changes nothing.

Memory is bounded twice. Exposures are logged once per unit and day through a table of ``log_slots`` marks; when more
units are active than it has slots, some exposures are logged again, none is lost. Units are analysed up to
``max_units``; when they are full, later units are still served, logged and counted as requests, and the report, which
then speaks of the first ``max_units`` units, says how many exposures found no place.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log
from typing import Final, Literal

from router import sequential
from router.sequential import Estimate, Moments, evidence_of

_MASK: Final = (1 << 64) - 1
#: An odd constant (2^64 over the golden ratio): spreads days over all bits of a mark.
_DAY_STEP: Final = 0x9E3779B97F4A7C15
_NS_PER_DAY: Final = 86_400 * 1_000_000_000

_ATTEMPTED: Final = 1


@dataclass(slots=True, frozen=True)
class OutcomeSpec:
    """What comes back about a unit. Binary: any truthy value within the window is a yes. Number: values add up.

    ``silence``: whether a unit of which nothing was heard counts as 0 or is left out.
    """

    name: str
    kind: Literal["binary", "number"]
    window_ns: int
    silence: Literal["zero", "skip"] = "zero"


@dataclass(slots=True, frozen=True)
class ExperimentSpec:
    """An experiment's arms with their weights (any positive numbers, the first arm is the control) and outcomes."""

    id: str
    arms: tuple[tuple[str, int], ...]
    outcomes: tuple[OutcomeSpec, ...] = ()
    alpha: float = 0.05
    mismatch_alpha: float = 0.001
    max_units: int = 262_144
    log_slots: int = 1 << 20

    def __post_init__(self) -> None:
        names = [name for name, _ in self.arms]
        if len(names) < 2 or len(set(names)) != len(names) or min(weight for _, weight in self.arms) <= 0:
            raise ValueError(f"arms: wanted two or more with different names and positive weights, got {self.arms}")
        outcomes = [outcome.name for outcome in self.outcomes]
        if len(set(outcomes)) != len(outcomes):
            raise ValueError(f"outcomes: wanted different names, got {outcomes}")
        if not (0 < self.alpha < 1 and 0 < self.mismatch_alpha < 1):
            raise ValueError(f"wanted levels between 0 and 1, got {self.alpha} and {self.mismatch_alpha}")
        if self.max_units < 1 or self.log_slots < 1 or self.log_slots & (self.log_slots - 1):
            raise ValueError(
                f"log_slots: wanted a power of two, max_units over 0; got {self.log_slots}, {self.max_units}"
            )


# --- exposures --------------------------------------------------------------------------------------------------------


class ExposureMarks:
    """Which units were logged today: one mark per slot, so never more memory, and never an exposure lost."""

    __slots__ = ("_marks", "_slots")

    def __init__(self, slots: int) -> None:
        self._slots = slots - 1
        self._marks = array("Q", bytes(8 * slots))

    def first_today(self, unit: int, day: int) -> bool:
        """Whether this exposure is to be logged. True again for a unit whose slot another has taken meanwhile."""
        mark = ((unit + day * _DAY_STEP) & _MASK) or 1
        slot = unit & self._slots
        if self._marks[slot] == mark:
            return False
        self._marks[slot] = mark
        return True


# --- units ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class OutcomeCounts:
    """Settled units of one arm for one outcome: how many, how many yes (binary), and their values (number)."""

    spec: OutcomeSpec
    settled: int = 0
    hits: int = 0
    values: Moments = field(default_factory=Moments)

    def add(self, value: float) -> None:
        self.settled += 1
        if self.spec.kind == "binary":
            self.hits += value != 0
        else:
            self.values.add(value)


@dataclass(slots=True)
class ArmCounts:
    """What one arm did. Latencies are in nanoseconds, of attempts that succeeded."""

    requests: int = 0
    errors: int = 0
    latency: Moments = field(default_factory=Moments)
    units: int = 0
    attempted_units: int = 0
    failed_units: int = 0
    outcomes: list[OutcomeCounts] = field(default_factory=list)


class _Feedback:
    """One outcome of every unit, in the order of exposure; ``settled`` units are behind it."""

    __slots__ = ("heard", "settled", "spec", "values")

    def __init__(self, spec: OutcomeSpec) -> None:
        self.spec = spec
        self.values = array("d")
        self.heard = bytearray()
        self.settled = 0

    def hear(self, index: int, value: float) -> None:
        """Feedback about one unit, which may have had some before."""
        self.heard[index] = 1
        if self.spec.kind == "number":
            self.values[index] += value
        elif value:
            self.values[index] = 1.0


class ExperimentBooks:
    """The running experiment: told what happens, asked for a report. Not thread-safe; one owner."""

    __slots__ = (
        "_arm_of", "_arms", "_feedback", "_flags", "_index", "_joined_ns", "_marks", "_names", "_worst",
        "counts", "late", "spec", "unknown", "unplaced",
    )  # fmt: skip

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self._names = [name for name, _ in spec.arms]
        self._arms = {name: index for index, name in enumerate(self._names)}
        self.counts = [ArmCounts(outcomes=[OutcomeCounts(outcome) for outcome in spec.outcomes]) for _ in spec.arms]
        self._marks = ExposureMarks(spec.log_slots)
        self._index: dict[int, int] = {}
        self._arm_of = bytearray()
        self._flags = bytearray()
        self._joined_ns = array("q")
        self._feedback = {outcome.name: _Feedback(outcome) for outcome in spec.outcomes}
        self._worst = 0.0
        #: Exposures of units that found no place, feedback about units unknown here, feedback after the window.
        self.unplaced = 0
        self.unknown = 0
        self.late = 0

    # -- told ---------------------------------------------------------------------------------------------------

    def expose(self, arm: str, unit: int, wall_ns: int) -> bool:
        """A unit was put on an arm; True when the exposure is to be logged (once per unit and UTC day).

        ``unit`` is a 64-bit hash: the decision's ``key_hash``, or one of the request's id where there was no key.
        Requests outside the experiment (``arm`` is none of its arms) are passed over.
        """
        number = self._arms.get(arm)
        if number is None:
            return False
        if unit not in self._index:
            self._join(number, unit, wall_ns)
        return self._marks.first_today(unit, wall_ns // _NS_PER_DAY)

    def _join(self, number: int, unit: int, wall_ns: int) -> None:
        if len(self._index) >= self.spec.max_units:
            self.unplaced += 1
            return
        self._index[unit] = len(self._arm_of)
        self._arm_of.append(number)
        self._flags.append(0)
        self._joined_ns.append(wall_ns)
        self.counts[number].units += 1
        for feedback in self._feedback.values():
            feedback.values.append(0.0)
            feedback.heard.append(0)

    def attempt(self, arm: str, unit: int, failed: bool, latency_ns: int) -> None:
        """An attempt of an arm ended, before any retry or fallback."""
        number = self._arms.get(arm)
        if number is None:
            return
        counts = self.counts[number]
        counts.requests += 1
        counts.errors += failed
        if not failed:
            counts.latency.add(latency_ns)
        index = self._index.get(unit)
        if index is not None and not self._flags[index] & _ATTEMPTED:
            self._flags[index] |= _ATTEMPTED
            counts.attempted_units += 1
            counts.failed_units += failed

    def outcome(self, name: str, unit: int, value: float, wall_ns: int) -> bool:
        """Feedback about a unit; False when it came too late or about nobody known. Raises KeyError, ValueError."""
        feedback = self._feedback[name]
        if not isfinite(value):
            raise ValueError(f"outcome {name}: wanted a finite number, got {value}")
        self.settle(wall_ns)
        index = self._index.get(unit)
        if index is None:
            self.unknown += 1
            return False
        if index < feedback.settled:
            self.late += 1
            return False
        feedback.hear(index, value)
        return True

    def settle(self, wall_ns: int) -> None:
        """Close the outcomes of all units whose window has passed. Each unit costs once, when its time has come."""
        for place, feedback in enumerate(self._feedback.values()):
            until = wall_ns - feedback.spec.window_ns
            while feedback.settled < len(self._joined_ns) and self._joined_ns[feedback.settled] <= until:
                self._close(place, feedback)

    def _close(self, place: int, feedback: _Feedback) -> None:
        index = feedback.settled
        feedback.settled += 1
        if feedback.heard[index] or feedback.spec.silence == "zero":
            self.counts[self._arm_of[index]].outcomes[place].add(feedback.values[index])

    # -- asked --------------------------------------------------------------------------------------------------

    def report(self, wall_ns: int) -> Report:
        """Everything known now. The sample-ratio alarm, once raised, stays."""
        self.settle(wall_ns)
        evidence = self._mismatch()
        return Report(
            self.spec.id,
            tuple(_arm_report(name, counts, self.spec.alpha) for name, counts in self._named()),
            tuple(self._differences()),
            evidence_of(evidence),
            self._worst >= -log(self.spec.mismatch_alpha),
            self.unplaced,
            self.unknown,
            self.late,
        )

    def _named(self) -> list[tuple[str, ArmCounts]]:
        return list(zip(self._names, self.counts, strict=True))

    def _mismatch(self) -> float:
        total = sum(weight for _, weight in self.spec.arms)
        shares = [weight / total for _, weight in self.spec.arms]
        evidence = sequential.log_mismatch([counts.units for counts in self.counts], shares)
        self._worst = max(self._worst, evidence)
        return evidence

    def _differences(self) -> list[Difference]:
        (_, control), *others = self._named()
        return [
            Difference(name, metric, estimate)
            for name, treated in others
            for metric, estimate in _compare(treated, control, self.spec.alpha).items()
        ]


# --- report -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class ArmReport:
    """One arm. ``error_rate`` is of units' first attempts; ``outcomes``: name -> (settled units, estimate)."""

    arm: str
    requests: int
    errors: int
    mean_latency_ns: float
    units: int
    error_rate: Estimate
    outcomes: Mapping[str, tuple[int, Estimate]]


@dataclass(slots=True, frozen=True)
class Difference:
    """An arm less the control, in the rate or mean of one metric (``errors`` or an outcome's name)."""

    arm: str
    metric: str
    estimate: Estimate


@dataclass(slots=True, frozen=True)
class Report:
    """An experiment at one moment. Each interval holds at all times together at level 1 - alpha.

    ``mismatch_evidence`` is the e-value against the units' being spread over arms as they should be; ``mismatch`` is
    the alarm that it has once reached 1 / mismatch_alpha, after which the other numbers are not to be trusted.
    """

    id: str
    arms: tuple[ArmReport, ...]
    differences: tuple[Difference, ...]
    mismatch_evidence: float
    mismatch: bool
    unplaced: int
    unknown: int
    late: int


def _arm_report(name: str, counts: ArmCounts, alpha: float) -> ArmReport:
    return ArmReport(
        name,
        counts.requests,
        counts.errors,
        counts.latency.mean,
        counts.units,
        sequential.rate(counts.failed_units, counts.attempted_units, alpha),
        {one.spec.name: (one.settled, _outcome(one, alpha)) for one in counts.outcomes},
    )


def _outcome(counts: OutcomeCounts, alpha: float) -> Estimate:
    if counts.spec.kind == "binary":
        return sequential.rate(counts.hits, counts.settled, alpha)
    return sequential.mean(counts.values, alpha)


def _compare(treated: ArmCounts, control: ArmCounts, alpha: float) -> Mapping[str, Estimate]:
    first = (treated.failed_units, treated.attempted_units)
    found = {"errors": sequential.rate_difference(first, (control.failed_units, control.attempted_units), alpha)}
    return found | _compare_outcomes(treated.outcomes, control.outcomes, alpha)


def _compare_outcomes(
    treated: Sequence[OutcomeCounts], control: Sequence[OutcomeCounts], alpha: float
) -> dict[str, Estimate]:
    found = {}
    for ours, theirs in zip(treated, control, strict=True):
        if ours.spec.kind == "binary":
            pairs = (ours.hits, ours.settled), (theirs.hits, theirs.settled)
            found[ours.spec.name] = sequential.rate_difference(*pairs, alpha)
        else:
            found[ours.spec.name] = sequential.mean_difference(ours.values, theirs.values, alpha)
    return found
