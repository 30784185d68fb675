"""Before a rollout starts: is its specification sound, may it start, and how long will its steps take.

A step lasts until its certificates are earned, so its length follows from traffic: events per second, the candidate's
share and the margin. The estimate takes the log evidence for a random walk with the mean and the variance per second
that it has when the candidate is as good as stable, and gives the time by which it has crossed its bar with a chance of
one half and of nine tenths (first passage of a Brownian motion with drift, the inverse Gaussian distribution).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import erfc, exp, inf, isfinite, log, log1p, sqrt
from typing import Final

from router.errors import BadRollout, Problem, RolloutRefused
from router.rollout.evidence import BETTER
from router.rollout.spec import (
    NS_PER_S,
    GateSpec,
    LevelGate,
    MeanGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
    RolloutSpec,
    StepSpec,
)
from router.types import FULL_SHARE

#: What a mixture costs against its best alternative, in nats: the others help a little, so less than log(6).
_MIXING: Final = 0.7
#: No estimate beyond ten years.
_NEVER_S: Final = 3.2e8


# --- sound ------------------------------------------------------------------------------------------------------------


def check(spec: RolloutSpec, arms: int = 1) -> None:
    """Raises BadRollout with every mistake. ``arms``: how many arms beside stable the model has; homes are as many."""
    problems = tuple(_problems(spec, arms))
    if problems:
        raise BadRollout(spec.id, problems)


def _problems(spec: RolloutSpec, arms: int) -> Iterator[Problem]:
    yield from _name_problems(spec)
    yield from _policy_problems(spec)
    gates = dict(spec.gates)
    if len(gates) != len(spec.gates):
        yield Problem(("gates",), f"wanted different names, got {', '.join(name for name, _ in spec.gates)}")
    for name, gate in spec.gates:
        yield from _gate_problems(("gates", name), gate)
    if not any(gate.reaction is Reaction.ROLLBACK for gate in gates.values()):
        yield Problem(("gates",), "wanted at least one gate that rolls back, got none")
    if spec.shadow is not None and not any(isinstance(gate, RateGate) and gate.paired for gate in gates.values()):
        yield Problem(("shadow",), "wanted a paired gate to judge shadow pairs by, got none")
    yield from _step_problems(spec, arms)


def _name_problems(spec: RolloutSpec) -> Iterator[Problem]:
    for field in ("id", "model", "stable", "candidate", "digest"):
        if not getattr(spec, field):
            yield Problem((field,), "wanted a name, got nothing")
    if spec.candidate == spec.stable:
        yield Problem(("candidate",), f"wanted another version than stable, got {spec.candidate} for both")


def _policy_problems(spec: RolloutSpec) -> Iterator[Problem]:
    if not 0 < spec.alpha < 1:
        yield Problem(("alpha",), f"wanted over 0 and under 1, got {spec.alpha}")
    if spec.approvals < 1:
        yield Problem(("approvals",), f"wanted at least 1, got {spec.approvals}")
    choices = (("inconclusive_then", ("hold", "rollback")), ("on_crash", ("rollback", "resume")))
    for field, allowed in (*choices, ("hold_weight", ("keep", "zero"))):
        if getattr(spec, field) not in allowed:
            yield Problem((field,), f"wanted {' or '.join(allowed)}, got {getattr(spec, field)!r}")
    for field in ("inconclusive_after_ns", "load_timeout_ns"):
        if getattr(spec, field) < 1:
            yield Problem((field,), f"wanted over 0, got {getattr(spec, field)}")
    for field in ("cooldown_ns", "keep_warm_ns", "ignore_first_ns"):
        if getattr(spec, field) < 0:
            yield Problem((field,), f"wanted 0 or more, got {getattr(spec, field)}")
    shadow = spec.shadow
    if shadow is not None and not (shadow.min_pairs >= 1 and 0 <= shadow.min_ns < spec.inconclusive_after_ns):
        yield Problem(("shadow",), f"wanted at least 1 pair, and a time within inconclusive.after, got {shadow}")


def _gate_problems(where: tuple[str, ...], gate: GateSpec) -> Iterator[Problem]:
    match gate:
        case RatioGate(worse_than=bound) if not (isfinite(bound) and bound >= 1):
            yield Problem((*where, "worse_than"), f"wanted a ratio of 1 or more, got {bound:g}")
        case RateGate(max_rate=bound) if not 0 < bound < 1:
            yield Problem((*where, "max_rate"), f"wanted over 0% and under 100%, got {bound:.6g}")
        case MeanGate(worse_by=bound) if not (isfinite(bound) and bound >= 0):
            yield Problem((*where, "worse_by"), f"wanted 0 or more, got {bound:g}")
        case LevelGate(over=bound, looks=looks) if not isfinite(bound) or looks < 1:
            yield Problem(where, f"wanted a finite level and at least one look, got {bound:g} and {looks}")
        case MismatchGate(alpha=alpha) if not 0 < alpha < 1:
            yield Problem((*where, "alpha"), f"wanted over 0 and under 1, got {alpha:g}")
    if not isinstance(gate, MismatchGate) and not gate.source:
        yield Problem((*where, "source"), "wanted the name of what is judged, got nothing")


def _step_problems(spec: RolloutSpec, arms: int) -> Iterator[Problem]:
    home = FULL_SHARE // arms
    if not spec.serving_steps:
        yield Problem(("steps",), "wanted at least one step before the promotion, got none")
    before = 0
    for number, step in enumerate(spec.steps):
        where = ("steps", number)
        if not before < step.weight <= home:
            wanted = f"over {before / 100:g}% (weights grow) and at most {home / 100:g}%"
            yield Problem((*where, "weight"), f"wanted {wanted}, got {step.weight / 100:g}%")
        before = max(before, step.weight)
        if not 0 <= step.min_ns < spec.inconclusive_after_ns:
            wanted = f"0 or more and less than inconclusive.after ({spec.inconclusive_after_ns} ns)"
            yield Problem((*where, "min"), f"wanted {wanted}, got {step.min_ns} ns")
        last = number == len(spec.steps) - 1
        if not step.certify and not step.approve and not (last and step.is_promotion):
            text = "wanted certificates or an approval to go on by, got neither: silence advances nothing"
            yield Problem((*where, "certify"), text)
        yield from _margin_problems(where, step, dict(spec.gates))


def _margin_problems(where: tuple[str | int, ...], step: StepSpec, gates: Mapping[str, GateSpec]) -> Iterator[Problem]:
    for name, margin in step.certify:
        place = (*where, "certify", name)
        match gates.get(name):
            case None:
                yield Problem(place, f"wanted one of the gates {', '.join(gates) or '(there are none)'}, got {name}")
            case RatioGate() | MeanGate() if step.weight == FULL_SHARE:
                yield Problem(
                    place, "at 100% stable has no traffic to compare with: certify a rate, or ask for approval"
                )
            case RatioGate() if not (isfinite(margin) and margin > 1):
                yield Problem(place, f"wanted a ratio over 1, got {margin:g}")
            case RateGate(max_rate=bound) if not 0 < margin <= bound:
                yield Problem(place, f"wanted a rate over 0 and at most the gate's {bound:g}, got {margin:g}")
            case MeanGate(worse_by=bound) if not (isfinite(margin) and margin > bound):
                yield Problem(place, f"wanted a difference over the gate's own {bound:g}, got {margin:g}")
            case LevelGate() | MismatchGate():
                yield Problem(place, "this kind of gate certifies nothing")


# --- allowed ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class FailedAttempt:
    """A rollout that was rolled back or failed. ``cleared``: a person has said that its digest may be tried again."""

    rollout: str
    digest: str
    ended_ns: int
    cooldown_ns: int
    cleared: bool = False


def admit(spec: RolloutSpec, past: Iterable[FailedAttempt], now_ns: int, force: bool = False) -> None:
    """Whether the candidate may be tried; RolloutRefused when its digest failed and is not cleared or cooled down.

    An id is a draw of keys and a line in the audit: it is never used twice, not even by force.
    """
    for attempt in past:
        if attempt.rollout == spec.id:
            raise RolloutRefused(spec.id, "this id was used before; give the new rollout an id of its own")
        left_ns = attempt.ended_ns + attempt.cooldown_ns - now_ns
        if attempt.digest == spec.digest and not attempt.cleared and not force and left_ns > 0:
            raise RolloutRefused(
                spec.id,
                f"the candidate's digest {spec.digest} failed in rollout '{attempt.rollout}'; "
                f"try again in {left_ns / NS_PER_S:.0f} s, clear it, or force it",
            )


# --- how long ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Traffic:
    """What the plan reckons with: requests per second, and stable's rate of each gate's event (by the gate's name).

    ``matched``: the candidate is compared with a slice of stable as large as itself.
    """

    rps: float
    rates: Mapping[str, float]
    matched: bool = False


@dataclass(slots=True, frozen=True)
class PlannedStep:
    """One step with its expected seconds, if the candidate is as good as stable (None: cannot be told).

    ``gate`` is what takes longest, "" where only the least time counts.
    """

    weight: int
    median_s: float | None
    p90_s: float | None
    gate: str
    approve: bool


def plan(spec: RolloutSpec, traffic: Traffic) -> tuple[PlannedStep, ...]:
    """The steps with the time that each is expected to take."""
    return tuple(_planned(spec, step, traffic) for step in spec.serving_steps)


def _planned(spec: RolloutSpec, step: StepSpec, traffic: Traffic) -> PlannedStep:
    least = step.min_ns / NS_PER_S
    slowest: tuple[float | None, float | None, str] = (least, least, "")
    for name, margin in step.certify:
        times = certificate_times(dict(spec.gates)[name], name, margin, step.weight / FULL_SHARE, traffic, spec.alpha)
        if times is None:
            return PlannedStep(step.weight, None, None, name, step.approve)
        if slowest[1] is None or times[1] > slowest[1]:
            slowest = (max(times[0], least), times[1], name)
    return PlannedStep(step.weight, slowest[0], slowest[1], slowest[2], step.approve)


def certificate_times(
    gate: GateSpec, name: str, margin: float, share: float, traffic: Traffic, alpha: float
) -> tuple[float, float] | None:
    """Seconds (median, 90 %) to certify ``margin`` at the candidate's ``share``; None where it cannot be told."""
    base = traffic.rates.get(name)
    if base is None or not traffic.rps > 0 or not 0 < share <= 1 or not 0 <= base < 1:
        return None
    if isinstance(gate, RatioGate):
        walks = [_ratio_walk(traffic, base, share, margin, factor) for factor in BETTER]
    elif isinstance(gate, RateGate):
        walks = [_rate_walk(traffic.rps * share, base, margin, factor) for factor in BETTER]
    else:
        return None
    bar = _MIXING - log(alpha)
    times = [(_passage(bar, *walk, 0.5), _passage(bar, *walk, 0.9)) for walk in walks]
    best = min(times, key=lambda pair: pair[1])
    return best if best[1] < _NEVER_S else None


def _ratio_walk(traffic: Traffic, base: float, share: float, margin: float, factor: float) -> tuple[float, float]:
    """Mean and variance per second of the log evidence of one alternative, when the true ratio is 1."""
    other = min(share, 1 - share) if traffic.matched else 1 - share
    if other <= 0:
        return 0.0, 0.0
    odds = share * margin / other
    stable = log1p(odds) - log1p(odds * factor)
    candidate = stable + log(factor)
    ours, theirs = traffic.rps * base * share, traffic.rps * base * other
    return ours * candidate + theirs * stable, ours * candidate**2 + theirs * stable**2


def _rate_walk(units: float, base: float, margin: float, factor: float) -> tuple[float, float]:
    """The same for a rate; ``units`` per second."""
    step = -log1p(margin * (factor - 1))
    mean = base * log(factor) + step
    return units * mean, units * (base * (1 - base)) * log(factor) ** 2


def _passage(bar: float, drift: float, variance: float, chance: float) -> float:
    """When a Brownian motion has crossed ``bar`` with that chance: the inverse Gaussian's quantile, by bisection."""
    if drift <= 0:
        return inf
    if variance <= 0:
        return bar / drift
    low, high = 0.0, 1.0
    while _passed(high, bar, drift, variance) < chance:
        low, high = high, high * 2
        if high > _NEVER_S:
            return inf
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _passed(middle, bar, drift, variance) < chance else (low, middle)
    return high


def _passed(time: float, bar: float, drift: float, variance: float) -> float:
    spread = sqrt(2 * variance * time)
    exponent = 2 * drift * bar / variance
    # For a walk with next to no variance the second term is a huge number times nothing.
    reflected = 0.5 * exp(exponent) * erfc((bar + drift * time) / spread) if exponent < 600 else 0.0
    return 0.5 * erfc((bar - drift * time) / spread) + reflected
