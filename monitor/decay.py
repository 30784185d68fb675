"""Is the model worse than it was? Signals of joined rows held against a reference, each real, large, both or neither.

A signal is over when it is **real** (its p is under the level of ``monitor.calibration.log_level``: one false alarm per
ERT, over all signals, groups and windows) and **large** (worse by its margin). The tests, all but the last two
one-sided towards worse:

* ``accuracy``: signed root of the likelihood ratio of two binomial shares of errors, which holds far out in the tail
  where a normal approximation of the share itself does not.
* ``log_loss``, ``mae``, ``rmse`` (by squared errors), ``brier_excess``: Welch's z of the mean loss. Losses are skewed
  to the right, so that large means come with large variances: the test errs on the quiet side.
* ``auc``: z with DeLong's variances; what a coarse AUC does not know counts in the model's favour.
* ``calibration``: per bin of scores the gap between observed rate and mean score, less the reference's; squares over
  variances of all bins are chi-square.
* ``bias`` (two-sided): z of the mean error, less the reference's.

The reference is rows (learnt, or given as such), or single numbers (``LabelRules.reference``), or, for calibration
without either, the hypothesis that scores are calibrated.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import erfc, exp, inf, isnan, log, log1p, nan, pi, sqrt
from typing import Any, Final

import numpy as np

from monitor.calibration import log_level, log_tail_chi_square
from monitor.label_windows import WindowRows
from monitor.outcomes import CALIBRATION_SIGNALS, LabelSettings
from monitor.performance import Auc, Binary, Bins, Multiclass, Ranking, Regression, Tally, auc_of
from monitor.types import Array, WindowCounts

#: An alarm ends only where p is this many times over the level (or the effect is small again).
_P_HYSTERESIS: Final = log(10.0)
#: Rows of either class that an AUC is judged on at least.
_LEAST_OF_CLASS: Final = 10
#: Expected variance of a bin's positives from which its gap is near normal; lesser bins are taken together.
_LEAST_VARIANCE: Final = 4.0
_NOTHING: Final = np.empty(0, "i8")


@dataclass(slots=True, frozen=True)
class Signal:
    """One signal of one window. ``effect``: how much worse, in the margin's unit; NaN throughout: not judged."""

    name: str
    kind: str
    value: float
    reference: float
    effect: float
    margin: float
    log_p: float
    level: float
    real: bool
    large: bool
    over: bool
    quiet: bool

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "p": exp(self.log_p)}


@dataclass(slots=True, frozen=True, eq=False)
class ReferenceRows:
    """Rows with labels from when the model was known to be good."""

    tally: Tally
    ranking: Ranking | None


@dataclass(slots=True, frozen=True)
class _Finding:
    value: float
    reference: float
    effect: float
    log_p: float


_UNKNOWN: Final = _Finding(nan, nan, nan, 0.0)


