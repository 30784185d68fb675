"""What a look's tests are held against is made once for looks of equal size, and kept only where that is little."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from monitor.calibration import Calibration
from monitor.drift.base import Pair
from monitor.drift.judge import Judgement, Known, Looker, judge
from monitor.judging import Judge
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.types import AlarmRules, Settings, WindowCounts


def judged(columns: int) -> Judgement:
    """A look at the profile's own rows."""
    values = np.random.default_rng(columns).standard_normal((50, columns))
    layout = Layout(ReferenceProfile.from_arrays({"x": values}))
    return judge(Pair(layout, layout.reference, layout.reference), AlarmRules(), -9.5, Calibration.none(layout))


@pytest.mark.parametrize("columns", [3, 300])
def test_the_same_thresholds_again(columns: int) -> None:
    one, other = judged(columns), judged(columns)
    for first, second in [(one.ks_threshold, other.ks_threshold), (one.psi_threshold, other.psi_threshold)]:
        assert (first is second) == (columns == 3)
        assert np.array_equal(first.table, second.table)
        assert np.array_equal(first.critical, second.critical)


def test_those_of_many_columns_go_with_their_look() -> None:
    held = judged(300)
    tables = [weakref.ref(held.ks_threshold.table), weakref.ref(held.psi_threshold.table)]
    del held
    assert [table() for table in tables] == [None, None]


@pytest.mark.parametrize("columns", [3, 300])
def test_what_is_known_changes_no_judgement(columns: int) -> None:
    """Looks of other levels, rows, missing rows and bins, of which many come again."""
    rng = np.random.default_rng(columns)
    layout = Layout(ReferenceProfile.from_arrays({"x": rng.standard_normal((500, columns))}))
    none, rules, known = Calibration.none(layout), AlarmRules(), Known()
    for look in range(400 if columns == 3 else 6):
        window = rng.standard_normal((int(rng.choice([0, 20, 200])), columns)) * 0.1
        window[rng.random(window.shape) < rng.choice([0.0, 0.3])] = np.nan
        counts = np.zeros(layout.cells, "i4")
        layout.count([window], counts)
        reference = layout.reference if look % 5 else layout.reference * 2
        pair, level = Pair(layout, reference, counts), float(rng.choice([-9.5, -4.0]))
        one, other = judge(pair, rules, level, none, known), judge(pair, rules, level, none)
        for name in ("ks_log_p", "psi_log_p", "real", "over", "quiet"):
            assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)
        assert np.array_equal(one.ks_threshold.table, other.ks_threshold.table)
        assert np.array_equal(one.psi_threshold.critical, other.psi_threshold.critical)


def test_known_thresholds_are_bounded() -> None:
    known, look = Known(), judged(3)
    both = look.ks_threshold, look.psi_threshold
    keys = [(float(level), b"", b"", b"") for level in range(200)]
    for key in keys:
        known.keep(key, both)
    assert known.get(keys[-1]) is both
    assert sum([known.get(key) is not None for key in keys]) <= 128
    wide = judged(300)
    known.keep((-1.0, b"", b"", b""), (wide.ks_threshold, wide.psi_threshold))
    assert known.get((-1.0, b"", b"", b"")) is None


@pytest.mark.parametrize("columns", [3, 300])
def test_looks_one_after_another_are_judged_as_each_alone(columns: int) -> None:
    """Of windows that are empty or not, as counts and as sums, against the profile and against other references."""
    rng = np.random.default_rng(columns)
    values = rng.standard_normal((500, columns))
    values[:, 1] = rng.integers(0, 4, 500)
    layout = Layout(ReferenceProfile.from_arrays({"x": values}, kinds={"x[1]": "categorical"}))
    none, rules, said = Calibration.none(layout), AlarmRules(min_rows=1), []
    looker = Looker(layout, rules, none, Known())
    for look in range(200 if columns == 3 else 6):
        window = np.tile(rng.standard_normal((int(rng.choice([0, 20, 200])), 1)), columns) * rng.choice([0.1, 1.0])
        window[rng.random(window.shape) < rng.choice([0.0, 0.3])] = np.nan
        counts = np.zeros(layout.cells, "i4")
        layout.count([window], counts)
        pair = Pair(layout, layout.reference if look % 3 else layout.reference * 2, counts)
        level = float(rng.choice([-9.5, -4.0]))
        calm = looker.look(pair.expected, pair.found.running, level)
        alone = judge(Pair(layout, pair.reference, counts), rules, level, none)
        said.append(looker.over.copy())
        assert calm == (not alone.over.any() and bool(alone.quiet.all()))
        for name in ("over", "quiet", "told"):
            assert np.array_equal(getattr(looker, name), getattr(alone, name), equal_nan=True)
        assert looker.rows.tolist() == [len(window)] * columns
    assert 0 < np.mean(said) < 1


def test_another_reference_is_held_against_and_the_first_again() -> None:
    """What is made of a reference is kept only while the same one is given."""
    rng = np.random.default_rng(4)
    layout = Layout(ReferenceProfile.from_arrays({"x": rng.standard_normal((500, 3))}))
    settings = Settings()
    near, far, window = (np.zeros(layout.cells, "i4") for _ in range(3))
    for counts, shift in ((near, 0.0), (far, 1.0), (window, 0.0)):
        layout.count([rng.standard_normal((1000, 3)) + shift], counts)
    held = WindowCounts(settings.windows[0].name, 1000, 0, 1, 2, 2, True, window.astype("i8"))
    one = Judge(layout, settings)
    for reference in (near, near, far, None, near, far):
        assert one.window_report("a", held, reference) == Judge(layout, settings).window_report("a", held, reference)
    assert one.window_report("a", held, near) != one.window_report("a", held, far)


def test_looks_go_on_in_the_history_that_is_in_force() -> None:
    """After a restart in a new one, after a restore in what was restored."""
    rng = np.random.default_rng(6)
    layout = Layout(ReferenceProfile.from_arrays({"x": rng.standard_normal((500, 3))}))
    settings = Settings()
    window = settings.windows[0].name
    one, other = Judge(layout, settings), Judge(layout, settings)

    def times(judge: Judge, *ends: int) -> list[int]:
        for end_ns in ends:
            judge.look_at_all("a", WindowCounts(window, 500, 0, 1, end_ns, 2, True, layout.reference))
        found: list[int] = judge.history_state()["a", window]["facts"][:, 0].tolist()
        return found

    assert times(one, 10, 20) == [10, 20]
    one.restart("a")
    assert times(one, 30) == [30]
    assert times(other, 1, 2, 3) == [1, 2, 3]
    one.restore_history(other.history_state())
    assert times(one, 40) == [1, 2, 3, 40]
