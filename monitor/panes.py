"""Counts in panes, and windows that move by adding the newest pane and subtracting the oldest.

One ``PaneStore`` counts one arm under one layout. Rows are counted once, into ``fresh``; when a pane of any series is
full or over, ``fresh`` is added to the open pane of every series and begun anew. (With one series, ``fresh`` is its
open pane.) A pane is never changed after it was closed, and a window is always exactly the sum of its panes. Closed
panes and windows are held as running sums of cells (``kernels.windows``): what a look asks is then read from a few of
them. States have counts. Memory per series: cells x 4 bytes for each pane of the longest window, and cells x 8 bytes
for each window; half of it where panes have at most 65,535 rows, and of the windows a quarter where these have no more
either.

Beside the cells of its layout a store may count *marks*: yes or no per row, as the rules of a schema give. Their counts
follow the cells in every vector.

Windows of time have panes that begin at whole multiples of their length, so those of several processes line up; windows
of rows are lined up by age (the newest pane of each process, the one before, ...).

Nothing here reads a clock: ``now_ns`` is ns since the epoch. Not thread safe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from monitor.errors import StateError
from monitor.kernels.windows import close_pane, enter, span
from monitor.layout import Layout, running_of
from monitor.types import HOUR_NS, SET_BACK_NS, Array, Window, WindowCounts, counts_of

#: Called when a window was moved and holds something to be judged.
OnLook: TypeAlias = Callable[[WindowCounts], None]
#: Called with each closed pane of the first series: (rows, running sums of cells); the sums must not be kept.
OnPane: TypeAlias = Callable[[int, Array], None]

HOURS_OF_WEEK: Final = 168
#: Of no row.
_NO_CELLS: Final = np.empty((0, 0), "u4")
#: Of one pane of time: its counts are int32.
_MOST_ROWS: Final = 2**31 - 1
_OTHER_WINDOWS: Final = "states made with other windows cannot be merged"


@dataclass(slots=True, eq=False)
class SeriesState:
    """Closed panes of one series, oldest first. ``index``: the pane's place in time, or minus its age for rows.

    ``rows``, ``dropped``, ``start_ns``, ``end_ns``: int64 per pane; ``counts`` (panes, cells); ``closed``: how many
    panes were ever closed.
    """

    unit: Literal["rows", "time"]
    pane: int
    closed: int
    index: Array
    rows: Array
    dropped: Array
    start_ns: Array
    end_ns: Array
    counts: Array

    def span(self) -> int:
        """Panes from the first to the last, with those between in which nobody was there."""
        return int(self.index[-1] - self.index[0]) + 1 if len(self.index) else 0

    def window(self, window: Window) -> WindowCounts:
        """The newest panes of a window together, empty when there are none."""
        newest = int(self.index[-1]) if len(self.index) else 0
        own = slice(int(np.searchsorted(self.index, newest - window.panes, "right")), None)
        held = self.rows[own] > 0
        full = self.closed >= window.panes
        rows, dropped = int(self.rows[own].sum()), int(self.dropped[own].sum())
        start = int(self.start_ns[own][held].min()) if held.any() else 0
        end = int(self.end_ns[own][held].max()) if held.any() else 0
        fits = rows <= np.iinfo(self.counts.dtype).max  # then no sum is larger: the faster way
        cells = self.counts[own].sum(axis=0, dtype=self.counts.dtype if fits else "i8").astype("i8", copy=False)
        return WindowCounts(window.name, rows, dropped, start, end, self.closed, full, cells)


@dataclass(slots=True, eq=False)
class ArmState:
    """What one arm's counts are, without the panes that are still open. ``total`` int64: everything ever counted."""

    rows: int
    dropped: int
    refused: int
    total: Array
    series: list[SeriesState]

    def window(self, window: Window) -> WindowCounts:
        for found in self.series:
            if (found.unit, found.pane) == (window.unit, window.pane):
                return found.window(window)
        raise StateError(f"the state has no panes for the window {window.name}")


def recut(state: ArmState, cells: int, size: int) -> ArmState:
    """The state with its first ``cells`` counts of every vector, filled up with zeros to ``size``.

    Raises StateError when a vector has fewer.
    """

    def cut(counts: Array) -> Array:
        if counts.shape[-1] < cells:
            raise StateError("the state has another number of cells than the profile")
        out = np.zeros((*counts.shape[:-1], size), counts.dtype)
        out[..., :cells] = counts[..., :cells]
        return out

    series = [replace(one, counts=cut(one.counts)) for one in state.series]
    return replace(state, total=cut(state.total), series=series)


