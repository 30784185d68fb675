"""What a candidate predicts on the holdout, and how good that is: quality, slices, fairness.

A gate is a function of a ``Case`` to findings. It raises InvalidArgument when the data or the policy do not let it
decide, and OutOfTime; whoever calls it makes "undecided" of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from router.rollout.quality import Finding, Status, missing, non_inferior, slices, slices_not_worse, superior
from server.config.gates import Fairness, GatePolicy, Slices
from server.errors import InvalidArgument
from server.gates import scores
from server.gates.holdout import Holdout, groups_of, label_numbers, label_texts
from server.gates.running import Pace
from server.gates.scores import Decided
from server.runtime.base import Engine
from server.tabular import Tabular
from server.types import BYTES, ModelSpec

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_FLOATS: Final = frozenset({"FP16", "BF16", "FP32", "FP64"})
#: How far from 0..1 rounding may take a probability.
_ROUNDING: Final = 1e-3
_PARITY: Final = ("selection_rate",)
_OPPORTUNITY: Final = ("true_positive_rate",)
_ODDS: Final = ("true_positive_rate", "false_positive_rate")


@dataclass(slots=True, frozen=True)
class Side:
    """A model on the holdout: ``tensors`` (rows, elements) per input, ``outputs`` (rows, ...) by name."""

    engine: Engine
    columns: Tabular
    tensors: list[Array]
    outputs: dict[str, Array]


@dataclass(slots=True, frozen=True)
class Case:
    """All that gates look at. ``champion`` None: there is none, or it cannot be run; ``why`` then says so."""

    policy: GatePolicy
    holdout: Holdout
    output: str
    candidate: Side
    champion: Side | None
    pace: Pace
    why: str = "champion"


@dataclass(slots=True, frozen=True)
class Labelled:
    """The rows that have a label: losses per row of both, and for a classifier its decisions and labels as places."""

    rows: Array
    loss: Array
    champion_loss: Array | None
    metrics: dict[str, dict[str, float | None]]
    decisions: Array | None = None
    labels: Array | None = None
    positive: int = 0


def main_output(policy: GatePolicy, spec: ModelSpec) -> str:
    """The output that is judged. Raises InvalidArgument."""
    datatypes = {tensor.name: tensor.datatype for tensor in spec.outputs}
    if policy.output:
        if policy.output not in datatypes:
            raise InvalidArgument(f"the model has no output '{policy.output}'; it has {', '.join(datatypes)}")
        return policy.output
    floats = [name for name, datatype in datatypes.items() if datatype in _FLOATS]
    others = [name for name, datatype in datatypes.items() if policy.task == "classification" or datatype != BYTES]
    found = floats or others
    if not found:
        raise InvalidArgument(f"the model has no output that a {policy.task} could be judged by")
    return found[0]


# --- predictions -----------------------------------------------------------------------------------------------------


def values_of(output: Array) -> Array:
    """(rows,) of a regression. Raises InvalidArgument."""
    if output.size != len(output) or output.dtype.kind not in "fiu":
        raise InvalidArgument(f"a regression has one number per row, the output is {list(output.shape)}")
    return output.reshape(len(output)).astype("f8")


def is_labels(output: Array) -> bool:
    """Whether a classifier's output holds labels instead of probabilities."""
    return output.dtype.kind != "f"


def probabilities(output: Array) -> Array:
    """(rows, classes). Raises InvalidArgument when they cannot be any."""
    found = scores.two_sided(output)
    if found.shape[1] > scores.MOST_CLASSES:
        raise InvalidArgument(f"an output of {found.shape[1]} elements a row is none of probabilities")
    finite = found[np.isfinite(found)]
    if finite.size and not -_ROUNDING <= finite.min() <= finite.max() <= 1 + _ROUNDING:
        raise InvalidArgument(f"wanted probabilities, the output has values from {finite.min():g} to {finite.max():g}")
    return found


def decisions(policy: GatePolicy, output: Array) -> Array:
    """(rows,) what is decided, comparable between runs: a place, or a label's text."""
    if is_labels(output):
        return scores.as_text(output.reshape(len(output)))
    found = probabilities(output)
    return scores.decide(found, _positive(policy, policy.classes, found.shape[1]), policy.threshold)


