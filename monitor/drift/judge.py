"""Two tests per column held against the rules: the cheap part of a look, all columns at once."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final, TypeAlias

import numpy as np

from monitor.calibration import Calibration, critical_ks, critical_psi, effective
from monitor.drift.base import Pair
from monitor.drift.ks import KolmogorovSmirnov
from monitor.drift.psi import Psi, PsiScores
from monitor.kernels.measures import measure
from monitor.kernels.tails import judge_columns
from monitor.layout import Layout, Sample
from monitor.types import AlarmRules, Array, Verdict

#: An alarm ends only where p is this many times over the level.
_P_HYSTERESIS = math.log(10.0)
_PSI = Psi()
_KS = KolmogorovSmirnov()
#: Looks of equal size ask for the same thresholds: so many sets of them are remembered, some 100 bytes per column each.
#: Those of more columns are not: to make them is a tenth of such a look, and to keep them would take many MB.
_REMEMBERED: Final = 128
_REMEMBERED_COLUMNS: Final = 256
_Key: TypeAlias = tuple[float, bytes]
#: Rows of the values that are told of a look.
_TOLD: Final = 5


@dataclass(slots=True, frozen=True, eq=False)
class Threshold:
    """What one test of a look is held against, per column; not to be changed.

    ``table``: as ``kernels.tails.judge_columns`` has it.
    """

    table: Array

    @property
    def critical(self) -> Array:
        """The statistic from which on the test is over, by its level, or its floor where that is higher."""
        return np.asarray(self.table[5])

    @property
    def log_level(self) -> Array:
        return np.asarray(self.table[1])


class Known:
    """Thresholds of the latest looks: by their level, rows, missing rows and occupied bins, per column."""

    def __init__(self) -> None:
        self._found: dict[_Key, tuple[Threshold, Threshold]] = {}

    def get(self, key: _Key) -> tuple[Threshold, Threshold] | None:
        return self._found.get(key)

    def keep(self, key: _Key, found: tuple[Threshold, Threshold]) -> None:
        """Of columns that are not too many; begins anew when there are too many looks."""
        if found[0].table.shape[1] > _REMEMBERED_COLUMNS:
            return
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        self._found[key] = found


@dataclass(eq=False)
class Judgement:
    """Per column. ``real``: some test's p is under its level; ``over``: and that test's effect is over its floor;
    ``quiet``: each test's p is well over its level or its effect well under its floor. ``told``: what the history keeps
    of it, float32 (see ``monitor.history``).
    """

    ks_low: Array
    ks_log_p: Array
    ks_threshold: Threshold
    psi: PsiScores
    psi_log_p: Array
    psi_threshold: Threshold
    real: Array
    over: Array
    quiet: Array
    told: Array

    @cached_property
    def _ratios(self) -> tuple[Array, Array]:
        return self.ks_log_p / self.ks_threshold.log_level, self.psi_log_p / self.psi_threshold.log_level

    @cached_property
    def ratio(self) -> Array:
        """ln p / ln level of the stronger test."""
        return np.asarray(np.maximum(*self._ratios))

    @cached_property
    def by_ks(self) -> Array:
        """Whether that is KS."""
        ks, psi = self._ratios
        return np.asarray(ks > psi)

    def verdict(self, place: int, column: str, rules: AlarmRules) -> Verdict:
        """One column's verdict, for people."""
        threshold = self.ks_threshold if self.by_ks[place] else self.psi_threshold
        large = self.psi.value[place] >= rules.min_psi or self.ks_low[place] >= rules.min_ks
        return Verdict(
            column,
            bool(self.over[place]),
            bool(self.real[place]),
            bool(large),
            bool(self.quiet[place]),
            float(self.ratio[place]),
            "ks" if self.by_ks[place] else "psi",
            math.exp(float(threshold.log_level[place])),
        )


def judge(
    pair: Pair, rules: AlarmRules, log_level: float, calibration: Calibration, known: Known | None = None
) -> Judgement:
    """``log_level``: ln of what one column of this look may have by chance (``calibration.log_level``).

    ``known``: what the looks of one profile under the same rules and calibration share.
    """
    low, psi = _KS.score(pair), _PSI.scores(pair)
    sizes = np.stack([pair.rows[1], pair.missing[1], psi.occupied])
    to_ks, to_psi = _found_before(pair.layout, pair.expected, sizes, log_level, rules, calibration, known)
    columns = len(low)
    log_p, flags, told = np.empty((2, columns)), np.empty((3, columns), bool), np.empty((_TOLD, columns), "f4")
    judge_columns(low, psi.value, to_ks.table, to_psi.table, log_p, flags, told)
    return Judgement(low, log_p[0], to_ks, psi, log_p[1], to_psi, flags[0], flags[1], flags[2], told)


