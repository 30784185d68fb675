"""Looks and reports: a window's counts, a reference and the rules in; verdicts, alarms and reports out.

``Judge`` keeps the alarms of one profile's arms and segments, and the history of their looks. The process that counts
uses one on its own windows; whoever adds up several processes uses one on the merged windows instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from monitor.alarms import AlarmBook, Change
from monitor.calibration import INFLATION_LIMIT, Calibration, log_level
from monitor.drift.base import Pair, running_in
from monitor.drift.contribution import contributions, distributions, order_of
from monitor.drift.judge import Judgement, Known, Looker, judge
from monitor.drift.quality import Checks, Glance, QualityJudgement, checks_of, judge_quality
from monitor.drift.rates import rates
from monitor.drift.scores import score_columns
from monitor.errors import ProfileMismatch, StateError
from monitor.history import History
from monitor.layout import Layout, Sample
from monitor.schema import Check, compile_rules
from monitor.segments import Cutter
from monitor.state import MonitorState
from monitor.types import (
    Alarm,
    Array,
    ColumnScore,
    DriftReport,
    QualityScore,
    SegmentReport,
    Settings,
    Verdict,
    WindowCounts,
    WindowFigures,
    WindowReport,
)

#: Columns that the report of a segment names.
_STRONGEST: Final = 5


@dataclass(slots=True, eq=False)
class _View:
    """Where the looks of one window of an arm find all that they need."""

    arm: str
    book: AlarmBook
    quality: AlarmBook
    history: History
    looker: Looker


class Judge:
    """Looks at windows of any arm. Not thread safe.

    Raises ProfileMismatch for a calibration of another profile, SettingsError for rules or segments that do not fit.
    Every test has the same level: columns, windows and, with segments, the whole and each of its parts share the ERT.
    """

    def __init__(self, layout: Layout, settings: Settings, calibration: Calibration | None = None) -> None:
        if calibration is not None and calibration.sha256 != layout.sha256:
            raise ProfileMismatch(
                f"the calibration is of profile {calibration.sha256[:12]}, the monitor's is {layout.sha256[:12]}"
            )
        self.layout = layout
        self.settings = settings
        self.calibration = calibration or Calibration.none(layout)
        self.cutter = Cutter(layout, settings.segment) if settings.segment is not None else None
        #: The rules that are counted, in the order of the marks behind the cells.
        self.rules: tuple[Check, ...] = compile_rules(settings.schema, layout, "count")
        self.checks: Checks = checks_of(layout, [(c.place, f"rule {c.name}", c.tolerated) for c in self.rules])
        self._cuts = 1 + (len(self.cutter.names) if self.cutter is not None else 0)
        self._windows = {window.name: window for window in settings.windows}
        #: By window and number of tests, where the level is the same for all looks.
        self._levels: dict[tuple[str, int], float] = {}
        self._known = Known()
        self._glance = Glance(layout, self.checks, settings.rules)
        #: For windows of segments; those of arms have their own.
        self._looker = self._new_looker()
        #: The latest reference that was not the profile's, and what was made of it.
        self._season: tuple[Array, Sample] | None = None
        #: By (arm, segment); the segment is empty for the whole arm.
        self._books: dict[tuple[str, str], AlarmBook] = {}
        self._quality: dict[str, AlarmBook] = {}
        self._history: dict[tuple[str, str], History] = {}
        #: By (arm, window).
        self._views: dict[tuple[str, str], _View] = {}

    @property
    def rule_names(self) -> tuple[str, ...]:
        """What each mark behind the cells counts."""
        return tuple([f"{check.column.name}: {check.name} {check.wanted}" for check in self.rules])

    # --- looks -----------------------------------------------------------------------------------------------------

    def look(self, arm: str, counts: WindowCounts, reference: Array | None = None) -> list[Alarm]:
        """One look of one window: what drift alarms changed.

        ``reference``: int64 counts, the profile's when None. One that is given again is taken to be as it was.
        """
        view, expected = self._view(arm, counts.window), self._expected(reference)
        return self._look(view, counts, expected, running_in(self.layout, counts))

    def look_at_all(self, arm: str, counts: WindowCounts, reference: Array | None = None) -> list[Alarm]:
        """The same, and what quality alarms changed: missing, out of range and new values, the rules of the schema."""
        view, expected = self._view(arm, counts.window), self._expected(reference)
        found = running_in(self.layout, counts)
        alarms = self._look(view, counts, expected, found)
        if not view.quality.alarmed and self._glance.is_clean(expected, found, view.looker.rows):
            view.quality.pass_by(counts.window)
            return alarms
        return [*alarms, *self._look_quality(view, counts, expected)]

    def _look(self, view: _View, counts: WindowCounts, expected: Sample, found: Array) -> list[Alarm]:
        """``found``: the running sums of the window."""
        level, looker, book = self._log_level(counts), view.looker, view.book
        changes: list[Change] = []
        if looker.look(expected, found, level) and not book.alarmed:
            book.pass_by(counts.window)
        else:
            changes = book.look(counts.window, looker.over, looker.quiet)
        view.history.add(counts.end_ns, counts.rows, level, looker.told, book.active)
        if not changes:
            return []
        return self._drift_alarms(view.arm, "", counts, Pair(self.layout, expected, counts), changes)

    def _look_quality(self, view: _View, counts: WindowCounts, expected: Sample) -> list[Alarm]:
        pair = Pair(self.layout, expected, counts)
        judged = self._judge_quality(pair, counts)
        changes = view.quality.look(counts.window, judged.over, judged.quiet)
        if not changes:
            return []
        scores = self._scores(pair, counts)
        return [
            _alarm(
                change,
                view.arm,
                counts,
                judged.verdict(self.checks, change.column),
                scores[int(self.checks.places[change.column])],
                check=self.checks.names[change.column],
                quality=judged.score(self.checks, change.column, in_alarm=change.raised),
            )
            for change in changes
        ]

    def look_segment(self, arm: str, segment: str, counts: WindowCounts) -> list[Alarm]:
        """One look of a segment's window, held against the segment's own reference."""
        pair, looker = self._segment_pair(segment, counts), self._looker
        looker.look(pair.expected, pair.found.running, self._log_level(counts))
        changes = self.book(arm, segment).look(counts.window, looker.over, looker.quiet)
        return self._drift_alarms(arm, segment, counts, pair, changes) if changes else []

    def _drift_alarms(
        self, arm: str, segment: str, counts: WindowCounts, pair: Pair, changes: list[Change]
    ) -> list[Alarm]:
        judged = self._judge(pair, counts)
        scores = score_columns(pair, judged, self.calibration.ks)
        verdicts = self._verdicts(judged)
        return [
            _alarm(change, arm, counts, verdicts(change.column), scores[change.column], segment=segment)
            for change in changes
        ]

    def _view(self, arm: str, window: str) -> _View:
        """Made at the first look, and what it is made of."""
        found = self._views.get((arm, window))
        if found is None:
            history = self._history.get((arm, window))
            if history is None:
                history = History(len(self.layout.columns), self.settings.history_looks)
                self._history[arm, window] = history
            found = _View(arm, self.book(arm), self._quality_book(arm), history, self._new_looker())
            self._views[arm, window] = found
        return found

    def _new_looker(self) -> Looker:
        return Looker(self.layout, self.settings.rules, self.calibration, self._known)

    def book(self, arm: str, segment: str = "") -> AlarmBook:
        """The alarms of an arm, or of one of its segments; made at the first look."""
        key = (arm, segment)
        if key not in self._books:
            self._books[key] = AlarmBook(len(self.layout.columns), list(self._windows), self.settings.rules)
        return self._books[key]

    def _quality_book(self, arm: str) -> AlarmBook:
        if arm not in self._quality:
            self._quality[arm] = AlarmBook(len(self.checks), list(self._windows), self.settings.rules)
        return self._quality[arm]

    def in_alarm(self, arm: str, segment: str = "") -> tuple[str, ...]:
        """Names of the columns in drift alarm."""
        found = self._books.get((arm, segment))
        return () if found is None else tuple([self.layout.names[place] for place in np.flatnonzero(found.active)])

    # --- reports ---------------------------------------------------------------------------------------------------

    def window_report(
        self, arm: str, counts: WindowCounts, reference: Array | None = None, inflation: Array | None = None
    ) -> WindowReport:
        """All statistics of one window, the strongest evidence first. ``reference``: as of ``look``."""
        return self._report(arm, counts, self._pair(counts, reference), inflation)

    def _report(self, arm: str, counts: WindowCounts, pair: Pair, inflation: Array | None = None) -> WindowReport:
        judged = self._judge(pair, counts)
        known = self.calibration.ks if inflation is None else np.maximum(self.calibration.ks, inflation)
        scores = score_columns(pair, judged, known)
        order = order_of(judged).tolist()
        verdicts = self._verdicts(judged)
        level = self._log_level(counts)
        return WindowReport(
            arm,
            counts.window,
            counts.rows,
            counts.dropped,
            counts.sampled,
            counts.full,
            counts.start_ns,
            counts.end_ns,
            float(np.exp(level)),
            tuple([scores[place] for place in order]),
            tuple([verdicts(place) for place in order]),
            self.in_alarm(arm),
            contributions(pair, judged, level, order),
            self._quality_scores(arm, self._judge_quality(pair, counts)),
        )

    def figures(self, arm: str, counts: WindowCounts, reference: Array | None = None) -> WindowFigures:
        """What is exported of one window: a part of ``window_report``, for a tenth of its time. Changes nothing."""
        pair = self._pair(counts, reference)
        judged = self._judge(pair, counts)
        rate = rates(pair)
        return WindowFigures(
            arm,
            counts.window,
            self.in_alarm(arm),
            self.layout.names,
            judged.ratio,
            judged.psi.value,
            judged.ks_low,
            np.exp(judged.ks_log_p),
            rate.missing,
            rate.below,
            rate.above,
            rate.new_category,
        )

    def _quality_scores(self, arm: str, judged: QualityJudgement) -> tuple[QualityScore, ...]:
        book = self._quality.get(arm)
        active = np.zeros(len(self.checks), bool) if book is None else book.active
        told = (judged.count > 0) | active
        told[len(self.checks.kinds) :] = True
        return tuple(
            [
                judged.score(self.checks, which, in_alarm=bool(active[which]))
                for which in np.flatnonzero(told)[np.argsort(judged.log_p[told], kind="stable")].tolist()
            ]
        )

    def _segment_report(self, arm: str, segment: str, counts: WindowCounts) -> SegmentReport:
        pair = self._segment_pair(segment, counts)
        judged = self._judge(pair, counts)
        order = order_of(judged).tolist()
        strongest = order[:_STRONGEST]
        level = self._log_level(counts)
        verdicts = self._verdicts(judged)
        return SegmentReport(
            arm,
            segment,
            counts.window,
            counts.rows,
            counts.full,
            counts.start_ns,
            counts.end_ns,
            float(np.exp(level)),
            float(judged.ratio[order[0]]),
            self.in_alarm(arm, segment),
            tuple([verdicts(place) for place in strongest]),
            contributions(pair, judged, level, strongest),
        )

    def report(
        self,
        state: MonitorState,
        *,
        reference: Array | None = None,
        inflation: Mapping[str, Array] | None = None,
    ) -> DriftReport:
        """Every window of every arm of a state, live or merged. Equal counts give equal reports, bit for bit."""
        self._check(state)
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
            self.cutter.column if self.cutter is not None else "",
            self._segment_reports(state),
        )

    def _check(self, state: MonitorState) -> None:
        if state.sha256 != self.layout.sha256:
            raise ProfileMismatch(
                f"the state is of profile {state.sha256[:12]}, the monitor's is {self.layout.sha256[:12]}"
            )
        if state.rules != self.rule_names:
            raise StateError("the state has counts of other rules than the monitor's schema")

    def _segment_reports(self, state: MonitorState) -> tuple[SegmentReport, ...]:
        known = set() if self.cutter is None else set(self.cutter.names)
        found = [
            self._segment_report(arm, segment, state.segments[arm][segment].window(window))
            for arm in sorted(state.segments)
            for segment in sorted(set(state.segments[arm]) & known)
            for window in self.settings.windows
        ]
        return tuple(sorted(found, key=lambda report: -report.ratio))

    def distributions(self, arm: str, counts: WindowCounts, reference: Array | None = None) -> dict[str, Any]:
        """Shares of every PSI bin in the window and in the reference, for plots; the strongest column first."""
        pair = self._pair(counts, reference)
        judged = self._judge(pair, counts)
        columns = distributions(pair, judged)
        return {
            "arm": arm,
            "window": counts.window,
            "rows": counts.rows,
            "start_ns": counts.start_ns,
            "end_ns": counts.end_ns,
            "columns": [columns[place] for place in order_of(judged).tolist()],
        }

    def history(self, arm: str | None = None, column: str | None = None, last: int | None = None) -> dict[str, Any]:
        """Looks of each window, oldest first; of one arm or column only where one is named, the ``last`` ones only."""
        names = [name if column in (None, name) else "" for name in self.layout.names]
        looks = self.settings.history_looks if last is None else last
        rules = self.settings.rules
        return {
            "min_psi": rules.min_psi,
            "min_ks": rules.min_ks,
            "windows": [
                {"arm": own, "window": window, **kept.to_dict(names, looks)}
                for (own, window), kept in self._history.items()
                if arm in (None, own)
            ],
        }

    def compare(self, counts: WindowCounts, other: WindowCounts, arm: str) -> WindowReport:
        """The arm's window held against another arm's: a two-sample test on the same cells."""
        return self._report(arm, counts, Pair(self.layout, other.cells[: self.layout.cells], counts))

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
            over = np.flatnonzero(values > INFLATION_LIMIT * self.calibration.psi_mean)
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

    # --- ingredients -----------------------------------------------------------------------------------------------

    def _pair(self, counts: WindowCounts, reference: Array | None) -> Pair:
        return Pair(self.layout, self._expected(reference), counts)

    def _expected(self, reference: Array | None) -> Sample:
        if reference is None:
            return self.layout.profiled
        season = self._season
        if season is None or season[0] is not reference:
            season = self._season = reference, Sample.of(self.layout, reference)
        return season[1]

    def _segment_pair(self, segment: str, counts: WindowCounts) -> Pair:
        if self.cutter is None:
            raise StateError(f"the monitor has no segments, got '{segment}'")
        return Pair(self.layout, self.cutter.references[segment], counts)

    def _judge(self, pair: Pair, counts: WindowCounts) -> Judgement:
        return judge(pair, self.settings.rules, self._log_level(counts), self.calibration, self._known)

    def _judge_quality(self, pair: Pair, counts: WindowCounts) -> QualityJudgement:
        marks = counts.held[self.layout.cells :].astype("i8", copy=False)
        level = self._log_level(counts, self.checks.budget)
        return judge_quality(self.checks, pair, marks, self.settings.rules, level, self.calibration.psi)

    def _scores(self, pair: Pair, counts: WindowCounts) -> tuple[ColumnScore, ...]:
        return score_columns(pair, self._judge(pair, counts), self.calibration.ks)

    def _verdicts(self, judged: Judgement) -> Callable[[int], Verdict]:
        return lambda place: judged.verdict(place, self.layout.names[place], self.settings.rules)

    def _log_level(self, counts: WindowCounts, tests: int = 0) -> float:
        """``tests`` 0: one per column."""
        found = self._levels.get((counts.window, tests))
        if found is None:
            rules, window = self.settings.rules, self._windows[counts.window]
            family = (tests or len(self.layout.columns)) * self._cuts
            found = log_level(rules, window, counts, family, len(self._windows))
            if (window.unit == "time") == bool(rules.ert_hours):  # else it depends on the traffic
                self._levels[counts.window, tests] = found
        return found

    # --- what goes into a state ------------------------------------------------------------------------------------

    def alarms_state(self) -> dict[str, Any]:
        return {
            "drift": [[arm, segment, book.to_dict()] for (arm, segment), book in self._books.items()],
            "quality": {arm: book.to_dict() for arm, book in self._quality.items()},
            "checks": [f"{column} {name}" for column, name in zip(self.checks.columns, self.checks.names, strict=True)],
        }

    def restore_alarms(self, found: Mapping[str, Any]) -> None:
        """Raises StateError when they are not those of ``alarms_state``. Quality alarms of other checks begin anew."""
        known = ("", *(self.cutter.names if self.cutter is not None else ()))
        try:
            for arm, segment, entry in found.get("drift", ()):
                if segment in known:
                    self.book(arm, segment).restore(entry)
            if found.get("checks") == self.alarms_state()["checks"]:
                for arm, entry in found["quality"].items():
                    self._quality_book(arm).restore(entry)
        except (TypeError, ValueError, AttributeError, KeyError) as failure:
            raise StateError(f"the state's alarms are damaged ({type(failure).__name__})") from None

    def history_state(self) -> dict[tuple[str, str], dict[str, Array]]:
        return {key: kept.state() for key, kept in self._history.items()}

    def restore_history(self, found: Mapping[tuple[str, str], Mapping[str, Array]]) -> None:
        """Raises StateError for the history of other columns; that of windows that are no more is left out."""
        for (arm, window), state in found.items():
            if window in self._windows:
                kept = History(len(self.layout.columns), self.settings.history_looks)
                kept.restore(state)
                self._history[arm, window] = kept
        self._views.clear()

    def restart(self, arm: str) -> None:
        """Begin the arm's alarms and history anew."""
        for (own, _), book in self._books.items():
            if own == arm:
                book.restart()
        if arm in self._quality:
            self._quality[arm].restart()
        self._history = {key: kept for key, kept in self._history.items() if key[0] != arm}
        self._views.clear()


def _alarm(
    change: Change,
    arm: str,
    counts: WindowCounts,
    verdict: Verdict,
    score: ColumnScore,
    *,
    check: str = "drift",
    segment: str = "",
    quality: QualityScore | None = None,
) -> Alarm:
    return Alarm(
        "raised" if change.raised else "cleared",
        arm,
        score.column,
        change.window,
        change.episode,
        counts.look,
        counts.start_ns,
        counts.end_ns,
        verdict,
        score,
        check,
        segment,
        quality,
    )


def _some(names: list[str]) -> str:
    """At most five names, and how many more there are."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
