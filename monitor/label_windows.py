"""Windows of joined rows: panes of tallies, by rows and by time, that slide by adding and subtracting whole panes.

A row belongs to the pane in which its *label came*: a window is what was learnt lately, whether its predictions are a
minute or a week old. Panes of time begin at whole multiples of their length, so those of several processes line up;
panes of rows are lined up by age. Nothing here reads a clock: times are wall ns. Not thread safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypeAlias

import numpy as np

from monitor.errors import StateError
from monitor.outcomes import LabelSettings
from monitor.performance import Ranking, Scorer, Tally
from monitor.types import Array, Window


@dataclass(slots=True, eq=False)
class Pane:
    """Rows whose labels came in one stretch. ``index``: its place in time, or how many panes were before it."""

    index: int
    tally: Tally
    ranking: Ranking | None
    start_ns: int = 0
    end_ns: int = 0

    @property
    def rows(self) -> int:
        return self.tally.rows

    def add(self, tally: Tally, pairs: tuple[Array, Array] | None, start_ns: int, end_ns: int) -> None:
        """Take rows in whose labels came from ``start_ns`` to ``end_ns``."""
        self.start_ns = min(self.start_ns, start_ns) if self.rows else start_ns
        self.end_ns = max(self.end_ns, end_ns)
        self.tally = self.tally.plus(tally)
        if self.ranking is not None and pairs is not None:
            self.ranking.add(*pairs)


@dataclass(slots=True, eq=False)
class WindowRows:
    """What a window holds. ``full``: it has its whole length; ``look`` numbers the panes closed so far."""

    window: Window
    tally: Tally
    ranking: Ranking | None
    start_ns: int
    end_ns: int
    look: int
    full: bool

    @property
    def rows(self) -> int:
        return self.tally.rows


@dataclass(slots=True, eq=False)
class SeriesState:
    """Closed panes of one series, oldest first, and how many were ever closed.

    ``open``: the pane that is being filled, in a state to go on from; None in one to look at or to merge.
    """

    unit: Literal["rows", "time"]
    pane: int
    closed: int
    panes: list[Pane]
    open: Pane | None = None


#: Panes per series, in the order of the settings' windows.
WindowsState: TypeAlias = list[SeriesState]


class _Series:
    """Panes of one length and the windows made of them."""

    def __init__(self, windows: Sequence[Window], scorer: Scorer, limit: int) -> None:
        self.unit, self.pane = windows[0].unit, windows[0].pane
        self.windows = list(windows)
        self.closed = 0
        self._scorer, self._limit = scorer, limit
        self._panes: deque[Pane] = deque(maxlen=max(window.panes for window in windows))
        self._totals = [scorer.empty() for _ in windows]
        self._open: Pane | None = None

    def _fresh(self, index: int) -> Pane:
        return Pane(index, self._scorer.empty(), Ranking(self._limit) if self._scorer.ranks else None)

    def add(self, predictions: Array, labels: Array, times: Array) -> Iterator[WindowRows]:
        """Take rows in, in order; the windows after each pane that they closed."""
        start = 0
        while start < len(labels):
            index = int(times[start]) // self.pane if self.unit == "time" else self.closed
            if self.unit == "time":
                yield from self.tick(int(times[start]))
            if self._open is None:
                self._open = self._fresh(index)
            end = self._end(times, start)
            part = slice(start, end)
            pairs = self._scorer.pairs(predictions[part], labels[part])
            tally = self._scorer.tally(predictions[part], labels[part])
            self._open.add(tally, pairs, int(times[part].min()), int(times[part].max()))
            start = end
            if self.unit == "rows" and self._open.rows == self.pane:
                yield from self._close()

    def _end(self, times: Array, start: int) -> int:
        """Where the rows that belong to the open pane end; a row older than the pane stays in it."""
        assert self._open is not None  # noqa: S101 - made by the caller
        if self.unit == "rows":
            return min(len(times), start + self.pane - self._open.rows)
        over = np.flatnonzero(times[start:] >= (self._open.index + 1) * self.pane)
        return start + int(over[0]) if len(over) else len(times)

    def tick(self, now_ns: int) -> Iterator[WindowRows]:
        """Close the panes of time that are over at ``now_ns``, the empty ones after the open one too."""
        if self.unit == "rows":
            return
        index = now_ns // self.pane
        while self._open is not None and self._open.index < index:
            following = self._open.index + 1
            yield from self._close()
            if any(pane.rows for pane in self._panes):
                self._open = self._fresh(following)

    def _close(self) -> Iterator[WindowRows]:
        closing, self._open = self._open, None
        if closing is None:
            return
        for place, window in enumerate(self.windows):
            total = self._totals[place].plus(closing.tally)
            if len(self._panes) >= window.panes:
                total = total.plus(self._panes[-window.panes].tally, -1)
            self._totals[place] = total
        self._panes.append(closing)
        self.closed += 1
        yield from self.now()

    def now(self) -> Iterator[WindowRows]:
        """The windows of closed panes as they are."""
        for window, total in zip(self.windows, self._totals, strict=True):
            yield _window(window, total, list(self._panes)[-window.panes :], self.closed)

    def state(self, *, with_open: bool = False) -> SeriesState:
        return SeriesState(self.unit, self.pane, self.closed, list(self._panes), self._open if with_open else None)

    def restore(self, state: SeriesState) -> None:
        """Go on from a state of the same pane and scorer."""
        self._panes.extend(state.panes)
        self.closed, self._open = state.closed, state.open
        for place, window in enumerate(self.windows):
            for pane in state.panes[-window.panes :]:
                self._totals[place] = self._totals[place].plus(pane.tally)

    def check(self, state: SeriesState) -> None:
        """Raises StateError for a state that is of another pane or scorer, or holds too much."""
        empty, panes = self._scorer.empty(), [*state.panes, *([] if state.open is None else [state.open])]
        fits = all(
            pane.tally.counts.shape == empty.counts.shape
            and len(pane.tally.sums) == len(empty.sums)
            and (pane.ranking is not None) == self._scorer.ranks
            for pane in panes
        )
        most = self._panes.maxlen or 0
        if (state.unit, state.pane) != (self.unit, self.pane) or not fits:
            raise StateError("the saved label windows are of other panes or of another task")
        if len(state.panes) > most or state.closed < len(state.panes):
            raise StateError(f"the saved label windows hold {len(state.panes)} panes of {most}")


def _window(window: Window, total: Tally, panes: Sequence[Pane], closed: int) -> WindowRows:
    held = [pane for pane in panes if pane.rows]
    ranking = None
    if panes and panes[0].ranking is not None:
        ranking = Ranking(0)
        for pane in held:
            if pane.ranking is not None:
                ranking.merge(pane.ranking)
    start, end = min((p.start_ns for p in held), default=0), max((p.end_ns for p in held), default=0)
    return WindowRows(window, total, ranking, start, end, closed, closed >= window.panes)


class LabelWindows:
    """All windows of one group's joined rows."""

    def __init__(self, settings: LabelSettings, scorer: Scorer) -> None:
        by_pane: dict[tuple[str, int], list[Window]] = {}
        for window in settings.windows:
            by_pane.setdefault((window.unit, window.pane), []).append(window)
        self._series = [_Series(windows, scorer, settings.exact_rows) for windows in by_pane.values()]

    def add(self, predictions: Array, labels: Array, times: Array) -> list[WindowRows]:
        """Take rows in, in the order their labels came: (n, width), (n,), (n,) wall ns. Each move of each window."""
        return [window for series in self._series for window in series.add(predictions, labels, times)]

    def tick(self, now_ns: int) -> list[WindowRows]:
        """Close what is over by time; each move of each window."""
        return [window for series in self._series for window in series.tick(now_ns)]

    def now(self) -> list[WindowRows]:
        """Every window as it is, the panes that are open apart."""
        return [window for series in self._series for window in series.now()]

    def state(self) -> WindowsState:
        """The closed panes: they are never changed after, so nothing is copied."""
        return [series.state() for series in self._series]

    def unfinished(self) -> WindowsState:
        """The closed panes and the open ones, which change with the next row: to be written down at once."""
        return [series.state(with_open=True) for series in self._series]

    def restore(self, state: WindowsState) -> None:
        """Have windows that hold nothing go on from ``unfinished``. Raises StateError, and then takes nothing."""
        if len(state) != len(self._series):
            raise StateError(f"the saved label windows are {len(state)} series, wanted {len(self._series)}")
        for series, found in zip(self._series, state, strict=True):
            series.check(found)
        for series, found in zip(self._series, state, strict=True):
            series.restore(found)


