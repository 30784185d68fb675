"""Labels of models as the request path and the drain thread see them: real joins, real monitors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog

from monitor.label_state import reference_rows, to_profile
from monitor.outcomes import Form, Joined, LabelRules, LabelSettings
from monitor.types import AlarmRules, rows_window
from server.errors import ModelLoadError
from server.monitoring.labels import LabelService, LabelTap, LabelWatch, Slicer, alarm_row
from server.types import ModelSpec, Tensor, TensorSpec

WATCH = LabelWatch(LabelSettings("binary", "y", classes=("bad", "good"), windows=(rows_window(20),)))


def spec(version: str = "1", model: str = "m") -> ModelSpec:
    inputs = (TensorSpec("x", "FP32", (-1, -1)), TensorSpec("who", "BYTES", (-1, 1)))
    return ModelSpec(model, version, inputs, (TensorSpec("y", "FP32", (-1, 1)),), max_batch_size=64)


def scores(*values: float) -> list[Tensor]:
    return [Tensor("y", "FP32", (len(values), 1), np.array(values, "f4").tobytes())]


def floats(*values: float, width: int = 2) -> Tensor:
    return Tensor("x", "FP32", (len(values) // width, width), np.array(values, "f4").tobytes())


def names(*values: bytes) -> Tensor:
    return Tensor("who", "BYTES", (len(values), 1), list(values))


def tap_of(service: LabelService, watch: LabelWatch = WATCH, version: str = "1", model: str = "m") -> LabelTap:
    return service.acquire(model, version, watch).tap(spec(version, model))


def answer(tap: LabelTap, request_id: str, *values: float, arm: str = "stable") -> None:
    tap.answered(("t-" + request_id, request_id), arm, len(values), [None, None], scores(*values), 7, 1)


def test_versions_share_a_join_and_labels_find_either() -> None:
    service = LabelService()
    first, second = tap_of(service), tap_of(service, version="2")
    assert first.labels is second.labels
    heard: list[Joined] = []
    end = service.subscribe(heard.extend)
    answer(first, "a", 0.9, 0.1)
    answer(second, "b", 0.6, arm="canary")
    assert second.label("a", 1, None, "bad", "", 5)
    assert first.label("t-b", 0, 1.0, "", "", 6)
    assert not first.label("a", 0, 1.0, "", "another outcome", 6)
    service.drain(7)
    found = [(row.version, row.arm, row.label, row.unit, round(row.prediction[0], 3)) for row in heard]
    assert found == [("1", "stable", 0.0, 7, 0.1), ("2", "canary", 1.0, 7, 0.6)]
    end()
    assert first.label("a", 0, None, "good", "", 8)
    service.drain(9)
    assert len(heard) == 2


def test_words_are_numbers_unless_they_name_a_class() -> None:
    service = LabelService()
    watch = LabelWatch(LabelSettings("binary", "y", classes=("yes", "no"), windows=(rows_window(20),)))
    tap = tap_of(service, watch)
    heard: list[Joined] = []
    service.subscribe(heard.extend)
    answer(tap, "a", 0.9, 0.1)
    tap.label("a", 0, 1.0, "yes", "", 2)
    tap.label("a", 1, 1.0, "true", "", 2)
    service.drain(3)
    assert [row.label for row in heard] == [0.0, 1.0]


def test_other_settings_are_another_join_and_the_last_lease_ends_it() -> None:
    service = LabelService()
    old = tap_of(service)
    new = tap_of(service, LabelWatch(LabelSettings("binary", "y", threshold=0.3)))
    assert old.labels is not new.labels
    assert service.report_of("m", "1") is not None
    service.release(old.labels, "1")
    assert [labels is new.labels for labels in service.all()] == [True]
    service.release(new.labels, "1")
    assert service.all() == []
    assert service.report_of("m", "1") is None
    assert service.families() == ()


def test_a_listener_that_fails_is_logged_and_stops_nobody() -> None:
    service = LabelService()
    tap = tap_of(service)
    heard: list[Joined] = []

    def broken(_: Sequence[Joined]) -> None:
        raise RuntimeError("no")

    service.subscribe(broken)
    service.subscribe(heard.extend)
    answer(tap, "a", 0.9)
    tap.label("a", 0, 1.0, "", "", 2)
    with structlog.testing.capture_logs() as logs:
        service.drain(3)
    assert len(heard) == 1
    assert [line["event"] for line in logs] == ["joined_not_passed_on"]


def test_an_alarm_and_its_metrics() -> None:
    rules = LabelRules(AlarmRules(k=1, m=1, ert_rows=1000), learn_rows=200)
    watch = LabelWatch(LabelSettings("binary", "y", form="class", windows=(rows_window(100),), rules=rules))
    service = LabelService()
    tap = tap_of(service, watch)
    for number in range(40):
        answer(tap, str(number), *[float(row % 2) for row in range(10)])
        for row in range(10):
            tap.label(str(number), row, float(row % 2 if number < 25 else 1 - row % 2), "", "", 2)
    service.drain(3)
    (found,) = service.take_alarms()
    assert found[0] is tap.labels
    assert (found[1].state, found[1].signal.name) == ("raised", "accuracy")
    assert {name: alarm_row(found[1])[name] for name in ("state", "column", "check", "segment")} == {
        "state": "raised", "column": "accuracy", "check": "label", "segment": "",
    }  # fmt: skip
    families = {family.name: family for family in service.families()}
    assert families["tidegate_performance_alarm"].points == {("m", "1", "stable", "", "accuracy"): 1.0}
    assert families["tidegate_performance"].points["m", "1", "stable", "100rows", "accuracy"] == 0.0
    assert families["tidegate_label_rows_total"].kind == "counter"
    assert families["tidegate_label_unknown_labels_total"].points == {("m",): 0.0}
    assert families["tidegate_label_remembered_rows"].kind == "gauge"


@pytest.mark.parametrize(
    ("wanted", "inputs", "value"),
    [
        ("x[1]", [floats(1, 2.5, 3, 2.5), None], "2.5"),
        ("x", [floats(1, 2, 1, 3), None], "1"),
        ("x[1]", [floats(1, 2, 1, 3), None], ""),
        ("who", [floats(1, 2, 1, 2), names(b"DE", b"DE")], "DE"),
        ("who", [floats(1, 2, 1, 2), names(b"\xff" * 99, b"\xff" * 99)], "\ufffd" * 64),
        ("who", [floats(1, 2, 1, 2), None], ""),
        ("x[7]", [floats(1, 2, 1, 2), None], ""),
    ],
)
def test_slices(wanted: str, inputs: list[Tensor | None], value: str) -> None:
    service = LabelService()
    tap = tap_of(service, LabelWatch(WATCH.settings, wanted))
    tap.answered(("a",), "stable", 2, inputs, scores(0.5, 0.5), 0, 1)
    service.drain(2)
    report = service.report_of("m", "1")
    assert report is not None
    assert [group["slice"] for group in report["join"]["groups"]] == [value]


@pytest.mark.parametrize("wanted", ["z", "x[", "x[a]", "who[0", "y"])
def test_a_slice_of_nothing_refuses_the_version(wanted: str) -> None:
    with pytest.raises(ModelLoadError, match="the model's inputs are x, who"):
        tap_of(LabelService(), LabelWatch(WATCH.settings, wanted))


def test_strange_contents_are_no_slice() -> None:
    assert Slicer(0, 0).value([floats(1, 2, 3, 4)], 3) == ""


def test_without_a_drain_memory_is_bounded_and_what_is_over_is_counted() -> None:
    settings = LabelSettings("binary", "y", queue_rows=100, queue_labels=50)
    service = LabelService()
    tap = tap_of(service, LabelWatch(settings))

    def flood(send: Callable[[int], object]) -> None:
        for number in range(500):
            send(number)

    threads = [
        threading.Thread(target=flood, args=(send,))
        for send in (lambda n: answer(tap, str(n), 0.5), lambda n: tap.label(str(n), 0, 1.0, "", "", 2))
    ]
    for thread in threads:
        thread.start()
        thread.join()
    counters = tap.labels.monitor.join.counters()
    assert (counters["queued"], counters["dropped_rows"], counters["dropped_labels"]) == (150, 400, 450)
    service.drain(3)
    assert tap.labels.monitor.join.counters()["queued"] == 0


# --- over a restart ---

RULES = LabelRules(AlarmRules(k=1, m=1, ert_rows=1000), learn_rows=200)
HARD = LabelWatch(LabelSettings("binary", "y", form="class", windows=(rows_window(100),), rules=RULES))


def send(tap: LabelTap, service: LabelService, rows: int, right: bool) -> None:
    answer(tap, "a", *[float(row % 2) for row in range(rows)])
    for row in range(rows):
        tap.label("a", row, float(row % 2 if right else 1 - row % 2), "", "", 2)
    service.drain(3)


def test_an_alarm_is_told_once_over_restarts_and_its_reference_stays(tmp_path: Path) -> None:
    service = LabelService(tmp_path)
    tap = tap_of(service, HARD)
    send(tap, service, 300, right=True)
    send(tap, service, 100, right=False)
    ((labels, raised),) = service.take_alarms()
    service.save()

    service = LabelService(tmp_path)
    tap = tap_of(service, HARD)
    assert tap.labels.run == labels.run
    assert service.list()[0]["alarms"] == {"stable": ["accuracy"]}
    send(tap, service, 400, right=False)
    assert list(service.take_alarms()) == []
    send(tap, service, 700, right=True)
    ((_, cleared),) = service.take_alarms()
    assert (cleared.state, cleared.episode) == ("cleared", raised.episode)


def test_the_last_lease_saves_and_the_next_goes_on(tmp_path: Path) -> None:
    service = LabelService(tmp_path)
    tap = tap_of(service, HARD)
    send(tap, service, 150, right=True)
    service.release(tap.labels, "1")
    report = tap_of(service, HARD).labels.monitor.report()
    assert [window["rows"] for window in report["windows"]] == [100]
    assert [entry["rows_missing"] for entry in report["learning"]] == [50]


def test_predictions_are_remembered_over_restarts_by_either_id(tmp_path: Path) -> None:
    service = LabelService(tmp_path)
    answer(tap_of(service), "a", 0.9, 0.1)
    service.drain(2)
    service.save()

    service, heard = LabelService(tmp_path), list[Joined]()
    service.subscribe(heard.extend)
    tap = tap_of(service)
    tap.label("a", 0, None, "good", "", 3)
    tap.label("t-a", 1, None, "bad", "", 3, 2)
    service.drain(4)
    found = [(row.version, row.unit, row.label, round(row.prediction[0], 3), row.outcome_ns) for row in heard]
    assert found == [("1", 7, 1.0, 0.9, 3), ("1", 7, 0.0, 0.1, 2)]


def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    service = LabelService(tmp_path)
    tap = tap_of(service, HARD)
    service.save()
    assert list(tmp_path.rglob("*.labels")) == []
    send(tap, service, 1, right=True)
    service.save()
    (path,) = tmp_path.rglob("*.labels")
    path.unlink()
    service.save()
    assert not path.exists()
    send(tap, service, 1, right=True)
    service.save()
    assert path.exists()


def test_a_reference_that_was_made_otherwise_is_logged_and_left_aside() -> None:
    service = LabelService()
    tap = tap_of(service, HARD)
    rows = np.tile([[0.0], [1.0]], (500, 1))
    reference = to_profile(HARD.settings, reference_rows(HARD.settings, rows, rows[:, 0]))
    with structlog.testing.capture_logs() as logs:
        tap_of(service).labels.learn("1", reference)
    assert [line["event"] for line in logs] == ["label_reference_not_used"]
    tap.labels.learn("1", reference)
    send(tap, service, 100, right=False)
    assert [alarm.signal.reference for _, alarm in service.take_alarms()] == [1.0]


def test_every_version_with_labels_is_listed() -> None:
    service = LabelService()
    first, second = tap_of(service), tap_of(service, version="2")
    assert [(row["model"], row["version"], row["windows"]) for row in service.list()] == [
        ("m", "1", ["20rows"]), ("m", "2", ["20rows"]),
    ]  # fmt: skip
    service.release(first.labels, "1")
    assert [row["version"] for row in service.list()] == ["2"]
    assert second.takes("good", "")
    assert not second.takes("good", "another outcome")
    assert not second.takes("fine", "")
    assert second.wants("")
    assert not second.wants("another outcome")


@pytest.mark.parametrize(
    ("settings", "slice_", "message"),
    [
        (LabelSettings("binary", "y", index=1), "", "element 1 of output 'y', but a row has 1"),
        (LabelSettings("multiclass", "y", classes=("a", "b", "c")), "", "element 2 of output 'y', but a row has 1"),
        (LabelSettings("binary", "word"), "", "output 'word' holds strings: labels of it need form: class"),
        (LabelSettings("binary", "y"), "x[2]", r"cut by 'x\[2\]', but a row of 'x' has 2 elements"),
    ],
)
def test_what_a_version_does_not_have_refuses_it(settings: LabelSettings, slice_: str, message: str) -> None:
    outputs = (*spec().outputs, TensorSpec("word", "BYTES", (-1, 1)))
    narrow = replace(spec(), inputs=(TensorSpec("x", "FP32", (-1, 2)),), outputs=outputs)
    with pytest.raises(ModelLoadError, match=message):
        LabelService().acquire("m", "1", LabelWatch(settings, slice_)).tap(narrow)


def test_what_a_model_leaves_open_is_not_refused() -> None:
    outputs = (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("word", "BYTES", (-1, 1)))
    open_ = replace(spec(), outputs=outputs)
    words = LabelSettings("binary", "word", form="class", classes=("no", "yes"))
    for settings, slice_ in ((LabelSettings("binary", "y", index=7), "x[9]"), (words, "")):
        LabelService().acquire("m", "1", LabelWatch(settings, slice_)).tap(open_)


@pytest.mark.parametrize("form", ["probability", "logit", "class"])
def test_names_of_two_classes_are_joined_whatever_the_form(form: Form) -> None:
    named = replace(spec(), outputs=(TensorSpec("word", "BYTES", (-1, 1)),))
    settings = LabelSettings("binary", "word", form=form, classes=("no", "yes"))
    tap = LabelService().acquire("m", "1", LabelWatch(settings)).tap(named)
    answer = Tensor("word", "BYTES", (2, 1), [b"no", b"yes"])
    tap.answered(["a"], "stable", 2, [None], [answer], 0, 1000)
    for row, name in enumerate(("no", "yes")):
        assert tap.label("a", row, None, name, "", 2000)
    assert [row.label for row in tap.labels.monitor.drain(3000)] == [0.0, 1.0]


def test_names_of_classes_are_no_scores_of_several() -> None:
    named = replace(spec(), outputs=(TensorSpec("word", "BYTES", (-1, 3)),))
    settings = LabelSettings("multiclass", "word", classes=("a", "b", "c"))
    with pytest.raises(ModelLoadError, match="output 'word' holds strings"):
        LabelService().acquire("m", "1", LabelWatch(settings)).tap(named)
