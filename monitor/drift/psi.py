"""PSI per column, with its p-value's ingredients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monitor.drift.base import Pair
from monitor.kernels.measures import psi
from monitor.types import Array


@dataclass(slots=True, eq=False)
class PsiScores:
    """``value`` and ``occupied`` bins per column; ``part``: each bin's own summand, by ``layout.bin_start``."""

    value: Array
    part: Array
    occupied: Array


class Psi:
    """Population stability index over the profile's bins, 1/2 added to every count (see ``kernels.measures``)."""

    name = "psi"

    def __init__(self, *, present_only: bool = False) -> None:
        self._leave_out = int(present_only)

    def score(self, pair: Pair) -> Array:
        return self.scores(pair).value

    def scores(self, pair: Pair) -> PsiScores:
        columns = len(pair.layout.columns)
        found = PsiScores(np.empty(columns), np.empty(len(pair.bins[0])), np.empty(columns, "i8"))
        psi(*pair.bins, pair.layout.bin_start, self._leave_out, found.value, found.part, found.occupied)
        return found
