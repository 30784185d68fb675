"""Looks and reports: a window's counts, a reference and the rules in; verdicts, alarms and reports out.

``Judge`` keeps the alarms of one profile's arms. The process that counts uses one on its own windows; whoever adds up
several processes uses one on the merged windows instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from monitor.alarms import AlarmBook
from monitor.calibration import INFLATION_LIMIT, Calibration, log_level
from monitor.drift.base import Pair
from monitor.drift.judge import Judgement, judge
from monitor.drift.scores import score_columns
from monitor.errors import ProfileMismatch
from monitor.layout import Layout
from monitor.state import MonitorState
from monitor.types import Alarm, Array, DriftReport, Settings, WindowCounts, WindowReport


class Judge:
    """Looks at windows of any arm. Not thread safe. Raises ProfileMismatch for a calibration of another profile."""

    def __init__(self, layout: Layout, settings: Settings, calibration: Calibration | None = None) -> None:
        if calibration is not None and calibration.sha256 != layout.sha256:
            raise ProfileMismatch(
                f"the calibration is of profile {calibration.sha256[:12]}, the monitor's is {layout.sha256[:12]}"
            )
        self.layout = layout
        self.settings = settings
        self.calibration = calibration or Calibration.none(layout)
        self._windows = {window.name: window for window in settings.windows}
        self._books: dict[str, AlarmBook] = {}

    def look(self, arm: str, counts: WindowCounts, reference: Array | None = None) -> list[Alarm]:
        """One look of one window: what changed. ``reference``: int64 counts, the profile's own when None."""
        pair = Pair(self.layout, self.layout.reference if reference is None else reference, counts.cells)
        judged = self._judge(pair, counts)
        changes = self.book(arm).look(counts.window, judged.over, judged.quiet)
        if not changes:
            return []
        scores = score_columns(pair, judged, self.calibration.ks)
        return [
            Alarm(
                "raised" if change.raised else "cleared",
                arm,
                self.layout.names[change.column],
                change.window,
                change.episode,
                counts.look,
                counts.start_ns,
                counts.end_ns,
                judged.verdict(change.column, self.layout.names[change.column], self.settings.rules),
                scores[change.column],
            )
            for change in changes
        ]

    def book(self, arm: str) -> AlarmBook:
        """The arm's alarms, made at its first look."""
        if arm not in self._books:
            self._books[arm] = AlarmBook(len(self.layout.columns), list(self._windows), self.settings.rules)
        return self._books[arm]

    def in_alarm(self, arm: str) -> tuple[str, ...]:
        """Names of the columns in alarm."""
        if arm not in self._books:
            return ()
        return tuple([self.layout.names[place] for place in np.flatnonzero(self._books[arm].active)])

    def window_report(
        self, arm: str, counts: WindowCounts, reference: Array | None = None, inflation: Array | None = None
    ) -> WindowReport:
        """All statistics of one window, the strongest evidence first. Changes nothing."""
        pair = Pair(self.layout, self.layout.reference if reference is None else reference, counts.cells)
        judged = self._judge(pair, counts)
        known = self.calibration.ks if inflation is None else np.maximum(self.calibration.ks, inflation)
        scores = score_columns(pair, judged, known)
        order = np.argsort(-judged.ratio, kind="stable")
        rules = self.settings.rules
        return WindowReport(
            arm,
            counts.window,
            counts.rows,
            counts.dropped,
            counts.sampled,
            counts.full,
            counts.start_ns,
            counts.end_ns,
            float(np.exp(self._log_level(counts))),
            tuple([scores[place] for place in order]),
            tuple([judged.verdict(place, self.layout.names[place], rules) for place in order]),
            self.in_alarm(arm),
        )

    def report(
        self,
        state: MonitorState,
        *,
        reference: Array | None = None,
        inflation: Mapping[str, Array] | None = None,
    ) -> DriftReport:
        """Every window of every arm of a state, live or merged. Equal counts give equal reports, bit for bit."""
        if state.sha256 != self.layout.sha256:
            raise ProfileMismatch(
                f"the state is of profile {state.sha256[:12]}, the monitor's is {self.layout.sha256[:12]}"
            )
        live = inflation or {}
        windows = [
            self.window_report(arm, state.arms[arm].window(window), reference, live.get(arm))
            for arm in sorted(state.arms)
            for window in self.settings.windows
        ]
        warnings = self.warnings(live)
        arms = sorted(state.arms)
        return DriftReport(
            state.model,
            state.version,
            state.sha256,
            tuple(windows),
            {arm: state.arms[arm].rows for arm in arms},
            {arm: state.arms[arm].dropped for arm in arms},
            {arm: state.arms[arm].refused for arm in arms},
            not self._uncalibrated(live),
            (*warnings, *self._sampling(state)),
        )

    def compare(self, counts: WindowCounts, other: WindowCounts, arm: str) -> WindowReport:
        """The arm's window held against another arm's: a two-sample test on the same cells."""
        return self.window_report(arm, counts, other.cells)

    def warnings(self, inflation: Mapping[str, Array]) -> tuple[str, ...]:
        """Sentences about what the p-values cannot be trusted for."""
        found = []
        for arm, names, worst in self._dependent(inflation):
            found.append(
                f"p-values are NOT calibrated for arm {arm}: consecutive rows of {', '.join(names)} depend on each "
                f"other (counts vary up to {worst:.1f} times as much as those of independent rows); expect false "
                "alarms until the monitor is given a calibration made from drift-free traffic in time order"
            )
        unsettled = np.flatnonzero(~self.calibration.settled)
        if len(unsettled):
            names = [self.layout.names[place] for place in unsettled]
            found.append(
                f"p-values are NOT calibrated for {_some(names)}: rows depend on each other over more than the "
                f"{self.calibration.block_rows} rows of a calibration block; calibrate with more traffic"
            )
        return tuple(found)

    def _dependent(self, inflation: Mapping[str, Array]) -> list[tuple[str, list[str], float]]:
        """(arm, columns, worst inflation) where live traffic varies more than the calibration allows for."""
        found = []
        for arm, values in sorted(inflation.items()):
            over = np.flatnonzero(values > INFLATION_LIMIT * self.calibration.psi)
            if len(over):
                found.append((arm, [_some([self.layout.names[place] for place in over])], float(values[over].max())))
        return found

    def _uncalibrated(self, inflation: Mapping[str, Array]) -> bool:
        return bool(self._dependent(inflation)) or not bool(self.calibration.settled.all())

    def _sampling(self, state: MonitorState) -> list[str]:
        return [
            f"arm {arm}: {found.dropped} of {found.rows + found.dropped} rows were dropped before they were counted; "
            "windows marked as sampled rest on the others"
            for arm, found in sorted(state.arms.items())
            if found.dropped
        ]

    def _judge(self, pair: Pair, counts: WindowCounts) -> Judgement:
        return judge(pair, self.settings.rules, self._log_level(counts), self.calibration)

    def _log_level(self, counts: WindowCounts) -> float:
        window = self._windows[counts.window]
        return log_level(self.settings.rules, window, counts, len(self.layout.columns), len(self._windows))

    def alarms_state(self) -> dict[str, Any]:
        return {arm: book.to_dict() for arm, book in self._books.items()}

    def restore_alarms(self, found: Mapping[str, Any]) -> None:
        for arm, entry in found.items():
            self.book(arm).restore(entry)

    def restart(self, arm: str) -> None:
        """Begin the arm's alarms anew."""
        self.book(arm).restart()


def _some(names: list[str]) -> str:
    """At most five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
