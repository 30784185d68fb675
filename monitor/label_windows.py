"""Windows of joined rows: panes of tallies, by rows and by time, that slide by adding and subtracting whole panes.

A window of rows holds those whose labels *came* last: what was learnt lately, whether its predictions are a minute or
a week old. A window of time holds the rows whose *outcome was* in it, which is when the label came unless its caller
said otherwise. So outcomes that are sent once a day are spread over the day that they happened in. A row whose outcome
was in a pane that has been closed, and that a window still holds, is put in there and seen by the window's next look;
one that is older than a window is left out of it and counted as outdated. Only arrivals and ``tick`` move windows on.

Panes of time begin at whole multiples of their length, so those of several processes line up; panes of rows are lined
up by age. Nothing here reads a clock: times are wall ns. Not thread safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, zip_longest
from typing import Literal, TypeAlias

import numpy as np

from monitor.errors import StateError
from monitor.outcomes import LabelSettings
from monitor.performance import Ranking, Scorer, Tally
from monitor.types import SET_BACK_NS, Array, Window


@dataclass(slots=True, eq=False)
class Pane:
    """Rows of one stretch. ``index``: its place in time, or how many panes were before it.

    ``start_ns``, ``end_ns``: of its rows, when their labels came or, in a pane of time, when their outcomes were.
    """

    index: int
    tally: Tally
    ranking: Ranking | None
    start_ns: int = 0
    end_ns: int = 0

    @property
    def rows(self) -> int:
        return self.tally.rows

    def add(self, tally: Tally, pairs: tuple[Array, Array] | None, start_ns: int, end_ns: int) -> None:
        """Take rows in, of ``start_ns`` to ``end_ns``."""
        self.start_ns = min(self.start_ns, start_ns) if self.rows else start_ns
        self.end_ns = max(self.end_ns, end_ns)
        self.tally = self.tally.plus(tally)
        if self.ranking is not None and pairs is not None:
            self.ranking.add(*pairs)

    def copy(self, limit: int) -> Pane:
        """To be added to while the original is read elsewhere. ``limit``: see ``Ranking``."""
        ranking = None
        if self.ranking is not None:
            ranking = Ranking(limit)
            ranking.merge(self.ranking)
        return Pane(self.index, self.tally, ranking, self.start_ns, self.end_ns)


@dataclass(slots=True, eq=False)
class WindowRows:
    """What a window holds. ``full``: it has its whole length; ``look`` numbers the panes closed so far.

    ``outdated``: rows that were too old for it when their label came, ever.
    """

    window: Window
    tally: Tally
    ranking: Ranking | None
    start_ns: int
    end_ns: int
    look: int
    full: bool
    outdated: int = 0

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
    #: By the names of windows of time.
    outdated: dict[str, int] = field(default_factory=dict)


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
        self.outdated = {window.name: 0 for window in windows} if self.unit == "time" else {}

    def _fresh(self, index: int) -> Pane:
        return Pane(index, self._scorer.empty(), Ranking(self._limit) if self._scorer.ranks else None)

    def add(self, predictions: Array, labels: Array, came: Array, times: Array) -> Iterator[WindowRows]:
        """Take rows in, in the order their labels came; the windows after each pane that they closed."""
        start = 0
        while start < len(labels):
            yield from self.tick(int(came[start]))
            if self._open is None:
                self._open = self._fresh(int(came[start]) // self.pane if self.unit == "time" else self.closed)
            end = self._end(came, start)
            part = slice(start, end)
            if self.unit == "rows":
                self._into(self._open, predictions[part], labels[part], came[part])
            else:
                told = times[part] < came[part]
                self._by_time(predictions[part], labels[part], times[part], told)
            start = end
            if self.unit == "rows" and self._open.rows == self.pane:
                yield from self._close()

    def _end(self, came: Array, start: int) -> int:
        """Where the rows that came before the open pane was over end."""
        assert self._open is not None  # noqa: S101 - made by the caller
        if self.unit == "rows":
            return min(len(came), start + self.pane - self._open.rows)
        over = np.flatnonzero(came[start:] >= (self._open.index + 1) * self.pane)
        return start + int(over[0]) if len(over) else len(came)

    def _into(self, pane: Pane, predictions: Array, labels: Array, times: Array) -> Tally:
        tally = self._scorer.tally(predictions, labels)
        pane.add(tally, self._scorer.pairs(predictions, labels), int(times.min()), int(times.max()))
        return tally

    def _by_time(self, predictions: Array, labels: Array, times: Array, told: Array) -> None:
        """Put rows where their outcomes were, those of which nothing was ``told`` into the open pane.

        So a clock that was set back, by which they come before that pane, leaves no row out.
        """
        assert self._open is not None  # noqa: S101 - made by the caller
        indices = np.where(told, np.minimum(times // self.pane, self._open.index), self._open.index)
        for index in np.unique(indices).tolist():
            mine = indices == index
            rows = predictions[mine], labels[mine], times[mine]
            age = self._open.index - index
            if age == 0:
                self._into(self._open, *rows)
            elif age <= (self._panes.maxlen or 0):
                self._amend(age, *rows)
            for window in self.windows:
                self.outdated[window.name] += len(rows[1]) if age > window.panes else 0

    def _amend(self, age: int, predictions: Array, labels: Array, times: Array) -> None:
        """Add rows to the pane that was closed ``age`` panes ago. Who reads the old one keeps it as it was."""
        assert self._open is not None  # noqa: S101 - made by the caller
        while len(self._panes) < age:  # nothing was known of the time before
            self._panes.appendleft(self._fresh(self._open.index - len(self._panes) - 1))
        pane = self._panes[-age].copy(self._limit)
        self._panes[-age] = pane
        tally = self._into(pane, predictions, labels, times)
        for place, window in enumerate(self.windows):
            if age <= window.panes:
                self._totals[place] = self._totals[place].plus(tally)

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
            else:  # panes stand without a gap, and the next may be far from these
                self._panes.clear()

    def follow_clock(self, now_ns: int) -> None:
        """The clock is ``now_ns`` now. Where it was set back by much, panes go on from what it shows.

        What they hold stays in its order, as if it had come just before now.
        """
        newest = [pane for pane in (self._open, self._panes[-1] if self._panes else None) if pane is not None]
        opened = self._open.index * self.pane if self._open is not None and self.unit == "time" else 0
        if max([opened, *[pane.end_ns for pane in newest]]) <= now_ns + SET_BACK_NS:
            return
        by = max(0, opened // self.pane - now_ns // self.pane)
        moved = [_moved(pane, by, now_ns) for pane in self._panes]  # who reads the old ones keeps them as they were
        self._panes.clear()
        self._panes.extend(moved)
        if self._open is not None:
            self._open = _moved(self._open, by, now_ns)

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
            outdated = self.outdated.get(window.name, 0)
            yield _window(window, total, list(self._panes)[-window.panes :], self.closed, outdated)

    def state(self, *, with_open: bool = False) -> SeriesState:
        opened = self._open if with_open else None
        return SeriesState(self.unit, self.pane, self.closed, list(self._panes), opened, dict(self.outdated))

    def restore(self, state: SeriesState) -> None:
        """Go on from a state of the same pane and scorer."""
        self._panes.extend(state.panes)
        self.closed, self._open = state.closed, state.open
        self.outdated |= state.outdated
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
        if self.unit == "time" and any(later.index != pane.index + 1 for pane, later in pairwise(panes)):
            raise StateError("the saved label windows are not of one stretch of time")
        if set(state.outdated) != set(self.outdated):
            raise StateError("the saved label windows are not those of the settings")
        if len(state.panes) > most or (self.unit == "rows" and state.closed < len(state.panes)):
            raise StateError(f"the saved label windows hold {len(state.panes)} panes of {most}")


def _moved(pane: Pane, by: int, now_ns: int) -> Pane:
    """The pane ``by`` places earlier, with nothing after now."""
    start_ns, end_ns = min(pane.start_ns, now_ns), min(pane.end_ns, now_ns)
    return replace(pane, index=pane.index - by, start_ns=start_ns, end_ns=end_ns)


def _window(window: Window, total: Tally, panes: Sequence[Pane], closed: int, outdated: int) -> WindowRows:
    held = [pane for pane in panes if pane.rows]
    ranking = None
    if panes and panes[0].ranking is not None:
        ranking = Ranking(0)
        for pane in held:
            if pane.ranking is not None:
                ranking.merge(pane.ranking)
    start, end = min((p.start_ns for p in held), default=0), max((p.end_ns for p in held), default=0)
    return WindowRows(window, total, ranking, start, end, closed, closed >= window.panes, outdated)


class LabelWindows:
    """All windows of one group's joined rows."""

    def __init__(self, settings: LabelSettings, scorer: Scorer) -> None:
        by_pane: dict[tuple[str, int], list[Window]] = {}
        for window in settings.windows:
            by_pane.setdefault((window.unit, window.pane), []).append(window)
        self._series = [_Series(windows, scorer, settings.exact_rows) for windows in by_pane.values()]

    def add(self, predictions: Array, labels: Array, came: Array, times: Array | None = None) -> list[WindowRows]:
        """Take rows in, in the order their labels came: (n, width), (n,), (n,) wall ns. Each move of each window.

        ``times``: when their outcomes were, as ``came``; None: as they came.
        """
        when = came if times is None else times
        return [window for series in self._series for window in series.add(predictions, labels, came, when)]

    def tick(self, now_ns: int) -> list[WindowRows]:
        """Close what is over by time; each move of each window. Where the clock was set back, all moves with it."""
        for series in self._series:
            series.follow_clock(now_ns)
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
    outdated = {name: sum(part.outdated.get(name, 0) for part in parts) for name in first.outdated}
    closed, panes = max(part.closed for part in parts), [_merge_panes(group) for group in grouped]
    return SeriesState(first.unit, first.pane, closed, panes, outdated=outdated)


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
        found.append(_window(window, total, panes, series.closed, series.outdated.get(window.name, 0)))
    return found
