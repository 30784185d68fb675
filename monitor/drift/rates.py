"""Shares of rows that a model was not trained for: missing, outside the reference's range, of a new category."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitor.drift.base import Pair
from monitor.layout import Layout, Sample
from monitor.types import Array


@dataclass(slots=True, frozen=True, eq=False)
class Amounts:
    """Rows of one sample, per column. ``new_category`` is 0 for ordered columns and ``below`` and ``above`` are 0 for
    discrete ones. A reference without any value has no range: all is ``above``.
    """

    missing: Array
    below: Array
    above: Array
    new_category: Array


@dataclass(slots=True, frozen=True, eq=False)
class Rates:
    """Shares of all rows of the window, per column, as ``Amounts``; NaN without rows."""

    missing: Array
    missing_reference: Array
    below: Array
    above: Array
    new_category: Array


def amounts(layout: Layout, sample: Sample) -> Amounts:
    """Read from the sums of few cells, but for new categories."""
    first, last = layout.start[:-1], layout.start[1:] - 1
    running = sample.running
    lowest, highest = running[first].astype("i8"), running[last - 1].astype("i8")
    empty = last - first == 1
    before = np.where(empty, 0, running[last - 2])
    new = np.zeros(len(first), "i8")
    for place in np.flatnonzero(layout.discrete):
        new[place] = sample.counts[first[place] : last[place] : 2].sum()
    below = np.where(layout.discrete | empty, 0, lowest)
    return Amounts(sample.missing, below, np.where(layout.discrete, 0, highest - before), new)


def rates(pair: Pair) -> Rates:
    reference_rows, rows = pair.rows
    found = amounts(pair.layout, pair.found)
    return Rates(
        _share(found.missing, rows),
        _share(pair.missing[0], reference_rows),
        _share(found.below, rows),
        _share(found.above, rows),
        _share(found.new_category, rows),
    )


def _share(part: Array, whole: Array) -> Array:
    return np.asarray(np.where(whole > 0, part / np.maximum(whole, 1), np.nan))
