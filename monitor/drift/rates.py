"""Shares of rows that a model was not trained for: missing, outside the reference's range, of a new category."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitor.drift.base import Pair
from monitor.types import Array


@dataclass(slots=True, frozen=True, eq=False)
class Rates:
    """Shares of all rows of the window, per column; NaN without rows. ``new_category`` is 0 for ordered columns and
    ``below`` and ``above`` are 0 for discrete ones. A reference without any value has no range: all is ``above``.
    """

    missing: Array
    missing_reference: Array
    below: Array
    above: Array
    new_category: Array


def rates(pair: Pair) -> Rates:
    layout, window = pair.layout, pair.window
    reference_rows, rows = pair.rows
    first, last = layout.start[:-1], layout.start[1:] - 1
    discrete = layout.discrete
    empty = last - first == 1
    gaps = np.array([int(window[a:b:2].sum()) for a, b in zip(first, last, strict=True)])
    below = np.where(discrete | empty, 0, window[first])
    above = np.where(discrete, 0, window[last - 1])
    return Rates(
        _share(window[last], rows),
        _share(pair.reference[last], reference_rows),
        _share(below, rows),
        _share(above, rows),
        _share(np.where(discrete, gaps, 0), rows),
    )


def _share(part: Array, whole: Array) -> Array:
    return np.asarray(np.where(whole > 0, part / np.maximum(whole, 1), np.nan))
