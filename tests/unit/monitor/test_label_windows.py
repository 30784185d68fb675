"""Windows of joined rows: exactly their panes, whatever the pieces; gaps in time; states that merge or refuse to."""

from __future__ import annotations

import numpy as np
import pytest

from monitor.errors import StateError
from monitor.label_windows import LabelWindows, merge_windows, windows_of
from monitor.outcomes import LabelSettings
from monitor.performance import scorer_of
from monitor.types import SECOND_NS, rows_window, time_window

SETTINGS = LabelSettings("binary", "p", windows=(rows_window(20, 10), time_window(10, 2)))
SCORER = scorer_of(SETTINGS)


def windows(settings: LabelSettings = SETTINGS) -> LabelWindows:
    return LabelWindows(settings, SCORER)


def add(one: LabelWindows, count: int, *seconds: float) -> list[tuple[str, int, int]]:
    """What moved: (window, rows, look). All rows at the given times, in turn."""
    times = (np.resize(np.array(seconds), count) * SECOND_NS).astype("i8")
    moved = one.add(np.full((count, 1), 0.5), np.ones(count), times)
    return [(window.window.name, window.rows, window.look) for window in moved]


def test_rows_and_time_move_apart() -> None:
    one = windows()
    assert add(one, 9, 1.0) == []
    assert add(one, 2, 3.0) == [("20rows", 10, 1), ("10s", 9, 1)]
    assert add(one, 25, 3.9) == [("20rows", 20, 2), ("20rows", 20, 3)]
    full = [window.full for window in one.now()]
    assert full == [True, False]


def test_time_passes_without_rows() -> None:
    one = windows()
    add(one, 4, 1.0)
    assert one.tick(1 * SECOND_NS) == []
    assert [window.rows for window in one.tick(2 * SECOND_NS)] == [4]
    assert [window.rows for window in one.tick(11 * SECOND_NS)] == [4] * 4
    assert [window.rows for window in one.tick(13 * SECOND_NS)] == [0]
    assert one.tick(10_000_000 * SECOND_NS) == []
    assert add(one, 3, 20_000_000.0) == []
    assert [window.rows for window in one.tick(20_000_002 * SECOND_NS)] == [3]
    assert windows_of(one.state(), SETTINGS.windows, SCORER)[1].rows == 3


