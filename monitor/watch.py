"""One model version under watch: from batches of rows to counts, looks, alarms and reports.

Rows are counted arm by arm in panes; a window is looked at whenever one of its panes is closed. Beside that, each only
when configured: the rules of a schema mark rows, the rows of each segment are counted a second time in panes of their
own, and the newest rows are kept.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from monitor.calibration import Calibration, Inflation
from monitor.errors import NotCounted, ProfileMismatch, SettingsError, StateError
from monitor.history import AlarmHistory
from monitor.judging import Judge
from monitor.layout import Block, Layout
from monitor.panes import ArmState, PaneStore, Seasonal, recut, store_bytes
from monitor.profile import ReferenceProfile
from monitor.sample import RowSample
from monitor.schema import marks
from monitor.state import MonitorState
from monitor.tap import Batches, Contents, Item, Key, Tap, are_whole
from monitor.types import (
    BYTES,
    STABLE,
    Alarm,
    Array,
    DriftReport,
    Parts,
    Settings,
    Window,
    WindowCounts,
    WindowFigures,
    WindowReport,
)

#: Rows counted in one go.
BLOCK_ROWS: Final = 4096

OnAlarm: TypeAlias = Callable[["Monitor", Alarm], None]


class _Arm:
    """Counts of one arm and of its segments, and how much its rows depend on each other."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self.name = name
        self.segments: dict[str, PaneStore] = {}
        self.inflation = Inflation(monitor.layout)
        self._cells = monitor.layout.cells
        self._seasonal = monitor.seasonal if name == STABLE else None
        self.store = PaneStore(
            monitor.layout,
            monitor.settings.windows,
            min_rows=monitor.settings.rules.min_rows,
            on_look=lambda counts: monitor._look(name, counts),
            on_pane=self._pane,
            on_fresh=self._fresh if self._seasonal is not None else None,
            marks=len(monitor.judge.rules),
        )

    def _pane(self, rows: int, pane: Array) -> None:
        if rows:
            self.inflation.add(pane[: self._cells])

    def _fresh(self, fresh: Array, rows: int, now_ns: int) -> None:
        if self._seasonal is not None:
            self._seasonal.add(fresh[: self._cells], rows, now_ns)


