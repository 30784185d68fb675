"""The join: who finds whom, what is counted, and that memory stays where it was told to."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from monitor.errors import SettingsError, StateError
from monitor.labels import LabelJoin
from monitor.outcomes import OTHER, Joined, LabelRules, LabelSettings
from monitor.types import AlarmRules, Window


@dataclass
class Output:
    data: Any
    name: str = "p"
    datatype: str = "FP32"


def scores(*values: float, dtype: str = "<f4") -> list[Output]:
    return [Output(np.array(values, dtype).tobytes())]


def join_of(**settings: Any) -> LabelJoin:
    return LabelJoin("m", LabelSettings(**{"task": "binary", "output": "p", **settings}))


def remember(
    join: LabelJoin, ids: Sequence[str], *values: float, now: int = 0, arm: str = "stable", slice_value: str = ""
) -> bool:
    return join.remember(ids, "1", arm, len(values), scores(*values), slice_value, now)


# --- the join --------------------------------------------------------------------------------------------------------


def test_either_id_finds_the_prediction() -> None:
    join = join_of()
    join.remember(["gate-1", "mine"], "3", "canary", 2, scores(0.25, 0.75), "eu", 10, unit=7)
    join.label("mine", 1, 1, "", 20)
    join.label("gate-1", 0, 0, "", 30)
    assert join.drain(40) == [
        Joined("m", "3", "canary", 7, (0.75,), 1.0, "eu", 10, 20, 20),
        Joined("m", "3", "canary", 7, (0.25,), 0.0, "eu", 10, 30, 30),
    ]
    (group,) = join.groups()
    assert (group.version, group.arm, group.slice) == ("3", "canary", "eu")
    assert (group.predicted, group.joined, group.waiting, group.join_rate) == (2, 2, 0, 1.0)


def test_the_first_label_counts() -> None:
    join = join_of()
    remember(join, ["a"], 0.5)
    for value in (1, 1, 0, 1):
        join.label("a", 0, value, "", 1)
    assert [row.label for row in join.drain(1)] == [1.0]
    (group,) = join.groups()
    assert (group.joined, group.duplicate, group.conflicting) == (1, 2, 1)


def test_a_repeated_client_id_means_its_newest_prediction() -> None:
    join = join_of()
    remember(join, ["g1", "same"], 0.25)
    join.label("same", 0, 1, "", 1)
    remember(join, ["g2", "same"], 0.75)
    join.label("same", 0, 0, "", 1)
    join.label("g1", 0, 1, "", 1)
    assert [(row.prediction, row.label) for row in join.drain(1)] == [((0.25,), 1.0), ((0.75,), 0.0)]
    assert join.repeated_ids == 1
    assert join.groups()[0].duplicate == 1


def test_forgetting_the_older_of_a_repeated_id_leaves_the_newer() -> None:
    join = join_of(capacity_rows=2)
    remember(join, ["g1", "same"], 0.25)
    remember(join, ["g2", "same"], 0.75)
    remember(join, ["g3"], 0.5)
    join.label("g1", 0, 1, "", 1)
    join.label("same", 0, 1, "", 1)
    assert [row.prediction for row in join.drain(1)] == [(0.75,)]
    assert join.counters()["held_labels"] == 1


def test_a_label_may_come_before_its_prediction() -> None:
    join = join_of(hold_ns=100)
    join.label("client", 0, 1, "", 5)
    join.label("gate", 0, 0, "", 6)
    assert join.drain(10) == []
    remember(join, ["gate", "client"], 0.5, now=20)
    (row,) = join.drain(20)
    assert (row.label, row.predicted_ns, row.labelled_ns) == (1.0, 20, 5)
    assert join.groups()[0].conflicting == 1
    assert join.counters()["held_labels"] == 0


def test_a_label_waits_only_so_long_and_only_so_many_do() -> None:
    join = join_of(hold_ns=100, hold_labels=3)
    for number in range(5):
        join.label(f"x{number}", 0, 1, "", number)
    join.drain(50)
    assert join.counters()["held_labels"] == 3
    assert (join.held_dropped, join.unknown) == (2, 2)
    join.drain(103)  # the third came at 2
    assert join.counters()["held_labels"] == 2
    join.drain(1000)
    assert join.counters()["held_labels"] == 0
    assert join.unknown == 5
    remember(join, ["x4"], 0.5, now=1000)
    assert join.drain(1000) == []


def test_labels_that_wait_for_one_id_expire_one_by_one() -> None:
    join = join_of(hold_ns=100)
    join.label("x", 0, 1, "", 0)
    join.label("x", 1, 1, "", 50)
    join.drain(120)
    remember(join, ["x"], 0.1, 0.2, now=121)
    assert [row.prediction for row in join.drain(121)] == [pytest.approx((0.2,))]
    assert join.unknown == 1


def test_no_holding() -> None:
    join = join_of(hold_labels=0)
    join.label("x", 0, 1, "", 0)
    join.drain(0)
    assert (join.unknown, join.counters()["held_labels"]) == (1, 0)


def test_age_and_room_forget_the_oldest_and_count_it() -> None:
    join = join_of(capacity_rows=4, max_age_ns=100)
    remember(join, ["a"], 0.1, 0.2, now=0)
    join.label("a", 0, 1, "", 1)
    remember(join, ["b"], 0.3, now=50)
    join.drain(60)
    remember(join, ["c"], 0.4, 0.5, now=60)  # a has to go
    join.drain(60)
    (group,) = join.groups()
    assert (group.forgotten, group.expired, group.waiting) == (2, 1, 3)
    assert group.settled_join_rate == 0.5
    assert group.join_rate == 0.2
    join.drain(151)  # b is too old
    assert join.groups()[0].expired == 2
    assert join.counters()["remembered_rows"] == 2
    join.label("b", 0, 1, "", 152)
    assert join.drain(152) == []


def test_late_labels_are_joined_and_counted() -> None:
    join = join_of(late_ns=100)
    remember(join, ["a"], 0.1, 0.2, now=0)
    join.label("a", 0, 1, "", 100)
    join.label("a", 1, 1, "", 101)
    assert len(join.drain(101)) == 2
    assert join.groups()[0].late == 1


def test_what_is_joined_does_not_depend_on_when_it_is_drained() -> None:
    def run(*, often: bool) -> list[Joined]:
        join, found = join_of(max_age_ns=30, capacity_rows=6, hold_ns=5), []
        rng = np.random.default_rng(4)
        for now in range(400):
            if rng.random() < 0.5:
                remember(join, [f"g{now}", f"c{rng.integers(20)}"], *rng.random(rng.integers(1, 3)), now=now)
            else:
                join.label(f"c{rng.integers(20)}", int(rng.integers(2)), int(rng.integers(2)), "", now)
            if often:
                found += join.drain(now)
        return found + join.drain(400)

    assert run(often=True) == run(often=False) != []


def test_when_an_outcome_was_is_between_its_prediction_and_its_label() -> None:
    join = join_of()
    remember(join, ["a"], 0.1, 0.2, 0.3, 0.4, 0.5, now=100)
    for row, told in enumerate([None, 150, 99, 10**30, -(10**30)]):
        join.label("a", row, 1, "", 200, told)
    found = join.drain(200)
    assert [row.outcome_ns for row in found] == [200, 150, 100, 200, 100]
    assert {row.labelled_ns for row in found} == {200}
    assert len(join.drain(10**15)) == 0
    assert join.groups()[0].late == 0


def test_when_an_outcome_was_neither_holds_nor_forgets_anything() -> None:
    join = join_of(hold_ns=100, max_age_ns=1000, late_ns=50)
    remember(join, ["a"], 0.1, now=0)
    join.label("later", 0, 1, "", 10, 10**18)
    join.label("a", 0, 1, "", 60, 5)
    assert len(join.drain(60)) == 1
    assert join.groups()[0].late == 1
    assert join.counters()["held_labels"] == 1
    join.drain(111)
    assert join.unknown == 1
    assert join.counters()["remembered_rows"] == 1


# --- over a restart --------------------------------------------------------------------------------------------------


def restarted(join: LabelJoin) -> LabelJoin:
    """Another process's join that goes on from this one."""
    again = LabelJoin(join.model, join.settings)
    again.restore(join.saved())
    return again


