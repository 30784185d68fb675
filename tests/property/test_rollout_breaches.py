"""Every kind of gate, breached in every state that has not ended, through the real machine; and what is no breach."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import pytest

from router.errors import RolloutRefused
from router.rollout.events import Loaded, MoveAlias, Order, Publish, Published, Recovered, State
from router.rollout.evidence import OneArm, TwoArms
from router.rollout.gates import Evidence, Keys, Level, Means
from router.rollout.machine import Rollout
from router.rollout.spec import (
    NS_PER_S,
    SLOW,
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
from router.sequential import Moments
from tests.support.rollouts import AGREE, BAD, DISAGREE, GATES, GOOD, Driven, confirm, published, rollout_spec


@dataclass(frozen=True)
class Kind:
    """One kind of gate, one look at which the candidate is plainly worse, and how many such looks it takes."""

    gate: GateSpec
    breach: Evidence
    looks: int = 1

    def doing(self, reaction: Reaction) -> GateSpec:
        return replace(self.gate, reaction=reaction)


KINDS: Final = {
    "errors": Kind(RatioGate("error"), BAD),
    "timeouts": Kind(RatioGate("timeout"), BAD),
    "latency": Kind(RatioGate(SLOW), BAD),
    "frequent": Kind(RatioGate("error"), TwoArms(500, 490, 500, 200)),
    "by key": Kind(RatioGate("error"), (TwoArms(0, 60, 0, 2, 0.5), TwoArms(0, 9, 0, 0, 0.1))),
    "outcomes": Kind(RatioGate("chargeback", 1.1), (BAD,)),
    "ceiling": Kind(RateGate("error", 0.02), OneArm(500, 250)),
    "outcome rate": Kind(RateGate("chargeback", 0.02), OneArm(500, 250)),
    "pairs": Kind(RateGate("disagree", 0.03, paired=True), DISAGREE),
    "means": Kind(MeanGate("revenue"), Means(Moments(2_000, 1.0, 2_000.0), Moments(2_000, 3.0, 2_000.0))),
    "drift": Kind(LevelGate("psi", 0.25, 3), Level(0.9), 3),
    "no number": Kind(LevelGate("psi", 0.25, 3), Level(float("nan")), 3),
    "spread": Kind(MismatchGate(), Keys(0, 40_000, 0.05)),
}

STEPS: Final = (
    StepSpec(100, 10 * NS_PER_S, (("errors", 4.0),)),
    StepSpec(500, 10 * NS_PER_S, (("errors", 4.0),)),
    StepSpec(2_500, 10 * NS_PER_S, (("errors", 4.0),), approve=True),
    StepSpec(10_000),
)


def spec_with(kind: Kind, reaction: Reaction) -> RolloutSpec:
    gates = (*((name, gate) for name, gate in GATES if name != "srm"), ("extra", kind.doing(reaction)))
    return rollout_spec(gates=gates, steps=STEPS, on_crash="resume", ignore_first_ns=0)


def later_step(driven: Driven, number: int) -> None:
    driven.reach(State.STEP)
    while driven.rollout.step < number:
        driven.good(1)
    assert driven.state is State.STEP


def restarting(driven: Driven) -> None:
    """Killed in a step, and not loaded again yet."""
    driven.reach(State.STEP)
    driven.rollout = Rollout.from_dict(json.loads(json.dumps(driven.rollout.to_dict())))
    driven.tell(Recovered(True))


def held(driven: Driven) -> None:
    driven.reach(State.STEP)
    driven.silence(7_200)


#: Every place where a rollout can be that has not ended.
PLACES: Final[dict[str, Callable[[Driven], object]]] = {
    "pending": lambda driven: driven.reach(State.PENDING),
    "loading": lambda driven: driven.reach(State.LOADING),
    "restarting": restarting,
    "shadowing": lambda driven: driven.reach(State.SHADOWING),
    "step 0": lambda driven: later_step(driven, 0),
    "step 1": lambda driven: later_step(driven, 1),
    "step 2": lambda driven: later_step(driven, 2),
    "awaiting": lambda driven: driven.reach(State.AWAITING),
    "inconclusive": held,
    "held by drift": lambda driven: driven.reach(State.HOLD),
    "promoting": lambda driven: driven.reach(State.PROMOTING),
    "promoted": lambda driven: driven.reach(State.PROMOTED),
}
NEVER_PAUSED: Final = {"promoting", "promoted"}
HOLDABLE: Final = {"shadowing", "step 0", "step 1", "step 2", "awaiting", "inconclusive", "held by drift"}

places = pytest.mark.parametrize(
    ("place", "paused"),
    [(place, paused) for place in PLACES for paused in (False, True) if not paused or place not in NEVER_PAUSED],
)
kinds = pytest.mark.parametrize("kind", KINDS)


def brought(place: str, spec: RolloutSpec, *, paused: bool) -> Driven:
    driven = Driven(spec)
    extra = dict(spec.gates).get("extra")
    if isinstance(extra, RateGate) and extra.paired and place not in {"pending", "loading"}:
        driven.reach(State.SHADOWING).tick(extra=AGREE)  # or it would never serve
    PLACES[place](driven)
    if paused:
        driven.order(Order.PAUSE)
    return driven


def breached(driven: Driven, kind: Kind) -> tuple[Any, ...]:
    """The answer to the look that completes the breach. Looks before it change nothing."""
    state = driven.state
    for _ in range(kind.looks - 1):
        driven.tick(extra=kind.breach)
        assert driven.state is state
    return driven.tick(extra=kind.breach)


@places
@kinds
def test_a_gate_that_rolls_back_does_so_from_everywhere(kind: str, place: str, paused: bool) -> None:
    driven = brought(place, spec_with(KINDS[kind], Reaction.ROLLBACK), paused=paused)
    actions = breached(driven, KINDS[kind])
    assert driven.state is State.ROLLING_BACK
    assert "extra" in driven.rollout.reason
    assert published(actions) == [Publish(driven.rollout.serial, "7", 0)]
    assert (MoveAlias("8", "7") in actions) == (place in NEVER_PAUSED)
    confirm(driven)
    assert driven.state is State.ROLLED_BACK
    assert driven.rollout.failed


@places
@kinds
def test_a_gate_that_holds_lets_nothing_go_forward(kind: str, place: str, paused: bool) -> None:
    driven = brought(place, spec_with(KINDS[kind], Reaction.HOLD), paused=paused)
    before, step = driven.state, driven.rollout.step
    breached(driven, KINDS[kind])
    assert driven.state is (State.HOLD if place in HOLDABLE else before)
    for _ in range(30):  # what else is shown meanwhile does not help
        driven.tick(errors=GOOD, ceiling=OneArm(500, 2), diverge=AGREE, drift=Level(0.0), extra=KINDS[kind].breach)
    assert driven.rollout.step == step
    assert driven.state is (State.HOLD if place in HOLDABLE else before)
    if place in HOLDABLE:
        with pytest.raises(RolloutRefused):
            driven.order(Order.APPROVE)


@kinds
def test_a_breach_while_it_goes_back_already_changes_nothing(kind: str) -> None:
    driven = brought("step 0", spec_with(KINDS[kind], Reaction.ROLLBACK), paused=False)
    driven.order(Order.ABORT)
    breached(driven, KINDS[kind])
    driven.tell(Published(driven.rollout.serial))
    assert (driven.state, driven.rollout.failed) == (State.ABORTED, False)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if isinstance(kind.gate, RatioGate | MeanGate)])
def test_the_same_evidence_for_both_arms_is_no_breach(kind: str) -> None:
    """Of gates that compare; what is over a limit of its own is over it whoever else is."""
    same: dict[str, Evidence] = {
        "means": Means(Moments(2_000, 1.0, 2_000.0), Moments(2_000, 1.0, 2_000.0)),
        "by key": (TwoArms(0, 31, 0, 31, 0.5),),
    }
    driven = brought("step 0", spec_with(KINDS[kind], Reaction.ROLLBACK), paused=False)
    for _ in range(60):
        driven.tick(extra=same.get(kind, TwoArms(500, 250, 500, 250)))
    assert driven.state is State.STEP


# --- nothing to look at -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("place", sorted(HOLDABLE))
def test_an_hour_without_traffic_moves_nothing(place: str, paused: bool) -> None:
    driven = brought(place, rollout_spec(steps=STEPS), paused=paused)
    state, step, weight = driven.state, driven.rollout.step, driven.rollout.weight
    log = len(driven.log)
    driven.silence(3_600)
    assert (driven.state, driven.rollout.step, driven.rollout.weight) == (state, step, weight)
    assert driven.log[log:] == []


# --- an incident that both arms share ---------------------------------------------------------------------------------

RUNS: Final = 40


def incident(seed: int, share: float, *, keyed: bool) -> Driven:
    """Five minutes at 0.5 % errors, two of which are at 40 %, of both arms alike; a twentieth of them late, too."""
    rng = np.random.default_rng(seed)
    paying = MeanGate("paid", reaction=Reaction.ROLLBACK)
    gates = (("errors", RatioGate("error")), ("timeouts", RatioGate("timeout")), ("paid", paying))
    steps = (StepSpec(round(share * 10_000), approve=True), StepSpec(10_000))
    driven = Driven(rollout_spec(gates=gates, steps=steps, shadow=None))
    driven.reach(State.LOADING)
    driven.tell(Loaded())
    driven.tick()
    for second in range(300):
        rate = 0.4 if 90 <= second < 210 else 0.005
        units = rng.binomial(400, share), rng.binomial(400, 1 - share)
        errors = [int(rng.binomial(count, rate)) for count in units]
        late = [int(rng.binomial(count, 0.05)) for count in errors]
        paid = Means(*(moments(rng.normal(1 - rate, 1, 20)) for _ in units))
        driven.tick(
            errors=row(units, errors, share if keyed else None),
            timeouts=row(units, late, share if keyed else None),
            paid=paid,
        )
        if driven.state is not State.AWAITING:
            break
    return driven


def row(units: tuple[int, int], events: list[int], share: float | None) -> TwoArms:
    ours, theirs = (0, 0) if share is not None else units
    return TwoArms(int(ours), events[0], int(theirs), events[1], share)


def moments(values: Any) -> Moments:
    found = Moments()
    for value in values:
        found.add(float(value))
    return found


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_a_shared_incident_takes_no_candidate_back(share: float, keyed: bool) -> None:
    ended = [incident(seed, share, keyed=keyed) for seed in range(RUNS)]
    taken = [driven.rollout.reason for driven in ended if driven.state is not State.AWAITING]
    assert len(taken) <= 2, taken  # a level of 5 %
