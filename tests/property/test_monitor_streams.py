"""Whatever the stream and however it is cut: brackets hold, merges are exact, order within a window is nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from monitor.alarms import AlarmBook
from monitor.drift.base import Pair
from monitor.drift.ks import KolmogorovSmirnov
from monitor.drift.wasserstein import Wasserstein
from monitor.engine import Monitor
from monitor.judging import Judge
from monitor.layout import Layout
from monitor.panes import PaneStore
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState, merge
from monitor.tap import Item
from monitor.types import SECOND_NS, AlarmRules, Settings, rows_window, time_window
from tests.reference import naive_monitor as naive

values = st.one_of(
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.integers(-3, 3).map(float),
    st.sampled_from([0.0, -0.0, 1e-42, -1e-42, 3.4e38, -3.4e38, float("nan")]),
)


def samples(least: int) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays("f4", st.integers(least, 120), elements=values)


@settings(max_examples=150, deadline=None)
@given(samples(1), samples(1), st.sampled_from([None, 2, 5, 64]))
def test_cells_and_brackets(reference: np.ndarray, window: np.ndarray, knots: int | None) -> None:
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}, knots=knots))
    counts = np.zeros(layout.cells, "i4")
    layout.count([window.reshape(-1, 1)], counts)
    column = layout.columns[0]
    assert counts.tolist() == naive.cell_counts(window.tolist(), column.knots.astype("f4").tolist())
    pair = Pair(layout, layout.reference, counts)
    low, high = (ends[0] for ends in KolmogorovSmirnov().interval(pair))
    exact = naive.ks_distance(reference, window)
    if np.isnan(exact):
        assert np.isnan(low)
        return
    assert low - 1e-12 <= exact <= high + 1e-12
    assert high - low <= column.ks_resolution + 1e-12
    if knots is None:
        assert abs(low - exact) <= 1e-12
        assert abs(high - exact) <= 1e-12
    finite = column.knots[np.isfinite(column.knots)]
    if len(finite):
        bottom, line, top = (ends[0] for ends in Wasserstein().bounds(pair))
        distance = naive.wasserstein(reference.astype("f8"), window.astype("f8"), finite[0], finite[-1])
        slack = 1e-9 * distance + 1e-15 * float(finite[-1] - finite[0])
        assert bottom - slack <= distance <= top + slack
        assert bottom - slack <= line <= top + slack


TIMED = Settings(windows=(time_window(20, 2), time_window(60, 6)), rules=AlarmRules(min_rows=1))
PROFILE = ReferenceProfile.from_arrays({"x": np.random.default_rng(0).standard_normal((500, 3)).astype("f4")})


def monitor_of(items: list[Item]) -> MonitorState:
    monitor = Monitor("m", "1", PROFILE, TIMED)
    monitor.ingest(monitor.keys, items)
    monitor.tick(100 * SECOND_NS)
    return monitor.state()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_merged_monitors_report_what_one_would(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    seconds = sorted(data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=30)))
    rows = [int(rng.integers(1, 40)) for _ in seconds]
    arms = [data.draw(st.sampled_from(["stable", "canary"])) for _ in seconds]
    contents = [[rng.standard_normal((n, 3)).astype("f4").tobytes()] for n in rows]
    zipped = zip(seconds, rows, arms, contents, strict=True)
    items = [Item(second * SECOND_NS, arm, n, 0, [content]) for second, n, arm, content in zipped]
    shares = [data.draw(st.integers(0, 6)) for _ in items]
    parts = [monitor_of([item for item, share in zip(items, shares, strict=True) if share == k]) for k in range(7)]
    parts = data.draw(st.permutations(parts))
    grouped = merge([merge(parts[:3]), merge(parts[3:])])
    judge = Judge(Layout(PROFILE), TIMED)
    whole = judge.report(merge([monitor_of(items)]))
    assert repr(judge.report(grouped)) == repr(whole)
    assert repr(judge.report(merge(parts))) == repr(whole)
    for arm, state in merge(parts).arms.items():
        assert (state.total == monitor_of(items).arms[arm].total).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_windows_are_what_a_recount_gives(batches: list[int], seed: int) -> None:
    layout = Layout(PROFILE)
    windows = [rows_window(12, 4), rows_window(40, 4), rows_window(30, 10)]
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((sum(batches), 3)).astype("f4")
    store, place = PaneStore(layout, windows), 0
    for size in batches:
        store.add([rows[place : place + size]], size, 0)
        place += size
    shuffled = PaneStore(layout, windows)
    mixed = np.concatenate([rng.permutation(rows[i : i + 4]) for i in range(0, len(rows), 4)])
    shuffled.add([mixed], len(mixed), 0)
    for window in windows:
        found = store.state().window(window)
        end = len(rows) // window.pane * window.pane
        expected = np.zeros(layout.cells, "i4")
        layout.count([rows[max(0, end - window.length) : end]], expected)
        assert (found.cells == expected).all()
        if window.pane == 4:
            assert (shuffled.state().window(window).cells == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_marks_of_rows_move_with_their_windows(batches: list[int], seed: int) -> None:
    layout = Layout(PROFILE)
    windows = [rows_window(12, 4), rows_window(40, 4), rows_window(30, 10)]
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((sum(batches), 3)).astype("f4")
    marked = rng.random((len(rows), 2)) < 0.3
    store, place = PaneStore(layout, windows, marks=2), 0
    for size in batches:
        own = slice(place, place + size)
        store.add([rows[own]], size, 0, marks=marked[own])
        place += size
    plain = PaneStore(layout, windows)
    plain.add([rows], len(rows), 0)
    assert (store.state().total[layout.cells :] == marked.sum(axis=0)).all()
    for window in windows:
        end = len(rows) // window.pane * window.pane
        found = store.state().window(window).cells
        assert (found[: layout.cells] == plain.state().window(window).cells).all()
        assert (found[layout.cells :] == marked[max(0, end - window.length) : end].sum(axis=0)).all()


signs = st.sampled_from(["over", "quiet", "neither"])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), signs), max_size=60),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 4),
)
def test_alarms_are_those_of_the_whole_history(
    looks: list[tuple[str, str]], k: int, more: int, clear_looks: int
) -> None:
    rules = AlarmRules(k=k, m=k + more, clear_looks=clear_looks)
    book, twin = AlarmBook(1, ["a", "b"], rules), naive.Alarms(k, k + more, clear_looks)
    for window, sign in looks:
        changes = book.look(window, np.array([sign == "over"]), np.array([sign == "quiet"]))
        found = "".join("raised" if change.raised else "cleared" for change in changes)
        assert found == twin.look(window, sign == "over", sign == "quiet")
        assert book.active.tolist() == [twin.active]
