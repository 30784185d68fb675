"""Every kernel against its naive twin, and against scipy where that knows the statistic."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from monitor.calibration import log_tail_chi_square
from monitor.drift.base import Pair
from monitor.drift.chisquare import ChiSquare
from monitor.drift.js import JensenShannon
from monitor.drift.ks import KolmogorovSmirnov
from monitor.drift.linfinity import LInfinity
from monitor.drift.psi import Psi
from monitor.drift.rates import rates
from monitor.drift.wasserstein import Wasserstein
from monitor.kernels._jit import compile_all
from monitor.kernels.codes import find_cells
from monitor.kernels.distances import add_chi_square, chi_square
from monitor.kernels.ks import ks_interval
from monitor.kernels.measures import fold, ks_distance, measure, tally
from monitor.kernels.shares import any_exceeds
from monitor.kernels.tails import judge_columns, kolmogorov_log_tail
from monitor.kernels.windows import close_pane, enter, run_columns, span
from monitor.layout import Layout, running_of
from monitor.profile import ReferenceProfile
from monitor.types import counts_of
from tests.reference import naive_monitor as naive

#: NUMBA_DISABLE_JIT, to see what tests cover: a kernel is plain Python then, and warns of overflow that it deals with.
INTERPRETED = not hasattr(fold, "compile")
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")] if INTERPRETED else []

DENORMAL = np.float32(1e-42)
ODD: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda r, n: r.standard_normal(n),
    "log-normal": lambda r, n: np.exp(r.standard_normal(n)),
    "cauchy": lambda r, n: r.standard_cauchy(n),
    "ties": lambda r, n: np.round(r.standard_normal(n) * 3),
    "five levels": lambda r, n: r.integers(0, 5, n).astype(float),
    "constant": lambda r, n: np.full(n, 3.0),
    "half missing": lambda r, n: np.where(r.random(n) < 0.5, np.nan, r.standard_normal(n)),
    "all missing": lambda r, n: np.full(n, np.nan),
    "infinite": lambda r, n: r.choice([-np.inf, -1.0, 0.0, 2.0, np.inf], n),
    "one infinity": lambda r, n: np.where(np.arange(n) == 5, np.inf, r.standard_normal(n)),
    "subnormal": lambda r, n: r.integers(-40, 40, n) * DENORMAL,
    "signed zeros": lambda r, n: r.choice([-0.0, 0.0, 1.0, -1.0], n),
    "large offset": lambda r, n: 1e7 + r.integers(0, 60, n) * 0.5,
    "huge range": lambda r, n: r.choice([-3e38, 3e38, 1e-30], n) * r.random(n),
    "atom": lambda r, n: np.where(r.random(n) < 0.6, 0.0, r.standard_normal(n)),
    "rare binary": lambda r, n: (r.random(n) < 0.002).astype(float),
}


def samples(name: str, dtype: str, n: int = 700, m: int = 3000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(name))
    reference, window = ODD[name](rng, m).astype(dtype), ODD[name](rng, n).astype(dtype)
    window[: n // 10] += np.dtype(dtype).type(0.5)
    return reference, window


def pair(reference: np.ndarray, window: np.ndarray, knots: int | None) -> Pair:
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}, knots=knots))
    counts = np.zeros(layout.cells, "i4")
    layout.count([window.reshape(-1, 1)], counts)
    return Pair(layout, layout.reference, counts)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", ODD)
def test_cells_are_those_of_the_naive_search(name: str, dtype: str) -> None:
    reference, window = samples(name, dtype, 300, 900)
    for knots in (None, 64):
        found = pair(reference, window, knots)
        own = found.layout.columns[0].knots.astype(dtype).tolist()
        assert found.window.tolist() == naive.cell_counts(window.tolist(), own)
        assert found.reference.tolist() == naive.cell_counts(reference.tolist(), own)


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 1023, 1025, 2048, 2049, 9000])
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 33])
def test_cells_are_the_same_however_rows_and_columns_are_divided(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows + columns)
    kinds = [make for name, make in ODD.items() if name != "all missing"]
    window = np.stack([kinds[i % len(kinds)](rng, rows) for i in range(columns)], axis=1).astype("f4")
    reference = np.stack([kinds[i % len(kinds)](rng, 800) for i in range(columns)], axis=1).astype("f4")
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}, knots=64))
    counts = np.zeros(layout.cells, "i4")
    layout.count([window], counts)
    assert counts.tolist() == layout.count_table(dict(zip(layout.names, window.T, strict=True))).tolist()


@pytest.mark.parametrize(
    "places",
    [
        list(range(5, 23)),
        list(range(5, 59, 3)),
        list(range(22, 4, -1)),
        [5, 7, 6, *range(8, 23)],  # the first and the last of sixteen lie as far apart as neighbours would
    ],
    ids=["neighbours", "scattered", "backwards", "two exchanged"],
)
def test_some_columns_of_wide_rows_are_counted_in_any_order(places: list[int]) -> None:
    rng = np.random.default_rng(1)
    reference, window = rng.standard_normal((500, 60)).astype("f4"), rng.standard_normal((5000, 60)).astype("f4")
    window += np.arange(60, dtype="f4") / 60
    whole = ReferenceProfile.from_arrays({"x": reference}, knots=64)
    by_index = {found.column.index: found for found in whole.columns}
    layout = Layout(ReferenceProfile(tuple([by_index[place] for place in places])))
    assert layout.tensors[0].columns == places
    counts = np.zeros(layout.cells, "i4")
    layout.count([window], counts)
    assert counts.tolist() == layout.count_table({f"x[{i}]": window[:, i] for i in places}).tolist()


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("name", [name for name in ODD if name != "all missing"])
def test_ks_with_all_knots_is_scipys(name: str, dtype: str) -> None:
    reference, window = samples(name, dtype)
    low, high = KolmogorovSmirnov().interval(pair(reference, window, None))
    # In double: from SciPy 1.18 on, the distance is in the precision of the values.
    a, b = (values[~np.isnan(values)].astype("f8") for values in (reference, window))
    exact = stats.ks_2samp(a, b, method="asymp").statistic
    assert low[0] == pytest.approx(exact, abs=1e-12)
    assert high[0] == low[0]
    assert low[0] == pytest.approx(naive.ks_distance(reference, window), abs=1e-12)


@pytest.mark.parametrize("name", [name for name in ODD if name != "all missing"])
def test_ks_with_few_knots_is_bracketed(name: str) -> None:
    reference, window = samples(name, "f4")
    found = pair(reference, window, 32)
    low, high = KolmogorovSmirnov().interval(found)
    exact = naive.ks_distance(reference, window)
    assert low[0] <= exact + 1e-15
    assert exact <= high[0] + 1e-15
    assert high[0] - low[0] <= found.layout.columns[0].ks_resolution + 1e-15


@pytest.mark.parametrize("seed", range(20))
def test_ks_interval_is_the_naive_one_for_any_counts(seed: int) -> None:
    """Also for a reference that is not the profile's own, which may lie outside the knots."""
    rng = np.random.default_rng(seed)
    layout = Layout(ReferenceProfile.from_arrays({"x": rng.standard_normal((200, 3))}, knots=8))
    reference, window = (rng.integers(0, 30, layout.cells) * (rng.random(layout.cells) < 0.4) for _ in range(2))
    low, high = KolmogorovSmirnov().interval(Pair(layout, reference, window))
    for i, (start, stop) in enumerate(pairwise(layout.start.tolist())):
        expected = naive.ks_interval(reference[start:stop].tolist(), window[start:stop].tolist())
        assert (low[i], high[i]) == pytest.approx([float(bound) for bound in expected], abs=1e-14)


