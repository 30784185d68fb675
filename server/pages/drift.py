"""The drift report as one page: verdict, warnings, features by evidence, plots, segments, performance, alarms.

The document is plain values, as the admin API answers them; NaN may be None. Keys, all optional but the first:

* ``report``: ``DriftReport.to_dict()``;
* ``history``: ``Monitor.history()``;
* ``distributions``: a list of ``Monitor.distributions()``, one for each arm and window;
* ``comparisons``: ``WindowReport``s as plain values, of an arm held against that of the key ``against``;
* ``performance``, ``estimate``: nested mappings and lists of rows;
* ``alarms``: ``Alarm``s as plain values.

A page with 200 features stays under 2 MB: every feature is in the table, the strongest have plots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from server.pages.charts import bin_bars, over_time
from server.pages.markup import Html, el, join, name
from server.pages.numbers import count, moment, number, whole
from server.pages.records import records
from server.pages.shell import page
from server.pages.tables import alarm_table, feature_table, quality_table, segment_table

Document: TypeAlias = Mapping[str, Any]

#: Features with plots on the whole page at most, and in each view at least.
MOST_PLOTS: Final = 80
_LEAST_PLOTS: Final = 4
#: Features listed at once, and how many more are not worth a line to hide them behind.
_LISTED: Final = 40
#: Features listed of one arm held against another.
_COMPARED: Final = 20
_FEW: Final = 10
_NAMED: Final = 8


@dataclass(slots=True, frozen=True)
class _View:
    """One arm through one window."""

    place: int
    window: Mapping[str, Any]
    arm: str
    name: str

    @property
    def title(self) -> str:
        return f"{self.arm} · {self.name}"

    @property
    def features(self) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """(score, verdict) per column, the strongest evidence first."""
        verdicts = {v.get("column"): v for v in self.window.get("verdicts") or ()}
        return [(score, verdicts.get(score.get("column"), {})) for score in self.window.get("scores") or ()]

    @property
    def in_alarm(self) -> frozenset[str]:
        return frozenset(self.window.get("in_alarm") or ())

    @property
    def alarms(self) -> list[str]:
        """Columns in alarm for drift, and ``column (check)`` for those of quality checks."""
        checks = [
            f"{q.get('column')} ({q.get('check')})" for q in self.window.get("quality") or () if q.get("in_alarm")
        ]
        return [*(self.window.get("in_alarm") or ()), *checks]

    def history(self, document: Document) -> dict[str, dict[str, Any]]:
        """Column -> its looks in this window, with their times."""
        looks = self._part((document.get("history") or {}).get("windows"))
        return {column: {**found, "t": looks.get("time_ns")} for column, found in (looks.get("columns") or {}).items()}

    def distributions(self, document: Document) -> dict[str, Mapping[str, Any]]:
        """Column -> its bins."""
        return {
            found.get("column", ""): found for found in self._part(document.get("distributions")).get("columns") or ()
        }

    def _part(self, parts: Sequence[Mapping[str, Any]] | None) -> Mapping[str, Any]:
        mine = (self.arm, self.name)
        return next((part for part in parts or () if (part.get("arm"), part.get("window")) == mine), {})


def drift_page(document: Document) -> str:
    """The whole page as text."""
    report = document["report"]
    windows = report.get("windows") or ()
    views = [_View(i, w, str(w.get("arm", "")), str(w.get("window", ""))) for i, w in enumerate(windows)]
    title = f"Drift of {report.get('model', '')}:{report.get('version', '')}"
    return page(
        title,
        el("header", el("h1", "Drift of ", name(f"{report.get('model', '')}:{report.get('version', '')}"))),
        _facts(report, views),
        _verdict(report, views),
        _warnings(report, views),
        _chooser(document, views),
        _comparisons(document.get("comparisons") or ()),
        _section(f"Segments by {report.get('segment_column') or 'value'}", segment_table(report.get("segments") or ())),
        _section("Performance, from labels", records(document.get("performance"))),
        _section(
            "Performance, ESTIMATED without labels",
            records(document.get("estimate")),
            "An estimate from the model's own probabilities. It holds only as far as these are calibrated, and cannot "
            "see that the relation between inputs and outcome has changed.",
        ),
        _section("Alarm history", alarm_table(document.get("alarms") or ())),
        _notes(),
        rules=_view_rules(len(views)),
    )


# --- head ------------------------------------------------------------------------------------------------------------


def _facts(report: Mapping[str, Any], views: Sequence[_View]) -> Html:
    starts = [start for view in views if (start := whole(view.window.get("start_ns")))]
    ends = [whole(view.window.get("end_ns")) for view in views]
    profile = str(report.get("profile", ""))
    facts: list[tuple[str, object]] = [
        ("profile", el("span", profile[:12] or "unknown", title=profile)),
        ("from (UTC)", moment(min(starts, default=0))),
        ("to (UTC)", moment(max(ends, default=0))),
    ]
    for arm, rows in (report.get("counted") or {}).items():
        lost = [f"{count(n)} {what}" for what in ("dropped", "refused") if (n := (report.get(what) or {}).get(arm))]
        facts.append((f"rows of {arm}", ", ".join([count(rows), *lost])))
    return el("dl", *[el("div", el("dt", key), el("dd", value)) for key, value in facts])


def _verdict(report: Mapping[str, Any], views: Sequence[_View]) -> Html:
    found: dict[str, list[str]] = {}
    for view in views:
        if view.alarms:
            found[view.arm] = list(dict.fromkeys([*found.get(view.arm, []), *view.alarms]))
    for part in report.get("segments") or ():
        if part.get("in_alarm"):
            arm = f"{part.get('arm')}, {report.get('segment_column')} {part.get('segment')}"
            found[arm] = list(dict.fromkeys([*found.get(arm, []), *part["in_alarm"]]))
    if found:
        parts = [join(name(arm), ": ", _names(columns)) for arm, columns in found.items()]
        total = len({column for columns in found.values() for column in columns})
        what = "1 alarm" if total == 1 else f"{total} alarms"
        return el("p", el("strong", f"{what}. "), _separated(parts, "; "), class_="verdict alarm", role="status")
    if not any(whole(view.window.get("rows")) for view in views):
        return el("p", el("strong", "No rows were counted yet."), class_="verdict", role="status")
    return el("p", el("strong", "No alarm."), class_="verdict", role="status")


def _names(columns: Sequence[str]) -> Html:
    more = [Html(f"{len(columns) - _NAMED} more")] if len(columns) > _NAMED else []
    return _separated([*[name(column) for column in columns[:_NAMED]], *more], ", ")


def _separated(parts: Iterable[Html], mark: str) -> Html:
    return Html(mark.join(parts))


def _warnings(report: Mapping[str, Any], views: Sequence[_View]) -> Html | None:
    found = [str(warning) for warning in report.get("warnings") or ()]
    if not report.get("calibrated", True) and not any("NOT calibrated" in warning for warning in found):
        found.insert(0, "p-values are NOT calibrated: rows depend on each other; expect false alarms")
    sampled = [view.title for view in views if view.window.get("sampled")]
    if sampled:
        found.append(f"sampled, not all rows were counted: {', '.join(sampled)}")
    partial = [view.title for view in views if whole(view.window.get("rows")) and not view.window.get("full", True)]
    if partial:
        found.append(f"not full yet, so their limits are for fewer rows: {', '.join(partial)}")
    return el("ul", *[el("li", warning) for warning in found], class_="warnings") if found else None


# --- views -----------------------------------------------------------------------------------------------------------


def _chooser(document: Document, views: Sequence[_View]) -> Html:
    """Radio buttons and the views that they show: works without scripts, and by keyboard."""
    if not views:
        return el("section", el("h2", "Features"), el("p", "No arm has been seen yet.", class_="soft"))
    first = max(views, key=_urgency).place
    share = max(_LEAST_PLOTS, MOST_PLOTS // len(views))
    picks = [_pick(view, view.place == first) for view in views]
    tabs = [el("label", view.title, for_=f"pick{view.place}", class_=f"tab{view.place}") for view in views]
    shown = [_view(document, view, share) for view in views]
    return el("section", el("h2", "Features"), *picks, el("div", *tabs, class_="tabs"), *shown)


def _pick(view: _View, checked: bool) -> Html:
    label = f"show {view.title}"
    where = f"pick{view.place}"
    return el("input", type="radio", name="view", id=where, class_="pick", aria_label=label, checked=checked)


def _urgency(view: _View) -> tuple[bool, bool, float]:
    """The view to begin with: one with alarms, the arm that answers most, the strongest evidence."""
    ratios = [ratio for _, verdict in view.features if not math.isnan(ratio := number(verdict.get("ratio")))]
    return bool(view.alarms), view.arm == "stable", max(ratios, default=-math.inf)


def _view_rules(count_: int) -> str:
    rules = [
        f"#pick{i}:checked~.view{i}{{display:block}}"
        f"#pick{i}:checked~.tabs .tab{i}{{background:var(--now);border-color:var(--now);color:var(--paper)}}"
        f"#pick{i}:focus-visible~.tabs .tab{i}{{outline:3px solid var(--ink);outline-offset:2px}}"
        for i in range(count_)
    ]
    return "".join(rules)


def _view(document: Document, view: _View, most: int) -> Html:
    features = view.features
    window = view.window
    about = (
        f"{view.title}: {count(window.get('rows'))} rows, {moment(window.get('start_ns'))} to "
        f"{moment(window.get('end_ns'))} UTC. The strongest evidence first."
    )
    known = document.get("history") or {}
    floors = {statistic: number(known.get(f"min_{statistic}")) for statistic in ("psi", "ks")}
    history, shares = view.history(document), view.distributions(document)
    plotted = [score for score, _ in features[:most]] + [
        score for score, _ in features[most : 2 * most] if score.get("column") in view.in_alarm
    ]
    plots = [found for score in plotted if (found := _plots(view, score.get("column", ""), history, shares, floors))]
    fewer = f"Plots of {len(plots)} of {len(features)} features, the strongest evidence first."
    note = el("p", el("small", fewer)) if len(plots) < len(features) else None
    return el(
        "div",
        _features(view, about),
        _part("Quality checks", _checks(window.get("quality") or ())),
        _part("Plots", join(_legend(), note, *plots) if plots else None),
        class_=f"view view{view.place}",
    )


def _features(view: _View, about: str) -> Html:
    """The features that matter in a table; many quiet ones behind a line to be opened."""
    loud = [
        place
        for place, (score, verdict) in enumerate(view.features)
        if verdict.get("over") or score.get("column") in view.in_alarm
    ]
    shown = max([_LISTED, *[place + 1 for place in loud]])
    scores = list(view.window.get("scores") or ())
    if len(scores) <= shown + _FEW:
        return feature_table(view.window, about)
    first, rest = ({**view.window, "scores": part} for part in (scores[:shown], scores[shown:]))
    more = f"{len(scores) - shown} more features, none of them over"
    return join(feature_table(first, about), el("details", el("summary", more), feature_table(rest, f"{more}.")))


def _comparisons(found: Sequence[Mapping[str, Any]]) -> Html | None:
    """Arms held against another one: two samples of live traffic, whatever has become of the reference."""
    if not found:
        return None
    tables = [feature_table({**one, "scores": (one.get("scores") or ())[:_COMPARED]}, _compared(one)) for one in found]
    note = (
        "Two samples of live traffic: what differs here is the version, or who was routed to it. Windows of time have "
        "the same time of both; of rows, the arm with less traffic has the older ones. No alarm comes of these numbers."
    )
    return _section("Arms against each other", join(*tables), note)


def _compared(one: Mapping[str, Any]) -> str:
    scores = one.get("scores") or ()
    against = max([whole(score.get("reference_rows")) for score in scores], default=0)
    fewer = f" The {_COMPARED} features with the strongest evidence." if len(scores) > _COMPARED else ""
    arms = f"{one.get('arm')} against {one.get('against')} · {one.get('window')}"
    return f"{arms}: {count(one.get('rows'))} rows against {count(against)}.{fewer}"


def _checks(found: Sequence[Mapping[str, Any]]) -> Html | None:
    """Checks that alarm, and rules, in a table; of many columns a value out of range here and there is no news."""
    loud = [one for one in found if one.get("over") or one.get("in_alarm") or str(one.get("check")).startswith("rule")]
    quiet = [one for one in found if one not in loud]
    if len(quiet) <= _FEW:
        return quality_table(found)
    more = f"{len(quiet)} more checks, none of them over"
    return join(quality_table(loud), el("details", el("summary", more), quality_table(quiet)))


def _plots(
    view: _View, column: str, history: Mapping[str, Any], shares: Mapping[str, Any], floors: Mapping[str, float]
) -> Html | None:
    looks = history.get(column) or {}
    found = [
        bin_bars(shares.get(column) or {}),
        *[over_time(looks, statistic, floor) for statistic, floor in floors.items()],
    ]
    plots = [el("figure", plot) for plot in found if plot is not None]
    if not plots:
        return None
    mark = el("span", " in alarm", class_="mark") if column in view.in_alarm else None
    return el("div", el("h3", name(column), mark), el("div", *plots, class_="plots"), class_="feature")


def _legend() -> Html:
    keys = (
        ("reference", "reference"),
        ("now", "now"),
        ("dash", "limit: over it is more than chance, and large"),
        ("dots", "effect floor, where the limit is higher"),
        ("span", "in alarm"),
    )
    return el("p", *[join(el("i", class_=f"key {class_}"), label) for class_, label in keys])


# --- the rest --------------------------------------------------------------------------------------------------------


def _part(title: str, content: Html | None) -> Html | None:
    return None if content is None else join(el("h2", title), content)


def _section(title: str, content: Html | None, note: str = "") -> Html | None:
    if content is None:
        return None
    return el("section", el("h2", title), el("p", note, class_="soft") if note else None, content)


def _notes() -> Html:
    return el(
        "footer",
        el(
            "p",
            "A feature is over when one test is both more than chance (p under its limit) and large (PSI or KS at its "
            "floor or above); alarms need that in several looks. KS is known within the interval shown, and the test "
            "uses its lower end. Limits count every look, feature, window and test.",
            class_="soft",
        ),
    )