def store_bytes(cells: int, windows: Sequence[Window]) -> int:
    """Memory that a store of so many cells takes."""
    series = _by_series(windows)
    sizes = [
        pane.itemsize * max(window.panes for window in own) + total.itemsize * len(own)
        for own in series.values()
        for pane, total in [_count_types(own)]
    ]
    fresh = 4 if len(series) > 1 else 0
    return cells * (8 + fresh + 4 * len(series) + sum(sizes))


def _by_series(windows: Sequence[Window]) -> dict[tuple[Literal["rows", "time"], int], list[Window]]:
    """Windows that share their panes, the shortest first."""
    keys = dict.fromkeys([(window.unit, window.pane) for window in windows])
    ordered = sorted(windows, key=lambda window: window.length)
    return {key: [window for window in ordered if (window.unit, window.pane) == key] for key in keys}


def _count_types(windows: Sequence[Window]) -> tuple[np.dtype[Any], np.dtype[Any]]:
    """Of a closed pane's counts and of a window's. As narrow as no count can be more: less to go through."""
    rows = [window for window in windows if window.unit == "rows"]
    pane, length = max([window.pane for window in rows], default=0), max([window.length for window in rows], default=0)
    if not rows or pane > np.iinfo("u2").max or length > np.iinfo("i4").max:
        return np.dtype("i4"), np.dtype("i8")
    return np.dtype("u2"), np.dtype("u2") if length <= np.iinfo("u2").max else np.dtype("i4")


def merge_arms(states: Sequence[ArmState]) -> ArmState:
    """The counts of several processes together: sums of integers, the same in any order and grouping.

    Raises StateError for those of other panes.
    """
    if len({len(state.series) for state in states}) > 1:
        raise StateError(_OTHER_WINDOWS)
    series = [_merge_series([state.series[place] for state in states]) for place in range(len(states[0].series))]
    return ArmState(
        sum(state.rows for state in states),
        sum(state.dropped for state in states),
        sum(state.refused for state in states),
        np.sum([state.total for state in states], axis=0, dtype="i8"),
        series,
    )


def _merge_series(parts: Sequence[SeriesState]) -> SeriesState:
    first = parts[0]
    if any((part.unit, part.pane) != (first.unit, first.pane) for part in parts):
        raise StateError(_OTHER_WINDOWS)
    index = np.unique(np.concatenate([part.index for part in parts]))
    cells = first.counts.shape[1]
    far = np.iinfo("i8")
    merged = SeriesState(
        first.unit,
        first.pane,
        max(part.closed for part in parts),
        index,
        np.zeros(len(index), "i8"),
        np.zeros(len(index), "i8"),
        np.full(len(index), far.max),
        np.full(len(index), far.min),
        np.zeros((len(index), cells), "i8"),
    )
    for part in parts:
        at = np.searchsorted(index, part.index)
        merged.rows[at] += part.rows
        merged.dropped[at] += part.dropped
        held = at[part.rows > 0]  # an empty pane has no times
        merged.start_ns[held] = np.minimum(merged.start_ns[held], part.start_ns[part.rows > 0])
        merged.end_ns[held] = np.maximum(merged.end_ns[held], part.end_ns[part.rows > 0])
        merged.counts[at] += part.counts
    merged.start_ns[merged.rows == 0] = merged.end_ns[merged.rows == 0] = 0
    merged.closed = max(merged.closed, merged.span())  # as of one process that was there throughout
    return merged


