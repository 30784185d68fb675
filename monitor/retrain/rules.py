"""What the trigger of retraining goes by: the rules of one model, and what it is told. No decisions.

Times are Unix nanoseconds, as what they belong to outlives processes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final, Literal, TypeAlias

from monitor.errors import SettingsError

SECOND_NS: Final = 1_000_000_000
HOUR_NS: Final = 3600 * SECOND_NS
DAY_NS: Final = 24 * HOUR_NS

Kind: TypeAlias = Literal["drift", "labels", "calibration", "age", "schedule", "manual"]
#: Kinds that somebody raises and clears; the others follow from the clock or from a person.
SIGNALS: Final[tuple[Kind, ...]] = ("drift", "labels", "calibration")
#: One number or text that goes with a reason.
Value: TypeAlias = str | int | float | bool | None

MAX_BUDGET: Final = 1000


@dataclass(slots=True, frozen=True)
class SignalRule:
    """Which alarms of one kind are a reason. ``names``: features or signals that count, all when empty.

    ``at_least`` of them must be raised together, each for ``hold_ns`` without a break longer than ``clear_after_ns``.
    """

    names: tuple[str, ...] = ()
    at_least: int = 1
    hold_ns: int = 0

    def __post_init__(self) -> None:
        if self.at_least < 1 or self.hold_ns < 0:
            raise SettingsError(f"a signal's rule wants at_least >= 1 and hold >= 0, got {self}")
        if self.names and self.at_least > len(self.names):
            raise SettingsError(f"{self.at_least} alarms are wanted of {len(self.names)} names")


@dataclass(slots=True, frozen=True)
class Schedule:
    """Every ``every_ns``, counted from 1970 plus ``offset_ns``: all gateways mean the same moments."""

    every_ns: int
    offset_ns: int = 0

    def __post_init__(self) -> None:
        if self.every_ns < 1 or not 0 <= self.offset_ns < self.every_ns:
            raise SettingsError(f"a schedule wants 0 <= offset < every, got {self.offset_ns} and {self.every_ns} ns")

    def slot(self, now_ns: int) -> int:
        """The number of the last moment that has come."""
        return (now_ns - self.offset_ns) // self.every_ns


@dataclass(slots=True, frozen=True)
class RetrainRules:
    """When ``model`` is to be trained again. What is None is no reason.

    ``age_ns``, ``data_age_ns``: of the champion since it was made, and of the last of its training data.
    ``coalesce_ns``: reasons that come within it of the first are one event. ``cooldown_ns``: between two events.
    ``budget``: events in any 24 hours. ``lost_after_ns``: a job that nobody has heard of for so long is lost.
    ``clear_after_ns``: an alarm that comes back sooner than this after its end has not ended.
    """

    model: str
    drift: SignalRule | None = None
    labels: SignalRule | None = None
    calibration: SignalRule | None = None
    age_ns: int | None = None
    data_age_ns: int | None = None
    schedule: Schedule | None = None
    coalesce_ns: int = 60 * SECOND_NS
    cooldown_ns: int = 6 * HOUR_NS
    budget: int = 3
    lost_after_ns: int = DAY_NS
    clear_after_ns: int = 300 * SECOND_NS

    def __post_init__(self) -> None:
        if not self.model:
            raise SettingsError("retraining rules want the name of a model, got none")
        if min(self.coalesce_ns, self.cooldown_ns, self.clear_after_ns) < 0 or self.lost_after_ns < 1:
            raise SettingsError(f"the times of retraining rules must not be negative, lost_after not 0, got {self}")
        if not 1 <= self.budget <= MAX_BUDGET:
            raise SettingsError(f"the budget must be 1 to {MAX_BUDGET} events a day, got {self.budget}")
        if any(age is not None and age < 1 for age in (self.age_ns, self.data_age_ns)):
            raise SettingsError("an age must be over 0")

    def signal(self, kind: Kind) -> SignalRule | None:
        """The rule of a kind that is raised and cleared; None when it is no reason."""
        return {"drift": self.drift, "labels": self.labels, "calibration": self.calibration}.get(kind)

    def digest(self) -> str:
        """SHA-256 (hex) of the rules: the same in every gateway that has the same ones."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(slots=True, frozen=True)
class Champion:
    """The version that serves. ``created_ns``: when it was made; ``data_until_ns``: its last training data; 0: unknown.

    ``reference``: SHA-256 of the profile that it is watched against. ``metrics``: name -> value, as published.
    """

    version: str
    digest: str = ""
    created_ns: int = 0
    data_until_ns: int = 0
    reference: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Reason:
    """Why a training is asked for. ``name``: which feature, signal, age or person; ``since_ns``: since when."""

    kind: Kind
    name: str
    since_ns: int
    numbers: Mapping[str, Value] = field(default_factory=dict)
