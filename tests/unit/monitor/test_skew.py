"""Training-serving skew: exact on rows, bracketed on counts, and never raising for a column that is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from monitor.errors import ProfileError, ProfileMismatch, StateError
from monitor.profile import ReferenceProfile
from monitor.skew import ColumnSkew, SkewReport, skew
from monitor.tap import Item
from monitor.types import Settings, rows_window
from monitor.watch import Monitor

SETTINGS = Settings(windows=(rows_window(1000),))


def table(seed: int, rows: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal(rows) + shift,
        "level": rng.integers(0, 50, rows),
        "word": rng.choice(np.array([b"a", b"b", b"c"], object), rows),
    }


TRAINING = table(0, 5000)
PROFILE = ReferenceProfile.from_arrays(TRAINING, knots=None)


def of(report: SkewReport, column: str) -> ColumnSkew:
    return next(found for found in report.columns if found.column == column)


def test_differences_of_a_table_are_exact() -> None:
    served = table(1, 800, shift=0.5)
    served["x"][:80] = np.nan
    served["word"][:8] = b"new"
    served["word"][served["word"] == b"c"] = b""
    report = skew(PROFILE, served)
    assert report.exact
    assert report.columns[0].column == "word"
    found, present = of(report, "x"), served["x"][80:]
    exact = stats.ks_2samp(present, TRAINING["x"])
    assert found.ks == pytest.approx(exact.statistic, abs=1e-12)
    assert (found.missing_training, found.missing_served) == (0.0, 0.1)
    assert (found.min_training, found.max_training) == (TRAINING["x"].min(), TRAINING["x"].max())
    assert (found.min_served, found.max_served) == (present.min(), present.max())
    assert found.mean_shift_sd == pytest.approx((present.mean() - TRAINING["x"].mean()) / TRAINING["x"].std())
    outside = (present < TRAINING["x"].min()).sum() + (present > TRAINING["x"].max()).sum()
    assert found.outside == outside / 800
    words = of(report, "word")
    assert (words.new_categories, words.absent_categories, words.unseen) == (("new",), ("c",), 0.01)
    assert words.missing_served == np.mean([word == b"" for word in served["word"]])
    assert of(report, "level").problem == ""
    assert of(report, "level").psi < 0.05
    json.dumps(report.to_dict())


def test_columns_that_are_absent_or_of_another_type_are_reported_first() -> None:
    served = {"x": np.array(["a", "b"]), "level": np.array([0.5, 1.0])}
    report = skew(PROFILE, served)
    problems = {found.column: found.problem for found in report.columns}
    assert problems["x"] == "column 'x': wanted FP64, got strings"
    assert problems["level"] == "column 'level': wanted INT64, got FP64 with fractions"
    assert "no column 'word'" in problems["word"]
    assert math.isnan(of(report, "x").psi)
    assert of(report, "level").served_type == "FP64"
    assert skew(PROFILE, {"word": np.array([1, 2])}).columns[0].problem
    whole = {**table(1, 100), "level": np.arange(100.0)}
    assert of(skew(PROFILE, whole), "level").problem == ""
    with pytest.raises(ProfileError, match="no rows"):
        skew(PROFILE, {"x": np.empty(0)})


def watched(rows: dict[str, np.ndarray]) -> Monitor:
    monitor = Monitor("m", "1", PROFILE, SETTINGS)
    data = [[rows["x"].tobytes()], [rows["level"].astype("i8").tobytes()], [rows["word"].tolist()]]
    monitor.ingest(monitor.keys, [Item(0, "stable", len(rows["x"]), 0, data)])
    return monitor


def test_counts_of_a_monitor_give_the_same_statistics() -> None:
    served = table(2, 1500, shift=0.3)
    state = watched(served).state()
    whole, exact = skew(PROFILE, state), skew(PROFILE, served)
    assert not whole.exact
    for name in ("x", "level", "word"):
        one, other = of(whole, name), of(exact, name)
        assert (one.psi, one.missing_served, one.outside, one.unseen) == (
            other.psi,
            other.missing_served,
            other.outside,
            other.unseen,
        )
        assert one.served_rows == 1500
    assert of(whole, "x").mean_shift_sd == pytest.approx(of(exact, "x").mean_shift_sd, abs=0.02)
    assert of(whole, "x").ks == of(exact, "x").ks
    assert of(whole, "level").min_served == of(exact, "level").min_served == 0
    assert of(whole, "x").max_served >= of(exact, "x").max_served
    assert of(skew(PROFILE, state, window=SETTINGS.windows[0]), "x").served_rows == 1000


def test_training_rows_have_no_skew_against_themselves() -> None:
    for report in (skew(PROFILE, TRAINING), skew(PROFILE, watched(TRAINING).state())):
        for found in report.columns:
            assert found.psi == 0
            assert abs(found.mean_shift_sd) < 1e-12 or math.isnan(found.mean_shift_sd)
            assert found.ks == 0 or math.isnan(found.ks)


def test_a_state_of_another_profile_or_arm_is_refused() -> None:
    state = watched(TRAINING).state()
    with pytest.raises(ProfileMismatch, match="the state is of profile"):
        skew(ReferenceProfile.from_arrays(table(9, 100)), state)
    with pytest.raises(StateError, match="no row of arm 'canary'"):
        skew(PROFILE, state, arm="canary")
    with pytest.raises(StateError, match="no panes for the window 5rows"):
        skew(PROFILE, state, window=rows_window(5))
