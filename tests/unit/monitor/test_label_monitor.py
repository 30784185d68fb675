"""From the join to the alarm: decay that inputs do not show is found, once, in the right group."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss, roc_auc_score

from monitor import sealed
from monitor.errors import SettingsError, StateError
from monitor.label_monitor import LabelAlarm, LabelMonitor, merge_states
from monitor.label_state import SavedLabels, reference_rows, to_profile
from monitor.outcomes import LabelRules, LabelSettings
from monitor.types import SECOND_NS, AlarmRules, rows_window, time_window


@dataclass
class Output:
    data: bytes
    name: str = "p"
    datatype: str = "FP64"


class Traffic:
    """Answers and their labels, one request per row, into a monitor."""

    def __init__(self, monitor: LabelMonitor, seed: int = 0) -> None:
        self.monitor, self.rng, self.sent = monitor, np.random.default_rng(seed), 0

    def send(self, count: int, noise: float = 0.0, arm: str = "stable", part: str = "", labels: float = 1.0) -> None:
        """Calibrated scores; with probability ``noise`` the label is a coin's. ``labels``: share of rows labelled."""
        for start in range(0, count, 500):
            for score in self.rng.beta(1, 3, min(500, count - start)):
                self.sent += 1
                name, now = f"r{self.sent}", self.sent * 1000
                self.monitor.join.remember([name], "1", arm, 1, [Output(np.float64(score).tobytes())], part, now)
                if self.rng.random() < labels:
                    chance = 0.25 if self.rng.random() < noise else score
                    self.monitor.join.label(name, 0, int(self.rng.random() < chance), "", now + 10)
            self.monitor.drain(self.sent * 1000 + 20)


def monitor_of(alarms: list[LabelAlarm] | None = None, **settings: Any) -> LabelMonitor:
    wanted = LabelSettings(**{"task": "binary", "output": "p", **settings})
    return LabelMonitor("m", wanted, None if alarms is None else alarms.append)


def test_decay_is_one_alarm_per_signal_and_ends() -> None:
    alarms: list[LabelAlarm] = []
    monitor = monitor_of(alarms, windows=(rows_window(1000),))
    traffic = Traffic(monitor)
    traffic.send(8000)
    assert alarms == []
    traffic.send(4000, noise=0.8)
    raised = [alarm.signal.name for alarm in alarms]
    assert {"accuracy", "auc", "log_loss"} <= set(raised)
    assert len(raised) == len(set(raised))
    assert {alarm.state for alarm in alarms} == {"raised"}
    assert monitor.in_alarm() == [(("1", "stable", ""), [n for n in monitor.settings.signals if n in raised])]
    first = alarms[0]
    assert (first.model, first.version, first.arm, first.slice, first.window) == ("m", "1", "stable", "", "1000rows")
    assert first.signal.over
    assert first.end_ns > first.start_ns > 0
    traffic.send(8000)
    assert sorted(alarm.signal.name for alarm in alarms if alarm.state == "cleared") == sorted(raised)
    assert monitor.in_alarm() == []
    assert {alarm.episode for alarm in alarms} == {1}


def test_the_slice_that_decays_is_named() -> None:
    alarms: list[LabelAlarm] = []
    rules = LabelRules(learn_rows=1000, alarm=AlarmRules(ert_rows=1_000_000))
    traffic = Traffic(monitor_of(alarms, windows=(rows_window(1000),), rules=rules))
    for _ in range(10):
        for part in ("eu", "us"):
            traffic.send(500, part=part)
    assert alarms == []
    for _ in range(5):
        traffic.send(500, part="eu", noise=0.9)
        traffic.send(500, part="us")
    assert {alarm.slice for alarm in alarms} == {"eu", ""}