class Monitor:
    """Watches one model version under one profile. Making one compiles the kernels: never do it in a request.

    Raises SettingsError or ProfileMismatch when the settings or the calibration do not fit the profile. All methods may
    be called from any thread but the request path.
    ``on_alarm`` is called on the thread that counts, with the monitor's lock held: it must only hand the alarm on.
    """

    def __init__(
        self,
        model: str,
        version: str,
        profile: ReferenceProfile,
        settings: Settings | None = None,
        *,
        calibration: Calibration | None = None,
        on_alarm: OnAlarm | None = None,
    ) -> None:
        self.model, self.version = model, version
        self.settings = settings or Settings()
        self.layout = Layout(profile)
        self.sha256 = self.layout.sha256
        self.judge = Judge(self.layout, self.settings, calibration)
        self.seasonal = _seasonal(self.settings, self.layout)
        self._sample = _sample(self.settings, self.layout)
        self._max_segments = _most_segments(self.settings, self.layout)
        self.keys: tuple[Key, ...] = tuple([(plan.source, plan.name) for plan in self.layout.tensors])
        #: Rows of arms over ``settings.max_arms``.
        self.refused_arms = 0
        #: Rows that no segment has counted, since its memory was used up.
        self.refused_segments = 0
        self._on_alarm = on_alarm
        self._arms: dict[str, _Arm] = {}
        self._past = AlarmHistory(Alarm)
        self._lock = threading.Lock()
        panes = [window.pane for window in self.settings.windows if window.unit == "time"]
        self._quantum_ns = math.gcd(*panes) if panes else 0

    # --- counting --------------------------------------------------------------------------------------------------

    def tap(self, inputs: Sequence[str], outputs: Sequence[str], *, wake: Callable[[], object] | None = None) -> Tap:
        """A tap for one thread that runs this version's batches; names are the model's tensors in spec order.

        Raises ProfileMismatch when the model lacks a tensor of the profile.
        """
        places = {"input": {n: i for i, n in enumerate(inputs)}, "output": {n: i for i, n in enumerate(outputs)}}
        chosen: dict[str, list[tuple[str, int, bool]]] = {"input": [], "output": []}
        for plan in self.layout.tensors:
            place = places[plan.source].get(plan.name)
            if place is None:
                raise ProfileMismatch(
                    f"the profile of {self.model}:{self.version} watches the {plan.source} '{plan.name}', but the "
                    f"model's {plan.source}s are {', '.join(places[plan.source]) or 'none'}"
                )
            chosen[plan.source].append((plan.name, place, plan.datatype == BYTES))
        rows, size = self.settings.ring_rows, self.settings.ring_bytes
        return Tap(
            chosen["input"], chosen["output"], max_rows=rows, max_bytes=size, wake_bytes=(size + 1) // 2, wake=wake
        )

    def ingest(self, keys: Sequence[Key], items: Sequence[Item]) -> int:
        """``count`` of batches that come from no tap."""
        return self.count(keys, Batches.of(items))

    def count(self, keys: Sequence[Key], batches: Batches, arm: str | None = None, offset_ns: int = 0) -> int:
        """Count batches taken from a tap with these ``keys``, in order; rows counted. ``arm`` overrides the batches'.

        Their times are wall ns, when ``offset_ns`` is added. Raises ProfileMismatch when a monitored tensor is not
        among the keys, and NotCounted after all batches when some run of them failed; its rows are refused.
        """
        order = self._order(keys)
        counted = failed = 0
        cause: Exception | None = None
        with self._lock:
            for name, run in self._runs(batches, arm, offset_ns):
                try:
                    counted += self._count(name, order, run, offset_ns)
                except Exception as error:  # noqa: BLE001 - the boundary of a run: the others are counted
                    cause = cause or error
                    failed += self._refuse(name, sum(run.rows))
        if cause is not None:
            what = f"{failed} rows of {self.model}:{self.version} were not counted: {cause}"
            raise NotCounted(what, sum(batches.rows) - counted) from cause
        return counted

    def _refuse(self, name: str, rows: int) -> int:
        arm = self._arm(name)
        if arm is not None:
            arm.store.refuse(rows)
        return rows

    def check_keys(self, keys: Sequence[Key]) -> None:
        """Raises ProfileMismatch when a tap with these keys does not take every tensor of the profile."""
        self._order(keys)

    def _order(self, keys: Sequence[Key]) -> list[int]:
        found = {key: place for place, key in enumerate(keys)}
        if not set(self.keys) <= set(found):
            absent = sorted(f"{source} '{name}'" for source, name in set(self.keys) - set(found))
            raise ProfileMismatch(f"the traffic does not carry {', '.join(absent)} of the profile")
        return [found[key] for key in self.keys]

    def _runs(self, batches: Batches, arm: str | None, offset_ns: int) -> Iterator[tuple[str, Batches]]:
        """Consecutive batches of one arm and one pane of time, about ``BLOCK_ROWS`` rows at a time."""
        if not batches.rows:
            return
        if self._is_one(batches, arm, offset_ns):
            yield arm or batches.arms[0], batches
            return

        def key(place: int) -> tuple[str, int]:
            pane = (batches.times[place] + offset_ns) // self._quantum_ns if self._quantum_ns else 0
            return arm or batches.arms[place], pane

        for (name, _), group in groupby(range(len(batches.rows)), key):
            places = list(group)
            first, rows = places[0], 0
            for place in places:
                if rows >= BLOCK_ROWS:
                    yield name, batches.part(first, place)
                    first, rows = place, 0
                rows += batches.rows[place]
            yield name, batches.part(first, places[-1] + 1)

    def _is_one(self, batches: Batches, arm: str | None, offset_ns: int) -> bool:
        """Whether the usual holds: one arm, one pane of time, not too many rows. Cheaper than to find out by groups."""
        if arm is None and batches.arms.count(batches.arms[0]) < len(batches.arms):
            return False
        if self._quantum_ns:
            first, last = min(batches.times) + offset_ns, max(batches.times) + offset_ns
            if first // self._quantum_ns != last // self._quantum_ns:
                return False
        return sum(batches.rows) - batches.rows[-1] < BLOCK_ROWS

    def _count(self, name: str, order: Sequence[int], run: Batches, offset_ns: int) -> int:
        rows = sum(run.rows)
        arm = self._arm(name)
        if arm is None:
            self.refused_arms += rows
            return 0
        contents = _contents(order, run.data)
        read = self.layout.read(contents, rows) if contents is not None and self._is_whole(order, run) else None
        if read is not None:
            self._add(arm, read, run, offset_ns)
            return rows
        if len(run.rows) == 1:
            arm.store.refuse(rows)
            return 0
        return sum([self._count(name, order, run.part(k, k + 1), offset_ns) for k in range(len(run.rows))])

    def _is_whole(self, order: Sequence[int], run: Batches) -> bool:
        """Whether every batch has the contents of its rows: too many in one must not make up for too few in another."""
        plans = zip(self.layout.tensors, order, strict=True)
        return all(are_whole(run.data[place], run.rows, plan.row_size) for plan, place in plans)

    def _add(self, arm: _Arm, block: Block, run: Batches, offset_ns: int) -> None:
        first_ns, last_ns = min(run.times) + offset_ns, max(run.times) + offset_ns
        rules = self.judge.rules
        marked = marks(rules, block) if rules else None
        arm.store.add(block.matrices, block.rows, last_ns, first_ns, marked)
        if self.judge.cutter is not None:
            self._add_segments(arm, block, last_ns, first_ns, self.judge.cutter.codes(block))
        if self._sample is not None:
            stamps = np.repeat(np.array(run.times, "i8") + offset_ns, run.rows)
            self._sample.add(arm.name, stamps, block)

    def _add_segments(self, arm: _Arm, block: Block, now_ns: int, first_ns: int, codes: Array) -> None:
        for code in np.unique(codes[codes >= 0]).tolist():
            own = np.flatnonzero(codes == code)
            store = self._segment(arm, self._segment_names()[code])
            if store is None:
                self.refused_segments += len(own)
            else:
                store.add([matrix[own] for matrix in block.matrices], len(own), now_ns, first_ns)

    def _segment_names(self) -> tuple[str, ...]:
        return () if self.judge.cutter is None else self.judge.cutter.names

    def _segment(self, arm: _Arm, name: str) -> PaneStore | None:
        """The segment's counts, made at its first row; None when their memory is used up."""
        if name in arm.segments:
            return arm.segments[name]
        if sum([len(other.segments) for other in self._arms.values()]) >= self._max_segments:
            return None
        found = arm.segments[name] = PaneStore(
            self.layout,
            self.settings.windows,
            min_rows=self.settings.rules.min_rows,
            on_look=lambda counts: self._say(self.judge.look_segment(arm.name, name, counts)),
        )
        return found

    def drop(self, arm: str, rows: int) -> None:
        """Rows that a tap dropped: counted, and the open panes marked as sampled."""
        with self._lock:
            found = self._arm(arm)
            if found is not None:
                found.store.drop(rows)

    def tick(self, now_ns: int) -> None:
        """Close the panes of time that are over at ``now_ns`` (wall), whether rows came or not.

        Where the clock was set back, windows of time go on from what it shows.
        """
        with self._lock:
            for arm in self._arms.values():
                for store in (arm.store, *arm.segments.values()):
                    store.follow_clock(now_ns)
                    store.tick(now_ns)
            if self.seasonal is not None:
                self.seasonal.follow_clock(now_ns)

    def _arm(self, name: str) -> _Arm | None:
        found = self._arms.get(name)
        if found is None and len(self._arms) < self.settings.max_arms:
            found = self._arms[name] = _Arm(self, name)
        return found

    def _look(self, arm: str, counts: WindowCounts) -> None:
        self._say(self.judge.look_at_all(arm, counts, self._reference(counts.end_ns)))

    def _say(self, alarms: Iterable[Alarm]) -> None:
        for alarm in alarms:
            self._past.add(alarm)
            if self._on_alarm is not None:
                self._on_alarm(self, alarm)

    def _reference(self, now_ns: int) -> Array | None:
        return self.seasonal.reference(now_ns) if self.seasonal is not None else None

    # --- reading ---------------------------------------------------------------------------------------------------

    def report(self) -> DriftReport:
        """Every window of every arm, and of every segment, as it is now."""
        with self._lock:
            state = self._state()
            inflation = {name: arm.inflation.estimate() for name, arm in self._arms.items()}
            report = self.judge.report(state, reference=self._reference(_newest(state)), inflation=inflation)
            return replace(report, warnings=(*report.warnings, *self._bounds_reached()))

    def figures(self) -> tuple[WindowFigures, ...]:
        """What is exported of every window of every arm, as it is now: a part of ``report``, without its price."""
        with self._lock:
            stores = {name: self._arms[name].store for name in sorted(self._arms)}
            for store in stores.values():
                store.flush()
            reference = self._reference(max([store.newest_ns() for store in stores.values()], default=0))
            return tuple(
                [
                    self.judge.figures(name, windows[window.name], reference)
                    for name, store in stores.items()
                    for windows in [store.windows()]
                    for window in self.settings.windows
                ]
            )

    def _bounds_reached(self) -> list[str]:
        found = []
        if self.refused_arms:
            found.append(
                f"{self.refused_arms} rows of arms over the bound of {self.settings.max_arms} were not counted"
            )
        if self.refused_segments:
            found.append(
                f"{self.refused_segments} rows were not counted by segment: the bound on its memory allows "
                f"{self._max_segments} segments over all arms"
            )
        return found

    def distributions(self, arm: str = STABLE, window: str | None = None) -> dict[str, Any]:
        """The bins of each column in one window (by name; the longest when None) and in the reference.

        Raises StateError when the arm was never seen or there is no such window.
        """
        with self._lock:
            state = self._state()
            counts = self._counted(arm).window(self._window(window))
            return self.judge.distributions(arm, counts, self._reference(_newest(state)))

    def _window(self, name: str | None) -> Window:
        if name is None:
            return max(self.settings.windows, key=lambda window: window.length)
        for window in self.settings.windows:
            if window.name == name:
                return window
        names = ", ".join(window.name for window in self.settings.windows)
        raise StateError(f"there is no window '{name}'; there are {names}")

    def history(self, arm: str | None = None, column: str | None = None, last: int | None = None) -> dict[str, Any]:
        """PSI, KS and p of the newest looks, with their thresholds, ready for JSON; see ``Judge.history``."""
        with self._lock:
            found = self.judge.history(arm, column, last)
        return {"model": self.model, "version": self.version, "profile": self.sha256, **found}

    def sample(self) -> dict[str, Array]:
        """The newest rows kept: see ``RowSample.read``. Raises SettingsError when ``keep_rows`` is 0."""
        if self._sample is None:
            raise SettingsError(f"{self.model}:{self.version} keeps no rows: set keep_rows")
        with self._lock:
            return self._sample.read()

    def compare(self, arm: str, against: str = STABLE) -> tuple[WindowReport, ...]:
        """Each window of one arm held against the same window of another: two samples on the same cells.

        Raises StateError when an arm was never seen.
        """
        with self._lock:
            one, other = self._counted(arm), self._counted(against)
            windows = self.settings.windows
            return tuple([self.judge.compare(one.window(window), other.window(window), arm) for window in windows])

    def _counted(self, arm: str) -> ArmState:
        if arm not in self._arms:
            raise StateError(f"no row of arm '{arm}' was counted; there are {', '.join(self._arms) or 'none'}")
        return self._arms[arm].store.state()

    def in_alarm(self, arm: str = STABLE) -> tuple[str, ...]:
        """Names of the columns in alarm."""
        with self._lock:
            return self.judge.in_alarm(arm)

    def past_alarms(self) -> list[Alarm]:
        """The newest changes of alarms, oldest first; those before a restart too."""
        with self._lock:
            return self._past.alarms()

    def take_past(self, other: Monitor) -> None:
        """Have the past alarms of another monitor instead of its own: one that watched the version before."""
        with other._lock:
            past = other._past.state()
        with self._lock:
            self._past.restore(past)

    def state(self, *, history: bool = False) -> MonitorState:
        """A copy of everything counted, for a merge or a file; with the histories of looks and alarms when asked."""
        with self._lock:
            state = self._state()
            if history:
                state.history = self.judge.history_state()
                state.past = self._past.state()
        return state

    def _state(self) -> MonitorState:
        return MonitorState(
            self.model,
            self.version,
            self.sha256,
            {name: arm.store.state() for name, arm in self._arms.items()},
            self.judge.alarms_state(),
            {name: arm.inflation.state() for name, arm in self._arms.items()},
            self.seasonal.state() if self.seasonal is not None else None,
            self.judge.rule_names,
            {
                name: {segment: store.state() for segment, store in arm.segments.items()}
                for name, arm in self._arms.items()
                if arm.segments
            },
        )

    def progress(self) -> dict[str, tuple[int, ...]]:
        """Another one when a snapshot would hold more rows than before."""
        with self._lock:
            return {name: arm.store.progress() for name, arm in self._arms.items()}

    def snapshot(self) -> bytes:
        """The state and the histories as a file's bytes: a restart goes on from it, but for panes that were open."""
        return self.state(history=True).to_bytes()

    def restore(self, state: MonitorState) -> None:
        """Go on from a saved state. Raises ProfileMismatch or StateError, and is then as if new.

        Rules of the schema that have changed begin anew with no violation; segments that are no more are left out.
        """
        if state.sha256 != self.sha256:
            raise ProfileMismatch(
                f"the saved state of {self.model}:{self.version} was counted under profile {state.sha256[:12]}, the "
                f"version's profile is {self.sha256[:12]}"
            )
        with self._lock:
            try:
                self._restore(state)
            except StateError:
                self._reset()
                raise

    def restart(self) -> None:
        """Forget all counts and alarms, as after a promotion."""
        with self._lock:
            self._reset()

    def _restore(self, state: MonitorState) -> None:
        self._reset()
        for name, saved in state.arms.items():
            arm = self._arm(name)
            if arm is None:
                raise StateError(f"the state has more than {self.settings.max_arms} arms")
            arm.store.restore(self._fitting(state, saved))
            if name in state.inflation:
                arm.inflation.restore(state.inflation[name])
            self._restore_segments(arm, state.segments.get(name, {}))
        self.judge.restore_alarms(state.alarms)
        self.judge.restore_history(state.history)
        self._past.restore(state.past)
        if self.seasonal is not None and state.seasonal is not None:
            self.seasonal.restore(*state.seasonal)

    def _fitting(self, state: MonitorState, saved: ArmState) -> ArmState:
        """The counts with those of other rules cut off."""
        if state.rules == self.judge.rule_names:
            return saved
        return recut(saved, self.layout.cells, self.layout.cells + len(self.judge.rules))

    def _restore_segments(self, arm: _Arm, saved: dict[str, ArmState]) -> None:
        for name in self._segment_names():
            store = self._segment(arm, name) if name in saved else None
            if store is not None:
                store.restore(saved[name])

    def _reset(self) -> None:
        self.seasonal = _seasonal(self.settings, self.layout)
        self._sample = _sample(self.settings, self.layout)
        for name in self._arms:
            self.judge.restart(name)
        self._arms = {}
        self._past = AlarmHistory(Alarm)


