"""Which columns have series, what they say, and how many there can be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.tap import Item
from monitor.types import AlarmRules, Settings, WindowFigures, rows_window
from server.monitoring.gauges import Watched, drift_families
from server.telemetry.exposition import render
from server.telemetry.snapshot import Points

WIDTH = 12


@pytest.fixture(scope="module")
def figures() -> tuple[WindowFigures, ...]:
    """Columns 3 and 7 are shifted, 7 more; two arms."""
    stream = np.random.default_rng(1)
    reference = stream.standard_normal((5000, WIDTH)).astype("f4")
    settings = Settings(windows=(rows_window(200), rows_window(1000)), rules=AlarmRules(k=1, m=1))
    monitor = Monitor("m", "1", ReferenceProfile.from_arrays({"x": reference}), settings)
    for arm, shift in (("stable", 1.0), ("canary", 0.0)):
        rows = stream.standard_normal((1000, WIDTH)).astype("f4")
        rows[:, 3] += shift / 2
        rows[:, 7] += shift
        rows[:500, 0] = np.nan
        monitor.ingest(monitor.keys, [Item(1, arm, 1000, 0, [[rows.tobytes()]])])
    return monitor.figures()


def points(figures: tuple[WindowFigures, ...], name: str, top: int) -> Points:
    families = drift_families([Watched("m", "1", figures, top)])
    (family,) = (family for family in families if family.name == name)
    return family.points


def test_columns_in_alarm_come_first_and_the_rest_is_bounded(figures: tuple[WindowFigures, ...]) -> None:
    shown = {
        labels[3]: value
        for labels, value in points(figures, "tidegate_drift_alarm", 3).items()
        if labels[2] == "stable"
    }
    assert shown == {"x[7]": 1, "x[3]": 1, "x[0]": 1}
    for top in (1, 5, 100):
        psi = points(figures, "tidegate_drift_psi", top)
        assert len(psi) == 2 * 2 * min(top, WIDTH)
        assert set(next(iter(psi))[:2]) == {"m", "1"}


def test_the_largest_is_over_all_columns_shown_or_not(figures: tuple[WindowFigures, ...]) -> None:
    everything = points(figures, "tidegate_drift_psi", WIDTH)
    largest = points(figures, "tidegate_drift_psi_max", 1)
    assert set(largest) == {
        ("m", "1", arm, window) for arm in ("stable", "canary") for window in ("200rows", "1000rows")
    }
    for (model, version, arm, window), value in largest.items():
        assert value == max(v for k, v in everything.items() if k[2] == arm and k[4] == window)
        assert (model, version) == ("m", "1")


def test_shares_are_those_of_the_window(figures: tuple[WindowFigures, ...]) -> None:
    missing = points(figures, "tidegate_drift_missing_ratio", WIDTH)
    assert missing["m", "1", "canary", "x[0]", "1000rows"] == 0.5
    assert missing["m", "1", "canary", "x[1]", "1000rows"] == 0


def test_what_is_undefined_has_no_sample(figures: tuple[WindowFigures, ...]) -> None:
    nothing = np.full(WIDTH, np.nan)
    blank = (replace(figures[0], ks_low=nothing, psi=nothing),)
    assert points(blank, "tidegate_drift_ks", WIDTH) == {}
    assert points(blank, "tidegate_drift_psi_max", WIDTH) == {}
    assert points(blank, "tidegate_drift_ks_pvalue", WIDTH) != {}


def test_families_are_the_same_with_nothing_watched(figures: tuple[WindowFigures, ...]) -> None:
    names = [family.name for family in drift_families([])]
    assert names == [family.name for family in drift_families([Watched("m", "1", figures, 5)])]
    assert b'tidegate_drift_psi_max{model="m"' in render(
        list(drift_families([Watched("m", "1", figures, 5)])), openmetrics=False
    )