@pytest.mark.parametrize("name", ODD)
def test_psi_is_that_of_the_stated_bins(name: str) -> None:
    reference, window = samples(name, "f4")
    found = pair(reference, window, 256)
    column = found.layout.columns[0]
    assert Psi().score(found)[0] == pytest.approx(
        naive.psi(*[side.tolist() for side in found.bins]), abs=1e-12, nan_ok=True
    )
    if column.ordered:
        edges = [float(name.removeprefix("<= ")) for name in column.bins[:1]]
        places = np.flatnonzero(np.diff(column.bin_of[:-1]))  # the last cell of every bin but the last
        exact = column.knots[(places - 1) // 2].tolist()
        assert exact[0] == pytest.approx(edges[0], rel=1e-4)
        for side, values in zip(found.bins, (reference, window), strict=True):
            counts = np.bincount([naive.bin_of(v, exact) for v in values.tolist()], minlength=len(column.bins))
            assert side.tolist() == counts.tolist()


def test_psi_without_missing_values_leaves_them_out() -> None:
    rng = np.random.default_rng(0)
    reference, window = rng.standard_normal(5000), rng.standard_normal(1000)
    before = pair(reference, window, None)
    window = np.concatenate([window, np.full(1000, np.nan)])
    after = pair(reference, window, None)
    assert Psi(present_only=True).score(after)[0] == Psi(present_only=True).score(before)[0]
    assert KolmogorovSmirnov().score(after)[0] == KolmogorovSmirnov().score(before)[0]
    assert Psi().score(after)[0] > 1
    assert rates(after).missing[0] == 0.5
    assert rates(after).missing_reference[0] == 0


def test_level_statistics_are_scipys() -> None:
    rng = np.random.default_rng(1)
    reference, window = rng.integers(0, 40, 4000), rng.integers(0, 45, 500)
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}, kinds={"x": "categorical"}))
    counts = np.zeros(layout.cells, "i4")
    layout.count([window.reshape(-1, 1).astype("f8")], counts)
    found = Pair(layout, layout.reference, counts)
    known = np.bincount(window[window < 40], minlength=40)
    table = np.array([[*np.bincount(reference, minlength=40), 0], [*known, (window >= 40).sum()]])
    p, q = table[0] / 4000, table[1] / 500
    assert JensenShannon().score(found)[0] == pytest.approx(jensenshannon(p, q, base=2), abs=1e-12)
    assert LInfinity().score(found)[0] == pytest.approx(np.abs(p - q).max(), abs=1e-15)
    value, degrees = ChiSquare().scores(found)
    expected = stats.chi2_contingency(table, correction=False)
    assert value[0] == pytest.approx(expected.statistic, rel=1e-12)
    assert degrees[0] == expected.dof
    assert rates(found).new_category[0] == (window >= 40).mean()
    assert math.isnan(KolmogorovSmirnov().score(found)[0])


