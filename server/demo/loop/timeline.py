"""The audit trail as a timeline: what happened in the loop, by whom, and when."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

#: Rows of the trail that tell the story, by what their action begins with.
_TOLD: Final = (
    "registry.publish", "registry.promote", "drift.", "quality.", "performance.", "calibration.", "retrain.",
    "gate.", "rollout.", "config.",
)  # fmt: skip
#: Told by its own rows: ``gate.passed``, ``gate.failed``.
_UNTOLD: Final = frozenset({"rollout.gated"})
_MOST_DETAIL: Final = 64
#: What a row says in words, and how much of it is shown.
_MOST_OF: Final = {"reason": 60, "feature": 40, "name": 40, "alias": 40, "trigger_id": 12}


@dataclass(frozen=True, slots=True)
class Moment:
    """One line: seconds since the first one."""

    at_s: float
    action: str
    subject: str
    actor: str
    detail: str


def timeline(events: Iterable[Mapping[str, Any]]) -> list[Moment]:
    """The moments of the trail, in its order; alarms of several signals at once are one line each."""
    told = [event for event in events if event["action"].startswith(_TOLD) and event["action"] not in _UNTOLD]
    if not told:
        return []
    begun = datetime.fromisoformat(told[0]["ts"])
    return [
        Moment(
            (datetime.fromisoformat(event["ts"]) - begun).total_seconds(),
            event["action"],
            event["subject"],
            event["actor"],
            _brief(event["detail"]),
        )
        for event in told
    ]


def _brief(detail: Mapping[str, Any]) -> str:
    text = ", ".join(_parts(detail))
    return text if len(text) <= _MOST_DETAIL else f"{text[: _MOST_DETAIL - 3]}..."


def _parts(detail: Mapping[str, Any]) -> Iterator[str]:
    """What a reader wants of a row: where, why, of what, how much."""
    if detail.get("arm") not in (None, "", "stable"):
        yield str(detail["arm"])
    for name in _MOST_OF:
        if detail.get(name):
            yield str(detail[name])[: _MOST_OF[name]]
    if isinstance(reasons := detail.get("reasons"), list):
        yield " and ".join(f"{one['kind']}: {one['name']}" for one in reasons)
    for name in ("psi", "value", "reference"):
        if isinstance(value := detail.get(name), int | float):
            yield f"{name} {value:.3g}"
    if detail.get("weight"):
        yield f"{detail['weight'] / 100:g} % of the traffic"
