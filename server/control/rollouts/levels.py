"""How far the traffic of a candidate has drifted, by the monitors: what level gates are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Any, Final

from router.types import PINNED_ARM
from server.control.rollouts.evidence import Levels, Reading
from server.errors import NotFound
from server.monitoring.service import MonitorService

#: Statistic of a gate -> its place in a column's scores. Of KS, what is certain.
_SCORES: Final = {"psi": "psi", "ks": "ks_low"}


def drift_levels(monitors: MonitorService) -> Levels:
    """Asks the reports of a service. None for a version that is not watched. Blocks."""

    def level(model: str, version: str, statistic: str, since_ns: int) -> Reading | None:
        try:
            report = monitors.report(model, version)
        except NotFound:
            return None
        return read_level(report["windows"], statistic, since_ns)

    return level


def read_level(windows: Sequence[Mapping[str, Any]], statistic: str, since_ns: int) -> Reading | None:
    """The column that drifted most, in the widest full window without a row of before ``since_ns``.

    Of the arm that was counted last: a candidate that was promoted answers under another one. A version's own rows of
    before, those it was warmed with and those that callers sent to it by number say nothing of this rollout.
    """
    held = [window for window in windows if window["rows"] and window["arm"] != PINNED_ARM]
    if not held:
        return None
    arm = max(held, key=lambda window: int(window["end_ns"]))["arm"]
    full = [found for found in held if found["arm"] == arm and found["full"] and found["start_ns"] >= since_ns]
    if not full:
        return None
    widest = max(full, key=lambda window: int(window["rows"]))
    scores = [float(score[_SCORES[statistic]]) for score in widest["scores"]]
    highest = max((score for score in scores if not isnan(score)), default=None)
    return None if highest is None else Reading(highest, int(widest["end_ns"]))
