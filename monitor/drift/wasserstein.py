"""Wasserstein-1 per column, over the reference's range."""

from __future__ import annotations

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.wasserstein import wasserstein
from monitor.types import Array


class Wasserstein:
    """In the column's own unit, values outside the reference's range moved to its end; NaN for discrete columns."""

    name = "wasserstein"

    def score(self, pair: Pair) -> Array:
        return self.bounds(pair)[1]

    def bounds(self, pair: Pair) -> tuple[Array, Array, Array]:
        """(low, straight line within gaps, high)."""
        layout = pair.layout
        low, middle, high = (np.empty(len(layout.columns)) for _ in range(3))
        wasserstein(pair.reference, pair.window, layout.start, layout.knots, layout.knot_start, low, middle, high)
        for values in (low, middle, high):
            values[layout.discrete] = np.nan
        return low, middle, high
