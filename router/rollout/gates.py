"""Gates: evidence in, verdicts out. "Worse" is proven, "certified" is proven, and everything else is not known.

One gate's process runs over the whole rollout, through changes of weight, pauses and restarts, and is looked at as
often as one likes; the gates that react alike share the rollout's alpha. A certificate (the candidate is within a
margin) is earned anew in every step, by that step's traffic.

A gate that had no data is neither worse nor certified. A gate that holds is *calm* again when its evidence no longer
speaks against the candidate at all; one that found keys on the wrong arms stays until a person has looked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log
from typing import Any, Final, Protocol, TypeAlias

from router.errors import BadRolloutState
from router.rollout.evidence import (
    BETTER,
    FREQUENT,
    WORSE,
    Mixture,
    OneArm,
    RatioInterval,
    RestartMixture,
    TwoArms,
    block_increments,
    label_increments,
    rate_increments,
)
from router.rollout.spec import (
    SLOW,
    GateSpec,
    LevelGate,
    MeanGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
    RolloutSpec,
)
from router.sequential import Moments, log_mismatch, mean_difference, rate

#: Fewer earlier attempts than this say nothing about how frequent an event is.
_ENOUGH: Final = 100


@dataclass(slots=True, frozen=True)
class Means:
    """Matured feedback since the last look."""

    candidate: Moments
    stable: Moments


@dataclass(slots=True, frozen=True)
class Level:
    """The latest value of a number that something else computes."""

    value: float


@dataclass(slots=True, frozen=True)
class Keys:
    """Distinct keys seen for the first time in this step; ``share`` of them should be the candidate's."""

    candidate: int
    stable: int
    share: float


Evidence: TypeAlias = TwoArms | Sequence[TwoArms] | OneArm | Means | Level | Keys


@dataclass(slots=True, frozen=True)
class Verdict:
    """What a gate says now, for decisions and for the audit.

    ``log_e`` and ``bar``: log evidence against the candidate and where it counts as proof (None: this gate has no
    such number). Counts are (units, events) per arm. ``estimate`` with its always-valid interval is a ratio, a rate, a
    difference or a level, as the gate's kind is. ``log_certificate``: log evidence for the margin asked for, if any.
    """

    gate: str
    reaction: Reaction
    worse: bool
    calm: bool
    certified: bool
    log_e: float | None
    bar: float | None
    candidate: tuple[float, float]
    stable: tuple[float, float] | None
    estimate: float | None
    low: float | None
    high: float | None
    margin: float | None
    log_certificate: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are not known."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in values.items() if value is not None} | {"reaction": self.reaction.value}


class Gate(Protocol):
    """One gate's running evidence. ``take`` raises ValueError for evidence of another kind."""

    name: str

    def accepts(self, evidence: Evidence) -> bool: ...
    def take(self, evidence: Any, elapsed_ns: int) -> None: ...
    def enter(self, margin: float | None) -> None: ...
    def verdict(self) -> Verdict: ...
    def restart(self) -> None: ...
    def to_dict(self) -> dict[str, Any]: ...
    def restore(self, found: Mapping[str, Any]) -> None: ...


class _Tested:
    """What gates with an e-process have in common: the bar, the certificate, the process itself."""

    def __init__(self, name: str, reaction: Reaction, alpha: float, certificate_alpha: float) -> None:
        self.name = name
        self._reaction = reaction
        self._alpha = alpha
        self._bar = -log(alpha)
        self._certificate_bar = -log(certificate_alpha)
        self._margin: float | None = None
        self._certificate = Mixture()
        self._against = RestartMixture()

    def enter(self, margin: float | None) -> None:
        """A step begins that asks for ``margin`` (None: for nothing)."""
        self._margin = margin
        self._certificate = Mixture()

    def _judged(
        self,
        candidate: tuple[float, float],
        stable: tuple[float, float] | None,
        estimate: tuple[float | None, float | None, float | None],
    ) -> Verdict:
        log_e = self._against.log_e
        shown = None if self._margin is None else self._certificate.log_e
        certified = shown is not None and shown >= self._certificate_bar
        return Verdict(
            self.name, self._reaction, log_e >= self._bar, log_e < 0, certified, log_e, self._bar,
            candidate, stable, *estimate, self._margin, shown,
        )  # fmt: skip

    def _process_to_dict(self) -> dict[str, Any]:
        return {"against": self._against.to_dict(), "margin": self._margin, "certificate": self._certificate.to_list()}

    def _restore_process(self, found: Mapping[str, Any]) -> None:
        self._against.restore(found["against"])
        self._margin = None if found["margin"] is None else float(found["margin"])
        self._certificate.restore(found["certificate"])


