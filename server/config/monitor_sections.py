"""Parts of a ``monitor`` section: segments, rules of a schema, samples, and labels; and the rules within each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from monitor.errors import SettingsError
from monitor.outcomes import LabelRules, LabelSettings
from monitor.types import AlarmRules, ColumnRule, Segment
from server.config import units
from server.config.kinds import Many, OutcomeWindow, Percent, Text, default
from server.config.monitor_kinds import (
    ColumnValue,
    ExpectedRun,
    Persistence,
    RingSize,
    WatchedWindow,
    parse_expected_run,
    parse_persistence,
    parse_window,
)
from server.config.problems import Contradiction
from server.config.section import Section
from server.config.tree import KeyPath

#: What a rule can demand of a column.
_DEMANDS: Final = ("min", "max", "missing", "categories", "finite", "range")

Name = Annotated[Text, Field(min_length=1, max_length=255)]
#: Windows of labels, and their sampling of false alarms, when nothing is said.
_WINDOWS: Final = [1000, 10_000]


class TrafficSegment(Section):
    """Traffic cut by the values of one column, whose rows have windows of their own. The profile must know them."""

    #: The column that cuts.
    column: Name
    #: The values that have windows of their own.
    values: Annotated[Many[ColumnValue], Field(min_length=1, max_length=16)]


class SchemaRule(Section):
    """What the values of one column must be. ``range: profile`` takes from the profile what is not said.

    ``action``: ``count`` violations, more than the share ``tolerate`` being an alarm; or ``reject`` requests with any.
    ``missing``: the largest share of missing values, of a window or of a request.
    """

    #: The column.
    column: Name
    #: The least value.
    min: float | None = None
    #: The greatest value.
    max: float | None = None
    missing: Percent | None = None
    #: The only values allowed, missing ones apart.
    categories: Annotated[Many[ColumnValue], Field(min_length=1, max_length=10_000)] | None = None
    #: Allow neither NaN nor infinities.
    finite: bool = False
    #: Take bounds or categories that are not given from the profile.
    range: Literal["profile"] | None = None
    action: Literal["count", "reject"] = "count"
    #: The share of violations that is no alarm yet.
    tolerate: Percent = default("0%", units.parse_percent)


class RowSample(Section):
    """The newest rows, kept as they came, for an export; ``rows: 0`` keeps none."""

    #: How many; 0: none.
    rows: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    #: Their bytes.
    bytes: RingSize = default("64MiB", units.parse_size)


class LabelJoin(Section):
    """How labels that come as feedback are joined with predictions, and when they raise an alarm.

    ``name``: of the feedback that is the label ("": that without a name). ``classes``: in the order of the scores.
    ``slice``: the input, or element of it (``x[3]``), that metrics are cut by. ``reference``: known values by signal,
    measured on ``reference_rows`` rows (0: taken as exact); the others are learnt from the first ``learn_rows`` rows.
    ``margins``: by how much a signal must be worse.
    """

    #: What the model does.
    task: Literal["binary", "multiclass", "regression"]
    #: The output tensor that holds the prediction.
    output: Name
    #: The element that the prediction starts at.
    index: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    name: Annotated[Text, Field(max_length=255)] = ""
    #: What the output holds: probabilities, their logits, or the class.
    form: Literal["probability", "logit", "class"] = "probability"
    #: Binary: a score from here on is a positive prediction.
    threshold: float = 0.5
    classes: Annotated[Many[Name], Field(max_length=256)] = ()
    slice: Annotated[Text, Field(max_length=255)] = ""
    #: As in ``monitor``.
    windows: Annotated[
        Many[WatchedWindow], Field(min_length=1, max_length=8, json_schema_extra={"default": _WINDOWS})
    ] = tuple([parse_window(window) for window in _WINDOWS])
    #: As in ``monitor``.
    expected_run: ExpectedRun = default("1M", parse_expected_run)
    #: As in ``monitor``.
    persistence: Persistence = default("2 of 3", parse_persistence)
    reference: dict[str, float] = Field(default_factory=dict)
    #: Rows that ``reference`` was measured on; 0: taken as exact.
    reference_rows: Annotated[int, Field(ge=0, le=10**12)] = 0
    margins: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    #: Rows that other references are learnt from.
    learn_rows: Annotated[int, Field(ge=0, le=10_000_000)] = 2000
    #: Predicted rows that are remembered.
    capacity: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    #: How long they are remembered.
    max_age: OutcomeWindow = default("7d", units.parse_duration)
    #: A label that comes later is joined and counted as late.
    late: OutcomeWindow = default("1h", units.parse_duration)
    #: How long a label that comes before its prediction waits for it.
    hold: OutcomeWindow = default("5m", units.parse_duration)


def segment_of(section: TrafficSegment | None) -> Segment | None:
    """Raises SettingsError when two values are the same."""
    return None if section is None else Segment(section.column, section.values)


def rule_of(section: SchemaRule) -> ColumnRule:
    """Raises SettingsError for a range that is none."""
    given = {name: getattr(section, name) for name in SchemaRule.model_fields}
    return ColumnRule(**{**given, "range": section.range or ""})


def labels_of(section: LabelJoin | None) -> LabelSettings | None:
    """Raises SettingsError for what the task cannot have."""
    return None if section is None else _settings(section, reference=section.reference, margins=section.margins)


def _settings(section: LabelJoin, **rules: Any) -> LabelSettings:
    k, m = section.persistence
    run = section.expected_run
    alarm = AlarmRules(ert_rows=run.rows, ert_hours=run.hours, k=k, m=m)
    return LabelSettings(
        section.task,
        section.output,
        index=section.index,
        name=section.name,
        form=section.form,
        threshold=section.threshold,
        classes=section.classes,
        windows=section.windows,
        rules=LabelRules(alarm, given_rows=section.reference_rows, learn_rows=section.learn_rows, **rules),
        capacity_rows=section.capacity,
        max_age_ns=section.max_age,
        late_ns=section.late,
        hold_ns=section.hold,
    )


# --- rules -----------------------------------------------------------------------------------------------------------


def segment_contradictions(section: TrafficSegment | None, path: KeyPath) -> Iterator[Contradiction]:
    """Values that are the same."""
    try:
        segment_of(section)
    except SettingsError as error:
        yield Contradiction((*path, "values"), str(error))


def rule_contradictions(section: SchemaRule, path: KeyPath) -> Iterator[Contradiction]:
    """A rule that demands nothing, or what cannot be."""
    given = [getattr(section, name) for name in _DEMANDS]
    if all(value is None or value is False for value in given):
        wanted = ", ".join(_DEMANDS[:-1])
        yield Contradiction(path, f"the rule of '{section.column}' demands nothing: give {wanted} or {_DEMANDS[-1]}")
    try:
        rule_of(section)
    except SettingsError as error:
        yield Contradiction((*path, "min"), str(error))


def label_contradictions(section: LabelJoin | None, path: KeyPath) -> Iterator[Contradiction]:
    """What the task cannot have, in each part of the section."""
    if section is None:
        return
    for index, window in enumerate(section.windows):
        if window in section.windows[:index]:
            yield Contradiction((*path, "windows", index), f"window {window.name} is named twice")
    plain = section.model_copy(update={"windows": tuple(dict.fromkeys(section.windows))})
    parts: tuple[tuple[str, Mapping[str, float]], ...] = (
        ("reference", section.reference),
        ("margins", section.margins),
    )
    try:
        _settings(plain)
    except SettingsError as error:
        yield Contradiction((*path, "classes" if section.classes else "task"), str(error))
        plain = plain.model_copy(update={"classes": _any_classes(section)})
    for part, values in parts:
        for name, value in values.items():
            try:
                _settings(plain, **{part: {name: value}})
            except SettingsError as error:
                yield Contradiction((*path, part, name), str(error))


def _any_classes(section: LabelJoin) -> tuple[str, ...]:
    """Classes that the task can have, so that the other parts are looked at although its own cannot be."""
    return ("a", "b") if section.task == "multiclass" else ()