@pytest.mark.parametrize("name", ["normal", "cauchy", "ties", "infinite", "atom", "half missing", "constant"])
@pytest.mark.parametrize("knots", [None, 64])
def test_wasserstein_is_bracketed(name: str, knots: int | None) -> None:
    reference, window = samples(name, "f8", 200, 500)
    found = pair(reference, window, knots)
    low, middle, high = (values[0] for values in Wasserstein().bounds(found))
    finite = found.layout.knots[np.isfinite(found.layout.knots)]
    exact = naive.wasserstein(reference, window, finite[0], finite[-1])
    slack = 1e-9 * max(1.0, exact)
    assert low - slack <= exact <= high + slack
    assert low - slack <= middle <= high + slack


def test_wasserstein_on_shared_values_is_scipys() -> None:
    rng = np.random.default_rng(2)
    reference = rng.integers(0, 30, 3000).astype("f8")
    window = np.concatenate([[0.0, 29.0], rng.integers(5, 30, 400)])
    expected = stats.wasserstein_distance(reference, window)
    for value in Wasserstein().bounds(pair(reference, window, None)):
        assert value[0] == pytest.approx(expected, rel=1e-12)


def test_one_huge_value_moves_nothing_but_its_share() -> None:
    rng = np.random.default_rng(3)
    reference, window = rng.standard_normal(20_000).astype("f4"), rng.standard_normal(5000).astype("f4") + 0.5
    before = pair(reference, window, 1024)
    for huge in (1e30, np.inf, -np.inf):
        spoiled = window.copy()
        spoiled[0] = huge
        after = pair(reference, spoiled, 1024)
        assert abs(KolmogorovSmirnov().score(after)[0] - KolmogorovSmirnov().score(before)[0]) <= 1 / 5000 + 1e-12
        assert Psi().score(after)[0] == pytest.approx(Psi().score(before)[0], rel=0.01)
        outside = rates(after).above[0] + rates(after).below[0] - rates(before).above[0] - rates(before).below[0]
        assert outside == pytest.approx(1 / 5000)