class SignalJudge:
    """Signals of one model's windows, by its settings."""

    def __init__(self, settings: LabelSettings, scorer: Binary | Multiclass | Regression) -> None:
        self._settings, self._scorer, self._rules = settings, scorer, settings.rules

    def signals(self, window: WindowRows, reference: ReferenceRows | None, groups: int) -> list[Signal]:
        """All signals of the settings, in their order. ``groups``: how many are looked at like this one."""
        settings, rules = self._settings, self._rules
        counts = WindowCounts(
            window.window.name, window.rows, 0, window.start_ns, window.end_ns, window.look, window.full, _NOTHING
        )
        of = len(settings.signals) * max(1, groups)
        level = log_level(rules.alarm, window.window, counts, of, len(settings.windows))
        return [self._signal(name, self._find(name, window, reference), level) for name in settings.signals]

    def _signal(self, name: str, found: _Finding, level: float) -> Signal:
        margin, alarm = self._rules.margin(name), self._rules.alarm
        real, large = found.log_p < level, found.effect >= margin
        quiet = found.log_p > level + _P_HYSTERESIS or found.effect < alarm.clear_ratio * margin
        kind = "calibration" if name in CALIBRATION_SIGNALS else "label"
        return Signal(
            name, kind, found.value, found.reference, found.effect, margin, found.log_p, exp(level),
            real, large, real and large, quiet and not isnan(found.effect),
        )  # fmt: skip

    def _find(self, name: str, window: WindowRows, reference: ReferenceRows | None) -> _Finding:
        given = self._rules.reference.get(name)
        if not window.rows or (given is None and reference is None and self._needs_rows(name)):
            return _UNKNOWN
        rows = None if given is not None else reference
        if name == "accuracy":
            return self._accuracy(window.tally, rows, given)
        if name == "auc":
            return self._auc(window, rows, given)
        if name == "calibration":
            return self._calibration(window.tally, rows)
        if name in ("brier_excess", "bias"):
            return self._shift(name, window.tally, rows, given)
        return self._loss(name, window.tally, rows, given)

    def _needs_rows(self, name: str) -> bool:
        """Without a reference only calibration can be judged, and that only where none is still to be learnt."""
        return name not in CALIBRATION_SIGNALS or self._rules.learn_rows > 0

    # --- the tests -------------------------------------------------------------------------------------------------

    def _accuracy(self, tally: Tally, reference: ReferenceRows | None, given: float | None) -> _Finding:
        errors, rows = self._scorer.loss(tally, "accuracy")[0], tally.rows
        known, known_rows = 1.0 - (given or 0.0), float(self._rules.given_rows or inf)
        if reference is not None:
            known, known_rows = self._scorer.loss(reference.tally, "accuracy")[0], float(reference.tally.rows)
        log_p = log_tail_normal(_share_root(errors, rows, known, known_rows))
        return _Finding(1.0 - errors, 1.0 - known, errors - known, log_p)

    def _loss(self, name: str, tally: Tally, reference: ReferenceRows | None, given: float | None) -> _Finding:
        """A mean loss, and how much larger it is in parts of the reference's."""
        root = name == "rmse"
        loss, variance = self._scorer.loss(tally, name)
        if reference is not None:
            known, known_variance = self._scorer.loss(reference.tally, name)
            spread = variance / tally.rows + known_variance / reference.tally.rows
        else:
            known = (given or 0.0) ** 2 if root else given or 0.0
            spread = variance / tally.rows + _of_given(variance, self._rules.given_rows)
        value, base = (sqrt(loss), sqrt(known)) if root else (loss, known)
        effect = value / base - 1.0 if base > 0 else (inf if value > 0 else 0.0)
        return _Finding(value, base, effect, log_tail_normal(_z(loss - known, spread)))

    def _auc(self, window: WindowRows, reference: ReferenceRows | None, given: float | None) -> _Finding:
        found = _judged_auc(window.ranking)
        if given is not None:
            known: Auc | None = Auc(given, 0.0, 0.0)
        else:
            known = None if reference is None else _judged_auc(reference.ranking)
        if found is None or known is None:
            return _UNKNOWN
        variance = known.variance if given is None else _of_given(found.variance * window.rows, self._rules.given_rows)
        worse = known.value - known.error - (found.value + found.error)
        log_p = log_tail_normal(_z(worse, found.variance + variance))
        return _Finding(found.value, known.value, known.value - found.value, log_p)

    def _calibration(self, tally: Tally, reference: ReferenceRows | None) -> _Finding:
        bins = self._bins(tally)
        known = None if reference is None else self._bins(reference.tally)
        known_gap = np.zeros(len(bins.rows)) if known is None else known.gap
        shift = bins.gap - known_gap
        effect = float(np.dot(bins.rows, np.abs(shift))) / tally.rows
        log_p = _gaps_log_p(bins, known)
        return _Finding(bins.error, 0.0 if known is None else known.error, effect, log_p)

    def _shift(self, name: str, tally: Tally, reference: ReferenceRows | None, given: float | None) -> _Finding:
        """A mean that is 0 for a perfect model: larger than the reference's (excess), or other than it (bias)."""
        value, variance = self._centered(name, tally)
        known, spread = given or 0.0, variance / tally.rows
        if reference is not None:
            known, known_variance = self._centered(name, reference.tally)
            spread += known_variance / reference.tally.rows
        elif given is not None:
            spread += _of_given(variance, self._rules.given_rows)
        if name == "brier_excess":
            return _Finding(value, known, value - known, log_tail_normal(_z(value - known, spread)))
        typical = sqrt(self._scorer.loss(tally if reference is None else reference.tally, "rmse")[0])
        distance = abs(value - known)
        effect = distance / typical if typical > 0 else (inf if distance > 0 else 0.0)
        log_p = min(0.0, log(2.0) + log_tail_normal(_z(distance, spread)))
        return _Finding(value, known, effect, log_p)

    def _centered(self, name: str, tally: Tally) -> tuple[float, float]:
        return self._scorer.loss(tally, name) if name == "bias" else self._bins(tally).excess

    def _bins(self, tally: Tally) -> Bins:
        assert not isinstance(self._scorer, Regression)  # noqa: S101 - regression has no signal that asks
        return self._scorer.bins(tally)


