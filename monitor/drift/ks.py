"""The Kolmogorov-Smirnov distance per column, as a certain interval."""

from __future__ import annotations

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.ks import ks_interval
from monitor.kernels.measures import ks_distance
from monitor.types import Array


class KolmogorovSmirnov:
    """Over values that are present, of columns whose values have an order; NaN for discrete columns."""

    name = "ks"

    def score(self, pair: Pair) -> Array:
        """The certain lower end, equal to D when all distinct reference values are knots."""
        low = np.empty(len(pair.layout.columns))
        ks_distance(pair.expected.running, pair.found.running, pair.layout.start, low)
        if pair.layout.any_discrete:
            low[pair.layout.discrete] = np.nan
        return low

    def interval(self, pair: Pair) -> tuple[Array, Array]:
        """(low, high) with low <= D <= high; takes several times as long."""
        columns = pair.layout.columns
        low, high = np.empty(len(columns)), np.empty(len(columns))
        ks_interval(pair.reference, pair.window, pair.layout.start, low, high)
        low[pair.layout.discrete] = high[pair.layout.discrete] = np.nan
        return low, high
