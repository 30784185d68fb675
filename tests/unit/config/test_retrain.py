"""``models.NAME.retrain``: what it takes, refuses and becomes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from monitor.retrain.rules import DAY_NS, HOUR_NS, SECOND_NS, RetrainRules, Schedule, SignalRule
from server.config.retrain import Retrain, compile_retrain, retrain_contradictions
from server.retraining import RetrainSpec

MINUTE = 60 * SECOND_NS


def read(**section: Any) -> Retrain:
    return Retrain.model_validate({"sinks": ["train"], **section})


def test_nothing_said_waits_for_people() -> None:
    assert compile_retrain("fraud", read()) == RetrainSpec(RetrainRules("fraud"), ("train",))


def test_everything_said() -> None:
    section = read(
        on={
            "drift": {"features": ["amount", "hour"], "at_least": 2, "hold": "10m"},
            "labels": {"signals": ["auc"]},
            "calibration": {},
            "age": "30d",
            "data_age": "60d",
            "schedule": "24h",
        },
        sinks=["train", "log"],
        coalesce="5m",
        cooldown="12h",
        budget="5 per day",
        lost_after="48h",
        clear_after="1h",
    )
    assert list(retrain_contradictions(section, ("models", "fraud", "retrain"), {"train": 1, "log": 2})) == []
    assert compile_retrain("fraud", section) == RetrainSpec(
        RetrainRules(
            "fraud",
            drift=SignalRule(("amount", "hour"), 2, 10 * MINUTE),
            labels=SignalRule(("auc",)),
            calibration=SignalRule(),
            age_ns=30 * DAY_NS,
            data_age_ns=60 * DAY_NS,
            schedule=Schedule(DAY_NS),
            coalesce_ns=5 * MINUTE,
            cooldown_ns=12 * HOUR_NS,
            budget=5,
            lost_after_ns=2 * DAY_NS,
            clear_after_ns=HOUR_NS,
        ),
        ("train", "log"),
    )


def test_a_time_of_every_day() -> None:
    rules = compile_retrain("m", read(on={"schedule": "13:30 UTC"})).rules
    assert rules.schedule == Schedule(DAY_NS, 13 * HOUR_NS + 30 * MINUTE)


@pytest.mark.parametrize(
    ("section", "wanted"),
    [
        ({"sinks": []}, "at least 1"),
        ({"sinks": ["No Name"]}, "sink's name"),
        ({"on": {"schedule": "13:30"}}, "03:30 UTC"),
        ({"on": {"schedule": 810}}, "03:30 UTC"),
        ({"on": {"schedule": "24:00 UTC"}}, "03:30 UTC"),
        ({"on": {"schedule": "1s"}}, "1m to 366d"),
        ({"on": {"age": "1s"}}, "1m to 3650d"),
        ({"on": {"weather": {}}}, "Extra inputs"),
        ({"on": {"drift": {"at_least": 0}}}, "greater than or equal to 1"),
        ({"on": {"drift": {"signals": ["auc"]}}}, "Extra inputs"),
        ({"budget": 3}, "3 per day"),
        ({"budget": "0 per day"}, "3 per day"),
        ({"budget": "1001 per day"}, "at most 1000"),
        ({"budget": "3 per hour"}, "3 per day"),
        ({"cooldown": "-1s"}, "duration"),
        ({"cooldown": "400d"}, "0s to 366d"),
        ({"lost_after": "1s"}, "1m to 3650d"),
    ],
)
def test_what_is_refused(section: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValidationError, match=wanted):
        read(**section)


def test_sinks_have_to_be_somewhere() -> None:
    with pytest.raises(ValidationError, match="sinks"):
        Retrain.model_validate({})


def test_contradictions() -> None:
    section = read(sinks=["train", "train", "nobody"], on={"labels": {"signals": ["auc"], "at_least": 2}})
    found = list(retrain_contradictions(section, ("models", "m", "retrain"), ["train", "log"]))
    assert len(found) == 3
    assert found[0].path == ("models", "m", "retrain", "sinks", 1)
    assert found[0].message == "sink train is named twice"
    assert found[1].path == ("models", "m", "retrain", "sinks", 2)
    assert found[1].message == "alerts.sinks has no nobody; it has train, log"
    assert found[2].path == ("models", "m", "retrain", "on", "labels", "at_least")
