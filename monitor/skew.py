"""Training-serving skew: how served rows differ from the training table, column by column, in plain numbers.

Unlike the monitor's looks this is no test over time: one reference, one set of served rows, every difference. Served
rows are a table (a captured window, say: all numbers are exact then) or the counts of a monitor: means are then taken
over the middles of cells, and the range is known to within a knot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from monitor.calibration import Calibration
from monitor.drift.base import Pair
from monitor.drift.judge import judge
from monitor.drift.rates import rates
from monitor.drift.scores import severity
from monitor.errors import ProfileError, ProfileMismatch, StateError
from monitor.layout import Layout
from monitor.profile import ColumnProfile, ReferenceProfile, column_values, datatype_of, kind_of
from monitor.state import MonitorState
from monitor.types import BYTES, STABLE, AlarmRules, Array, Column, Window

#: Categories that are named per column.
_NAMED: Final = 10


@dataclass(slots=True, frozen=True)
class ColumnSkew:
    """One column, training against served. Undefined numbers are NaN.

    ``problem``: why the column could not be compared (absent, or of another type), else empty. ``min`` and ``max`` are
    over values present; for counts alone the served ones are those of the nearest knot inside, or infinite when values
    lie outside the training range. ``mean_shift_sd``: difference of means in standard deviations of training.
    ``unseen``: share of served rows with a category that training does not have; ``new_categories`` names some where
    the rows are known, ``absent_categories`` names some of training that no served row has.
    """

    column: str
    source: str
    datatype: str
    served_type: str
    problem: str
    training_rows: int
    served_rows: int
    missing_training: float
    missing_served: float
    min_training: float
    max_training: float
    min_served: float
    max_served: float
    outside: float
    unseen: float
    new_categories: tuple[str, ...]
    absent_categories: tuple[str, ...]
    psi: float
    psi_p: float
    ks: float
    ks_p: float
    mean_shift_sd: float
    severity: str


@dataclass(slots=True, frozen=True)
class SkewReport:
    """Columns with a problem first, then by PSI, the largest first. ``exact``: made from rows, not from counts."""

    profile: str
    exact: bool
    columns: tuple[ColumnSkew, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinities stay floats."""
        return asdict(self)


def skew(
    training: ReferenceProfile,
    served: Mapping[str, Any] | MonitorState,
    *,
    arm: str = STABLE,
    window: Window | None = None,
) -> SkewReport:
    """``served``: one 1-D array per column (``loaders.read_table``), or a monitor's state: of that, the ``arm``'s
    ``window``, or all that it ever counted when None.

    A column that is absent or of another type is reported, not raised. Raises ProfileMismatch for a state of another
    profile, StateError for an unknown arm or window, ProfileError for a table without any row.
    """
    layout = Layout(training)
    if isinstance(served, MonitorState):
        return _from_state(layout, served, arm, window)
    return _from_table(layout, served)


def _from_state(layout: Layout, state: MonitorState, arm: str, window: Window | None) -> SkewReport:
    if state.sha256 != layout.sha256:
        raise ProfileMismatch(f"the state is of profile {state.sha256[:12]}, wanted {layout.sha256[:12]}")
    if arm not in state.arms:
        raise StateError(f"no row of arm '{arm}' was counted; there are {', '.join(state.arms) or 'none'}")
    found = state.arms[arm]
    cells = (found.total if window is None else found.window(window).cells)[: layout.cells]
    facts = [
        _Served(one.column.datatype, "", *_range_of(one, own), _mean_of(one, own), ())
        for one, own in zip(layout.columns, _split(layout, cells), strict=True)
    ]
    return _report(layout, cells, facts, exact=False)


def _from_table(layout: Layout, table: Mapping[str, Any]) -> SkewReport:
    rows = max((len(np.atleast_1d(np.asarray(values))) for values in table.values()), default=0)
    if not rows:
        raise ProfileError("the served table has no rows")
    facts, cells = [], []
    for one in layout.columns:
        try:
            _check_type(table, one.column)
            values = column_values(table, one.column)
            single = Layout(ReferenceProfile((one,)))
            cells.append(single.count_table({one.column.name: values}))
            facts.append(_facts(one, table[one.column.name], values))
        except ProfileError as error:
            cells.append(np.zeros(len(one.counts), "i8"))
            facts.append(_Served(_type_of(table, one.column), str(error), math.nan, math.nan, math.nan, ()))
    return _report(layout, np.concatenate(cells), facts, exact=True)


@dataclass(slots=True, frozen=True)
class _Served:
    """What is known of a column's served values beside their counts."""

    datatype: str
    problem: str
    low: float
    high: float
    mean: float
    new: tuple[str, ...]


def _type_of(table: Mapping[str, Any], column: Column) -> str:
    if column.name not in table:
        return ""
    try:
        return datatype_of(np.asarray(table[column.name]), column.name)
    except ProfileError:
        return str(np.asarray(table[column.name]).dtype)