def _judged_auc(ranking: Ranking | None) -> Auc | None:
    """None where there are too few of either class."""
    if ranking is None:
        return None
    found = auc_of(ranking)
    return found if min(found.negatives, found.positives) >= _LEAST_OF_CLASS else None


def _of_given(variance: float, rows: int) -> float:
    """What a given number may be off by: it was measured on ``rows`` rows like these, or 0: it is exact."""
    return variance / rows if rows else 0.0


def _z(difference: float, variance: float) -> float:
    """Standard deviations from 0; without variance, a difference is certain or there is none."""
    if isnan(variance) or difference <= 0:
        return 0.0
    return difference / sqrt(variance) if variance > 0 else inf


def _share_root(share: float, rows: float, known: float, known_rows: float) -> float:
    """Signed root of 2 ln(likelihood ratio) of two shares against a common one; 0 unless ``share`` is larger."""
    if not share > known:
        return 0.0
    common = known if known_rows == inf else (share * rows + known * known_rows) / (rows + known_rows)
    total = rows * _divergence(share, common)
    if known_rows < inf:
        total += known_rows * _divergence(known, common)
    return sqrt(max(0.0, 2.0 * total))


def _divergence(share: float, other: float) -> float:
    """Kullback-Leibler divergence of two Bernoulli shares, in nats."""
    total = 0.0
    for p, q in ((share, other), (1.0 - share, 1.0 - other)):
        if p > 0.0:
            total += p * log(p / q) if q > 0.0 else inf
    return total


def _gaps_log_p(bins: Bins, known: Bins | None) -> float:
    """ln p of all gaps together. Positives of a bin vary as binomials do: of the mean score when that is what is held
    to be true, else of both samples' rate."""
    rows = bins.rows.astype("f8")
    held = rows > 0
    if known is None:
        chance = bins.scores[held] / rows[held]
        difference, variance = (bins.positives - bins.scores)[held], rows[held] * chance * (1 - chance)
    else:
        held &= known.rows > 0
        both = rows[held] + known.rows[held]
        rate = (bins.positives[held] + known.positives[held] + 0.5) / (both + 1.0)
        difference = rows[held] * (bins.gap - known.gap)[held]
        variance = rows[held] * rate * (1 - rate) * (1.0 + rows[held] / known.rows[held])
    squares = _squares(difference, variance)
    return float(log_tail_chi_square(np.array([squares.sum()]), np.array([float(len(squares))]))[0])


def _squares(difference: Array, variance: Array) -> Array:
    """Squared z per bin, bins of little variance taken together as one."""
    enough = variance >= _LEAST_VARIANCE
    rest = float(variance[~enough].sum())
    squares = difference[enough] ** 2 / variance[enough]
    if rest < _LEAST_VARIANCE:
        return np.asarray(squares)
    return np.append(squares, float(difference[~enough].sum()) ** 2 / rest)


def log_tail_normal(z: float) -> float:
    """ln P(Z > z): by erfc, and beyond its range by the first terms of its asymptotic series."""
    if z < 30.0:
        return log(0.5 * erfc(z / sqrt(2.0)))
    return -inf if z == inf else -0.5 * z * z - log(z * sqrt(2.0 * pi)) + log1p(-1.0 / (z * z))
