"""router.rollout.spec: what is stored comes back, and every change is noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router.errors import BadRolloutState
from router.rollout.spec import MeanGate, RatioGate, Reaction, ShadowPhase, StepSpec, spec_from_dict
from tests.support.rollouts import GATES, STEPS, rollout_spec

CHANGES: list[dict[str, Any]] = [
    {},
    {"shadow": None},
    {"alpha": 0.01},
    {"on_crash": "resume"},
    {"gates": (*GATES, ("value", MeanGate("revenue", 0.1, False)))},
    {"gates": (("errors", RatioGate("error", 1.5, Reaction.HOLD)), *GATES[1:])},
    {"steps": (*STEPS[:1], StepSpec(10_000))},
    {"shadow": ShadowPhase(5, 7)},
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_specification_comes_back_as_it_was(change: dict[str, Any]) -> None:
    spec = rollout_spec(**change)
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict(), allow_nan=False))) == spec


def test_every_change_has_a_fingerprint_of_its_own() -> None:
    assert len({rollout_spec(**change).fingerprint() for change in CHANGES}) == len(CHANGES)
    assert rollout_spec().fingerprint() == rollout_spec().fingerprint()


@pytest.mark.parametrize(
    "damage",
    [{"steps": [{}]}, {"steps": None}, {"gates": [["e", {"kind": "magic"}]]}, {"extra": 1}, {"shadow": {"x": 1}}],
)
def test_a_damaged_specification_is_named_so(damage: dict[str, Any]) -> None:
    with pytest.raises(BadRolloutState, match="specification is damaged"):
        spec_from_dict(rollout_spec().to_dict() | damage)


def test_only_a_last_step_of_everything_that_asks_for_nothing_is_the_promotion() -> None:
    assert rollout_spec().serving_steps == STEPS[:2]
    whole = (*STEPS[:2], StepSpec(10_000, approve=True))
    assert rollout_spec(steps=whole).serving_steps == whole
    assert rollout_spec(steps=()).serving_steps == ()
