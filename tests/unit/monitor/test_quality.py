"""Quality checks: their p bounds the exact one, and they obey the floor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from monitor.drift.base import Pair
from monitor.drift.quality import Glance, QualityJudgement, checks_of, judge_quality
from monitor.layout import Layout
from monitor.profile import ReferenceProfile
from monitor.types import AlarmRules, Array, Column


def judged(reference: Array, window: Array, tolerated: float = 0.0, marked: int = 0) -> QualityJudgement:
    """Checks of one column: missing, below, above, and a rule that ``marked`` rows violate."""
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}))
    checks = checks_of(layout, [(0, "rule max", tolerated)])
    assert checks.names == ("missing", "below", "above", "rule max")
    pair = Pair(layout, layout.reference, layout.count_table({"x": window}))
    marks = np.array([marked])
    return judge_quality(checks, pair, marks, AlarmRules(), math.log(1e-6), np.ones(1))


def with_missing(rows: int, missing: int) -> Array:
    values = np.linspace(0, 1, rows)
    values[rng_places(rows, missing)] = np.nan
    return values


def rng_places(rows: int, count: int) -> Array:
    return np.random.default_rng(rows).permutation(rows - 2)[:count] + 1


@pytest.mark.parametrize(
    ("m", "k0", "n", "k"), [(1000, 0, 200, 3), (1000, 0, 200, 20), (5000, 50, 300, 12), (500, 100, 500, 180)]
)
def test_p_is_about_the_exact_conditional_one(m: int, k0: int, n: int, k: int) -> None:
    found = judged(with_missing(m, k0), with_missing(n, k))
    exact = stats.hypergeom(m + n, k0 + k, n).sf(k - 1)
    own = math.exp(found.log_p[0])
    # A bound, but for the steps of the exact distribution, and not a loose one.
    assert 0.9 * exact <= own <= 60 * exact


def test_a_smaller_share_than_the_reference_s_is_no_evidence() -> None:
    found = judged(with_missing(1000, 500), with_missing(300, 10))
    assert found.log_p[0] == 0
    assert found.quiet[0]
    assert not found.over[0]


def test_the_floor_keeps_small_differences_quiet() -> None:
    few = judged(with_missing(50_000, 0), with_missing(20_000, 150))
    assert (few.over[0], few.quiet[0], few.log_p[0]) == (False, True, 0)
    between = judged(with_missing(50_000, 0), with_missing(20_000, 190))
    assert (between.real[0], between.over[0], between.quiet[0]) == (True, False, False)
    assert judged(with_missing(50_000, 0), with_missing(20_000, 250)).over[0]


def test_no_rows_are_no_evidence() -> None:
    found = judged(np.linspace(0, 1, 100), np.empty(0))
    assert found.log_p.tolist() == [0, 0, 0, 0]
    assert found.quiet.all()


def test_a_reference_without_rows_is_no_evidence() -> None:
    """Another arm's window may hold nothing yet: even where all rows are missing, no share exceeds its share."""
    columns = [np.full(100, np.nan), np.full(100, 3.0), np.arange(100.0) % 5, np.linspace(0, 1, 100)]
    layout = Layout(ReferenceProfile.from_arrays({"x": np.stack(columns, axis=1)}))
    checks = checks_of(layout, [])
    empty = np.zeros(layout.cells, "i8")
    for reference, window in ((empty, layout.reference), (layout.reference, empty), (empty, empty)):
        found = judge_quality(
            checks, Pair(layout, reference, window), np.empty(0), AlarmRules(), math.log(1e-6), np.ones(4)
        )
        assert not found.log_p.any()
        assert not found.over.any()


@pytest.mark.parametrize("tolerated", [0.01, 0.2])
def test_a_tolerated_share_is_tested_by_a_bound_on_the_binomial(tolerated: float) -> None:
    for k in (int(tolerated * 1000), int(tolerated * 1000) + 80):
        found = judged(np.linspace(0, 1, 100), np.linspace(0, 1, 1000), tolerated, k)
        assert math.exp(found.log_p[3]) >= stats.binom(1000, tolerated).sf(k - 1)
    assert found.over[3]
    assert found.allowed[3] == tolerated


def test_a_rule_that_tolerates_nothing_is_over_at_one_row() -> None:
    assert judged(np.linspace(0, 1, 100), np.linspace(0, 1, 1000), 0.0, 1).over[3]
    assert not judged(np.linspace(0, 1, 100), np.linspace(0, 1, 1000), 0.0, 0).over[3]


def test_a_clean_window_is_one_in_which_all_is_quiet_and_nothing_over() -> None:
    rng = np.random.default_rng(5)
    reference = rng.standard_normal((4000, 3))
    reference[rng.random((4000, 3)) < 0.02] = np.nan
    layout = Layout(ReferenceProfile.from_arrays({"x": reference}))
    checks, rules = checks_of(layout, []), AlarmRules()
    seen = set()
    for share in np.linspace(0.0, 0.06, 40).tolist():
        window = rng.standard_normal((300, 3)) * (1.0 + share * rng.integers(2))
        window[rng.random((300, 3)) < share] = np.nan
        counts = np.zeros(layout.cells, "i4")
        layout.count([window], counts)
        pair = Pair(layout, layout.reference, counts)
        found = judge_quality(checks, pair, np.zeros(0), rules, math.log(1e-6), np.ones(3))
        clean = Glance(layout, checks, rules).is_clean(pair.expected, pair.found.running, pair.rows[1])
        assert clean == bool((found.share - found.allowed < rules.clear_ratio * rules.min_rate).all())
        assert not clean or (found.quiet.all() and not found.over.any())
        seen.add(clean)
    assert seen == {True, False}


def is_clean(pair: Pair, *rules: tuple[int, str, float]) -> bool:
    glance = Glance(pair.layout, checks_of(pair.layout, rules), AlarmRules())
    return glance.is_clean(pair.expected, pair.found.running, pair.rows[1])


def test_what_cannot_be_told_at_a_glance_is_not_clean() -> None:
    numbers = np.arange(100.0)
    layout = Layout(ReferenceProfile.from_arrays({"x": numbers}))
    own, other = (Pair(layout, reference, layout.reference) for reference in (layout.reference, layout.reference + 0))
    assert is_clean(own)
    assert not is_clean(other)
    assert not is_clean(own, (0, "rule max", 0.0))
    column = Column("x", "x", kind="categorical")
    layout = Layout(ReferenceProfile.from_table({"x": numbers % 3}, (column,)))
    discrete = Pair(layout, layout.reference, layout.reference)
    assert not is_clean(discrete)
