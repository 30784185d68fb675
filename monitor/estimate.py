"""Performance estimated without labels, from the scores alone (CBPE: confidence-based performance estimation).

A calibrated probability says how often it is right, so expected counts of hits and misses follow from scores without a
label. Two things are assumed, and an estimate is only as good as they are: that the calibrator, fitted on reference
rows with labels, still holds (**no concept drift**: the chance of a positive at a given score is what it was), and that
the reference was of the same kind of traffic. A change of what the scores *mean* is invisible here; only labels show
it. Estimates are marked as such and never raise an alarm.

Intervals (95 %) are of sampling alone: labels that vary as the calibrated probabilities say, by the delta method. That
the calibrator was itself fitted on a sample is not in them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf, nan, sqrt
from typing import Any, Final

import numpy as np

from monitor.errors import CalibrationError
from monitor.outcomes import CalibratorKind
from monitor.types import Array

#: Fewest reference rows, and fewest of either outcome among them.
LEAST_ROWS: Final = 50
LEAST_OUTCOMES: Final = 5
ASSUMPTION: Final = (
    "estimated from scores without labels: holds only while a score means what it meant in the reference (no concept "
    "drift); the interval covers sampling, not that assumption"
)
_BINS: Final = 20
_STEPS: Final = 100
_EPSILON: Final = 1e-12
#: Of a normal distribution, 95 % of which is within this many standard deviations.
_QUANTILE: Final = 1.959963984540054


# --- calibration -----------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True, eq=False)
class Calibrator:
    """A score to the chance that it comes true: piecewise linear through (``scores``, ``chances``), flat outside."""

    kind: CalibratorKind
    rows: int
    scores: Array
    chances: Array

    def __call__(self, scores: Array) -> Array:
        return np.asarray(np.interp(scores, self.scores, self.chances))

    @classmethod
    def fit(cls, scores: Array, hit: Array, kind: CalibratorKind = "isotonic") -> Calibrator:
        """Scores in 0..1 and bool. Raises CalibrationError when there is too little to learn from."""
        values, truth = np.asarray(scores, "f8"), np.asarray(hit, bool)
        hits = int(truth.sum())
        if len(values) != len(truth) or len(values) < LEAST_ROWS or min(hits, len(truth) - hits) < LEAST_OUTCOMES:
            raise CalibrationError(
                f"a calibrator needs {LEAST_ROWS} rows with {LEAST_OUTCOMES} of either outcome at least, got "
                f"{len(values)} scores and {len(truth)} labels with {hits} positives"
            )
        if not (values.min() >= 0.0 and values.max() <= 1.0):
            raise CalibrationError(f"scores must be within 0..1, got {values.min()} to {values.max()}")
        fitted = {"isotonic": _isotonic, "platt": _platt, "bins": _binned}[kind]
        return cls(kind, len(values), *fitted(values, truth))


def _isotonic(scores: Array, hit: Array) -> tuple[Array, Array]:
    """The non-decreasing function nearest to the labels in squares: pool adjacent violators."""
    distinct, places = np.unique(scores, return_inverse=True)
    weights = np.bincount(places)
    hits = np.bincount(places, weights=hit)
    blocks: list[tuple[float, int, int]] = []  # hits, rows, the last distinct score of the block
    for last, (own, rows) in enumerate(zip(hits.tolist(), weights.tolist(), strict=True)):
        block = (own, rows, last)
        while blocks and blocks[-1][0] * block[1] >= block[0] * blocks[-1][1]:
            before = blocks.pop()
            block = (before[0] + block[0], before[1] + block[1], last)
        blocks.append(block)
    ends = np.array([last for _, _, last in blocks])
    starts = np.concatenate([[0], ends[:-1] + 1])
    levels = np.array([own / rows for own, rows, _ in blocks])
    knots = np.stack([distinct[starts], distinct[ends]], axis=1).reshape(-1)
    return _without_repeats(knots, np.repeat(levels, 2))


def _without_repeats(knots: Array, levels: Array) -> tuple[Array, Array]:
    kept = np.concatenate([[True], np.diff(knots) > 0])
    return knots[kept], levels[kept]


def _binned(scores: Array, hit: Array) -> tuple[Array, Array]:
    """Observed rates in bins of equal numbers of rows, joined by lines between the bins' mean scores."""
    edges = np.unique(np.quantile(scores, np.arange(1, _BINS) / _BINS))
    places = np.searchsorted(edges, scores, side="right")
    rows = np.bincount(places, minlength=len(edges) + 1)
    held = rows > 0
    centers = np.bincount(places, weights=scores, minlength=len(rows))[held] / rows[held]
    return centers, np.bincount(places, weights=hit, minlength=len(rows))[held] / rows[held]


def _platt(scores: Array, hit: Array) -> tuple[Array, Array]:
    """A logistic regression on the score's logit (Newton's method), with targets drawn in as by Platt (1999)."""
    positives = int(hit.sum())
    target = np.where(hit, (positives + 1) / (positives + 2), 1 / (len(hit) - positives + 2))
    x = np.stack([_logit(scores), np.ones(len(scores))], axis=1)
    weights = np.array([1.0, 0.0])
    for _ in range(_STEPS):
        chance = _logistic(x @ weights)
        gradient = x.T @ (chance - target)
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x + _EPSILON * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        weights = weights - np.clip(step, -5.0, 5.0)
        if np.abs(step).max() < 1e-10:
            break
    knots = _logistic(np.linspace(-28.0, 28.0, 1121))
    return _without_repeats(knots, _logistic(weights[0] * _logit(knots) + weights[1]))


