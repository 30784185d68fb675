"""Rules that make no sense are refused; the same rules have the same digest."""

from __future__ import annotations

from typing import Any

import pytest

from monitor.errors import SettingsError
from monitor.retrain.rules import DAY_NS, MAX_BUDGET, RetrainRules, Schedule, SignalRule


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"cooldown_ns": -1},
        {"coalesce_ns": -1},
        {"clear_after_ns": -1},
        {"lost_after_ns": 0},
        {"budget": 0},
        {"budget": MAX_BUDGET + 1},
        {"age_ns": 0},
        {"data_age_ns": -5},
    ],
)
def test_impossible_rules(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        RetrainRules(**{"model": "m", **wrong})


@pytest.mark.parametrize("wrong", [{"at_least": 0}, {"hold_ns": -1}, {"names": ("a",), "at_least": 2}])
def test_impossible_signals(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        SignalRule(**wrong)


@pytest.mark.parametrize(("every", "offset"), [(0, 0), (-1, 0), (10, 10), (10, -1)])
def test_impossible_schedules(every: int, offset: int) -> None:
    with pytest.raises(SettingsError):
        Schedule(every, offset)


def test_slots() -> None:
    schedule = Schedule(DAY_NS, DAY_NS // 4)
    assert schedule.slot(DAY_NS // 4 - 1) == -1
    assert schedule.slot(DAY_NS // 4) == 0
    assert schedule.slot(DAY_NS * 5 // 4) == 1


def test_the_digest_is_of_all_rules() -> None:
    rules = RetrainRules("m", drift=SignalRule(("a",)), schedule=Schedule(DAY_NS))
    assert rules.digest() == RetrainRules("m", drift=SignalRule(("a",)), schedule=Schedule(DAY_NS)).digest()
    assert rules.digest() != RetrainRules("m", drift=SignalRule(("b",)), schedule=Schedule(DAY_NS)).digest()
