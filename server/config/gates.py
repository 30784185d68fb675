"""Gate policies of the configuration: what a candidate must show on holdout data, beside the champion, to serve.

``gates`` names policies, ``models.NAME.gate`` takes one of them. A section that is left out is not checked, but for
``quality``, which always is; an empty one (``{}``) is checked with its defaults.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from server.config import units
from server.config.kinds import Count, FilePath, Many, Percent, Text, Timeout, default, scalar_text
from server.config.section import Section

Metric: TypeAlias = Literal[
    "accuracy", "selection_rate", "true_positive_rate", "false_positive_rate", "precision", "loss"
]
_NAME_PATTERN: Final = "[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
_NAME: Final = re.compile(_NAME_PATTERN, re.ASCII)


def _policy_name(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        wanted = "letters, digits, '_', '.' or '-', at most 63"
        raise ValueError(f"a policy's name must be {wanted}, got {units.show(value)}")
    return value


PolicyName = Annotated[
    str, BeforeValidator(_policy_name), WithJsonSchema({"type": "string", "pattern": f"^{_NAME_PATTERN}$"})
]
_Ratio = Annotated[float, Field(gt=0, le=1000)]
_MOST_ROWS: Final = 10_000_000
_CLASSIFICATION_LOSSES: Final = ("brier", "log_loss", "zero_one")
_REGRESSION_LOSSES: Final = ("squared", "absolute")


def _percent(text: str) -> float:
    found: float = default(text, units.parse_percent)
    return found


def _label(value: object) -> str:
    return scalar_text(value)


_Label = Annotated[str, BeforeValidator(_label), WithJsonSchema({"type": ["string", "number", "boolean"]})]
_SHA256 = Annotated[Text, Field(pattern=r"^[0-9a-f]{64}$")]


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list) else [value]


_Paths = Annotated[
    Many[FilePath],
    BeforeValidator(_one_or_many),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]


class Holdout(Section):
    """Data that no model was trained on: .csv, .csv.gz, .npz or .parquet files of the same columns.

    ``columns``: the inputs of the model in order; left out: all but the label and what other sections alone name.
    ``map``: ``COLUMN=TENSOR[INDEX]`` each, where order does not say it. ``sha256``: of the file, or of all files one
    after the other; other bytes are not looked at. ``max_rows``: of more a seeded sample is taken.
    """

    #: One file, or a list of them.
    path: _Paths
    sha256: _SHA256 | None = None
    #: The column of true answers.
    label: Text | None = None
    columns: Many[Text] = ()
    map: Many[Text] = ()
    max_rows: Annotated[int, Field(ge=100, le=_MOST_ROWS)] = 200_000


class Quality(Section):
    """The paired comparison of mean losses. ``margin``: of the champion's loss; ``superior`` allows none.

    ``confidence``: with which each end of the interval holds.
    """

    #: Whether the candidate must be no worse than the champion by ``margin``, or better.
    compare: Literal["non_inferior", "superior"] = "non_inferior"
    margin: Percent = _percent("0.1%")
    confidence: Annotated[Percent, Field(ge=0.5, le=0.9999)] = _percent("95%")


class Slices(Section):
    """Groups of rows by a column's values, or by ``bins`` of it, and what must be true of each of them.

    ``max_worse``: by how much of the champion's loss there the candidate's
    may be over it. Groups of fewer than ``min_rows`` rows make the gate ask, or are left alone.
    """

    #: The column whose values make the groups.
    column: Text
    #: Edges, ascending, for a column of numbers.
    bins: Many[float] = ()
    min_rows: Annotated[int, Field(ge=1, le=_MOST_ROWS)] = 200
    #: What small groups do: make the gate ask, or nothing.
    small: Literal["ask", "skip"] = "ask"
    #: What is looked at in each group.
    metric: Metric = "accuracy"
    #: The least value of the metric.
    min: float | None = None
    #: The greatest difference of the metric between two groups.
    max_gap: Annotated[float, Field(ge=0)] | None = None
    max_worse: Percent | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Slices:
        if list(self.bins) != sorted(set(self.bins)):
            raise ValueError("bins: wanted edges in ascending order, each once")
        if self.metric == "loss" and self.min is not None:
            raise ValueError("min: a loss has no least value to be asked for; use max_gap or max_worse")
        return self


class Fairness(Section):
    """Groups of people by a column's values, or by ``bins`` of it. Gaps are the greatest difference between groups.

    At least one of ``demographic_parity``, ``equal_opportunity`` and ``equalized_odds`` is wanted.
    """

    #: The column whose values make the groups.
    column: Text
    #: Edges, ascending, for a column of numbers.
    bins: Many[float] = ()
    #: Groups of fewer rows are small.
    min_rows: Annotated[int, Field(ge=1, le=_MOST_ROWS)] = 200
    #: What small groups do: make the gate ask, or nothing.
    small: Literal["ask", "skip"] = "ask"
    #: Greatest gap of the rate of positive decisions.
    demographic_parity: Percent | None = None
    #: Greatest gap of the true positive rate.
    equal_opportunity: Percent | None = None
    #: Greatest gap of the true and of the false positive rate.
    equalized_odds: Percent | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Fairness:
        if list(self.bins) != sorted(set(self.bins)):
            raise ValueError("bins: wanted edges in ascending order, each once")
        if self.demographic_parity is None and self.equal_opportunity is None and self.equalized_odds is None:
            raise ValueError("wanted at least one of demographic_parity, equal_opportunity and equalized_odds")
        return self


class Robustness(Section):
    """Small changes and bad values of the inputs.

    ``noise``: the sd of the noise on every float column (or on ``columns``), of the column's own sd. ``max_shift``:
    a regression's decision changes when the output moves by more than this share of its own sd. ``probes``: values put
    into one column at a time; answers must be finite, or the input refused, wherever the champion does that, and
    everywhere when ``strict``.
    """

    noise: Percent = _percent("1%")
    #: The share of decisions that noise may change.
    max_flips: Percent = _percent("1%")
    max_shift: Percent = _percent("10%")
    #: The columns that get noise; left out: every float column.
    columns: Many[Text] = ()
    probes: Annotated[
        Many[Literal["missing", "infinite", "extreme"]],
        Field(json_schema_extra={"default": ["missing", "infinite", "extreme"]}),
    ] = ("missing", "infinite", "extreme")
    #: Ask finite answers or refusals of the candidate even where the champion gives none.
    strict: bool = False


class Bounds(Section):
    """Every value of an output (left out: the prediction) is finite and from ``low`` to ``high``."""

    #: The output; left out, the prediction.
    output: Text = ""
    #: The least value.
    low: float | None = None
    #: The greatest value.
    high: float | None = None

    @model_validator(mode="after")
    def _sensible(self) -> Bounds:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low:g} is over high {self.high:g}")
        return self


class Monotone(Section):
    """The prediction never goes against the direction when one column rises through ``grid`` quantiles of its values.

    Looked at on ``rows`` sampled rows, all else equal. A classifier's prediction is the positive class's probability.
    """

    #: The column that rises.
    column: Text
    #: Where the prediction may go.
    direction: Literal["increasing", "decreasing"] = "increasing"
    #: How many quantiles of the column are tried.
    grid: Annotated[int, Field(ge=2, le=1000)] = 20
    #: How many rows it is tried on.
    rows: Annotated[int, Field(ge=1, le=100_000)] = 200
    #: By how much it may go against the direction.
    tolerance: Annotated[float, Field(ge=0)] = 1e-6


class Rules(Section):
    """What the business asks of predictions, whatever the data say."""

    bounds: Many[Bounds] = ()
    monotone: Many[Monotone] = ()


class Latency(Section):
    """Run times beside the champion's, in turns on the same rows: ratios of quantiles, never times.

    ``batch_sizes``: rows of a run. Runs go on until there are ``runs`` pairs, or ``budget`` is spent.
    """

    #: Greatest ratio of the medians.
    p50: _Ratio | None = 1.2
    #: Greatest ratio of the 99th percentiles.
    p99: _Ratio | None = 1.2
    batch_sizes: Annotated[Many[Annotated[int, Field(ge=1, le=65_536)]], Field(min_length=1)] = (1,)
    #: Pairs of runs that are wanted.
    runs: Annotated[int, Field(ge=1000, le=1_000_000)] = 5000
    #: How long it may take.
    budget: Timeout = default("30s", units.parse_duration)


class GatePolicy(Section):
    """One policy. ``output`` left out: the first output that the loss can be taken of.

    ``classes``: labels in the order of the probabilities; left out: 0, 1, ... or the labels of the holdout, sorted.
    ``positive``: the class that decisions are about; left out: the last one. ``threshold``: from which probability on
    two classes are decided for it. ``seed`` fixes every draw. ``time_limit``: what is not done by then is not decided.
    """

    #: What the model does.
    task: Literal["classification", "regression"] = "classification"
    holdout: Holdout
    output: Text = ""
    classes: Many[_Label] = ()
    positive: _Label | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    #: What predictions are judged by; left out: ``brier``, for a regression ``squared``.
    loss: Literal["brier", "log_loss", "zero_one", "squared", "absolute"] | None = None
    seed: Count = 0
    time_limit: Timeout = default("10m", units.parse_duration)
    quality: Quality = Field(default_factory=Quality)
    slices: Many[Slices] = ()
    fairness: Many[Fairness] = ()
    robustness: Robustness | None = None
    rules: Rules = Field(default_factory=Rules)
    latency: Latency | None = None

    @property
    def loss_name(self) -> str:
        """The loss, or the task's usual one."""
        return self.loss or ("brier" if self.task == "classification" else "squared")

    @model_validator(mode="after")
    def _sensible(self) -> GatePolicy:
        known = _CLASSIFICATION_LOSSES if self.task == "classification" else _REGRESSION_LOSSES
        if self.loss_name not in known:
            raise ValueError(f"loss: wanted one of {', '.join(known)} for {self.task}, got {self.loss}")
        if self.task == "regression" and self.fairness:
            raise ValueError("fairness: is about decisions, which a regression has none of; use slices with a loss")
        if self.task == "regression" and any(part.metric != "loss" for part in self.slices):
            raise ValueError("slices: the metric of a regression is loss")
        if self.positive is not None and self.classes and self.positive not in self.classes:
            raise ValueError(f"positive: wanted one of {', '.join(self.classes)}, got {self.positive}")
        return self

    def digest(self) -> str:
        """SHA-256 (hex) of what the policy asks; where the data lie is no part of it."""
        asked = self.model_dump(mode="json", exclude={"holdout": {"path"}})
        return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def paths(self) -> tuple[Path, ...]:
        """The files of the holdout."""
        return self.holdout.path
