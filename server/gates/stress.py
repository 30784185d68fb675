"""What a candidate does beyond the holdout: noise, bad values, rules of the business, and how long it takes.

Gates as in ``judging``: from a ``Case`` to findings, with the same errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np

from monitor.types import Column
from router.rollout.quality import Finding, Status, flips, latency, missing, monotonic, within
from server.config.gates import Bounds, Latency, Monotone, Robustness
from server.errors import InputRejected, InvalidArgument, TidegateError
from server.gates.judging import Case, Side, chances, decisions, values_of
from server.gates.running import outputs, run_times

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

#: Rows that each bad value is put into.
_PROBED_ROWS: Final = 4
#: Columns that bad values are put into, at most; a wider input is sampled.
_PROBED_COLUMNS: Final = 512
#: Wrong answers that are named one by one.
_NAMED: Final = 5
#: Rows times grid points that are run at once.
_GRID_ROWS: Final = 20_000


# --- noise -----------------------------------------------------------------------------------------------------------


def judge_noise(case: Case, asked: Robustness) -> Iterator[Finding]:
    """How many decisions change when every float column gets a little noise."""
    side = case.candidate
    places = _float_elements(side, asked.columns)
    if not any(found.size for found in places):
        yield missing("noise", "input of floats to disturb")
        return
    rng = np.random.default_rng(case.policy.seed)
    noisy = [_disturbed(tensor, found, asked.noise, rng) for tensor, found in zip(side.tensors, places, strict=True)]
    after = outputs(side.engine, noisy, {case.output}, case.pace)[case.output]
    before, alpha = side.outputs[case.output], 1 - case.policy.quality.confidence
    bad = int(np.count_nonzero(~np.isfinite(after))) if after.dtype.kind == "f" else 0
    if bad:
        yield Finding("noise", Status.FAILED, f"{bad} values under noise are not finite", {"not_finite": bad})
        return
    if case.policy.task == "regression":
        found = _shifts(values_of(before), values_of(after), asked, alpha)
    else:
        found = flips(decisions(case.policy, before), decisions(case.policy, after), asked.max_flips, alpha)
    yield replace(found, gate="noise", evidence=found.evidence | {"noise": asked.noise, "seed": case.policy.seed})


def _shifts(before: Array, after: Array, asked: Robustness, alpha: float) -> Finding:
    """A regression's flips: values that moved by more than a part of their spread."""
    moved = np.abs(after - before) > asked.max_shift * before.std()
    return flips(np.zeros(len(moved), bool), moved, asked.max_flips, alpha)


def _float_elements(side: Side, wanted: Sequence[str]) -> list[Array]:
    """Elements of each input that hold floats; of the ``wanted`` columns, if any. Raises InvalidArgument."""
    inputs = [column for column in side.columns.columns if column.source == "input"]
    unknown = sorted(set(wanted) - {column.name for column in inputs})
    if unknown:
        raise InvalidArgument(f"the model has no input column '{unknown[0]}'")
    found = []
    for tensor, spec in zip(side.tensors, side.engine.spec.inputs, strict=True):
        own = [c.index for c in inputs if c.tensor == spec.name and (not wanted or c.name in wanted)]
        found.append(np.array(sorted(own) if tensor.dtype.kind == "f" else [], dtype="i8"))
    return found


def _disturbed(tensor: Array, places: Array, noise: float, rng: np.random.Generator) -> Array:
    """A copy with noise of ``noise`` sd of each column; missing values stay missing."""
    if not places.size:
        return tensor
    changed = tensor.copy()
    values = tensor[:, places].astype("f8")
    changed[:, places] = (values + noise * _spread(values) * rng.standard_normal(values.shape)).astype(tensor.dtype)
    return changed


def _spread(values: Array) -> Array:
    """(columns,) the standard deviation of the values that are numbers; 0 where there are none."""
    finite = np.isfinite(values)
    counts = np.maximum(finite.sum(axis=0), 1)
    with np.errstate(over="ignore", invalid="ignore"):
        means = np.where(finite, values, 0).sum(axis=0) / counts
        return np.asarray(np.sqrt((np.where(finite, values - means, 0) ** 2).sum(axis=0) / counts))