def test_statistics_of_an_empty_window_are_undefined() -> None:
    found = pair(np.arange(100.0), np.empty(0), None)
    for statistic in (Psi(), KolmogorovSmirnov(), JensenShannon(), LInfinity(), ChiSquare(), Wasserstein()):
        assert math.isnan(statistic.score(found)[0])
    assert math.isnan(rates(found).missing[0])


def test_values_of_a_reference_without_any_are_all_outside() -> None:
    found = pair(np.full(50, np.nan), np.arange(10.0), None)
    assert rates(found).above[0] == 1
    assert found.window.tolist() == [10, 0]


def log_tail_kolmogorov(x: np.ndarray) -> np.ndarray:
    compile_all()
    out = np.empty(len(x))
    kolmogorov_log_tail(x, out)
    return out


def test_kolmogorov_tail_is_scipys() -> None:
    x = np.concatenate([np.linspace(0, 1.2, 200), np.linspace(1.2, 15, 300)])
    assert np.allclose(np.exp(log_tail_kolmogorov(x)), stats.kstwobign.sf(x), rtol=1e-10, atol=0)
    assert log_tail_kolmogorov(np.array([100.0]))[0] == pytest.approx(math.log(2) - 20_000)
    assert log_tail_kolmogorov(np.array([np.nan]))[0] == 0


def test_what_kolmogorovs_series_leaves_out_is_nothing() -> None:
    x = np.random.default_rng(5).uniform(0.031, 4.0, 20_000)
    expected = [naive.log_tail_kolmogorov(value) for value in x.tolist()]
    assert np.allclose(log_tail_kolmogorov(x), expected, rtol=1e-14, atol=0)


def test_chi_square_tail_is_scipys() -> None:
    for degrees in (0.7, 1, 2, 3, 9, 19.5, 200, 3000):
        x = np.concatenate([np.linspace(0, 3 * degrees + 20, 300), [400.0]])
        found = log_tail_chi_square(x, np.full(len(x), float(degrees)))
        expected = stats.chi2.logsf(x, degrees)
        known = np.isfinite(expected)  # scipy gives up where the tail is no double
        assert np.allclose(found[known], expected[known], rtol=1e-9, atol=1e-10), degrees
        assert (found[~known] < -700).all()
    assert log_tail_chi_square(np.array([1e6]), np.array([9.0]))[0] < -400_000
    assert log_tail_chi_square(np.array([np.nan, 5.0]), np.array([9.0, 0.0])).tolist() == [0, 0]


def test_both_tests_of_every_column() -> None:
    compile_all()
    rng = np.random.default_rng(3)
    size = 4000
    distance, index = rng.exponential(0.05, size), rng.exponential(0.02, size)
    distance[::7] = index[::11] = np.nan
    ks = [rng.choice([5.0, 30.0], size), rng.choice([-np.inf, -8.0, -2.0], size), rng.normal(-2, 2, size)]
    psi = [rng.choice([50.0, 990.0], size), rng.choice([-8.0, -2.0], size), rng.normal(-2, 2, size)]
    inflation, degrees = rng.choice([1.0, 1.7], size), rng.choice([0.0, 4.5, 9.0], size)
    critical = rng.exponential(0.1, (2, size))
    ks += [np.full(size, 0.05), np.full(size, 0.04), critical[0]]
    psi += [np.full(size, 0.02), np.full(size, 0.016), critical[1]]
    log_p, flags, told = np.empty((2, size)), np.empty((3, size), bool), np.empty((5, size), "f4")
    tables = np.stack(ks), np.stack([*psi, inflation, degrees])
    assert not judge_columns(distance, index, *tables, log_p, flags, told)
    assert log_p[0].tolist() == log_tail_kolmogorov(distance * ks[0]).tolist()
    assert log_p[1].tolist() == log_tail_chi_square(index * psi[0] / inflation, degrees).tolist()
    by_ks, by_psi = log_p[0] < ks[1], log_p[1] < psi[1]
    quiet = (log_p[0] > ks[2]) | (distance < 0.04), (log_p[1] > psi[2]) | (index < 0.016)
    assert flags[0].tolist() == (by_ks | by_psi).tolist()
    assert flags[1].tolist() == ((by_ks & (distance >= 0.05)) | (by_psi & (index >= 0.02))).tolist()
    assert flags[2].tolist() == (quiet[0] & quiet[1]).tolist()
    assert all(0 < found.sum() < size for found in flags)
    wanted = [index, critical[1], distance, critical[0], log_p.min(axis=0) / math.log(10.0)]
    assert np.array_equal(told, np.array(wanted, "f4"), equal_nan=True)
    for over, quiet in np.unique(flags[1:], axis=1).T.tolist():  # one column of each kind, and those before it calm
        like, calm = (int(((flags[1] == kind[0]) & (flags[2] == kind[1])).argmax()) for kind in ((over, quiet), (0, 1)))
        own = [calm, calm, like]
        few = [np.ascontiguousarray(table[:, own]) for table in tables]
        out = np.empty((2, 3)), np.empty((3, 3), bool), np.empty((5, 3), "f4")
        assert judge_columns(distance[own], index[own], few[0], few[1], *out) == (quiet and not over)


