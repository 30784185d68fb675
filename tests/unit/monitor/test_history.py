"""The rings of looks and of changes of alarms: bounded, in order, restored whole or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from monitor.decay import Signal
from monitor.errors import StateError
from monitor.history import AlarmHistory, History, SavedAlarms
from monitor.label_monitor import LabelAlarm
from monitor.types import Alarm, ColumnScore, QualityScore, Verdict


def filled(looks: int, capacity: int = 4, columns: int = 2) -> History:
    history = History(columns, capacity)
    for look in range(looks):
        values = [np.full(columns, float(10 * look + place)) for place in range(5)]
        history.add(100 * look, look, math.log(1e-3), np.array(values), np.arange(columns) == look % 2)
    return history


@pytest.mark.parametrize("looks", [0, 3, 4, 11])
def test_the_newest_looks_are_kept_in_order(looks: int) -> None:
    found = filled(looks).to_dict(["a", "b"], 100)
    newest = list(range(looks))[-4:]
    assert found["rows"] == newest
    assert found["time_ns"] == [100 * look for look in newest]
    assert found["level"] == pytest.approx([1e-3] * len(newest))
    assert found["columns"]["b"]["ks"] == [10.0 * look + 2 for look in newest]
    assert found["columns"]["a"]["in_alarm"] == [look % 2 == 0 for look in newest]


def test_what_is_undefined_is_none() -> None:
    history = History(1, 2)
    history.add(0, 0, 0.0, [np.array([value]) for value in (np.nan, np.inf, 0.25, 0.5, -np.inf)], np.array([False]))
    found = history.to_dict(["a"], 5)["columns"]["a"]
    assert [found[name] for name in ("psi", "psi_threshold", "ks", "log10_p")] == [[None], [None], [0.25], [None]]
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("capacity", [2, 4, 9])
def test_a_restored_history_goes_on(capacity: int) -> None:
    again = History(2, capacity)
    again.restore(filled(7).state())
    again.add(700, 7, math.log(1e-3), [np.full(2, 70.0 + place) for place in range(5)], np.array([False, True]))
    assert again.to_dict(["a", "b"], 100) == filled(8, min(capacity, 5)).to_dict(["a", "b"], 100)


def test_a_history_of_other_columns_is_refused() -> None:
    for state in (filled(3, columns=3).state(), {}, {"facts": np.zeros((2, 2))}):
        with pytest.raises(StateError, match="history is of other columns"):
            filled(1).restore(state)


# --- alarms ---

SCORE = ColumnScore(
    "age", 20_000, 1000, math.nan, math.nan, 1.0, 0.1 + 0.2, 5e-324, 0.3, 0.1, 0.2, 7.5, 9, 1e-300, math.nan, 0.0, 1.0,
    -0.5, 0.01, 0.0, 0.0, 1.0, 0.0, "moderate", "<= 3 \N{EM DASH} \\xff", 0.75, 1.0,
)  # fmt: skip
VERDICT = Verdict("age", True, True, False, False, 1.5, "psi", 1e-9)
QUALITY = QualityScore("age", "missing", 7, 1000, 0.007, 0.001, 1e-12, True, True)
SIGNAL = Signal("auc", "label", 0.5, 0.9, 0.4, 0.02, -math.inf, 1e-9, True, True, True, False)


def alarm(number: int) -> Alarm:
    found = Alarm("raised", "stable", "age", "1000rows", number, 3 * number, number, 10**18 + number, VERDICT, SCORE)
    return replace(found, state="cleared", check="missing", segment="DE", quality=QUALITY) if number % 2 else found


def label_alarm(number: int) -> LabelAlarm:
    return LabelAlarm("raised", "m", "7", "stable", "eu", "24h", number, number, 1, 10**18, SIGNAL)


def told(count: int, capacity: int = 5) -> AlarmHistory[Alarm]:
    history = AlarmHistory(Alarm, capacity)
    for number in range(count):
        history.add(alarm(number))
    return history


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("capacity", [2, 5, 9])
def test_past_alarms_are_bounded_and_restored_as_they_were(count: int, capacity: int) -> None:
    first, again = told(count), told(3, capacity)
    again.restore(first.state())
    assert repr(first.alarms()) == repr([alarm(number) for number in range(count)][-5:])
    assert repr(again.alarms()) == repr(first.alarms()[-capacity:])
    again.add(alarm(12))
    assert repr(again.alarms()[-1]) == repr(alarm(12))
    assert len(again.alarms()) == min(capacity, count + 1, 6)


def test_nothing_of_an_alarm_is_left_out() -> None:
    for kind, parts in ((Alarm, (Verdict, ColumnScore, QualityScore)), (LabelAlarm, (Signal,))):
        names = [name for own in AlarmHistory[Any](kind).state().names for name in own]
        made_of = sum([len(fields(part)) for part in parts]) + len(fields(kind)) - len(parts)
        assert len(names) == len(set(names)) == made_of + (QualityScore in parts)


def test_alarms_of_labels_are_kept_too_and_a_p_of_0_stays_one() -> None:
    first, again = AlarmHistory(LabelAlarm), AlarmHistory(LabelAlarm)
    first.add(label_alarm(1))
    first.add(replace(label_alarm(2), signal=replace(SIGNAL, effect=math.inf, value=-math.inf, log_p=0.1)))
    again.restore(first.state())
    one, other = again.alarms()
    assert one == label_alarm(1)
    assert one.signal.to_dict()["p"] == 0.0
    assert repr(other.signal) == repr(replace(SIGNAL, effect=math.nan, value=math.nan, log_p=math.nan))


def test_what_has_no_past_alarms_restores_none() -> None:
    history = told(3)
    history.restore(None)
    assert history.alarms() == []


def test_past_alarms_that_were_made_of_other_things_begin_anew() -> None:
    history, state = told(3), told(3).state()
    history.restore(replace(state, names=[state.names[0], state.names[1], [*state.names[2], "score.new"]]))
    assert history.alarms() == []


def changed(name: str, value: float) -> Callable[[SavedAlarms], SavedAlarms]:
    """The last alarm with another value."""

    def change(state: SavedAlarms) -> SavedAlarms:
        arrays = [state.wholes.copy(), state.numbers.copy()]
        for names, array in zip(state.names[1:], arrays, strict=True):
            if name in names:
                array[-1, names.index(name)] = value
        return replace(state, wholes=arrays[0], numbers=arrays[1])

    return change


def worded(*texts: Any, place: int = 0) -> Callable[[SavedAlarms], SavedAlarms]:
    """The last alarm with other texts from ``place`` on."""

    def change(state: SavedAlarms) -> SavedAlarms:
        last = [*state.texts[-1][:place], *texts, *state.texts[-1][place + len(texts) :]]
        return replace(state, texts=[*state.texts[:-1], last])

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda state: replace(state, texts=state.texts[1:]),
        lambda state: replace(state, texts=7),
        lambda state: replace(state, texts={"0": [], "1": [], "2": []}),
        lambda state: replace(state, texts=[*state.texts[:-1], 7]),
        lambda state: replace(state, texts=[*state.texts[:-1], state.texts[-1][:-1]]),
        lambda state: replace(state, texts=[*state.texts[:-1], [*state.texts[-1], "more"]]),
        lambda state: replace(state, wholes=state.wholes[:, 1:]),
        lambda state: replace(state, wholes=state.wholes.reshape(-1)),
        lambda state: replace(state, wholes=state.wholes.astype("f8")),
        lambda state: replace(state, numbers=state.numbers[1:]),
        lambda state: replace(state, numbers=state.numbers.astype("f4")),
        changed("episode", -1),
        changed("start_ns", -1),
        changed("start_ns", 2 * 10**18),
        changed("verdict.over", 2),
        changed("quality", 3),
        changed("score.psi", math.inf),
        changed("score.wasserstein_sd", -math.inf),
        worded("begun"),
        worded(None),
        worded(7, place=2),
        worded(["age"], place=2),
        worded(True, place=9),
    ],
)
def test_past_alarms_that_are_damaged_are_refused_whole(change: Callable[[SavedAlarms], SavedAlarms]) -> None:
    history = told(2)
    with pytest.raises(StateError, match="past alarms are damaged"):
        history.restore(change(told(3).state()))
    assert repr(history.alarms()) == repr(told(2).alarms())


@pytest.mark.parametrize("value", [math.inf, 1e308, 0.5])
def test_the_logarithm_of_a_p_over_1_is_refused(value: float) -> None:
    """The exponential of a large one is no number."""
    history = AlarmHistory(LabelAlarm)
    history.add(label_alarm(1))
    with pytest.raises(StateError, match="numbers"):
        history.restore(changed("signal.log_p", value)(history.state()))