def chances(policy: GatePolicy, output: Array) -> Array:
    """(rows,) what is predicted, as a number: a regression's value, or the positive class's probability."""
    if policy.task == "regression":
        return values_of(output)
    if is_labels(output):
        raise InvalidArgument("the output has labels, and no probability that could rise or fall")
    found = probabilities(output)
    return found[:, _positive(policy, policy.classes, found.shape[1])]


def _positive(policy: GatePolicy, classes: Sequence[str], width: int) -> int:
    """The place of the positive class. Raises InvalidArgument."""
    if policy.positive is None:
        return width - 1
    names = tuple(classes) or tuple(str(place) for place in range(width))
    if policy.positive not in names:
        raise InvalidArgument(f"positive: there is no class '{policy.positive}', there are {', '.join(names[:10])}")
    return names.index(policy.positive)


# --- labels ----------------------------------------------------------------------------------------------------------


def labelled(case: Case) -> Labelled | None:
    """Losses and metrics on the rows that have a label; None when none has. Raises InvalidArgument."""
    if case.policy.task == "regression":
        return _labelled_regression(case)
    return _labelled_classes(case)


def _labelled_regression(case: Case) -> Labelled | None:
    labels = label_numbers(case.holdout, case.policy)
    if labels is None:
        return None
    rows = np.flatnonzero(np.isfinite(labels))
    losses, metrics = {}, {}
    for name, side in _sides(case):
        predicted = values_of(side.outputs[case.output])[rows]
        losses[name] = scores.regression_loss(case.policy.loss_name, predicted, labels[rows])
        metrics[name] = scores.regression_metrics(predicted, labels[rows])
    return Labelled(rows, losses["candidate"], losses.get("champion"), metrics)


def _labelled_classes(case: Case) -> Labelled | None:
    output = case.candidate.outputs[case.output]
    texts = label_texts(case.holdout, case.policy, {*case.policy.classes, *_names(case)})
    if texts is None:
        return None
    rows = np.flatnonzero(texts != "")
    width = 0 if is_labels(output) else probabilities(output).shape[1]
    classes = scores.find_classes(texts[rows], width, case.policy.classes)
    labels = scores.places(texts[rows], classes)
    if (labels < 0).any():
        raise InvalidArgument(f"the label '{texts[rows][labels < 0][0]}' is none of {', '.join(classes[:10])}")
    positive = _positive(case.policy, classes, len(classes))
    losses, metrics, decided = {}, {}, {}
    for name, side in _sides(case):
        found = _decided(case.policy, side.outputs[case.output][rows], classes, positive)
        losses[name] = scores.classification_loss(case.policy.loss_name, found, labels)
        metrics[name] = scores.classification_metrics(found, labels, positive)
        decided[name] = found.decisions
    return Labelled(rows, losses["candidate"], losses.get("champion"), metrics, decided["candidate"], labels, positive)


def _names(case: Case) -> set[str]:
    """What models that answer with strings say."""
    answers = [side.outputs[case.output] for _, side in _sides(case)]
    return {
        name for output in answers if output.dtype.kind in "OSU" for name in scores.as_text(output.ravel()).tolist()
    }


def _decided(policy: GatePolicy, output: Array, classes: Sequence[str], positive: int) -> Decided:
    if is_labels(output):
        return Decided(scores.places(scores.as_text(output.reshape(len(output))), classes))
    found = probabilities(output)
    if found.shape[1] != len(classes):
        raise InvalidArgument(f"there are {len(classes)} classes, an output has {found.shape[1]}")
    return Decided(scores.decide(found, positive, policy.threshold), found)


def _sides(case: Case) -> Iterator[tuple[str, Side]]:
    yield "candidate", case.candidate
    if case.champion is not None:
        yield "champion", case.champion


# --- gates -----------------------------------------------------------------------------------------------------------


def judge_quality(case: Case, known: Labelled | None) -> Iterator[Finding]:
    """The paired comparison, with the usual numbers of both beside it."""
    if known is None:
        yield missing("quality", "label in the holdout")
        return
    asked = case.policy.quality
    told = {"loss": case.policy.loss_name, "metrics": known.metrics}
    if known.champion_loss is None:
        yield replace(missing("quality", case.why), evidence=told)
        return
    alpha = 1 - asked.confidence
    if asked.compare == "superior":
        found = superior(known.loss, known.champion_loss, alpha, case.policy.seed)
    else:
        found = non_inferior(known.loss, known.champion_loss, asked.margin, alpha, case.policy.seed)
    yield replace(found, evidence=found.evidence | told)