@pytest.mark.parametrize("dtype", ["i8", "i4", "u2"])
def test_fold(dtype: str) -> None:
    """Two columns; the second's two runs are of one bin."""
    compile_all()
    running, bins = np.array([3, 7, 12, 6, 20, 65_000], dtype), np.array([1, 0, 2, 3, 2], "i4")
    out = np.full(4, 99, "i8")
    fold(running, np.array([0, 2, 3, 4, 5]), bins, np.array([0, 2, 5]), out)
    assert out.tolist() == [9, 3, 6 + 64_980, 14]


@pytest.mark.parametrize("dtype", ["i8", "i4", "u2"])
def test_what_is_told_of_a_sample(dtype: str) -> None:
    """Two columns, of three and of two cells: the bins, the rows and the missing ones of each."""
    compile_all()
    running, bins = np.array([3, 7, 12, 6, 60_006], dtype), np.full(3, 99, "i8")
    rows, missing = np.full((2, 2), 99, "i8")
    places = np.array([0, 2, 4]), np.array([1, 0, 2], "i4"), np.array([0, 2, 3])
    tally(running, *places, np.array([2, 4]), bins, rows, missing)
    assert bins.tolist() == [9, 3, 60_006]
    assert rows.tolist() == [12, 60_006]
    assert missing.tolist() == [5, 60_000]


@pytest.mark.parametrize("dtype", ["i8", "i4", "u2"])
@pytest.mark.parametrize("reference", ["i8", "i4"])
def test_a_look_measures_what_each_kernel_does(reference: str, dtype: str) -> None:
    """Columns of every kind of values, one of which is discrete, and one that the window lacks."""
    rng = np.random.default_rng(9)
    before, after = (np.stack([make(rng, size).astype("f4") for make in ODD.values()], axis=1) for size in (900, 300))
    place = list(ODD).index("five levels")
    layout = Layout(ReferenceProfile.from_arrays({"x": before}, kinds={f"x[{place}]": "categorical"}))
    after[:, 0] = np.nan
    counts = np.zeros(layout.cells, "i4")
    layout.count([after], counts)
    found, bins = Pair(layout, layout.reference, counts), layout.bins
    distances, sizes = np.full((2, len(ODD)), 99.0), np.full((3, len(ODD)), 99)
    places = layout.start, layout.discrete, bins.last, bins.bin_of, bins.start, layout.bin_start
    expected = found.expected.running.astype(reference), found.expected.bins
    arguments = *places, distances, sizes, *expected, found.found.running.astype(dtype)
    assert not measure(*arguments)
    assert measure(*arguments)
    for which in np.ndindex(*sizes.shape):
        sizes[which] += 1
        assert not measure(*arguments)
        assert measure(*arguments)
    psi = Psi().scores(found)
    assert np.array_equal(distances, [KolmogorovSmirnov().score(found), psi.value], equal_nan=True)
    assert sizes.tolist() == [found.rows[1].tolist(), found.missing[1].tolist(), psi.occupied.tolist()]
    assert np.flatnonzero(np.isnan(distances[0])).tolist() == [0, place, list(ODD).index("all missing")]
    for f in range(1, len(ODD)):
        own = slice(layout.bin_start[f], layout.bin_start[f + 1])
        assert distances[1, f] == pytest.approx(naive.psi(*[side[own].tolist() for side in found.bins]), abs=1e-12)


