"""The nouns of labels: what is joined with what, the settings of it, what it is held against. Times are wall ns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from monitor.errors import SettingsError
from monitor.types import HOUR_NS, SECOND_NS, AlarmRules, Array, Buffer, Window, rows_window

Task: TypeAlias = Literal["binary", "multiclass", "regression"]
#: What the output holds: probabilities, their logits (before the logistic function or softmax), or the class itself.
Form: TypeAlias = Literal["probability", "logit", "class"]

CalibratorKind: TypeAlias = Literal["isotonic", "platt", "bins"]

#: The slice of all rows together.
ALL: Final = ""
#: Where values of the slicing column go that are over the bound.
OTHER: Final = "(other)"
#: What a signal must be worse by before it counts. Relative to the reference: log_loss, mae, rmse; in units of the
#: reference's RMSE: bias; absolute: the others.
MARGINS: Final[Mapping[str, float]] = MappingProxyType(
    {
        "accuracy": 0.02,
        "auc": 0.02,
        "log_loss": 0.1,
        "mae": 0.1,
        "rmse": 0.1,
        "calibration": 0.03,
        "brier_excess": 0.005,
        "bias": 0.1,
    }
)
#: What a signal's reference can be, both ends allowed; a bias can be any number.
_RANGES: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "accuracy": (0.0, 1.0),
        "auc": (0.0, 1.0),
        "log_loss": (0.0, inf),
        "mae": (0.0, inf),
        "rmse": (0.0, inf),
        "brier_excess": (-1.0, 1.0),
        "bias": (-inf, inf),
    }
)
#: Signals of each task, in the order of their alarms.
SIGNALS: Final[Mapping[Task, tuple[str, ...]]] = MappingProxyType(
    {
        "binary": ("accuracy", "log_loss", "auc", "calibration", "brier_excess"),
        "multiclass": ("accuracy", "log_loss", "calibration", "brier_excess"),
        "regression": ("mae", "rmse", "bias"),
    }
)
#: Signals that say whether scores mean what they say; the others say how good predictions are.
CALIBRATION_SIGNALS: Final = frozenset({"calibration", "brier_excess", "bias"})


class HasTensor(Protocol):
    """An output tensor of an answer: raw little-endian contents, or a list of ``bytes`` for BYTES."""

    @property
    def name(self) -> str: ...
    @property
    def datatype(self) -> str: ...
    @property
    def data(self) -> Buffer | list[bytes]: ...


class Joined(NamedTuple):
    """One row whose label came. ``prediction``: the score (binary), value (regression) or scores of all classes.

    With ``form`` "class" it is the class's number. ``unit`` is whatever the caller of ``remember`` said.
    ``outcome_ns``: when the outcome was, if that was told, else when its label came; never before its prediction.
    """

    model: str
    version: str
    arm: str
    unit: int
    prediction: tuple[float, ...]
    label: float
    slice: str
    predicted_ns: int
    labelled_ns: int
    outcome_ns: int


@dataclass(slots=True, frozen=True)
class LabelRules:
    """When labels raise an alarm: worse than the reference, by chance next to impossible, and by a margin.

    ``reference``: known values by signal (of the manifest, say), without sampling error when ``given_rows`` is 0. For
    signals that are not given, the first ``learn_rows`` joined rows of each group are the reference; 0 learns nothing,
    and then calibration is held against perfect calibration. ``margins`` replace those of ``MARGINS``.
    """

    alarm: AlarmRules = field(default_factory=partial(AlarmRules, ert_rows=1_000_000))
    reference: Mapping[str, float] = field(default_factory=dict)
    given_rows: int = 0
    learn_rows: int = 2000
    margins: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, named in (("reference", self.reference), ("margins", self.margins)):
            unknown = sorted(set(named) - set(MARGINS))
            if unknown:
                raise SettingsError(f"{what} of '{unknown[0]}': known signals are {', '.join(MARGINS)}")
            bad = sorted(name for name, value in named.items() if not isfinite(value))
            if bad:
                raise SettingsError(f"{what} of '{bad[0]}' must be a finite number, got {named[bad[0]]}")
        if "calibration" in self.reference:
            raise SettingsError("calibration has no single number as its reference; it is learnt, or perfect")
        for name, value in self.reference.items():
            low, high = _RANGES[name]
            if not low <= value <= high:
                wanted = f"in {low:g}..{high:g}" if isfinite(high) else f"at least {low:g}"
                raise SettingsError(f"reference of '{name}' must be {wanted}, got {value:g}")
        if self.given_rows < 0 or self.learn_rows < 0 or min(self.margins.values(), default=0.0) < 0:
            raise SettingsError("given_rows, learn_rows and margins must not be negative")

    def margin(self, signal: str) -> float:
        return self.margins.get(signal, MARGINS[signal])


@dataclass(slots=True, frozen=True)
class LabelSettings:
    """How the labels of one model are joined and judged. Raises SettingsError for impossible values.

    ``output`` names the output tensor; a row's prediction is its element ``index`` (binary, regression, classes) or,
    for multiclass scores, its elements ``index`` to ``index + len(classes) - 1``. ``name``: which feedback is the
    label, "" for feedback without a name. ``classes``: names that labels as text may have, in the order of the scores.
    """

    task: Task
    output: str
    index: int = 0
    name: str = ""
    form: Form = "probability"
    #: Binary: a score of at least this is a predicted positive.
    threshold: float = 0.5
    classes: tuple[str, ...] = ()
    windows: tuple[Window, ...] = (rows_window(1000), rows_window(10_000))
    rules: LabelRules = LabelRules()
    #: Predictions remembered: rows, and how long. The oldest are forgotten, and counted as expired without a label.
    capacity_rows: int = 100_000
    max_age_ns: int = 7 * 24 * HOUR_NS
    #: A label that comes later than this is joined, and counted as late.
    late_ns: int = HOUR_NS
    #: Labels that came before their prediction: how long and how many wait for it; then they are unknown.
    hold_ns: int = 300 * SECOND_NS
    hold_labels: int = 10_000
    #: Bounds of what waits for the next drain; what is over is dropped and counted.
    queue_rows: int = 65_536
    queue_bytes: int = 64 * 1024 * 1024
    queue_labels: int = 65_536
    #: Rows of one pane whose scores are kept for an exact AUC; a pane with more keeps counts on a fine grid instead.
    exact_rows: int = 10_000
    #: Bins of equal width for the calibration of scores.
    bins: int = 10
    #: The newest predictions of an arm that performance is estimated from without their labels; 0 estimates nothing.
    estimate_rows: int = 5000
    calibrator: CalibratorKind = "isotonic"
    #: Groups (version, arm, slice) followed at most, the one longest without a row forgotten; slices of an arm.
    max_groups: int = 64
    max_slices: int = 16
    #: The number of each class, by its name.
    class_of: Mapping[str, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        places = {name: float(place) for place, name in enumerate(self.classes)}
        object.__setattr__(self, "class_of", places)
        self._check_task()
        if not self.windows or len(set(self.windows)) != len(self.windows):
            raise SettingsError("labels need at least one window, and no two the same")
        for window in self.windows:
            if window.pane < 1 or window.length < window.pane or window.length % window.pane:
                raise SettingsError(f"a window's pane must divide its length, got {window.pane} and {window.length}")
        positive = ("capacity_rows", "max_age_ns", "late_ns", "queue_rows", "queue_bytes", "queue_labels", "bins",
                    "max_groups", "max_slices")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("index", "hold_ns", "hold_labels", "exact_rows", "estimate_rows"):
            if getattr(self, name) < 0:
                raise SettingsError(f"{name} must not be negative, got {getattr(self, name)}")
        self._check_signals()

    def _check_task(self) -> None:
        if self.task not in SIGNALS:
            raise SettingsError(f"task must be one of {', '.join(SIGNALS)}, got '{self.task}'")
        if self.form not in ("probability", "logit", "class"):
            raise SettingsError(f"form must be probability, logit or class, got '{self.form}'")
        if not self.output:
            raise SettingsError("output must name the tensor that holds the prediction")
        if not isfinite(self.threshold):
            raise SettingsError(f"threshold must be a finite number, got {self.threshold}")
        wanted = {"binary": (0, 2), "regression": (0, 0), "multiclass": (2, 256)}[self.task]
        if not (len(self.classes) == wanted[0] or wanted[0] <= len(self.classes) <= wanted[1]):
            raise SettingsError(f"{self.task} needs {wanted[0]} to {wanted[1]} classes, got {len(self.classes)}")
        if len(set(self.classes)) != len(self.classes) or (self.task == "binary" and len(self.classes) == 1):
            raise SettingsError(f"classes must be different and none or all be named, got {self.classes}")

    def _check_signals(self) -> None:
        foreign = sorted((set(self.rules.reference) | set(self.rules.margins)) - set(SIGNALS[self.task]))
        if foreign:
            raise SettingsError(f"'{foreign[0]}' is no signal of {self.task}: {', '.join(self.signals)}")

    @property
    def signals(self) -> tuple[str, ...]:
        """What alarms are about; without scores, only how often the class is right."""
        hard = self.form == "class" and self.task != "regression"
        return ("accuracy",) if hard else SIGNALS[self.task]

    @property
    def width(self) -> int:
        """Numbers of one row's prediction."""
        return len(self.classes) if self.task == "multiclass" and self.form != "class" else 1


@dataclass(slots=True, frozen=True, eq=False)
class LabelReference:
    """How good predictions were on labelled rows (``monitor.label_state`` makes and reads it). No row is in it.

    ``basis``: the settings that the numbers depend on, as JSON has them. ``counts`` int64 (k) and ``sums`` uint8
    (m, bytes) of a ``monitor.performance.Tally``; ``cells`` int64 (2, cells): negatives and positives by score, None
    for a task without scores.
    """

    basis: Mapping[str, Any]
    rows: int
    counts: Array
    sums: Array
    cells: Array | None = None
