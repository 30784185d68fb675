"""Labels of one model, from the join to the alarm: what the server holds.

``join.remember`` and ``join.label`` are the serving thread's. ``drain`` joins what waits, scores it in windows per
group (version, arm, slice), looks at every window that moved and says which alarms were raised or cleared. A group's
first rows are its reference, unless a reference was given. Rows of a slice count in the slice and in their arm's whole.

Reports come from any other thread, under a lock that the serving thread never takes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from monitor.alarms import AlarmBook
from monitor.decay import ReferenceRows, Signal, SignalJudge
from monitor.errors import CalibrationError, SettingsError, StateError
from monitor.estimate import Calibrator, Estimate, estimate_accuracy, estimate_binary
from monitor.history import AlarmHistory
from monitor.kernels._jit import compile_all
from monitor.label_state import GroupKey, SavedGroup, SavedLabels, from_profile, reference_rows
from monitor.label_windows import LabelWindows, SeriesState, WindowRows, WindowsState, merge_windows, windows_of
from monitor.labels import LabelJoin
from monitor.outcomes import ALL, Joined, LabelReference, LabelSettings
from monitor.performance import scorer_of
from monitor.types import Array

LabelState: TypeAlias = Mapping[GroupKey, WindowsState]

#: Rows that a calibrator is fitted on at most, where a reference has cells instead of rows.
_FITTED: Final = 100_000


@dataclass(slots=True, frozen=True)
class LabelAlarm:
    """A change of a signal's alarm in one group. ``episode`` is the same for raise and end."""

    state: Literal["raised", "cleared"]
    model: str
    version: str
    arm: str
    slice: str
    window: str
    episode: int
    look: int
    start_ns: int
    end_ns: int
    signal: Signal


class Sample(NamedTuple):
    """One value of /metrics."""

    name: str
    labels: dict[str, str]
    value: float


OnLabelAlarm: TypeAlias = Callable[[LabelAlarm], None]


class _Group:
    """Windows, reference and alarms of one (version, arm, slice)."""

    def __init__(self, settings: LabelSettings, reference: ReferenceRows | None) -> None:
        self._settings = settings
        self._scorer = scorer_of(settings)
        self.windows = LabelWindows(settings, self._scorer)
        self.book = AlarmBook(len(settings.signals), [w.name for w in settings.windows], settings.rules.alarm)
        self.reference = reference
        self._first: list[tuple[Array, Array]] = []
        self._missing = 0 if reference is not None else settings.rules.learn_rows
        #: What the last look of each window found.
        self.signals: dict[str, list[Signal]] = {}
        #: What the windows held when their samples were last made, and those: an AUC takes a while.
        self.samples: tuple[list[tuple[int, ...]], list[Sample]] = ([], [])

    @property
    def learning(self) -> int:
        """Rows that the reference still lacks."""
        return self._missing

    def give(self, reference: ReferenceRows) -> None:
        """A reference from elsewhere, instead of what was or is being learnt."""
        self.reference, self._missing, self._first = reference, 0, []

    def saved(self, key: GroupKey) -> SavedGroup:
        """To be written down at once: the open panes change with the next row."""
        first = None if not self._first else self._joined_first()
        return SavedGroup(key, self.windows.unfinished(), self.book.to_dict(), self.reference, first, self._missing)

    def restore(self, saved: SavedGroup) -> None:
        """Have a new group go on from there. Raises StateError."""
        self.windows.restore(saved.windows)
        self.book.restore(saved.alarms)
        if saved.first is not None:
            rows, labels = saved.first
            if rows.ndim != 2 or rows.shape[1] != self._settings.width or labels.shape != rows.shape[:1]:
                raise StateError("the saved rows of a reference do not fit the settings")
            self._first = [saved.first]
        if saved.reference is not None:
            empty, tally = self._scorer.empty(), saved.reference.tally
            if tally.counts.shape != empty.counts.shape or len(tally.sums) != len(empty.sums):
                raise StateError("the saved reference is of another task")
        self.reference, self._missing = saved.reference, saved.missing

    def _joined_first(self) -> tuple[Array, Array]:
        rows, labels = map(np.concatenate, zip(*self._first, strict=True))
        return rows, labels

    def add(self, predictions: Array, labels: Array, came: Array, times: Array) -> list[WindowRows]:
        if self._missing:
            taken = min(self._missing, len(labels))
            self._first.append((predictions[:taken], labels[:taken]))
            self._missing -= taken
            if not self._missing:
                self.give(reference_rows(self._settings, *self._joined_first()))
        return self.windows.add(predictions, labels, came, times)

    def in_alarm(self) -> list[str]:
        return [self._settings.signals[place] for place in np.flatnonzero(self.book.active)]