def test_windows_of_time_need_enough_rows() -> None:
    alarms: list[LabelAlarm] = []
    rules = LabelRules(reference={"accuracy": 0.999}, learn_rows=0, alarm=AlarmRules(min_rows=300))
    monitor = monitor_of(alarms, windows=(time_window(10, 1),), rules=rules)
    traffic = Traffic(monitor)
    traffic.send(299)
    for second in range(1, 40):
        monitor.drain(second * SECOND_NS)
    assert alarms == []
    traffic.send(1)
    assert monitor.report()["windows"][0]["rows"] in (0, 299)


def test_report_is_plain_and_says_what_is_an_estimate() -> None:
    monitor = monitor_of()
    traffic = Traffic(monitor)
    traffic.send(1000, part="eu")
    assert monitor.report()["learning"] == [
        {"version": "1", "arm": "stable", "slice": "", "rows_missing": 1000},
        {"version": "1", "arm": "stable", "slice": "eu", "rows_missing": 1000},
    ]
    assert monitor.report()["estimates"] == []
    traffic.send(3000)
    report = json.loads(json.dumps(monitor.report()))
    assert report["join"]["groups"][0]["joined"] == 3000
    assert report["join"]["groups"][1]["slice"] == "eu"
    assert report["join"]["remembered_rows"] == 4000
    assert [(w["slice"], w["window"], w["rows"]) for w in report["windows"]] == [
        ("", "1000rows", 1000), ("", "10000rows", 4000), ("eu", "1000rows", 1000), ("eu", "10000rows", 1000),
    ]  # fmt: skip
    whole = report["windows"][0]
    assert {signal["name"] for signal in whole["signals"]} == set(monitor.settings.signals)
    assert 0 < whole["signals"][0]["p"] <= 1
    assert whole["in_alarm"] == []
    (estimate,) = report["estimates"]
    assert (estimate["version"], estimate["arm"], estimate["estimated"]) == ("1", "stable", True)
    assert estimate["rows"] == 4000
    assert estimate["metrics"]["auc"]["low"] < whole["metrics"]["auc"] < estimate["metrics"]["auc"]["high"] + 0.05


def test_estimates_follow_what_has_no_label_yet() -> None:
    monitor = monitor_of(rules=LabelRules(learn_rows=500), estimate_rows=100)
    traffic = Traffic(monitor)
    traffic.send(600)
    for number in range(100):
        monitor.join.remember([f"x{number}"], "1", "stable", 1, [Output(np.float64(0.01).tobytes())], "", 10**9)
    monitor.drain(10**9)
    (estimate,) = monitor.report()["estimates"]
    assert estimate["metrics"]["base_rate"]["value"] < 0.05


def test_multiclass_and_regression() -> None:
    rng = np.random.default_rng(1)
    many = monitor_of(task="multiclass", classes=("a", "b", "c"), rules=LabelRules(learn_rows=300))
    flat = monitor_of(task="regression", rules=LabelRules(learn_rows=300))
    for number in range(1200):
        scores = rng.dirichlet(np.ones(3))
        many.join.remember([f"{number}"], "1", "stable", 1, [Output(scores.tobytes())], "", number)
        many.join.label(f"{number}", 0, "abc"[int(rng.choice(3, p=scores))], "", number)
        flat.join.remember([f"{number}"], "1", "stable", 1, [Output(scores[:1].tobytes())], "", number)
        flat.join.label(f"{number}", 0, float(scores[0] + rng.normal()), "", number)
    assert len(many.drain(1200)) == len(flat.drain(1200)) == 1200
    report = many.report()
    (estimate,) = report["estimates"]
    observed = report["windows"][0]["metrics"]["accuracy"]
    assert abs(estimate["metrics"]["accuracy"]["value"] - observed) < 0.06
    assert flat.report()["estimates"] == []
    assert flat.report()["windows"][0]["metrics"]["rmse"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("before", [0, 500])
def test_a_given_reference_needs_no_learning(before: int) -> None:
    alarms: list[LabelAlarm] = []
    monitor, rng = monitor_of(alarms, windows=(rows_window(1000),)), np.random.default_rng(2)
    traffic = Traffic(monitor)
    traffic.send(before)
    scores = rng.beta(1, 3, 5000)
    monitor.learn("1", scores[:, None], (rng.random(5000) < scores).astype("f8"))
    traffic.send(2500, noise=0.9)
    assert monitor.report()["learning"] == []
    assert "auc" in {alarm.signal.name for alarm in alarms}
    assert len(monitor.report()["estimates"]) == 1


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        (np.zeros((3, 2)), np.zeros(3)),
        (np.zeros(3), np.zeros(3)),
        (np.zeros((3, 1)), np.zeros(2)),
        (np.zeros((0, 1)), np.zeros(0)),
        (np.full((3, 1), 2.0), np.zeros(3)),
        (np.zeros((3, 1)), np.full(3, 0.5)),
        (np.full((3, 1), np.nan), np.zeros(3)),
    ],
)
def test_a_reference_that_does_not_fit(predictions: np.ndarray, labels: np.ndarray) -> None:
    with pytest.raises(SettingsError):
        monitor_of().learn("1", predictions, labels)


