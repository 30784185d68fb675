"""Every statistic of a report against numpy and scipy, on real and on odd columns, from the tensor's bytes on.

The bins are worked out here from what the documentation says of them, not read from the profile.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon
from sklearn import datasets

from monitor.engine import Monitor
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState, merge
from monitor.tap import Item
from monitor.types import Alarm, AlarmRules, ColumnScore, Settings, rows_window
from tests.reference import naive_monitor as naive

Array = np.ndarray[Any, np.dtype[Any]]
ROWS, KNOWN = 700, 3000


def item(rows: Mapping[str, Array], arm: str = "stable") -> Item:
    contents = [[a.tolist()] if a.dtype == object else [a.tobytes()] for a in rows.values()]
    return Item(0, arm, len(next(iter(rows.values()))), 0, contents)


def scores(profile: ReferenceProfile, window: Mapping[str, Array]) -> dict[str, ColumnScore]:
    rows = len(next(iter(window.values())))
    monitor = Monitor("m", "1", profile, Settings(windows=(rows_window(rows, rows),)))
    monitor.ingest([("input", name) for name in window], [item(window)])
    (report,) = monitor.report().windows
    assert report.rows == rows
    return {score.column: score for score in report.scores}


# --- the stated rules, from raw values -------------------------------------------------------------------------------


def tables(reference: Array, window: Array, *, discrete: bool) -> tuple[Array, Array]:
    """(bins, levels), each (2, k): how often reference and window are in each."""
    gone = missing(reference), missing(window)
    present = reference[~gone[0]]
    values, amounts = np.unique(present, return_counts=True)
    if discrete or len(values) <= 20:
        counted = [Counter(side.tolist()) for side in (reference, window)]
        sides = [np.array([count[value] for value in values.tolist()]) for count in counted]
        new = np.array([[0], [(~gone[1]).sum() - sides[1].sum()]])
        lost = np.array([[side.sum()] for side in gone])
        known = np.stack(sides)
        frequent = amounts >= max(1, 0.005 * len(present))
        rare = known[:, ~frequent].sum(axis=1, keepdims=True)
        return np.hstack([known[:, frequent], rare, new, lost]), np.hstack([known, new, lost])
    edges = np.unique(np.quantile(present, np.arange(1, 10) / 10, method="inverted_cdf"))
    edges = edges[edges < values[-1]]
    bins = np.stack(
        [
            np.append(np.bincount(np.searchsorted(edges, side[~lost]), minlength=len(edges) + 1), lost.sum())
            for side, lost in zip((reference, window), gone, strict=True)
        ]
    )
    return bins, bins


def missing(values: Array) -> Array:
    return np.array([not value for value in values]) if values.dtype == object else np.isnan(values)


def compare(score: ColumnScore, reference: Array, window: Array, *, discrete: bool) -> None:
    """``reference`` and ``window`` as the monitor is to take them: float64, or ``bytes``."""
    bins, levels = tables(reference, window, discrete=discrete)
    psi = naive.psi(*bins.tolist())
    assert score.psi == pytest.approx(psi, abs=1e-9)
    scale = 1 / len(window) + 1 / len(reference)
    occupied = int((bins.sum(axis=0) > 0).sum())
    assert score.psi_p == pytest.approx(stats.chi2.sf(psi / scale, occupied - 1) if occupied > 1 else 1, rel=1e-6)
    p, q = levels[0] / levels[0].sum(), levels[1] / levels[1].sum()
    assert score.js == pytest.approx(jensenshannon(p, q, base=2), abs=1e-7)  # scipy's root loses half of the digits
    assert score.js**2 == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-9)
    assert score.l_infinity == pytest.approx(np.abs(p - q).max(), abs=1e-9)
    held = levels[:, levels.sum(axis=0) > 0]
    expected = stats.chi2_contingency(held, correction=False)
    assert score.chi_square == pytest.approx(expected.statistic, rel=1e-9, abs=1e-9)
    assert score.chi_square_df == expected.dof
    assert score.missing == missing(window).mean()
    assert score.missing_reference == missing(reference).mean()
    a, b = reference[~missing(reference)], window[~missing(window)]
    if discrete:
        assert math.isnan(score.ks_low)
        assert score.new_category == sum(value not in set(a.tolist()) for value in b.tolist()) / len(window)
    elif len(a) and len(b):
        numeric(score, a, b, len(window))


def numeric(score: ColumnScore, a: Array, b: Array, rows: int) -> None:
    with np.errstate(invalid="ignore"):
        exact = stats.ks_2samp(a, b, method="asymp").statistic
    assert score.ks_low == pytest.approx(exact, abs=1e-9)
    assert score.ks_high == pytest.approx(exact, abs=1e-9)
    if len(np.unique(a)) > 20:
        root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
        assert score.ks_p == pytest.approx(stats.kstwobign.sf(root * exact), rel=1e-6)
    assert score.below == pytest.approx((b < a.min()).sum() / rows, abs=1e-12)
    assert score.above == pytest.approx((b > a.max()).sum() / rows, abs=1e-12)
    finite = a[np.isfinite(a)].tolist() or [math.inf]
    low, high = min(finite), max(finite)
    if math.isfinite(high - low):
        distance = stats.wasserstein_distance(np.clip(a, low, high), np.clip(b, low, high))
        slack = 1e-9 * max(abs(distance), high - low)
        assert score.wasserstein_low - slack <= distance <= score.wasserstein_high + slack


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "wine", "digits", "iris"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_statistics_of_public_data_are_those_of_scipy(name: str, dtype: str) -> None:
    rows = np.asarray(getattr(datasets, f"load_{name}")().data, dtype)
    rng = np.random.default_rng(1)
    order = rng.permutation(len(rows))
    reference, window = rows[order[: 2 * len(rows) // 3]], rows[order[2 * len(rows) // 3 :]].copy()
    window[:, ::3] = (window[:, ::3] * 1.1 + window[:, ::3].std(axis=0) / 4).astype(dtype)
    window[rng.random(len(window)) < 0.1, 1] = np.nan
    found = scores(ReferenceProfile.from_arrays({"x": reference}, knots=None), {"x": window})
    assert len(found) == rows.shape[1]
    for place in range(rows.shape[1]):
        a, b = reference[:, place].astype("f8"), window[:, place].astype("f8")
        compare(found[f"x[{place}]"], a, b, discrete=False)


# --- odd columns -----------------------------------------------------------------------------------------------------

TEXTS = np.array([b"", b"a", "ü".encode(), "日本".encode(), b"\xff\xfe", b"\0", b"x" * 10_000, b"new"], object)
#: (rng, rows, is it the window) to a column.
ODD: dict[str, Callable[[np.random.Generator, int, bool], Array]] = {
    "constant": lambda r, n, w: np.full(n, 3.0),
    "a constant that moved": lambda r, n, w: np.full(n, 4.0 if w else 3.0),
    "one value in the reference": lambda r, n, w: r.standard_normal(n) if w else np.zeros(n),
    "no value in the reference": lambda r, n, w: r.standard_normal(n) if w else np.full(n, np.nan),
    "no value in the window": lambda r, n, w: np.full(n, np.nan) if w else r.standard_normal(n),
    "no value at all": lambda r, n, w: np.full(n, np.nan),
    "infinities": lambda r, n, w: np.where(r.random(n) < 0.1, r.choice([-np.inf, np.inf], n), r.standard_normal(n)),
    "nothing but infinities": lambda r, n, w: r.choice([-np.inf, np.inf], n),
    "signed zeros": lambda r, n, w: np.where(r.random(n) < 0.5, -0.0 if w else 0.0, r.standard_normal(n)),
    "subnormal float32": lambda r, n, w: (r.integers(-300, 300 + 50 * w, n) * np.float32(1e-44)).astype("f4"),
    "subnormal float64": lambda r, n, w: r.integers(-300, 300 + 50 * w, n) * 5e-324,
    "largest float64": lambda r, n, w: r.choice([-1.0, 1.0], n) * 1.7e308 * r.random(n),
    "float32 ties at 1e7": lambda r, n, w: (1e7 + r.random(n) * 40 + w).astype("f4"),
    "float16": lambda r, n, w: (r.standard_normal(n) * 1000 + 50 * w).astype("f2"),
    "int64 beyond 2^53": lambda r, n, w: r.integers(2**53 - 500, 2**53 + 500, n) + 100 * w,
    "int64 ends": lambda r, n, w: r.choice(
        np.array([-(2**63), 2**63 - 1, 0]), n, p=[0.2, 0.2 + 0.1 * w, 0.6 - 0.1 * w]
    ),
    "uint64 ends": lambda r, n, w: r.choice(np.array([0, 2**63, 2**64 - 1], "u8"), n),
    "uint64": lambda r, n, w: r.integers(0, 2**64, n, dtype="u8"),
    "int8": lambda r, n, w: r.integers(-128, 128, n, dtype="i1"),
    "uint8 of few values": lambda r, n, w: r.integers(0, 4 + w, n, dtype="u1"),
    "rare values": lambda r, n, w: np.where(r.random(n) < 0.01, r.integers(5, 9, n), 0).astype("i4"),
    "bool": lambda r, n, w: r.random(n) < 0.3 + 0.1 * w,
    "always false": lambda r, n, w: np.zeros(n, bool),
    "texts": lambda r, n, w: r.choice(TEXTS[: 7 + w], n),
    "empty texts": lambda r, n, w: np.full(n, b"", object),
    "many texts": lambda r, n, w: np.array([b"%d" % v for v in r.integers(0, 900 + 300 * w, n)], object),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("rows", [1, 19, ROWS])
def test_statistics_of_odd_columns_are_those_of_scipy(name: str, rows: int) -> None:
    rng = np.random.default_rng(len(name))
    reference, window = ODD[name](rng, KNOWN, False), ODD[name](rng, rows, True)
    found = scores(ReferenceProfile.from_arrays({"x": reference}, knots=None), {"x": window})["x"]
    if reference.dtype == object:
        compare(found, reference, window, discrete=True)
    else:
        compare(found, reference.astype("f8"), window.astype("f8"), discrete=reference.dtype == bool)


def test_a_text_for_every_row_is_known_by_its_name() -> None:
    """Far more than have a cell of their own: which are new is exact all the same."""
    reference = np.array([b"%d" % v for v in range(20_000)], object)
    window = np.array([b"%d" % v for v in range(19_900, 20_300)], object)
    found = scores(ReferenceProfile.from_arrays({"x": reference}), {"x": window})["x"]
    assert (found.new_category, found.missing) == (0.75, 0)
    assert found.psi > 1


def test_bfloat16_is_compared_as_it_is() -> None:
    rng = np.random.default_rng(3)
    stored = [(rng.standard_normal(n).astype("f4").view("u4") >> 16).astype("u2") for n in (KNOWN, ROWS)]
    reference, window = [(half.astype("u4") << 16).view("f4").astype("f8") for half in stored]
    profile = ReferenceProfile.from_arrays({"x": reference}, datatypes={"x": "BF16"}, knots=None)
    compare(scores(profile, {"x": stored[1]})["x"], reference, window, discrete=False)


def test_numbers_that_are_names_have_no_order() -> None:
    rng = np.random.default_rng(4)
    reference, window = rng.integers(0, 400, KNOWN), rng.integers(0, 450, ROWS)
    profile = ReferenceProfile.from_arrays({"x": reference}, kinds={"x": "categorical"}, knots=None)
    compare(scores(profile, {"x": window})["x"], reference.astype("f8"), window.astype("f8"), discrete=True)


# --- long streams ----------------------------------------------------------------------------------------------------

STREAMED = Settings(windows=(rows_window(1000), rows_window(10_000)), rules=AlarmRules(ert_rows=1_000_000, k=1, m=1))


def test_a_long_stream_over_seven_monitors_merges_to_the_same_bits_in_any_order() -> None:
    """And each of them is restored from its snapshot now and then."""
    rng = np.random.default_rng(5)
    profile = ReferenceProfile.from_arrays({"x": rng.standard_normal((20_000, 6)).astype("f4")})
    whole, parts = Monitor("m", "1", profile, STREAMED), [Monitor("m", "1", profile, STREAMED) for _ in range(7)]
    for _ in range(400):
        rows = rng.standard_normal((int(rng.integers(1, 600)), 6)).astype("f4")
        rows[rng.random(rows.shape) < 0.01] = np.nan
        own, arm = int(rng.integers(7)), str(rng.choice(["stable", "canary"]))
        for monitor in (whole, parts[own]):
            monitor.ingest([("input", "x")], [item({"x": rows}, arm)])
    total = whole.state().arms
    for _ in range(5):
        states = [parts[place].state() for place in rng.permutation(7)]
        cut = int(rng.integers(1, 6))
        again = [MonitorState.from_bytes(state.to_bytes()) for state in states]
        for merged in (merge(states), merge([merge(again[:cut]), merge(again[cut:])])):
            assert {arm: found.total.tolist() for arm, found in merged.arms.items()} == {
                arm: found.total.tolist() for arm, found in total.items()
            }
    first = repr(merge([part.state() for part in parts]).to_bytes())
    assert repr(merge([part.state() for part in reversed(parts)]).to_bytes()) == first


def stream(monitor: Monitor, rows: int, seed: int, shift: float = 0.0) -> None:
    """Independent normal rows; column 7 is moved."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, 5000):
        values = rng.standard_normal((min(5000, rows - start), 30), dtype="f4")
        values[:, 7] += np.float32(shift)
        monitor.ingest([("input", "x")], [item({"x": values})])


