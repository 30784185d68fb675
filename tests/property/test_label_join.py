"""Whatever comes in whatever order: the join is that of the naive one, and what is scored is what scikit-learn says."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from sklearn import metrics

from monitor.exact import exact_square_sum, exact_sum, mean
from monitor.label_state import SavedLabels
from monitor.label_windows import LabelWindows, merge_windows, windows_of
from monitor.labels import LabelJoin
from monitor.outcomes import LabelSettings
from monitor.performance import Ranking, auc_of, scorer_of
from monitor.types import rows_window, time_window
from tests.reference.naive_labels import Joins, Labelled, NaiveJoin, Predicted
from tests.reference.naive_labels import exact_sum as naive_sum

FACTS = ("duplicate", "conflicting", "late", "expired")


@dataclass
class Output:
    data: Any
    name: str = "p"
    datatype: str = "FP64"


def predicted(rng: random.Random, now: int) -> Predicted:
    group = (rng.choice("12"), rng.choice(["stable", "canary"]), rng.choice(["", "eu"]))
    ids = (f"g{rng.randrange(12)}", *[f"c{rng.randrange(4)}"] * rng.randrange(2))
    return Predicted(ids, group, tuple([rng.random() for _ in range(rng.randrange(1, 4))]), now)


def labelled(rng: random.Random, now: int) -> Labelled:
    name = rng.choice([f"g{rng.randrange(12)}", f"c{rng.randrange(4)}", "nobody"])
    return Labelled(name, rng.randrange(-1, 4), float(rng.randrange(2)), now)


def stream(rng: random.Random, length: int) -> list[Predicted | Labelled]:
    now, events = 0, []
    for _ in range(length):
        now += rng.choice([0, 1, 1, 5, 20])
        events.append(predicted(rng, now) if rng.random() < 0.5 else labelled(rng, now))
    return events


@settings(max_examples=100, deadline=None)
@given(
    st.randoms(use_true_random=False),
    st.integers(1, 100),
    st.integers(3, 40),
    st.integers(1, 200),
    st.integers(0, 60),
    st.integers(1, 5),
)
def test_join_equals_the_naive_one(
    rng: random.Random, length: int, capacity: int, max_age: int, hold: int, hold_labels: int
) -> None:
    bounds = {"late": 10, "hold": hold, "hold_labels": hold_labels}
    events = stream(rng, length)
    end = events[-1].now_ns + rng.choice([0, 50])
    naive = NaiveJoin(capacity=capacity, max_age=max_age, **bounds).run(events, end)
    wanted = LabelSettings(
        "binary", "p", capacity_rows=capacity, max_age_ns=max_age, late_ns=10, hold_ns=hold, hold_labels=hold_labels
    )
    join, found = LabelJoin("m", wanted), []
    for event in events:
        if isinstance(event, Predicted):
            outputs = [Output(np.array(event.values).tobytes())]
            version, arm, part = event.group
            assert join.remember(event.ids, version, arm, len(event.values), outputs, part, event.now_ns)
        else:
            assert join.label(event.id, event.row, event.value, "", event.now_ns)
        if rng.random() < 0.2:
            found += join.drain(event.now_ns)
            join = restarted(join) if rng.random() < 0.5 else join
    found += join.drain(end)
    rows = [((j.version, j.arm, j.slice), j.prediction[0], j.label, j.predicted_ns, j.labelled_ns) for j in found]
    assert rows == naive.rows
    groups = join.groups()
    assert {fact: sum(getattr(group, fact) for group in groups) for fact in FACTS} == facts(naive)
    assert (join.unknown, join.held_dropped) == (naive.unknown, naive.held_dropped)
    assert join.repeated_ids == naive.repeated_ids
    assert all(group.predicted == group.joined + group.expired + group.waiting for group in groups)
    assert sum(group.predicted - group.forgotten for group in groups) == join.counters()["remembered_rows"] <= capacity


def restarted(join: LabelJoin) -> LabelJoin:
    """Another process's join that goes on from what this one has had written down."""
    data = SavedLabels("m", "mark", "run", join.saved(), []).to_bytes()
    again = LabelJoin("m", join.settings)
    again.restore(SavedLabels.from_bytes(data, 0).join)
    return again


def facts(naive: Joins) -> dict[str, int]:
    return {fact: getattr(naive, fact) for fact in FACTS}


# --- exact sums ------------------------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False, width=64)


@settings(max_examples=200, deadline=None)
@given(st.lists(numbers, max_size=40), st.integers(0, 40))
def test_sums_are_exact_and_add(values: list[float], cut: int) -> None:
    unit = Fraction(1, 2**1126)
    whole = exact_sum(np.array(values))
    assert whole * unit == naive_sum(values)
    assert whole == exact_sum(np.array(values[:cut])) + exact_sum(np.array(values[cut:]))
    assert exact_square_sum(np.array(values)) * unit**2 == sum(Fraction(value) ** 2 for value in values)
    if values and abs(naive_sum(values)) < 1e308:
        assert mean(whole, len(values)) == float(naive_sum(values) / len(values))


# --- windows ---------------------------------------------------------------------------------------------------------