class RatioEvidence(_Tested):
    """A RatioGate's."""

    def __init__(self, name: str, spec: RatioGate, alpha: float, certificate_alpha: float) -> None:
        super().__init__(name, spec.reaction, alpha, certificate_alpha)
        self._bound = spec.worse_than
        self._begin()

    def _begin(self) -> None:
        self._counts = [0, 0, 0, 0]
        #: Sums of the ratio's estimate over rows: events of each arm times the other arm's share (Mantel, Haenszel).
        self._crossed = [0.0, 0.0]
        self._interval = RatioInterval()

    def accepts(self, evidence: Evidence) -> bool:
        rows = (evidence,) if isinstance(evidence, TwoArms) else evidence
        return isinstance(rows, Sequence) and all(isinstance(row, TwoArms) for row in rows)

    def take(self, evidence: TwoArms | Sequence[TwoArms], elapsed_ns: int) -> None:
        for row in (evidence,) if isinstance(evidence, TwoArms) else evidence:
            if row.odds:
                self._take_row(row, elapsed_ns)
                elapsed_ns = 0

    def _take_row(self, row: TwoArms, elapsed_ns: int) -> None:
        self._against.add(self._increments(row, self._bound, WORSE), elapsed_ns)
        if self._margin is not None:
            self._certificate.add(self._increments(row, self._margin, BETTER))
        self._interval.add(row)
        share = row.odds / (1 + row.odds)
        self._crossed[0] += row.candidate_events * (1 - share)
        self._crossed[1] += row.stable_events * share
        counted = (row.candidate, row.candidate_events, row.stable, row.stable_events)
        self._counts = [total + count for total, count in zip(self._counts, counted, strict=True)]

    def _increments(self, row: TwoArms, bound: float, factors: Sequence[float]) -> list[float]:
        units, events = self._counts[0] + self._counts[2], self._counts[1] + self._counts[3]
        if row.share is None and units >= _ENOUGH and events > FREQUENT * units:
            return block_increments(row, bound, factors, min(events / units, 0.99))
        return label_increments(row, bound, factors)

    def verdict(self) -> Verdict:
        n_c, k_c, n_s, k_s = self._counts
        estimate = self._crossed[0] / self._crossed[1] if self._crossed[1] else None
        return self._judged((n_c, k_c), (n_s, k_s), (estimate, *self._interval.interval(self._alpha)))

    def restart(self) -> None:
        self._against = RestartMixture()
        self._begin()

    def to_dict(self) -> dict[str, Any]:
        counts, crossed = list(self._counts), list(self._crossed)
        return self._process_to_dict() | {"counts": counts, "crossed": crossed, "interval": self._interval.to_list()}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._restore_process(found)
        n_c, k_c, n_s, k_s = found["counts"]
        self._counts = [int(n_c), int(k_c), int(n_s), int(k_s)]
        ours, theirs = found["crossed"]
        self._crossed = [float(ours), float(theirs)]
        self._interval.restore(found["interval"])


class RateEvidence(_Tested):
    """A RateGate's."""

    def __init__(self, name: str, spec: RateGate, alpha: float, certificate_alpha: float) -> None:
        super().__init__(name, spec.reaction, alpha, certificate_alpha)
        self._bound = spec.max_rate
        self._units, self._total = 0, 0.0

    @property
    def units(self) -> int:
        """How many were judged."""
        return self._units

    def accepts(self, evidence: Evidence) -> bool:
        return isinstance(evidence, OneArm)

    def take(self, evidence: OneArm, elapsed_ns: int) -> None:
        if not evidence.units:
            return
        self._against.add(rate_increments(evidence, self._bound, WORSE), elapsed_ns)
        if self._margin is not None:
            self._certificate.add(rate_increments(evidence, self._margin, BETTER))
        self._units += evidence.units
        self._total += evidence.total

    def verdict(self) -> Verdict:
        found = rate(round(self._total), self._units, self._alpha)
        value = self._total / self._units if self._units else None
        return self._judged((self._units, self._total), None, (value, found.low, found.high))

    def restart(self) -> None:
        self._against = RestartMixture()
        self._units, self._total = 0, 0.0

    def to_dict(self) -> dict[str, Any]:
        return self._process_to_dict() | {"units": self._units, "total": self._total}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._restore_process(found)
        self._units, self._total = int(found["units"]), float(found["total"])