@pytest.mark.parametrize("dtype", ["i8", "i4", "u2"])
def test_is_any_share_over_what_is_allowed(dtype: str) -> None:
    compile_all()
    running, rows, columns = np.array([5, 5, 15], dtype), np.array([100, 0]), np.array([0, 1, 0])
    at, before, allowed = np.array([0, 1, 2]), np.array([-1, 0, 1]), np.array([0.0, 0.0, 0.06])
    found = running, rows
    assert not any_exceeds(at, before, columns, allowed, 0.0501, *found)
    assert any_exceeds(at, before, columns, allowed, 0.05, *found)  # the first, just so
    assert not any_exceeds(at[1:], before[1:], columns[1:], allowed[1:], 0.0401, *found)
    assert any_exceeds(at[1:], before[1:], columns[1:], allowed[1:], 0.0399, *found)  # 10 of 100, less 0.06
    assert not any_exceeds(at[:0], before, columns, allowed, -1.0, *found)
    assert any_exceeds(at[1:2], before[1:], columns[1:], allowed, 0.0, *found)  # without rows: a share of 0


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
@pytest.mark.parametrize("reference", ["i4", "i8"])
@pytest.mark.parametrize("cells", [2, 3, 4, 5, 6, 17, 64, 2051])
def test_the_distance_of_looks_is_the_interval_s_lower_end(cells: int, reference: str, dtype: str) -> None:
    """Also where products of both sizes are beyond 32 bits."""
    compile_all()
    rng = np.random.default_rng(cells)
    start = np.arange(4) * cells
    products = []
    for _ in range(20):
        counts = [rng.poisson(rng.choice([0.01, 1.0, most / cells], 3 * cells)) for most in (1e6, 4e4)]
        counts[int(rng.integers(2))][cells : 2 * cells - 1] = 0
        running = [running_of(side, start) for side in counts]
        found, low, high = (np.full(3, -1.0) for _ in range(3))
        ks_distance(running[0].astype(reference), running[1].astype(dtype), start, found)
        ks_interval(counts[0], counts[1], start, low, high)
        assert np.array_equal(found, low, equal_nan=True)
        assert np.isnan(found[1])
        for own, first in zip(found, start[:3], strict=True):
            sides = [side[first : first + cells].tolist() for side in counts]
            products.append(sum(sides[0][:-1]) * sum(sides[1][:-1]))
            if products[-1]:
                assert own == pytest.approx(float(naive.ks_interval(*sides)[0]), abs=1e-15)
    assert min(products) < 2**31 < max(products) or cells == 2


@pytest.mark.parametrize("size", [1, 2**31 - 1, 2**31, 2**31 + 1, 2**40])
def test_distances_around_the_largest_product_of_32_bits_are_exact(size: int) -> None:
    """All of the reference lies below all of the window."""
    compile_all()
    found = np.full(1, -1.0)
    ks_distance(np.array([size, size, size]), np.array([0, 1, 1]), np.array([0, 3]), found)
    assert found[0] == 1.0
    ks_distance(np.array([0, size, size]), np.array([1, 1, 1]), np.array([0, 3]), found)
    assert found[0] == 1.0


def test_running_sums_are_of_each_column_and_counts_come_back() -> None:
    compile_all()
    rng = np.random.default_rng(2)
    start = np.array([0, 2, 9, 10, 11, 40])
    counts = rng.integers(0, 2**40, 40)
    running = running_of(counts, start)
    columns = [counts[first:last].tolist() for first, last in pairwise(start.tolist())]
    assert running.tolist() == [sum(own[: k + 1]) for own in columns for k in range(len(own))]
    assert (counts_of(running, start) == counts).all()
    few = rng.integers(0, 200, 40)
    assert (counts_of(running_of(few, start).astype("u2"), start) == few).all()


def test_rows_are_counted_by_their_cells() -> None:
    """Rows 1 to 3 of two columns, of three cells and of two; behind them is a mark."""
    compile_all()
    counts = np.array([0, 5, 0, 1, 1, 9], "i4")
    enter(np.array([[0, 1, 1, 2, 0], [1, 0, 0, 0, 1]], "u4"), 1, 4, np.array([0, 3, 5, 6]), counts)
    assert counts.tolist() == [0, 7, 1, 4, 1, 9]


