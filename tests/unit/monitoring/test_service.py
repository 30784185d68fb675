"""The service around real engines and batchers: leases, stalls, failures, swaps, mirrors, and what is kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from monitor.outcomes import LabelRules, LabelSettings
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState
from monitor.types import AlarmRules, ColumnRule, Settings, rows_window, time_window
from server.batching.batcher import Batcher, Work
from server.errors import ModelLoadError, NotFound
from server.monitoring.labels import LabelWatch
from server.monitoring.service import Mirror, MonitorService, Timing
from server.monitoring.views import MonitorViews
from server.monitoring.watch import (
    MonitoredRuntime,
    Watch,
    WatchedEngine,
    WatchedRequest,
    labels_of,
    rules_of,
    taps_of,
)
from server.runtime.base import Engine, LoadRequest, ModelOptions
from server.runtime.fake import FakeRuntime, Script
from server.types import Tensor

WIDTH = 4
QUICK = Timing(drain_s=0.005, gauges_s=0.0, save_s=3600.0)
SETTINGS = Settings(windows=(rows_window(200),), rules=AlarmRules(k=1, m=1))


def normal(rows: int, seed: int, shift: float = 0.0) -> Any:
    return (np.random.default_rng(seed).standard_normal((rows, WIDTH)) + shift).astype("f4")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.tgp"
    ReferenceProfile.from_arrays({"x": normal(5000, 1)}).save(path)
    return path


class Rig:
    """A service, and what loads engines for it. ``events``: what ``on_alarm`` was given."""

    def __init__(self, folder: Path | None, **options: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.audited: list[tuple[str, str]] = []
        self.service = MonitorService(
            folder,
            audit=lambda action, subject, _: self.audited.append((action, subject)),
            **{"on_alarm": self.events.append, "timing": QUICK, **options},
        )

    def load(
        self,
        watch: Watch | None,
        version: str = "1",
        script: Script | None = None,
        instances: int = 1,
        labels: LabelWatch | None = None,
    ) -> Engine:
        request = LoadRequest("m", version, Path(), ModelOptions(instances=instances))
        if watch is not None or labels is not None:
            request = WatchedRequest.of(request, watch, labels)
        return MonitoredRuntime(FakeRuntime(script or Script()), self.service).load(request)

    def follow(self, *engines: Engine, mirrors: tuple[Mirror, ...] = ()) -> None:
        self.service.follow([taps for engine in engines if (taps := taps_of(engine))], mirrors)

    def row(self, version: str = "1") -> dict[str, Any]:
        return next((row for row in self.service.list() if row["version"] == version), {})

    def settled(self, offered: int, version: str = "1") -> dict[str, Any]:
        until(lambda: self.row(version).get("offered") == offered and not self.row(version)["waiting"])
        return self.row(version)

    def counted(self, version: str = "1", **arms: int) -> None:
        """What was taken is counted a moment later."""
        until(lambda: self.service.report("m", version)["counted"] == arms)


def until(check: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "monitors")
    yield made
    made.service.close()


def serve(engine: Engine, rows: Any, arm: str = "stable", chunk: int = 20) -> int:
    """Send rows through a batcher on a loop of its own, ``chunk`` rows a request; how many requests were answered."""

    async def main() -> int:
        loop = asyncio.get_running_loop()
        batcher = Batcher(
            engine,
            ModelOptions().batching,
            clock=time.monotonic_ns,
            call_soon=loop.call_soon,
            call_soon_threadsafe=loop.call_soon_threadsafe,
            call_later=loop.call_later,
        )
        batcher.taps, batcher.arm = taps_of(engine), arm
        answered = asyncio.Event()
        good: list[Work] = []
        left = 0

        def done(work: Work) -> None:
            nonlocal left
            left -= 1
            if work.error is None:
                good.append(work)
            if not left:
                answered.set()

        for start in range(0, len(rows), chunk * 500):
            answered.clear()
            block = rows[start : start + chunk * 500]
            works = [
                Work([Tensor("x", "FP32", part.shape, part.tobytes())], len(part), done)
                for part in np.array_split(block, max(1, len(block) // chunk))
            ]
            left = len(works)
            for work in works:
                batcher.submit(work)
            await asyncio.wait_for(answered.wait(), 30)
        await asyncio.to_thread(batcher.close)
        return len(good)

    return asyncio.run(main())


def test_a_version_without_a_watch_is_as_it_was(rig: Rig) -> None:
    engine = rig.load(None)
    assert not isinstance(engine, WatchedEngine)
    assert taps_of(engine) is None
    assert serve(engine, normal(100, 2)) == 5
    assert rig.service.list() == []
    assert list(rig.service.families()) == []
    with pytest.raises(NotFound, match="is not monitored"):
        rig.service.report("m", "1")


def test_rows_are_counted_and_alarms_are_told(rig: Rig, profile: Path) -> None:
    engine = rig.load(Watch(profile, SETTINGS))
    rig.follow(engine)
    assert serve(engine, normal(400, 2)) == 20
    assert rig.settled(400)["dropped"] == 0
    assert rig.events == []
    serve(engine, normal(400, 3, shift=1.0))
    rig.settled(800)
    until(lambda: len(rig.events) >= WIDTH)
    event = rig.events[0]
    assert (event["event"], event["model"], event["version"], event["arm"]) == ("drift.raised", "m", "1", "stable")
    assert {event["feature"] for event in rig.events} == {f"x[{n}]" for n in range(WIDTH)}
    assert ("drift.raised", "m:1") in rig.audited
    assert len({event["key"] for event in rig.events}) == len(rig.events)
    rig.counted("1", stable=800)
    report = rig.service.report("m", "1")
    assert set(report["windows"][0]["in_alarm"]) == {event["feature"] for event in rig.events}
    until(lambda: set(rig.row()["alarms"].get("stable", ())) == {f"x[{n}]" for n in range(WIDTH)})
    engine.close()
    until(lambda: rig.service.list() == [])


def test_a_stalled_drain_drops_exactly_and_changes_no_answer(profile: Path) -> None:
    gate = threading.Event()
    gate.set()
    rig = Rig(None, on_drain=lambda: gate.wait(60))
    ring = replace(SETTINGS, ring_rows=1000)
    engine = rig.load(Watch(profile, ring))
    rig.follow(engine)
    try:
        serve(engine, normal(100, 2))
        rig.settled(100)
        gate.clear()
        assert serve(engine, normal(10_000, 3)) == 500
        row = rig.row()
        assert row["offered"] == 10_100
        assert row["waiting"] <= 1000
        assert row["dropped"] == 10_000 - row["waiting"]
        gate.set()
        row = rig.settled(10_100)
        until(lambda: rig.service.report("m", "1")["dropped"] == {"stable": row["dropped"]})
        assert rig.service.report("m", "1")["counted"]["stable"] + row["dropped"] == 10_100
        serve(engine, normal(200, 4))
        rig.settled(10_300)
        until(lambda: bool(rig.service.report("m", "1")["windows"][0]["sampled"]))
    finally:
        gate.set()
        engine.close()
        rig.service.close()


def test_a_mirror_begins_and_ends_with_the_table(profile: Path) -> None:
    """What was answered before it began or ended and still waits is counted as it was answered."""
    rig = Rig(None, timing=replace(QUICK, drain_s=3600.0))
    stable, candidate = rig.load(Watch(profile, SETTINGS)), rig.load(Watch(profile, SETTINGS), version="2")
    taps = taps_of(candidate)
    assert taps is not None
    mirror = Mirror("m", "2", "1", "candidate")
    offered = 0
    try:
        rig.follow(stable, candidate)
        for rows, mirrors in ((100, (mirror,)), (50, ()), (30, (mirror,))):
            offered += rows
            assert taps[0].offer(rows, [[normal(rows, rows).tobytes()]], [], offered)
            rig.follow(stable, candidate, mirrors=mirrors)
            rig.settled(offered, "2")
        rig.counted("2", stable=180)
        rig.counted("1", candidate=50)
    finally:
        for engine in (stable, candidate):
            engine.close()
        rig.service.close()


def test_rows_of_another_shape_are_refused_by_all_accounts(rig: Rig, profile: Path) -> None:
    engine = rig.load(Watch(profile, SETTINGS))
    rig.follow(engine)
    taps = taps_of(engine)
    assert taps is not None
    for rows in (1, 2, 3):
        assert taps[0].offer(rows, [[normal(2, 2).tobytes()]], [], rows)
    until(lambda: rig.row()["refused"] == 4)
    assert (rig.row()["offered"], rig.row()["waiting"]) == (6, 0)
    report = rig.service.report("m", "1")
    assert (report["counted"], report["refused"]) == ({"stable": 2}, {"stable": 4})
    engine.close()


def test_a_ring_half_full_of_bytes_does_not_wait_for_its_round(profile: Path) -> None:
    rig = Rig(None, timing=replace(QUICK, drain_s=3600.0))
    engine = rig.load(Watch(profile, replace(SETTINGS, ring_bytes=10_000)))
    rig.follow(engine)
    taps = taps_of(engine)
    assert taps is not None
    try:
        assert taps[0].offer(400, [[normal(400, 2).tobytes()]], [], 1)  # of 625 that have room
        assert rig.settled(400)["dropped"] == 0
    finally:
        engine.close()
        rig.service.close()


def test_a_failing_drain_is_told_once_and_counts_again(profile: Path) -> None:
    broken = threading.Event()
    rounds: list[None] = []

    def on_drain() -> None:
        if broken.is_set():
            rounds.append(None)
            raise ZeroDivisionError

    with structlog.testing.capture_logs() as logs:
        rig = Rig(None, on_drain=on_drain)
        engine = rig.load(Watch(profile, SETTINGS))
        rig.follow(engine)
        broken.set()
        assert serve(engine, normal(200, 2)) == 10
        until(lambda: len(rounds) > 5)
        broken.clear()
        rig.settled(200)
        until(lambda: any(line["event"] == "monitor_counts_again" for line in logs))
        engine.close()
        rig.service.close()
    assert [line["event"] for line in logs].count("monitor_failed") == 1
    assert [line["event"] for line in logs].count("monitor_counts_again") == 1


def test_who_is_told_may_fail(profile: Path) -> None:
    def on_alarm(_: dict[str, Any]) -> None:
        raise ZeroDivisionError

    rig = Rig(None, on_alarm=on_alarm)
    engine = rig.load(Watch(profile, SETTINGS))
    rig.follow(engine)
    serve(engine, normal(400, 3, shift=1.0))
    rig.settled(400)
    until(lambda: len(rig.audited) >= WIDTH)
    serve(engine, normal(200, 4, shift=1.0))
    rig.settled(600)
    engine.close()
    rig.service.close()


@pytest.mark.parametrize("instances", [1, 3])
def test_every_instance_has_a_tap_of_its_own(rig: Rig, profile: Path, instances: int) -> None:
    engine = rig.load(Watch(profile, SETTINGS), script=Script(run_ns=2_000_000), instances=instances)
    rig.follow(engine)
    taps = taps_of(engine)
    assert taps is not None
    assert len(set(taps)) == instances
    serve(engine, normal(3000, 2))
    rig.settled(3000)
    rig.counted("1", stable=3000)


def test_the_same_watch_goes_on_counting_in_a_version_loaded_again(rig: Rig, profile: Path) -> None:
    first = rig.load(Watch(profile, SETTINGS))
    rig.follow(first)
    serve(first, normal(300, 2))
    second = rig.load(Watch(profile, SETTINGS))
    rig.follow(second)
    first.close()
    serve(second, normal(300, 3))
    rig.settled(600)
    rig.counted("1", stable=600)


def test_another_watch_starts_anew_beside_the_one_that_serves(rig: Rig, profile: Path) -> None:
    first = rig.load(Watch(profile, SETTINGS))
    rig.follow(first)
    serve(first, normal(300, 2))
    rig.settled(300)
    second = rig.load(Watch(profile, replace(SETTINGS, max_arms=3)))
    assert rig.row()["offered"] == 300, "what is only prepared is not shown"
    rig.follow(second)
    assert rig.row()["offered"] == 0
    serve(second, normal(100, 3))
    rig.settled(100)
    assert rig.service.report("m", "1")["version"] == "1"
    rig.counted("1", stable=100)
    rig.follow(first)  # rolled back to what was kept warm
    assert rig.row()["offered"] == 300
    second.close()
    first.close()
    rig.follow()
    until(lambda: rig.service.list() == [])


def test_arms_are_apart_and_a_canary_is_mirrored(rig: Rig, profile: Path) -> None:
    stable = rig.load(Watch(profile, SETTINGS))
    canary = rig.load(Watch(profile, SETTINGS), version="2")
    rig.follow(stable, canary, mirrors=(Mirror("m", "2", "1", "candidate"), Mirror("m", "9", "1", "nobody")))
    until(lambda: rig.service._mirrored != {})
    serve(stable, normal(400, 2))
    serve(canary, normal(400, 3, shift=1.0), arm="candidate")
    rig.settled(400)
    rig.settled(400, "2")
    monitor = rig.service.monitor("m", "1")
    rig.counted("1", stable=400, candidate=400)
    rig.counted("2", candidate=400)
    (window,) = monitor.compare("candidate")
    assert all(verdict.real for verdict in window.verdicts)
    (shown,) = MonitorViews(rig.service).one("m", "1")["comparisons"]
    assert (shown["arm"], shown["against"], shown["rows"]) == ("candidate", "stable", 200)
    assert [score["psi"] for score in shown["scores"]] == [score.psi for score in window.scores]
    assert not shown["in_alarm"]
    assert MonitorViews(rig.service).one("m", "2")["comparisons"] == []
    rig.follow(stable, canary)
    until(lambda: rig.service._mirrored == {})
    serve(canary, normal(100, 4), arm="stable")
    rig.settled(500, "2")
    assert rig.service.report("m", "1")["counted"]["candidate"] == 400


def test_counts_are_kept_and_another_profile_starts_anew(tmp_path: Path, profile: Path) -> None:
    folder = tmp_path / "monitors"
    first = Rig(folder)
    engine = first.load(Watch(profile, SETTINGS))
    first.follow(engine)
    serve(engine, normal(400, 2))
    first.service.close()
    (path,) = folder.glob("m/1-*.state")

    second = Rig(folder)
    again = second.load(Watch(profile, SETTINGS))
    assert second.service.report("m", "1")["counted"] == {"stable": 400}
    second.service.close()
    again.close()

    ReferenceProfile.from_arrays({"x": normal(5000, 9)}).save(profile)
    with structlog.testing.capture_logs() as logs:
        third = Rig(folder)
        third.load(Watch(profile, SETTINGS))
        assert third.service.report("m", "1")["counted"] == {}
        third.service.close()
    assert any(line["event"] == "monitor_starts_anew" for line in logs)

    path.write_bytes(b"damaged")
    assert len(list(folder.glob("m/1-*.state"))) == 2


@pytest.mark.parametrize("fault", ["absent", "damaged", "other tensor", "calibration"])
def test_a_profile_that_cannot_be_used_refuses_the_version(rig: Rig, profile: Path, fault: str) -> None:
    watch = Watch(profile, SETTINGS)
    if fault == "absent":
        profile.unlink()
    elif fault == "damaged":
        profile.write_bytes(profile.read_bytes()[:-1])
    elif fault == "other tensor":
        ReferenceProfile.from_arrays({"z": normal(500, 1)}).save(profile)
    else:
        watch = replace(watch, calibration=profile)
    with pytest.raises(ModelLoadError, match=r"profile\.tgp cannot be used"):
        rig.load(watch)
    assert rig.service.list() == []
    assert rig.service._monitored == []


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "No such file"), (b"{", "it is no JSON"), (b"[1]", "the calibration is damaged")]
)
def test_a_calibration_that_cannot_be_used_is_named(
    rig: Rig, profile: Path, content: bytes | None, reason: str
) -> None:
    path = profile.with_name("dependence.json")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"the calibration dependence\.json cannot be used: .*{reason}"):
        rig.load(Watch(profile, replace(SETTINGS), calibration=path))
    assert rig.service._monitored == []


LABELS = LabelWatch(LabelSettings("binary", "y", windows=(rows_window(20),)))


def test_labels_are_joined_without_a_profile_and_end_with_the_engine(rig: Rig) -> None:
    engine = rig.load(None, labels=LABELS)
    rig.follow(engine)
    assert taps_of(engine) is None
    assert rules_of(engine) is None
    tap = labels_of(engine)
    assert tap is not None
    serve(engine, normal(20, 2))
    tap.answered(("a",), "stable", 2, [], [Tensor("y", "FP32", (2, 1), np.array([0.9, 0.1], "f4").tobytes())], 0, 1)
    assert tap.label("a", 1, 0.0, "", "", 2)
    views = MonitorViews(rig.service)

    def joined() -> int:
        return sum(group["joined"] for group in views.one("m", "1")["performance"]["join"]["groups"])

    until(lambda: joined() == 1)
    assert views.one("m", "1")["report"] == {"model": "m", "version": "1", "windows": []}
    with pytest.raises(NotFound, match="not monitored"):
        views.sample("m", "1")
    until(lambda: any(family.name == "tidegate_label_rows_total" for family in rig.service.families()))
    engine.close()
    engine.close()
    until(lambda: rig.service.labels.all() == [])
    with pytest.raises(NotFound):
        views.one("m", "1")


def test_labels_of_an_output_that_is_none_refuse_the_version(rig: Rig, profile: Path) -> None:
    wrong = LabelWatch(LabelSettings("binary", "score"))
    with pytest.raises(ModelLoadError, match="labels are of output 'score', but the outputs are y"):
        rig.load(Watch(profile, SETTINGS), labels=wrong)
    with pytest.raises(ModelLoadError, match="labels are cut by 'what'"):
        rig.load(Watch(profile, SETTINGS), labels=replace(LABELS, slice="what"))
    until(lambda: rig.service._monitored == [])
    assert rig.service.labels.all() == []


def test_refused_requests_are_counted_over_engines(rig: Rig, profile: Path) -> None:
    settings = replace(SETTINGS, schema=(ColumnRule("x[0]", max=1.0, action="reject"),))

    def refused() -> float:
        families = {family.name: family for family in rig.service.families()}
        return sum(families["tidegate_monitor_requests_rejected_total"].points.values())

    engines = [rig.load(Watch(profile, settings)) for _ in range(2)]
    rig.follow(*engines)
    high = [Tensor("x", "FP32", (1, WIDTH), np.full(WIDTH, 2, "f4").tobytes())]
    for engine in engines:
        rules = rules_of(engine)
        assert rules is not None
        assert "rule max" in str(rules.refusal(high))
    assert refused() == 2
    engines[0].close()
    rig.follow(engines[1])
    until(lambda: len(rig.service._monitored[0].leases) == 1)
    assert refused() == 2
    plain = rig.load(Watch(profile, SETTINGS), version="2")
    assert rules_of(plain) is None


def test_a_rule_that_does_not_fit_refuses_the_version(rig: Rig, profile: Path) -> None:
    for rule in (ColumnRule("what", min=0.0), ColumnRule("what", min=0.0, action="reject")):
        with pytest.raises(ModelLoadError, match="what"):
            rig.load(Watch(profile, replace(SETTINGS, schema=(rule,))))


def test_a_broken_listener_of_labels_keeps_no_row_from_being_counted(rig: Rig, profile: Path) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("no")

    rig.service.labels.subscribe(broken)
    engine = rig.load(Watch(profile, SETTINGS), labels=LABELS)
    rig.follow(engine)
    tap = labels_of(engine)
    assert tap is not None
    tap.answered(("a",), "stable", 1, [], [Tensor("y", "FP32", (1, 1), np.array([0.9], "f4").tobytes())], 0, 1)
    tap.label("a", 0, 1.0, "", "", 2)
    serve(engine, normal(200, 2))
    rig.settled(200)
    rig.counted("1", stable=200)


def test_an_alarm_is_on_disk_before_long(tmp_path: Path, profile: Path) -> None:
    all_there = threading.Event()
    first = Rig(tmp_path / "monitors", on_drain=lambda: all_there.wait(60))
    engine = first.load(Watch(profile, SETTINGS))
    first.follow(engine)
    serve(engine, normal(400, 3, shift=1.0))
    all_there.set()  # else the file could be of the first rows only, which had raised the alarms already
    until(lambda: len(first.events) == WIDTH)
    until(lambda: list((tmp_path / "monitors").glob("m/1-*.state")) != [])
    second = Rig(tmp_path / "monitors")  # the first is not closed: as after a crash
    again = second.load(Watch(profile, SETTINGS))
    second.follow(again)
    serve(again, normal(400, 4, shift=1.0))
    second.counted("1", stable=800)
    assert second.events == []
    told = MonitorViews(first.service).one("m", "1")["alarms"]
    assert [(row["column"], row["check"], row["state"]) for row in told] == [
        (event["feature"], "drift", "raised") for event in first.events
    ]
    assert told == [asdict(alarm) for alarm in first.service.monitor("m", "1").past_alarms()]
    assert second.service.alarms("m", "1") == told
    for rig in (first, second):
        rig.service.close()


def test_past_alarms_stay_when_a_version_is_watched_in_another_way(tmp_path: Path, profile: Path) -> None:
    """And when it is restarted then; other versions have none of them."""
    first = Rig(tmp_path / "monitors")
    engine = first.load(Watch(profile, SETTINGS))
    first.follow(engine)
    serve(engine, normal(400, 3, shift=1.0))
    until(lambda: len(first.service.alarms("m", "1")) == WIDTH)
    told = first.service.alarms("m", "1")
    other = Watch(profile, replace(SETTINGS, max_arms=3))
    again = first.load(other)
    first.follow(again)
    engine.close()
    until(lambda: len(first.service._monitored) == 1)
    assert first.service.report("m", "1")["counted"] == {}
    assert first.service.alarms("m", "1") == told
    unlike = first.load(other, version="2")
    first.follow(again, unlike)
    assert first.service.alarms("m", "2") == []
    first.service.close()
    second = Rig(tmp_path / "monitors")
    second.follow(second.load(other))
    assert second.service.alarms("m", "1") == told
    assert second.events == []
    second.service.close()


def test_past_alarms_of_columns_and_of_labels_are_one_list_in_the_order_of_time(tmp_path: Path, profile: Path) -> None:
    rules = LabelRules(AlarmRules(k=1, m=1, ert_rows=1000), learn_rows=200)
    labels = LabelWatch(LabelSettings("binary", "y", form="class", windows=(rows_window(100),), rules=rules))
    lists = []
    for life in range(3):
        rig = Rig(tmp_path / "monitors")
        # Labels of other settings in the end: they go on from no file, but have been there at the same time.
        engines = [rig.load(Watch(profile, SETTINGS), labels=labels)]
        if life == 2:
            engines.append(rig.load(Watch(profile, SETTINGS), labels=replace(labels, slice="x[1]")))
            engines[0].close()
            until(lambda made=rig: len(made.service.labels.all()) == 1)  # type: ignore[misc]
        rig.follow(engines[-1])
        tap = labels_of(engines[-1])
        assert tap is not None
        if life == 0:
            serve(engines[0], normal(400, 3, shift=1.0))
            until(lambda made=rig: len(made.service.alarms("m", "1")) == WIDTH)  # type: ignore[misc]
            for number in range(40):
                classes = np.arange(10, dtype="f4").reshape(10, 1) % 2
                now = time.time_ns()
                inputs = [Tensor("x", "FP32", (10, WIDTH), normal(10, 1).tobytes())]
                tap.answered(
                    (str(number),), "stable", 10, inputs, [Tensor("y", "FP32", (10, 1), classes.tobytes())], 0, now
                )
                for row in range(10):
                    tap.label(str(number), row, float(row % 2 if number < 25 else 1 - row % 2), "", "", now)
            until(lambda made=rig: len(made.events) > WIDTH)  # type: ignore[misc]
        lists.append(MonitorViews(rig.service).one("m", "1")["alarms"])
        rig.service.close()
    assert [row["check"] for row in lists[0]] == ["drift"] * WIDTH + ["label"]
    assert lists[0][-1]["column"] == "accuracy"
    assert repr(lists[1]) == repr(lists[2]) == repr(lists[0])


def test_what_could_not_be_saved_is_tried_again_without_new_rows(tmp_path: Path, profile: Path) -> None:
    folder = tmp_path / "monitors"
    folder.write_text("a file where the folder should be")
    with structlog.testing.capture_logs() as logs:
        rig = Rig(folder, timing=replace(QUICK, save_s=0.01))
        engine = rig.load(Watch(profile, SETTINGS))
        rig.follow(engine)
        serve(engine, normal(400, 2))
        rig.settled(400)
        done = len(logs)
        until(lambda: "monitor_not_saved" in [line["event"] for line in logs[done:]])
        folder.unlink()
        until(lambda: list(folder.glob("m/1-*.state")) != [])
        rig.service.close()


def saved_state(folder: Path, version: str) -> MonitorState | None:
    """What is on disk of a version."""
    files = list((folder / "m").glob(f"{version}-*.state"))
    return MonitorState.from_bytes(files[0].read_bytes()) if files else None


def test_rows_are_on_disk_when_their_pane_is_over_though_no_more_come(tmp_path: Path, profile: Path) -> None:
    """So a crash long after the last row loses none."""
    rig = Rig(tmp_path / "monitors", timing=replace(QUICK, save_s=0.01))
    engine = rig.load(Watch(profile, replace(SETTINGS, windows=(time_window(600, 0.5),))))
    rig.follow(engine)
    serve(engine, normal(100, 2))
    rig.settled(100)

    def kept() -> int:
        state = saved_state(tmp_path / "monitors", "1")
        return int(state.arms["stable"].series[0].rows.sum()) if state is not None and state.arms else 0

    until(lambda: kept() == 100)
    rig.service.close()


def test_rows_of_a_mirrored_arm_are_saved_though_the_version_itself_gets_none(tmp_path: Path, profile: Path) -> None:
    rig = Rig(tmp_path / "monitors", timing=replace(QUICK, save_s=0.01))
    stable = rig.load(Watch(profile, SETTINGS))
    canary = rig.load(Watch(profile, SETTINGS), version="2")
    rig.follow(stable, canary, mirrors=(Mirror("m", "2", "1", "candidate"),))
    until(lambda: rig.service._mirrored != {} and saved_state(tmp_path / "monitors", "1") is not None)
    serve(canary, normal(400, 3), arm="candidate")

    def kept() -> int:
        state = saved_state(tmp_path / "monitors", "1")
        return state.arms["candidate"].rows if state is not None and "candidate" in state.arms else 0

    until(lambda: kept() == 400)
    rig.service.close()