def test_groups_are_bounded() -> None:
    monitor = monitor_of(max_groups=2)
    traffic = Traffic(monitor)
    for number in range(5):
        traffic.send(10, arm=f"arm{number}")
    report = monitor.report()
    assert {window["arm"] for window in report["windows"]} == {"arm3", "arm4"}
    assert report["forgotten_groups"] == 3


def test_restart_forgets_windows_and_keeps_the_join() -> None:
    monitor = monitor_of()
    traffic = Traffic(monitor)
    traffic.send(1000, labels=0.5)
    monitor.restart()
    report = monitor.report()
    assert report["windows"] == []
    assert report["join"]["groups"][0]["predicted"] == 1000


def test_states_of_several_processes_give_the_metrics_of_one() -> None:
    windows = (time_window(100, 10),)
    parts, whole = [monitor_of(windows=windows) for _ in range(3)], monitor_of(windows=windows)
    rng = np.random.default_rng(3)
    for number in range(900):
        now = number * SECOND_NS // 10
        score, label = float(rng.random()), int(rng.integers(2))
        for monitor in (parts[number % 3], whole):
            monitor.join.remember([f"{number}"], "1", "stable", 1, [Output(np.float64(score).tobytes())], "", now)
            monitor.join.label(f"{number}", 0, label, "", now)
            monitor.drain(now)
    for monitor in (*parts, whole):
        monitor.drain(91 * SECOND_NS)
    (merged,) = whole.windows(merge_states([part.state() for part in parts]))
    (single,) = whole.windows(whole.state())
    assert merged == single
    assert merged["rows"] == 900
    with pytest.raises(StateError):
        merge_states([])


def test_samples_are_few_and_finite() -> None:
    monitor = monitor_of()
    traffic = Traffic(monitor)
    traffic.send(1200, part="eu")
    samples = monitor.samples()
    assert all(math.isfinite(sample.value) for sample in samples)
    assert len({(sample.name, *sorted(sample.labels.items())) for sample in samples}) == len(samples)
    joined = [s.value for s in samples if s.name == "label_rows_total" and s.labels["fate"] == "joined"]
    assert joined == [1200.0]
    assert {s.labels["metric"] for s in samples if s.name == "performance"} >= {"auc", "accuracy", "brier", "ece"}
    assert not any("slice" in s.labels for s in samples if s.name == "performance")
    alarms = [s for s in samples if s.name == "performance_alarm"]
    assert len(alarms) == 2 * len(monitor.settings.signals)