def _logit(chance: Array) -> Array:
    inside = np.clip(chance, _EPSILON, 1.0 - _EPSILON)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def _logistic(x: Array) -> Array:
    tail = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, tail) / (1.0 + tail))


# --- estimates -------------------------------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class Expected:
    """An expected value and where sampling alone would put it in 95 of 100 cases; all NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(slots=True, frozen=True)
class Estimate:
    """``metrics`` by name. Always to be shown as an estimate, with its ``assumption``."""

    rows: int
    reference_rows: int
    calibrator: str
    metrics: dict[str, Expected]
    estimated: bool = True
    assumption: str = ASSUMPTION

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate_binary(scores: Array, calibrator: Calibrator, threshold: float) -> Estimate:
    """Accuracy, precision, recall, F1, base rate, AUC, Brier score and log loss to be expected of unlabelled scores.

    Accuracy, base rate, Brier and log loss are exact expectations; ratios (precision, recall, F1, AUC) are ratios of
    expectations. Equal arguments give equal estimates.
    """
    ranked = np.sort(np.asarray(scores, "f8"))
    chance = calibrator(ranked)
    said = (ranked >= threshold).astype("f8")
    one, hit_loss, miss_loss = np.ones(len(ranked)), *_loss_if(ranked)
    none = 0.0 * one
    metrics = {
        "accuracy": _ratio(chance, (1 - said, 2 * said - 1), (one, none)),
        "precision": _ratio(chance, (none, said), (said, none)),
        "recall": _ratio(chance, (none, said), (none, one)),
        "f1": _ratio(chance, (none, 2 * said), (said, one)),
        "base_rate": _ratio(chance, (none, one), (one, none)),
        "auc": _area(chance, ranked),
        "brier": _ratio(chance, (ranked**2, 1 - 2 * ranked), (one, none)),
        "log_loss": _ratio(chance, (miss_loss, hit_loss - miss_loss), (one, none), most=inf),
    }
    return Estimate(len(ranked), calibrator.rows, calibrator.kind, metrics)


def estimate_accuracy(confidence: Array, calibrator: Calibrator) -> Estimate:
    """Accuracy of predicted classes from their scores; the calibrator is of top scores that were right."""
    chance = calibrator(np.sort(np.asarray(confidence, "f8")))
    one = np.ones(len(chance))
    accuracy = _ratio(chance, (0.0 * one, one), (one, 0.0 * one))
    return Estimate(len(chance), calibrator.rows, calibrator.kind, {"accuracy": accuracy})


def _loss_if(scores: Array) -> tuple[Array, Array]:
    """Log loss of a row that is positive, and of one that is negative."""
    inside = np.clip(scores, np.finfo("f8").eps, 1 - np.finfo("f8").eps)
    return -np.log(inside), -np.log1p(-inside)


def _ratio(chance: Array, above: tuple[Array, Array], below: tuple[Array, Array], most: float = 1.0) -> Expected:
    """Sum of a + b y over sum of c + d y; ``above`` is (a, b) per row, ``below`` (c, d), y has the given chances."""
    numerator = float((above[0] + above[1] * chance).sum())
    denominator = float((below[0] + below[1] * chance).sum())
    return _around(numerator, denominator, above[1], below[1], chance, most)


def _area(chance: Array, scores: Array) -> Expected:
    """AUC of ascending scores: pairs of rows, weighted by the chance that they are a positive and a negative."""
    first, past = np.searchsorted(scores, scores, side="left"), np.searchsorted(scores, scores, side="right")
    rest = 1.0 - chance
    beaten = _below(rest, first, past) - 0.5 * rest  # a row is not paired with itself
    lost = chance.sum() - _below(chance, first, past) - 0.5 * chance
    pairs = chance.sum() * rest.sum() - float(np.dot(chance, rest))
    slope = (rest.sum() - rest) - (chance.sum() - chance)
    return _around(float(np.dot(chance, beaten)), float(pairs), beaten - lost, slope, chance, 1.0)


def _below(weights: Array, first: Array, past: Array) -> Array:
    """Per row the weight of rows of a lesser score, and half that of equal ones."""
    before = np.concatenate([[0.0], np.cumsum(weights)])
    return np.asarray(0.5 * (before[first] + before[past]))


def _around(
    numerator: float, denominator: float, slope: Array, denominator_slope: Array, chance: Array, most: float
) -> Expected:
    """A ratio with its interval by the delta method: y of a row varies by chance x (1 - chance)."""
    if denominator <= 0.0:
        return Expected(nan, nan, nan)
    value = numerator / denominator
    change = (slope - value * denominator_slope) / denominator
    half = _QUANTILE * sqrt(float(np.dot(change * change, chance * (1.0 - chance))))
    return Expected(value, max(0.0, value - half), min(most, value + half))
