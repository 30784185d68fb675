"""All monitors of one process: ``MonitorSet``, from live taps to snapshots on disk.

The way of a row: the thread that runs batches offers its batch to a ``Tap``; the drain thread takes batches from all
taps and has them counted (``monitor.watch``); what an alarm says goes to ``on_alarm``. Reports and snapshots are made
by any other thread, under locks that the request path never takes.

Threads that run batches come and go, and so do profiles. Such a thread holds a ``Slot``, which says where to offer now:
attaching, replacing and detaching a monitor change the slots of its version, and nobody has to tell the thread.

Several monitors can watch one stream: ``MonitorSet.mirror`` counts a version's rows a second time under another
version's profile (as the arm ``canary``, say), so that the two can be compared cell by cell.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from monitor import snapshots
from monitor.calibration import Calibration
from monitor.errors import MonitorError, NotCounted, SettingsError, StateError
from monitor.kernels._jit import compile_all
from monitor.profile import ReferenceProfile
from monitor.state import MonitorState
from monitor.tap import Batches, Tap
from monitor.types import SHADOW, Settings
from monitor.watch import BLOCK_ROWS, Monitor, OnAlarm

__all__ = ["BLOCK_ROWS", "Monitor", "MonitorSet", "OnAlarm", "Slot"]

#: A tap is left for the next after this many rows, so that one busy model does not keep the others waiting.
TURN_ROWS: Final = 65_536
#: Snapshots kept of versions and profiles that are not watched at the moment: they may come back.
SPARE_SNAPSHOTS: Final = 32
_COUNTERS: Final = ("offered", "taken", "dropped", "refused", "waiting")


class Slot:
    """Where one thread offers the batches of one version: made by ``MonitorSet.tap_for``.

    ``tap`` is None while the version is not watched. Read it once per batch; it may be another one the next time. A
    batch that is offered to a tap read before the change may be left uncounted.
    """

    __slots__ = ("inputs", "model", "outputs", "tap", "version", "wake")

    def __init__(
        self,
        model: str,
        version: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        wake: Callable[[], object] | None,
    ) -> None:
        self.model, self.version = model, version
        self.inputs, self.outputs, self.wake = tuple(inputs), tuple(outputs), wake
        self.tap: Tap | None = None


@dataclass(slots=True, frozen=True)
class _Mirror:
    """Rows that ``version`` answered are counted under the profile of ``onto`` too, as its ``arm``."""

    model: str
    version: str
    onto: str
    arm: str


class _Feed:
    """One tap and the monitors that count what it takes: (monitor, arm or None for the items' own)."""

    def __init__(self, monitor: Monitor, tap: Tap) -> None:
        self.monitor, self.tap = monitor, tap
        self.targets: list[tuple[Monitor, str | None]] = [(monitor, None)]
        self._dropped: dict[str, int] = {}

    def drain(self, wall_offset_ns: int, failures: list[Exception]) -> int:
        """Count what waits, for one turn; rows counted. What goes wrong is added to ``failures``, and stops nothing."""
        counted = taken = 0
        while taken < TURN_ROWS and (rows := sum((batches := self.tap.take(BLOCK_ROWS)).rows)):
            taken += rows
            counted += self._count(batches, rows, wall_offset_ns, failures)
        self._report_drops()
        return counted

    def _count(self, batches: Batches, rows: int, offset_ns: int, failures: list[Exception]) -> int:
        counted = 0
        for monitor, arm in self.targets:
            try:
                # A mirror leaves out the copies that a shadow was given: nobody was answered with those.
                own = batches if arm is None else batches.without(SHADOW)
                found = monitor.count(self.tap.keys, own, arm, offset_ns)
                if arm is None:
                    counted += found
                    self.tap.fail(rows - found)
            except Exception as error:  # noqa: BLE001 - the boundary of one monitor: the others go on
                failures.append(error)
                if arm is None:
                    failed = error.rows if isinstance(error, NotCounted) else rows
                    self.tap.fail(failed)
                    counted += rows - failed
        return counted

    def drain_all(self, wall_offset_ns: int, failures: list[Exception]) -> None:
        """All that the queue can hold, though its thread may go on offering."""
        for _ in range(1 + self.monitor.settings.ring_rows // BLOCK_ROWS):
            if not self.tap.waiting:
                break
            self.drain(wall_offset_ns, failures)
        self._report_drops()

    def _report_drops(self) -> None:
        for arm, total in dict(self.tap.dropped_by_arm).items():
            new = total - self._dropped.get(arm, 0)
            if new:
                self._dropped[arm] = total
                for monitor, override in self.targets:
                    if override is None or arm != SHADOW:
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
        self._slots: list[Slot] = []
        self._mirrors: list[_Mirror] = []
        self._past = dict.fromkeys(_COUNTERS, 0)
        self._failures: list[Exception] = []
        self._lock = threading.Lock()

    @staticmethod
    def compile() -> None:
        """Compile every kernel, or load it from the cache: before the server is ready. Blocks for seconds at worst."""
        compile_all()

    # --- monitors --------------------------------------------------------------------------------------------------

    def attach(
        self,
        model: str,
        version: str,
        profile: ReferenceProfile,
        settings: Settings | None = None,
        *,
        calibration: Calibration | None = None,
    ) -> Monitor:
        """Begin to watch a version; its slots get their taps.

        Raises SettingsError when it is watched already or the settings do not fit the profile, ProfileMismatch when a
        slot's model lacks a tensor of the profile; nothing is changed then.
        """
        made = Monitor(model, version, profile, settings, calibration=calibration, on_alarm=self._on_alarm)
        with self._lock:
            if (model, version) in self._monitors:
                raise SettingsError(f"{model}:{version} is watched already")
            self._put(made)
        return made

    def replace(
        self,
        model: str,
        version: str,
        profile: ReferenceProfile,
        settings: Settings | None = None,
        *,
        calibration: Calibration | None = None,
    ) -> Monitor:
        """Watch a version under another profile or other settings from now on, or begin to watch it.

        What its taps hold is counted under the old profile first; mirrors stay. Under the same profile and windows the
        new monitor goes on with the counts and alarms of the old one. Raises as ``attach``, and when a mirror does not
        fit; nothing is changed then.
        """
        made = Monitor(model, version, profile, settings, calibration=calibration, on_alarm=self._on_alarm)
        with self._lock:
            old = self._monitors.get((model, version))
            self._check_mirrors(made)
            self._put(made, old)
            if old is not None and old.sha256 == made.sha256:
                _go_on(made, old)
        return made

    def _put(self, made: Monitor, old: Monitor | None = None) -> None:
        """Give the slots taps of ``made`` instead of ``old``'s; raises before anything was changed."""
        own = [slot for slot in self._slots if (slot.model, slot.version) == (made.model, made.version)]
        taps = [made.tap(slot.inputs, slot.outputs, wake=slot.wake) for slot in own]
        self._monitors[made.model, made.version] = made
        for slot, tap in zip(own, taps, strict=True):
            slot.tap = tap
        if old is not None:
            self._drop_feeds([feed for feed in self._feeds if feed.monitor is old])
        self._feeds.extend([_Feed(made, tap) for tap in taps])
        self._aim()

    def detach(self, model: str, version: str) -> Monitor | None:
        """End watching: what its taps still hold is counted first. The monitor, for a last snapshot."""
        with self._lock:
            found = self._monitors.get((model, version))
            if found is None:
                return None
            for slot in self._slots:
                if (slot.model, slot.version) == (model, version):
                    slot.tap = None
            self._drop_feeds([feed for feed in self._feeds if feed.monitor is found])
            del self._monitors[model, version]
            self._mirrors = [m for m in self._mirrors if m.model != model or version not in (m.version, m.onto)]
            self._aim()
        return found

    def get(self, model: str, version: str) -> Monitor | None:
        return self._monitors.get((model, version))

    def monitors(self) -> list[Monitor]:
        return list(self._monitors.values())

    # --- taps ------------------------------------------------------------------------------------------------------

    def tap_for(
        self,
        model: str,
        version: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        wake: Callable[[], object] | None = None,
    ) -> Slot:
        """A slot for one thread that runs the version's batches, whether or not it is watched now or ever.

        Names are the model's tensors in spec order. Raises ProfileMismatch when the model lacks a tensor of the profile
        in force. ``close_slot`` ends it.
        """
        slot = Slot(model, version, inputs, outputs, wake)
        with self._lock:
            found = self._monitors.get((model, version))
            if found is not None:
                slot.tap = self._new_tap(found, inputs, outputs, wake)
            self._slots.append(slot)
        return slot

    def close_slot(self, slot: Slot) -> None:
        """Forget a slot whose thread has ended, after counting what its tap holds."""
        with self._lock:
            self._slots = [other for other in self._slots if other is not slot]
            tap, slot.tap = slot.tap, None
            self._drop_feeds([feed for feed in self._feeds if feed.tap is tap])

    def tap(
        self,
        model: str,
        version: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        wake: Callable[[], object] | None = None,
    ) -> Tap | None:
        """A tap that ends with the monitor of the version, or None when it is not watched. Servers want ``tap_for``."""
        with self._lock:
            found = self._monitors.get((model, version))
            return None if found is None else self._new_tap(found, inputs, outputs, wake)

    def _new_tap(
        self, monitor: Monitor, inputs: Sequence[str], outputs: Sequence[str], wake: Callable[[], object] | None
    ) -> Tap:
        feed = _Feed(monitor, monitor.tap(inputs, outputs, wake=wake))
        self._feeds.append(feed)
        self._aim()
        return feed.tap

    def close_tap(self, tap: Tap) -> None:
        """Forget a tap whose thread has ended, after counting what it holds."""
        with self._lock:
            self._drop_feeds([feed for feed in self._feeds if feed.tap is tap])

    def _drop_feeds(self, gone: Sequence[_Feed]) -> None:
        for feed in gone:
            feed.drain_all(self.wall_offset_ns, self._failures)
            for name in _COUNTERS[:4]:
                self._past[name] += getattr(feed.tap, name)
        self._feeds = [feed for feed in self._feeds if feed not in gone]

    # --- mirrors ---------------------------------------------------------------------------------------------------

    def mirror(self, model: str, version: str, onto: str, arm: str) -> None:
        """Count all rows that ``version`` answers from now on also under the profile of ``onto``, as its ``arm``.

        Copies that a shadow of ``version`` is given (rows of the arm ``shadow``) are not among them. Holds for taps
        that come later as well, until ``unmirror`` or until one of the two is detached. Raises SettingsError when a
        version is not watched or is its own mirror, ProfileMismatch when the one profile needs a tensor that the
        other's taps do not take.
        """
        with self._lock:
            source, target = self._monitors.get((model, version)), self._monitors.get((model, onto))
            if source is None or target is None:
                raise SettingsError(f"{model}:{version if source is None else onto} is not watched")
            if source is target:
                raise SettingsError(f"{model}:{version} cannot be mirrored onto itself")
            target.check_keys(source.keys)
            self._mirrors = [*self._other_mirrors(model, version, onto), _Mirror(model, version, onto, arm)]
            self._aim()

    def unmirror(self, model: str, version: str, onto: str) -> None:
        """End a mirror."""
        with self._lock:
            self._mirrors = self._other_mirrors(model, version, onto)
            self._aim()

    def _other_mirrors(self, model: str, version: str, onto: str) -> list[_Mirror]:
        return [m for m in self._mirrors if (m.model, m.version, m.onto) != (model, version, onto)]

    def _check_mirrors(self, made: Monitor) -> None:
        """Raises ProfileMismatch when a mirror from or onto this version does not fit its new profile."""
        for mirror in self._mirrors:
            if mirror.model == made.model and made.version in (mirror.version, mirror.onto):
                source, target = (
                    made if version == made.version else self._monitors[made.model, version]
                    for version in (mirror.version, mirror.onto)
                )
                target.check_keys(source.keys)

    def _aim(self) -> None:
        """Say anew which monitors count what each tap takes."""
        for feed in self._feeds:
            own = feed.monitor
            feed.targets = [
                (own, None),
                *[
                    (self._monitors[mirror.model, mirror.onto], mirror.arm)
                    for mirror in self._mirrors
                    if (mirror.model, mirror.version) == (own.model, own.version)
                ],
            ]

    # --- counting and reading --------------------------------------------------------------------------------------

    def drain(self, now_ns: int) -> int:
        """Count what waits in the taps and close the panes that are over at ``now_ns`` (wall); rows counted.

        Raises ExceptionGroup, after everything else was done, of what went wrong since the last call: rows that could
        not be counted are refused, and neither other rows nor other monitors wait for them.
        """
        with self._lock:
            failures, self._failures = self._failures, []
            counted = sum([feed.drain(self.wall_offset_ns, failures) for feed in self._feeds])
            for monitor in self._monitors.values():
                try:
                    monitor.tick(now_ns)
                except Exception as error:  # noqa: BLE001 - the boundary of one monitor: the others go on
                    failures.append(error)
        if failures:
            raise ExceptionGroup("monitors failed", failures)
        return counted

    def gauges(self) -> dict[str, Any]:
        """Rows offered, taken, dropped and refused since the start, and waiting, over all taps."""
        taps = [feed.tap for feed in self._feeds]
        return {name: self._past[name] + sum([getattr(tap, name) for tap in taps]) for name in _COUNTERS}

    # --- snapshots -------------------------------------------------------------------------------------------------

    def snapshot_all(self, folder: Path, *, spare: int = SPARE_SNAPSHOTS) -> list[Path]:
        """Write a snapshot of every monitor, and delete all but the ``spare`` newest of others; the files written.

        A file is named after model, version and profile, and is replaced whole. Raises OSError.
        """
        written: list[Path] = []
        for monitor in self.monitors():
            name = _snapshot_name(monitor)
            snapshots.write(folder, name, monitor.snapshot())
            written.append(folder / name)
        snapshots.prune(folder, {path.name for path in written}, spare)
        return written

    def restore(self, folder: Path, model: str, version: str) -> bool:
        """Go on from the version's snapshot under its profile; False when there is none.

        Raises SettingsError when it is not watched, StateError for a damaged snapshot or one of other windows (the
        monitor is then as if new), OSError.
        """
        monitor = self.get(model, version)
        if monitor is None:
            raise SettingsError(f"{model}:{version} is not watched")
        name = _snapshot_name(monitor)
        data = snapshots.read(folder, name)
        if data is None:
            return False
        state = MonitorState.from_bytes(data, name)
        if (state.model, state.version) != (model, version):
            raise StateError(f"{name}: the snapshot is of {state.model}:{state.version}, wanted {model}:{version}")
        monitor.restore(state)
        return True

    def restore_all(self, folder: Path) -> dict[tuple[str, str], str]:
        """``restore`` of every monitor: "restored", "none", or what was wrong. One bad file stops no other."""
        found: dict[tuple[str, str], str] = {}
        for monitor in self.monitors():
            key = (monitor.model, monitor.version)
            try:
                found[key] = "restored" if self.restore(folder, *key) else "none"
            except (MonitorError, OSError) as error:
                found[key] = str(error)
        return found


def _snapshot_name(monitor: Monitor) -> str:
    return snapshots.file_name(monitor.model, monitor.version, monitor.sha256)


def _go_on(made: Monitor, old: Monitor) -> None:
    """Carry the counts of ``old`` over."""
    try:
        made.restore(old.state(history=True))
    except StateError:  # other windows: they begin anew
        return
