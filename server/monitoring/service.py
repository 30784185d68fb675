"""Watches the live traffic of loaded versions: monitors, taps, labels, the drain thread, saved counts, gauges, alarms.

**Threads.** The request path offers batches to taps and knows nothing else of this package. ``lease`` runs on the
loader's thread: it reads the profile, compiles the kernels and restores saved counts, all before the version serves.
Everything that changes afterwards (the end of a lease, mirrors) is only noted, and done by the drain thread between
two rounds of counting; so neither the loop nor a retirement ever waits for the monitor. Reports are made on the
caller's thread, which must not be the loop's.

**Failing.** When the drain thread fails or stands still, taps fill and drop whole batches, which they count; requests
and memory are as before. An error is logged once until counting works again.

A process in which no version has a profile never imports the kernels, which take over 100 MB.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import merge
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import orjson
import structlog

from monitor.errors import MonitorError
from monitor.outcomes import LabelReference
from monitor.profile import ReferenceProfile
from monitor.tap import Tap
from monitor.types import Alarm, WindowFigures
from monitor.worker import DrainThread
from server.errors import ModelLoadError, NotFound
from server.monitoring.events import alarm_event, drift_row, label_event
from server.monitoring.gauges import Watched, drift_families
from server.monitoring.labels import LabelService, LabelTap, LabelWatch
from server.monitoring.rules import RequestRules
from server.monitoring.watch import Watch
from server.telemetry.snapshot import FamilySnapshot, Kind, Points
from server.types import ModelSpec

if TYPE_CHECKING:
    from monitor.calibration import Calibration
    from monitor.engine import Monitor, MonitorSet
    from server.monitoring.files import StateFiles

log: Any = structlog.get_logger("monitor")

_NS: Final = 1_000_000_000
#: The wall clock was set when it is off by this much from where the monotonic clock has it.
_CLOCK_SET_NS: Final = _NS
_MODEL: Final = ("model", "version")
_COUNTERS: Final[dict[str, tuple[str, str, Kind]]] = {
    "offered": ("tidegate_monitor_rows_total", "Rows offered to the drift monitor.", "counter"),
    "dropped": ("tidegate_monitor_rows_dropped_total", "Rows of them that found no room and were dropped.", "counter"),
    "refused": ("tidegate_monitor_rows_refused_total", "Rows of them that could not be read.", "counter"),
    "waiting": ("tidegate_monitor_lag_rows", "Rows of them that wait to be counted.", "gauge"),
}
_REFUSED: Final = "requests_refused"
_REJECTED: Final = "tidegate_monitor_requests_rejected_total"

#: Told of every alarm that is raised or cleared, on the drain thread; must not wait.
OnAlarm: TypeAlias = Callable[[dict[str, Any]], object]
#: ``audit(action, subject, detail)``; never waits.
Audit: TypeAlias = Callable[[str, str, Mapping[str, object]], None]


class Mirror(NamedTuple):
    """Rows of ``version`` are also counted under the profile of version ``onto``, as its ``arm``."""

    model: str
    version: str
    onto: str
    arm: str


@dataclass(slots=True, frozen=True)
class Timing:
    """How often what is done: seconds.

    Each round of counting wakes a thread and reads the tables of every column into the cache, which costs the same for
    many rows as for few. A tap that is half full does not wait for its round.
    """

    drain_s: float = 1.0
    gauges_s: float = 5.0
    save_s: float = 30.0
    save_again_s: float = 1.0


@dataclass(slots=True, eq=False)
class _Monitored:
    """One version under one watch; ``leases`` are the engines that run it. ``retired``: counts of leases that ended.

    ``rejects``: rules of its schema refuse requests.
    """

    watch: Watch
    model: str
    version: str
    monitor: Monitor
    rejects: bool = False
    #: Tells its episodes from those that were counted otherwise.
    run: str = ""
    leases: set[EngineLease] = field(default_factory=set)
    retired: dict[str, int] = field(default_factory=dict)
    figures: tuple[WindowFigures, ...] | None = None
    shown_rows: int = -1
    #: The monitor's progress when it was saved.
    saved: dict[str, tuple[int, ...]] | None = None

    def count(self, name: str) -> int:
        """Rows by one of the taps' counters, of all taps there were."""
        now: list[int] = [getattr(tap, name) for lease in tuple(self.leases) for tap in lease.taps]
        return self.retired.get(name, 0) + sum(now)

    def requests_refused(self) -> int:
        """Requests that its rules refused, on all engines there were."""
        now = [lease.rules.refused for lease in tuple(self.leases) if lease.rules is not None]
        return self.retired.get(_REFUSED, 0) + sum(now)

    def serves(self, serving: frozenset[object]) -> bool:
        return any(tap in serving for lease in tuple(self.leases) for tap in lease.taps)

    def end(self, lease: EngineLease) -> None:
        """Keep the counts of a lease that ends."""
        for name in (*_COUNTERS, "taken"):
            self.retired[name] = self.retired.get(name, 0) + sum([getattr(tap, name) for tap in lease.taps])
        if lease.rules is not None:
            self.retired[_REFUSED] = self.retired.get(_REFUSED, 0) + lease.rules.refused
        self.leases.discard(lease)

    def taken(self) -> int:
        return self.count("taken") + self.count("dropped")