def test_labels_find_predictions_of_the_process_before() -> None:
    join = join_of(capacity_rows=7)
    remember(join, ["g0"], 0.9)
    join.remember(["g1", "mine"], "3", "canary", 2, scores(0.25, 0.75), "eu", 10, unit=2**64 - 1)
    remember(join, ["g2", "same"], 0.5, 0.6, now=20)
    remember(join, ["g3", "same", "\ud800"], 0.125, now=30)
    join.label("mine", 0, 0, "", 40)
    join.label("early", 1, 1, "", 41, 5)
    remember(join, ["g4"], 0.0, 0.0, now=42)  # the ring has come round: g0 had to go
    join.drain(42)
    again = restarted(join)
    assert again.counters() == join.counters()
    assert again.groups() == join.groups()
    again.label("mine", 0, 0, "", 50)
    for name, row in (("g1", 1), ("same", 0), ("g2", 1), ("g0", 0)):
        again.label(name, row, 1, "", 50)
    remember(again, ["early"], 0.1, 0.375, now=60)
    found = [(j.version, j.arm, j.slice, j.unit, j.prediction[0], j.predicted_ns) for j in again.drain(60)]
    assert found == [
        ("3", "canary", "eu", 2**64 - 1, 0.75, 10),
        ("1", "stable", "", 0, 0.125, 30),
        ("1", "stable", "", 0, pytest.approx(0.6), 20),
        ("1", "stable", "", 0, 0.375, 60),
    ]
    counts = {group.arm: group for group in again.groups()}
    assert (counts["canary"].joined, counts["canary"].duplicate) == (2, 1)
    assert again.counters()["held_labels"] == 1  # g0's, which was forgotten


