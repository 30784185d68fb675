"""How far the traffic of a candidate has drifted, by the monitors: what level gates are held against."""

from __future__ import annotations

from math import isnan
from typing import Final

from router.types import PINNED_ARM
from server.control.rollouts.evidence import Levels
from server.errors import NotFound
from server.monitoring.service import MonitorService

#: Statistic of a gate -> its place in a column's scores. Of KS, what is certain.
_SCORES: Final = {"psi": "psi", "ks": "ks_low"}


def drift_levels(monitors: MonitorService) -> Levels:
    """Asks the reports of a service: of the widest full window of a version, the column that drifted most.

    None for a version that is not watched, and until a window is full. Blocks.
    """

    def level(model: str, version: str, statistic: str) -> float | None:
        try:
            report = monitors.report(model, version)
        except NotFound:
            return None
        full = [window for window in report["windows"] if window["full"] and window["arm"] != PINNED_ARM]
        if not full:
            return None
        widest = max(full, key=lambda window: int(window["rows"]))
        scores = [float(score[_SCORES[statistic]]) for score in widest["scores"]]
        return max((score for score in scores if not isnan(score)), default=None)

    return level
