"""Two tests per column held against the rules: the cheap part of a look, all columns at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from monitor.calibration import Calibration, kolmogorov_log_p, psi_log_p
from monitor.drift.base import Pair
from monitor.drift.ks import KolmogorovSmirnov
from monitor.drift.psi import Psi, PsiScores
from monitor.types import AlarmRules, Array, Verdict

#: An alarm ends only where p is this many times over the level.
_P_HYSTERESIS = math.log(10.0)
_PSI = Psi()
_KS = KolmogorovSmirnov()


@dataclass(slots=True, frozen=True, eq=False)
class Judgement:
    """Per column. ``real``: some test's p is under its level; ``over``: and that test's effect is over its floor;
    ``quiet``: each test's p is well over its level or its effect well under its floor. ``ratio`` is ln p / ln level of
    the stronger test (``by_ks``).
    """

    ks_low: Array
    ks_high: Array
    ks_log_p: Array
    psi: PsiScores
    psi_log_p: Array
    ks_log_level: Array
    psi_log_level: Array
    real: Array
    over: Array
    quiet: Array
    ratio: Array
    by_ks: Array

    def verdict(self, place: int, column: str, rules: AlarmRules) -> Verdict:
        """One column's verdict, for people."""
        level = self.ks_log_level if self.by_ks[place] else self.psi_log_level
        large = self.psi.value[place] >= rules.min_psi or self.ks_low[place] >= rules.min_ks
        return Verdict(
            column,
            bool(self.over[place]),
            bool(self.real[place]),
            bool(large),
            bool(self.quiet[place]),
            float(self.ratio[place]),
            "ks" if self.by_ks[place] else "psi",
            math.exp(float(level[place])),
        )


def judge(pair: Pair, rules: AlarmRules, log_level: float, calibration: Calibration) -> Judgement:
    """``log_level``: ln of what one column of this look may have by chance (``calibration.log_level``)."""
    m, n = pair.rows
    missing_m, missing_n = pair.missing
    low, high = _KS.interval(pair)
    psi = _PSI.scores(pair)
    ks_log_p = kolmogorov_log_p(low, n - missing_n, m - missing_m, calibration.ks)
    degrees = np.maximum(psi.occupied - 1, 0) * calibration.psi_degrees
    log_p = psi_log_p(psi.value, n, m, degrees, calibration.psi)
    ordered = pair.layout.ordered
    psi_level = np.where(ordered, log_level - math.log(2.0), log_level)
    ks_level = np.where(ordered, log_level - math.log(2.0), -np.inf)
    ks_real, psi_real = ks_log_p < ks_level, log_p < psi_level
    over = (ks_real & (low >= rules.min_ks)) | (psi_real & (psi.value >= rules.min_psi))
    ks_quiet = (ks_log_p > ks_level + _P_HYSTERESIS) | (low < rules.clear_ratio * rules.min_ks)
    psi_quiet = (log_p > psi_level + _P_HYSTERESIS) | (psi.value < rules.clear_ratio * rules.min_psi)
    ks_ratio, psi_ratio = ks_log_p / ks_level, log_p / psi_level
    return Judgement(
        low,
        high,
        ks_log_p,
        psi,
        log_p,
        ks_level,
        psi_level,
        ks_real | psi_real,
        over,
        ks_quiet & psi_quiet,
        np.maximum(ks_ratio, psi_ratio),
        ks_ratio > psi_ratio,
    )
