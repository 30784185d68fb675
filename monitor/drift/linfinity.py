"""The largest difference of a level's share, per column."""

from __future__ import annotations

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.distances import l_infinity
from monitor.types import Array


class LInfinity:
    """0..1, over levels."""

    name = "l_infinity"

    def score(self, pair: Pair) -> Array:
        out = np.empty(len(pair.layout.columns))
        l_infinity(*pair.levels, pair.layout.level_start, out)
        return out