SCORES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0, 0.25]))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 120), st.data())
def test_window_metrics_equal_those_of_its_rows(count: int, data: st.DataObject) -> None:
    given_scores = data.draw(npst.arrays("f8", count, elements=SCORES))
    labels = data.draw(npst.arrays("f8", count, elements=st.sampled_from([0.0, 1.0])))
    times = np.cumsum(data.draw(npst.arrays("i8", count, elements=st.integers(0, 3))))
    wanted = LabelSettings("binary", "p", windows=(rows_window(20, 5), time_window(20e-9, 4e-9)))
    scorer = scorer_of(wanted)
    windows = LabelWindows(wanted, scorer)
    start = 0
    while start < count:
        end = start + data.draw(st.integers(1, 30))
        windows.add(given_scores[start:end, None], labels[start:end], times[start:end])
        start = end
    by_rows, by_time = windows.now()
    closed = count // 5 * 5
    check(scorer, by_rows, given_scores[max(0, closed - 20) : closed], labels[max(0, closed - 20) : closed])
    newest = int(times[-1]) // 4
    inside = (times // 4 < newest) & (times // 4 >= newest - 5)
    check(scorer, by_time, given_scores[inside], labels[inside])
    for live, kept in zip((by_rows, by_time), windows_of(windows.state(), wanted.windows, scorer), strict=True):
        assert live.tally.sums == kept.tally.sums
        assert (live.tally.counts == kept.tally.counts).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 150), st.integers(0, 2**32))
def test_windows_of_time_hold_the_outcomes_of_their_time_in_whatever_order_they_come(count: int, seed: int) -> None:
    """Whole numbers are added, so what comes late leaves the very bits that it would have left in time."""
    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 9, count) / 8, rng.integers(0, 2, count).astype("f8")
    came = 1000 + np.cumsum(rng.choice([0, 0, 1, 3, 40], count))
    when = came - rng.choice([0, 0, 0, 1, 7, 30], count)
    wanted = LabelSettings("binary", "p", windows=(time_window(20e-9, 4e-9), time_window(8e-9, 4e-9)))
    scorer = scorer_of(wanted)
    windows, start = LabelWindows(wanted, scorer), 0
    while start < count:
        part = slice(start, start + int(rng.integers(1, 40)))
        windows.add(scores[part, None], labels[part], came[part], when[part])
        start = part.stop
        if rng.random() < 0.5:
            again = LabelWindows(wanted, scorer)
            again.restore(windows.unfinished())
            windows = again
    end = int(came[-1] + rng.choice([0, 4, 8, 100]))
    windows.tick(end)
    age = end // 4 - when // 4
    for window, panes in zip(windows.now(), (5, 2), strict=True):
        inside = (age >= 1) & (age <= panes)
        alone = scorer.tally(scores[inside, None], labels[inside])
        assert (window.tally.rows, window.tally.sums) == (alone.rows, alone.sums)
        assert (window.tally.counts == alone.counts).all()
        assert window.outdated == (came // 4 - when // 4 > panes).sum()
        check(scorer, window, scores[inside], labels[inside])
    for live, kept in zip(windows.now(), windows_of(windows.state(), wanted.windows, scorer), strict=True):
        assert (live.tally.sums, live.start_ns, live.end_ns) == (kept.tally.sums, kept.start_ns, kept.end_ns)


def check(scorer: Any, window: Any, scores: np.ndarray, labels: np.ndarray) -> None:
    assert window.rows == len(labels)
    found = scorer.metrics(window.tally, window.ranking)
    if not len(labels):
        return
    truth = labels.astype(int)
    assert abs(found["accuracy"] - metrics.accuracy_score(truth, scores >= 0.5)) < 1e-9
    assert abs(found["brier"] - np.mean((scores - truth) ** 2)) < 1e-9
    assert abs(found["log_loss"] - metrics.log_loss(truth, scores, labels=[0, 1])) < 1e-9
    if 0 < truth.sum() < len(truth):
        assert abs(found["auc"] - metrics.roc_auc_score(truth, scores)) < 1e-9
        assert abs(found["average_precision"] - metrics.average_precision_score(truth, scores)) < 1e-9


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(["binary", "multiclass", "regression"]))
def test_merge_is_the_same_bits_in_any_order_and_grouping(rng: random.Random, task: Any) -> None:
    classes = ("a", "b", "c") if task == "multiclass" else ()
    wanted = LabelSettings(task, "p", classes=classes, windows=(rows_window(20, 5), time_window(50e-9, 10e-9)))
    scorer = scorer_of(wanted)
    made = np.random.default_rng(rng.randrange(2**32))
    states = []
    for _ in range(4):
        windows, count = LabelWindows(wanted, scorer), rng.randrange(1, 60)
        scores = made.random((count, wanted.width))
        labels = made.random(count) if task == "regression" else made.integers(0, max(2, len(classes)), count) * 1.0
        windows.add(scores, labels, np.sort(made.integers(0, 80, count)))
        windows.tick(100)
        states.append(windows.state())
    whole = windows_of(merge_windows(states), wanted.windows, scorer)
    rng.shuffle(states)
    other = windows_of(merge_windows([merge_windows(states[:2]), merge_windows(states[2:])]), wanted.windows, scorer)
    for a, b in zip(whole, other, strict=True):
        assert (a.tally.sums, a.start_ns, a.end_ns) == (b.tally.sums, b.start_ns, b.end_ns)
        assert repr(scorer.metrics(a.tally, a.ranking)) == repr(scorer.metrics(b.tally, b.ranking))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 300), st.sampled_from([1, 4, 64, 0]))
def test_the_grid_brackets_the_exact_area(seed: int, count: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random(count) * 1e-3 + 0.4 if not levels else rng.integers(0, levels + 1, count) / max(levels, 1)
    positive = rng.random(count) < 0.4
    exact, grid = Ranking(count), Ranking(0)
    exact.add(scores, positive)
    grid.add(scores, positive)
    a, b = auc_of(exact), auc_of(grid)
    if np.isnan(a.value):
        assert np.isnan(b.value)
        return
    assert a.error == 0
    assert abs(a.value - b.value) <= b.error + 1e-12
