"""What a drift statistic is, and the pair of samples that all of them are computed from."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import numpy as np

from monitor.layout import Layout
from monitor.types import Array


class Pair:
    """Counts of two samples under one layout: a reference, and a window held against it. int64, by cell.

    Either may come from anywhere: the profile, a season, another arm.
    """

    def __init__(self, layout: Layout, reference: Array, window: Array) -> None:
        self.layout = layout
        self.reference = np.ascontiguousarray(reference, "i8")
        self.window = np.ascontiguousarray(window, "i8")

    @cached_property
    def bins(self) -> tuple[Array, Array]:
        """(reference, window) counts of the PSI bins, column after column (``layout.bin_start``)."""
        window = self.layout.bins.fold(self.window)
        if self.reference is self.layout.reference:
            return self.layout.reference_bins, window
        return self.layout.bins.fold(self.reference), window

    @cached_property
    def levels(self) -> tuple[Array, Array]:
        """The same for levels (``layout.level_start``)."""
        window = self.layout.levels.fold(self.window)
        if self.reference is self.layout.reference:
            return self.layout.reference_levels, window
        return self.layout.levels.fold(self.reference), window

    @cached_property
    def rows(self) -> tuple[Array, Array]:
        """(reference, window) rows per column, missing ones with them."""
        starts = self.layout.bin_start[:-1]
        return np.add.reduceat(self.bins[0], starts), np.add.reduceat(self.bins[1], starts)

    @cached_property
    def missing(self) -> tuple[Array, Array]:
        """(reference, window) missing values per column."""
        last = self.layout.start[1:] - 1
        return self.reference[last], self.window[last]


class DriftStatistic(Protocol):
    """A number per column. Counts are merged before they get here, so a statistic has no state."""

    name: str

    def score(self, pair: Pair) -> Array:
        """float64 per column of the layout; NaN where it is undefined."""
        ...
