"""Stable's tail latency, taken from earlier data: a histogram with logarithmic cells, and the rule for its threshold.

The event "slower than stable's 99th percentile" needs a threshold that was fixed before the requests it judges, or the
counts of both arms would not be coins. So time is cut into rounds: the threshold in force is the quantile of the rounds
that have ended; a round ends when it holds enough answers of stable, and old rounds count half as much each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, exp2, log2
from typing import Any, Final

from router.errors import BadRolloutState

#: Cells per doubling: a cell's width is 2^(1/16), about 4.4 %.
_PER_OCTAVE: Final = 16
#: From 1 us to about 70 minutes; what lies outside counts in the first or the last cell.
_CELLS: Final = 32 * _PER_OCTAVE
_FLOOR_NS: Final = 1_000


class TailThreshold:
    """Told stable's latencies, gives the one that ``quantile`` of the earlier ones did not exceed."""

    __slots__ = ("_current", "_past", "_quantile", "_round", "_seen", "threshold_ns")

    def __init__(self, quantile: float = 0.99, round_size: int = 1_000) -> None:
        if not 0 < quantile < 1 or round_size * (1 - quantile) < 1:
            raise ValueError(f"wanted a quantile that a round can hold, got {quantile} of {round_size}")
        self._quantile = quantile
        self._round = round_size
        self._current = [0] * _CELLS
        self._past = [0.0] * _CELLS
        self._seen = 0
        #: In force now, in ns; None until the first round has ended: nothing can be called slow yet.
        self.threshold_ns: int | None = None

    def add(self, latency_ns: int, count: int = 1) -> None:
        """Answers of stable. To be told after they were judged by ``threshold_ns``."""
        self._current[_cell(latency_ns)] += count
        self._seen += count
        if self._seen >= self._round:
            self._end_round()

    def _end_round(self) -> None:
        self._past = [past / 2 + current for past, current in zip(self._past, self._current, strict=True)]
        self._current = [0] * _CELLS
        self._seen = 0
        allowed = sum(self._past) * (1 - self._quantile)
        cell, above = _CELLS - 1, 0.0
        while above + self._past[cell] <= allowed:
            above += self._past[cell]
            cell -= 1
        self.threshold_ns = ceil(_FLOOR_NS * exp2((cell + 1) / _PER_OCTAVE))

    def to_dict(self) -> dict[str, Any]:
        """What is needed to go on after a restart; the round that is filling begins anew."""
        held = {str(cell): value for cell, value in enumerate(self._past) if value}
        return {"past": held, "threshold_ns": self.threshold_ns}

    def restore(self, found: Mapping[str, Any]) -> None:
        """Go on from ``to_dict``; BadRolloutState when that is damaged."""
        try:
            past = [0.0] * _CELLS
            for cell, value in found["past"].items():
                past[int(cell)] = float(value)
            threshold = found["threshold_ns"]
            self.threshold_ns = None if threshold is None else int(threshold)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as failure:
            raise BadRolloutState(f"the stored latencies are damaged ({type(failure).__name__})") from None
        self._past = past


def _cell(latency_ns: int) -> int:
    if latency_ns <= _FLOOR_NS:
        return 0
    return min(int(log2(latency_ns / _FLOOR_NS) * _PER_OCTAVE), _CELLS - 1)