@pytest.mark.parametrize(
    ("settings", "rows"), [({"capacity_rows": 3}, 4), ({"task": "multiclass", "classes": ("a", "b")}, 1)]
)
def test_predictions_that_do_not_fit_are_refused(settings: dict[str, Any], rows: int) -> None:
    join, other = join_of(), join_of(**settings)
    remember(join, ["a"], *[0.5] * rows)
    join.drain(1)
    with pytest.raises(StateError, match="do not fit"):
        other.restore(join.saved())
    assert other.groups() == []


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("labels", np.empty(3)),
        ("predictions", np.full((2, 1), np.nan)),
        ("ids", np.zeros((1, 3), "i8")),
        ("requests", np.array([[2, 0, 0, 9]])),
        ("requests", np.array([[3, 0, 0, 0]])),
        ("requests", np.array([[2, 0, 0, -1]])),
        ("requests", np.array([2])),
    ],
)
def test_predictions_that_do_not_belong_together_are_refused(part: str, value: Any) -> None:
    join = join_of()
    remember(join, ["a"], 0.5, 0.6)
    join.drain(1)
    saved = join.saved()
    setattr(saved.rows, part, value)
    with pytest.raises(StateError, match="the saved predictions"):
        join_of().restore(saved)


def test_a_row_beyond_all_numbers_can_wait_and_be_saved() -> None:
    join = join_of()
    join.label("a", 10**40, 1, "", 1)
    join.drain(1)
    assert restarted(join).counters()["held_labels"] == 1