def watched(alarms: list[Alarm], reference: int = 50_000, seed: int = 6) -> Monitor:
    rows = np.random.default_rng(seed).standard_normal((reference, 30), dtype="f4")
    rules = AlarmRules(ert_rows=1_000_000, k=1, m=1, min_psi=0.0, min_ks=0.0)
    settings = Settings(windows=(rows_window(1000, 500), rows_window(10_000, 500)), rules=rules)
    return Monitor(
        "m", "1", ReferenceProfile.from_arrays({"x": rows}), settings, on_alarm=lambda _, a: alarms.append(a)
    )


@pytest.mark.parametrize(
    ("rows", "most"), [(300_000, 3), pytest.param(10_000_000, 18, marks=[pytest.mark.slow, pytest.mark.timeout(900)])]
)
def test_without_drift_alarms_are_as_rare_as_was_asked_for(rows: int, most: int) -> None:
    """One in a million rows is accepted, by chance at most so many (Poisson, 99 %), at persistence 1 and floor 0."""
    alarms: list[Alarm] = []
    stream(watched(alarms, 400_000), rows, 7)
    assert sum(alarm.state == "raised" for alarm in alarms) <= most


@pytest.mark.parametrize(("shift", "within"), [(0.1, 20_000), (0.25, 5000), (0.5, 2000)])
def test_a_shift_of_one_feature_in_thirty_is_found_and_named(shift: float, within: int) -> None:
    for seed in range(4):
        alarms: list[Alarm] = []
        monitor = watched(alarms, seed=seed)
        stream(monitor, 10_000, 100 + seed)
        before = len(alarms)
        stream(monitor, within, 200 + seed, shift)
        found = [alarm for alarm in alarms[before:] if alarm.state == "raised"]
        assert found
        assert found[0].column == "x[7]"
