"""What a trigger remembers, to JSON and back, and what is done with damage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from monitor.errors import StateError
from monitor.retrain.jobs import Job
from monitor.retrain.rules import Champion
from monitor.retrain.state import Condition, Report, TriggerState

FULL = TriggerState(
    champion=Champion("7", "d", 5, 6, "p", {"auc": 0.9}),
    rollout=True,
    conditions=(Condition("drift", "amount", "7", 10, {"psi": 0.3, "bin": "high", "ks": None}, 20, True, "t"),),
    opened_ns=30,
    fired_ns=(1, 2),
    bucket_s=4,
    slot=5,
    scheduled=True,
    aged_ns=6,
    reports=(Report("drift", "job", 7),),
    jobs=(Job("t", "7", ("drift", "age"), 8, "gated", 9, "8", "fine"),),
    dropped=3,
)


@pytest.mark.parametrize("state", [TriggerState(), FULL])
def test_through_json(state: TriggerState) -> None:
    assert TriggerState.from_dict(json.loads(json.dumps(state.to_dict()))) == state


@pytest.mark.parametrize(
    "damage",
    [
        {"format": 2},
        {"jobs": [{}]},
        {"jobs": None},
        {"conditions": [{"kind": "drift"}]},
        {"champion": {"nobody": 1}},
        {"fired_ns": ["x"]},
        {"reports": 7},
    ],
)
def test_damage_is_told(damage: dict[str, Any]) -> None:
    with pytest.raises(StateError):
        TriggerState.from_dict({**FULL.to_dict(), **damage})


@pytest.mark.parametrize("found", [None, [], 7, "", {}])
def test_what_is_no_state_at_all(found: object) -> None:
    with pytest.raises(StateError):
        TriggerState.from_dict(found)


def test_nothing_lies_in_the_future() -> None:
    assert FULL.not_after(100) is FULL
    held = FULL.not_after(5)
    assert held.fired_ns == (1, 2)
    assert (held.opened_ns, held.aged_ns) == (5, 5)
    assert (held.conditions[0].since_ns, held.conditions[0].cleared_ns) == (5, 5)
    assert held.reports[0].at_ns == held.jobs[0].state_ns == 5