def test_the_queue_of_labels_is_bounded_by_the_size_of_their_ids() -> None:
    join = join_of(queue_bytes=1000)
    taken = [join.label("x" * 100, 0, 1, "", 1) for _ in range(20)]
    assert sum(taken) == 11
    assert join.dropped_labels == 9
    join.drain(1)
    assert join.label("x" * 100, 0, 1, "", 1)


def test_rows_that_are_not_there_and_other_names() -> None:
    join = join_of(name="bought")
    remember(join, ["a"], 0.1)
    assert not join.label("a", 0, 1, "clicked", 0)
    assert join.label("a", 5, 1, "bought", 0)
    assert join.label("a", -1, 1, "bought", 0)
    assert join.drain(0) == []
    assert join.unknown == 2
    join.label("a", 0, 1, "", 0)
    assert len(join.drain(0)) == 1


@pytest.mark.parametrize("value", [2, 0.5, float("nan"), float("inf"), -1, "maybe", 10**400])
def test_labels_of_no_class(value: Any) -> None:
    join = join_of()
    remember(join, ["a"], 0.1)
    assert not join.label("a", 0, value, "", 0)
    assert join.waiting == 1  # the prediction alone
    assert join.drain(0) == []
    assert join.invalid_labels == 1


def test_labels_as_text() -> None:
    join = join_of(classes=("ham", "spam"))
    remember(join, ["a"], 0.1, 0.2, 0.3)
    for row, value in enumerate(["spam", "0", "ham"]):
        join.label("a", row, value, "", 0)
    assert [row.label for row in join.drain(0)] == [1.0, 0.0, 0.0]


def test_listeners_hear_until_they_leave() -> None:
    join = join_of()
    heard: list[Joined] = []
    leave = join.subscribe(heard.extend)
    remember(join, ["a"], 0.1, 0.2)
    join.label("a", 0, 1, "", 0)
    found = join.drain(0)
    assert heard == found != []
    leave()
    join.label("a", 1, 1, "", 0)
    assert len(join.drain(0)) == 1
    assert len(heard) == 1


# --- predictions of every form ---------------------------------------------------------------------------------------


def one_prediction(outputs: list[Output], rows: int = 1, **settings: Any) -> tuple[float, ...] | None:
    join = join_of(**settings)
    join.remember(["a"], "1", "stable", rows, outputs, "", 0)
    join.label("a", max(0, rows - 1), 1, "", 0)
    found = join.drain(0)
    assert join.invalid_rows == (0 if found else max(rows, 1))
    return found[0].prediction if found else None


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "INT8", "INT32", "INT64", "UINT8", "UINT64", "BOOL"])
def test_datatypes(datatype: str) -> None:
    names = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8", "INT8": "i1", "INT32": "<i4", "INT64": "<i8", "UINT8": "u1",
             "UINT64": "<u8", "BOOL": "?"}  # fmt: skip
    data = np.array([[0, 0], [0, 1]], names[datatype]).tobytes()
    for form in (data, bytearray(data), memoryview(data)):
        assert one_prediction([Output(form, datatype=datatype)], 2, index=1) == (1.0,)