# --- bad values ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Tally:
    """What became of the probes, counted in rows."""

    rows: int = 0
    refused: int = 0
    not_finite: int = 0
    failed: int = 0
    champion_too: int = 0
    first: list[dict[str, Any]] = field(default_factory=list)

    def note(self, column: str, value: float, what: str) -> None:
        if len(self.first) < _NAMED:
            self.first.append({"column": column, "value": repr(value), "answer": what})


def judge_bad_values(case: Case, asked: Robustness) -> Iterator[Finding]:
    """Each bad value in one column at a time, on a few rows."""
    rng = np.random.default_rng(case.policy.seed)
    rows = rng.choice(case.holdout.rows, min(_PROBED_ROWS, case.holdout.rows), replace=False)
    columns = [column for column in case.candidate.columns.columns if column.source == "input"]
    if len(columns) > _PROBED_COLUMNS:
        columns = [columns[place] for place in np.sort(rng.choice(len(columns), _PROBED_COLUMNS, replace=False))]
    tally, columns_probed = _Tally(), 0
    for column in columns:
        case.pace.check()
        values = _bad_values(case.candidate, column, asked)
        columns_probed += bool(values)
        for value in values:
            _probe(case, asked, rows, column, value, tally)
    if not tally.rows:
        yield missing("bad values", "input that could hold one")
        return
    told = {
        "rows": tally.rows,
        "columns": columns_probed,
        "refused": tally.refused,
        "not_finite": tally.not_finite,
        "failed": tally.failed,
        "champion_too": tally.champion_too,
        "first": tally.first,
    }
    wrong = tally.not_finite + tally.failed
    if wrong:
        yield Finding("bad values", Status.FAILED, f"{wrong} of {tally.rows} answers are not finite or failed", told)
        return
    yield Finding("bad values", Status.PASSED, f"{tally.rows} answers are finite, or the input was refused", told)


def _bad_values(side: Side, column: Column, asked: Robustness) -> list[float]:
    """Values of the kinds asked for that the column's type can hold."""
    dtype = _tensor_of(side, column).dtype
    if dtype.kind == "f":
        largest = float(np.finfo(dtype).max)
        kinds = {"missing": [np.nan], "infinite": [np.inf, -np.inf], "extreme": [largest, -largest]}
        return [value for kind in asked.probes for value in kinds[kind]]
    if dtype.kind in "iu" and column.datatype != "BF16" and "extreme" in asked.probes:
        # The least value itself is left out: it divided by -1 ends the process, see server.runtime.onnx.
        largest = int(np.iinfo(dtype).max)
        return [largest, -largest] if dtype.kind == "i" else [largest]
    return []


def _tensor_of(side: Side, column: Column) -> Array:
    return side.tensors[_input_place(side, column)]


def _input_place(side: Side, column: Column) -> int:
    return [tensor.name for tensor in side.engine.spec.inputs].index(column.tensor)


def _probe(case: Case, asked: Robustness, rows: Array, column: Column, value: float, tally: _Tally) -> None:
    """One value in one column on all rows: an answer is finite, not finite, refused or failed."""
    ours = _answers(case, case.candidate, _poisoned(case.candidate, rows, column, value))
    tally.rows += len(ours)
    tally.refused += ours.count("refused")
    wrong = [answer for answer in ours if answer in ("not finite", "failed")]
    if not wrong:
        return
    if not asked.strict and case.champion is not None:
        theirs = _answers(case, case.champion, _poisoned(case.champion, rows, column, value))
        if any(answer in ("not finite", "failed") for answer in theirs):
            tally.champion_too += len(wrong)
            return
    tally.not_finite += wrong.count("not finite")
    tally.failed += wrong.count("failed")
    tally.note(column.name, value, wrong[0])


def _answers(case: Case, side: Side, tensors: Sequence[Array]) -> list[str]:
    """One word a row: finite, not finite, refused or failed. A batch that raises is asked again row by row."""
    try:
        found = outputs(side.engine, tensors, {case.output}, case.pace)[case.output]
    except TidegateError as error:
        if len(tensors[0]) == 1:
            return ["refused" if isinstance(error, InputRejected) else "failed"]
        singles = [[tensor[place : place + 1] for tensor in tensors] for place in range(len(tensors[0]))]
        return [word for single in singles for word in _answers(case, side, single)]
    if found.dtype.kind != "f":
        return ["finite"] * len(found)
    finite = np.isfinite(found.reshape(len(found), -1)).all(axis=1)
    return [str(word) for word in np.where(finite, "finite", "not finite")]