def test_a_row_older_than_the_open_pane_is_counted_in_it() -> None:
    one = windows()
    add(one, 1, 100.0)
    add(one, 1, 1.0)
    (moved,) = one.tick(102 * SECOND_NS)
    assert (moved.rows, moved.start_ns, moved.end_ns) == (2, 1 * SECOND_NS, 100 * SECOND_NS)
    assert one.now()[1].outdated == 0


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("back_s", [70, 900])
def test_windows_of_time_go_on_when_the_clock_is_set_back(back_s: int, restarted: bool) -> None:
    one = windows()
    for second in range(1000, 1008, 2):
        add(one, 4, second)
    if restarted:
        saved, one = one.unfinished(), windows()
        one.restore(saved)
    before = one.state()
    late = 1006 - back_s
    add(one, 1, late)
    assert one.tick(late * SECOND_NS) == []
    moved = [rows for second in (2, 4, 6) for name, rows, _ in add(one, 1, late + second) if name == "10s"]
    moved += [window.rows for window in one.tick((late + 8) * SECOND_NS)]
    assert moved == [4 + 4 + 4 + 5, 4 + 4 + 4 + 5 + 1, 4 + 4 + 5 + 1 + 1, 4 + 5 + 1 + 1 + 1]
    now = one.now()
    assert [window.rows for window in now] == [20, 12]
    assert all(window.end_ns <= (late + 6) * SECOND_NS for window in now)
    indices = [pane.index for pane in one.state()[1].panes]
    assert indices == list(range((late + 8) // 2 - len(indices), (late + 8) // 2))
    assert [pane.index for pane in before[1].panes] == [500, 501, 502]
    again = windows()
    again.restore(one.unfinished())


def test_a_clock_that_is_read_before_labels_came_was_not_set_back() -> None:
    one = windows()
    add(one, 1, 1000.0)
    add(one, 1, 1002.0)
    assert one.tick(950 * SECOND_NS) == []
    assert [pane.index for pane in one.state()[1].panes] == [500]


def told(one: LabelWindows, came: float, *outcomes: float) -> None:
    """Rows that came together, with what was told of when their outcomes were."""
    times = (np.array([came, *outcomes]) * SECOND_NS).astype("i8")
    one.add(np.full((len(outcomes), 1), 0.5), np.ones(len(outcomes)), np.full(len(outcomes), times[0]), times[1:])


def test_late_rows_are_put_where_their_outcomes_were() -> None:
    one = windows()
    told(one, 101.0, 101.0)
    kept = one.state()
    told(one, 110.5, 101.5, 109.0, 99.9, 80.0, 110.5)  # the open pane is 110 to 112, its window goes back to 100
    assert [window.outdated for window in one.now()] == [0, 2]
    (moved,) = one.tick(112 * SECOND_NS)
    assert (moved.rows, moved.start_ns) == (2, 109 * SECOND_NS)  # 102 to 112
    one = windows()
    told(one, 111.0, 103.0, 104.0, 110.0)
    assert [moved.rows for moved in one.tick(114 * SECOND_NS)] == [3, 2]
    assert [pane.rows for pane in kept[1].panes] == []


def test_who_reads_a_state_keeps_it_while_late_rows_come() -> None:
    one = windows()
    told(one, 101.0, 101.0)
    one.tick(102 * SECOND_NS)
    kept = one.state()
    told(one, 103.0, 101.5)
    assert [pane.rows for pane in kept[1].panes] == [1]
    assert [pane.rows for pane in one.state()[1].panes] == [2]
    assert kept[1].panes[0].ranking is not None
    assert len(kept[1].panes[0].ranking.cells().nonzero()[0]) == 1


def test_a_state_of_panes_with_a_gap_or_of_other_windows_is_refused() -> None:
    one = windows()
    told(one, 101.0, 101.0)
    one.tick(106 * SECOND_NS)
    state = one.unfinished()
    assert [pane.index for pane in state[1].panes] == [50, 51, 52]
    gone = state[1].panes.pop(1)
    with pytest.raises(StateError, match="one stretch of time"):
        windows().restore(state)
    state[1].panes.insert(1, gone)
    windows().restore(state)
    state[1].outdated = {"1h": 0}
    with pytest.raises(StateError, match="those of the settings"):
        windows().restore(state)


def test_panes_of_rows_merge_by_age_and_those_of_time_by_time() -> None:
    a, b = windows(), windows()
    add(a, 35, 1.0, 1.5)
    add(b, 12, 3.0)
    for one in (a, b):
        one.tick(4 * SECOND_NS)
    by_rows, by_time = windows_of(merge_windows([a.state(), b.state()]), SETTINGS.windows, SCORER)
    assert by_rows.rows == 30
    assert by_time.rows == 47
    assert (by_time.start_ns, by_time.end_ns) == (1 * SECOND_NS, 3 * SECOND_NS)


def test_states_that_do_not_fit() -> None:
    other = LabelSettings("binary", "p", windows=(rows_window(20, 5),))
    with pytest.raises(StateError, match="other panes"):
        merge_windows([windows().state(), LabelWindows(other, SCORER).state()])
    with pytest.raises(StateError, match="no label windows"):
        merge_windows([])
    with pytest.raises(StateError, match="no panes for the window 20rows"):
        windows_of(windows().state(), other.windows, SCORER)


def test_a_million_rows_leave_no_residue() -> None:
    settings = LabelSettings("binary", "p", windows=(rows_window(1000, 500),), exact_rows=10)
    one, rng = LabelWindows(settings, SCORER), np.random.default_rng(0)
    for _ in range(50):
        scores, labels = rng.random((20_000, 1)), rng.integers(0, 2, 20_000).astype("f8")
        one.add(scores, labels, np.zeros(20_000, "i8"))
    (window,) = one.now()
    last = SCORER.tally(scores[-1000:], labels[-1000:])
    assert window.tally.sums == last.sums
    assert (window.tally.counts == last.counts).all()
    assert window.ranking is not None
    assert window.ranking.rows() is None
