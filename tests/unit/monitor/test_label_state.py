"""What labels have taught, written down and read again: the same bits, or a refusal that says why."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score

from monitor import sealed
from monitor.errors import SettingsError, StateError
from monitor.label_memory import GroupCounts, SavedRows
from monitor.label_state import (
    SavedGroup,
    SavedLabels,
    from_profile,
    integers_from_bytes,
    integers_to_bytes,
    reference_rows,
    to_profile,
)
from monitor.label_windows import LabelWindows
from monitor.labels import COUNTERS, SavedJoin
from monitor.outcomes import LabelSettings
from monitor.performance import scorer_of
from monitor.types import rows_window, time_window

SETTINGS = LabelSettings("binary", "p", windows=(rows_window(100, 50), time_window(100, 10)), exact_rows=60)
RNG = np.random.default_rng(4)
SCORES = RNG.random(500)
LABELS = (RNG.random(500) < SCORES).astype("f8")
TIMES = np.arange(500, dtype="i8") * 10**9


def saved(settings: LabelSettings = SETTINGS, rows: int = 270) -> SavedLabels:
    windows = LabelWindows(settings, scorer_of(settings))
    windows.add(SCORES[:rows, None], LABELS[:rows], TIMES[:rows])
    reference = reference_rows(settings, SCORES[:100, None], LABELS[:100])
    groups = [
        SavedGroup(("1", "stable", ""), windows.unfinished(), {"active": [True]}, reference, None, 0),
        SavedGroup(("1", "stable", "eu"), [], {}, None, (SCORES[:7, None], LABELS[:7]), 93),
    ]
    waiting = SavedRows(
        np.array([[2, 5, -1, 0]]), np.array([[7, 0]]), np.array([np.nan, 1.0]), np.array([[0.5], [0.25]])
    )
    held, values = np.array([[3, 0, 8, 8]]), np.array([1.0])
    group = GroupCounts("1", "stable", "", predicted=9, joined=4)
    join = SavedJoin(dict.fromkeys(COUNTERS, 3), [group], bytes(range(16)), waiting, held, values)
    return SavedLabels("m", "mark", "run", join, groups, 2)


def test_what_is_written_is_read_again() -> None:
    first = saved()
    data = first.to_bytes()
    again = SavedLabels.from_bytes(data, SETTINGS.exact_rows)
    assert again.to_bytes() == data
    assert (again.model, again.mark, again.run, again.forgotten_groups) == ("m", "mark", "run", 2)
    assert (again.join.counters, again.join.groups) == (first.join.counters, first.join.groups)
    assert again.join.key == bytes(range(16))
    for name in ("requests", "ids", "labels", "predictions"):
        np.testing.assert_array_equal(getattr(again.join.rows, name), getattr(first.join.rows, name))
    assert again.join.held.tolist() == [[3, 0, 8, 8]]
    assert again.join.held_values.tolist() == [1.0]
    whole, part = again.groups
    assert (whole.key, whole.alarms, whole.missing) == (("1", "stable", ""), {"active": [True]}, 0)
    assert part.first is not None
    np.testing.assert_array_equal(part.first[0], SCORES[:7, None])
    assert (part.missing, part.reference) == (93, None)
    opened = [series.open for series in whole.windows]
    assert [pane.rows for pane in opened if pane is not None] == [20, 10]
    assert whole.reference is not None
    assert first.groups[0].reference is not None
    assert whole.reference.tally.sums == first.groups[0].reference.tally.sums
    for mine, its in zip(whole.windows, first.groups[0].windows, strict=True):
        for one, other in zip(mine.panes, its.panes, strict=True):
            assert (one.index, one.rows, one.start_ns, one.end_ns) == (
                other.index, other.rows, other.start_ns, other.end_ns,
            )  # fmt: skip
            assert one.tally.sums == other.tally.sums


def test_panes_over_their_bound_are_kept_as_cells() -> None:
    settings = replace(SETTINGS, exact_rows=20)
    again = SavedLabels.from_bytes(saved(settings).to_bytes(), 20)
    ranking = again.groups[0].windows[0].panes[0].ranking
    assert ranking is not None
    assert ranking.rows() is None
    assert int(ranking.cells().sum()) == 50


@pytest.mark.parametrize("place", [0, 9, 200, -1])
def test_damage_is_told(place: int) -> None:
    data = bytearray(saved().to_bytes())
    data[place] ^= 0xFF
    with pytest.raises(StateError):
        SavedLabels.from_bytes(bytes(data), 60)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"schema": 99}, "schema 99 is not known"),
        ({"schema": 2}, "damaged"),
        ({"schema": 2, "counters": [], "join": [], "groups": []}, "damaged"),
    ],
)
def test_other_contents_are_told(header: dict[str, object], why: str) -> None:
    with pytest.raises(StateError, match=why):
        SavedLabels.from_bytes(sealed.pack("label state", header, {}), 60)


@given(st.integers(1, 4).flatmap(lambda m: st.lists(st.lists(st.integers(), min_size=m, max_size=m), min_size=1)))
def test_whole_numbers_of_any_size(rows: list[list[int]]) -> None:
    assert integers_from_bytes(integers_to_bytes(rows)) == rows


# --- references ---


def test_a_reference_in_a_profile_has_the_same_sums_and_nearly_the_same_auc() -> None:
    rows = reference_rows(SETTINGS, SCORES[:, None], LABELS)
    found = from_profile(SETTINGS, to_profile(SETTINGS, rows))
    assert (found.tally.rows, found.tally.sums) == (500, rows.tally.sums)
    metrics = scorer_of(SETTINGS).metrics(found.tally, found.ranking)
    assert metrics["log_loss"] == pytest.approx(log_loss(LABELS, SCORES), rel=1e-12)
    assert abs(metrics["auc"] - roc_auc_score(LABELS, SCORES)) <= metrics["auc_error"] < 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        LabelSettings("regression", "p"),
        LabelSettings("binary", "p", form="class"),
        LabelSettings("multiclass", "p", classes=("a", "b")),
        LabelSettings("multiclass", "p", classes=("a", "b"), form="class"),
    ],
)
def test_references_of_every_task(settings: LabelSettings) -> None:
    predictions = np.stack([SCORES, 1 - SCORES], axis=1)[:, : settings.width]
    predictions = np.round(predictions) if settings.form == "class" else predictions
    rows = reference_rows(settings, predictions, LABELS)
    found = from_profile(settings, to_profile(settings, rows))
    assert found.tally.sums == rows.tally.sums
    assert (found.ranking is None) == (rows.ranking is None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"threshold": 0.3}, "threshold 0.5, the settings have 0.3"),
        ({"index": 1}, "index 0, the settings have 1"),
        ({"classes": ("no", "yes")}, r"classes \[\], the settings have \['no', 'yes'\]"),
        ({"form": "logit"}, "form 'probability'"),
    ],
)
def test_a_reference_made_otherwise_is_refused(change: dict[str, object], why: str) -> None:
    kept = to_profile(SETTINGS, reference_rows(SETTINGS, SCORES[:, None], LABELS))
    with pytest.raises(SettingsError, match=why):
        from_profile(replace(SETTINGS, **change), kept)  # type: ignore[arg-type]


def test_a_reference_that_lacks_something_is_refused() -> None:
    kept = to_profile(SETTINGS, reference_rows(SETTINGS, SCORES[:, None], LABELS))
    for broken in (replace(kept, cells=None), replace(kept, counts=kept.counts[1:]), replace(kept, sums=kept.sums[1:])):
        with pytest.raises(SettingsError, match="does not hold what its task needs"):
            from_profile(SETTINGS, broken)
