"""Labels of every model that joins them: one end of the join for the request path, the other for the drain thread.

A model has one ``ModelLabels`` for all its versions, made when the first of them is loaded, so that a label finds its
prediction whichever version made it and whichever serves by now. It ends with the last version that is loaded under
these settings; under other settings another one is made beside it, and what the old one remembers goes with it.

What labels have taught outlives the process, and so does what waits to be joined: windows, references, alarms, counts,
predictions without a label and labels without a prediction are saved, and gone on from under the same settings.

**Threads.** ``answered`` and ``label`` are the loop's: they append to a bounded queue. ``drain``, ``save``,
``families`` and ``take_alarms`` are the drain thread's. ``acquire`` is the loader's: it compiles and restores.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import structlog

from monitor.errors import SettingsError
from monitor.outcomes import ALL, Joined, LabelReference, LabelSettings
from monitor.types import BYTES
from server.errors import ModelLoadError
from server.telemetry.snapshot import FamilySnapshot, Kind, Points
from server.types import ModelSpec, Tensor, TensorSpec

if TYPE_CHECKING:
    from monitor.label_monitor import LabelAlarm, LabelMonitor
    from monitor.label_state import SavedLabels
    from server.monitoring.files import LabelFiles

log: Any = structlog.get_logger("monitor")

OnJoined: TypeAlias = Callable[[Sequence[Joined]], object]

#: Of a value that names a slice.
_SLICE_CHARS: Final = 64
_MARK_CHARS: Final = 16
#: Of the names of samples; the others are counters.
_GAUGES: Final = frozenset({"label_remembered_rows", "label_remembered_ids", "label_held_labels", "label_queued",
                            "label_join_ratio", "performance", "performance_alarm"})  # fmt: skip
_TEXTS: Final = {
    "tidegate_label_rows_total": "Predicted rows by what became of them.",
    "tidegate_label_join_ratio": "Share of all predicted rows that have their label by now.",
    "tidegate_label_outdated_rows_total": "Rows whose outcome was before a window of time began as their label came.",
    "tidegate_label_invalid_labels_total": "Outcomes that are no value of the model's task, and were not taken.",
    "tidegate_label_unknown_labels_total": "Labels whose prediction is not known, or has no such row.",
    "tidegate_performance": "A metric of the rows in a window whose labels came.",
    "tidegate_performance_alarm": "1 while a signal of the labels is in alarm.",
}


@dataclass(slots=True, frozen=True)
class LabelWatch:
    """How a model's labels are joined. ``slice``: the input, or element of it (``x[3]``), that metrics are cut by."""

    settings: LabelSettings
    slice: str = ""


class ModelLabels:
    """The labels of one model under one ``LabelWatch``. ``leases``: the engines that hold it, by version."""

    def __init__(self, model: str, watch: LabelWatch, on_alarm: Callable[[ModelLabels, LabelAlarm], None]) -> None:
        from monitor.label_monitor import LabelMonitor

        self.model, self.watch = model, watch
        #: The same for labels that go on from each other.
        self.mark = hashlib.sha256(repr(watch).encode()).hexdigest()[:_MARK_CHARS]
        #: Tells the episodes of this life of the windows from those of another: they are numbered from 1 in each.
        self.run = f"{time.time_ns():x}"
        self.monitor: LabelMonitor = LabelMonitor(model, watch.settings, lambda alarm: on_alarm(self, alarm))
        self.leases: Counter[str] = Counter()
        self._saved_changes = 0

    def wants(self, name: str) -> bool:
        """Whether outcomes of this name are these labels."""
        return name in ("", self.watch.settings.name)

    def takes(self, text: str, name: str) -> bool:
        """Whether an outcome that is no number is a class of these labels."""
        return text in self.watch.settings.class_of and self.wants(name)

    def label(
        self,
        request_id: str,
        row: int,
        value: float | None,
        text: str,
        name: str,
        now_ns: int,
        time_ns: int | None = None,
    ) -> bool:
        """Hand in an outcome: its number, if it is one, and its text, if it was one. False when it was not taken.

        ``time_ns``: when it was, in wall time, as its caller said; None: now.
        """
        outcome = text if value is None or text in self.watch.settings.class_of else value
        return self.monitor.join.label(request_id, row, outcome, name, now_ns, time_ns)

    def learn(self, version: str, reference: LabelReference) -> None:
        """Hold a version against its profile's reference. One that was made otherwise is logged and left aside."""
        try:
            self.monitor.learn_from(version, reference)
        except SettingsError as error:
            log.warning("label_reference_not_used", model=self.model, version=version, reason=str(error))

    def snapshot(self) -> bytes:
        """What has been learnt up to now, for ``restore``."""
        return self.monitor.snapshot(self.mark, self.run)

    def restore(self, saved: SavedLabels) -> None:
        """Go on from there, in new labels; alarms keep their episodes. Raises StateError."""
        self.monitor.restore(saved)
        self.run, self._saved_changes = saved.run, self.monitor.changes

    def save(self, files: LabelFiles) -> None:
        """Have what is new written."""
        changes = self.monitor.changes
        if changes != self._saved_changes and files.save(self):
            self._saved_changes = changes

    def tap(self, spec: ModelSpec) -> LabelTap:
        """What a version of the model hands its answers to.

        Raises ModelLoadError when it lacks the element that is the prediction, or the one to slice by.
        """
        _check_output(spec, self.watch.settings)
        return LabelTap(self, spec.version, _slicer(spec, self.watch.slice))


