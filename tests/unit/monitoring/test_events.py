"""An alarm as an event: every value is one that JSON can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np

from monitor.decay import Signal
from monitor.engine import Monitor
from monitor.label_monitor import LabelAlarm
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import Alarm, AlarmRules, QualityScore, Settings, rows_window
from server.monitoring.events import alarm_event, label_event


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
    assert raised["key"] == cleared["key"] == "m:1/0123456789ab/stable//x/drift/1"
    assert raised["psi"] > cleared["psi"]


def test_values_are_plain_and_finite() -> None:
    alarm = alarms()[0]
    odd: dict[str, Any] = {"ks_low": math.nan, "psi_p": math.inf, "rows": np.int64(7)}
    event = alarm_event("m", "1", "ab", replace(alarm, score=replace(alarm.score, **odd)))
    assert (event["ks"], event["psi_p"], event["rows"]) == (None, None, 7)
    assert json.loads(json.dumps(event, allow_nan=False)) == event


def test_alarms_of_a_column_never_share_a_key() -> None:
    alarm = alarms()[0]
    quality = QualityScore("x", "missing", 30, 200, 0.15, 0.01, 1e-9, over=True)
    kinds = [
        alarm,
        replace(alarm, segment="DE"),
        replace(alarm, check="missing", quality=quality),
        replace(alarm, check="above", quality=replace(quality, check="above")),
        replace(alarm, episode=2),
        replace(alarm, arm="canary"),
    ]
    events = [alarm_event("m", "1", "ab" * 32, kind) for kind in kinds]
    assert len({event["key"] for event in events}) == len(kinds)
    assert [event["event"] for event in events[:3]] == ["drift.raised", "drift.raised", "quality.raised"]
    assert events[1]["segment"] == "DE"
    assert "share" not in events[0]
    found = {name: events[2][name] for name in ("check", "feature", "count", "rows", "share", "allowed")}
    assert found == {"check": "missing", "feature": "x", "count": 30, "rows": 200, "share": 0.15, "allowed": 0.01}
    assert alarm_event("m", "1", "ab" * 32, alarm, "other")["key"] != events[0]["key"]


def test_label_alarms_are_of_performance_or_of_calibration() -> None:
    signal = Signal("auc", "label", 0.6, 0.8, 0.2, 0.02, -30.0, 1e-6, True, True, True, False)
    alarm = LabelAlarm("raised", "m", "1", "stable", "DE", "1000rows", 3, 7, 1, 2, signal)
    event = label_event(alarm, "r")
    assert (event["event"], event["key"]) == ("performance.raised", "m:1/r/stable/DE/auc/3")
    assert (event["value"], event["reference"], event["window"], event["slice"]) == (0.6, 0.8, "1000rows", "DE")
    odd = replace(alarm, signal=replace(signal, name="calibration", reference=math.nan))
    assert label_event(odd, "r")["event"] == "calibration.raised"
    assert json.loads(json.dumps(label_event(odd, "r"), allow_nan=False))["reference"] is None