def test_samples_follow_every_pane_that_closes() -> None:
    monitor = monitor_of(windows=(rows_window(200),))
    traffic = Traffic(monitor)
    for noise in (0.0, 1.0, 0.0):
        traffic.send(300, noise=noise)
        for _ in range(2):  # the second time from what was made the first time
            shown = {s.labels["metric"]: s.value for s in monitor.samples() if s.name == "performance"}
            (window,) = monitor.report()["windows"]
            assert shown["auc"] == window["metrics"]["auc"]
            assert shown["accuracy"] == window["metrics"]["accuracy"]


# --- over a restart ---


def after_restart(monitor: LabelMonitor, alarms: list[LabelAlarm] | None = None) -> LabelMonitor:
    """Another process's monitor that goes on from what this one has learnt."""
    settings = monitor.settings
    again = LabelMonitor("m", settings, None if alarms is None else alarms.append)
    again.restore(SavedLabels.from_bytes(monitor.snapshot("mark", "run"), settings.exact_rows))
    return again


def told(alarms: list[LabelAlarm]) -> list[tuple[Any, ...]]:
    return [(a.state, a.signal.name, a.slice, a.window, a.episode, a.look, a.start_ns, a.end_ns) for a in alarms]


def test_restarts_change_neither_windows_nor_alarms() -> None:
    """Wherever they fall: within a pane, while the reference is learnt, in an alarm."""
    kept: list[LabelAlarm] = []
    broken: list[LabelAlarm] = []
    windows = (rows_window(400, 200), rows_window(800, 200), time_window(0.004, 0.001))
    settings: dict[str, Any] = {"windows": windows, "rules": LabelRules(learn_rows=700)}
    whole, parted = Traffic(monitor_of(kept, **settings)), Traffic(monitor_of(broken, **settings))
    for count, noise in ((333, 0.0), (1900, 0.0), (1117, 0.9), (1000, 0.9), (2500, 0.0)):
        for traffic in (whole, parted):
            traffic.send(count, noise, part="eu" if count > 1000 else "")
        parted.monitor = after_restart(parted.monitor, broken)
        mine, its = parted.monitor.report(), whole.monitor.report()
        assert json.dumps(mine["windows"]) == json.dumps(its["windows"])
        assert mine["learning"] == its["learning"]
    assert {alarm.state for alarm in kept} == {"raised", "cleared"}
    assert told(broken) == told(kept)
    assert repr(parted.monitor.past_alarms("1")) == repr(kept)
    assert parted.monitor.past_alarms("2") == []


def decayed() -> LabelMonitor:
    traffic = Traffic(monitor_of(windows=(rows_window(1000),)))
    traffic.send(4000)
    traffic.send(4000, noise=0.8)
    return traffic.monitor


def resealed(monitor: LabelMonitor, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> SavedLabels:
    """What the monitor saves, with another header or other arrays."""
    header, arrays, _ = sealed.unpack(monitor.snapshot("mark", "run"), "label state", StateError, "state")
    change(header, arrays)
    return SavedLabels.from_bytes(sealed.pack("label state", header, arrays), monitor.settings.exact_rows)


def test_a_state_of_before_has_no_past_alarms_and_all_else() -> None:
    monitor = decayed()
    again = LabelMonitor("m", monitor.settings)
    again.restore(resealed(monitor, lambda header, arrays: (header.pop("past"), arrays.pop("past/wholes"))))
    assert monitor.past_alarms("1") != []
    assert again.past_alarms("1") == []
    assert again.in_alarm() == monitor.in_alarm() != []


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.update(past=7),
        lambda header, arrays: header["past"].update(texts=[["raised"]]),
        lambda header, arrays: arrays.pop("past/numbers"),
        lambda header, arrays: arrays.update({"past/wholes": -arrays["past/wholes"]}),
    ],
)
def test_past_alarms_that_are_damaged_refuse_the_state(change: Callable[[Any, Any], object]) -> None:
    monitor = decayed()
    again = LabelMonitor("m", monitor.settings)
    with pytest.raises(StateError, match="damaged"):
        again.restore(resealed(monitor, change))
    assert (again.past_alarms("1"), again.in_alarm(), again.report()["windows"]) == ([], [], [])