class EngineLease:
    """Implements ``Lease``."""

    def __init__(self, release: Callable[[EngineLease], None]) -> None:
        self.taps: tuple[Tap, ...] = ()
        self.rules: RequestRules | None = None
        self.labels: LabelTap | None = None
        self.released = False
        self._release = release

    def release(self) -> None:
        if not self.released:
            self.released = True
            self._release(self)


class MonitorService:
    """All monitors of one process. See the module's text for who may call what.

    ``folder``: where counts are kept over restarts; None: nowhere. ``on_drain`` is called before every round of
    counting. ``labels``: those of all models; others may subscribe to what is joined.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        audit: Audit = lambda *_: None,
        on_alarm: OnAlarm = lambda _: None,
        on_drain: Callable[[], object] = lambda: None,
        timing: Timing | None = None,
    ) -> None:
        self._folder = folder
        self._audit = audit
        self._on_alarm = on_alarm
        self._on_drain = on_drain
        self._timing = timing or Timing()
        self.labels = LabelService(folder)
        self._loading = threading.Lock()  # one lease is made at a time
        self._lock = threading.Lock()  # guards what is monitored; only ever held for a moment
        self._monitored: list[_Monitored] = []
        self._set: MonitorSet | None = None
        self._files: StateFiles | None = None
        self._thread: DrainThread | None = None
        self._made = 0
        self._ended: deque[EngineLease] = deque()
        self._alarms: deque[tuple[_Monitored, Alarm]] = deque()
        self._serving: frozenset[object] = frozenset()  # taps of versions in the routing table
        self._mirrors: frozenset[Mirror] = frozenset()
        self._mirrored: dict[Mirror, tuple[Monitor, Monitor]] = {}
        self._mirrored_taps: frozenset[object] = frozenset()
        self._families: tuple[FamilySnapshot, ...] = ()
        self._failing = self._failed_now = False
        self._gauges_at = self._save_at = self._saved_at = 0.0

    # --- loading -----------------------------------------------------------------------------------------------------

    def lease(
        self, watch: Watch | None, spec: ModelSpec, instances: int, labels: LabelWatch | None = None
    ) -> EngineLease:
        """Watch the batches of an engine of this version, join its labels, or both. Blocks: reads, compiles, restores.

        A version that is loaded again and watched in the same way goes on counting where it is. Raises ModelLoadError.
        """
        lease = EngineLease(self._ended.append)
        try:
            reference = None if watch is None else self._watch(lease, watch, spec, instances)
            if labels is not None:
                self._join_labels(lease, labels, spec, reference)
        except BaseException:
            lease.release()
            raise
        return lease

    def _watch(self, lease: EngineLease, watch: Watch, spec: ModelSpec, instances: int) -> LabelReference | None:
        """Have the lease's batches watched. What the profile knows of labels, if anything."""
        try:
            profile = ReferenceProfile.load(watch.profile)
            with self._loading:
                monitored = self._join(lease, watch, spec, profile.sha256) or self._attach(lease, watch, spec, profile)
                lease.rules = _rules(monitored.monitor)
                monitored.rejects = lease.rules is not None
                lease.taps = self._taps(monitored, spec, instances)
        except (MonitorError, OSError) as error:
            raise ModelLoadError(f"the drift profile {watch.profile.name} cannot be used: {error}") from error
        log.info("monitor_attached", model=spec.name, version=spec.version, profile=profile.sha256[:12])
        return profile.labels

    def _join_labels(
        self, lease: EngineLease, watch: LabelWatch, spec: ModelSpec, reference: LabelReference | None
    ) -> None:
        with self._loading:
            self._begin()
        labels = self.labels.acquire(spec.name, spec.version, watch)
        try:
            lease.labels = labels.tap(spec)
        except ModelLoadError:
            self.labels.release(labels, spec.version)
            raise
        if reference is not None:
            labels.learn(spec.version, reference)

    def _join(self, lease: EngineLease, watch: Watch, spec: ModelSpec, sha256: str) -> _Monitored | None:
        """Have the lease share what watches this version in the same way already."""
        with self._lock:
            for found in self._monitored:
                same_version = (found.model, found.version) == (spec.name, spec.version)
                if same_version and found.watch == watch and found.monitor.sha256 == sha256:
                    found.leases.add(lease)
                    return found
        return None

    def _attach(self, lease: EngineLease, watch: Watch, spec: ModelSpec, profile: ReferenceProfile) -> _Monitored:
        calibration = None if watch.calibration is None else _calibration(watch.calibration)
        monitors, files = self._begin()
        monitor = monitors.attach(
            spec.name, self._free_name(monitors, spec), profile, watch.settings, calibration=calibration
        )
        try:
            monitor.tap(
                [t.name for t in spec.inputs], [t.name for t in spec.outputs]
            )  # does the profile fit the model?
        except MonitorError:
            monitors.detach(monitor.model, monitor.version)
            raise
        files.restore(monitor)
        self._keep_past(monitor, spec)
        found = _Monitored(watch, spec.name, spec.version, monitor, run=files.mark(monitor), leases={lease})
        with self._lock:
            self._monitored.append(found)
        return found

    def _keep_past(self, monitor: Monitor, spec: ModelSpec) -> None:
        """What is watched in another way counts anew, but what was told of the version remains."""
        with self._lock:
            known = [one.monitor for one in self._monitored if (one.model, one.version) == (spec.name, spec.version)]
        if known:
            monitor.take_past(known[-1])

    def _free_name(self, monitors: MonitorSet, spec: ModelSpec) -> str:
        """The version's number; with a mark while it is loaded a second time, to be watched in another way."""
        if monitors.get(spec.name, spec.version) is None:
            return spec.version
        self._made += 1
        return f"{spec.version}+{self._made}"

    def _taps(self, monitored: _Monitored, spec: ModelSpec, instances: int) -> tuple[Tap, ...]:
        monitors, _ = self._begin()
        wake = None if self._thread is None else self._thread.wake
        names = [tensor.name for tensor in spec.inputs], [tensor.name for tensor in spec.outputs]
        found = [
            monitors.tap(monitored.monitor.model, monitored.monitor.version, *names, wake=wake)
            for _ in range(instances)
        ]
        return tuple([tap for tap in found if tap is not None])

    def _begin(self) -> tuple[MonitorSet, StateFiles]:
        """The kernels and the drain thread, from the first version on that is watched."""
        if self._set is None or self._files is None:
            from monitor.engine import MonitorSet
            from server.monitoring.files import StateFiles

            self._set = MonitorSet(wall_offset_ns=time.time_ns() - time.monotonic_ns(), on_alarm=self._note_alarm)
            self._set.compile()
            self._files = StateFiles(self._folder)
            self._save_at = time.monotonic() + self._timing.save_s
            self._thread = DrainThread(self._round, interval_s=self._timing.drain_s, on_error=self._failed)
            self._thread.start()
        return self._set, self._files

    # --- from the loop -----------------------------------------------------------------------------------------------

    def follow(self, serving: Iterable[Sequence[Tap]], mirrors: Iterable[Mirror]) -> None:
        """The routing table changed: whose batches serve, and which mirrors there are to be from now on."""
        before, self._mirrors = self._mirrors, frozenset(mirrors)
        self._serving = frozenset([tap for taps in serving for tap in taps])
        if self._thread is not None and (before or self._mirrors):
            self._thread.wake()  # a mirror begins and ends with the next round

    # --- the drain thread --------------------------------------------------------------------------------------------

    def _round(self) -> None:
        monitors, files = self._set, self._files
        if monitors is None or files is None:
            return
        self._on_drain()
        self._follow_clock(monitors)
        self._failed_now = False
        now_ns = time.time_ns()
        self._set_mirrors(monitors, now_ns)
        self._count(monitors.drain, now_ns)
        self._count(self.labels.drain, now_ns)
        self._end_leases(monitors, files)
        self._tell()
        now = time.monotonic()
        if now >= self._gauges_at:
            self._gauges_at = now + self._timing.gauges_s
            self._show()
        if now >= self._save_at:
            self._saved_at, self._save_at = now, now + self._timing.save_s
            self._save(files)
        if self._failing and not self._failed_now:
            self._failing = False
            log.info("monitor_counts_again")

    def _count(self, drain: Callable[[int], object], now_ns: int) -> None:
        """What some rows fail for must not keep others from being counted, or the round from going on."""
        try:
            drain(now_ns)
        except ExceptionGroup as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._failed_now = True
        if not self._failing:
            self._failing = True
            log.error("monitor_failed", consequence="rows are refused, or wait and are dropped", exc_info=error)

    def _follow_clock(self, monitors: MonitorSet) -> None:
        """Small steps are left alone, so that times never go back by the noise of reading two clocks."""
        offset_ns = time.time_ns() - time.monotonic_ns()
        if abs(offset_ns - monitors.wall_offset_ns) > _CLOCK_SET_NS:
            monitors.wall_offset_ns = offset_ns

    def _set_mirrors(self, monitors: MonitorSet, now_ns: int) -> None:
        """Mirrors as the table wants them, between the monitors of the versions that serve now.

        What waits was answered under those of before, and is counted first.
        """
        if not self._mirrors and not self._mirrored:
            return
        serving, names = self._serving, {(one.model, one.version): one.monitor for one in self._all()}
        wanted = {
            mirror: (source, target)
            for mirror in self._mirrors
            if (source := names.get((mirror.model, mirror.version))) is not None
            and (target := names.get((mirror.model, mirror.onto))) is not None
        }
        if wanted == self._mirrored and serving == self._mirrored_taps:
            return
        self._count(monitors.drain, now_ns)
        for mirror, (source, target) in self._mirrored.items():
            if wanted.get(mirror) != (source, target):
                monitors.unmirror(mirror.model, source.version, target.version)
        self._mirrored, self._mirrored_taps = wanted, serving
        for mirror, (source, target) in wanted.items():
            try:
                monitors.mirror(mirror.model, source.version, target.version, mirror.arm)
            except MonitorError as error:
                log.warning("monitor_not_mirrored", **mirror._asdict(), reason=str(error))

    def _end_leases(self, monitors: MonitorSet, files: StateFiles) -> None:
        """Count what ended leases still hold; a monitor without a lease ends with it."""
        while self._ended:
            lease = self._ended.popleft()
            for tap in lease.taps:
                monitors.close_tap(tap)
            if lease.labels is not None:
                self.labels.release(lease.labels.labels, lease.labels.version)
            with self._lock:
                monitored = next((found for found in self._monitored if lease in found.leases), None)
                if monitored is None:
                    continue
                monitored.end(lease)
                over = not monitored.leases
                if over:
                    self._monitored.remove(monitored)
            if over:
                self._end(monitors, files, monitored)

    def _end(self, monitors: MonitorSet, files: StateFiles, monitored: _Monitored) -> None:
        monitors.detach(monitored.monitor.model, monitored.monitor.version)
        files.save(monitored.monitor)
        self._gauges_at = 0.0
        log.info("monitor_detached", model=monitored.model, version=monitored.version)

    def _note_alarm(self, monitor: Monitor, alarm: Alarm) -> None:
        """Called with the monitor's lock held: only handed on."""
        found = next((found for found in tuple(self._monitored) if found.monitor is monitor), None)
        if found is not None:
            self._alarms.append((found, alarm))

    def _tell(self) -> None:
        while self._alarms:
            found, alarm = self._alarms.popleft()
            found.shown_rows = -1
            # The episode is on disk before long: one that is forgotten would be raised, and be told of, again.
            found.saved = None
            self._save_soon()
            event = alarm_event(found.model, found.version, found.monitor.sha256, alarm, found.run)
            self._announce(event)
        for labels, change in self.labels.take_alarms():
            self._save_soon()
            self._announce(label_event(change, labels.run))

    def _save_soon(self) -> None:
        """Before long, but not for each of many changes: a save waits for the disk, and counting waits for it."""
        self._save_at = min(self._save_at, self._saved_at + self._timing.save_again_s)

    def _announce(self, event: dict[str, Any]) -> None:
        """Tell of one change of an alarm: the log, the audit, and whoever listens."""
        self._gauges_at = 0.0
        model, version = event["model"], event["version"]
        action, detail = event["event"], {name: value for name, value in event.items() if name != "event"}
        log.warning(action.replace(".", "_"), **detail)
        self._audit(action, f"{model}:{version}", detail)
        try:
            self._on_alarm(event)
        except Exception as error:  # the boundary: whoever is told must not end the counting
            log.error("alarm_not_passed_on", key=event["key"], exc_info=error)

    def _show(self) -> None:
        """Bring the gauges up to what was counted. Here, so that asking for metrics costs nothing."""
        shown = self._all()
        for found in shown:
            if found.taken() != found.shown_rows or found.figures is None:
                found.shown_rows = found.taken()
                found.figures = found.monitor.figures()
        watched = [Watched(one.model, one.version, one.figures, one.watch.top) for one in shown if one.figures]
        self._families = (*drift_families(watched), *self.labels.families())

    def _save(self, files: StateFiles) -> None:
        for found in tuple(self._monitored):
            found.shown_rows = -1  # panes of time move on without rows
            if (progress := found.monitor.progress()) != found.saved and files.save(found.monitor):
                found.saved = progress
        self.labels.save()

    # --- reading -----------------------------------------------------------------------------------------------------

    def monitor(self, model: str, version: str) -> Monitor:
        """The monitor of a version. Raises NotFound when it is not watched."""
        return self._find(model, version).monitor

    def report(self, model: str, version: str) -> dict[str, Any]:
        """Everything that is known of a version now. Takes milliseconds: not on the loop. Raises NotFound."""
        found = self._find(model, version)
        return replace(found.monitor.report(), version=found.version).to_dict()

    def list(self) -> Sequence[dict[str, Any]]:
        """Every watched version: its profile, its windows, its rows, and the columns in alarm by arm.

        One whose labels are joined and that has no profile shows the signals in alarm instead, and has no columns.
        """
        rows = [_row(found) for found in self._all()]
        known = {(row["model"], row["version"]) for row in rows}
        unprofiled = [row for row in self.labels.list() if (row["model"], row["version"]) not in known]
        return sorted([*rows, *unprofiled], key=lambda row: (row["model"], int(row["version"])))

    def _find(self, model: str, version: str) -> _Monitored:
        with self._lock:
            known = [found for found in self._monitored if (found.model, found.version) == (model, version)]
        if not known:
            raise NotFound(f"version '{version[:32]}' of model '{model[:128]}' is not monitored")
        return max(known, key=lambda found: found.serves(self._serving))

    def _all(self) -> Sequence[_Monitored]:
        """The versions that serve, by name and number; those that are kept warm only are left out."""
        with self._lock:
            found = [one for one in self._monitored if one.serves(self._serving)]
        return sorted(found, key=lambda one: (one.model, int(one.version)))

    def families(self) -> Iterator[FamilySnapshot]:
        """A collector of metrics: cached gauges, and the taps' counters as they are."""
        if self._set is None:
            return
        yield from self._families
        serving = self._all()
        for name, (family, text, kind) in _COUNTERS.items():
            with self._lock:  # a lease that ends meanwhile is counted once
                points: Points = {(found.model, found.version): found.count(name) for found in serving}
            yield FamilySnapshot(family, text, kind, _MODEL, points)
        with self._lock:
            refused: Points = {(one.model, one.version): one.requests_refused() for one in serving if one.rejects}
        yield FamilySnapshot(_REJECTED, "Requests that a rule of the schema refused.", "counter", _MODEL, refused)

    def alarms(self, model: str, version: str) -> Sequence[dict[str, Any]]:
        """The last changes of a version's alarms, oldest first; those before a restart too. Not on the loop."""
        rows: list[dict[str, Any]] = []
        with suppress(NotFound):
            rows = [drift_row(alarm) for alarm in self._find(model, version).monitor.past_alarms()]
        return list(merge(rows, self.labels.past_alarms(model, version), key=lambda row: int(row["end_ns"])))

    # --- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Count what waits, save everything, end the thread. Blocks for seconds at worst."""
        if self._thread is None or self._files is None:
            return
        if not self._thread.stop():
            log.error("monitor_left_running", consequence="the last rows are not saved")
            return
        for found in tuple(self._monitored):
            self._files.save(found.monitor)
        self.labels.save()


def _row(found: _Monitored) -> dict[str, Any]:
    alarms = {window.arm: list(window.in_alarm) for window in found.figures or ()}
    return {
        "model": found.model,
        "version": found.version,
        "profile": found.monitor.sha256,
        "columns": len(found.monitor.layout.columns),
        "windows": [window.name for window in found.watch.settings.windows],
        **{name: found.count(name) for name in _COUNTERS},
        "alarms": {arm: columns for arm, columns in alarms.items() if columns},
    }


def _rules(monitor: Monitor) -> RequestRules | None:
    """Raises SettingsError when a rule does not fit the profile."""
    from monitor.schema import SchemaCheck

    check = SchemaCheck(monitor.settings.schema, monitor.layout)
    return RequestRules(check) if check else None


def _calibration(path: Path) -> Calibration:
    """Raises ModelLoadError."""
    from monitor.calibration import Calibration

    try:
        return Calibration.from_dict(orjson.loads(path.read_bytes()))
    except orjson.JSONDecodeError:
        reason = "it is no JSON"
    except (MonitorError, OSError) as error:
        reason = str(error)
    raise ModelLoadError(f"the calibration {path.name} cannot be used: {reason}")