# --- several processes -----------------------------------------------------------------------------------------------


def merge_windows(states: Sequence[WindowsState]) -> WindowsState:
    """The panes of several processes as one: whole numbers are added, so order and grouping change no bit.

    Raises StateError for none, or for states of other windows.
    """
    if not states:
        raise StateError("there are no label windows to merge")
    shapes = {tuple((series.unit, series.pane) for series in state) for state in states}
    if len(shapes) > 1:
        raise StateError("label windows with other panes cannot be merged")
    return [_merge_series([state[place] for state in states]) for place in range(len(states[0]))]


def _merge_series(parts: Sequence[SeriesState]) -> SeriesState:
    first = parts[0]
    grouped: list[list[Pane]]
    if first.unit == "rows":
        ages = zip_longest(*[reversed(part.panes) for part in parts])
        grouped = [[pane for pane in age if pane is not None] for age in ages][::-1]
    else:
        by_index: dict[int, list[Pane]] = {}
        for pane in [pane for part in parts for pane in part.panes]:
            by_index.setdefault(pane.index, []).append(pane)
        grouped = [by_index[index] for index in sorted(by_index)]
    return SeriesState(first.unit, first.pane, max(p.closed for p in parts), [_merge_panes(g) for g in grouped])


def _merge_panes(panes: Sequence[Pane]) -> Pane:
    held = [pane for pane in panes if pane.rows]
    total, ranking = panes[0].tally, None
    for pane in panes[1:]:
        total = total.plus(pane.tally)
    if panes[0].ranking is not None:
        ranking = Ranking(0)
        for pane in panes:
            if pane.ranking is not None:
                ranking.merge(pane.ranking)
    start, end = min((p.start_ns for p in held), default=0), max((p.end_ns for p in held), default=0)
    return Pane(max(pane.index for pane in panes), total, ranking, start, end)


def windows_of(state: WindowsState, windows: Sequence[Window], scorer: Scorer) -> list[WindowRows]:
    """The windows of a state, own or merged. Raises StateError when it has no panes for one of them."""
    found = []
    for window in windows:
        series = next((s for s in state if (s.unit, s.pane) == (window.unit, window.pane)), None)
        if series is None:
            raise StateError(f"the state has no panes for the window {window.name}")
        newest = series.panes[-1].index if series.panes else 0
        panes = series.panes[-window.panes :]
        if window.unit == "time":
            panes = [pane for pane in panes if pane.index > newest - window.panes]
        total = scorer.empty()
        for pane in panes:
            total = total.plus(pane.tally)
        found.append(_window(window, total, panes, series.closed))
    return found