class MeanEvidence:
    """A MeanGate's: the asymptotic confidence sequence of how much worse the candidate's mean is."""

    def __init__(self, name: str, spec: MeanGate, alpha: float, certificate_alpha: float) -> None:
        self.name = name
        self._spec = spec
        self._alpha = alpha
        self._certificate_alpha = certificate_alpha
        self._margin: float | None = None
        self._arms = (Moments(), Moments())

    def accepts(self, evidence: Evidence) -> bool:
        return isinstance(evidence, Means)

    def take(self, evidence: Means, elapsed_ns: int) -> None:
        self._arms[0].merge(evidence.candidate)
        self._arms[1].merge(evidence.stable)

    def enter(self, margin: float | None) -> None:
        self._margin = margin

    def _loss(self, alpha: float) -> tuple[float, float | None, float | None]:
        """How much worse, with its interval."""
        candidate, stable = self._arms
        treated, control = (stable, candidate) if self._spec.higher_is_better else (candidate, stable)
        found = mean_difference(treated, control, alpha)
        return found.value, found.low, found.high

    def verdict(self) -> Verdict:
        value, low, high = self._loss(self._alpha)
        top = self._loss(self._certificate_alpha)[2]
        worse = low is not None and low > self._spec.worse_by
        certified = self._margin is not None and top is not None and top < self._margin
        candidate, stable = self._arms
        return Verdict(
            self.name, self._spec.reaction, worse, value <= self._spec.worse_by, certified, None, None,
            (candidate.count, candidate.mean), (stable.count, stable.mean), value, low, high, self._margin, None,
        )  # fmt: skip

    def restart(self) -> None:
        self._arms = (Moments(), Moments())

    def to_dict(self) -> dict[str, Any]:
        return {"margin": self._margin, "arms": [[arm.count, arm.mean, arm.squares] for arm in self._arms]}

    def restore(self, found: Mapping[str, Any]) -> None:
        candidate, stable = (_moments(*values) for values in found["arms"])
        self._margin = None if found["margin"] is None else float(found["margin"])
        self._arms = (candidate, stable)


def _moments(count: Any, mean: Any, squares: Any) -> Moments:
    found = Moments(int(count), float(mean), float(squares))
    if not (isfinite(found.mean) and isfinite(found.squares)):
        raise ValueError(f"wanted finite moments, got {found}")
    return found


class LevelEvidence:
    """A LevelGate's: how many looks running were over."""

    def __init__(self, name: str, spec: LevelGate) -> None:
        self.name = name
        self._spec = spec
        self._over = 0
        self._value: float | None = None

    def accepts(self, evidence: Evidence) -> bool:
        return isinstance(evidence, Level)

    def take(self, evidence: Level, elapsed_ns: int) -> None:
        if isfinite(evidence.value):
            self._value = evidence.value
        # A number that is not one says that something is wrong with the data, not that all is well.
        self._over = 0 if evidence.value <= self._spec.over else self._over + 1

    def enter(self, margin: float | None) -> None:
        """Levels cannot be certified."""

    def verdict(self) -> Verdict:
        return Verdict(
            self.name, self._spec.reaction, self._over >= self._spec.looks, self._over == 0, False,
            None, None, (self._over, self._over), None, self._value, None, None, None, None,
        )  # fmt: skip

    def restart(self) -> None:
        self._over = 0

    def to_dict(self) -> dict[str, Any]:
        return {"over": self._over, "value": self._value}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._over = int(found["over"])
        self._value = None if found["value"] is None else float(found["value"])


class MismatchEvidence:
    """A MismatchGate's: the sample-ratio e-process, one factor per share that was in force."""

    def __init__(self, name: str, spec: MismatchGate) -> None:
        self.name = name
        self._reaction = spec.reaction
        self._bar = -log(spec.alpha)
        self._ended = 0.0
        self._share = 0.0
        self._counts = [0, 0]
        self._keys = [0, 0]

    def accepts(self, evidence: Evidence) -> bool:
        return isinstance(evidence, Keys)

    def take(self, evidence: Keys, elapsed_ns: int) -> None:
        if not 0 < evidence.share < 1:
            return
        if evidence.share != self._share:
            self._ended = self._log_e()
            self._share, self._counts = evidence.share, [0, 0]
        self._counts = [self._counts[0] + evidence.candidate, self._counts[1] + evidence.stable]
        self._keys = [self._keys[0] + evidence.candidate, self._keys[1] + evidence.stable]

    def enter(self, margin: float | None) -> None:
        """The spread of keys cannot be certified; a step has distinct keys of its own."""
        self._ended = self._log_e()
        self._counts = [0, 0]

    def _log_e(self) -> float:
        if not 0 < self._share < 1:
            return self._ended
        return self._ended + log_mismatch(self._counts, (self._share, 1 - self._share))

    def verdict(self) -> Verdict:
        log_e = self._log_e()
        ours, theirs = self._keys
        return Verdict(
            self.name, self._reaction, log_e >= self._bar, False, False, log_e, self._bar, (ours, ours),
            (theirs, theirs), ours / (ours + theirs) if ours + theirs else None, None, None, None, None,
        )  # fmt: skip

    def restart(self) -> None:
        self._ended = self._share = 0.0
        self._counts, self._keys = [0, 0], [0, 0]

    def to_dict(self) -> dict[str, Any]:
        return {"ended": self._ended, "share": self._share, "counts": list(self._counts), "keys": list(self._keys)}

    def restore(self, found: Mapping[str, Any]) -> None:
        self._ended, self._share = float(found["ended"]), float(found["share"])
        self._counts = [int(count) for count in found["counts"]]
        self._keys = [int(count) for count in found["keys"]]


