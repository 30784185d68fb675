"""Pearson's chi-square of homogeneity per column."""

from __future__ import annotations

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.distances import chi_square
from monitor.types import Array


class ChiSquare:
    """Over levels, without continuity correction."""

    name = "chi_square"

    def score(self, pair: Pair) -> Array:
        return self.scores(pair)[0]

    def scores(self, pair: Pair) -> tuple[Array, Array]:
        """(statistic, degrees of freedom)."""
        out, occupied = np.empty(len(pair.layout.columns)), np.empty(len(pair.layout.columns), "i8")
        chi_square(*pair.levels, pair.layout.level_start, out, occupied)
        return out, np.maximum(occupied - 1, 0)
