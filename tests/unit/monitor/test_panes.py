"""Panes and windows: always exactly the sum of what they cover; states that merge and survive."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pytest

from monitor.errors import StateError
from monitor.layout import Layout
from monitor.panes import PaneStore, Seasonal, merge_arms, store_bytes
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState
from monitor.types import HOUR_NS, SECOND_NS, Window, WindowCounts, rows_window, time_window

LAYOUT_VALUES = np.arange(50.0)


def layout() -> Layout:
    return Layout(ReferenceProfile.from_arrays({"x": LAYOUT_VALUES}))


def matrix(values: Iterable[float]) -> list[np.ndarray]:
    return [np.array(list(values), "f8").reshape(-1, 1)]


def recount(one: Layout, values: Iterable[float]) -> np.ndarray:
    counts = np.zeros(one.cells, "i4")
    one.count(matrix(values), counts)
    return counts


def test_row_windows_hold_the_newest_rows_exactly() -> None:
    one, looks = layout(), []
    windows = [rows_window(20, 10), rows_window(50, 10)]

    def look(counts: WindowCounts) -> None:
        looks.append((counts.window, counts.look, counts.rows, counts.cells.copy()))

    store = PaneStore(one, windows, on_look=look)
    values = np.random.default_rng(0).integers(-5, 60, 333).astype(float)
    for start in range(0, 333, 7):  # batches do not fall on panes
        store.add(matrix(values[start : start + 7]), len(values[start : start + 7]), start)
    assert [number for name, number, _, _ in looks if name == "20rows"] == list(range(2, 34))
    assert [number for name, number, _, _ in looks if name == "50rows"] == list(range(5, 34))
    for name, number, rows, cells in looks:
        length = int(name.removesuffix("rows"))
        assert rows == length
        assert (cells == recount(one, values[number * 10 - length : number * 10])).all()
    state = store.state()
    assert (state.total == recount(one, values)).all()
    assert (state.window(windows[1]).cells == recount(one, values[280:330])).all()


def test_a_million_rows_leave_no_residue() -> None:
    one = layout()
    windows = [rows_window(1000), rows_window(10_000)]
    store = PaneStore(one, windows)
    rng = np.random.default_rng(1)
    last = np.empty(0)
    for _ in range(250):
        last = rng.standard_normal(4000) * 30
        store.add(matrix(last), 4000, 0)
    state = store.state()
    assert (state.window(windows[0]).cells == recount(one, last[-1000:])).all()
    live = [counts for series in store._series for counts in series.looks()]
    assert [counts.rows for counts in live] == [1000, 10_000]
    assert (live[0].cells == state.window(windows[0]).cells).all()
    assert (live[1].cells == state.window(windows[1]).cells).all()
    assert state.total.sum() == 1_000_000
    assert all(counts.cells.min() >= 0 for counts in live)


def test_time_windows_pass_with_and_without_rows() -> None:
    one, looks = layout(), []
    window = time_window(10, 2)
    store = PaneStore(one, [window], on_look=lambda counts: looks.append((counts.rows, counts.look)))
    store.add(matrix([1, 2]), 2, 1 * SECOND_NS)
    store.add(matrix([3]), 1, 3 * SECOND_NS)
    assert looks == [(2, 1)]
    store.tick(12 * SECOND_NS)  # panes 1..5 are over: the first row's pane left the window at the end
    assert looks == [(2, 1), (3, 2), (3, 3), (3, 4), (3, 5), (1, 6)]
    state = store.state()
    assert (state.window(window).cells == recount(one, [3])).all()
    store.tick(11 * SECOND_NS)
    assert len(looks) == 6


def test_a_long_silence_empties_the_window() -> None:
    one = layout()
    window = time_window(10, 2)
    store = PaneStore(one, [window])
    store.add(matrix([1, 2]), 2, SECOND_NS)
    store.add(matrix([3]), 1, 10**6 * SECOND_NS)
    store.tick((10**6 + 2) * SECOND_NS)
    counts = store.state().window(window)
    assert counts.rows == 1
    assert (counts.cells == recount(one, [3])).all()
    assert store.state().total.sum() == 3


@pytest.mark.parametrize(
    "windows",
    [
        [rows_window(6, 3)],
        [rows_window(4, 2), rows_window(8, 2)],
        [time_window(10, 5)],
        [time_window(10, 2), rows_window(3, 3)],
        [rows_window(70_000, 70_000)],
    ],
    ids=repr,
)
def test_the_total_is_everything_whenever_it_is_asked_for(windows: list[Window]) -> None:
    one = layout()
    rng = np.random.default_rng(4)
    seen: list[float] = []
    store, now_ns = PaneStore(one, windows), 0
    for step in range(60):
        now_ns += int(rng.choice([0, 1, 7, 100])) * SECOND_NS
        values = rng.integers(-5, 60, int(rng.integers(1, 9))).astype(float).tolist()
        seen += values
        store.add(matrix(values), len(values), now_ns)
        if step % 7 == 3:
            assert (store.state().total == recount(one, seen)).all()
        if step % 20 == 19:  # what is restored lacks the open panes, the total does not
            state, store = store.state(), PaneStore(one, windows)
            store.restore(state)
            assert (store.state().total == recount(one, seen)).all()
    assert (store.state().total == recount(one, seen)).all()


def test_panes_of_more_rows_than_two_bytes_count() -> None:
    one, window, looks = layout(), rows_window(140_000, 70_000), []
    store = PaneStore(one, [window], on_look=lambda counts: looks.append(counts.cells.copy()))
    values = np.full(70_000, 7.0)
    for second in range(4):
        store.add(matrix(values + second), len(values), second)
    assert [found.max() for found in looks] == [70_000] * 3
    assert (looks[-1] == recount(one, np.repeat([9.0, 10.0], 70_000))).all()
    assert (store.state().window(window).cells == looks[-1]).all()


@pytest.mark.parametrize("most", [200, 300])
def test_counts_are_saved_in_as_many_bytes_as_they_take(most: int) -> None:
    one, window = layout(), rows_window(most, most)
    store = PaneStore(one, [window])
    store.add(matrix([1.0] * most), most, 0)
    kept = store.state()
    found = MonitorState.from_bytes(MonitorState("m", "1", one.sha256, {"stable": kept}).to_bytes()).arms["stable"]
    assert found.series[0].counts.dtype == kept.series[0].counts.dtype
    assert (found.series[0].counts == kept.series[0].counts).all()
    assert (found.window(window).cells == recount(one, [1.0] * most)).all()


@pytest.mark.parametrize(
    "windows", [[rows_window(9, 3), rows_window(6, 3)], [rows_window(9, 3), time_window(10, 2)], [time_window(60)]]
)
def test_a_store_takes_the_memory_that_it_says(windows: list[Window]) -> None:
    one = Layout(ReferenceProfile.from_arrays({"x": np.arange(100_000.0)}, knots=None))
    tracemalloc.start()
    try:
        store = PaneStore(one, windows)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.rows == 0
    assert taken == pytest.approx(store_bytes(one.cells, windows), rel=0.01)


def test_rows_and_time_are_counted_once_for_both() -> None:
    one = layout()
    windows = [rows_window(6, 3), time_window(10, 5), time_window(60)]
    store = PaneStore(one, windows)
    for second in range(40):
        store.add(matrix([second]), 1, second * SECOND_NS)
    state = store.state()
    assert (state.window(windows[0]).cells == recount(one, range(33, 39))).all()
    assert (state.window(windows[1]).cells == recount(one, range(25, 35))).all()
    assert (state.window(windows[2]).cells == recount(one, range(36))).all()
    assert state.total.sum() == 40


def test_dropped_rows_mark_the_pane_they_were_lost_in() -> None:
    one = layout()
    window = rows_window(4, 2)
    store = PaneStore(one, [window])
    store.add(matrix([1]), 1, 0)
    store.drop(9)
    store.add(matrix([1, 1, 1]), 3, 0)
    counts = store.state().window(window)
    assert (counts.rows, counts.dropped, counts.sampled) == (4, 9, True)
    store.add(matrix([1] * 4), 4, 0)
    assert not store.state().window(window).sampled
    assert store.dropped == 9


@pytest.mark.parametrize("windows", [[time_window(10, 5)], [time_window(10, 5), rows_window(100_000)]])
def test_a_pane_of_time_that_can_count_no_more_drops(windows: list[Window]) -> None:
    """Its counts are int32. It stands for 2**31 rows that were counted before: they would take an hour."""
    one = layout()
    store = PaneStore(one, windows)
    store.add(matrix([1, 2]), 2, 0)
    (series,) = [series for series in store._series if series.unit == "time"]
    series.rows = 2**31 - 1 - 3
    store.add(matrix([3, 4, 5, 6, 7]), 5, 1)
    store.add(matrix([8]), 1, 2)
    assert (store.rows, store.dropped) == (5, 3)
    store.add(matrix([9]), 1, 5 * SECOND_NS)
    store.tick(10 * SECOND_NS)
    counts = store.windows()["10s"]
    assert (counts.rows, counts.dropped, counts.sampled) == (2**31, 3, True)
    assert (counts.cells == recount(one, [1, 2, 3, 4, 5, 9])).all()


def test_a_state_of_more_rows_in_a_pane_than_can_be_counted_is_refused() -> None:
    store = PaneStore(layout(), [time_window(10, 5)])
    store.add(matrix([1]), 1, 0)
    store.tick(5 * SECOND_NS)
    state = store.state()
    state.series[0].rows[-1] = 2**31
    with pytest.raises(StateError, match=r"a pane of the state has 2147483648 rows, over the limit of 2147483647"):
        PaneStore(layout(), [time_window(10, 5)]).restore(state)


def test_state_survives_but_for_the_open_pane() -> None:
    one = layout()
    windows = [rows_window(4, 2), rows_window(6, 2), time_window(10, 5)]
    before, after, whole = (PaneStore(one, windows) for _ in range(3))
    values = list(range(20))
    for second, value in enumerate(values):
        before.add(matrix([value]), 1, second * SECOND_NS)
        whole.add(matrix([value]), 1, second * SECOND_NS)
    before.tick(20 * SECOND_NS)
    whole.tick(20 * SECOND_NS)
    after.restore(before.state())
    for second in range(20, 50):
        after.add(matrix([second]), 1, second * SECOND_NS)
        whole.add(matrix([second]), 1, second * SECOND_NS)
        for window in windows:
            found, expected = after.state().window(window), whole.state().window(window)
            assert (found.cells == expected.cells).all()
            assert (found.rows, found.look, found.full) == (expected.rows, expected.look, expected.full)


def test_states_of_several_processes_go_on_in_one() -> None:
    """Together a pane of theirs has more rows than one takes, and a cell more than fits where one process counts."""
    one, window = layout(), rows_window(40_000, 20_000)
    part = PaneStore(one, [window])
    part.add(matrix([7.0] * 40_000), 40_000, 0)
    store = PaneStore(one, [window])
    store.restore(merge_arms([part.state(), part.state(), part.state()]))
    assert (store.windows()[window.name].cells == 3 * recount(one, [7.0] * 40_000)).all()
    store.add(matrix([9.0] * 20_000), 20_000, 1)
    expected = 3 * recount(one, [7.0] * 20_000) + recount(one, [9.0] * 20_000)
    assert (store.windows()[window.name].cells == expected).all()
    assert (store.state().window(window).cells == expected).all()


@pytest.mark.parametrize("later", [54, 90, 4000])
def test_one_process_goes_on_where_another_had_ended(later: int) -> None:
    """Nobody was there in the panes between, which are no part of a window that is shorter than that."""
    one, windows = layout(), [time_window(20, 2), time_window(60, 2)]
    first, second, whole = (PaneStore(one, windows) for _ in range(3))
    for store, seconds in ((first, range(40)), (second, range(later, later + 6))):
        for now in seconds:
            for counting in (store, whole):
                counting.add(matrix([now % 50]), 1, now * SECOND_NS)
    first.tick(50 * SECOND_NS)
    second.tick((later + 8) * SECOND_NS)
    whole.tick((later + 8) * SECOND_NS)
    merged, both = PaneStore(one, windows), merge_arms([second.state(), first.state()])
    for window in windows:
        assert both.window(window).full == whole.windows()[window.name].full
    merged.restore(both)
    for now in range(later + 8, later + 80, 3):
        for store in (merged, whole):
            store.tick(now * SECOND_NS)
        for window in windows:
            expected = whole.windows()[window.name]
            for found in (merged.windows()[window.name], merged.state().window(window)):
                assert (found.cells == expected.cells).all()
                assert (found.rows, found.start_ns, found.end_ns) == (expected.rows, expected.start_ns, expected.end_ns)
                assert found.full == expected.full


def test_progress_is_made_with_rows_and_with_panes_that_have_some() -> None:
    """Also where the clock was set back meanwhile, and where all rows of a pane were dropped; not by time alone."""
    store = PaneStore(layout(), [time_window(60, 10)])
    store.add(matrix([1.0] * 5), 5, 10_000 * SECOND_NS)
    store.tick(10_011 * SECOND_NS)
    store.add(matrix([1.0] * 3), 3, 10_015 * SECOND_NS)
    store.follow_clock(5_005 * SECOND_NS)
    seen = [store.progress()]

    def at(seconds: int) -> bool:
        store.tick(seconds * SECOND_NS)
        seen.append(store.progress())
        return seen[-1] != seen[-2]

    assert not at(5_006)
    assert at(5_021)
    assert not at(5_041)
    store.drop(7)
    assert at(5_042)
    assert at(5_051)
    assert not at(5_100)


def test_states_of_other_windows_are_refused() -> None:
    one = layout()
    state = PaneStore(one, [rows_window(4, 2)]).state()
    more = PaneStore(one, [rows_window(4, 2), time_window(20, 2)]).state()
    for states in ([state, more], [more, state]):
        with pytest.raises(StateError, match="other windows"):
            merge_arms(states)
    with pytest.raises(StateError, match="other windows"):
        PaneStore(one, [rows_window(4, 1)]).restore(state)
    with pytest.raises(StateError, match="other windows"):
        merge_arms([state, PaneStore(one, [rows_window(4, 1)]).state()])
    other = Layout(ReferenceProfile.from_arrays({"x": np.arange(51.0)}))
    with pytest.raises(StateError, match="cells"):
        PaneStore(other, [rows_window(4, 2)]).restore(state)
    with pytest.raises(StateError, match="no panes"):
        state.window(Window("time", 10, 5))


def test_hour_of_week_reference() -> None:
    season = Seasonal("hour_of_week", 2, min_rows=10)
    for week in range(2):
        for hour in range(168):
            now = (week * 168 + hour) * HOUR_NS
            found = season.reference(now)
            if week:
                assert found is not None
                assert found.tolist() == [hour + 10, 0]
            else:
                assert found is None
            season.add(np.array([hour + 10 + week, 0], "i4"), hour + 10, now)


def test_trailing_week_reference_leaves_out_the_current_hour() -> None:
    season = Seasonal("trailing_week", 1, min_rows=1)
    for hour in range(400):
        season.add(np.array([hour], "i4"), 1, hour * HOUR_NS)
    found = season.reference(399 * HOUR_NS)
    assert found is not None
    assert found.tolist() == [sum(range(399 - 168, 399))]
    again = Seasonal("trailing_week", 1, min_rows=1)
    again.restore(*season.state())
    restored = again.reference(399 * HOUR_NS)
    assert restored is not None
    assert restored.tolist() == found.tolist()
    with pytest.raises(StateError):
        Seasonal("trailing_week", 2, 1).restore(*season.state())


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("back_s", [120, 10_000])
def test_windows_of_time_go_on_when_the_clock_is_set_back(back_s: int, restarted: bool) -> None:
    one, looks = layout(), []
    window = time_window(100, 10)
    windows = [window, rows_window(4, 2)]
    store = PaneStore(one, windows, on_look=lambda counts: looks.append(counts))
    early = 100_000
    for second in range(early, early + 60, 10):
        store.add(matrix([1]), 1, second * SECOND_NS)
    if restarted:
        store.tick((early + 60) * SECOND_NS)
        saved = store.state()
        store = PaneStore(one, windows, on_look=lambda counts: looks.append(counts))
        store.restore(saved)
    looks.clear()
    late = early + 55 - back_s
    store.add(matrix([2]), 1, late * SECOND_NS)
    store.follow_clock(late * SECOND_NS)
    for second in range(late + 10, late + 60, 10):
        store.add(matrix([3]), 1, second * SECOND_NS)
        store.follow_clock(second * SECOND_NS)
        store.tick(second * SECOND_NS)
    seen = [counts for counts in looks if counts.window == window.name]
    left = int(restarted)  # there the row before came in a pane of its own
    assert [counts.rows for counts in seen] == [7, 8, 9, 10, 11 - left]
    assert all(counts.end_ns <= (late + 60) * SECOND_NS for counts in looks)
    state = store.state()
    assert state.series[0].index.tolist() == list(range(state.series[0].index[0], (late + 50) // 10))
    assert (state.window(window).cells == recount(one, [1] * (6 - left) + [2] + [3] * 4)).all()


def test_a_clock_that_is_read_before_rows_came_was_not_set_back() -> None:
    one = layout()
    window = time_window(10, 1)
    store = PaneStore(one, [window])
    for second in range(1000, 1030):
        store.add(matrix([1]), 1, second * SECOND_NS)
    store.follow_clock(1000 * SECOND_NS)
    assert store.state().series[0].index.tolist() == list(range(1019, 1029))


def test_the_seasonal_reference_follows_a_clock_that_is_set_back() -> None:
    season = Seasonal("trailing_week", 1, min_rows=1)
    season.add(np.array([5], "i4"), 5, 1000 * HOUR_NS)
    season.follow_clock(900 * HOUR_NS)
    season.add(np.array([6], "i4"), 6, 900 * HOUR_NS)
    found = season.reference(901 * HOUR_NS)
    assert found is not None
    assert found.tolist() == [11]


def test_an_hour_that_the_clock_was_set_back_into_keeps_its_rows() -> None:
    season = Seasonal("trailing_week", 2, min_rows=1)
    season.add(np.array([600, 0], "i4"), 600, 1000 * HOUR_NS)
    season.add(np.array([0, 5], "i4"), 5, 1001 * HOUR_NS)
    season.follow_clock(1001 * HOUR_NS - 2 * 60 * SECOND_NS)
    season.add(np.array([1, 0], "i4"), 1, 1001 * HOUR_NS - 1)
    found = season.reference(1001 * HOUR_NS)
    assert found is not None
    assert found.tolist() == [601, 5]


@pytest.mark.parametrize("mode", ["trailing_week", "hour_of_week"])
def test_the_reference_is_that_of_the_hour_that_the_clock_was_set_back_to(
    mode: Literal["trailing_week", "hour_of_week"],
) -> None:
    season = Seasonal(mode, 2, min_rows=1)
    season.add(np.array([7, 0], "i4"), 7, 832 * HOUR_NS)
    season.add(np.array([0, 0], "i4"), 0, 2001 * HOUR_NS)
    assert season.reference(2001 * HOUR_NS) is None
    season.follow_clock(1000 * HOUR_NS)
    found = season.reference(1000 * HOUR_NS)
    assert found is not None
    assert found.tolist() == [7, 0]


def test_an_hour_that_was_over_is_held_against_the_nearest() -> None:
    season = Seasonal("hour_of_week", 2, min_rows=1)
    season.add(np.array([7, 0], "i4"), 7, 832 * HOUR_NS)
    season.add(np.array([0, 9], "i4"), 9, 833 * HOUR_NS)
    season.add(np.array([3, 3], "i4"), 6, 1000 * HOUR_NS)
    season.add(np.array([1, 1], "i4"), 2, 1001 * HOUR_NS)
    season.follow_clock(1001 * HOUR_NS - 2 * 60 * SECOND_NS)
    found = season.reference(1001 * HOUR_NS - 1)
    assert found is not None
    assert found.tolist() == [0, 9]


def test_rows_go_into_their_hour_though_none_came_before_the_clock_was_set_back() -> None:
    """With windows of rows only, nothing but the last tick remembers what the clock showed."""
    one = layout()
    season = Seasonal("trailing_week", one.cells, min_rows=1)
    store = PaneStore(one, [rows_window(4, 2)], on_fresh=season.add)
    store.tick(1024 * HOUR_NS)
    store.follow_clock(1000 * HOUR_NS)
    store.add(matrix([1]), 1, 1000 * HOUR_NS)
    store.flush()
    assert season.reference(1000 * HOUR_NS) is None
    found = season.reference(1001 * HOUR_NS)
    assert found is not None
    assert (found == recount(one, [1])).all()
