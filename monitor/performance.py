"""How good predictions were, from joined rows: metrics over windows that slide by whole panes and merge exactly.

A ``Tally`` is what a metric needs of some rows: whole numbers only (counts, and sums as ``monitor.exact`` has them), so
tallies add, subtract and merge in any order to the same bits, and a window is always exactly the sum of its panes.
Ranking metrics (AUC, average precision) need the scores themselves: a ``Ranking`` keeps them per pane up to a bound,
and beyond it how many positives and negatives fell into each cell of a fine grid; then AUC is bracketed, with every
pair of one cell counted as half, and ``auc_error`` says how far the exact value can be from it at most.

Undefined values (a precision without predicted positives, an AUC of one class) are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import nan, sqrt
from typing import Any, Final, Protocol

import numpy as np

from monitor.exact import exact_square_sum, exact_sum, mean, moments, squared_deviation
from monitor.outcomes import LabelSettings
from monitor.types import Array

#: Cells of equal width over 0..1 that the scores of a large pane are counted in.
GRID: Final = 4096
#: Probabilities are kept this far from 0 and 1 in a log loss (as scikit-learn does for doubles).
_EPSILON: Final = float(np.finfo("f8").eps)


@dataclass(slots=True, eq=False)
class Tally:
    """``counts`` int64 and ``sums`` of one scorer, in its order. Adding them is adding the rows."""

    rows: int
    counts: Array
    sums: list[int]

    def plus(self, other: Tally, sign: int = 1) -> Tally:
        """Both together, or with ``sign`` -1 what is left without the other."""
        sums = [mine + sign * its for mine, its in zip(self.sums, other.sums, strict=True)]
        return Tally(self.rows + sign * other.rows, self.counts + sign * other.counts, sums)


# --- ranking ---------------------------------------------------------------------------------------------------------


class Ranking:
    """Positives and negatives by score: the scores themselves while there are at most ``limit``, else grid cells."""

    __slots__ = ("_limit", "_parts", "_rows", "grid")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[tuple[Array, Array]] = []
        self._rows = 0
        #: (2, GRID) int64: negatives and positives per cell; None while scores are kept.
        self.grid: Array | None = None

    def add(self, scores: Array, positive: Array) -> None:
        """Take rows in: scores in 0..1 and bool."""
        if self.grid is None and self._rows + len(scores) <= self._limit:
            self._parts.append((scores.astype("f8"), positive.astype(bool)))
            self._rows += len(scores)
            return
        grid = self.cells()
        grid += _cells(scores, positive)
        self.grid, self._parts, self._rows = grid, [], 0

    def merge(self, other: Ranking) -> None:
        """Take in all that another has, whatever either's limit."""
        if self.grid is None and other.grid is None:
            self._parts.extend(other._parts)
            self._rows += other._rows
            return
        self.grid = self.cells() + other.cells()
        self._parts, self._rows = [], 0

    def cells(self) -> Array:
        """The rows as grid cells; a copy."""
        grid = np.zeros((2, GRID), "i8") if self.grid is None else self.grid.copy()
        for scores, positive in self._parts:
            grid += _cells(scores, positive)
        return grid

    @classmethod
    def of_rows(cls, scores: Array, positive: Array, limit: int) -> Ranking:
        """Of scores that were kept: as after adding them, whatever the limit is."""
        made = cls(limit)
        made._parts, made._rows = [(scores.astype("f8"), positive.astype(bool))], len(scores)
        return made

    @classmethod
    def of_cells(cls, grid: Array, limit: int = 0) -> Ranking:
        """Of counts (2, GRID) per cell."""
        made = cls(limit)
        made.grid = grid.astype("i8")
        return made

    def sample(self, most: int) -> tuple[Array, Array]:
        """(scores, positive) to fit something to: every row, or of cells ``most`` rows at most, at their middles.

        Where there are more, each outcome is thinned evenly along the scores: any stretch of them keeps its share of
        rows to within one.
        """
        kept = self.rows()
        if kept is not None:
            return kept
        grid = self.cells()
        total = max(most, int(grid.sum()))
        thinned = np.diff(np.cumsum(grid, axis=1) * most // total, axis=1, prepend=0) if total > most else grid
        middles = (np.arange(GRID) + 0.5) / GRID
        scores = np.concatenate([np.repeat(middles, counts) for counts in thinned])
        return scores, np.repeat([False, True], thinned.sum(axis=1))

    def rows(self) -> tuple[Array, Array] | None:
        """(scores, positive) of every row, or None when the scores are not kept any more."""
        if self.grid is not None:
            return None
        empty: tuple[Array, Array] = (np.empty(0), np.empty(0, bool))
        scores, positive = zip(*(self._parts or [empty]), strict=True)
        return np.concatenate(scores), np.concatenate(positive)

    def by_score(self) -> tuple[Array, Array]:
        """(negatives, positives) per distinct score, or per cell, ascending."""
        kept = self.rows()
        if kept is None:
            grid = self.cells()
            held = grid.any(axis=0)
            return grid[0, held], grid[1, held]
        scores, positive = kept
        distinct, places = np.unique(scores, return_inverse=True)
        positives = np.bincount(places[positive], minlength=len(distinct))
        return np.bincount(places, minlength=len(distinct)) - positives, positives


def _cells(scores: Array, positive: Array) -> Array:
    cell = np.minimum((scores * GRID).astype("i8"), GRID - 1)
    return np.stack([np.bincount(cell[positive == side], minlength=GRID) for side in (False, True)])


@dataclass(slots=True, frozen=True)
class Auc:
    """``value`` with pairs of equal score (or cell) as half; ``error`` bounds what the cells hide, 0 when exact.

    ``variance`` is that of DeLong, DeLong and Clarke-Pearson (1988), from the placement of each row among those of the
    other class.
    """

    value: float = nan
    variance: float = nan
    error: float = nan
    average_precision: float = nan
    negatives: int = 0
    positives: int = 0


def auc_of(ranking: Ranking) -> Auc:
    """All NaN without positives or without negatives."""
    negatives, positives = ranking.by_score()
    n, p = int(negatives.sum()), int(positives.sum())
    if not n or not p:
        return Auc(negatives=n, positives=p)
    below = np.cumsum(negatives) - negatives
    above = p - np.cumsum(positives)
    twice_pairs = int(np.dot(positives, 2 * below + negatives))
    value = twice_pairs / (2 * n * p)
    of_positive = (below + 0.5 * negatives) / n
    of_negative = (above + 0.5 * positives) / p
    variance = _spread(of_positive, positives, value) / p + _spread(of_negative, negatives, value) / n
    within = int(np.dot(positives, negatives)) / (2 * n * p) if ranking.grid is not None else 0.0
    return Auc(value, variance, within, _average_precision(negatives, positives), n, p)


def _spread(placements: Array, weights: Array, center: float) -> float:
    count = int(weights.sum())
    return float(np.dot(weights, (placements - center) ** 2)) / (count - 1) if count > 1 else 0.0


def _average_precision(negatives: Array, positives: Array) -> float:
    """Sum over scores, downwards, of precision there times the recall gained."""
    hits, taken = np.cumsum(positives[::-1]), np.cumsum((negatives + positives)[::-1])
    return float(np.dot(hits / taken, positives[::-1])) / int(positives.sum())


# --- scorers ---------------------------------------------------------------------------------------------------------


class Scorer(Protocol):
    """Rows to tallies, tallies to metrics. Predictions (n, width) float64 and labels (n,) as a ``LabelJoin`` gives."""

    #: Whether a ranking of scores is of use.
    ranks: bool

    def empty(self) -> Tally: ...
    def tally(self, predictions: Array, labels: Array) -> Tally: ...
    def metrics(self, tally: Tally, ranking: Ranking | None) -> dict[str, Any]: ...
    def loss(self, tally: Tally, signal: str) -> tuple[float, float]:
        """Mean and variance, per row, of the loss that a signal is about."""
        ...

    def pairs(self, predictions: Array, labels: Array) -> tuple[Array, Array] | None:
        """Per row a probability and whether what it speaks of came true; None when the task has none."""
        ...


class Reliability:
    """Do probabilities mean what they say: (p, y) in bins of equal width, and the Brier score's excess.

    The excess of a row is (p - y)^2 - p (1 - p) = (y - p)(1 - 2p): 0 in the mean when p is the chance of y
    (Spiegelhalter 1986). Counts: rows and positives per bin. Sums: p per bin, excess and its square.
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.counts = 2 * bins
        self.sums = bins + 2

    def tally(self, scores: Array, hit: Array) -> tuple[list[int], list[int]]:
        place = np.minimum((scores * self.bins).astype("i8"), self.bins - 1)
        rows = np.bincount(place, minlength=self.bins)
        positives = np.bincount(place[hit], minlength=self.bins)
        excess = (hit - scores) * (1.0 - 2.0 * scores)
        sums = [exact_sum(scores[place == k]) for k in range(self.bins)]
        return [*rows.tolist(), *positives.tolist()], [*sums, exact_sum(excess), exact_sum(excess * excess)]

    def read(self, counts: Array, sums: Sequence[int]) -> Bins:
        rows, positives = counts[: self.bins], counts[self.bins :]
        return Bins(
            rows,
            positives,
            np.array([mean(total, 1) for total in sums[: self.bins]]),
            moments(sums[-2], sums[-1], int(rows.sum())),
        )


@dataclass(slots=True, frozen=True, eq=False)
class Bins:
    """Per bin of scores: rows, positives, sum of scores. ``excess``: mean and variance of the Brier excess."""

    rows: Array
    positives: Array
    scores: Array
    excess: tuple[float, float]

    @property
    def gap(self) -> Array:
        """Observed rate less mean score, 0 for empty bins."""
        return np.asarray((self.positives - self.scores) / np.maximum(self.rows, 1))

    @property
    def error(self) -> float:
        """Expected calibration error: the mean gap, without sign, over the rows."""
        total = int(self.rows.sum())
        return float(np.dot(self.rows, np.abs(self.gap))) / total if total else nan

    def to_dict(self) -> dict[str, Any]:
        """For a reliability diagram; means of empty bins are NaN."""
        held = np.where(self.rows > 0, self.rows, np.nan)
        rates = {"mean_score": (self.scores / held).tolist(), "observed": (self.positives / held).tolist()}
        return {"rows": self.rows.tolist(), **rates}


def _share(part: int, whole: int) -> float:
    return part / whole if whole else nan


def _log_losses(chances: Array) -> Array:
    return np.asarray(-np.log(np.clip(chances, _EPSILON, 1.0 - _EPSILON)))


class Binary:
    """Labels 0 or 1, one score. ``form`` "class": only what the predicted class tells.

    Counts: true and false positives, false and true negatives, then ``Reliability``'s. Sums: log loss, its square,
    squared error, then ``Reliability``'s.
    """

    def __init__(self, settings: LabelSettings) -> None:
        self._threshold = settings.threshold
        self.ranks = settings.form != "class"
        self._cut = settings.threshold if self.ranks else 0.5
        self.reliability = Reliability(settings.bins)

    def empty(self) -> Tally:
        return Tally(0, np.zeros(4 + self.reliability.counts, "i8"), [0] * (3 + self.reliability.sums))

    def tally(self, predictions: Array, labels: Array) -> Tally:
        scores, truth = predictions[:, 0], labels == 1.0
        said = scores >= self._cut
        confusion = [int((said & truth).sum()), int((said & ~truth).sum()), int((~said & truth).sum())]
        losses = _log_losses(np.where(truth, scores, 1.0 - scores))
        counts, sums = self.reliability.tally(scores, truth)
        counted = np.array([*confusion, len(truth) - sum(confusion), *counts], "i8")
        own = [exact_sum(losses), exact_sum(losses * losses), exact_sum((scores - truth) ** 2)]
        return Tally(len(truth), counted, [*own, *sums])

    def pairs(self, predictions: Array, labels: Array) -> tuple[Array, Array] | None:
        return (predictions[:, 0], labels == 1.0) if self.ranks else None

    def bins(self, tally: Tally) -> Bins:
        return self.reliability.read(tally.counts[4:], tally.sums[3:])

    def metrics(self, tally: Tally, ranking: Ranking | None) -> dict[str, Any]:
        tp, fp, fn, tn = tally.counts[:4].tolist()
        found: dict[str, Any] = {
            "accuracy": _share(tp + tn, tally.rows),
            "precision": _share(tp, tp + fp),
            "recall": _share(tp, tp + fn),
            "f1": _share(2 * tp, 2 * tp + fp + fn),
            "specificity": _share(tn, tn + fp),
            "base_rate": _share(tp + fn, tally.rows),
            "predicted_rate": _share(tp + fp, tally.rows),
            "confusion": [[tn, fp], [fn, tp]],
        }
        if self.ranks:
            found |= self._probability_metrics(tally, ranking)
        return found

    def _probability_metrics(self, tally: Tally, ranking: Ranking | None) -> dict[str, Any]:
        bins = self.bins(tally)
        auc = Auc() if ranking is None else auc_of(ranking)
        return {
            "log_loss": mean(tally.sums[0], tally.rows),
            "brier": mean(tally.sums[2], tally.rows),
            "mean_score": _share_of(bins.scores, tally.rows),
            "ece": bins.error,
            "brier_excess": bins.excess[0],
            "auc": auc.value,
            "auc_error": auc.error,
            "auc_standard_error": sqrt(auc.variance),
            "average_precision": auc.average_precision,
            "reliability": bins.to_dict(),
        }

    def loss(self, tally: Tally, signal: str) -> tuple[float, float]:
        if signal == "accuracy":
            return _bernoulli(int(tally.counts[1] + tally.counts[2]), tally.rows)
        return moments(tally.sums[0], tally.sums[1], tally.rows)


def _share_of(totals: Array, rows: int) -> float:
    return float(totals.sum()) / rows if rows else nan


def _bernoulli(hits: int, rows: int) -> tuple[float, float]:
    rate = _share(hits, rows)
    return rate, rate * (1 - rate)


class Multiclass:
    """Labels 0..K-1, K scores that need not add up to 1 exactly, or (``form`` "class") the predicted class alone.

    Counts: the confusion matrix (true by predicted), then ``Reliability``'s for the top score and whether its class was
    right. Sums: log loss (of scores made to add up to 1), its square, then ``Reliability``'s.
    """

    ranks = False

    def __init__(self, settings: LabelSettings) -> None:
        self.classes = len(settings.classes)
        self._scores = settings.form != "class"
        self.reliability = Reliability(settings.bins)

    def empty(self) -> Tally:
        return Tally(0, np.zeros(self.classes**2 + self.reliability.counts, "i8"), [0] * (2 + self.reliability.sums))

    def tally(self, predictions: Array, labels: Array) -> Tally:
        truth, said, chances = labels.astype("i8"), self._said(predictions), self._chances(predictions)
        rows = np.arange(len(truth))
        losses = _log_losses(chances[rows, truth])
        confusion = np.bincount(truth * self.classes + said, minlength=self.classes**2)
        counts, sums = self.reliability.tally(chances[rows, said], said == truth)
        counted = np.concatenate([confusion, np.array(counts, "i8")])
        return Tally(len(truth), counted, [exact_sum(losses), exact_sum(losses * losses), *sums])

    def _said(self, predictions: Array) -> Array:
        return np.asarray(np.argmax(predictions, axis=1) if self._scores else predictions[:, 0].astype("i8"))

    def _chances(self, predictions: Array) -> Array:
        """Scores that add up to 1 in every row; of a class alone: all on it."""
        if not self._scores:
            return np.asarray(np.eye(self.classes)[predictions[:, 0].astype("i8")])
        totals = predictions.sum(axis=1, keepdims=True)
        return np.asarray(predictions / np.where(totals > 0, totals, 1.0))

    def pairs(self, predictions: Array, labels: Array) -> tuple[Array, Array] | None:
        """The top score, and whether its class was right."""
        said = self._said(predictions)
        if not self._scores:
            return None
        top = np.asarray(self._chances(predictions)[np.arange(len(said)), said])
        return top, np.asarray(said == labels)

    def bins(self, tally: Tally) -> Bins:
        return self.reliability.read(tally.counts[self.classes**2 :], tally.sums[2:])

    def metrics(self, tally: Tally, ranking: Ranking | None) -> dict[str, Any]:
        confusion = tally.counts[: self.classes**2].reshape(self.classes, self.classes)
        right, said, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
        seen = (said + true) > 0
        f1 = 2 * right[seen] / (said + true)[seen]
        accuracy = _share(int(right.sum()), tally.rows)
        found: dict[str, Any] = {
            "accuracy": accuracy,
            "macro_f1": float(f1.mean()) if seen.any() else nan,
            "micro_f1": accuracy,
            "precision": _shares(right, said),
            "recall": _shares(right, true),
            "confusion": confusion.tolist(),
        }
        if self._scores:
            bins = self.bins(tally)
            found |= {
                "log_loss": mean(tally.sums[0], tally.rows),
                "mean_confidence": _share_of(bins.scores, tally.rows),
                "ece": bins.error,
                "brier_excess": bins.excess[0],
                "reliability": bins.to_dict(),
            }
        return found

    def loss(self, tally: Tally, signal: str) -> tuple[float, float]:
        if signal == "accuracy":
            right = np.diag(tally.counts[: self.classes**2].reshape(self.classes, self.classes)).sum()
            return _bernoulli(tally.rows - int(right), tally.rows)
        return moments(tally.sums[0], tally.sums[1], tally.rows)


def _shares(part: Array, whole: Array) -> list[float]:
    return [_share(int(a), int(b)) for a, b in zip(part, whole, strict=True)]


class Regression:
    """A number against a number. Counts: rows whose label is not 0.

    Sums: absolute error and square, squared error and square, error, label, relative error (of those rows), and the
    exact squares of labels. MAPE leaves out rows whose label is 0, where it has no meaning.
    """

    ranks = False

    def empty(self) -> Tally:
        return Tally(0, np.zeros(1, "i8"), [0] * 7)

    def tally(self, predictions: Array, labels: Array) -> Tally:
        error = predictions[:, 0] - labels
        distance, square = np.abs(error), error * error
        some = labels != 0
        with np.errstate(over="ignore"):
            relative = np.minimum(distance[some] / np.abs(labels[some]), 1e300)
        sums = [
            exact_sum(distance),
            exact_sum(square),
            exact_sum(square * square),
            exact_sum(error),
            exact_sum(labels),
            exact_sum(relative),
            exact_square_sum(labels),
        ]
        return Tally(len(labels), np.array([int(some.sum())], "i8"), sums)

    def pairs(self, predictions: Array, labels: Array) -> tuple[Array, Array] | None:
        return None

    def metrics(self, tally: Tally, ranking: Ranking | None) -> dict[str, Any]:
        rows = tally.rows
        spread = squared_deviation(tally.sums[6], tally.sums[4], rows)
        squares = mean(tally.sums[1], rows)
        return {
            "mae": mean(tally.sums[0], rows),
            "rmse": sqrt(squares) if rows else nan,
            "bias": mean(tally.sums[3], rows),
            "mape": mean(tally.sums[5], int(tally.counts[0])),
            "mape_rows": int(tally.counts[0]),
            "r2": float(1 - Fraction(squares) * rows / Fraction(spread)) if rows > 1 and spread > 0 else nan,
            "mean_label": mean(tally.sums[4], rows),
            "mean_prediction": mean(tally.sums[4] + tally.sums[3], rows),
        }

    def loss(self, tally: Tally, signal: str) -> tuple[float, float]:
        """Of the squared error for "rmse"."""
        distance, squares, fourth, error = tally.sums[:4]
        if signal == "rmse":
            return moments(squares, fourth, tally.rows)
        return moments(distance if signal == "mae" else error, squares, tally.rows)


def scorer_of(settings: LabelSettings) -> Binary | Multiclass | Regression:
    if settings.task == "regression":
        return Regression()
    return Binary(settings) if settings.task == "binary" else Multiclass(settings)
