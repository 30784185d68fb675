"""What a drift statistic is, and the pair of samples that all of them are computed from."""

from __future__ import annotations

from typing import Protocol

from monitor.layout import Layout, Sample
from monitor.types import Array, WindowCounts


class Pair:
    """Counts of two samples under one layout: a reference, and a window held against it.

    Either may come from anywhere: the profile, a season, another arm. Of the profile everything is known beforehand.

    All pairs are (reference, window), int64: ``bins`` are counts of the PSI bins, column after column
    (``layout.bin_start``); ``rows`` rows per column, missing ones with them; ``missing`` missing values per column.
    """

    def __init__(self, layout: Layout, reference: Array | Sample, window: Array | WindowCounts) -> None:
        """``reference`` and ``window``: counts of the layout's cells, or what was made of them."""
        self.layout = layout
        if isinstance(reference, Sample):
            self.expected = reference
        else:
            self.expected = layout.profiled if reference is layout.reference else Sample.of(layout, reference)
        if isinstance(window, WindowCounts):
            self.found = Sample(layout, running_in(layout, window))
        else:
            self.found = Sample.of(layout, window)

    @property
    def bins(self) -> tuple[Array, Array]:
        return self.expected.bins, self.found.bins

    @property
    def rows(self) -> tuple[Array, Array]:
        return self.expected.rows, self.found.rows

    @property
    def missing(self) -> tuple[Array, Array]:
        return self.expected.missing, self.found.missing

    @property
    def reference(self) -> Array:
        """int64 counts by cell."""
        return self.expected.counts

    @property
    def window(self) -> Array:
        """int64 counts by cell."""
        return self.found.counts

    @property
    def levels(self) -> tuple[Array, Array]:
        """Counts of levels (``layout.level_start``)."""
        return self.expected.levels, self.found.levels


def running_in(layout: Layout, window: WindowCounts) -> Array:
    """Running sums of the cells that a window holds, without the marks behind them."""
    own = window.held[: layout.cells]
    return own if window.start is not None else Sample.of(layout, own).running


class DriftStatistic(Protocol):
    """A number per column. Counts are merged before they get here, so a statistic has no state."""

    name: str

    def score(self, pair: Pair) -> Array:
        """float64 per column of the layout; NaN where it is undefined."""
        ...
