"""The monitor: one ``Monitor`` per model version under watch, all of them in a ``MonitorSet``.

The way of a row: the batcher's thread offers its batch to a ``Tap``; the drain thread takes batches from all taps,
counts them arm by arm in panes, and looks at a window whenever one of its panes is closed; what an alarm says goes to
``on_alarm``. Reports and snapshots are made by any other thread, under a lock that the request path never takes.

Several monitors can watch one stream: ``MonitorSet.mirror`` counts a version's rows a second time under another
version's profile (as the arm ``canary``, say), so that the two can be compared cell by cell.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Final, TypeAlias

import numpy as np

from monitor.calibration import Calibration, Inflation
from monitor.errors import ProfileMismatch, SettingsError, StateError
from monitor.judging import Judge
from monitor.kernels._jit import compile_all
from monitor.layout import Layout, TensorPlan
from monitor.panes import PaneStore, Seasonal
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState
from monitor.tap import Item, Key, Tap
from monitor.types import BYTES, STABLE, Alarm, Array, DriftReport, Parts, Settings, WindowCounts, WindowReport

#: Rows counted in one go.
BLOCK_ROWS: Final = 4096
#: A tap is left for the next after this many rows, so that one busy model does not keep the others waiting.
TURN_ROWS: Final = 65_536

OnAlarm: TypeAlias = Callable[["Monitor", Alarm], None]


class _Arm:
    """Counts of one arm, and how much its rows depend on each other."""

    def __init__(self, monitor: Monitor, name: str) -> None:
        self.name = name
        self.inflation = Inflation(monitor.layout)
        self.store = PaneStore(
            monitor.layout,
            monitor.settings.windows,
            min_rows=monitor.settings.rules.min_rows,
            on_look=lambda counts: monitor._look(name, counts),
            on_pane=self._pane,
            on_fresh=monitor.seasonal.add if monitor.seasonal is not None and name == STABLE else None,
        )

    def _pane(self, rows: int, pane: Array) -> None:
        if rows:
            self.inflation.add(pane)


class Monitor:
    """Watches one model version under one profile. Making one compiles the kernels: never do it in a request.

    ``ingest``, ``tick``, ``report``, ``snapshot`` and ``restore`` may be called from any thread but the request path.
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
        self.keys: tuple[Key, ...] = tuple([(plan.source, plan.name) for plan in self.layout.tensors])
        #: Rows of arms over ``settings.max_arms``.
        self.refused_arms = 0
        self._on_alarm = on_alarm
        self._arms: dict[str, _Arm] = {}
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
        bounds = {"max_rows": self.settings.ring_rows, "max_bytes": self.settings.ring_bytes}
        return Tap(chosen["input"], chosen["output"], **bounds, wake=wake)

    def ingest(self, keys: Sequence[Key], items: Sequence[Item], arm: str | None = None) -> int:
        """Count batches taken from a tap with these ``keys``, in order; rows counted. ``arm`` overrides the items'.

        Item times are wall ns here. Raises ProfileMismatch when a monitored tensor is not among the keys.
        """
        order = self._order(keys)
        counted = 0
        with self._lock:
            for name, block in self._blocks(items, arm):
                counted += self._count(name, order, block)
        return counted

    def _order(self, keys: Sequence[Key]) -> list[int]:
        found = {key: place for place, key in enumerate(keys)}
        if not set(self.keys) <= set(found):
            absent = sorted(f"{source} '{name}'" for source, name in set(self.keys) - set(found))
            raise ProfileMismatch(f"the traffic does not carry {', '.join(absent)} of the profile")
        return [found[key] for key in self.keys]

    def _blocks(self, items: Sequence[Item], arm: str | None) -> Iterator[tuple[str, list[Item]]]:
        """Consecutive items of one arm and one pane of time, about ``BLOCK_ROWS`` rows at a time."""

        def key(item: Item) -> tuple[str, int]:
            return (arm or item.arm, item.now_ns // self._quantum_ns if self._quantum_ns else 0)

        for (name, _), group in groupby(items, key):
            block: list[Item] = []
            rows = 0
            for item in group:
                block.append(item)
                rows += item.rows
                if rows >= BLOCK_ROWS:
                    yield name, block
                    block, rows = [], 0
            if block:
                yield name, block

    def _count(self, name: str, order: Sequence[int], block: Sequence[Item]) -> int:
        rows = sum([item.rows for item in block])
        arm = self._arm(name)
        if arm is None:
            self.refused_arms += rows
            return 0
        matrices = self._matrices(order, block, rows)
        if matrices is not None:
            times = [item.now_ns for item in block]
            arm.store.add(matrices, rows, max(times), min(times))
            return rows
        if len(block) == 1:
            arm.store.refuse(rows)
            return 0
        return sum([self._count(name, order, [item]) for item in block])

    def _matrices(self, order: Sequence[int], block: Sequence[Item], rows: int) -> list[Array] | None:
        """One matrix per tensor, or None when the block has to be taken apart, or refused if it is one item."""
        matrices = []
        for plan, place in zip(self.layout.tensors, order, strict=True):
            parts = [item.data[place] for item in block]
            if parts.count(None):
                matrix = _all_missing(plan, rows) if parts.count(None) == len(parts) else None
            else:
                pieces: Parts = [piece for part in parts if part is not None for piece in part]
                matrix = plan.rows_of(pieces, rows)
            if matrix is None:
                return None
            matrices.append(matrix)
        return matrices

    def drop(self, arm: str, rows: int) -> None:
        """Rows that a tap dropped: counted, and the open panes marked as sampled."""
        with self._lock:
            found = self._arm(arm)
            if found is not None:
                found.store.drop(rows)

    def tick(self, now_ns: int) -> None:
        """Close the panes of time that are over at ``now_ns`` (wall), whether rows came or not."""
        with self._lock:
            for arm in self._arms.values():
                arm.store.tick(now_ns)

    def _arm(self, name: str) -> _Arm | None:
        found = self._arms.get(name)
        if found is None and len(self._arms) < self.settings.max_arms:
            found = self._arms[name] = _Arm(self, name)
        return found

    def _look(self, arm: str, counts: WindowCounts) -> None:
        for alarm in self.judge.look(arm, counts, self._reference(counts.end_ns)):
            if self._on_alarm is not None:
                self._on_alarm(self, alarm)

    def _reference(self, now_ns: int) -> Array | None:
        return self.seasonal.reference(now_ns) if self.seasonal is not None else None

    # --- reading ---------------------------------------------------------------------------------------------------

    def report(self) -> DriftReport:
        """Every window of every arm as it is now."""
        with self._lock:
            state = self._state()
            inflation = {name: arm.inflation.estimate() for name, arm in self._arms.items()}
            newest = max([series.end_ns.max(initial=0) for a in state.arms.values() for series in a.series], default=0)
            report = self.judge.report(state, reference=self._reference(int(newest)), inflation=inflation)
            if self.refused_arms:
                note = f"{self.refused_arms} rows of arms over the bound of {self.settings.max_arms} were not counted"
                report = replace(report, warnings=(*report.warnings, note))
            return report

    def compare(self, arm: str, against: str = STABLE) -> tuple[WindowReport, ...]:
        """Each window of one arm held against the same window of another: two samples on the same cells.

        Raises StateError when an arm was never seen.
        """
        with self._lock:
            state = self._state()
            for name in (arm, against):
                if name not in state.arms:
                    raise StateError(f"no row of arm '{name}' was counted; there are {', '.join(state.arms) or 'none'}")
            return tuple(
                [
                    self.judge.compare(state.arms[arm].window(window), state.arms[against].window(window), arm)
                    for window in self.settings.windows
                ]
            )

    def in_alarm(self, arm: str = STABLE) -> tuple[str, ...]:
        """Names of the columns in alarm."""
        with self._lock:
            return self.judge.in_alarm(arm)

    def state(self) -> MonitorState:
        """A copy of everything counted, for a merge or a file."""
        with self._lock:
            return self._state()

    def _state(self) -> MonitorState:
        return MonitorState(
            self.model,
            self.version,
            self.sha256,
            {name: arm.store.state() for name, arm in self._arms.items()},
            self.judge.alarms_state(),
            {name: arm.inflation.state() for name, arm in self._arms.items()},
            self.seasonal.state() if self.seasonal is not None else None,
        )

    def snapshot(self) -> bytes:
        """The state as a file's bytes: a restart goes on from it, but for the panes that were open."""
        return self.state().to_bytes()

    def restore(self, state: MonitorState) -> None:
        """Go on from a saved state. Raises ProfileMismatch or StateError, and is then as if new."""
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
            arm.store.restore(saved)
            if name in state.inflation:
                arm.inflation.restore(state.inflation[name])
        self.judge.restore_alarms(state.alarms)
        if self.seasonal is not None and state.seasonal is not None:
            self.seasonal.restore(*state.seasonal)

    def _reset(self) -> None:
        self.seasonal = _seasonal(self.settings, self.layout)
        for name in self._arms:
            self.judge.restart(name)
        self._arms = {}


def _seasonal(settings: Settings, layout: Layout) -> Seasonal | None:
    if settings.reference == "profile":
        return None
    return Seasonal(settings.reference, layout.cells, settings.rules.min_rows)


def _all_missing(plan: TensorPlan, rows: int) -> Array:
    """What an optional input that is absent counts as."""
    return np.full((rows, plan.width), np.nan, plan.carrier)


class _Feed:
    """One tap and the monitors that count what it takes: (monitor, arm or None for the items' own)."""

    def __init__(self, monitor: Monitor, tap: Tap) -> None:
        self.tap = tap
        self.targets: list[tuple[Monitor, str | None]] = [(monitor, None)]
        self._dropped: dict[str, int] = {}

    def drain(self, wall_offset_ns: int) -> int:
        counted = 0
        rows = 0
        while rows < TURN_ROWS and (items := self.tap.take(BLOCK_ROWS)):
            rows += sum([item.rows for item in items])
            items = [item._replace(now_ns=item.now_ns + wall_offset_ns) for item in items]
            counted += self.targets[0][0].ingest(self.tap.keys, items)
            for monitor, arm in self.targets[1:]:
                monitor.ingest(self.tap.keys, items, arm)
        self._report_drops()
        return counted

    def _report_drops(self) -> None:
        for arm, total in dict(self.tap.dropped_by_arm).items():
            new = total - self._dropped.get(arm, 0)
            if new:
                self._dropped[arm] = total
                for monitor, override in self.targets:
                    monitor.drop(override or arm, new)


class MonitorSet:
    """All monitors of one process. ``drain`` is for one thread; everything else for any but the request path.

    ``wall_offset_ns`` is added to the times of offers (0 when they are wall times; wall minus monotonic clock
    otherwise); the owner may correct it when the wall clock was set.
    """

    def __init__(self, *, wall_offset_ns: int = 0, on_alarm: OnAlarm | None = None) -> None:
        self.wall_offset_ns = wall_offset_ns
        self._on_alarm = on_alarm
        self._monitors: dict[tuple[str, str], Monitor] = {}
        self._feeds: list[_Feed] = []
        self._lock = threading.Lock()

    @staticmethod
    def compile() -> None:
        """Compile every kernel, or load it from the cache: before the server is ready. Blocks for seconds at worst."""
        compile_all()

    def attach(
        self,
        model: str,
        version: str,
        profile: ReferenceProfile,
        settings: Settings | None = None,
        *,
        calibration: Calibration | None = None,
    ) -> Monitor:
        """Begin to watch a version. Raises SettingsError when it is watched already."""
        made = Monitor(model, version, profile, settings, calibration=calibration, on_alarm=self._on_alarm)
        with self._lock:
            if (model, version) in self._monitors:
                raise SettingsError(f"{model}:{version} is watched already")
            self._monitors[model, version] = made
        return made

    def detach(self, model: str, version: str) -> Monitor | None:
        """End watching: what its taps still hold is counted first. The monitor, for a last snapshot."""
        with self._lock:
            found = self._monitors.pop((model, version), None)
            if found is None:
                return None
            own = [feed for feed in self._feeds if feed.targets[0][0] is found]
            self._feeds = [feed for feed in self._feeds if feed.targets[0][0] is not found]
            for feed in own:
                while feed.tap.waiting and feed.drain(self.wall_offset_ns):
                    pass
            for feed in self._feeds:
                feed.targets = [target for target in feed.targets if target[0] is not found]
        return found

    def get(self, model: str, version: str) -> Monitor | None:
        return self._monitors.get((model, version))

    def monitors(self) -> list[Monitor]:
        return list(self._monitors.values())

    def tap(
        self,
        model: str,
        version: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        wake: Callable[[], object] | None = None,
    ) -> Tap | None:
        """A tap for one thread that runs the version's batches, or None when it is not watched."""
        with self._lock:
            found = self._monitors.get((model, version))
            if found is None:
                return None
            feed = _Feed(found, found.tap(inputs, outputs, wake=wake))
            self._feeds.append(feed)
            return feed.tap

    def close_tap(self, tap: Tap) -> None:
        """Forget a tap whose thread has ended, after counting what it holds."""
        with self._lock:
            for feed in [feed for feed in self._feeds if feed.tap is tap]:
                while feed.tap.waiting and feed.drain(self.wall_offset_ns):
                    pass
                self._feeds.remove(feed)

    def mirror(self, model: str, version: str, onto: str, arm: str) -> None:
        """Count all rows of ``version``, from now on, also under the profile of version ``onto``, as its ``arm``.

        Covers the taps that exist. Raises SettingsError when a version is not watched, ProfileMismatch when the one
        profile needs a tensor that the other's taps do not take.
        """
        with self._lock:
            source, target = self._monitors.get((model, version)), self._monitors.get((model, onto))
            if source is None or target is None:
                raise SettingsError(f"{model}:{version if source is None else onto} is not watched")
            feeds = [feed for feed in self._feeds if feed.targets[0][0] is source]
            for feed in feeds:
                target._order(feed.tap.keys)
            for feed in feeds:
                feed.targets = [*[t for t in feed.targets if t[0] is not target], (target, arm)]

    def unmirror(self, model: str, version: str, onto: str) -> None:
        """End a mirror."""
        with self._lock:
            source, target = self._monitors.get((model, version)), self._monitors.get((model, onto))
            for feed in self._feeds:
                if feed.targets[0][0] is source:
                    feed.targets = [feed.targets[0], *[t for t in feed.targets[1:] if t[0] is not target]]

    def drain(self, now_ns: int) -> int:
        """Count what waits in the taps and close the panes that are over at ``now_ns`` (wall); rows counted."""
        with self._lock:
            counted = sum([feed.drain(self.wall_offset_ns) for feed in self._feeds])
            for monitor in self._monitors.values():
                monitor.tick(now_ns)
        return counted

    def gauges(self) -> dict[str, Any]:
        """Counters over all taps: rows offered, taken, dropped, refused and waiting."""
        taps = [feed.tap for feed in self._feeds]
        names = ("offered", "taken", "dropped", "refused", "waiting")
        return {name: sum([getattr(tap, name) for tap in taps]) for name in names}
