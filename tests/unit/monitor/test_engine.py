"""The monitor as a server drives it: taps, drain, arms, alarms, reports, snapshots."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import event

from monitor import snapshots
from monitor.engine import Monitor, MonitorSet, OnAlarm
from monitor.errors import ProfileMismatch, SettingsError, StateError
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState, merge
from monitor.tap import Item, Tap
from monitor.types import SECOND_NS, Alarm, AlarmRules, ColumnRule, Settings, rows_window, time_window
from monitor.worker import DrainThread

ROWS_ONLY = Settings(windows=(rows_window(1000), rows_window(10_000)), rules=AlarmRules(ert_rows=1_000_000))


@dataclass
class Output:
    data: Any


def normal(seed: int, rows: int, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype("f4")


def profile(columns: int = 5, seed: int = 0) -> ReferenceProfile:
    return ReferenceProfile.from_arrays(
        {"x": normal(seed, 20_000, columns)}, {"score": np.random.default_rng(seed).random(20_000)}
    )


def offer(tap: Tap, values: np.ndarray, arm: str = "stable", now_ns: int = 0, parts: int = 1) -> bool:
    scores = np.random.default_rng(zlib.crc32(values.tobytes())).random(len(values))
    pieces = [piece.tobytes() for piece in np.array_split(values, parts)]
    return tap.offer(len(values), [pieces], [Output(scores.tobytes())], now_ns, arm)


@pytest.fixture
def alarms() -> list[Alarm]:
    return []


@pytest.fixture
def monitors(alarms: list[Alarm]) -> MonitorSet:
    return MonitorSet(on_alarm=lambda monitor, alarm: alarms.append(alarm))


def attach(monitors: MonitorSet, settings: Settings = ROWS_ONLY, version: str = "1") -> tuple[Monitor, Tap]:
    monitor = monitors.attach("m", version, profile(), settings)
    tap = monitors.tap("m", version, ["x"], ["score"])
    assert tap is not None
    return monitor, tap


def test_a_shift_is_seen_soon_and_in_the_right_column(monitors: MonitorSet, alarms: list[Alarm]) -> None:
    monitor, tap = attach(monitors)
    for batch in range(250):
        values = normal(batch + 1, 40)
        if batch >= 125:
            values[:, 3] += 0.5
        assert offer(tap, values, parts=3)
        monitors.drain(0)
    assert [(alarm.state, alarm.column, alarm.arm, alarm.episode) for alarm in alarms] == [
        ("raised", "x[3]", "stable", 1)
    ]
    assert alarms[0].verdict.over
    assert alarms[0].score.ks_low > 0.1
    assert monitor.in_alarm() == ("x[3]",)
    report = monitor.report()
    assert report.windows[0].scores[0].column == "x[3]"
    assert report.windows[0].in_alarm == ("x[3]",)
    assert report.calibrated
    assert report.counted == {"stable": 10_000}
    json.dumps(report.to_dict())


def test_batches_through_a_tap_count_as_they_do_one_by_one(monitors: MonitorSet) -> None:
    """However many wait, and whichever arms, panes of time and strange batches are among them."""
    rng = np.random.default_rng(17)
    settings = replace(ROWS_ONLY, windows=(rows_window(1000), time_window(10, 1)))
    monitor, tap = attach(monitors, settings)
    other = Monitor("m", "1", monitor.layout.profile, settings)
    now = 10**18
    strange = 0
    for step in range(3000):
        now += int(rng.exponential(2e7))
        rows = int(rng.choice([1, 3, 8, 60, 900], p=[0.5, 0.25, 0.15, 0.08, 0.02]))
        arm = "canary" if step % 500 > 400 else "stable"
        x, scores = normal(step, rows).tobytes(), rng.random(rows).tobytes()
        if step % 83 == 0:
            scores, strange = scores[:-1], strange + rows
        parts: list[Any] = [x] if step % 3 else [memoryview(x)[:8], x[8:]]
        assert tap.offer(rows, [parts], [Output(scores)], now, arm)
        other.ingest(tap.keys, [Item(now, arm, rows, 0, [[x], [scores]])])
        if rng.random() < 0.01:
            monitors.drain(now)
            other.tick(now)
    monitors.drain(now)
    other.tick(now)
    found, wanted = monitor.state(), other.state()
    assert list(found.arms) == list(wanted.arms) == ["stable", "canary"]
    for got, want in zip(found.arms.values(), wanted.arms.values(), strict=True):
        assert (got.rows, got.refused) == (want.rows, want.refused)
        np.testing.assert_array_equal(got.total, want.total)
        for one, series in zip(got.series, want.series, strict=True):
            assert one.closed == series.closed > 10
            for field in ("index", "rows", "counts"):
                np.testing.assert_array_equal(getattr(one, field), getattr(series, field))
    assert sum(one.refused for one in found.arms.values()) == strange > 0


def test_alarm_ends_when_traffic_is_as_before(monitors: MonitorSet, alarms: list[Alarm]) -> None:
    _, tap = attach(monitors, replace(ROWS_ONLY, windows=(rows_window(1000),)))
    for batch in range(60):
        offer(tap, normal(batch + 1, 500) + (1.0 if 10 <= batch < 20 else 0.0))
        monitors.drain(0)
    changes = [(alarm.state, alarm.column) for alarm in alarms]
    assert sorted(changes) == sorted((state, f"x[{i}]") for state in ("raised", "cleared") for i in range(5))


def test_arms_are_counted_apart_and_compared(monitors: MonitorSet) -> None:
    monitor, tap = attach(monitors)
    for batch in range(10):
        offer(tap, normal(batch, 200), "stable")
        offer(tap, normal(100 + batch, 200) + np.float32(0.5), "canary")
        offer(tap, normal(200 + batch, 100), "shadow")
        monitors.drain(0)
    assert monitor.report().counted == {"canary": 2000, "shadow": 1000, "stable": 2000}
    compared = monitor.compare("canary")[0]
    assert all(score.rows == score.reference_rows == 1000 for score in compared.scores)
    assert {v.column for v in compared.verdicts if v.over} == {f"x[{i}]" for i in range(5)}
    assert not any(v.over for v in monitor.compare("shadow")[0].verdicts)
    with pytest.raises(StateError, match="no row of arm 'beta'"):
        monitor.compare("beta")


def test_a_canary_can_be_counted_under_the_stable_profile_too(monitors: MonitorSet) -> None:
    first, first_tap = attach(monitors)
    second = monitors.attach("m", "2", profile(seed=1), ROWS_ONLY)
    second_tap = monitors.tap("m", "2", ["x"], ["score"])
    assert second_tap is not None
    monitors.mirror("m", "2", "1", "canary")
    for batch in range(4):
        offer(first_tap, normal(batch, 500))
        offer(second_tap, normal(batch + 9, 500) * 2)
    monitors.drain(0)
    assert first.report().counted == {"canary": 2000, "stable": 2000}
    assert second.report().counted == {"stable": 2000}
    assert any(verdict.over for verdict in first.compare("canary")[0].verdicts)
    monitors.unmirror("m", "2", "1")
    offer(second_tap, normal(1, 10))
    monitors.drain(0)
    assert first.report().counted["canary"] == 2000
    with pytest.raises(SettingsError, match="m:3 is not watched"):
        monitors.mirror("m", "3", "1", "canary")


def test_too_many_arms_are_refused_and_said(monitors: MonitorSet) -> None:
    monitor, tap = attach(monitors, replace(ROWS_ONLY, max_arms=2))
    for arm in ("a", "b", "c"):
        offer(tap, normal(0, 10), arm)
    monitors.drain(0)
    report = monitor.report()
    assert list(report.counted) == ["a", "b"]
    assert any("10 rows of arms over the bound of 2" in warning for warning in report.warnings)


def test_drops_are_exact_and_mark_the_windows(monitors: MonitorSet) -> None:
    monitor, tap = attach(monitors, replace(ROWS_ONLY, ring_rows=1000))
    taken = sum(300 for batch in range(20) if offer(tap, normal(batch, 300)))
    assert taken == 900
    assert monitors.drain(0) == 900
    for batch in range(4):
        offer(tap, normal(batch, 300))
        monitors.drain(0)
    report = monitor.report()
    assert report.counted == {"stable": 2100}
    assert report.dropped == {"stable": 5100}
    assert monitors.gauges() == {"offered": 7200, "taken": 2100, "dropped": 5100, "refused": 0, "waiting": 0}
    assert [window.sampled for window in report.windows] == [False, True]  # the short window has left it behind
    assert any("5100 of 7200 rows were dropped" in warning for warning in report.warnings)


def test_batches_of_another_shape_are_refused_alone(monitors: MonitorSet) -> None:
    monitor, tap = attach(monitors)
    offer(tap, normal(0, 10))
    offer(tap, normal(0, 7, columns=4))
    offer(tap, normal(0, 5))
    monitors.drain(0)
    report = monitor.report()
    assert (report.counted, report.refused) == ({"stable": 15}, {"stable": 7})


def test_every_datatype_is_counted(monitors: MonitorSet) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "half": rng.standard_normal(500).astype("f2"),
        "big": rng.integers(-(2**60), 2**60, 500),
        "byte": rng.integers(0, 255, (500, 2)).astype("u1"),
        "flag": rng.random(500) < 0.3,
        "word": rng.choice(np.array([b"a", b"b", b""], object), (500, 2)),
    }
    reference = ReferenceProfile.from_arrays({**arrays, "brain": rng.standard_normal(500)}, datatypes={"brain": "BF16"})
    monitors.attach("m", "1", reference, ROWS_ONLY)
    tap = monitors.tap("m", "1", [*arrays, "brain"], [])
    assert tap is not None
    brain = (np.ones(500, "f4").view("u4") >> 16).astype("u2")
    parts = [[a.tobytes()] if a.dtype != object else [a.ravel().tolist()] for a in arrays.values()]
    assert tap.offer(500, [*parts, [brain.tobytes()]], [], 0)
    assert tap.offer(
        1, [[a[:1].tobytes()] if a.dtype != object else [[b"new", b""]] for a in arrays.values()] + [None], [], 0
    )
    assert monitors.drain(0) == 501
    found = monitors.get("m", "1")
    assert found is not None
    total = found.state().arms["stable"].total
    start = found.layout.start
    by_name = {name: total[start[i] : start[i + 1]] for i, name in enumerate(found.layout.names)}
    for name in ("half", "big", "flag", "byte[0]", "word[1]"):
        place = found.layout.names.index(name)
        assert np.abs(by_name[name] - found.layout.reference[start[place] : start[place + 1]]).sum() == 1
    assert by_name["word[0]"][0] == 1  # a new category
    assert by_name["brain"][-1] == 1  # the input that was absent
    assert by_name["brain"].sum() == 501


def test_profile_and_model_must_fit(monitors: MonitorSet) -> None:
    attach(monitors)
    with pytest.raises(ProfileMismatch, match="watches the output 'score'"):
        monitors.tap("m", "1", ["x"], ["label"])
    with pytest.raises(SettingsError, match="watched already"):
        attach(monitors)
    assert monitors.tap("m", "9", ["x"], []) is None
    with pytest.raises(ProfileMismatch, match="does not carry"):
        monitors.monitors()[0].ingest([("input", "x")], [])


def test_detaching_counts_what_waits(monitors: MonitorSet) -> None:
    _, tap = attach(monitors)
    offer(tap, normal(0, 100))
    gone = monitors.detach("m", "1")
    assert gone is not None
    assert gone.report().counted == {"stable": 100}
    assert monitors.detach("m", "1") is None
    assert monitors.get("m", "1") is None


def test_closing_a_tap_counts_what_waits(monitors: MonitorSet) -> None:
    monitor, tap = attach(monitors)
    offer(tap, normal(0, 100))
    monitors.close_tap(tap)
    assert monitor.report().counted == {"stable": 100}
    offer(tap, normal(0, 100))
    assert monitors.drain(0) == 0


TIMED = Settings(windows=(time_window(10, 1), rows_window(100)))


def test_times_of_offers_are_moved_to_the_wall_clock() -> None:
    monitors = MonitorSet(wall_offset_ns=1000 * SECOND_NS)
    monitor, tap = attach(monitors, TIMED)
    offer(tap, normal(0, 30), now_ns=5 * SECOND_NS)
    offer(tap, normal(0, 30), now_ns=6 * SECOND_NS)
    monitors.drain(1007 * SECOND_NS)
    window = monitor.report().windows[0]
    assert (window.window, window.rows) == ("10s", 60)
    assert (window.start_ns, window.end_ns) == (1005 * SECOND_NS, 1006 * SECOND_NS)
    monitors.drain(1016 * SECOND_NS)
    assert monitor.report().windows[0].rows == 30


def drive(monitors: MonitorSet, tap: Tap, first: int, last: int) -> None:
    for second in range(first, last):
        offer(tap, normal(second, 70) + (second > 40), now_ns=second * SECOND_NS)
        monitors.drain((second + 1) * SECOND_NS)


def writer(seen: list[tuple[str, str, int]]) -> OnAlarm:
    return lambda _, alarm: seen.append((alarm.state, alarm.column, alarm.episode))


def test_a_restart_goes_on_from_the_snapshot() -> None:
    settings = Settings(windows=(time_window(10, 1), rows_window(1400, 70)), rules=AlarmRules(ert_rows=10_000_000))
    heard: list[list[tuple[str, str, int]]] = []
    reports = []
    for cut in (None, 45):
        seen: list[tuple[str, str, int]] = []
        monitors = MonitorSet(on_alarm=writer(seen))
        monitor, tap = attach(monitors, settings)
        drive(monitors, tap, 0, cut or 60)
        if cut:
            data = monitor.snapshot()
            monitors = MonitorSet(on_alarm=writer(seen))
            monitor, tap = attach(monitors, settings)
            monitor.restore(MonitorState.from_bytes(data))
            drive(monitors, tap, cut, 60)
        heard.append(seen)
        reports.append(monitor.report().to_dict())
    assert heard[0] == heard[1]
    assert len(heard[0]) == 5
    assert repr(reports[0]) == repr(reports[1])


def test_a_snapshot_of_another_profile_or_damaged_is_refused() -> None:
    monitor = Monitor("m", "1", profile(), ROWS_ONLY)
    other = Monitor("m", "1", profile(seed=5), ROWS_ONLY)
    with pytest.raises(ProfileMismatch, match="counted under profile"):
        monitor.restore(other.state())
    data = bytearray(monitor.snapshot())
    data[-40] ^= 1
    with pytest.raises(StateError):
        MonitorState.from_bytes(bytes(data))
    timed = Monitor("m", "1", profile(), TIMED)
    timed.ingest(timed.keys, [item(normal(0, 10))])
    with pytest.raises(StateError, match="other windows"):
        monitor.restore(timed.state())
    assert monitor.report().counted == {}


def item(values: np.ndarray, now_ns: int = 0, arm: str = "stable") -> Item:
    scores = np.zeros(len(values))
    return Item(now_ns, arm, len(values), 0, [[values.tobytes()], [scores.tobytes()]])


def test_merging_is_refused_across_profiles_and_of_nothing() -> None:
    with pytest.raises(StateError, match="no state"):
        merge([])
    with pytest.raises(ProfileMismatch, match="cannot be added"):
        merge([Monitor("m", "1", profile(seed=seed), ROWS_ONLY).state() for seed in (0, 1)])


def test_restart_forgets() -> None:
    monitor = Monitor("m", "1", profile(), ROWS_ONLY)
    monitor.ingest(monitor.keys, [item(normal(0, 5000) + 3)])
    assert monitor.in_alarm()
    monitor.restart()
    assert monitor.in_alarm() == ()
    assert monitor.report().windows == ()


def test_dependent_rows_are_warned_of_loudly() -> None:
    monitor = Monitor("m", "1", profile(), ROWS_ONLY)
    for block in range(80):  # rows that come in runs of ten equal ones
        monitor.ingest(monitor.keys, [item(np.repeat(normal(block, 50), 10, axis=0))])
    report = monitor.report()
    assert not report.calibrated
    assert any("NOT calibrated" in warning and "x[0]" in warning for warning in report.warnings)
    assert max(score.inflation for score in report.windows[0].scores) > 5


def test_a_seasonal_reference_replaces_the_profile_once_it_is_known() -> None:
    settings = Settings(windows=(time_window(3600, 600),), reference="hour_of_week")
    heard: list[Alarm] = []
    monitor = Monitor("m", "1", profile(), settings, on_alarm=lambda _, alarm: heard.append(alarm))
    hour = 3600 * SECOND_NS
    for week in range(2):
        for tick in range(12):
            now = (week * 168 + 1) * hour + tick * hour // 6
            monitor.ingest(monitor.keys, [item(normal(week * 100 + tick, 400) + 2, now)])
        monitor.tick((week * 168 + 3) * hour)
        if not week:
            assert len(monitor.in_alarm()) >= 5
            monitor.judge.restart("stable")
            heard.clear()
    assert not any(alarm.state == "raised" and alarm.start_ns > 169 * hour for alarm in heard)


def test_every_row_of_two_busy_threads_is_counted_or_dropped() -> None:
    monitors = MonitorSet()
    monitor, first = attach(monitors, replace(ROWS_ONLY, ring_rows=2000))
    errors: list[Exception] = []
    drainer = DrainThread(lambda: monitors.drain(0), interval_s=0.001, on_error=errors.append)
    second = monitors.tap("m", "1", ["x"], ["score"], wake=drainer.wake)
    assert second is not None
    batch = normal(0, 25)

    def produce(tap: Tap, arm: str) -> None:
        for _ in range(2000):
            offer(tap, batch, arm)

    drainer.start()
    producers = [threading.Thread(target=produce, args=pair) for pair in ((first, "stable"), (second, "canary"))]
    for producer in producers:
        producer.start()
    for producer in producers:
        producer.join(30)
    assert drainer.stop()
    assert errors == []
    report = monitor.report()
    for arm in ("stable", "canary"):
        assert report.counted[arm] + report.dropped[arm] == 50_000
    gauges = monitors.gauges()
    assert gauges["offered"] == 100_000
    assert gauges["waiting"] == gauges["refused"] == 0
    assert gauges["dropped"] == sum(report.dropped.values())


def test_nothing_is_compiled_after_the_monitor_is_made() -> None:
    monitors = MonitorSet()
    MonitorSet.compile()
    monitor, tap = attach(monitors)
    compiled: list[object] = []

    class Listener(event.Listener):
        def on_start(self, event: object) -> None:
            compiled.append(event)

        def on_end(self, event: object) -> None:
            pass

    with event.install_listener("numba:compile", Listener()):
        for batch in range(30):
            offer(tap, normal(batch, 500), "stable")
            offer(tap, normal(batch, 500), "canary")
            monitors.drain(0)
        monitor.report()
        monitor.compare("canary")
        monitor.snapshot()
    assert compiled == []


def test_undefined_statistics_are_nan_in_reports() -> None:
    monitor = Monitor("m", "1", profile(), ROWS_ONLY)
    monitor.ingest(monitor.keys, [item(normal(0, 10))])
    (short, _) = monitor.report().windows
    assert (short.rows, short.full) == (0, False)
    assert all(math.isnan(score.psi) and score.psi_p == 1 for score in short.scores)


# --- slots: threads and profiles come and go ---


def test_a_slot_follows_attach_replace_and_detach(monitors: MonitorSet) -> None:
    slot = monitors.tap_for("m", "1", ["y", "x"], ["score"])
    assert slot.tap is None
    first = monitors.attach("m", "1", profile(), ROWS_ONLY)
    before = slot.tap
    assert before is not None
    assert before.offer(100, [None, [normal(0, 100).tobytes()]], [Output(np.zeros(100).tobytes())], 0)
    second = monitors.replace("m", "1", profile(seed=1), ROWS_ONLY)
    after = slot.tap
    assert after is not None
    assert after is not before
    assert after.offer(7, [None, [normal(0, 7).tobytes()]], [Output(np.zeros(7).tobytes())], 0)
    monitors.drain(0)
    assert (first.report().counted, second.report().counted) == ({"stable": 100}, {"stable": 7})
    assert monitors.get("m", "1") is second
    assert monitors.detach("m", "1") is second
    assert slot.tap is None
    assert monitors.gauges() == {"offered": 107, "taken": 107, "dropped": 0, "refused": 0, "waiting": 0}
    monitors.attach("m", "1", profile(), ROWS_ONLY)
    assert slot.tap is not None
    monitors.close_slot(slot)
    assert slot.tap is None
    monitors.replace("m", "1", profile(seed=1), ROWS_ONLY)
    assert slot.tap is None


def test_a_profile_that_does_not_fit_a_slot_changes_nothing(monitors: MonitorSet) -> None:
    slot = monitors.tap_for("m", "1", ["x"], ["label"])
    with pytest.raises(ProfileMismatch, match="watches the output 'score'"):
        monitors.attach("m", "1", profile(), ROWS_ONLY)
    assert monitors.get("m", "1") is None
    only_x = ReferenceProfile.from_arrays({"x": normal(0, 1000)})
    kept = monitors.attach("m", "1", only_x, ROWS_ONLY)
    before = slot.tap
    with pytest.raises(ProfileMismatch, match="watches the output 'score'"):
        monitors.replace("m", "1", profile(), ROWS_ONLY)
    assert monitors.get("m", "1") is kept
    assert slot.tap is before is not None
    with pytest.raises(ProfileMismatch, match="watches the input 'x'"):
        monitors.tap_for("m", "1", ["z"], [])


def test_replacing_settings_alone_keeps_counts_and_alarms(monitors: MonitorSet, alarms: list[Alarm]) -> None:
    _, tap = attach(monitors)
    for batch in range(4):
        offer(tap, normal(batch, 500) + 1)
        monitors.drain(0)
    raised = len(alarms)
    assert raised >= 5
    offer(tap, normal(9, 250) + 1)  # still waits when the monitor is replaced
    rules = replace(ROWS_ONLY, schema=(ColumnRule("x[0]", max=100.0),))
    again = monitors.replace("m", "1", profile(), rules)
    assert again.report().counted == {"stable": 2250}
    assert again.in_alarm() == tuple(f"x[{i}]" for i in range(5))
    assert len(again.history()["windows"][0]["rows"]) == 3
    anew = monitors.replace("m", "1", profile(), replace(ROWS_ONLY, windows=(rows_window(700, 70),)))
    assert anew.report().counted == {}


def test_a_mirror_holds_for_taps_that_come_later(monitors: MonitorSet) -> None:
    first = monitors.attach("m", "1", profile(), ROWS_ONLY)
    second = monitors.attach("m", "2", profile(seed=1), ROWS_ONLY)
    monitors.mirror("m", "2", "1", "canary")
    slot = monitors.tap_for("m", "2", ["x"], ["score"])
    assert slot.tap is not None
    offer(slot.tap, normal(1, 300))
    monitors.drain(0)
    assert first.report().counted == {"canary": 300}
    renewed = monitors.replace("m", "2", profile(seed=2), ROWS_ONLY)
    offer(slot.tap, normal(2, 200))
    monitors.drain(0)
    assert first.report().counted == {"canary": 500}
    assert (second.report().counted, renewed.report().counted) == ({"stable": 300}, {"stable": 200})
    narrow = ReferenceProfile.from_arrays({"x": normal(0, 1000)})
    with pytest.raises(ProfileMismatch, match="does not carry output 'score'"):
        monitors.replace("m", "2", narrow, ROWS_ONLY)
    with pytest.raises(SettingsError, match="onto itself"):
        monitors.mirror("m", "2", "2", "canary")
    monitors.detach("m", "1")
    monitors.attach("m", "1", profile(), ROWS_ONLY)
    offer(slot.tap, normal(3, 100))
    monitors.drain(0)
    assert monitors.monitors()[1].report().counted == {}


def test_no_row_is_counted_under_the_wrong_profile_while_versions_are_swapped() -> None:
    monitors = MonitorSet()
    references = {
        version: ReferenceProfile.from_arrays({"x": np.full(100, float(version)).astype("f4")}) for version in "12"
    }
    slots = {version: monitors.tap_for("m", version, ["x"], []) for version in "12"}
    done, offered = threading.Event(), threading.Event()
    rows, timed = replace(ROWS_ONLY, ring_rows=200), replace(TIMED, ring_rows=200)

    def produce(version: str) -> None:
        batch = [np.full(10, float(version), "f4").tobytes()]
        while not done.is_set():
            tap = slots[version].tap
            if tap is not None:
                tap.offer(10, [batch], [], 0)
                offered.set()

    def until_offered(version: str) -> None:
        tap = slots[version].tap
        assert tap is not None
        while not tap.offered:
            assert offered.wait(30)
            offered.clear()

    threads = [threading.Thread(target=produce, args=(version,)) for version in "12"]
    seen: list[Monitor] = []
    for thread in threads:
        thread.start()
    for turn in range(12):
        version = "12"[turn % 2]
        seen.append(monitors.attach("m", version, references[version], rows))
        until_offered(version)
        monitors.drain(0)
        if turn % 3 == 0:
            seen.append(monitors.replace("m", version, references[version], timed))
            until_offered(version)
        monitors.detach("m", version)
    done.set()
    for thread in threads:
        thread.join(30)
    totals = {version: np.zeros(4, "i8") for version in "12"}
    for monitor in seen:
        for arm in monitor.state().arms.values():
            totals[monitor.version] += arm.total
    for total in totals.values():
        assert total[1] > 0
        assert total[[0, 2, 3]].tolist() == [0, 0, 0]  # nothing but the knot, which is the version's own value


def test_a_stalled_drain_thread_costs_rows_and_nothing_else() -> None:
    monitors = MonitorSet()
    monitor, tap = attach(monitors, replace(ROWS_ONLY, ring_rows=3000))
    stalled, released = threading.Event(), threading.Event()

    def drain() -> None:
        stalled.set()
        assert released.wait(30)
        monitors.drain(0)

    errors: list[Exception] = []
    thread = DrainThread(drain, interval_s=0.001, on_error=errors.append)
    thread.start()
    assert stalled.wait(30)
    batch, most = normal(0, 32), 0
    for _ in range(2000):
        offer(tap, batch)
        most = max(most, tap.waiting)
    assert most <= 3000
    released.set()
    assert thread.stop()
    assert errors == []
    report = monitor.report()
    assert report.counted["stable"] + report.dropped["stable"] == 64_000
    assert report.counted["stable"] == most


# --- snapshots ---


def test_snapshots_of_all_are_written_restored_and_pruned(monitors: MonitorSet, tmp_path: Path) -> None:
    monitor, tap = attach(monitors)
    monitors.attach("../odd name", "v/2", profile(seed=3), ROWS_ONLY)
    offer(tap, normal(0, 1200))
    monitors.drain(0)
    written = monitors.snapshot_all(tmp_path / "states")
    assert len(set(written)) == 2
    assert sorted(written) == sorted((tmp_path / "states").iterdir())
    again = MonitorSet()
    fresh, _ = attach(again)
    again.attach("../odd name", "v/2", profile(seed=4), ROWS_ONLY)  # another profile: another file
    assert again.restore_all(tmp_path / "states") == {("m", "1"): "restored", ("../odd name", "v/2"): "none"}
    assert repr(fresh.report()) == repr(monitor.report())
    data = bytearray(written[0].read_bytes())
    data[-1] ^= 1
    written[0].write_bytes(bytes(data))
    assert "checksum" in again.restore_all(tmp_path / "states")["m", "1"]
    assert fresh.report().counted == {"stable": 1200}  # a file that cannot be read changes nothing
    again.snapshot_all(tmp_path / "states", spare=0)
    assert len(list((tmp_path / "states").iterdir())) == 2
    with pytest.raises(SettingsError, match="m:7 is not watched"):
        again.restore(tmp_path, "m", "7")
    monitors.detach("m", "1")
    renamed = tmp_path / "states" / snapshots.file_name("m", "2", fresh.sha256)
    again.snapshot_all(tmp_path / "states")[0].rename(renamed)
    again.attach("m", "2", profile(), ROWS_ONLY)
    with pytest.raises(StateError, match="is of m:1, wanted m:2"):
        again.restore(tmp_path / "states", "m", "2")


CHILD = """
import sys
from pathlib import Path
import numpy as np
from monitor.engine import MonitorSet
from monitor.tap import Item
from tests.unit.monitor import test_engine as shared