class LabelMonitor:
    """Making one compiles kernels: never do it in a request. ``drain`` is for one thread, reading for any but serving.

    ``on_alarm`` and the join's subscribers are called on the draining thread with the lock held: they must only hand
    on what they get.
    """

    def __init__(self, model: str, settings: LabelSettings, on_alarm: OnLabelAlarm | None = None) -> None:
        compile_all()
        self.model, self.settings = model, settings
        self.join = LabelJoin(model, settings, self._predicted if self._estimates(settings) else None)
        #: Groups that made room for others.
        self.forgotten_groups = 0
        self._scorer = scorer_of(settings)
        self._judge = SignalJudge(settings, self._scorer)
        self._on_alarm = on_alarm
        self._groups: OrderedDict[GroupKey, _Group] = OrderedDict()
        self._given: OrderedDict[str, ReferenceRows] = OrderedDict()
        self._recent: OrderedDict[tuple[str, str], deque[float]] = OrderedDict()
        #: By version and arm, with the reference that it was fitted on; None where that has too little.
        self._calibrators: dict[tuple[str, str], tuple[ReferenceRows, Calibrator | None]] = {}
        self._past = AlarmHistory(LabelAlarm)
        self._changes = 0
        self._lock = threading.Lock()

    @staticmethod
    def _estimates(settings: LabelSettings) -> bool:
        return settings.estimate_rows > 0 and settings.task != "regression" and settings.form != "class"

    # --- counting --------------------------------------------------------------------------------------------------

    def drain(self, now_ns: int) -> list[Joined]:
        """Join, score and judge what waits, and close what is over at ``now_ns`` (wall). The rows joined."""
        with self._lock:
            taken = self.join.taken
            joined = self.join.drain(now_ns)
            self._changes += self.join.taken != taken
            for key, rows in self._by_group(joined):
                self._score(key, rows)
            for key, group in self._groups.items():
                self._look(key, group, group.windows.tick(now_ns))
        return joined

    def learn(self, version: str, predictions: Array, labels: Array) -> None:
        """Give a version's reference: rows of its own evaluation. For arms as a whole, instead of one that was learnt.

        Predictions (n, width) as the join gives them (probabilities, not logits). Raises SettingsError for shapes or
        values that do not fit.
        """
        rows, truth = np.asarray(predictions, "f8"), np.asarray(labels, "f8")
        if rows.ndim != 2 or rows.shape[1] != self.settings.width or truth.shape != rows.shape[:1] or not len(rows):
            raise SettingsError(
                f"a reference needs predictions (n, {self.settings.width}) and labels (n,), got {rows.shape} and "
                f"{truth.shape}"
            )
        if not self._in_range(rows, truth):
            raise SettingsError(f"the reference of {self.model}:{version} holds values that are none of its task")
        self._give(version, reference_rows(self.settings, rows, truth))

    def learn_from(self, version: str, reference: LabelReference) -> None:
        """The same with the reference that a version's profile carries. Raises SettingsError when it does not fit."""
        self._give(version, from_profile(self.settings, reference))

    def _give(self, version: str, found: ReferenceRows) -> None:
        with self._lock:
            self._changes += 1
            self._given[version] = found
            if len(self._given) > self.settings.max_groups:
                self._given.popitem(last=False)
            for key, group in self._groups.items():
                if key[0] == version and key[2] == ALL:
                    group.give(found)

    def _in_range(self, rows: Array, truth: Array) -> bool:
        if not (np.isfinite(rows).all() and np.isfinite(truth).all()):
            return False
        if self.settings.task == "regression":
            return bool(max(np.abs(rows).max(), np.abs(truth).max()) < 1e60)
        classes = max(2, len(self.settings.classes))
        top = classes - 1 if self.settings.form == "class" else 1
        whole = bool((truth == np.floor(truth)).all() and truth.min() >= 0 and truth.max() < classes)
        return whole and bool(rows.min() >= 0 and rows.max() <= top)

    def restart(self) -> None:
        """Forget windows, alarms and learnt references, as after a promotion; the join goes on."""
        with self._lock:
            self._changes += 1
            self._groups.clear()
            self._recent.clear()
            self._past.restore(None)

    def _by_group(self, joined: Sequence[Joined]) -> Iterable[tuple[GroupKey, list[Joined]]]:
        groups: dict[GroupKey, list[Joined]] = {}
        for row in joined:
            groups.setdefault((row.version, row.arm, ALL), []).append(row)
            if row.slice != ALL:
                groups.setdefault((row.version, row.arm, row.slice), []).append(row)
        return groups.items()

    def _score(self, key: GroupKey, rows: Sequence[Joined]) -> None:
        group = self._group(key)
        predictions = np.array([row.prediction for row in rows], "f8")
        labels = np.array([row.label for row in rows], "f8")
        came = np.array([max(row.labelled_ns, row.predicted_ns) for row in rows], "i8")
        times = np.array([row.outcome_ns for row in rows], "i8")
        self._look(key, group, group.add(predictions, labels, came, times))

    def _group(self, key: GroupKey) -> _Group:
        if key not in self._groups:
            self._groups[key] = _Group(self.settings, self._given.get(key[0]) if key[2] == ALL else None)
            if len(self._groups) > self.settings.max_groups:
                self._groups.popitem(last=False)
                self.forgotten_groups += 1
        self._groups.move_to_end(key)
        return self._groups[key]

    def _look(self, key: GroupKey, group: _Group, moved: Sequence[WindowRows]) -> None:
        for window in moved:
            if not self._tells(window):
                continue
            found = self._judge.signals(window, group.reference, len(self._groups))
            group.signals[window.window.name] = found
            over = np.array([signal.over for signal in found])
            quiet = np.array([signal.quiet for signal in found])
            for change in group.book.look(window.window.name, over, quiet):
                self._changes += 1
                alarm = LabelAlarm(
                    "raised" if change.raised else "cleared", self.model, *key, change.window, change.episode,
                    window.look, window.start_ns, window.end_ns, found[change.column],
                )  # fmt: skip
                self._past.add(alarm)
                if self._on_alarm is not None:
                    self._on_alarm(alarm)

    def _tells(self, window: WindowRows) -> bool:
        """Windows of rows are looked at when they are full, those of time when they hold enough."""
        if window.window.unit == "rows":
            return window.full
        return window.rows >= self.settings.rules.alarm.min_rows

    def _predicted(self, version: str, arm: str, values: Sequence[float]) -> None:
        """Keep what an estimate needs of the newest predictions."""
        key = (version, arm)
        if key not in self._recent:
            self._recent[key] = deque(maxlen=self.settings.estimate_rows)
            if len(self._recent) > self.settings.max_groups:
                self._recent.popitem(last=False)
        if self.settings.task == "multiclass":
            scores = np.asarray(values).reshape(-1, self.settings.width)
            totals = scores.sum(axis=1)
            values = (scores.max(axis=1) / np.where(totals > 0, totals, 1.0)).tolist()
        self._recent[key].extend(values)

    # --- over a restart --------------------------------------------------------------------------------------------

    @property
    def changes(self) -> int:
        """Goes up whenever there is something to be saved that was not there before."""
        return self._changes

    def snapshot(self, mark: str, run: str) -> bytes:
        """Windows, references, alarms and past ones, counts, and the predictions and labels that wait, for ``restore``.

        ``mark`` and ``run``: see ``monitor.label_state``.
        """
        with self._lock:
            groups = [group.saved(key) for key, group in self._groups.items()]
            past = self._past.state()
            saved = SavedLabels(self.model, mark, run, self.join.saved(), groups, self.forgotten_groups, past)
            return saved.to_bytes()

    def restore(self, saved: SavedLabels) -> None:
        """Have a new monitor go on from there. Raises StateError when it does not fit, and then takes nothing."""
        if len(saved.groups) > self.settings.max_groups:
            raise StateError(
                f"the saved labels have {len(saved.groups)} groups, at most {self.settings.max_groups} fit"
            )
        groups: OrderedDict[GroupKey, _Group] = OrderedDict()
        for found in saved.groups:
            groups[found.key] = _Group(self.settings, None)
            groups[found.key].restore(found)
        past = AlarmHistory(LabelAlarm)
        past.restore(saved.past)
        with self._lock:
            self.join.restore(saved.join)
            self._groups, self.forgotten_groups, self._past = groups, saved.forgotten_groups, past
            for group in groups.values():
                for window in group.windows.now():
                    if self._tells(window):
                        signals = self._judge.signals(window, group.reference, len(groups))
                        group.signals[window.window.name] = signals

    def take_past(self, other: LabelMonitor) -> None:
        """Have the past alarms of another monitor instead of its own: one that joined the model's labels before."""
        with other._lock:
            past = other._past.state()
        with self._lock:
            self._past.restore(past)
            self._changes += 1

    # --- reading ---------------------------------------------------------------------------------------------------

    def past_alarms(self, version: str) -> list[LabelAlarm]:
        """The newest changes of a version's alarms, oldest first; those before a restart too."""
        with self._lock:
            return [alarm for alarm in self._past.alarms() if alarm.version == version]

    def report(self) -> dict[str, Any]:
        """Join, windows, signals, alarms and estimates as plain values; NaN where something is undefined."""
        with self._lock:
            return {
                "model": self.model,
                "task": self.settings.task,
                "output": self.settings.output,
                "name": self.settings.name,
                "join": {**self.join.counters(), "groups": [group.to_dict() for group in self.join.groups()]},
                "windows": self._windows(self._state(), own=True),
                "learning": [
                    {**_named(key), "rows_missing": group.learning}
                    for key, group in sorted(self._groups.items())
                    if group.learning
                ],
                "estimates": [
                    {"version": version, "arm": arm, **estimate.to_dict()}
                    for (version, arm), estimate in self._estimate_all()
                ],
                "forgotten_groups": self.forgotten_groups,
            }

    def state(self) -> LabelState:
        """Closed panes of every group, for a merge with those of other processes."""
        with self._lock:
            return self._state()

    def windows(self, state: LabelState) -> list[dict[str, Any]]:
        """Metrics per group and window of any state, merged ones included. Raises StateError for other windows."""
        return self._windows(state, own=False)

    def in_alarm(self) -> list[tuple[GroupKey, list[str]]]:
        """Groups with alarms, and of which signals."""
        with self._lock:
            return [(key, names) for key, group in sorted(self._groups.items()) if (names := group.in_alarm())]

    def samples(self) -> list[Sample]:
        """Values for /metrics; metrics of arms as a whole only, so there are few."""
        with self._lock:
            return [*self._join_samples(), *self._window_samples()]

    def _state(self) -> LabelState:
        return {key: group.windows.state() for key, group in self._groups.items()}

    def _windows(self, state: LabelState, *, own: bool) -> list[dict[str, Any]]:
        found = []
        for key in sorted(state):
            group = self._groups.get(key) if own else None
            for window in windows_of(state[key], self.settings.windows, self._scorer):
                entry: dict[str, Any] = {
                    **_named(key),
                    "window": window.window.name,
                    "rows": window.rows,
                    "full": window.full,
                    "start_ns": window.start_ns,
                    "end_ns": window.end_ns,
                    "outdated": window.outdated,
                    "metrics": self._scorer.metrics(window.tally, window.ranking),
                }
                if group is not None:
                    signals = group.signals.get(window.window.name, [])
                    entry |= {"signals": [s.to_dict() for s in signals], "in_alarm": group.in_alarm()}
                found.append(entry)
        return found

    def _estimate_all(self) -> Iterable[tuple[tuple[str, str], Estimate]]:
        for key, scores in sorted(self._recent.items()):
            calibrator = self._calibrator(*key)
            if calibrator is not None:
                recent = np.array(scores)
                if self.settings.task == "binary":
                    yield key, estimate_binary(recent, calibrator, self.settings.threshold)
                else:
                    yield key, estimate_accuracy(recent, calibrator)

    def _calibrator(self, version: str, arm: str) -> Calibrator | None:
        """Of the arm's reference; None while there is none, or too little in it."""
        group = self._groups.get((version, arm, ALL))
        reference = self._given.get(version) if group is None else group.reference
        if reference is None or reference.ranking is None:
            return None
        known = self._calibrators.get((version, arm))
        if known is None or known[0] is not reference:
            try:
                fitted = Calibrator.fit(*reference.ranking.sample(_FITTED), self.settings.calibrator)
            except CalibrationError:
                fitted = None
            known = reference, fitted
            self._calibrators = {key: fit for key, fit in self._calibrators.items() if key in self._recent}
            self._calibrators[version, arm] = known
        return known[1]

    def _join_samples(self) -> Iterable[Sample]:
        model = {"model": self.model}
        for name, value in self.join.counters().items():
            yield Sample(f"label_{name}", model, float(value))
        for group in self.join.groups():
            labels = {**model, "version": group.version, "arm": group.arm, "slice": group.slice}
            for fate in ("predicted", "joined", "late", "duplicate", "conflicting", "expired"):
                yield Sample("label_rows_total", {**labels, "fate": fate}, float(getattr(group, fate)))
            if not isnan(group.join_rate):
                yield Sample("label_join_ratio", labels, group.join_rate)

    def _window_samples(self) -> Iterable[Sample]:
        for key, group in sorted(self._groups.items()):
            if key[2] == ALL:
                state = group.windows.state()
                held = [_held(series) for series in state]
                if group.samples[0] != held:
                    group.samples = held, list(self._metric_samples({key: state}))
                yield from group.samples[1]
        for key, group in sorted(self._groups.items()):
            for name, active in zip(self.settings.signals, group.book.active, strict=True):
                yield Sample("performance_alarm", {"model": self.model, **_named(key), "signal": name}, float(active))

    def _metric_samples(self, state: LabelState) -> Iterable[Sample]:
        for entry in self._windows(state, own=False):
            labels = {"model": self.model, **{name: entry[name] for name in ("version", "arm", "window")}}
            yield Sample("label_outdated_rows_total", labels, float(entry["outdated"]))
            for name, value in entry["metrics"].items():
                if isinstance(value, int | float) and not isnan(value):
                    yield Sample("performance", {**labels, "metric": name}, float(value))


def _held(series: SeriesState) -> tuple[int, ...]:
    """Changes whenever rows come into closed panes: a pane closes, or rows are told of late."""
    return series.closed, sum([pane.rows for pane in series.panes]), *series.outdated.values()


def _named(key: GroupKey) -> dict[str, str]:
    return {"version": key[0], "arm": key[1], "slice": key[2]}


def merge_states(states: Sequence[LabelState]) -> dict[GroupKey, WindowsState]:
    """The windows of several processes as one, the same bits in any order. Raises StateError for none."""
    if not states:
        raise StateError("there are no label states to merge")
    keys = sorted({key for state in states for key in state})
    return {key: merge_windows([state[key] for state in states if key in state]) for key in keys}
