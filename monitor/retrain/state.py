"""What the trigger of one model remembers, and its form on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, TypeVar

from monitor.errors import StateError
from monitor.retrain.jobs import Job
from monitor.retrain.rules import Champion, Kind, Value

_FORMAT: Final = 1
T = TypeVar("T")


@dataclass(slots=True, frozen=True)
class Condition:
    """An alarm of one version. ``cleared_ns``: since when it is over; None: it is not.

    ``waiting``: in the event that is being collected. ``spent``: the trigger that told of it, "" for none yet.
    """

    kind: Kind
    name: str
    version: str
    since_ns: int
    numbers: Mapping[str, Value] = field(default_factory=dict)
    cleared_ns: int | None = None
    waiting: bool = False
    spent: str = ""

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes two alarms the same one."""
        return self.kind, self.name, self.version


@dataclass(slots=True, frozen=True)
class Report:
    """A suppressed reason that was told of: its kind, its cause, and when."""

    kind: Kind
    cause: str
    at_ns: int


@dataclass(slots=True, frozen=True)
class TriggerState:
    """All of it; equal states decide alike.

    ``opened_ns``: when the first reason of the event being collected came. ``fired_ns``: the last events. ``bucket_s``:
    the window of the last key. ``slot``: of the schedule, the last that was seen; ``scheduled``: it is still to be told
    of. ``aged_ns``: when age was last a reason. ``dropped``: alarms that found no place.
    """

    champion: Champion | None = None
    rollout: bool = False
    conditions: tuple[Condition, ...] = ()
    opened_ns: int | None = None
    fired_ns: tuple[int, ...] = ()
    bucket_s: int = 0
    slot: int | None = None
    scheduled: bool = False
    aged_ns: int = 0
    reports: tuple[Report, ...] = ()
    jobs: tuple[Job, ...] = ()
    dropped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, found: object) -> TriggerState:
        """The inverse. Raises StateError for anything else."""
        try:
            return _read(found)
        except (KeyError, TypeError, ValueError, AttributeError) as failure:
            raise StateError(f"the state of a retraining trigger is damaged ({type(failure).__name__})") from None

    def not_after(self, now_ns: int) -> TriggerState:
        """The state with nothing in the future: after the clock was set back, waits last from now on, and no longer."""
        if _newest(self) <= now_ns:
            return self
        return replace(
            self,
            opened_ns=None if self.opened_ns is None else min(self.opened_ns, now_ns),
            fired_ns=tuple(min(at, now_ns) for at in self.fired_ns),
            aged_ns=min(self.aged_ns, now_ns),
            conditions=tuple(_condition_not_after(one, now_ns) for one in self.conditions),
            reports=tuple(replace(one, at_ns=min(one.at_ns, now_ns)) for one in self.reports),
            jobs=tuple(replace(one, state_ns=min(one.state_ns, now_ns)) for one in self.jobs),
        )


def _newest(state: TriggerState) -> int:
    times = [state.opened_ns or 0, state.aged_ns, *state.fired_ns]
    times += [max(one.since_ns, one.cleared_ns or 0) for one in state.conditions]
    times += [one.at_ns for one in state.reports]
    times += [one.state_ns for one in state.jobs]
    return max(times)


def _condition_not_after(one: Condition, now_ns: int) -> Condition:
    cleared_ns = None if one.cleared_ns is None else min(one.cleared_ns, now_ns)
    return replace(one, since_ns=min(one.since_ns, now_ns), cleared_ns=cleared_ns)


def _read(found: Any) -> TriggerState:
    if found["format"] != _FORMAT:
        raise ValueError(found["format"])
    plain = {one.name: found[one.name] for one in fields(TriggerState)}
    champion = plain["champion"]
    jobs = [_made(Job, {**job, "kinds": tuple(job["kinds"])}) for job in plain["jobs"]]
    lists: dict[str, Any] = {
        "conditions": tuple(_made(Condition, one) for one in plain["conditions"]),
        "reports": tuple(_made(Report, one) for one in plain["reports"]),
        "jobs": tuple(jobs),
        "fired_ns": tuple(int(at) for at in plain["fired_ns"]),
    }
    return TriggerState(**{**plain, **lists, "champion": None if champion is None else _made(Champion, champion)})


def _made(kind: type[T], values: Mapping[str, Any]) -> T:
    return kind(**values)