def _check_type(table: Mapping[str, Any], column: Column) -> None:
    """Raises ProfileError for strings where training has numbers, or the other way round."""
    served = _type_of(table, column)
    if served and served != BYTES and column.datatype == BYTES:
        raise ProfileError(f"column '{column.name}': wanted strings, got {served}")
    if served == BYTES and column.datatype != BYTES:
        raise ProfileError(f"column '{column.name}': wanted {column.datatype}, got strings")
    if served and kind_of(column.datatype) == "integer" and kind_of(served) == "numeric":
        values = column_values({column.name: table[column.name]}, Column(column.name, column.name, datatype="FP64"))
        if (values[np.isfinite(values)] % 1 != 0).any():
            raise ProfileError(f"column '{column.name}': wanted {column.datatype}, got {served} with fractions")


def _facts(one: ColumnProfile, given: Any, values: Array) -> _Served:
    served = _type_of({one.column.name: given}, one.column)
    if one.column.datatype == BYTES:
        known = {*one.categories, *one.rare, b""}
        new = sorted(set(values.tolist()) - known)[:_NAMED]
        return _Served(served, "", math.nan, math.nan, math.nan, tuple([_text(value) for value in new]))
    present = values[~np.isnan(values)]
    finite = present[np.isfinite(present)]
    low, high = (float(present.min()), float(present.max())) if len(present) else (math.nan, math.nan)
    new_values = np.setdiff1d(present, one.knots)[:_NAMED].tolist() if one.column.discrete else []
    mean = float(np.mean(finite)) if len(finite) else math.nan
    return _Served(served, "", low, high, mean, tuple([f"{value:g}" for value in new_values]))


def _text(value: bytes) -> str:
    return value[:64].decode("utf-8", "backslashreplace")


def _split(layout: Layout, cells: Array) -> list[Array]:
    return [cells[a:b] for a, b in zip(layout.start[:-1], layout.start[1:], strict=True)]


def _range_of(one: ColumnProfile, cells: Array) -> tuple[float, float]:
    """(lowest, highest) value that counts of cells show: knots, or infinite outside of them."""
    held = np.flatnonzero(cells[:-1])
    if not len(held) or one.column.datatype == BYTES or not len(one.knots):
        return math.nan, math.nan
    edges = np.concatenate([[-np.inf], one.knots, [np.inf]])
    first, last = int(held[0]), int(held[-1])
    return float(edges[(first + 1) // 2]), float(edges[last // 2 + 1])


def _mean_of(one: ColumnProfile, cells: Array) -> float:
    """The mean with each gap's rows at its middle, and rows outside the range at its end."""
    finite = np.isfinite(one.knots)
    if one.column.datatype == BYTES or not len(one.knots) or not finite.all():
        return math.nan
    knots = one.knots
    middles = np.concatenate([knots[:1], knots[:-1] / 2 + knots[1:] / 2, knots[-1:]])
    places = np.empty(2 * len(knots) + 1)
    places[0::2], places[1::2] = middles, knots
    rows = int(cells[:-1].sum())
    return float(places @ cells[:-1] / rows) if rows else math.nan


def _report(layout: Layout, cells: Array, facts: list[_Served], *, exact: bool) -> SkewReport:
    pair = Pair(layout, layout.reference, cells)
    judged = judge(pair, AlarmRules(), math.log(0.05), Calibration.none(layout))
    rate = rates(pair)
    reference_rows, rows = pair.rows
    found = []
    for i, (one, served) in enumerate(zip(layout.columns, facts, strict=True)):
        low, high = _range_of(one, one.counts)
        # Against counts, both means are taken the same way, so that equal counts differ by nothing.
        mean = one.mean if exact else _mean_of(one, one.counts)
        psi = float(judged.psi.value[i])
        found.append(
            ColumnSkew(
                column=one.column.name,
                source=one.column.source,
                datatype=one.column.datatype,
                served_type=served.datatype,
                problem=served.problem,
                training_rows=int(reference_rows[i]),
                served_rows=int(rows[i]),
                missing_training=float(rate.missing_reference[i]),
                missing_served=float(rate.missing[i]),
                min_training=low,
                max_training=high,
                min_served=served.low,
                max_served=served.high,
                outside=float(rate.below[i] + rate.above[i]),
                unseen=float(rate.new_category[i]),
                new_categories=served.new,
                absent_categories=_absent(one, _split(layout, cells)[i]) if not served.problem else (),
                psi=psi,
                psi_p=math.exp(judged.psi_log_p[i]),
                ks=float(judged.ks_low[i]),
                ks_p=math.exp(judged.ks_log_p[i]),
                mean_shift_sd=(served.mean - mean) / one.sd if one.sd > 0 else math.nan,
                severity=severity(psi),
            )
        )
    order = sorted(found, key=lambda one: (not one.problem, -one.psi if one.psi == one.psi else 0.0))
    return SkewReport(layout.sha256, exact, tuple(order))


def _absent(one: ColumnProfile, cells: Array) -> tuple[str, ...]:
    """Known categories that no served row has, the most frequent of training first."""
    if not one.column.discrete:
        return ()
    own = len(one.categories) if one.column.datatype == BYTES else len(one.knots)
    gone = [place for place in range(own) if one.counts[2 * place + 1] > 0 and cells[2 * place + 1] == 0]
    gone.sort(key=lambda place: -int(one.counts[2 * place + 1]))
    labels = [_text(one.categories[p]) if one.column.datatype == BYTES else f"{one.knots[p]:g}" for p in gone[:_NAMED]]
    return tuple(labels)
