"""One version under watch: odd values, quality alarms, the schema, segments, history, distributions, kept rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from monitor import sealed
from monitor.errors import SettingsError, StateError
from monitor.profile import ReferenceProfile
from monitor.segments import with_segments
from monitor.state import MonitorState, merge
from monitor.tap import Item
from monitor.types import (
    SECOND_NS,
    Alarm,
    AlarmRules,
    Column,
    ColumnRule,
    DriftReport,
    QualityScore,
    Segment,
    Settings,
    WindowReport,
    rows_window,
    time_window,
)
from monitor.watch import Monitor

ROWS = 20_000
WINDOW = rows_window(1000)
SETTINGS = Settings(windows=(WINDOW,), rules=AlarmRules(ert_rows=1_000_000))


@pytest.fixture(autouse=True)
def _no_warnings_of_numpy() -> Iterator[None]:
    with np.errstate(all="raise", under="ignore"):
        yield


def table(seed: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    """A float column, a category as a string, and a score; country "b" has its own mean of ``x``."""
    rng = np.random.default_rng(seed)
    country = rng.choice(np.array([b"a", b"b", b"c"], object), rows, p=[0.5, 0.3, 0.2])
    x = rng.standard_normal(rows) + 3.0 * (country == b"b")
    return {"x": x.astype("f4"), "country": country, "score": rng.random(rows).astype("f4")}


COLUMNS = (
    Column("x", "x"),
    Column("country", "country", datatype="BYTES", kind="bytes"),
    Column("score", "score", "output"),
)
PROFILE = ReferenceProfile.from_table(table(0), COLUMNS)
SEGMENT = Segment("country", ("a", "b"))
CUT = with_segments(PROFILE, table(0), SEGMENT)


def item(values: Mapping[str, np.ndarray], now_ns: int = 0, arm: str = "stable") -> Item:
    data: list[Any] = [
        [array.tolist()] if array.dtype == object else [np.ascontiguousarray(array).tobytes()]
        for array in (values[column.name] for column in COLUMNS)
    ]
    return Item(now_ns, arm, len(values["x"]), 0, data)


def watch(settings: Settings = SETTINGS, profile: ReferenceProfile = PROFILE) -> tuple[Monitor, list[Alarm]]:
    heard: list[Alarm] = []
    return Monitor("m", "1", profile, settings, on_alarm=lambda _, alarm: heard.append(alarm)), heard


def feed(monitor: Monitor, batches: Sequence[Mapping[str, np.ndarray]], arm: str = "stable") -> None:
    for batch in batches:
        monitor.ingest(monitor.keys, [item(batch, arm=arm)])


def window_of(report: DriftReport) -> WindowReport:
    (found,) = report.windows
    return found


def quality_of(report: DriftReport, column: str, check: str) -> QualityScore:
    (found,) = [q for q in window_of(report).quality if (q.column, q.check) == (column, check)]
    return found


# --- odd values ---


@pytest.mark.parametrize("odd", [1e30, np.inf, -np.inf, -1e30])
def test_one_huge_value_in_5000_moves_nothing_but_its_counter(odd: float) -> None:
    settings = replace(SETTINGS, windows=(rows_window(5000),))
    plain, spoiled = watch(settings), watch(settings)
    rows = table(1, 5000)
    worse = {**rows, "x": rows["x"].copy()}
    worse["x"][77] = odd
    feed(plain[0], [rows])
    feed(spoiled[0], [worse])
    first, second = ({s.column: s for s in window_of(m.report()).scores}["x"] for m in (plain[0], spoiled[0]))
    assert abs(first.ks_low - second.ks_low) <= 1 / 5000 + 1e-12
    assert abs(first.psi - second.psi) < 1e-3
    # Two rows of 5,000 may lie outside the range by themselves.
    assert round((second.below + second.above) * 5000) == round((first.below + first.above) * 5000) + 1
    assert [score.column for score in window_of(spoiled[0].report()).scores if not math.isfinite(score.psi)] == []
    assert spoiled[1] == []


def test_half_missing_gives_a_missing_alarm_and_leaves_the_present_part_alone() -> None:
    monitor, heard = watch()
    feed(monitor, [table(seed, 500) for seed in range(1, 5)])
    assert heard == []
    full = table(9, 2000)
    holed = {**full, "x": np.where(np.arange(2000) % 2 == 0, np.float32("nan"), full["x"])}
    feed(monitor, [holed])
    raised = {(alarm.column, alarm.check) for alarm in heard}
    assert raised == {("x", "missing"), ("x", "drift")}
    alarm = next(alarm for alarm in heard if alarm.check == "missing")
    assert alarm.verdict.test == "missing"
    assert alarm.quality is not None
    assert (alarm.quality.allowed, alarm.quality.over, alarm.quality.in_alarm) == (0.0, True, True)
    found = quality_of(monitor.report(), "x", "missing")
    assert (found.share, found.count, found.rows, found.in_alarm) == (0.5, 500, 1000, True)
    score = next(score for score in window_of(monitor.report()).scores if score.column == "x")
    present = holed["x"][1000:]
    exact = stats.ks_2samp(present[~np.isnan(present)], table(0)["x"]).statistic
    assert score.ks_low - 1e-12 <= exact <= score.ks_high + 1e-12
    assert score.ks_p > 1e-3
    assert score.psi > 0.25 > 0.05 > score.psi_present


def test_a_new_category_is_counted_and_alarmed_apart() -> None:
    monitor, heard = watch()
    rows = table(3, 2000)
    rows["country"][::20] = b"z"
    feed(monitor, [rows])
    assert {(alarm.column, alarm.check, alarm.state) for alarm in heard} >= {("country", "new_category", "raised")}
    assert quality_of(monitor.report(), "country", "new_category").count == 50
    feed(monitor, [table(seed, 500) for seed in range(4, 20)])
    ended = [alarm for alarm in heard if alarm.check == "new_category"]
    assert [(alarm.state, alarm.episode) for alarm in ended] == [("raised", 1), ("cleared", 1)]


def test_values_out_of_range_are_alarmed_where_psi_is_blind() -> None:
    monitor, heard = watch()
    rows = table(3, 2000)
    top = np.argsort(rows["x"])[-40:]
    rows["x"][top] = 1e6  # rows of the last bin stay in the last bin
    feed(monitor, [rows])
    assert {(alarm.column, alarm.check) for alarm in heard} == {("x", "above")}
    assert window_of(monitor.report()).in_alarm == ()


def test_clean_traffic_gives_no_quality_alarm() -> None:
    monitor, heard = watch(replace(SETTINGS, rules=AlarmRules(ert_rows=20_000, k=1, m=1, min_rate=1e-9)))
    feed(monitor, [table(seed, 1000) for seed in range(1, 40)])
    assert [alarm for alarm in heard if alarm.check != "drift"] == []


def test_empty_batches_change_nothing() -> None:
    monitor, heard = watch(replace(SETTINGS, segment=SEGMENT, keep_rows=10), CUT)
    assert monitor.ingest(monitor.keys, [item(table(1, 0))]) == 0
    assert monitor.report().counted == {"stable": 0}
    assert monitor.sample()["x"].tolist() == []
    assert heard == []


# --- the schema ---

RULES = (
    ColumnRule("x", min=-10, max=10, finite=True),
    ColumnRule("country", categories=("a", "b", "c"), tolerate=0.1),
    ColumnRule("score", missing=0.2),
)


def test_rules_are_counted_exactly_per_window_and_alarmed() -> None:
    monitor, heard = watch(replace(SETTINGS, schema=RULES))
    rows = table(5, 3000)
    rows["x"][1500::100] = 11.0  # 15 rows
    rows["x"][1999] = -np.inf
    rows["country"][2000::15] = b"x"  # 67 rows, under the 10 % tolerated
    feed(monitor, [rows])
    report = monitor.report()
    counts = {(q.column, q.check): q.count for q in window_of(report).quality if q.check.startswith("rule")}
    assert counts == {
        ("x", "rule min"): 0,
        ("x", "rule max"): 10,
        ("x", "rule finite"): 0,
        ("country", "rule categories"): 67,
        ("score", "rule missing"): 0,
    }
    rules = {(alarm.column, alarm.check) for alarm in heard if alarm.check.startswith("rule")}
    assert rules == {("x", "rule max"), ("x", "rule min"), ("x", "rule finite")}
    assert quality_of(report, "country", "rule categories").allowed == 0.1
    assert not quality_of(report, "country", "rule categories").over


def test_rule_counts_add_up_over_monitors_and_survive_a_restart() -> None:
    settings = replace(SETTINGS, schema=RULES)
    both = [watch(settings)[0] for _ in range(2)]
    rows = table(5, 1000)
    rows["x"][::10] = 12.0
    for monitor in both:
        feed(monitor, [rows])
    merged = both[0].judge.report(merge([monitor.state() for monitor in both]))
    assert quality_of(merged, "x", "rule max").count == 200
    again, _ = watch(settings)
    again.restore(MonitorState.from_bytes(both[0].snapshot()))
    assert repr(again.report()) == repr(both[0].report())
    changed, _ = watch(replace(SETTINGS, schema=(ColumnRule("x", max=13),)))
    changed.restore(MonitorState.from_bytes(both[0].snapshot()))
    assert quality_of(changed.report(), "x", "rule max").count == 0
    assert changed.report().counted == {"stable": 1000}
    with pytest.raises(StateError, match="cannot be added to those of the rules"):
        merge([both[0].state(), changed.state()])
    with pytest.raises(StateError, match="other rules"):
        both[0].judge.report(changed.state())


# --- contribution ---


def test_the_drifted_column_contributes_most_and_its_moved_bins_are_named() -> None:
    monitor, _ = watch()
    rows = table(6, 1000)
    rows["score"] = (rows["score"] ** 3).astype("f4")
    feed(monitor, [rows])
    window = window_of(monitor.report())
    assert [c.rank for c in window.contributions] == [1, 2, 3]
    assert [c.column for c in window.contributions] == [v.column for v in window.verdicts]
    leader = window.contributions[0]
    assert leader.column == "score"
    assert leader.contribution > 0.95
    assert sum(c.contribution for c in window.contributions) == pytest.approx(1)
    moved = leader.moved[0]
    assert moved.bin.startswith("<= ")
    assert moved.reference == pytest.approx(0.1, abs=1e-3)
    assert moved.window == pytest.approx(0.1 ** (1 / 3), abs=0.05)
    assert moved.share >= leader.moved[1].share >= leader.moved[2].share > 0


# --- segments ---


def test_a_drift_in_one_segment_is_found_there() -> None:
    monitor, heard = watch(replace(SETTINGS, segment=SEGMENT), CUT)
    for seed in range(1, 21):
        rows = table(seed, 500)
        rows["score"] = np.where(rows["country"] == b"b", rows["score"] ** 1.5, rows["score"]).astype("f4")
        feed(monitor, [rows])
    report = monitor.report()
    assert report.segment_column == "country"
    assert [s.segment for s in report.segments] == ["b", "a"]
    assert report.segments[0].in_alarm == ("score",)
    assert report.segments[0].contributions[0].column == "score"
    assert report.segments[1].in_alarm == ()
    assert {(alarm.segment, alarm.column) for alarm in heard if alarm.segment} == {("b", "score")}
    # x differs between segments from the start: each is held against its own reference.
    assert all(v.column != "x" or not v.real for s in report.segments for v in s.verdicts)
    json.dumps(report.to_dict())


def test_segments_share_the_level_and_count_what_a_monitor_of_their_rows_would() -> None:
    cut, whole = watch(replace(SETTINGS, segment=SEGMENT), CUT)[0], watch(SETTINGS, CUT)[0]
    batches = [table(seed, 333) for seed in range(1, 13)]
    feed(cut, batches)
    only = [{name: values[batch["country"] == b"b"] for name, values in batch.items()} for batch in batches]
    feed(whole, only)
    state = cut.state()
    assert (state.segments["stable"]["b"].total == whole.state().arms["stable"].total).all()
    own, other = window_of(cut.report()), window_of(whole.report())
    assert own.level == pytest.approx(other.level / 3)
    assert {segment.level for segment in cut.report().segments} == {own.level}
    assert (
        state.segments["stable"]["b"].window(WINDOW).cells == whole.state().arms["stable"].window(WINDOW).cells
    ).all()


def test_segments_merge_and_survive_a_restart() -> None:
    settings = replace(SETTINGS, segment=SEGMENT, windows=(time_window(10, 1),))
    items = [item(table(second, 200), second * SECOND_NS, "ab"[second % 2]) for second in range(9)]
    one, parts = watch(settings, CUT)[0], [watch(settings, CUT)[0] for _ in range(3)]
    one.ingest(one.keys, items)
    for place, own in enumerate(parts):
        own.ingest(own.keys, items[place::3])
    for own in (one, *parts):
        own.tick(20 * SECOND_NS)
    merged = one.judge.report(merge([parts[2].state(), merge([own.state() for own in parts[:2]])]))
    assert repr(merged) == repr(one.judge.report(merge([one.state()])))
    assert len(merged.segments) == 4
    again, _ = watch(settings, CUT)
    again.restore(MonitorState.from_bytes(one.snapshot()))
    assert repr(again.report()) == repr(one.report())


def test_memory_of_segments_is_bounded_and_said() -> None:
    size = 100 * sum(len(column.counts) for column in PROFILE.columns)
    monitor, _ = watch(replace(SETTINGS, segment=replace(SEGMENT, max_bytes=size)), CUT)
    feed(monitor, [table(1, 500)])
    state = monitor.state()
    assert sum(len(found) for found in state.segments.values()) == 2
    feed(monitor, [table(2, 500)], arm="canary")
    feed(monitor, [table(2, 500)], arm="shadow")
    assert any("not counted by segment" in warning for warning in monitor.report().warnings)
    assert monitor.report().counted == {"canary": 500, "shadow": 500, "stable": 500}
    with pytest.raises(SettingsError, match=r"max_bytes must be at least \d+"):
        watch(replace(SETTINGS, segment=replace(SEGMENT, max_bytes=10)), CUT)


# --- history, distributions, sample ---


def test_history_has_each_look_with_thresholds_that_the_verdicts_obey() -> None:
    rules = AlarmRules(ert_rows=1_000_000, k=1, m=1, min_psi=0.0, min_ks=0.0)
    monitor, heard = watch(replace(SETTINGS, rules=rules, history_looks=8))
    for seed in range(1, 13):
        rows = table(seed, 500)
        rows["score"] = (rows["score"] ** (1 + seed / 10)).astype("f4")
        feed(monitor, [rows])
    history = monitor.history()
    (looks,) = history["windows"]
    assert (looks["arm"], looks["window"], len(looks["time_ns"])) == ("stable", "1000rows", 8)
    json.dumps(history, allow_nan=False)
    score = looks["columns"]["score"]
    alarms = [
        psi > psi_limit or ks > ks_limit
        for psi, psi_limit, ks, ks_limit in zip(
            score["psi"], score["psi_threshold"], score["ks"], score["ks_threshold"], strict=True
        )
    ]
    assert True in alarms
    assert alarms == score["in_alarm"]
    assert looks["columns"]["country"]["ks"] == [None] * 8
    last = next(s for s in window_of(monitor.report()).scores if s.column == "score")
    assert score["psi"][-1] == pytest.approx(last.psi, rel=1e-4)
    assert score["log10_p"][-1] == pytest.approx(math.log10(min(last.psi_p, last.ks_p)), rel=1e-4)
    # scipy: the quantiles at half of the level, for n = 1000 against 20,000.
    scale = 1 / 1000 + 1 / ROWS
    assert score["psi_threshold"][-1] == pytest.approx(stats.chi2.isf(looks["level"][-1] / 2, 9) * scale, rel=1e-4)
    assert score["ks_threshold"][-1] == pytest.approx(
        stats.kstwobign.isf(looks["level"][-1] / 2) * math.sqrt(scale), rel=1e-4
    )
    only = monitor.history(column="x", last=2)["windows"][0]
    assert (list(only["columns"]), len(only["rows"])) == (["x"], 2)
    assert monitor.history(arm="canary")["windows"] == []
    again, _ = watch(replace(SETTINGS, rules=rules, history_looks=4))
    again.restore(MonitorState.from_bytes(monitor.snapshot()))
    assert again.history()["windows"][0]["rows"] == looks["rows"][-4:]
    assert again.history()["windows"][0]["columns"]["score"]["psi"] == score["psi"][-4:]
    assert heard


def test_a_column_of_few_numbers_shows_ks_and_is_tested_by_psi_alone() -> None:
    rng = np.random.default_rng(3)
    known, served = rng.integers(0, 20, ROWS).astype("f4"), np.minimum(rng.integers(0, 21, 1000), 19).astype("f4")
    monitor, _ = watch(profile=ReferenceProfile.from_arrays({"x": known}))
    monitor.ingest(monitor.keys, [Item(0, "stable", 1000, 0, [[served.tobytes()]])])
    (score,), (verdict,) = window_of(monitor.report()).scores, window_of(monitor.report()).verdicts
    found = stats.ks_2samp(served, known, method="asymp")
    assert score.ks_low == score.ks_high == pytest.approx(found.statistic)
    assert score.ks_p == pytest.approx(found.pvalue, rel=0.05)
    assert monitor.figures()[0].ks_p.tolist() == [score.ks_p]
    assert verdict.test == "psi"
    (looks,) = monitor.history()["windows"]
    assert looks["columns"]["x"]["ks_threshold"] == [None]
    # scipy: the quantile at all of the level, for 1000 rows against 20,000.
    limit = stats.chi2.isf(looks["level"][0], 19) * (1 / 1000 + 1 / ROWS)
    assert looks["columns"]["x"]["psi_threshold"] == [pytest.approx(limit, rel=1e-4)]


def drifted(clear: bool = True) -> Monitor:
    """After alarms of columns, of a segment and of a check that were raised, and cleared if asked."""
    rules = replace(SETTINGS.rules, k=1, m=1, clear_looks=1)
    schema = (ColumnRule("x", max=3.0, tolerate=0.01),)
    monitor, _ = watch(replace(SETTINGS, rules=rules, segment=SEGMENT, schema=schema), CUT)
    for moved in (5.0, 5.0, *([0.0, 0.0, 0.0] if clear else [])):
        rows = table(3, 4000)
        feed(monitor, [{**rows, "x": rows["x"] + np.float32(moved)}])
    return monitor


def test_past_alarms_go_with_a_snapshot_and_not_with_a_merge() -> None:
    monitor = drifted()
    alarms = monitor.past_alarms()
    assert {(alarm.state, alarm.segment, alarm.check) for alarm in alarms} >= {
        ("raised", "", "drift"), ("cleared", "", "drift"), ("raised", "b", "drift"), ("raised", "", "above"),
    }  # fmt: skip
    data = monitor.snapshot()
    state = MonitorState.from_bytes(data)
    assert state.to_bytes() == data
    heard: list[Alarm] = []
    again = Monitor("m", "1", CUT, monitor.settings, on_alarm=lambda _, alarm: heard.append(alarm))
    again.restore(state)
    assert repr(again.past_alarms()) == repr(alarms)
    assert again.snapshot() == data
    assert heard == []
    assert merge([monitor.state(history=True)]).past is None
    assert monitor.state().past is None
    again.restart()
    assert again.past_alarms() == []


def resealed(monitor: Monitor, past: dict[str, Any] | None, without: Sequence[str] = ()) -> MonitorState:
    """What the monitor saves, with other past alarms in its header and without some arrays."""
    header, arrays, _ = sealed.unpack(monitor.snapshot(), "monitor state", StateError, "state")
    kept = {name: array for name, array in arrays.items() if name not in without}
    entry = header.pop("past")
    more = {} if past is None else {"past": {**entry, **past}}
    return MonitorState.from_bytes(sealed.pack("monitor state", {**header, **more}, kept))


@pytest.mark.parametrize("past", [None, {"names": []}])
def test_a_state_of_another_build_has_no_past_alarms_and_all_else(past: dict[str, Any] | None) -> None:
    """One from before there were any, and one whose alarms were made of other things."""
    monitor = drifted(clear=False)
    again = Monitor("m", "1", CUT, monitor.settings)
    again.restore(resealed(monitor, past, ["/past/wholes", "/past/numbers"] if past is None else ()))
    assert again.past_alarms() == []
    assert again.in_alarm() == monitor.in_alarm() != ()
    assert again.report().counted == monitor.report().counted


@pytest.mark.parametrize(
    ("past", "without"),
    [
        ({"texts": 7}, ()),
        ({"texts": []}, ()),
        ({"texts": [["raised"]]}, ()),
        ({}, ["/past/wholes"]),
        ({}, ["/past/numbers"]),
    ],
)
def test_past_alarms_that_are_damaged_refuse_the_state(past: dict[str, Any], without: Sequence[str]) -> None:
    monitor = drifted(clear=False)
    again = Monitor("m", "1", CUT, monitor.settings)
    with pytest.raises(StateError, match="damaged"):
        again.restore(resealed(monitor, past, without))
    assert (again.past_alarms(), again.in_alarm(), again.report().counted) == ([], (), {})


def test_distributions_are_shares_of_the_psi_bins() -> None:
    monitor, _ = watch()
    rows = table(7, 1000)
    feed(monitor, [rows])
    found = monitor.distributions()
    assert (found["arm"], found["window"], found["rows"]) == ("stable", "1000rows", 1000)
    country = next(c for c in found["columns"] if c["column"] == "country")
    assert country["bins"] == ["a", "b", "c", "new", "missing"]
    assert country["window"][:3] == [float(np.mean(rows["country"] == name)) for name in (b"a", b"b", b"c")]
    assert sum(country["reference"]) == pytest.approx(1)
    score = next(s for s in window_of(monitor.report()).scores if s.column == "country")
    assert sum(country["psi"]) == pytest.approx(score.psi)
    json.dumps(found, allow_nan=False)
    with pytest.raises(StateError, match="no row of arm 'canary'"):
        monitor.distributions("canary")
    with pytest.raises(StateError, match="no window '7rows'; there are 1000rows"):
        monitor.distributions("stable", "7rows")


def test_the_newest_rows_are_kept_as_they_came() -> None:
    monitor, _ = watch(replace(SETTINGS, keep_rows=250))
    batches = [table(seed, 100) for seed in range(4)]
    for place, batch in enumerate(batches):
        monitor.ingest(monitor.keys, [item(batch, place * SECOND_NS, "stable" if place < 3 else "canary")])
    sample = monitor.sample()
    together = {name: np.concatenate([batch[name] for batch in batches])[-250:] for name in batches[0]}
    assert (sample["x"] == together["x"]).all()
    assert sample["x"].dtype == np.dtype("f4")
    assert sample["country"].tolist() == together["country"].tolist()
    assert sample["__time"].tolist() == [second * SECOND_NS for second in (1,) * 50 + (2,) * 100 + (3,) * 100]
    assert sample["__arm"].tolist() == ["stable"] * 150 + ["canary"] * 100
    again = ReferenceProfile.from_table(sample, COLUMNS)
    assert again.rows == 250
    with pytest.raises(SettingsError, match="keeps no rows"):
        watch()[0].sample()


def test_kept_rows_are_bounded_by_bytes() -> None:
    monitor, _ = watch(replace(SETTINGS, keep_rows=100_000, keep_bytes=50_000))
    feed(monitor, [table(seed, 100) for seed in range(20)])
    kept = len(monitor.sample()["x"])
    assert 0 < kept < 2000
    assert kept % 100 == 0
    assert monitor.sample()["x"][-1] == table(19, 100)["x"][-1]


# --- what is exported ---


@pytest.mark.parametrize("reference", ["profile", "trailing_week"])
def test_figures_are_those_of_the_report(reference: Literal["profile", "trailing_week"]) -> None:
    """Of every window: full and not, narrow and wide counts, with and without rows."""
    windows = (rows_window(200), rows_window(70_000, 1000), time_window(10, 1))
    settings = Settings(windows=windows, rules=AlarmRules(k=1, m=1, min_rows=50), reference=reference)
    one, heard = watch(settings)
    for step in range(60):
        values = table(step, 100)
        values["x"] += step > 50
        values["score"][:20] = np.nan
        one.ingest(one.keys, [item(values, step * SECOND_NS, "canary" if step % 7 == 6 else "stable")])
    one.tick(61 * SECOND_NS)
    figures, report = one.figures(), one.report()
    assert heard
    assert [(f.arm, f.window, f.in_alarm) for f in figures] == [(w.arm, w.window, w.in_alarm) for w in report.windows]
    for found, whole in zip(figures, report.windows, strict=True):
        scores = {score.column: score for score in whole.scores}
        for name in ("psi", "ks_low", "ks_p", "missing", "below", "above", "new_category"):
            expected = [getattr(scores[column], name) for column in found.columns]
            assert np.allclose(getattr(found, name), expected, rtol=1e-15, atol=0, equal_nan=True), name
        evidence = {verdict.column: verdict.ratio for verdict in whole.verdicts}
        assert found.evidence.tolist() == [evidence[column] for column in found.columns]


def test_figures_of_nothing() -> None:
    assert watch()[0].figures() == ()


@pytest.mark.parametrize("reference", ["profile", "trailing_week"])
def test_a_shift_is_seen_though_the_clock_was_set_back_for_long(
    reference: Literal["profile", "trailing_week"],
) -> None:
    window = time_window(3600)
    monitor, alarms = watch(replace(SETTINGS, windows=(window,), reference=reference))
    minute, start = 60 * SECOND_NS, 10**6 * SECOND_NS

    def pass_by(now_ns: int, seed: int, shift: float) -> None:
        values = table(seed, 100)
        monitor.ingest(monitor.keys, [item({**values, "x": values["x"] + shift}, now_ns)])
        monitor.tick(now_ns)

    for number in range(120):
        pass_by(start + number * minute, number, 0.0)
    assert not alarms
    for number in range(40):
        pass_by(start - 10**5 * SECOND_NS + number * minute, 500 + number, 3.0)
    assert {alarm.column for alarm in alarms if alarm.check == "drift"} == {"x"}
    assert all(alarm.end_ns < start for alarm in alarms)