monitors = MonitorSet()
monitor, _ = shared.attach(monitors)
monitor.ingest(monitor.keys, [shared.item(shared.normal(seed, 300)) for seed in range(5)])
monitors.snapshot_all(Path(sys.argv[1]))
monitor.ingest(monitor.keys, [shared.item(shared.normal(9, 700))])
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_killed_process_goes_on_from_its_last_snapshot(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.kill()
    twin = Monitor("m", "1", profile(), ROWS_ONLY)
    twin.ingest(twin.keys, [item(normal(seed, 300)) for seed in range(5)])
    monitors = MonitorSet()
    monitor, _ = attach(monitors)
    assert monitors.restore(tmp_path, "m", "1")
    assert repr(monitor.report()) == repr(twin.report())


@pytest.fixture(autouse=True)
def _no_warnings_of_numpy() -> Iterator[None]:
    with np.errstate(all="raise", under="ignore"):
        yield


def test_what_fails_is_refused_and_starves_nobody() -> None:
    """The receiver of alarms fails: in one monitor, in the midst of counting."""
    told: list[str] = []

    def tell(monitor: Monitor, _: Alarm) -> None:
        told.append(monitor.version)
        if monitor.version == "bad":
            raise RuntimeError("nobody is there")

    monitors = MonitorSet(on_alarm=tell)
    quick = Settings(windows=(rows_window(200),), rules=AlarmRules(k=1, m=1, ert_rows=1_000_000))
    taps = {}
    for version in ("bad", "good"):
        monitors.attach("m", version, profile(), quick)
        taps[version] = monitors.tap("m", version, ["x"], ["score"])
    for tap in taps.values():
        assert tap is not None
        offer(tap, normal(1, 5000) + 3.0)
    with pytest.raises(ExceptionGroup) as caught:
        monitors.drain(1)
    assert [str(error) for error in caught.value.exceptions] == ["5000 rows of m:bad were not counted: nobody is there"]
    assert monitors.drain(2) == 0
    assert set(told) == {"bad", "good"}
    good, bad = monitors.get("m", "good"), monitors.get("m", "bad")
    assert good is not None
    assert bad is not None
    assert good.report().counted == {"stable": 5000}
    assert bad.report().refused == {"stable": 5000}
    assert monitors.gauges() == {"offered": 10_000, "taken": 5000, "dropped": 0, "refused": 5000, "waiting": 0}


def test_a_mirror_fails_by_itself() -> None:
    def tell(monitor: Monitor, _: Alarm) -> None:
        if monitor.version == "1":
            raise RuntimeError("nobody is there")

    monitors = MonitorSet(on_alarm=tell)
    quick = Settings(windows=(rows_window(200),), rules=AlarmRules(k=1, m=1, ert_rows=1_000_000))
    for version in ("1", "2"):
        monitors.attach("m", version, profile(), quick)
    tap = monitors.tap("m", "2", ["x"], ["score"])
    assert tap is not None
    monitors.mirror("m", "2", "1", "canary")
    offer(tap, normal(1, 1000) + 3.0, arm="canary")
    with pytest.raises(ExceptionGroup):
        monitors.drain(1)
    candidate = monitors.get("m", "2")
    assert candidate is not None
    assert candidate.report().counted == {"canary": 1000}
    assert (tap.taken, tap.refused) == (1000, 0)


def test_a_mirror_leaves_out_what_a_shadow_was_given(monitors: MonitorSet) -> None:
    tight = replace(ROWS_ONLY, ring_rows=100)
    for version in ("1", "2"):
        monitors.attach("m", version, profile(), tight)
    tap = monitors.tap("m", "2", ["x"], ["score"])
    assert tap is not None
    monitors.mirror("m", "2", "1", "canary")
    offer(tap, normal(1, 40), arm="canary")
    offer(tap, normal(2, 50), arm="shadow")
    assert not offer(tap, normal(3, 30), arm="shadow")
    monitors.drain(1)
    own, onto = monitors.get("m", "2"), monitors.get("m", "1")
    assert own is not None
    assert onto is not None
    assert own.report().counted == {"canary": 40, "shadow": 50}
    assert own.report().dropped == {"canary": 0, "shadow": 30}
    assert (onto.report().counted, onto.report().dropped) == ({"canary": 40}, {"canary": 0})


def test_rows_that_fail_and_rows_of_another_shape_are_refused_together() -> None:
    def tell(*_: object) -> None:
        raise RuntimeError("nobody is there")

    monitors = MonitorSet(on_alarm=tell)
    quick = Settings(windows=(rows_window(200),), rules=AlarmRules(k=1, m=1, ert_rows=1_000_000))
    monitors.attach("m", "1", profile(), quick)
    tap = monitors.tap("m", "1", ["x"], ["score"])
    assert tap is not None
    offer(tap, normal(1, 400) + 3.0)
    assert tap.offer(3, [[b"strange"]], [Output(b"")], 0, "canary")
    with pytest.raises(ExceptionGroup):
        monitors.drain(1)
    assert monitors.gauges() == {"offered": 403, "taken": 0, "dropped": 0, "refused": 403, "waiting": 0}
