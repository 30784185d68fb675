"""Checks of a window's rows: are more missing, out of range or of new categories than in the reference; does the schema
hold.

**Against the reference** (k of n rows here, k0 of m there): real when ``exp(-G / 2)`` is under the level, where G is
the likelihood ratio of one common share against two, and the share is the larger one here. That bounds the tail of the
chi-square with one degree of freedom, and is about the exact conditional probability where k0 is 0. Large when the
share exceeds the reference's by ``AlarmRules.min_rate``.

How often rows of the *same* source are new is not what the reference itself shows, which is never outside its own
range. Of m exchangeable rows and one more, the last is the largest once in m + 1 times: k0 is at least 1 for ``below``
and ``above``. The chance of a new category is about the share of rows whose category occurs once (Good 1953).

**Against a rule**: k of n rows may violate it with the tolerated share r; real by Chernoff's bound
``exp(-n KL(k/n | r))``, and at once where r is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import numpy as np

from monitor.drift.base import Pair
from monitor.drift.rates import Amounts, amounts
from monitor.kernels.shares import any_exceeds
from monitor.layout import Layout, Sample
from monitor.types import AlarmRules, Array, QualityScore, Verdict

#: Checks against the reference, by the field of ``Amounts``.
REFERENCE_CHECKS: Final = ("missing", "below", "above", "new_category")
#: A check's tests together take this share of what the drift tests may take.
_BUDGET: Final = 0.1
#: ln p is given as this at least.
_LEAST: Final = -700.0
_HYSTERESIS: Final = math.log(10.0)


@dataclass(slots=True, frozen=True, eq=False)
class Checks:
    """All quality checks of one monitor, those against the reference first. ``tolerated`` is per rule."""

    columns: tuple[str, ...]
    places: Array
    names: tuple[str, ...]
    #: Per check against the reference: row of the table (check, column) that its count is in.
    kinds: Array
    tolerated: Array
    #: Likewise: the one cell that its count is in, -1 where it is not in one cell.
    cells: Array
    #: Likewise: the cell before that one in its column, -1 where there is none.
    before: Array
    #: Likewise: what the profile's own reference leads one to expect (see ``_expected``), and its share of the rows.
    expected: Array
    allowed: Array
    #: Likewise: is the count in no one cell, as places among the checks.
    summed: Array

    def __len__(self) -> int:
        return len(self.names)

    @property
    def budget(self) -> int:
        """How many tests they count as, where each may fire by chance."""
        return max(1, round(len(self.kinds) / _BUDGET))


def checks_of(layout: Layout, rules: Sequence[tuple[int, str, float]]) -> Checks:
    """``rules``: (place of the column, name, tolerated share), in the order of the marks."""
    found = [
        (kind, place)
        for kind, name in enumerate(REFERENCE_CHECKS)
        for place in range(len(layout.columns))
        if kind == 0 or bool(layout.discrete[place]) == (name == "new_category")
    ]
    own = np.array([place for _, place in found], "i8")
    places = [*own.tolist(), *[place for place, _, _ in rules]]
    kinds = np.array([kind for kind, _ in found], "i8")
    cells = np.array([_cell(layout, kind, place) for kind, place in found], "i8")
    expected = _expected(layout, layout.profiled)[kinds, own]
    return Checks(
        tuple([layout.names[place] for place in places]),
        np.array(places, "i8"),
        (*[REFERENCE_CHECKS[kind] for kind, _ in found], *[name for _, name, _ in rules]),
        kinds,
        np.array([share for _, _, share in rules], "f8"),
        cells,
        np.where(np.isin(cells, layout.start), -1, cells - 1),
        expected,
        _ratio(expected, layout.profiled.rows[own]),
        np.flatnonzero(cells < 0),
    )


def _cell(layout: Layout, kind: int, place: int) -> int:
    """The cell that ``amounts`` reads for a check, -1 for a sum of several or none."""
    first, last = int(layout.start[place]), int(layout.start[place + 1]) - 1
    cell = {"missing": last, "below": first, "above": last - 1}.get(REFERENCE_CHECKS[kind], -1)
    return -1 if cell == first == last - 1 else cell


@dataclass(slots=True, frozen=True, eq=False)
class QualityJudgement:
    """Per check: what was counted, of how many rows, and what of it may be; see ``drift.judge.Judgement``."""

    count: Array
    rows: Array
    share: Array
    allowed: Array
    log_p: Array
    real: Array
    over: Array
    quiet: Array
    log_level: float

    def score(self, checks: Checks, which: int, *, in_alarm: bool) -> QualityScore:
        return QualityScore(
            checks.columns[which],
            checks.names[which],
            int(self.count[which]),
            int(self.rows[which]),
            float(self.share[which]),
            float(self.allowed[which]),
            math.exp(self.log_p[which]),
            bool(self.over[which]),
            in_alarm,
        )

    def verdict(self, checks: Checks, which: int) -> Verdict:
        return Verdict(
            checks.columns[which],
            bool(self.over[which]),
            bool(self.real[which]),
            bool(self.over[which] or not self.real[which]),
            bool(self.quiet[which]),
            float(self.log_p[which]) / self.log_level,
            checks.names[which],
            math.exp(self.log_level),
        )


class Glance:
    """Whether ``judge_quality`` would find all checks quiet and none over, where that can be told at a glance."""

    def __init__(self, layout: Layout, checks: Checks, rules: AlarmRules) -> None:
        margin = rules.clear_ratio * rules.min_rate
        self._any_exceeds = partial(any_exceeds, checks.cells, checks.before, checks.places, checks.allowed, margin)
        told = len(checks) == len(checks.kinds) and not len(checks.summed)
        self._profiled = layout.profiled if told else None

    def is_clean(self, expected: Sample, found: Array, rows: Array) -> bool:
        """The running sums ``found`` against a reference. ``rows``: of the window, per column."""
        return expected is self._profiled and not self._any_exceeds(found, rows)


def judge_quality(
    checks: Checks, pair: Pair, marks: Array, rules: AlarmRules, log_level: float, inflation: Array
) -> QualityJudgement:
    """``marks``: violations of each rule in the window; ``inflation``: of the columns' counts (``calibration``).

    p is 1 where a share is not over what is allowed, or exceeds the reference's by too little to keep an alarm up.
    """
    reference_rows, rows = pair.rows
    own, others = len(checks.kinds), checks.places[len(checks.kinds) :]
    at = checks.places[:own]
    count = _counts(checks, pair)
    expected, allowed = checks.expected, checks.allowed
    if pair.expected is not pair.layout.profiled:
        expected = _expected(pair.layout, pair.expected)[checks.kinds, at]
        allowed = _ratio(expected, reference_rows[at])
    n = rows[at]
    share = _ratio(count, n)
    excess = share - allowed
    small = excess < rules.clear_ratio * rules.min_rate
    log_p, quiet = np.zeros(own), small
    if np.count_nonzero(small) < own:
        large = np.flatnonzero(~small)
        m = reference_rows[at[large]]
        log_p[large] = _two_shares(count[large], n[large], expected[large], m) / inflation[at[large]]
        quiet = small | (log_p > log_level + _HYSTERESIS)
    found = _Found(count, n, share, allowed, log_p, excess >= rules.min_rate, quiet)
    if len(others):
        found = _with_rules(found, marks, rows[others], checks.tolerated, inflation[others])
    log_p = np.maximum(found.log_p, _LEAST)
    real = log_p < log_level
    return QualityJudgement(
        found.counted, found.rows, found.share, found.allowed, log_p, real, real & found.large, found.quiet, log_level
    )


class _Found(NamedTuple):
    """Per check; ``large``: over what is allowed by enough to raise an alarm."""

    counted: Array
    rows: Array
    share: Array
    allowed: Array
    log_p: Array
    large: Array
    quiet: Array


def _with_rules(found: _Found, marks: Array, rows: Array, tolerated: Array, inflation: Array) -> _Found:
    share = _ratio(marks, rows)
    over = share > tolerated
    log_p = np.zeros(len(marks))
    if over.any():
        log_p = np.where(over, -_evidence(marks, rows, tolerated) / inflation, 0.0)
    both = zip(found, _Found(marks, rows, share, tolerated, log_p, over, ~over), strict=True)
    return _Found(*[np.concatenate(pair) for pair in both])


def _counts(checks: Checks, pair: Pair) -> Array:
    """What ``amounts`` finds in the window, per check against the reference: most are read from one cell."""
    running = pair.found.running
    count = running[checks.cells].astype("i8") - np.where(checks.before < 0, 0, running[checks.before])
    summed = checks.summed
    if len(summed):
        own = checks.places[: len(checks.kinds)]
        count[summed] = _table(amounts(pair.layout, pair.found))[checks.kinds[summed], own[summed]]
    return np.asarray(count)


def _table(found: Amounts) -> Array:
    return np.stack([getattr(found, name) for name in REFERENCE_CHECKS])


def _expected(layout: Layout, reference: Sample) -> Array:
    """What as many rows as the reference has, of its own source, would show against it: (check, column)."""
    found = _table(amounts(layout, reference))
    once = [_once(layout, reference.counts, place) for place in range(len(layout.columns))]
    found[1:] = np.maximum(found[1:], 1)
    found[3] = np.maximum(found[3], once)
    return found


def _once(layout: Layout, reference: Array, place: int) -> int:
    """Rows of the reference whose category occurs once, at most."""
    column = layout.columns[place]
    if not column.column.discrete:
        return 0
    start, stop = int(layout.start[place]), int(layout.start[place + 1]) - 1
    return int((reference[start + 1 : stop : 2] == 1).sum()) + len(column.rare)


def _ratio(part: Array, whole: Array) -> Array:
    return np.asarray(part / np.maximum(whole, 1))


def _two_shares(k: Array, n: Array, k0: Array, m: Array) -> Array:
    """-G/2 where the share k/n is larger than k0/m, else 0."""
    common = (k + k0) / np.maximum(n + m, 1)
    half_g = _evidence(k, n, common) + _evidence(k0, m, common)
    return np.where((n > 0) & (m > 0) & (k * m > k0 * n), -half_g, 0.0)


def _evidence(k: Array, n: Array, expected: Array) -> Array:
    """n KL(k/n | expected) of Bernoulli distributions, in nats; 0 where n is 0, infinite where ``expected`` is 0 or 1
    and k/n is not."""
    share = _ratio(k, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        hit = np.where(share > 0, share * np.log(share / expected), 0.0)
        miss = np.where(share < 1, (1 - share) * np.log((1 - share) / (1 - expected)), 0.0)
        return np.where(n > 0, n * np.maximum(hit + miss, 0.0), 0.0)