@pytest.mark.parametrize(
    ("pane", "window", "most"), [("i4", "i8", 2**26), ("u2", "i4", 2**11), ("u2", "u2", 2**11 // 5)]
)
def test_a_pane_enters_all_windows_and_the_oldest_leaves_each(pane: str, window: str, most: int) -> None:
    """Columns of 1 to 31 cells, the last ones marks. The last rows of some panes come as cells, all of others."""
    compile_all()
    rng = np.random.default_rng(1)
    start = np.append(0, np.cumsum([2, 3, 4, 5, 6, 7, 31, 1, 1]))
    cells = int(start[-1])
    lengths = np.array([1, 3, 5])
    panes, sums, opened = np.zeros((5, cells), pane), np.zeros((3, cells), window), np.zeros(cells, "i4")
    past = []
    for closed in range(23):
        empty = closed % 3 == 0
        opened += rng.integers(0, most, cells, dtype="i4")
        if empty:
            opened[: start[-3]] = 0  # all but the marks
        rows = np.stack([rng.integers(0, size, 9) for size in np.diff(start)[:-2]]).astype("u4")
        found, counted = rows[: 0 if closed % 3 == 1 else None], opened.copy()
        for own, first in zip(found, start[:-1], strict=False):
            np.add.at(counted, first + own[2:7], 1)
        past.append(np.concatenate([np.cumsum(counted[first:last], dtype="i8") for first, last in pairwise(start)]))
        close_pane(opened, start, panes, lengths, sums, closed, empty, found, 2, 7)
        assert not opened.any()
        assert (panes[closed % 5] == past[-1]).all()
        for length, total in zip(lengths, sums, strict=True):
            assert total.tolist() == np.sum(past[-length:], axis=0).tolist()


def test_chi_square_of_neighbours_is_added_where_both_have_rows() -> None:
    compile_all()
    rng = np.random.default_rng(4)
    start = np.array([0, 3, 7, 9])
    total, degrees, statistic, occupied = np.ones(3), np.ones(3), np.empty(3), np.empty(3, "i8")
    expected, expected_degrees = np.ones(3), np.ones(3)
    for _ in range(5):
        before, now = rng.poisson(2.0, (2, 9))
        now[3:7] = 0
        chi_square(before, now, start, statistic, occupied)
        expected += np.where(np.isnan(statistic), 0.0, statistic)
        expected_degrees += np.where(np.isnan(statistic), 0.0, occupied - 1.0)
        add_chi_square(before, now, start, total, degrees)
    assert total.tolist() == expected.tolist()
    assert degrees.tolist() == expected_degrees.tolist()
    assert (total[1], degrees[1]) == (1.0, 1.0)
    assert total[0] > 1.0


def test_what_spans_the_panes_of_a_window() -> None:
    compile_all()
    facts = np.array([[3, 1, 50, 70, 0], [0, 2, 0, 0, 1], [4, 0, 40, 60, 2]])
    spans = np.full((3, 4), 99)

    def spanned(closed: int) -> list[list[int]]:
        span(facts, np.array([1, 2, 3]), spans, closed)
        return spans.tolist()

    assert spanned(0) == [[0, 0, 0, 0]] * 3
    assert spanned(2) == [[0, 2, 0, 0], [3, 3, 50, 70], [3, 3, 50, 70]]
    assert spanned(3) == [[4, 0, 40, 60], [4, 2, 40, 60], [7, 3, 40, 70]]
    assert spanned(4)[1] == [7, 1, 40, 70]  # the place of pane 0 holds pane 3 now


@pytest.mark.skipif(INTERPRETED, reason="plain Python keeps the GIL")
def test_kernels_of_rows_and_cells_run_without_the_gil() -> None:
    for long in (find_cells, enter, close_pane, run_columns, ks_distance, ks_interval):
        assert vars(long)["targetoptions"]["nogil"]
    for brief in (span, tally, fold, any_exceeds, judge_columns, add_chi_square):
        assert not vars(brief)["targetoptions"]["nogil"]


@pytest.mark.skipif(INTERPRETED, reason="plain Python takes any types")
def test_kernels_refuse_what_they_were_not_compiled_for() -> None:
    compile_all()
    with pytest.raises(TypeError, match="matching definition"):
        fold(np.zeros(2, "f4"), np.zeros(2, "i8"), np.zeros(2, "i4"), np.zeros(2, "i8"), np.zeros(1, "i8"))
