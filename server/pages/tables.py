"""The tables of the drift page: features, quality checks, segments and alarms, from the report's plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from server.pages.markup import Html, el, join, name
from server.pages.numbers import DASH, count, decimal, moment, number, p_value, percent, whole
from server.pages.records import MOST_ROWS, Cell, table

_FEATURES: Final = (
    ("feature", "the strongest evidence of change first"),
    ("state", "alarm: in alarm now; over: this window is, and it takes more than one to raise an alarm"),
    ("share of evidence", "this feature's share of all evidence of drift in the window"),
    ("evidence", "ln p / ln limit of the stronger test: over 1 is more than chance"),
    ("PSI", "population stability index over the profile's bins"),
    ("PSI p", "chance of such a PSI without drift"),
    ("KS", "Kolmogorov-Smirnov distance: the interval that it certainly lies in"),
    ("KS p", "chance of such a KS without drift"),
    ("p limit", "under this, a p is more than chance, every look and column considered"),
    ("missing (ref.)", "share of missing values now, and in the reference"),
    ("out of range", "share under the reference's least or over its greatest value"),
    ("new values", "share of values that the reference does not have"),
    ("leading bin", "the bin that adds most to the PSI, and its share of it"),
    ("folk label", "none under PSI 0.1, moderate under 0.25, else major; it decides nothing"),
)
_QUALITY: Final = (
    ("feature", ""),
    ("check", "what of its values; rule: as configured"),
    ("state", "alarm: in alarm now; over: in this window"),
    ("rows", "rows that it is true of"),
    ("share", "of the window's rows"),
    ("allowed", "the reference's share, or what the rule tolerates"),
    ("p", "chance of such a count at the share allowed"),
)
_SEGMENTS: Final = (
    ("segment", "the strongest evidence first"),
    ("arm", ""),
    ("window", ""),
    ("rows", ""),
    ("evidence", "ln p / ln limit of the strongest feature: over 1 is more than chance"),
    ("strongest", "the features with the strongest evidence"),
    ("in alarm", ""),
)
_ALARMS: Final = (
    *[(head, "") for head in ("time", "state", "arm", "segment", "feature", "check")],
    *[(head, "") for head in ("window", "episode", "test", "PSI", "KS", "p limit")],
)
_NAMED: Final = 3


def feature_table(window: Mapping[str, Any], caption: str) -> Html:
    """All features of one window in the report's order, the strongest evidence first."""
    verdicts = {v.get("column"): v for v in window.get("verdicts") or ()}
    shares = {c.get("column"): c.get("contribution") for c in window.get("contributions") or ()}
    alarms = frozenset(window.get("in_alarm") or ())
    rows = [
        _feature(score, verdicts.get(column, {}), shares.get(column), column in alarms)
        for score in window.get("scores") or ()
        for column in [score.get("column", "")]
    ]
    return table(_FEATURES, rows, caption=caption)


def _feature(score: Mapping[str, Any], verdict: Mapping[str, Any], share: object, alarm: bool) -> Html:
    outside = number(score.get("below")) + number(score.get("above"))
    leading, missing = score.get("leading_bin") or "", score.get("missing")
    cells = [
        Cell(name(score.get("column", "")), class_="t"),
        _state(alarm, bool(verdict.get("over"))),
        _measured(percent, share),
        _measured(decimal, verdict.get("ratio")),
        _measured(decimal, score.get("psi")),
        _measured(p_value, score.get("psi_p")),
        Cell(_interval(score), number(score.get("ks_low"))),
        _measured(p_value, score.get("ks_p")),
        _measured(p_value, verdict.get("level")),
        Cell(f"{percent(missing)} ({percent(score.get('missing_reference'))})", number(missing)),
        _measured(percent, outside),
        _measured(percent, score.get("new_category")),
        Cell(join(name(leading), f" {percent(score.get('leading_share'))}") if leading else DASH, class_="t"),
        Cell(score.get("severity") or DASH),
    ]
    return _row(cells, alarm)


