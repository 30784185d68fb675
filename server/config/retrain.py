"""``models.NAME.retrain``: when a model is to be trained again, and which sinks are asked to.

It knows nothing of the rest of the file, which holds it; ``compile_retrain`` turns it into what triggers go by.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, WithJsonSchema

from monitor.errors import SettingsError
from monitor.retrain.rules import MAX_BUDGET, RetrainRules, Schedule, SignalRule
from server.config import units
from server.config.kinds import DURATION_SCHEMA, Many, PositiveInt, Text, bounded_duration, default
from server.config.problems import Contradiction
from server.config.section import Section
from server.config.sinks import SinkName
from server.config.tree import KeyPath
from server.retraining import RetrainSpec

_DAY_NS: Final = 86_400 * units.NS_PER_S
_MINUTE_NS: Final = 60 * units.NS_PER_S

_CLOCK_PATTERN: Final = "([01][0-9]|2[0-3]):([0-5][0-9]) UTC"
_CLOCK: Final = re.compile(_CLOCK_PATTERN, re.ASCII)
_BUDGET_PATTERN: Final = "([1-9][0-9]{0,3}) per day"
_BUDGET: Final = re.compile(_BUDGET_PATTERN, re.ASCII)


def _schedule(value: object) -> Schedule:
    """An interval ("24h"), or a time of every day ("03:30 UTC")."""
    found = _CLOCK.fullmatch(value) if isinstance(value, str) else None
    if found is not None:
        return Schedule(_DAY_NS, (int(found[1]) * 60 + int(found[2])) * _MINUTE_NS)
    try:
        every = units.parse_duration(value)
    except ValueError:
        raise ValueError(
            f"wanted an interval such as 24h, or a time such as 03:30 UTC, got {units.show(value)}"
        ) from None
    if not _MINUTE_NS <= every <= 366 * _DAY_NS:
        raise ValueError(f"wanted an interval of 1m to 366d, got {value}")
    return Schedule(every)


def _budget(value: object) -> int:
    found = _BUDGET.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) > MAX_BUDGET:
        raise ValueError(f"wanted a budget such as 3 per day, at most {MAX_BUDGET}, got {units.show(value)}")
    return int(found[1])


#: Hysteresis and the windows that reasons are collected in.
HoldTime = Annotated[int, bounded_duration("0s", "7d"), DURATION_SCHEMA]
Cooldown = Annotated[int, bounded_duration("0s", "366d"), DURATION_SCHEMA]
#: Ages, and how long a job may be silent.
LongTime = Annotated[int, bounded_duration("1m", "3650d"), DURATION_SCHEMA]
ScheduleTime = Annotated[
    Schedule,
    BeforeValidator(_schedule),
    WithJsonSchema({"type": "string", "pattern": f"{units.DURATION_PATTERN}|^{_CLOCK_PATTERN}$"}),
]
Budget = Annotated[int, BeforeValidator(_budget), WithJsonSchema({"type": "string", "pattern": f"^{_BUDGET_PATTERN}$"})]


class DriftReason(Section):
    """Drift alarms: ``at_least`` of ``features`` (none named: of all) at once, each for ``hold``."""

    #: The features that count; none named: all.
    features: Many[Text] = ()
    #: How many at once.
    at_least: PositiveInt = 1
    #: How long each must be in alarm.
    hold: HoldTime = default("0s", units.parse_duration)


class SignalReason(Section):
    """Alarms from labels: ``at_least`` of ``signals`` (none named: of all) at once, each for ``hold``."""

    #: The signals that count; none named: all.
    signals: Many[Text] = ()
    #: How many at once.
    at_least: PositiveInt = 1
    #: How long each must be in alarm.
    hold: HoldTime = default("0s", units.parse_duration)


class Reasons(Section):
    """What is a reason; what is not named is none. ``{}`` takes an alarm as it comes."""

    drift: DriftReason | None = None
    labels: SignalReason | None = None
    calibration: SignalReason | None = None
    #: How old the serving version is.
    age: LongTime | None = None
    #: How old the last of its training data is.
    data_age: LongTime | None = None
    #: An interval, or a time of every day.
    schedule: ScheduleTime | None = None


class Retrain(Section):
    """When the model is to be trained again, and the sinks that are asked to. People may ask at any time.

    Reasons within ``coalesce`` of the first become one request. Between two lies ``cooldown``; in any 24 hours there
    are at most ``budget``. A job that nothing was heard of for ``lost_after`` is lost. An alarm that comes back within
    ``clear_after`` has not ended.
    """

    on: Reasons = Field(default_factory=Reasons)
    #: Names under ``alerts.sinks``.
    sinks: Annotated[Many[SinkName], Field(min_length=1)]
    #: How long reasons are gathered into one request.
    coalesce: HoldTime = default("1m", units.parse_duration)
    #: The least time between two requests.
    cooldown: Cooldown = default("6h", units.parse_duration)
    #: The most requests in any 24 hours.
    budget: Budget = default("3 per day", _budget)
    #: How long a job may be silent before it is lost.
    lost_after: LongTime = default("24h", units.parse_duration)
    #: How long an alarm must be over to have ended.
    clear_after: HoldTime = default("5m", units.parse_duration)


def retrain_contradictions(retrain: Retrain, path: KeyPath, sinks: Collection[str]) -> Iterator[Contradiction]:
    """Broken rules of the section at ``path`` that span several keys. ``sinks``: the names under ``alerts.sinks``."""
    for index, name in enumerate(retrain.sinks):
        if name in retrain.sinks[:index]:
            yield Contradiction((*path, "sinks", index), f"sink {name} is named twice")
        if name not in sinks:
            known = ", ".join(sinks) or "none"
            yield Contradiction((*path, "sinks", index), f"alerts.sinks has no {name}; it has {known}", (("alerts",),))
    for kind in ("drift", "labels", "calibration"):
        reason = getattr(retrain.on, kind)
        try:
            _rule(reason)
        except SettingsError as error:
            yield Contradiction((*path, "on", kind, "at_least"), str(error))


def compile_retrain(model: str, retrain: Retrain) -> RetrainSpec:
    """What the trigger of ``model`` goes by. The section has no contradictions."""
    on = retrain.on
    rules = RetrainRules(
        model=model,
        drift=_rule(on.drift),
        labels=_rule(on.labels),
        calibration=_rule(on.calibration),
        age_ns=on.age,
        data_age_ns=on.data_age,
        schedule=on.schedule,
        coalesce_ns=retrain.coalesce,
        cooldown_ns=retrain.cooldown,
        budget=retrain.budget,
        lost_after_ns=retrain.lost_after,
        clear_after_ns=retrain.clear_after,
    )
    return RetrainSpec(rules, retrain.sinks)


def _rule(reason: DriftReason | SignalReason | None) -> SignalRule | None:
    if reason is None:
        return None
    names = reason.features if isinstance(reason, DriftReason) else reason.signals
    return SignalRule(names, reason.at_least, reason.hold)
