"""All statistics of all columns, for reports and for the column that an alarm speaks of."""

from __future__ import annotations

import math

import numpy as np

from monitor.calibration import log_tail_chi_square
from monitor.drift.base import Pair
from monitor.drift.chisquare import ChiSquare
from monitor.drift.js import JensenShannon
from monitor.drift.judge import Judgement
from monitor.drift.ks import KolmogorovSmirnov
from monitor.drift.linfinity import LInfinity
from monitor.drift.psi import Psi
from monitor.drift.rates import rates
from monitor.drift.wasserstein import Wasserstein
from monitor.types import Array, ColumnScore

_PRESENT = Psi(present_only=True)
_KS, _JS, _LINF, _CHI, _W1 = KolmogorovSmirnov(), JensenShannon(), LInfinity(), ChiSquare(), Wasserstein()


def score_columns(pair: Pair, judged: Judgement, inflation: Array) -> tuple[ColumnScore, ...]:
    """One score per column of the layout. ``inflation``: what is known of the dependence of rows."""
    layout = pair.layout
    present, js, linf = _PRESENT.score(pair), _JS.score(pair), _LINF.score(pair)
    chi, chi_df = _CHI.scores(pair)
    chi_p = np.exp(log_tail_chi_square(chi, chi_df.astype("f8")))
    w1_low, w1, w1_high = _W1.bounds(pair)
    _, ks_high = _KS.interval(pair)
    rate = rates(pair)
    reference_rows, rows = pair.rows
    scores = []
    for i, found in enumerate(layout.columns):
        leader, share = _leading_bin(judged, layout.bin_start, i, found.bins)
        scores.append(
            ColumnScore(
                column=found.column.name,
                reference_rows=int(reference_rows[i]),
                rows=int(rows[i]),
                ks_low=float(judged.ks_low[i]),
                ks_high=float(ks_high[i]),
                ks_p=math.exp(judged.ks_log_p[i]),
                psi=float(judged.psi.value[i]),
                psi_p=math.exp(judged.psi_log_p[i]),
                psi_present=float(present[i]),
                js=float(js[i]),
                l_infinity=float(linf[i]),
                chi_square=float(chi[i]),
                chi_square_df=int(chi_df[i]),
                chi_square_p=float(chi_p[i]),
                wasserstein=float(w1[i]),
                wasserstein_low=float(w1_low[i]),
                wasserstein_high=float(w1_high[i]),
                wasserstein_sd=float(w1[i]) / found.sd if found.sd > 0 else math.nan,
                missing=float(rate.missing[i]),
                missing_reference=float(rate.missing_reference[i]),
                below=float(rate.below[i]),
                above=float(rate.above[i]),
                new_category=float(rate.new_category[i]),
                severity=severity(float(judged.psi.value[i])),
                leading_bin=leader,
                leading_share=share,
                inflation=float(inflation[i]),
            )
        )
    return tuple(scores)


def severity(psi: float) -> str:
    """The folk label of a PSI."""
    if psi >= 0.25:
        return "major"
    return "moderate" if psi >= 0.1 else "none"


def _leading_bin(judged: Judgement, start: Array, place: int, names: tuple[str, ...]) -> tuple[str, float]:
    parts = judged.psi.part[start[place] : start[place + 1]]
    total = float(judged.psi.value[place])
    if not total > 0:
        return "", 0.0
    top = int(parts.argmax())
    return names[top], float(parts[top]) / total