class _Series:
    """Panes of one length, in a ring, and the windows made of them."""

    def __init__(self, unit: Literal["rows", "time"], pane: int, windows: Sequence[Window], start: Array) -> None:
        """``windows``: the shortest first. ``start``: where the columns of a vector begin, and its end."""
        self._start = start
        cells = int(start[-1])
        self.unit: Literal["rows", "time"] = unit
        self.pane = pane
        self.windows = windows
        self.capacity = windows[-1].panes
        self.limit = pane if unit == "rows" else _MOST_ROWS  # rows of a pane
        self.closed = 0
        self.filled = 0  # panes that had rows, or dropped some, when they were closed
        self.rows = 0  # of the open pane
        self.index = -1  # of the open pane; -1: no row or tick has come
        self.start_ns = 0
        self.end_ns = 0
        self._dropped = 0
        self.opened = np.zeros(cells, "i4")
        of_pane, of_window = _count_types(windows)
        #: Per pane of the ring: rows, dropped, start, end, index.
        self._facts = np.zeros((self.capacity, 5), "i8")
        self._lengths = np.array([window.panes for window in self.windows])
        #: Per window, what ``span`` tells.
        self._spans = np.zeros((len(windows), 4), "i8")
        self._span = partial(span, self._facts, self._lengths, self._spans)
        self._hold(np.zeros((self.capacity, cells), of_pane), np.zeros((len(windows), cells), of_window))

    def _hold(self, panes: Array, sums: Array) -> None:
        """Have these as the ring of closed panes, and as the windows."""
        self._panes, self._sums = panes, sums
        self._held = [(own.name, own.panes, total) for own, total in zip(self.windows, sums, strict=True)]
        self._move = partial(close_pane, self.opened, self._start, panes, self._lengths, sums)

    def begin(self, rows: int, first_ns: int, now_ns: int) -> bool:
        """Rows came, not more than there is room for. Whether they close the open pane."""
        self.start_ns = min(self.start_ns, first_ns) if self.rows else first_ns
        self.end_ns = max(self.end_ns, now_ns)
        self.rows += rows
        return self.rows == self.limit and self.unit == "rows"

    def drop(self, rows: int) -> None:
        self._dropped += rows

    def close(self, cells: Array = _NO_CELLS, first: int = 0, last: int = 0) -> Array:
        """Close the open pane and move the windows. The pane's running sums, valid until the next close.

        The rows ``first`` <= i < ``last`` of ``cells`` (``Layout.search``) are its last, and not in ``opened``.
        """
        closed, rows, facts = self.closed, self.rows, self._facts
        self._move(closed, rows == last - first, cells, first, last)
        slot = closed % self.capacity
        facts[slot, 0], facts[slot, 1] = rows, self._dropped  # a fraction of what a tuple takes
        facts[slot, 2], facts[slot, 3], facts[slot, 4] = self.start_ns, self.end_ns, self.index
        self.closed = closed + 1
        self.filled += rows + self._dropped > 0
        self.index += 1
        self.rows = self._dropped = self.start_ns = self.end_ns = 0
        pane: Array = self._panes[slot]
        return pane

    def looks(self) -> list[WindowCounts]:
        """The windows as they are now; what they hold are views that the next close changes."""
        closed, start = self.closed, self._start
        self._span(closed)
        return [
            WindowCounts(name, rows, dropped, first, last, closed, closed >= panes, total, start)
            for (name, panes, total), (rows, dropped, first, last) in zip(self._held, self._spans.tolist(), strict=True)
        ]

    def newest(self, panes: int) -> Array:
        """Running sums of the newest closed panes, at most ``capacity``, together. Not to be changed."""
        if panes == self.capacity:  # those of the longest window
            return np.asarray(self._sums[-1])
        return np.asarray(self._panes[self._slots(panes)].sum(axis=0, dtype="i8"))

    def newest_ns(self) -> int:
        """When the newest row of closed panes came."""
        return int(self._facts[:, 3].max())

    def _slots(self, panes: int) -> Array:
        """Ring places of the newest closed panes, oldest first."""
        held = min(self.closed, panes)
        return np.arange(self.closed - held, self.closed) % self.capacity

    def skip_to(self, index: int) -> None:
        """Forget everything: no row came for longer than the longest window."""
        self.closed += index - self.index
        self.index = index
        self._panes[:] = 0
        self._facts[:] = 0
        self._facts[:, 4] = (index - 1) - (self.closed - 1 - np.arange(self.capacity)) % self.capacity
        self._sums[:] = 0

    def latest_ns(self) -> int:
        """The latest time that is known here: of a row, or of the open pane's beginning."""
        opened = self.index * self.pane if self.unit == "time" else 0
        return max(opened, self.end_ns, self.newest_ns())

    def set_back(self, now_ns: int) -> None:
        """The clock was set back to ``now_ns``: panes of time move with it, and nothing came after now."""
        if self.unit == "time" and self.index >= 0:
            by = max(0, self.index - now_ns // self.pane)
            self.index -= by
            self._facts[:, 4] -= by
        self._facts[:, 2:4] = np.minimum(self._facts[:, 2:4], now_ns)
        self.start_ns, self.end_ns = min(self.start_ns, now_ns), min(self.end_ns, now_ns)

    def state(self) -> SeriesState:
        slots = self._slots(self.capacity)
        facts = self._facts[slots]
        index = facts[:, 4] if self.unit == "time" else np.arange(1 - len(slots), 1)
        rows, dropped, start, end = (np.ascontiguousarray(facts[:, place]) for place in range(4))
        counts = np.empty((len(slots), self._panes.shape[1]), "i4")
        for place, slot in enumerate(slots.tolist()):
            counts[place] = counts_of(self._panes[slot], self._start)
        return SeriesState(self.unit, self.pane, self.closed, index.copy(), rows, dropped, start, end, counts)

    def restore(self, state: SeriesState) -> None:
        """For a series that has counted nothing."""
        if state.span() < min(state.closed, self.capacity):
            raise StateError("the state has fewer panes than its windows need")
        if self.unit == "rows" and state.rows.max(initial=0) > self.pane:  # merged: of several processes
            self._hold(self._panes.astype("i4"), self._sums.astype("i8"))
        if state.rows.max(initial=0) > _MOST_ROWS:
            raise StateError(f"a pane of the state has {state.rows.max()} rows, over the limit of {_MOST_ROWS}")
        newest = int(state.index[-1]) if len(state.index) else 0
        recent = slice(int(np.searchsorted(state.index, newest - self.capacity, "right")), None)
        ages = newest - state.index[recent]
        self.closed = max(state.closed, int(ages.max(initial=-1)) + 1)
        held = min(self.closed, self.capacity)
        self._facts[self._slots(held), 4] = newest - np.arange(held)[::-1]
        slots = (self.closed - 1 - ages) % self.capacity  # merged: in some panes of time nobody may have been there
        for slot, counts in zip(slots.tolist(), state.counts[recent], strict=True):
            self._panes[slot] = running_of(counts, self._start)
        columns = (state.rows, state.dropped, state.start_ns, state.end_ns)
        self._facts[slots, :4] = np.stack([column[recent] for column in columns], axis=1)
        if self.unit == "time" and held:
            self.index = newest + 1
        for place, window in enumerate(self.windows):
            self._sums[place] = self._panes[self._slots(min(window.panes, held))].sum(axis=0, dtype=self._sums.dtype)


class PaneStore:
    """Counts of one arm. ``on_look`` is called for each window that a closed pane moved and that is to be judged."""

    def __init__(
        self,
        layout: Layout,
        windows: Sequence[Window],
        *,
        min_rows: int = 1,
        on_look: OnLook | None = None,
        on_pane: OnPane | None = None,
        on_fresh: Callable[[Array, int, int], None] | None = None,
        marks: int = 0,
    ) -> None:
        self.layout = layout
        self._size = layout.cells + marks
        self.rows = 0
        self.dropped = 0
        self.refused = 0
        self._min_rows = min_rows
        self._on_look = on_look
        self._on_pane = on_pane
        self._on_fresh = on_fresh
        self._now_ns = 0
        self._restored_ns = 0  # no row, and no pane's beginning, is later than both
        #: Each mark is a column of one cell.
        start = np.append(layout.start, np.arange(layout.cells + 1, self._size + 1))
        self._series = [_Series(*key, own, start) for key, own in _by_series(windows).items()]
        self._alone = len(self._series) == 1 and on_fresh is None
        self._fresh = self._series[0].opened if self._alone else np.zeros(self._size, "i4")
        self._fresh_rows = 0
        self._start = start
        #: Everything ever counted, as running sums, but for what the first series holds of later panes than its first
        #: ``_settled``.
        self._total = np.zeros(self._size, "i8")
        self._settled = 0

    def add(
        self,
        matrices: Sequence[Array],
        rows: int,
        now_ns: int,
        first_ns: int = -1,
        marks: Array | None = None,
    ) -> None:
        """Count rows: one matrix per tensor of the layout (``TensorPlan.rows_of``), all with ``rows`` rows.

        They came between ``first_ns`` (default: the same) and ``now_ns``, which lie in one pane of time. ``marks``:
        bool (rows, marks), where the store has any.
        """
        self.tick(now_ns)
        done = 0
        for cells in self.layout.search(matrices, rows):
            own = None if marks is None else marks[done : done + cells.shape[1]]
            self._count(cells, now_ns, first_ns if first_ns >= 0 else now_ns, own)
            done += cells.shape[1]

    def _count(self, cells: Array, now_ns: int, first_ns: int, marks: Array | None) -> None:
        """``cells``: of each row, as ``Layout.search`` gives them."""
        done, rows = 0, cells.shape[1]
        while done < rows:
            new = rows - done
            for series in self._series:
                new = min(new, series.limit - series.rows)
            if not new:  # a pane of time is full, and does not end before its time
                self.drop(rows - done)
                return
            end = done + new
            if marks is not None:
                self._fresh[self.layout.cells :] += marks[done:end].sum(axis=0, dtype="i4")
            self.rows += new
            self._fresh_rows += new
            due = [series for series in self._series if series.begin(new, first_ns, now_ns)]
            if self._alone and due:  # what closes a pane goes into it at once
                self._close(due, cells, done, end)
            else:
                enter(cells, done, end, self._start, self._fresh)
                self._close(due)
            done = end

    def drop(self, rows: int) -> None:
        """Rows that were offered but are not counted: the open panes are marked as sampled."""
        self.dropped += rows
        for series in self._series:
            series.drop(rows)

    def refuse(self, rows: int) -> None:
        """Rows whose contents do not have the shape of the profile."""
        self.refused += rows

    def tick(self, now_ns: int) -> None:
        """Close the panes of time that are over. Time never runs backwards here: an earlier ``now_ns`` does nothing."""
        if now_ns < self._now_ns:
            return
        self._now_ns = now_ns
        for series in self._series:
            if series.unit == "time":
                self._pass_time(series, now_ns // series.pane)

    def follow_clock(self, now_ns: int) -> None:
        """The clock is ``now_ns`` now. Where it was set back by much, panes of time go on from what it shows.

        What they hold stays in its order, as if it had come just before now.
        """
        by = now_ns + SET_BACK_NS
        if self._now_ns <= by and (self._restored_ns <= by or self._latest_ns() <= by):
            return
        self.flush()
        for series in self._series:
            series.set_back(now_ns)
        self._now_ns = now_ns

    def _latest_ns(self) -> int:
        return max([series.latest_ns() for series in self._series])

    def _pass_time(self, series: _Series, index: int) -> None:
        if series.index < 0:
            series.index = index
        if index - series.index > series.capacity:
            self._close([series])
            if series is self._series[0]:
                self._settle()
                self._settled += index - series.index
            series.skip_to(index)
        while series.index < index:
            self._close([series])

    def _close(self, due: Sequence[_Series], cells: Array = _NO_CELLS, first: int = 0, last: int = 0) -> None:
        """``cells``: as for ``_Series.close``, where there is but one series."""
        if not due:
            return
        self.flush()
        for one in due:
            pane_rows = one.rows
            if one is self._series[0] and one.closed - self._settled == one.capacity:
                self._settle()
            pane = one.close(cells, first, last)
            if self._on_pane is not None and one is self._series[0]:
                self._on_pane(pane_rows, pane)
            if self._on_look is not None:
                for counts in one.looks():
                    if counts.rows >= self._min_rows and (counts.full or one.unit == "time"):
                        self._on_look(counts)

    def _settle(self) -> None:
        """Add to the total what it lacks of the closed panes, before the ring forgets them."""
        first = self._series[0]
        self._total += first.newest(first.closed - self._settled)
        self._settled = first.closed

    def flush(self) -> None:
        """Give the fresh rows to the open pane of every series, and to whoever listens for them."""
        if self._alone or not self._fresh_rows:
            return
        for series in self._series:
            series.opened += self._fresh
        if self._on_fresh is not None:
            self._on_fresh(self._fresh, self._fresh_rows, self._now_ns)
        self._fresh[:] = 0
        self._fresh_rows = 0

    def windows(self) -> dict[str, WindowCounts]:
        """All windows as they are now, by name; what they hold are views that the next close changes."""
        return {counts.window: counts for series in self._series for counts in series.looks()}

    def newest_ns(self) -> int:
        """When the newest row of closed panes came; 0 when there is none."""
        return max([series.newest_ns() for series in self._series])

    def progress(self) -> tuple[int, ...]:
        """Another one when rows came or were dropped, or a pane was closed for which they did."""
        return (self.rows, self.dropped, self.refused, *[series.filled for series in self._series])

    def state(self) -> ArmState:
        """A copy of all counts but those of open panes; ``total`` and the rows have everything."""
        self.flush()
        self._settle()
        total = counts_of(self._total, self._start) + self._series[0].opened
        return ArmState(self.rows, self.dropped, self.refused, total, [series.state() for series in self._series])

    def restore(self, state: ArmState) -> None:
        """Go on from a state of the same layout and windows. Raises StateError when it is of others."""
        mine = [(series.unit, series.pane) for series in self._series]
        if [(series.unit, series.pane) for series in state.series] != mine:
            raise StateError("the state was made with other windows")
        if any(array.shape[-1] != self._size for array in (state.total, *[s.counts for s in state.series])):
            raise StateError("the state has another number of cells than the profile and the schema")
        self.rows, self.dropped, self.refused = state.rows, state.dropped, state.refused
        self._total = running_of(state.total, self._start)
        for series, saved in zip(self._series, state.series, strict=True):
            series.restore(saved)
        self._restored_ns = self._latest_ns()
        self._settled = self._series[0].closed


class Seasonal:
    """Past traffic as a reference: the same hour of last week, or the last week without the current hour.

    One vector of counts per hour of the week, cells x 4 bytes each. ``reference`` is None until there are enough rows:
    then the profile is used.
    """

    def __init__(self, mode: Literal["trailing_week", "hour_of_week"], cells: int, min_rows: int) -> None:
        self._mode = mode
        self._min_rows = min_rows
        self._hour = -1
        self._current = np.zeros(cells, "i4")
        self._slots = np.zeros((HOURS_OF_WEEK, cells), "i4")
        self._rows = np.zeros(HOURS_OF_WEEK, "i8")
        self._written = np.full(HOURS_OF_WEEK, -1, "i8")  # the hour that a slot holds
        self._current_rows = 0
        self._reference: Array | None = None

    def add(self, fresh: Array, rows: int, now_ns: int) -> None:
        """Counts that were made by ``now_ns``."""
        self._turn(now_ns // HOUR_NS)
        self._current += fresh
        self._current_rows += rows

    def follow_clock(self, now_ns: int) -> None:
        """The clock is ``now_ns`` now: where it was set back by much, the hour is the one that it shows."""
        if self._hour * HOUR_NS > now_ns + SET_BACK_NS:
            before = self._reference
            self._begin(now_ns // HOUR_NS)
            if self._reference is None:  # that of last week is no more where the hour was over: the nearest is used
                self._reference = before

    def reference(self, now_ns: int) -> Array | None:
        """int64 counts to hold a window that ends now against, or None. Not to be changed."""
        self._turn(now_ns // HOUR_NS)
        return self._reference

    def _turn(self, hour: int) -> None:
        if hour <= self._hour:
            return
        if self._hour >= 0:
            slot = self._hour % HOURS_OF_WEEK
            if self._written[slot] != self._hour:  # else the clock was set back into an hour that was over
                self._slots[slot] = self._rows[slot] = 0
            self._slots[slot] += self._current
            self._rows[slot] += self._current_rows
            self._written[slot] = self._hour
        self._current[:] = 0
        self._current_rows = 0
        self._begin(hour)

    def _begin(self, hour: int) -> None:
        """Rows are of this hour from now on, and held against what it is to be held against."""
        self._hour = hour
        if self._mode == "hour_of_week":
            own = self._written == hour - HOURS_OF_WEEK
        else:
            own = (self._written >= hour - HOURS_OF_WEEK) & (self._written >= 0)
        enough = int(self._rows[own].sum()) >= self._min_rows
        self._reference = self._slots[own].sum(axis=0, dtype="i8") if enough else None

    def state(self) -> tuple[Array, Array, Array]:
        """(slots, rows, hours written): copies; the current hour is left out."""
        return self._slots.copy(), self._rows.copy(), self._written.copy()

    def restore(self, slots: Array, rows: Array, written: Array) -> None:
        if slots.shape != self._slots.shape or rows.shape != self._rows.shape or written.shape != self._written.shape:
            raise StateError("the seasonal reference was made with another profile")
        self._slots, self._rows, self._written = slots.astype("i4"), rows.astype("i8"), written.astype("i8")
        self._hour = -1
