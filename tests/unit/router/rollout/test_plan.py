"""router.rollout.plan: every mistake named, failed digests kept out, and the expected time of steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from router.errors import BadRollout, RolloutRefused
from router.rollout.plan import FailedAttempt, Traffic, admit, certificate_times, check, plan
from router.rollout.spec import (
    NS_PER_S,
    LevelGate,
    MeanGate,
    MismatchGate,
    RateGate,
    RatioGate,
    Reaction,
    ShadowPhase,
    StepSpec,
)
from tests.support.rollouts import GATES, STEPS, rollout_spec

ERRORS = (("errors", RatioGate("error")),)


def gates(*extra: Any) -> dict[str, Any]:
    return {"gates": (*GATES, ("extra", extra[0]))}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"id": ""}, "id: wanted a name"),
    ({"candidate": "7"}, "candidate: wanted another version than stable, got 7"),
    ({"alpha": 1.0}, "alpha: wanted over 0 and under 1"),
    ({"approvals": 0}, "approvals: wanted at least 1"),
    ({"on_crash": "pray"}, "on_crash: wanted rollback or resume, got 'pray'"),
    ({"inconclusive_then": "advance"}, "inconclusive_then: wanted hold or rollback, got 'advance'"),
    ({"load_timeout_ns": 0}, "load_timeout_ns: wanted over 0"),
    ({"cooldown_ns": -1}, "cooldown_ns: wanted 0 or more"),
    ({"shadow": ShadowPhase(0)}, "shadow: wanted at least 1 pair"),
    ({"shadow": ShadowPhase(), "gates": ERRORS}, "shadow: wanted a paired gate"),
    ({"gates": ()}, "gates: wanted at least one gate that rolls back"),
    ({"gates": (("errors", RatioGate("error", reaction=Reaction.HOLD)),)}, "at least one gate that rolls back"),
    ({"gates": (*GATES, GATES[0])}, "gates: wanted different names"),
    (gates(RatioGate("e", 0.9)), "gates.extra.worse_than: wanted a ratio of 1 or more, got 0.9"),
    (gates(RatioGate("e", math.nan)), "gates.extra.worse_than"),
    (gates(RatioGate("")), "gates.extra.source: wanted the name of what is judged"),
    (gates(RateGate("e", 1.0)), "gates.extra.max_rate: wanted over 0% and under 100%"),
    (gates(MeanGate("m", -1.0)), "gates.extra.worse_by: wanted 0 or more"),
    (gates(LevelGate("psi", 0.2, 0)), "at least one look"),
    (gates(MismatchGate(0.0)), "gates.extra.alpha"),
    ({"steps": ()}, "steps: wanted at least one step"),
    ({"steps": (StepSpec(10_000),)}, "steps: wanted at least one step before the promotion"),
    ({"steps": (StepSpec(500, approve=True), StepSpec(100, approve=True))}, "steps.1.weight: wanted over 5%"),
    ({"steps": (StepSpec(0, approve=True),)}, "steps.0.weight: wanted over 0%"),
    ({"steps": (StepSpec(10_001, approve=True),)}, "steps.0.weight"),
    ({"steps": (StepSpec(100),)}, "steps.0.certify: wanted certificates or an approval"),
    ({"steps": (StepSpec(100, -1, approve=True),)}, "steps.0.min: wanted 0 or more"),
    ({"steps": (StepSpec(100, 10**14, approve=True),)}, r"less than inconclusive.after"),
    ({"steps": (StepSpec(100, 0, (("nobody", 2.0),)),)}, "steps.0.certify.nobody: wanted one of the gates errors, "),
    ({"steps": (StepSpec(100, 0, (("errors", 1.0),)),)}, "steps.0.certify.errors: wanted a ratio over 1, got 1"),
    ({"steps": (StepSpec(100, 0, (("ceiling", 0.5),)),)}, "wanted a rate over 0 and at most the gate's 0.02, got 0.5"),
    ({"steps": (StepSpec(100, 0, (("drift", 0.5),)),)}, "this kind of gate certifies nothing"),
    ({"steps": (StepSpec(10_000, 0, (("errors", 2.0),)),)}, "at 100% stable has no traffic to compare with"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_are_named_with_their_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRollout, match=message):
        check(rollout_spec(**change))


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(BadRollout) as caught:
        check(rollout_spec(alpha=2.0, approvals=0, steps=()))
    assert len(caught.value.problems) == 3


def test_what_is_sound_passes_and_homes_are_counted() -> None:
    check(rollout_spec())
    check(rollout_spec(steps=(*STEPS[:2], StepSpec(10_000, 0, (("ceiling", 0.02),)))))
    with pytest.raises(BadRollout, match=r"steps.2.weight: wanted over 5% \(weights grow\) and at most 50%, got 100%"):
        check(rollout_spec(), arms=2)


# --- retrying ---------------------------------------------------------------------------------------------------------


def test_a_failed_digest_waits_is_cleared_or_is_forced() -> None:
    failed = FailedAttempt("r-0", "sha256:8", 100 * NS_PER_S, 1_800 * NS_PER_S)
    spec = rollout_spec()
    with pytest.raises(
        RolloutRefused, match=r"sha256:8 failed in rollout 'r-0'; try again in 900 s, clear it, or force"
    ):
        admit(spec, [failed], 1_000 * NS_PER_S)
    admit(spec, [failed], 1_900 * NS_PER_S)
    admit(spec, [failed], 1_000 * NS_PER_S, force=True)
    admit(spec, [FailedAttempt("r-0", "sha256:8", 0, 10**18, cleared=True)], 5)
    admit(rollout_spec(digest="sha256:9"), [failed], 1_000 * NS_PER_S)


def test_an_id_is_never_used_twice() -> None:
    with pytest.raises(RolloutRefused, match="this id was used before"):
        admit(rollout_spec(), [FailedAttempt("r-1", "sha256:5", 0, 0)], 10, force=True)


# --- how long ---------------------------------------------------------------------------------------------------------

#: Seconds by which 90 % of equal candidates had certified "under 2x" at 1,000 rps and 0.5 %, found by simulation.
SIMULATED = {0.01: 419, 0.02: 202, 0.05: 100, 0.10: 55, 0.25: 31, 0.50: 28}


@pytest.mark.parametrize(("share", "seconds"), SIMULATED.items())
def test_the_estimate_is_what_simulation_finds(share: float, seconds: float) -> None:
    times = certificate_times(RatioGate("error"), "errors", 2.0, share, Traffic(1_000, {"errors": 0.005}), 0.05)
    assert times is not None
    assert times[1] == pytest.approx(seconds, rel=0.2)
    assert times[0] < times[1]


def test_it_goes_with_one_over_the_events_per_second() -> None:
    def seconds(rps: float, base: float) -> float:
        times = certificate_times(RatioGate("error"), "errors", 2.0, 0.05, Traffic(rps, {"errors": base}), 0.05)
        assert times is not None
        return times[1]

    assert seconds(100, 0.005) == pytest.approx(10 * seconds(1_000, 0.005))
    assert seconds(1_000, 0.001) == pytest.approx(5 * seconds(1_000, 0.005))


def test_a_plan_names_the_gate_that_takes_longest() -> None:
    steps = (
        StepSpec(100, 600 * NS_PER_S, (("errors", 4.0),)),
        StepSpec(500, 1 * NS_PER_S, (("ceiling", 0.02), ("errors", 2.0))),
        StepSpec(1_000, 30 * NS_PER_S, approve=True),
        StepSpec(10_000),
    )
    traffic = Traffic(1_000, {"errors": 0.005, "ceiling": 0.005})
    first, second, third = plan(rollout_spec(steps=steps), traffic)
    assert (first.gate, first.median_s, first.p90_s) == ("", 600, 600)
    assert second.gate == "errors"
    assert second.p90_s == pytest.approx(92, abs=3)
    assert (third.gate, third.p90_s, third.approve) == ("", 30, True)
    quiet = plan(rollout_spec(steps=steps), Traffic(0, {}))
    assert [(step.gate, step.p90_s) for step in quiet] == [("errors", None), ("ceiling", None), ("", 30)]


def test_what_cannot_be_certified_has_no_time() -> None:
    bad = Traffic(1_000, {"g": 0.05})
    assert certificate_times(RateGate("e", 0.02), "g", 0.02, 0.5, bad, 0.05) is None
    assert certificate_times(RatioGate("e"), "g", 2.0, 1.0, bad, 0.05) is None
    assert certificate_times(RatioGate("e"), "g", 2.0, 0.5, Traffic(1_000, {"g": 0.0}), 0.05) is None
    assert certificate_times(MeanGate("m"), "g", 2.0, 0.5, bad, 0.05) is None
    never = certificate_times(RateGate("e", 0.02), "g", 0.02, 0.5, Traffic(1_000, {"g": 0.0}), 0.05)
    assert never is not None
    assert never[0] == never[1] == pytest.approx(0.46, abs=0.05)


def test_a_matched_slice_costs_time() -> None:
    both = [
        certificate_times(RatioGate("e"), "g", 2.0, 0.05, Traffic(1_000, {"g": 0.005}, matched=matched), 0.05)
        for matched in (False, True)
    ]
    assert both[0] is not None
    assert both[1] is not None
    assert both[1][1] > 1.5 * both[0][1]