def _poisoned(side: Side, rows: Array, column: Column, value: float) -> list[Array]:
    tensors = [tensor[rows].copy() for tensor in side.tensors]
    tensors[_input_place(side, column)][:, column.index] = value
    return tensors


# --- rules of the business -------------------------------------------------------------------------------------------


def judge_bounds(case: Case, asked: Bounds) -> Iterator[Finding]:
    """All answers on the holdout."""
    name = asked.output or case.output
    if name not in case.candidate.outputs:
        raise InvalidArgument(f"the model has no output '{name}' that bounds could be of")
    values = case.candidate.outputs[name]
    if values.dtype.kind not in "fiu":
        raise InvalidArgument(f"output '{name}' has no numbers that bounds could be of")
    low = -np.inf if asked.low is None else asked.low
    high = np.inf if asked.high is None else asked.high
    found = within(values, low, high)
    yield replace(found, gate=f"bounds of {name}", evidence=found.evidence | {"low": asked.low, "high": asked.high})


def judge_direction(case: Case, asked: Monotone) -> Iterator[Finding]:
    """Predictions (rows, grid) along the column's quantiles; each step is a pair."""
    gate, side = f"direction of {asked.column}", case.candidate
    column = next((c for c in side.columns.columns if c.name == asked.column and c.source == "input"), None)
    if column is None:
        raise InvalidArgument(f"the model has no input column '{asked.column}'")
    tensor = _tensor_of(side, column)
    if tensor.dtype.kind not in "fiu" or column.datatype == "BF16":
        raise InvalidArgument(f"column '{asked.column}' of {column.datatype} has no direction")
    values = tensor[:, column.index]
    known = values[np.isfinite(values.astype("f8"))]
    if not known.size:
        yield missing(gate, "value of the column")
        return
    grid = np.unique(np.quantile(known, np.linspace(0, 1, asked.grid), method="nearest"))
    if len(grid) < 2:
        yield missing(gate, "second value of the column")
        return
    rng = np.random.default_rng(case.policy.seed)
    rows = rng.choice(case.holdout.rows, min(asked.rows, case.holdout.rows), replace=False)
    found = _along(case, column, rows, grid)
    compared = monotonic(found[:, :-1].ravel(), found[:, 1:].ravel(), asked.direction == "increasing", asked.tolerance)
    told = compared.evidence | {"rows": len(rows), "steps": len(grid) - 1, "column": asked.column}
    yield replace(compared, gate=gate, evidence=told, reason=compared.reason.replace(" rows ", " steps "))


def _along(case: Case, column: Column, rows: Array, grid: Array) -> Array:
    """(rows, grid) predictions with the column at each grid point."""
    side, parts, step = case.candidate, [], max(1, _GRID_ROWS // len(grid))
    for start in range(0, len(rows), step):
        taken = rows[start : start + step]
        tensors = [np.repeat(tensor[taken], len(grid), axis=0) for tensor in side.tensors]
        tensors[_input_place(side, column)][:, column.index] = np.tile(grid, len(taken))
        answer = outputs(side.engine, tensors, {case.output}, case.pace)[case.output]
        parts.append(chances(case.policy, answer).reshape(len(taken), len(grid)))
    return np.concatenate(parts)


# --- run times -------------------------------------------------------------------------------------------------------


def judge_latency(case: Case, asked: Latency, rows: int) -> Iterator[Finding]:
    """Ratios of quantiles of run times of so many rows."""
    gate = f"latency in batches of {rows}"
    if case.champion is None:
        yield missing(gate, case.why)
        return
    most = min(max(1, side.engine.spec.max_batch_size) for side in (case.candidate, case.champion))
    if rows > most:
        raise InvalidArgument(f"batches of {rows} rows are more than both models take, {most}")
    ours, theirs = run_times(
        case.candidate.engine,
        case.champion.engine,
        (case.candidate.tensors, case.champion.tensors),
        rows,
        asked.runs,
        asked.budget,
        case.pace,
    )
    alpha = 1 - case.policy.quality.confidence
    for name, quantile, limit in (("p50", 0.5, asked.p50), ("p99", 0.99, asked.p99)):
        if limit is not None:
            found = latency(ours, theirs, limit, quantile, alpha, case.policy.seed)
            yield replace(found, gate=f"{gate}, {name}", evidence=found.evidence | {"quantile": quantile})