class Looker:
    """Judges one window after another as ``judge`` does, each over what it found of the one before, so that a look
    makes no arrays. Windows of equal size, one after the other, are held against the same. Not thread safe.

    ``rows`` of the window, and ``over``, ``quiet`` and ``told`` as ``Judgement`` has them.
    """

    def __init__(self, layout: Layout, rules: AlarmRules, calibration: Calibration, known: Known) -> None:
        """``known``: as for ``judge``."""
        self._layout = layout
        self._known = rules, calibration, known
        columns, bins = len(layout.columns), layout.bins
        places = layout.start, layout.discrete, bins.last, bins.bin_of, bins.start, layout.bin_start
        self._distances, self._sizes = np.empty((2, columns)), np.empty((3, columns), "i8")
        self._ks, self._psi = self._distances
        self.rows = self._sizes[0]
        self._log_p, self._flags = np.empty((2, columns)), np.empty((3, columns), bool)
        _, self.over, self.quiet = self._flags
        self.told = np.empty((_TOLD, columns), "f4")
        #: What the latest look was held against. A call that is given less is the cheaper one.
        self._expected: Sample | None = None
        self._log_level = math.nan
        self._measured = partial(measure, *places, self._distances, self._sizes)
        self._measure: partial[bool]
        self._judge: partial[bool]

    def look(self, expected: Sample, found: Array, log_level: float) -> bool:
        """Hold the running sums ``found`` against a reference. Whether no column is over and all are quiet.

        ``log_level``: as for ``judge``.
        """
        if expected is not self._expected:
            self._measure = partial(self._measured, expected.running, expected.bins)
            self._expected, self._log_level = expected, math.nan
        same_sizes = self._measure(found)
        if not same_sizes or log_level != self._log_level:
            self._log_level = math.nan  # there is none until all went well
            ks, psi = _found_before(self._layout, expected, self._sizes, log_level, *self._known)
            filled = self._log_p, self._flags, self.told
            self._judge = partial(judge_columns, self._ks, self._psi, ks.table, psi.table, *filled)
            self._log_level = log_level
        return self._judge()


def _found_before(
    layout: Layout,
    expected: Sample,
    sizes: Array,
    log_level: float,
    rules: AlarmRules,
    calibration: Calibration,
    known: Known | None,
) -> tuple[Threshold, Threshold]:
    """``_thresholds``, which may be known."""
    if known is None or expected is not layout.profiled:
        return _thresholds(layout, expected, sizes, rules, log_level, calibration)
    key = log_level, sizes.tobytes()
    found = known.get(key)
    if found is None:
        found = _thresholds(layout, expected, sizes, rules, log_level, calibration)
        known.keep(key, found)
    return found


def _thresholds(
    layout: Layout, expected: Sample, sizes: Array, rules: AlarmRules, log_level: float, calibration: Calibration
) -> tuple[Threshold, Threshold]:
    """(KS, PSI). A column with an order has two tests, each at half the level.

    ``sizes``: the window's rows, missing rows and occupied bins, by column.
    """
    m, (n, missing, occupied) = expected.rows, sizes
    ordered = layout.ordered.tobytes()
    present = (m - expected.missing).tobytes(), (n - missing).tobytes()
    bins = occupied.tobytes(), _floats(calibration.psi), _floats(calibration.psi_degrees)
    few = len(m) <= _REMEMBERED_COLUMNS
    of_ks = _ks_threshold if few else _ks_threshold.__wrapped__
    of_psi = _psi_threshold if few else _psi_threshold.__wrapped__
    return (
        of_ks(log_level, (rules.min_ks, rules.clear_ratio), ordered, *present, _floats(calibration.ks)),
        of_psi(log_level, (rules.min_psi, rules.clear_ratio), ordered, m.tobytes(), n.tobytes(), *bins),
    )


def _floats(values: Array) -> bytes:
    return np.asarray(values, "f8").tobytes()


@functools.lru_cache(maxsize=_REMEMBERED)
def _ks_threshold(
    log_level: float, effect: tuple[float, float], ordered: bytes, m: bytes, n: bytes, inflation: bytes
) -> Threshold:
    """``effect``: the floor, and the share of it below which a column is quiet."""
    sizes = np.frombuffer(n, "i8"), np.frombuffer(m, "i8")
    level = np.where(np.frombuffer(ordered, bool), log_level - math.log(2.0), -np.inf)
    known = np.frombuffer(inflation)
    size, critical = np.sqrt(effective(*sizes) / known), critical_ks(level, *sizes, known)
    return Threshold(np.stack(_rows(size, level, effect, critical)))


@functools.lru_cache(maxsize=_REMEMBERED)
def _psi_threshold(
    log_level: float,
    effect: tuple[float, float],
    ordered: bytes,
    m: bytes,
    n: bytes,
    occupied: bytes,
    inflation: bytes,
    psi_degrees: bytes,
) -> Threshold:
    sizes = np.frombuffer(n, "i8"), np.frombuffer(m, "i8")
    level = np.where(np.frombuffer(ordered, bool), log_level - math.log(2.0), log_level)
    known = np.frombuffer(inflation)
    degrees = np.maximum(np.frombuffer(occupied, "i8") - 1, 0) * np.frombuffer(psi_degrees)
    critical = critical_psi(level, *sizes, degrees, known)
    return Threshold(np.stack([*_rows(effective(*sizes), level, effect, critical), known, degrees]))


def _rows(size: Array, level: Array, effect: tuple[float, float], critical: Array) -> list[Array]:
    """What the tables of both tests have, row by row."""
    floor, calm = effect
    floors = np.full(len(size), floor)
    return [size, level, level + _P_HYSTERESIS, floors, calm * floors, np.maximum(critical, floor)]