def test_decayed_behaviour_does_not_become_the_norm_by_a_restart() -> None:
    alarms: list[LabelAlarm] = []
    traffic = Traffic(monitor_of(alarms, windows=(rows_window(1000),)))
    traffic.send(4000)
    traffic.monitor = after_restart(traffic.monitor, alarms)
    traffic.send(4000, noise=0.8)
    assert "accuracy" in {alarm.signal.name for alarm in alarms}
    raised = len(alarms)
    traffic.monitor = after_restart(traffic.monitor, alarms)
    assert traffic.monitor.in_alarm()
    traffic.send(4000, noise=0.8)
    assert len(alarms) == raised == len(traffic.monitor.past_alarms("1"))


def test_counts_go_on_and_what_waited_is_joined() -> None:
    traffic = Traffic(monitor_of(windows=(rows_window(100),), capacity_rows=800))
    traffic.send(2500)  # a reference, so that there is an estimate
    traffic.send(1000, labels=0.5)
    traffic.monitor.join.label("early", 0, 1, "", 10**7)
    traffic.monitor.drain(10**7)
    before = traffic.monitor.report()
    traffic.monitor = after_restart(traffic.monitor)
    after = traffic.monitor.report()
    assert after["join"] == before["join"]
    assert before["estimates"][0]["rows"] == 3500
    assert after["estimates"][0]["rows"] == 800  # of the predictions that are remembered
    (group,) = before["join"]["groups"]
    assert group["waiting"] > 300
    for number in range(2701, 3501):
        traffic.monitor.join.label(f"r{number}", 0, 1, "", 10**7)
    traffic.monitor.join.remember(["early"], "1", "stable", 1, [Output(np.float64(0.5).tobytes())], "", 10**7)
    assert len(traffic.monitor.drain(10**7)) == group["waiting"] + 1


HOUR_NS = 3600 * SECOND_NS
HOURS = LabelSettings(
    "binary", "p", windows=(time_window(24 * 3600, 3600), time_window(7200, 3600)), rules=LabelRules(learn_rows=0),
    max_age_ns=10**18, late_ns=HOUR_NS // 2, hold_ns=10**18,
)  # fmt: skip


