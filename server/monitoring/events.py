"""Alarms as plain events: what the log, the audit trail and whoever is to be told are given."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from monitor.outcomes import CALIBRATION_SIGNALS
from monitor.types import Alarm

if TYPE_CHECKING:
    from monitor.label_monitor import LabelAlarm

#: The check of alarms that are about a column's distribution.
DRIFT = "drift"
#: Of an alarm, what is made of fields itself.
_PARTS = ("verdict", "score", "quality")


def alarm_event(model: str, version: str, profile: str, alarm: Alarm, run: str = "") -> dict[str, Any]:
    """``drift.raised``, or ``quality.raised`` for the check of a share, with values that JSON can hold.

    ``key`` is the same for a raise and its end, and for nothing else: ``run`` tells the counts that number the episodes
    from others (by default the profile does). ``segment`` is empty for the whole arm. Times are ns since the epoch.
    ``test`` is the stronger of the two, ``level`` the p that it may have by chance. A quality alarm also has the
    ``count`` of ``rows``, their ``share``, and the share ``allowed``.
    """
    score, verdict, quality = alarm.score, alarm.verdict, alarm.quality
    place = f"{alarm.arm}/{alarm.segment}/{alarm.column}/{alarm.check}"
    event = {
        "event": f"{DRIFT if alarm.check == DRIFT else 'quality'}.{alarm.state}",
        "key": f"{model}:{version}/{run or profile[:12]}/{place}/{alarm.episode}",
        "model": model,
        "version": version,
        "profile": profile,
        "arm": alarm.arm,
        "segment": alarm.segment,
        "feature": alarm.column,
        "check": alarm.check,
        "window": alarm.window,
        "episode": alarm.episode,
        "test": verdict.test,
        "level": verdict.level,
        "psi": score.psi,
        "psi_p": score.psi_p,
        "ks": score.ks_low,
        "ks_p": score.ks_p,
        "missing": score.missing,
        "new_category": score.new_category,
        "severity": score.severity,
        "leading_bin": score.leading_bin,
        "rows": score.rows,
        "reference_rows": score.reference_rows,
        "start_ns": alarm.start_ns,
        "end_ns": alarm.end_ns,
    }
    if quality is not None:
        event |= {"count": quality.count, "rows": quality.rows, "share": quality.share, "allowed": quality.allowed}
    return _plain(event)


def drift_row(alarm: Alarm) -> dict[str, Any]:
    """An alarm of a column as the alarm history shows it: ``dataclasses.asdict``, which takes ten times as long."""
    parts = {name: getattr(alarm, name) for name in _PARTS}
    shown = {name: None if part is None else _shallow(part) for name, part in parts.items()}
    return {**_shallow(alarm), **shown}


def _shallow(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__slots__}


def label_event(alarm: LabelAlarm, run: str) -> dict[str, Any]:
    """``performance.raised``, or ``calibration.raised`` for what scores mean, with values that JSON can hold.

    ``run`` tells the episodes of one life of the windows from those of another: they are numbered from 1 in each.
    """
    kind = "calibration" if alarm.signal.name in CALIBRATION_SIGNALS else "performance"
    place = f"{alarm.arm}/{alarm.slice}/{alarm.signal.name}"
    return _plain(
        {
            "event": f"{kind}.{alarm.state}",
            "key": f"{alarm.model}:{alarm.version}/{run}/{place}/{alarm.episode}",
            "model": alarm.model,
            "version": alarm.version,
            "arm": alarm.arm,
            "slice": alarm.slice,
            "window": alarm.window,
            "episode": alarm.episode,
            **alarm.signal.to_dict(),
            "start_ns": alarm.start_ns,
            "end_ns": alarm.end_ns,
        }
    )


def _plain(event: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in event.items()}


def _value(value: Any) -> Any:
    """numpy's scalars as Python's, and None for what JSON has no number for."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