def judge_slices(case: Case, known: Labelled | None, asked: Slices) -> Iterator[Finding]:
    """Least metric, gap, and not worse than the champion, for one way to cut the rows."""
    gate = f"slices of {asked.column}"
    if known is None:
        yield missing(gate, "label in the holdout")
        return
    groups = groups_of(case.holdout, asked.column, asked.bins)[known.rows]
    yield _sliced(known, asked, groups, gate)
    if asked.max_worse is not None:
        yield _not_worse(case, known, asked, groups, f"{gate} beside the champion")


def _sliced(known: Labelled, asked: Slices, groups: Array, gate: str) -> Finding:
    values, mask = _metric(known, asked.metric)
    kept = _kept(groups, mask, asked)
    mask = kept if mask is None else mask & kept
    found = slices(values[kept], groups[kept], asked.min, asked.max_gap, mask[kept], asked.min_rows)
    return replace(found, gate=gate, evidence=found.evidence | {"metric": asked.metric})


def _metric(known: Labelled, name: str) -> tuple[Array, Array | None]:
    if name == "loss" or known.decisions is None or known.labels is None:
        return known.loss, None
    return scores.metric_rows(name, known.decisions, known.labels, known.positive)


def _kept(groups: Array, mask: Array | None, asked: Slices | Fairness) -> Array:
    """Rows of groups that are looked at: all, or with ``small: skip`` those of groups that are large enough."""
    if asked.small == "ask":
        return np.ones(len(groups), bool)
    _, where = np.unique(groups, return_inverse=True)
    counts = np.bincount(where, None if mask is None else mask.astype("f8"))
    return np.asarray(counts[where] >= asked.min_rows)


def _not_worse(case: Case, known: Labelled, asked: Slices, groups: Array, gate: str) -> Finding:
    if known.champion_loss is None or asked.max_worse is None:
        return missing(gate, case.why)
    kept = _kept(groups, None, asked)
    found = slices_not_worse(
        known.loss[kept],
        known.champion_loss[kept],
        groups[kept],
        asked.max_worse,
        1 - case.policy.quality.confidence,
        asked.min_rows,
        case.policy.seed,
    )
    return replace(found, gate=gate)


def judge_fairness(case: Case, known: Labelled | None, asked: Fairness) -> Iterator[Finding]:
    """Gaps between groups of the rate of positive decisions, given the label or not."""
    limits = (
        ("demographic parity", asked.demographic_parity, _PARITY),
        ("equal opportunity", asked.equal_opportunity, _OPPORTUNITY),
        ("equalized odds", asked.equalized_odds, _ODDS),
    )
    for name, limit, rates in limits:
        if limit is not None:
            yield _gap(case, known, asked, f"{name} of {asked.column}", limit, rates)


def _gap(case: Case, known: Labelled | None, asked: Fairness, gate: str, limit: float, rates: Sequence[str]) -> Finding:
    if known is None or known.decisions is None or known.labels is None:
        return missing(gate, "label in the holdout")
    groups = groups_of(case.holdout, asked.column, asked.bins)[known.rows]
    found = {rate: _rate(known, asked, groups, limit, rate) for rate in rates}
    order = (Status.FAILED, Status.UNDECIDED, Status.PASSED)
    decisive = min(found.values(), key=lambda one: (order.index(one.status), -one.evidence.get("gap", 0.0)))
    numbers = {"limit": limit, "gap": decisive.evidence.get("gap")}
    return replace(decisive, gate=gate, evidence=numbers | {r: f.evidence for r, f in found.items()})


def _rate(known: Labelled, asked: Fairness, groups: Array, limit: float, rate: str) -> Finding:
    values, mask = _metric(known, rate)
    kept = _kept(groups, mask, asked)
    rows = kept if mask is None else mask & kept
    return slices(values[kept], groups[kept], None, limit, rows[kept], asked.min_rows)
