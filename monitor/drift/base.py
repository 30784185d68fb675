"""What a drift statistic is, and the pair of samples that all of them are computed from."""

from __future__ import annotations

from typing import Protocol

from monitor.layout import Layout, Sample
from monitor.types import Array


class Pair:
    """Counts of two samples under one layout: a reference, and a window held against it.

    Either may come from anywhere: the profile, a season, another arm. Of the profile everything is known beforehand.

    All pairs are (reference, window), int64: ``bins`` are counts of the PSI bins, column after column
    (``layout.bin_start``); ``rows`` rows per column, missing ones with them; ``missing`` missing values per column.
    """

    def __init__(self, layout: Layout, reference: Array, window: Array) -> None:
        self.layout = layout
        self.expected = layout.profiled if reference is layout.reference else Sample(layout, reference)
        self.found = Sample(layout, window)
        self.bins = self.expected.bins, self.found.bins
        self.rows = self.expected.rows, self.found.rows
        self.missing = self.expected.missing, self.found.missing

    @property
    def reference(self) -> Array:
        """int64 counts by cell."""
        return self.expected.cells

    @property
    def window(self) -> Array:
        """int64 counts by cell."""
        return self.found.cells

    @property
    def levels(self) -> tuple[Array, Array]:
        """Counts of levels (``layout.level_start``)."""
        return self.expected.levels, self.found.levels


class DriftStatistic(Protocol):
    """A number per column. Counts are merged before they get here, so a statistic has no state."""

    name: str

    def score(self, pair: Pair) -> Array:
        """float64 per column of the layout; NaN where it is undefined."""
        ...