@pytest.mark.parametrize("told", [True, False])
def test_windows_of_time_are_what_scikit_learn_finds_on_the_rows_of_these_hours(told: bool) -> None:
    """Labels up to two days late, out of order, twice and early, with restarts in the middle of it."""
    monitor, rng, count, end = LabelMonitor("m", HOURS), np.random.default_rng(8), 3000, 1061 * HOUR_NS
    scores = rng.random(count)
    truth = (rng.random(count) < scores).astype(int)
    made = np.sort(rng.integers(1000 * HOUR_NS, 1060 * HOUR_NS, count))
    outcome = made + rng.integers(0, 6 * HOUR_NS, count)
    came = outcome + np.where(rng.random(count) < 0.5, 0, rng.integers(0, 48 * HOUR_NS, count))
    came = np.where(rng.random(count) < 0.05, made - 1, came)  # before its prediction
    events = [(int(at), False, n) for n, at in enumerate(made)] + [(int(at), True, n) for n, at in enumerate(came)]
    for place, (at, label, n) in enumerate(sorted(event for event in events if event[0] < end)):
        if not label:
            monitor.join.remember([f"r{n}"], "1", "stable", 1, [Output(np.float64(scores[n]).tobytes())], "", at)
        for _ in range(2 * label):
            monitor.join.label(f"r{n}", 0, int(truth[n]), "", at, int(outcome[n]) if told else None)
        if place % 97 == 0:
            monitor.drain(at)
        if place % 970 == 0:
            monitor = after_restart(monitor)
    monitor.drain(end)

    arrived, known = came < end, np.maximum(came, made)
    when = np.maximum(np.minimum(outcome, came), made) if told else known
    found = {window["window"]: window for window in monitor.report()["windows"]}
    shown = {s.labels["window"]: s.value for s in monitor.samples() if s.name == "label_outdated_rows_total"}
    for window, hours in zip(found.values(), (24, 2), strict=True):
        age = end // HOUR_NS - when // HOUR_NS
        rows = arrived & (age >= 1) & (age <= hours)
        y, p, metrics = truth[rows], scores[rows], window["metrics"]
        assert window["rows"] == rows.sum() > 20
        assert metrics["accuracy"] == pytest.approx(accuracy_score(y, p >= 0.5), abs=1e-9)
        assert metrics["auc"] == pytest.approx(roc_auc_score(y, p), abs=1e-9)
        assert metrics["brier"] == pytest.approx(brier_score_loss(y, p), abs=1e-9)
        assert metrics["log_loss"] == pytest.approx(log_loss(y, p), abs=1e-9)
        outdated = (arrived & (known // HOUR_NS - when // HOUR_NS > hours)).sum()
        assert window["outdated"] == shown[window["window"]] == outdated
        assert (outdated > 100) == told
    (group,) = monitor.report()["join"]["groups"]
    assert (group["joined"], group["duplicate"]) == (arrived.sum(), arrived.sum())
    assert group["late"] == (arrived & (came - made > HOURS.late_ns)).sum()


@pytest.mark.parametrize(
    "settings",
    [
        {"windows": (rows_window(300),)},
        {"windows": (rows_window(1000), rows_window(100))},
        {"bins": 20},
        {"form": "class"},
        {"max_groups": 1},
    ],
)
def test_a_state_of_other_settings_is_refused_whole(settings: dict[str, Any]) -> None:
    traffic = Traffic(monitor_of(windows=(rows_window(1000),)))
    traffic.send(1200, part="eu")
    state = SavedLabels.from_bytes(traffic.monitor.snapshot("mark", "run"), 10_000)
    other = monitor_of(**{"windows": (rows_window(1000),), **settings})
    with pytest.raises(StateError):
        other.restore(state)
    assert other.report()["windows"] == []
    assert other.report()["join"]["groups"] == []


def test_changes_say_when_there_is_something_to_save() -> None:
    monitor = monitor_of()
    monitor.drain(1)
    assert monitor.changes == 0
    traffic = Traffic(monitor)
    traffic.send(1)
    seen = monitor.changes
    assert seen > 0
    monitor.drain(10**6)
    assert monitor.changes == seen
    monitor.restart()
    assert monitor.changes > seen


@pytest.mark.parametrize("before", [0, 3000])
def test_the_reference_of_a_profile_is_held_against_instead_of_the_first_rows(before: int) -> None:
    """Behaviour that was bad from the first row on is found: nothing of it is learnt as the norm."""
    alarms: list[LabelAlarm] = []
    monitor, rng = monitor_of(alarms, windows=(rows_window(1000),)), np.random.default_rng(6)
    scores = rng.beta(1, 3, 20_000)
    labels = (rng.random(20_000) < scores).astype("f8")
    reference = to_profile(monitor.settings, reference_rows(monitor.settings, scores[:, None], labels))
    traffic = Traffic(monitor)
    traffic.send(before, noise=0.9)
    assert alarms == []
    monitor.learn_from("1", reference)
    traffic.send(2500, noise=0.9)
    assert {"auc", "accuracy", "log_loss", "calibration"} <= {alarm.signal.name for alarm in alarms}
    assert monitor.report()["learning"] == []
    (estimate,) = monitor.report()["estimates"]
    base = estimate["metrics"]["base_rate"]
    assert base["low"] - 0.02 < 0.25 < base["high"] + 0.02
    with pytest.raises(SettingsError, match="threshold"):
        monitor_of(threshold=0.4).learn_from("1", reference)
