"""Levels, and what dependence of rows does to them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from monitor.calibration import (
    Calibration,
    Inflation,
    calibrate,
    critical_ks,
    critical_psi,
    log_level,
    log_tail_chi_square,
    looks_per_false_alarm,
)
from monitor.errors import CalibrationError, ProfileMismatch
from monitor.judging import Judge
from monitor.kernels import tails
from monitor.layout import Layout
from monitor.panes import PaneStore
from monitor.profile import ReferenceProfile
from monitor.types import HOUR_NS, Alarm, AlarmRules, Settings, WindowCounts, rows_window, time_window


def counts(rows: int, hours: float) -> WindowCounts:
    return WindowCounts("w", rows, 0, 0, int(hours * HOUR_NS), 1, True, np.zeros(1, "i8"))


def autoregressive(phi: float, rows: int, columns: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.empty((rows, columns))
    state = rng.standard_normal(columns)
    for i, noise in enumerate(rng.standard_normal((rows, columns)) * math.sqrt(1 - phi * phi)):
        state = phi * state + noise
        out[i] = state
    return out


def layout(columns: int = 4, seed: int = 9) -> Layout:
    values = np.random.default_rng(seed).standard_normal((20_000, columns))
    return Layout(ReferenceProfile.from_arrays({"x": values}))


def table(values: np.ndarray) -> dict[str, np.ndarray]:
    return {f"x[{i}]": values[:, i] for i in range(values.shape[1])}


def test_looks_in_rows_and_hours() -> None:
    by_rows, by_hours = AlarmRules(ert_rows=1_000_000), AlarmRules(ert_hours=24)
    assert looks_per_false_alarm(by_rows, rows_window(1000, 500), counts(1000, 1)) == 2000
    assert looks_per_false_alarm(by_hours, time_window(3600, 360), counts(5, 1)) == 240
    assert looks_per_false_alarm(by_hours, rows_window(1000, 500), counts(1000, 1)) == 48
    assert looks_per_false_alarm(by_rows, time_window(3600, 360), counts(50_000, 1)) == 200
    assert looks_per_false_alarm(AlarmRules(ert_rows=1), rows_window(1000), counts(1000, 1)) == 1


def test_level_divides_by_looks_columns_and_windows() -> None:
    rules = AlarmRules(ert_rows=1_000_000)
    level = log_level(rules, rows_window(1000, 500), counts(1000, 1), 30, 2)
    assert math.exp(level) == pytest.approx(1 / (2000 * 30 * 2))
    assert math.exp(log_level(AlarmRules(ert_rows=1), rows_window(1000), counts(1000, 1), 1, 1)) == pytest.approx(0.05)


def test_independent_rows_are_not_inflated() -> None:
    one = layout()
    found = calibrate(one, table(np.random.default_rng(1).standard_normal((60_000, 4))))
    assert (found.ks < 1.5).all()
    assert (found.psi < 1.5).all()
    assert (found.psi_mean < 1.2).all()
    assert found.settled.all()
    assert found.block_rows == 60_000 // 128


def test_inflation_of_an_autoregressive_stream_is_the_known_one() -> None:
    phi = 0.9
    known = 1 + 2 * sum(2 / math.pi * math.asin(phi**k) for k in range(1, 200))  # of the indicator at the median
    found = calibrate(layout(), table(autoregressive(phi, 120_000, 4, 2)))
    assert found.ks.mean() == pytest.approx(known, rel=0.2)
    assert found.settled.all()
    # Hermite polynomials are the eigenfunctions; the first has the largest weight. Deciles and blocks see a bit less.
    assert found.psi.mean() == pytest.approx((1 + phi) / (1 - phi), rel=0.15)


def test_the_largest_weight_of_independent_rows_is_not_that_of_a_random_matrix() -> None:
    one = layout(30)
    found = calibrate(one, table(np.random.default_rng(5).standard_normal((20_000, 30))))
    assert found.psi.mean() < 1.1  # the largest of nine eigenvalues estimated from 128 blocks would be over 1.4
    assert found.psi.max() < 1.5
    assert found.psi_degrees.mean() > 0.9


def test_live_dependence_is_held_against_the_mean_weight() -> None:
    one = layout()
    for found in (None, calibrate(one, table(autoregressive(0.9, 60_000, 4, 8)))):
        judge = Judge(one, Settings(), found)
        known = judge.calibration.psi_mean
        assert judge.warnings({"stable": known * 1.3}) == ()
        (warning,) = judge.warnings({"stable": known * 1.7})
        assert "NOT calibrated for arm stable" in warning


def test_dependence_longer_than_a_block_is_noticed() -> None:
    found = calibrate(layout(), table(autoregressive(0.999, 20_000, 4, 3)))
    assert not found.settled.all()
    judge = Judge(layout(), Settings(), found)
    assert any("calibrate with more traffic" in warning for warning in judge.warnings({}))


def test_too_little_traffic_is_refused() -> None:
    with pytest.raises(CalibrationError, match="at least 2048 rows in order, got 2000"):
        calibrate(layout(), table(np.zeros((2000, 4))))


def test_calibration_is_kept_and_bound_to_its_profile() -> None:
    found = calibrate(layout(), table(autoregressive(0.5, 5000, 4, 4)))
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    with pytest.raises(ProfileMismatch):
        Judge(layout(seed=10), Settings(), found)
    for wrong in ({}, {**found.to_dict(), "ks": [1.0]}, {**found.to_dict(), "psi": [0.0] * 4}):
        with pytest.raises(CalibrationError):
            Calibration.from_dict(wrong)


@pytest.mark.parametrize(("phi", "low", "high"), [(0.0, 0.85, 1.15), (0.9, 3.0, 16.0)])
def test_live_inflation(phi: float, low: float, high: float) -> None:
    one = layout()
    seen = Inflation(one)
    store = PaneStore(one, [rows_window(1000)], on_pane=lambda rows, pane: seen.add(pane))
    assert seen.estimate().tolist() == [1] * 4
    store.add([autoregressive(phi, 40_000, 4, 5)], 40_000, 0)
    estimate = seen.estimate()
    assert (estimate > low).all()
    assert (estimate < high).all()
    again = Inflation(one)
    again.restore(json.loads(json.dumps(seen.state())))
    assert again.estimate().tolist() == estimate.tolist()


def test_dependent_rows_alarm_without_calibration_and_not_with_it() -> None:
    one = layout()
    past, now = autoregressive(0.9, 120_000, 4, 6), autoregressive(0.9, 100_000, 4, 7)
    settings = Settings(rules=AlarmRules(ert_rows=1_000_000, min_psi=0, min_ks=0, k=1, m=1, clear_looks=1))
    raised = []
    for calibration in (None, calibrate(one, table(past))):
        judge = Judge(one, settings, calibration)
        alarms: list[Alarm] = []

        def look(found: WindowCounts, judge: Judge = judge, alarms: list[Alarm] = alarms) -> None:
            alarms.extend(judge.look("stable", found))

        store = PaneStore(one, settings.windows, on_look=look)
        store.add([now], len(now), 0)
        raised.append(len(alarms))
    assert raised[0] > 20
    assert raised[1] == 0


@pytest.mark.parametrize("log_p", [math.log(0.05), math.log(1e-6), -60.0])
def test_critical_values_have_the_p_that_they_are_for(log_p: float) -> None:
    n, m, one = np.array([200.0, 5000.0, 0.0]), np.array([50_000.0, 300.0, 10.0]), np.array([1.0, 2.5, 1.0])
    levels, degrees = np.full(3, log_p), np.array([9.0, 3.7, 9.0])
    ks, psi = critical_ks(levels, n, m, one), critical_psi(levels, n, m, degrees, one)
    size, of_ks = (n * m / (n + m) / one)[:2], np.empty(2)
    tails.kolmogorov_log_tail(ks[:2] * np.sqrt(size), of_ks)
    assert of_ks == pytest.approx([log_p] * 2, rel=1e-5)
    assert log_tail_chi_square(psi[:2] * size, degrees[:2]) == pytest.approx([log_p] * 2, rel=1e-6)
    assert np.isinf([ks[2], psi[2]]).all()
