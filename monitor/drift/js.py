"""The Jensen-Shannon distance per column."""

from __future__ import annotations

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.distances import jensen_shannon
from monitor.types import Array


class JensenShannon:
    """Root of the divergence in bits, 0..1, over levels."""

    name = "js"

    def score(self, pair: Pair) -> Array:
        out = np.empty(len(pair.layout.columns))
        jensen_shannon(*pair.levels, pair.layout.level_start, out)
        return out
