"""An alarm as a plain event: what the log, the audit trail and whoever is to be told are given."""

from __future__ import annotations

import math
from typing import Any

from monitor.types import Alarm


def alarm_event(model: str, version: str, profile: str, alarm: Alarm) -> dict[str, Any]:
    """Values that JSON can hold. ``key`` is the same for a raise and its end, and for nothing else.

    Times are ns since the epoch. ``test`` is the stronger of the two, ``level`` the p that it may have by chance.
    """
    score, verdict = alarm.score, alarm.verdict
    event = {
        "event": f"drift.{alarm.state}",
        "key": f"{model}:{version}/{profile[:12]}/{alarm.arm}/{alarm.column}/{alarm.episode}",
        "model": model,
        "version": version,
        "profile": profile,
        "arm": alarm.arm,
        "feature": alarm.column,
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
    return {name: _plain(value) for name, value in event.items()}


def _plain(value: Any) -> Any:
    """numpy's scalars as Python's, and None for what JSON has no number for."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