# --- all gates of a rollout -------------------------------------------------------------------------------------------


def is_tested(gate: GateSpec) -> bool:
    """Whether a gate spends a part of the rollout's alpha."""
    return isinstance(gate, RatioGate | RateGate | MeanGate)


def alpha_shares(spec: RolloutSpec) -> dict[str, float]:
    """The level of each tested gate: those that react alike share the rollout's alpha evenly."""
    tested = [(name, gate.reaction) for name, gate in spec.gates if is_tested(gate)]
    reactions = [reaction for _, reaction in tested]
    return {name: spec.alpha / reactions.count(reaction) for name, reaction in tested}


class GateBook:
    """The gates of one rollout."""

    def __init__(self, spec: RolloutSpec) -> None:
        shares = alpha_shares(spec)
        self._gates = {name: _evidence(name, gate, shares.get(name, 0.0), spec.alpha) for name, gate in spec.gates}
        self._late = frozenset(name for name, gate in spec.gates if isinstance(gate, RatioGate) and gate.source == SLOW)
        self._paired = frozenset(name for name, gate in spec.gates if isinstance(gate, RateGate) and gate.paired)

    def take(self, evidence: Mapping[str, Evidence], elapsed_ns: int, warming: bool = False) -> None:
        """One look; ``warming``: latency is not judged yet. Raises ValueError, before anything is taken in."""
        for name, found in evidence.items():
            gate = self._gates.get(name)
            if gate is None or not gate.accepts(found):
                known = ", ".join(f"{name} ({type(gate).__name__})" for name, gate in self._gates.items())
                raise ValueError(f"evidence for gate {name!r}: got {type(found).__name__}, the gates are {known}")
        for name, found in evidence.items():
            if not (warming and name in self._late):
                self._gates[name].take(found, elapsed_ns)

    def enter(self, certify: Iterable[tuple[str, float]]) -> None:
        """A step begins; certificates begin anew."""
        margins = dict(certify)
        for name, gate in self._gates.items():
            gate.enter(margins.get(name))

    def verdicts(self) -> tuple[Verdict, ...]:
        """What every gate says, in the order of the specification."""
        return tuple(gate.verdict() for gate in self._gates.values())

    @property
    def pairs(self) -> int:
        """Shadow pairs judged so far by the paired gate that has fewest."""
        judged = [
            gate.units for gate in self._gates.values() if isinstance(gate, RateEvidence) and gate.name in self._paired
        ]
        return min(judged, default=0)

    def acknowledge(self, names: Iterable[str]) -> None:
        """A person has looked at these gates, which hold: they begin anew."""
        for name in names:
            self._gates[name].restart()

    def to_dict(self) -> dict[str, Any]:
        return {name: gate.to_dict() for name, gate in self._gates.items()}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict`` of a book with the same gates; BadRolloutState when it is damaged."""
        try:
            for name, gate in self._gates.items():
                gate.restore(found[name])
        except (KeyError, TypeError, ValueError, OverflowError) as failure:
            raise BadRolloutState(f"the stored gates are damaged ({type(failure).__name__}: {failure})") from None


def _evidence(name: str, gate: GateSpec, alpha: float, certificate_alpha: float) -> Gate:
    match gate:
        case RatioGate():
            return RatioEvidence(name, gate, alpha, certificate_alpha)
        case RateGate():
            return RateEvidence(name, gate, alpha, certificate_alpha)
        case MeanGate():
            return MeanEvidence(name, gate, alpha, certificate_alpha)
        case LevelGate():
            return LevelEvidence(name, gate)
        case MismatchGate():
            return MismatchEvidence(name, gate)