class LabelTap:
    """One version's way into its model's labels. For the loop's thread: never waits, never raises."""

    __slots__ = ("_remember", "_slicer", "label", "labels", "takes", "version", "wants")

    def __init__(self, labels: ModelLabels, version: str, slicer: Slicer | None) -> None:
        self.labels = labels
        self.label, self.takes, self.wants = labels.label, labels.takes, labels.wants
        self.version, self._slicer = version, slicer
        self._remember = labels.monitor.join.remember

    def answered(
        self,
        ids: Sequence[str],
        arm: str,
        rows: int,
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor],
        unit: int,
        now_ns: int,
    ) -> None:
        """Remember an answered request by ``ids``. ``inputs`` stand in spec order; ``now_ns`` is wall time."""
        value = ALL if self._slicer is None else self._slicer.value(inputs, rows or 1)
        self._remember(ids, self.version, arm, rows, outputs, value, now_ns, unit)


class Slicer:
    """Says which slice a request belongs to: that of the value which all its rows have in one element of an input."""

    def __init__(self, place: int, element: int) -> None:
        self._place, self._element = place, element

    def value(self, inputs: Sequence[Tensor | None], rows: int) -> str:
        """The value as text; "" (not sliced) when it is absent, or differs from row to row."""
        tensor = inputs[self._place]
        try:
            if tensor is None:
                return ALL
            values = tensor.array().reshape(rows, -1)[:, self._element]
            first = values[0]
            if rows > 1 and not (values == first).all():
                return ALL
            return _named(first)
        except (ValueError, IndexError, TypeError):
            return ALL


def _named(value: Any) -> str:
    if isinstance(value, bytes):
        return value[:_SLICE_CHARS].decode("utf-8", "replace")
    return f"{value.item():.12g}" if hasattr(value, "item") else str(value)


def _check_output(spec: ModelSpec, settings: LabelSettings) -> None:
    """Raises ModelLoadError for an output that cannot hold the prediction."""
    output = next((tensor for tensor in spec.outputs if tensor.name == settings.output), None)
    if output is None:
        names = [tensor.name for tensor in spec.outputs]
        raise ModelLoadError(f"labels are of output '{settings.output}', but the outputs are {', '.join(names)}")
    if output.datatype == BYTES and not (settings.classes and settings.width == 1):  # the name of a class is one number
        wanted = "form: class and the names of the classes"
        raise ModelLoadError(f"output '{output.name}' holds strings: labels of it need {wanted}")
    elements = _elements(spec, output)
    last = settings.index + settings.width - 1
    if elements is not None and last >= elements:
        what = f"labels are of element {last} of output '{output.name}'"
        raise ModelLoadError(f"{what}, but a row has {elements}, of which the first is 0")