def quality_table(checks: Sequence[Mapping[str, Any]]) -> Html | None:
    """Checks with something to say, those in alarm first; None when there are none."""
    ordered = sorted(checks, key=lambda q: (not q.get("in_alarm"), not q.get("over")))
    rows = [_check(q, bool(q.get("in_alarm"))) for q in ordered[:MOST_ROWS]]
    return table(_QUALITY, rows, caption=_more(len(ordered), "checks")) if rows else None


def _check(found: Mapping[str, Any], alarm: bool) -> Html:
    cells = [
        Cell(name(found.get("column", "")), class_="t"),
        Cell(found.get("check") or DASH),
        _state(alarm, bool(found.get("over"))),
        _measured(count, found.get("count")),
        _measured(percent, found.get("share")),
        _measured(percent, found.get("allowed")),
        _measured(p_value, found.get("p")),
    ]
    return _row(cells, alarm)


def segment_table(parts: Sequence[Mapping[str, Any]]) -> Html | None:
    """One row per window of a segment, in the report's order; None when traffic is not cut."""
    rows = [_segment(part, part.get("in_alarm") or ()) for part in parts[:MOST_ROWS]]
    return table(_SEGMENTS, rows, caption=_more(len(parts), "windows")) if rows else None


def _segment(part: Mapping[str, Any], alarms: Sequence[str]) -> Html:
    cells = [
        Cell(name(part.get("segment", "")), class_="t"),
        Cell(name(part.get("arm", ""))),
        Cell(part.get("window") or DASH),
        _measured(count, part.get("rows")),
        _measured(decimal, part.get("ratio")),
        Cell(_names([verdict.get("column", "") for verdict in part.get("verdicts") or ()]), class_="t"),
        Cell(_names(alarms), class_="t"),
    ]
    return _row(cells, bool(alarms))


def alarm_table(alarms: Sequence[Mapping[str, Any]]) -> Html:
    """Changes of alarms, the newest first."""
    if not alarms:
        return el("p", "None.", class_="soft")
    newest = sorted(alarms, key=lambda alarm: -whole(alarm.get("end_ns")))
    return table(_ALARMS, [_alarm(alarm) for alarm in newest[:MOST_ROWS]], caption=_more(len(newest), "changes"))


def _alarm(alarm: Mapping[str, Any]) -> Html:
    score, verdict = alarm.get("score") or {}, alarm.get("verdict") or {}
    cells = [
        Cell(moment(alarm.get("end_ns")), number(alarm.get("end_ns"))),
        Cell(alarm.get("state") or DASH),
        Cell(name(alarm.get("arm", "")), class_="t"),
        Cell(name(alarm.get("segment") or DASH), class_="t"),
        Cell(name(alarm.get("column", "")), class_="t"),
        Cell(alarm.get("check") or "drift"),
        Cell(alarm.get("window") or DASH),
        Cell(alarm.get("episode", DASH), number(alarm.get("episode"))),
        Cell(verdict.get("test") or DASH),
        _measured(decimal, score.get("psi")),
        Cell(_interval(score), number(score.get("ks_low"))),
        _measured(p_value, verdict.get("level")),
    ]
    return _row(cells, alarm=False)


def _row(cells: Sequence[Cell], alarm: bool) -> Html:
    return el("tr", *[cell.markup() for cell in cells], class_="alarm" if alarm else None)


def _state(alarm: bool, over: bool) -> Cell:
    return Cell(el("span", "ALARM", class_="mark") if alarm else "over" if over else "", 2 * alarm + over)


def _measured(shown: Callable[[object], str], value: object) -> Cell:
    return Cell(shown(value), number(value))


def _interval(score: Mapping[str, Any]) -> str:
    low, high = decimal(score.get("ks_low")), decimal(score.get("ks_high"))
    return low if low == high else f"{low} to {high}"


def _names(columns: Sequence[str]) -> Html:
    if not columns:
        return join(DASH)
    more = f" and {len(columns) - _NAMED} more" if len(columns) > _NAMED else None
    return join(Html(", ".join([name(column) for column in columns[:_NAMED]])), more)


def _more(found: int, what: str) -> str:
    return f"{MOST_ROWS} of {found} {what}" if found > MOST_ROWS else ""
