"""From a model's outputs and labels to decisions, losses per row, and the usual numbers. Arrays in, arrays out.

Rows stand in the order of the holdout. Classes are known by their place in ``classes``, texts in the order of the
probabilities. A value that is not finite stays so in the loss: nothing is clipped into looking right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from server.errors import InvalidArgument

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Probabilities nearer to 0 than this count as this in the log loss: one row cannot outweigh all others.
LEAST_PROBABILITY: Final = 1e-15
#: More classes than this are no classes.
MOST_CLASSES: Final = 1000


@dataclass(slots=True, frozen=True)
class Decided:
    """What a classifier says of each row.

    ``probabilities``: (rows, classes), None for one that gives labels only. ``decisions``: (rows,) places in the
    classes, -1 for an answer that is none of them.
    """

    decisions: Array
    probabilities: Array | None = None


def as_text(values: Array) -> Array:
    """Labels as texts that compare: 1, 1.0 and True are "1", missing ones are empty. (rows,) of str."""
    flat = np.asarray(values)
    if flat.dtype.kind == "b":
        return flat.astype("i8").astype(str)
    if flat.dtype.kind in "iu":
        return flat.astype(str)
    if flat.dtype.kind == "f":
        return np.array([_number_text(value) for value in flat.tolist()], dtype=str)
    return np.array([_any_text(value) for value in flat.tolist()], dtype=str)


def _number_text(value: float) -> str:
    return "" if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value)


def _any_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, bool):
        return str(int(value))
    return _number_text(value) if isinstance(value, float) else str(value)


def find_classes(labels: Array, width: int, named: Sequence[str] = ()) -> tuple[str, ...]:
    """Labels of the probabilities' columns, ``width`` of them (0: a model that gives labels). Raises InvalidArgument.

    ``labels``: texts, of rows that have one.
    """
    if named:
        if width and len(named) != width:
            raise InvalidArgument(f"the policy names {len(named)} classes, the output has {width}")
        return tuple(named)
    found = sorted(set(labels.tolist()), key=_order)
    if len(found) > MOST_CLASSES:
        raise InvalidArgument(f"the labels have {len(found)} values; classes are at most {MOST_CLASSES}")
    numbers = tuple(str(place) for place in range(width))
    if width and set(found) <= set(numbers):
        return numbers
    if width and len(found) != width:
        raise InvalidArgument(f"the output has {width} classes, the labels have {len(found)} values: name the classes")
    return tuple(found)


def _order(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return np.inf, text


def places(labels: Array, classes: Sequence[str]) -> Array:
    """(rows,) the place of each label in the classes, -1 for none of them."""
    known = {name: place for place, name in enumerate(classes)}
    return np.array([known.get(label, -1) for label in labels.tolist()], dtype="i8")


def two_sided(output: Array) -> Array:
    """(rows, classes) of probabilities: one column is the chance of the second of two classes."""
    wide = np.asarray(output, dtype="f8").reshape(len(output), -1)
    return np.concatenate([1 - wide, wide], axis=1) if wide.shape[1] == 1 else wide


def decide(probabilities: Array, positive: int, threshold: float) -> Array:
    """(rows,) the class decided for: by the threshold with two classes, else the most probable one."""
    if probabilities.shape[1] == 2:
        return np.where(probabilities[:, positive] >= threshold, positive, 1 - positive)
    return np.asarray(np.argmax(probabilities, axis=1))


# --- losses ----------------------------------------------------------------------------------------------------------


def classification_loss(name: str, found: Decided, labels: Array) -> Array:
    """(rows,) the loss ``brier``, ``log_loss`` or ``zero_one`` for labels as places. Raises InvalidArgument.

    Brier: (p - y)^2 of one class for two classes (Brier 1950, halved), the sum over all classes for more.
    """
    if name == "zero_one":
        wrong: Array = (found.decisions != labels).astype("f8")
        if found.probabilities is not None:
            wrong[~np.isfinite(found.probabilities).all(axis=1)] = np.nan
        return wrong
    chances = found.probabilities
    if chances is None:
        raise InvalidArgument(f"the loss {name} needs probabilities, and the output has labels")
    rows = np.arange(len(labels))
    if name == "log_loss":
        chance = np.where(np.isfinite(chances).all(axis=1), chances[rows, labels], np.nan)
        return np.asarray(-np.log(np.clip(chance, LEAST_PROBABILITY, 1.0)))
    wanted = np.zeros_like(chances)
    wanted[rows, labels] = 1.0
    squares = (chances - wanted) ** 2
    return np.asarray(squares[:, 1] if chances.shape[1] == 2 else squares.sum(axis=1))


def regression_loss(name: str, predicted: Array, labels: Array) -> Array:
    """(rows,) the loss ``squared`` or ``absolute``."""
    difference = predicted - labels
    return np.asarray(difference**2 if name == "squared" else np.abs(difference))


# --- numbers to show -------------------------------------------------------------------------------------------------


def area_under_curve(chances: Array, positive: Array) -> float | None:
    """Area under the ROC curve by ranks, ties counted half (Mann and Whitney); None when one side is empty."""
    yes, no = int(positive.sum()), int((~positive).sum())
    if not yes or not no or not np.isfinite(chances).all():
        return None
    _, where, counts = np.unique(chances, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[where]
    return float((ranks[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


def classification_metrics(found: Decided, labels: Array, positive: int) -> dict[str, float | None]:
    """Accuracy; with probabilities also Brier, log loss, AUC, and mean probability less base rate (calibration)."""
    numbers: dict[str, float | None] = {"accuracy": float(np.mean(found.decisions == labels))}
    if found.probabilities is None:
        return numbers
    yes, chances = labels == positive, found.probabilities[:, positive]
    return numbers | {
        "brier": float(classification_loss("brier", found, labels).mean()),
        "log_loss": float(classification_loss("log_loss", found, labels).mean()),
        "auc": area_under_curve(chances, yes),
        "calibration": float(chances.mean() - yes.mean()),
    }


def regression_metrics(predicted: Array, labels: Array) -> dict[str, float | None]:
    """Root of the mean squared error, mean absolute error, bias, and R^2 (None when all labels are the same)."""
    difference, spread = predicted - labels, float(((labels - labels.mean()) ** 2).sum())
    return {
        "rmse": float(np.sqrt((difference**2).mean())),
        "mae": float(np.abs(difference).mean()),
        "bias": float(difference.mean()),
        "r2": 1 - float((difference**2).sum()) / spread if spread else None,
    }


def metric_rows(name: str, decisions: Array, labels: Array, positive: int) -> tuple[Array, Array | None]:
    """Scores per row, and the rows that count (None: all), of which the mean in a group is the metric."""
    chosen = (decisions == positive).astype("f8")
    match name:
        case "accuracy":
            return (decisions == labels).astype("f8"), None
        case "selection_rate":
            return chosen, None
        case "true_positive_rate":
            return chosen, labels == positive
        case "false_positive_rate":
            return chosen, labels != positive
        case _:  # precision
            return (labels == positive).astype("f8"), decisions == positive