def _seasonal(settings: Settings, layout: Layout) -> Seasonal | None:
    if settings.reference == "profile":
        return None
    return Seasonal(settings.reference, layout.cells, settings.rules.min_rows)


def _sample(settings: Settings, layout: Layout) -> RowSample | None:
    return RowSample(layout, settings.keep_rows, settings.keep_bytes) if settings.keep_rows else None


def _most_segments(settings: Settings, layout: Layout) -> int:
    """How many segments, over all arms, fit into the memory allowed."""
    if settings.segment is None:
        return 0
    size = store_bytes(layout.cells, settings.windows)
    if size > settings.segment.max_bytes:
        raise SettingsError(
            f"segment '{settings.segment.column}': max_bytes must be at least {size}, what one segment takes, got "
            f"{settings.segment.max_bytes}"
        )
    return settings.segment.max_bytes // size


def _contents(order: Sequence[int], data: Sequence[Sequence[Contents]]) -> list[Parts | None] | None:
    """The pieces of each tensor, None where it is absent throughout; None when only some batches have it."""
    contents: list[Parts | None] = []
    for parts in [data[place] for place in order]:
        if all(parts) or None not in parts:  # the first says it sooner, but for empty pieces
            contents.append(_pieces(parts))
        elif parts.count(None) == len(parts):
            contents.append(None)
        else:
            return None
    return contents


def _pieces(parts: Sequence[Any]) -> Parts:
    """Strings come in pieces from each batch, bytes in one."""
    return parts if isinstance(parts[0], bytes) else [piece for part in parts for piece in part]


def _newest(state: MonitorState) -> int:
    """When the newest row of closed panes came."""
    return int(max([one.end_ns.max(initial=0) for arm in state.arms.values() for one in arm.series], default=0))
