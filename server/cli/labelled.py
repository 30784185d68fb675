"""The reference of labels from a table: what the model says of its rows, held against what became of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
import numpy as np

from monitor.errors import SettingsError
from monitor.loaders import TEXT_FILES
from monitor.outcomes import Form, LabelReference, LabelSettings, Task
from monitor.types import BYTES
from server.errors import InvalidArgument
from server.tabular import Array, Tabular, read_tables
from server.transport.feedback import number_of

if TYPE_CHECKING:
    from monitor.types import Column

Command = TypeVar("Command", bound=Callable[..., Any])

_PLACE: Final = re.compile(r"([^\[\]]+)(?:\[(\d{1,9})\])?")
#: Metrics that are told of a reference, those of them that its task has.
_TOLD: Final = ("accuracy", "auc", "log_loss", "ece", "mae", "rmse", "bias")


@dataclass(slots=True, frozen=True)
class Labelled:
    """Which column is the label, and of which output. The rest as in the ``labels`` section of the configuration."""

    label: str
    predict: str = ""
    task: Task = "binary"
    form: Form = "probability"
    threshold: float = 0.5
    classes: str = ""


def options(command: Command) -> Command:
    """The options that make a ``Labelled``."""
    for option in reversed(
        [
            click.option("--label", metavar="COLUMN", help="Hold the model's output against this column, too."),
            click.option("--predict", default="", metavar="TENSOR[INDEX]", help="The output that predicts the label."),
            click.option("--task", type=click.Choice(["binary", "multiclass", "regression"]), default="binary"),
            click.option("--form", type=click.Choice(["probability", "logit", "class"]), default="probability"),
            click.option("--threshold", type=float, default=0.5, help="A score from which on a row is positive."),
            click.option("--classes", default="", metavar="A,B", help="Names of the classes, in the scores' order."),
        ]
    ):
        command = option(command)
    return command


def set_aside(table: dict[str, Array], column: str, data: Sequence[Path]) -> Array:
    """The label's values, and the table without them: they are no element of a tensor.

    Those of a text file are the texts themselves, None where there is none: ``01`` may be the name of a class.
    """
    if column not in table or table[column].ndim != 1:
        raise InvalidArgument(f"--label: the data have no column '{column}' with one value per row")
    values = table.pop(column)
    if not any(path.name.lower().endswith(TEXT_FILES) for path in data):
        return values
    written = read_tables(data, [column], texts=True)[column].tolist()
    out = np.empty(len(values), object)
    out[:] = [None if _absent(value) else text for value, text in zip(values.tolist(), written, strict=True)]
    return out


def reference_of(found: Tabular, values: Array, wanted: Labelled) -> LabelReference:
    """A profile's reference of labels. Rows without a label are left out.

    Raises InvalidArgument for outputs that are not there, values that do not fit, and what the task cannot have.
    """
    from monitor.label_state import reference_rows, to_profile

    tensor, index = _output(found, wanted.predict)
    names = tuple([name for name in wanted.classes.split(",") if name])
    try:
        settings = LabelSettings(
            wanted.task, tensor, index=index, form=wanted.form, threshold=wanted.threshold, classes=names
        )
    except SettingsError as error:
        classes = f"with --classes {wanted.classes}" if wanted.classes else "without --classes"
        raise InvalidArgument(f"--task {wanted.task} {classes}: {error}") from None
    told = np.array([not _absent(value) for value in values.tolist()], bool)
    if not told.any():
        raise InvalidArgument(f"--label: no row has a value in '{wanted.label}'")
    labels = _labels(settings, values[told], wanted.label)
    return to_profile(settings, reference_rows(settings, _predictions(settings, found, told), labels))


def told(reference: LabelReference) -> dict[str, float]:
    """What a reference says: rows, and some metrics of its task."""
    from monitor.label_state import from_profile
    from monitor.performance import scorer_of

    basis = dict(reference.basis)
    threshold = 0.5 if basis["threshold"] is None else basis["threshold"]
    settings = LabelSettings(**{**basis, "threshold": threshold, "classes": tuple(basis["classes"])})
    rows = from_profile(settings, reference)
    found = scorer_of(settings).metrics(rows.tally, rows.ranking)
    metrics = {name: float(found[name]) for name in _TOLD if name in found}
    return {"rows": rows.tally.rows, **{name: value for name, value in metrics.items() if not math.isnan(value)}}


def _output(found: Tabular, predict: str) -> tuple[str, int]:
    """Tensor and first element. Without a name: the only column of an output."""
    outputs = [column for column in found.columns if column.source == "output"]
    if not outputs:
        raise InvalidArgument("--label needs what the model answers: use --model with --run, or data with its outputs")
    if not predict:
        if len(outputs) > 1:
            raise InvalidArgument(f"--predict must name one of {_some(outputs)}")
        return outputs[0].tensor, outputs[0].index
    parts = _PLACE.fullmatch(predict)
    if parts is None or parts[1] not in {column.tensor for column in outputs}:
        raise InvalidArgument(f"--predict: wanted TENSOR or TENSOR[INDEX] of {_some(outputs)}, got {predict!r}")
    return parts[1], int(parts[2] or 0)


def _some(columns: list[Column]) -> str:
    names = [f"{column.tensor}[{column.index}]" if column.width > 1 else column.tensor for column in columns]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _absent(value: object) -> bool:
    return value is None or value in ("", b"") or (isinstance(value, float) and math.isnan(value))


def _labels(settings: LabelSettings, values: Array, name: str) -> Array:
    from monitor.labels import label_of

    found = []
    for value in values.tolist():
        outcome = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        label = label_of(settings, _said(settings, outcome))
        if label is None:
            wanted = ", ".join(settings.classes) or ("a number" if settings.task == "regression" else "0 or 1")
            raise InvalidArgument(f"--label: '{name}' holds {str(outcome)[:64]!r}, wanted {wanted}")
        found.append(label)
    return np.array(found, "f8")


def _said(settings: LabelSettings, outcome: Any) -> Any:
    """An outcome as the server would take it: the name of a class, or else the number that it means."""
    text = str(outcome).lower() if isinstance(outcome, bool) else outcome  # as JSON writes it
    if not isinstance(text, str) or text in settings.class_of:
        return text
    number = number_of(text)
    return text if number is None else number


def _predictions(settings: LabelSettings, found: Tabular, rows: Array) -> Array:
    """(n, width) float64, as the server would read them."""
    from monitor.labels import predictions_of
    from monitor.profile import column_values

    own = {c.index: c for c in found.columns if (c.source, c.tensor) == ("output", settings.output)}
    missing = [place for place in range(settings.index, settings.index + settings.width) if place not in own]
    if missing:
        raise InvalidArgument(f"--predict: output '{settings.output}' has no element {missing[0]}")
    columns = [own[settings.index + place] for place in range(settings.width)]
    values = [column_values(found.table, column)[rows] for column in columns]
    if columns[0].datatype == BYTES:
        values = [np.array([settings.class_of.get(v.decode("utf-8", "replace"), math.nan) for v in values[0].tolist()])]
    raw = np.stack(values, axis=1)
    read = predictions_of(settings, raw) if np.isfinite(raw).all() else None
    if read is None:
        raise InvalidArgument(
            f"--predict: output '{settings.output}' holds values that are no {settings.form} of a {settings.task} task"
        )
    return read
