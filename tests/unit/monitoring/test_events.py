"""An alarm as an event: every value is one that JSON can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Alarm, AlarmRules, Settings, rows_window
from server.monitoring.events import alarm_event


def alarms() -> list[Alarm]:
    stream = np.random.default_rng(1)
    found: list[Alarm] = []
    settings = Settings(windows=(rows_window(200),), rules=AlarmRules(k=1, m=1, clear_looks=1))
    profile = ReferenceProfile.from_arrays({"x": stream.standard_normal((5000, 1)).astype("f4")})
    monitor = Monitor("m", "1", profile, settings, on_alarm=lambda _, alarm: found.append(alarm))
    for shift in (1.0, 0.0):
        rows = (stream.standard_normal((600, 1)) + shift).astype("f4")
        monitor.ingest(monitor.keys, [Item(1, "stable", 600, 0, [[rows.tobytes()]])])
    return found


def test_a_raise_and_its_end_have_one_key() -> None:
    raised, cleared = (alarm_event("m", "1", "0123456789abcdef", alarm) for alarm in alarms())
    assert (raised["event"], cleared["event"]) == ("drift.raised", "drift.cleared")
    assert raised["key"] == cleared["key"] == "m:1/0123456789ab/stable/x/1"
    assert raised["psi"] > cleared["psi"]


def test_values_are_plain_and_finite() -> None:
    alarm = alarms()[0]
    odd: dict[str, Any] = {"ks_low": math.nan, "psi_p": math.inf, "rows": np.int64(7)}
    event = alarm_event("m", "1", "ab", replace(alarm, score=replace(alarm.score, **odd)))
    assert (event["ks"], event["psi_p"], event["rows"]) == (None, None, 7)
    assert json.loads(json.dumps(event, allow_nan=False)) == event
