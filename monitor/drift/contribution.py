"""Which columns an alarm comes from, and which of their values moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from monitor.drift.base import Pair
from monitor.drift.judge import Judgement
from monitor.types import Array, Contribution, MovedBin

#: Bins that are named per column.
_MOVED: Final = 3


def order_of(judged: Judgement) -> Array:
    """Places of the columns, the strongest evidence first."""
    return np.argsort(-judged.ratio, kind="stable")


def contributions(pair: Pair, judged: Judgement, log_level: float, places: Sequence[int]) -> tuple[Contribution, ...]:
    """Of the columns at ``places``, which are the strongest ones in order; shares are of the sum over all columns."""
    excess = np.maximum(0.0, -judged.ratio * log_level - 1.0)
    shares = excess / max(float(excess.sum()), np.finfo(float).tiny)
    reference, window = _shares(pair)
    return tuple(
        [
            Contribution(
                pair.layout.names[place], rank, float(shares[place]), _moved(pair, judged, place, reference, window)
            )
            for rank, place in enumerate(places, start=1)
        ]
    )


def _moved(pair: Pair, judged: Judgement, place: int, reference: Array, window: Array) -> tuple[MovedBin, ...]:
    start, stop = (int(edge) for edge in pair.layout.bin_start[place : place + 2])
    total = float(judged.psi.value[place])
    if not total > 0:
        return ()
    parts = judged.psi.part[start:stop]
    return tuple(
        [
            MovedBin(
                pair.layout.columns[place].bins[b],
                float(reference[start + b]),
                float(window[start + b]),
                float(parts[b]) / total,
            )
            for b in np.argsort(-parts, kind="stable")[:_MOVED].tolist()
            if parts[b] > 0
        ]
    )


def _shares(pair: Pair) -> tuple[Array, Array]:
    """(reference, window) shares of every bin among its column's rows; 0 without rows."""
    sizes = np.diff(pair.layout.bin_start)
    m, n = (np.repeat(np.maximum(rows, 1), sizes) for rows in pair.rows)
    return pair.bins[0] / m, pair.bins[1] / n


def distributions(pair: Pair, judged: Judgement) -> list[dict[str, Any]]:
    """Per column of the layout, for plots: bins with their shares and their summands of the PSI."""
    reference, window = _shares(pair)
    found = []
    for place, column in enumerate(pair.layout.columns):
        own = slice(int(pair.layout.bin_start[place]), int(pair.layout.bin_start[place + 1]))
        found.append(
            {
                "column": column.column.name,
                "bins": list(column.bins),
                "reference": reference[own].tolist(),
                "window": window[own].tolist(),
                "psi": judged.psi.part[own].tolist(),
            }
        )
    return found