def test_bfloat16() -> None:
    data = (np.array([0.5], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    assert one_prediction([Output(data, datatype="BF16")]) == (0.5,)


def test_a_model_that_does_not_batch_has_one_row() -> None:
    assert one_prediction(scores(0.1, 0.9), 0, index=1) == pytest.approx((0.9,))


def test_the_output_is_found_by_its_name() -> None:
    assert one_prediction([Output(b"", name="other"), *scores(0.5)]) == (0.5,)


def test_a_buffer_that_is_used_again_does_not_change_what_is_remembered() -> None:
    join, buffer = join_of(), bytearray(np.array([0.5], "<f4").tobytes())
    join.remember(["a"], "1", "stable", 1, [Output(buffer)], "", 0)
    join.remember(["b"], "1", "stable", 1, [Output(memoryview(buffer))], "", 0)
    buffer[:] = np.array([0.75], "<f4").tobytes()
    join.label("a", 0, 1, "", 0)
    join.label("b", 0, 1, "", 0)
    assert [row.prediction for row in join.drain(0)] == [(0.5,), (0.5,)]


def test_logits() -> None:
    assert one_prediction(scores(0.0), form="logit") == (0.5,)
    assert one_prediction(scores(-1000.0), form="logit") == (0.0,)
    classes = {"task": "multiclass", "classes": ("x", "y", "z"), "form": "logit"}
    assert one_prediction(scores(0.0, 1000.0, 0.0), 0, **classes) == (0.0, 1.0, 0.0)


def test_classes_as_numbers_and_as_text() -> None:
    classes = {"task": "multiclass", "classes": ("x", "y", "z"), "form": "class"}
    assert one_prediction([Output(np.array([2], "<i8").tobytes(), datatype="INT64")], **classes) == (2.0,)
    assert one_prediction([Output([b"y"], datatype="BYTES")], **classes) == (1.0,)
    assert one_prediction([Output([b"what"], datatype="BYTES")], **classes) is None
    assert one_prediction([Output([b"\xff"], datatype="BYTES")], **classes) is None
    assert one_prediction([Output(np.array([3], "<i8").tobytes(), datatype="INT64")], **classes) is None


@pytest.mark.parametrize(
    "outputs",
    [scores(1.5), scores(-0.1), scores(float("nan")), scores(), [Output(b"abc")], [Output(b"1234", datatype="FP99")],
     [Output([b"x"], datatype="BYTES")]],
)  # fmt: skip
def test_contents_that_are_no_prediction(outputs: list[Output]) -> None:
    assert one_prediction(outputs) is None


def test_one_bad_answer_does_not_cost_the_others() -> None:
    join = join_of()
    for name, value in (("a", 0.1), ("b", float("nan")), ("c", 0.3)):
        remember(join, [name], value)
        join.label(name, 0, 1, "", 0)
    join.drain(0)
    remember(join, ["d"], 0.1)
    remember(join, ["e"], 7.0)
    remember(join, ["f"], 0.3)
    join.drain(0)
    assert join.invalid_rows == 2
    assert join.groups()[0].predicted == 4


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_strange_answers_are_refused_and_never_raised_about() -> None:
    join = join_of()
    assert not join.remember(["a"], "1", "stable", 1, [Output(b"", name="other")], "", 0)
    nothing: Any = object()
    unhashable: Any = [["a"]]
    assert not join.remember(["a"], "1", "stable", 1, [nothing], "", 0)
    assert not join.remember(["a"], "1", "stable", 1, [Output(None)], "", 0)
    assert not join.remember(unhashable, "1", "stable", 2, scores(0.1, 0.2), "", 0)
    assert join.refused_rows == 5
    assert join.waiting == 0


def test_a_full_queue_drops_and_counts() -> None:
    join = join_of(queue_rows=3, queue_labels=2)
    assert [remember(join, [name], 0.1, 0.2) for name in "ab"] == [True, False]
    assert [join.label("a", row, 1, "", 0) for row in (0, 1, 1)] == [True, True, False]
    assert (join.dropped_rows, join.dropped_labels) == (2, 1)
    assert len(join.drain(0)) == 2
    assert remember(join, ["b"], 0.1)
    assert join.label("b", 0, 1, "", 0)


def test_the_queue_is_bounded_in_bytes() -> None:
    join = join_of(queue_bytes=1000)
    assert remember(join, ["a"], *([0.5] * 300))
    assert not remember(join, ["b"], 0.5)
    join.drain(0)
    assert remember(join, ["b"], 0.5)


def test_a_request_larger_than_the_memory_is_not_remembered() -> None:
    join = join_of(capacity_rows=3)
    remember(join, ["a"], 0.1)
    remember(join, ["b"], *([0.5] * 4))
    join.drain(0)
    assert join.invalid_rows == 4
    assert join.counters()["remembered_rows"] == 1


def test_slices_over_the_bound_are_one() -> None:
    join = join_of(max_slices=2)
    for name in ("x", "y", "z", "w", "x"):
        remember(join, [name], 0.1, slice_value=name)
        join.drain(0)
    assert [(group.slice, group.predicted) for group in join.groups()] == [(OTHER, 2), ("x", 2), ("y", 1)]


def test_groups_are_bounded() -> None:
    join = join_of(max_groups=3)
    for number in range(10):
        remember(join, [f"{number}"], 0.1, arm=f"arm{number}")
    join.label("0", 0, 1, "", 0)  # its group is not shown any more, the row is joined all the same
    assert [row.arm for row in join.drain(0)] == ["arm0"]
    assert [group.arm for group in join.groups()] == ["arm7", "arm8", "arm9"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("ids", [100_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(300)])])
def test_memory_is_flat_however_many_ids_come(ids: int) -> None:
    join = join_of(capacity_rows=5000, hold_labels=500, queue_rows=20_000, queue_labels=20_000)
    data, sizes = scores(0.5), []
    for start in range(0, ids, 10_000):
        for number in range(start, start + 10_000):
            join.remember((f"g{number}", f"c{number}"), "1", "stable", 1, data, "", number)
            if number % 10 == 0:
                join.label(f"nobody{number}", 0, 1, "", number)
        join.drain(start + 10_000)
        sizes.append(resident_bytes())
    counters = join.counters()
    assert counters["remembered_rows"] == 5000
    assert counters["remembered_ids"] == 10_000
    assert counters["held_labels"] == 500
    assert counters["unknown_labels"] == ids // 10 - 500
    (group,) = join.groups()
    assert (group.predicted, group.expired) == (ids, ids - 5000)
    assert sizes[-1] - sizes[3] < 4_000_000


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"task": "ranking"}, "task must be one of"),
        ({"form": "odds"}, "form must be"),
        ({"output": ""}, "output must name"),
        ({"threshold": float("nan")}, "threshold"),
        ({"task": "multiclass"}, "multiclass needs 2 to 256 classes, got 0"),
        ({"classes": ("a", "a")}, "classes must be different"),
        ({"classes": ("a",)}, "none or all be named"),
        ({"task": "regression", "classes": ("a", "b")}, "regression needs 0"),
        ({"windows": ()}, "at least one window"),
        ({"windows": (Window("rows", 10, 3),)}, "divide its length"),
        ({"capacity_rows": 0}, "capacity_rows must be positive"),
        ({"hold_ns": -1}, "hold_ns must not be negative"),
        ({"rules": LabelRules(reference={"mae": 1.0})}, "'mae' is no signal of binary"),
        ({"rules": LabelRules(margins={"bias": 1.0})}, "'bias' is no signal of binary"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        join_of(**settings)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"reference": {"acuracy": 0.9}}, "known signals are"),
        ({"reference": {"auc": float("nan")}}, "finite"),
        ({"reference": {"calibration": 0.1}}, "no single number"),
        ({"reference": {"auc": 2.0}}, r"reference of 'auc' must be in 0\.\.1, got 2"),
        ({"reference": {"accuracy": -0.1}}, r"reference of 'accuracy' must be in 0\.\.1, got -0\.1"),
        ({"reference": {"rmse": -1.0}}, "reference of 'rmse' must be at least 0, got -1"),
        ({"margins": {"auc": -0.1}}, "must not be negative"),
        ({"learn_rows": -1}, "must not be negative"),
    ],
)
def test_impossible_rules(rules: dict[str, Any], why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        LabelRules(**rules, alarm=AlarmRules())


def test_ids_are_not_kept() -> None:
    join, long_id = join_of(), "x" * 1_000_000
    before = sys.getrefcount(long_id)
    remember(join, [long_id], 0.1)
    join.drain(0)
    assert sys.getrefcount(long_id) == before