def _elements(spec: ModelSpec, tensor: TensorSpec) -> int | None:
    """How many a row has; None where the model leaves that open."""
    dims = tensor.shape[1:] if spec.max_batch_size else tensor.shape
    return None if any(dim < 0 for dim in dims) else math.prod(dims)


def _slicer(spec: ModelSpec, wanted: str) -> Slicer | None:
    if not wanted:
        return None
    names = [tensor.name for tensor in spec.inputs]
    if wanted in names:
        return Slicer(names.index(wanted), 0)
    name, bracket, index = wanted.removesuffix("]").rpartition("[")
    if bracket and wanted.endswith("]") and name in names and index.isascii() and index.isdecimal():
        elements = _elements(spec, spec.inputs[names.index(name)])
        if elements is not None and int(index) >= elements:
            has = f"a row of '{name}' has {elements} elements, of which the first is 0"
            raise ModelLoadError(f"labels are cut by '{wanted}', but {has}")
        return Slicer(names.index(name), int(index))
    raise ModelLoadError(f"labels are cut by '{wanted}', but the model's inputs are {', '.join(names)}")


class LabelService:
    """The labels of all models. See the module's text for who may call what.

    ``folder``: where they are kept over restarts; None: nowhere.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._files: LabelFiles | None = None
        self._making = threading.Lock()
        self._lock = threading.Lock()  # guards the list; only ever held for a moment
        self._all: list[ModelLabels] = []
        self._alarms: deque[tuple[ModelLabels, LabelAlarm]] = deque()
        self._listeners: tuple[OnJoined, ...] = ()

    def acquire(self, model: str, version: str, watch: LabelWatch) -> ModelLabels:
        """The model's labels under these settings, one lease more. Blocks: compiles kernels."""
        with self._making:
            found = self._held(model, version, watch)
            if found is None:
                found = ModelLabels(model, watch, lambda labels, alarm: self._alarms.append((labels, alarm)))
                self._kept().restore(found)
                older = [labels for labels in self.all() if labels.model == model]
                if older:  # other settings count anew, but what was told of remains
                    found.monitor.take_past(older[-1].monitor)
                found.monitor.join.subscribe(self._tell)
                with self._lock:
                    found.leases[version] += 1
                    self._all.append(found)
        return found

    def _held(self, model: str, version: str, watch: LabelWatch) -> ModelLabels | None:
        with self._lock:
            for found in self._all:
                if found.model == model and found.watch == watch:
                    found.leases[version] += 1
                    return found
        return None

    def release(self, labels: ModelLabels, version: str) -> None:
        """One lease less; without one the labels are saved and end. Blocks: writes a file."""
        with self._making:  # who asks for them meanwhile gets these, or goes on from what was saved
            with self._lock:
                labels.leases[version] -= 1
                over = not labels.leases.total()
                if over:
                    self._all.remove(labels)
            if over:
                labels.save(self._kept())

    def _kept(self) -> LabelFiles:
        """Importing it takes the kernels along, which a process without labels has no use for."""
        if self._files is None:
            from server.monitoring.files import LabelFiles

            self._files = LabelFiles(self._folder)
        return self._files

    def all(self) -> list[ModelLabels]:
        """By model, the newest last."""
        with self._lock:
            return sorted(self._all, key=lambda labels: labels.model)

    def subscribe(self, listener: OnJoined) -> Callable[[], None]:
        """Have the rows that got their label handed to ``listener``, on the drain thread. Call the result to end it.

        They are those of one model at a time, in the order their labels came. A listener must not wait; what it raises
        is logged.
        """

        def heard(joined: Sequence[Joined]) -> None:
            try:
                listener(joined)
            except Exception as error:  # the boundary: a listener must not end the counting
                log.error("joined_not_passed_on", model=joined[0].model, rows=len(joined), exc_info=error)

        self._listeners = (*self._listeners, heard)

        def end() -> None:
            self._listeners = tuple([other for other in self._listeners if other is not heard])

        return end

    def _tell(self, joined: Sequence[Joined]) -> None:
        for listener in self._listeners:
            listener(joined)

    # --- the drain thread --------------------------------------------------------------------------------------------

    def drain(self, now_ns: int) -> None:
        """Join and judge what waits, of all models. Raises ExceptionGroup at the end of what went wrong."""
        failures: list[Exception] = []
        for labels in self.all():
            try:
                labels.monitor.drain(now_ns)
            except Exception as error:  # noqa: BLE001 - the boundary of one model: the others go on
                failures.append(error)
        if failures:
            raise ExceptionGroup("labels failed", failures)

    def save(self) -> None:
        """Write what is new since the last time. What goes wrong is logged."""
        for labels in self.all():
            labels.save(self._kept())

    def take_alarms(self) -> Iterator[tuple[ModelLabels, LabelAlarm]]:
        """Changes of alarms since the last call."""
        while self._alarms:
            yield self._alarms.popleft()

    def families(self) -> tuple[FamilySnapshot, ...]:
        """All metrics as they are now. Takes milliseconds."""
        found: dict[str, tuple[tuple[str, ...], Points]] = {}
        seen: set[str] = set()
        for labels in reversed(self.all()):
            if labels.model in seen:  # under older settings, until their last version is gone
                continue
            seen.add(labels.model)
            for sample in labels.monitor.samples():
                names, points = found.setdefault(sample.name, (tuple(sample.labels), {}))
                points[tuple([sample.labels[name] for name in names])] = sample.value
        return tuple([_family(name, names, points) for name, (names, points) in sorted(found.items())])

    # --- reading -----------------------------------------------------------------------------------------------------

    def list(self) -> Sequence[dict[str, Any]]:
        """Every version whose labels are joined: its windows of labels, and the signals in alarm by arm."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for labels in self.all():  # those under the newest settings stand last
            with self._lock:
                versions = [version for version, leases in labels.leases.items() if leases]
            alarms = labels.monitor.in_alarm()
            for version in versions:
                own = {arm: names for (number, arm, part), names in alarms if number == version and part == ALL}
                windows = [window.name for window in labels.watch.settings.windows]
                entry = {"model": labels.model, "version": version, "profile": "", "windows": windows, "alarms": own}
                found[labels.model, version] = entry
        return list(found.values())

    def report_of(self, model: str, version: str) -> dict[str, Any] | None:
        """What is known of the labels of one version now; None when they are not joined. Not on the loop."""
        found = self._newest(model, version)
        if found is None:
            return None
        report = found.monitor.report()
        groups = [group for group in report["join"]["groups"] if group["version"] == version]
        parts = {
            part: [entry for entry in report[part] if entry["version"] == version]
            for part in ("windows", "learning", "estimates")
        }
        return {**report, **parts, "join": {**report["join"], "groups": groups}}

    def past_alarms(self, model: str, version: str) -> Sequence[dict[str, Any]]:
        """The last changes of alarms of a version's labels, oldest first. Not on the loop."""
        found = self._newest(model, version)
        return [] if found is None else [alarm_row(alarm) for alarm in found.monitor.past_alarms(version)]

    def _newest(self, model: str, version: str) -> ModelLabels | None:
        found = [labels for labels in self.all() if labels.model == model and labels.leases[version]]
        return found[-1] if found else None


def _family(name: str, label_names: tuple[str, ...], points: Points) -> FamilySnapshot:
    kind: Kind = "gauge" if name in _GAUGES else "counter"
    public = f"tidegate_{name}" if kind == "gauge" or name.endswith("_total") else f"tidegate_{name}_total"
    text = _TEXTS.get(public, f"Labels of a model: {name.removeprefix('label_').replace('_', ' ')}.")
    return FamilySnapshot(public, text, kind, label_names, points, "max" if kind == "gauge" else "sum")


def alarm_row(alarm: LabelAlarm) -> dict[str, Any]:
    """An alarm of labels as the alarm history shows it beside those of columns."""
    signal = alarm.signal
    return {
        "state": alarm.state,
        "arm": alarm.arm,
        "segment": alarm.slice,
        "column": signal.name,
        "check": signal.kind,
        "window": alarm.window,
        "episode": alarm.episode,
        "start_ns": alarm.start_ns,
        "end_ns": alarm.end_ns,
        "verdict": {"test": signal.name, "level": signal.level},
        "signal": signal.to_dict(),
    }
