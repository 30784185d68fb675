"""Does a request fit the model? Every refusal names the tensor, what was wanted and what was got.

Checks are against the model's own signature, so a caller's mistake never reaches the runtime as a server error.
Pure functions; the wire forms have already checked that each buffer has the size that its shape says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from server.errors import InvalidArgument
from server.types import BYTES, InferenceRequest, ModelSpec, ParameterValue, RequestedOutput, Tensor, TensorSpec

_MAX_TIMEOUT_US = 10**15


def fit_inputs(spec: ModelSpec, inputs: list[Tensor]) -> tuple[list[Tensor | None], int]:
    """The request's inputs in the spec's order (None: absent and optional), and their rows (0: does not batch)."""
    specs = spec.inputs
    if len(inputs) == 1 == len(specs) and inputs[0].name == specs[0].name:
        tensor = inputs[0]
        return [tensor], _check_tensor(spec, specs[0], tensor)
    given = _by_name(spec, inputs)
    ordered: list[Tensor | None] = []
    rows = 0
    first = ""
    for wanted in specs:
        tensor_or_none = given.get(wanted.name)
        ordered.append(tensor_or_none)
        if tensor_or_none is not None:
            rows = _check_rows_agree(spec, wanted, tensor_or_none, rows, first)
            first = first or wanted.name
    if specs and spec.max_batch_size and not first:
        raise InvalidArgument(
            f"model '{spec.name}' takes its batch size from its inputs, of which none is given; wanted at least one "
            f"of {_quoted(wanted.name for wanted in specs)}"
        )
    return ordered, rows


def _by_name(spec: ModelSpec, inputs: list[Tensor]) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    for tensor in inputs:
        if tensor.name in given:
            raise InvalidArgument(f"input '{tensor.name}' is given twice for model '{spec.name}'")
        given[tensor.name] = tensor
    known = {wanted.name for wanted in spec.inputs}
    unknown = [name for name in given if name not in known]
    missing = [wanted.name for wanted in spec.inputs if not wanted.optional and wanted.name not in given]
    if unknown:
        raise InvalidArgument(
            f"unexpected inference input {_quoted(unknown)} for model '{spec.name}'; its inputs are {_quoted(known)}"
        )
    if missing:
        raise InvalidArgument(
            f"expected {len(spec.inputs)} inputs but got {len(given)} inputs for model '{spec.name}': "
            f"missing {_quoted(missing)}"
        )
    return given


def _check_rows_agree(spec: ModelSpec, wanted: TensorSpec, tensor: Tensor, rows: int, first: str) -> int:
    got = _check_tensor(spec, wanted, tensor)
    if rows and got != rows:
        raise InvalidArgument(
            f"inputs of model '{spec.name}' disagree on the batch size: '{first}' has {rows} rows, "
            f"'{wanted.name}' has {got}"
        )
    return got


def _check_tensor(spec: ModelSpec, wanted: TensorSpec, tensor: Tensor) -> int:
    """Rows of this tensor (0 when the model does not batch)."""
    if tensor.datatype != wanted.datatype:
        raise InvalidArgument(
            f"input '{wanted.name}' of model '{spec.name}' takes datatype {wanted.datatype}, got {tensor.datatype}"
        )
    shape = tensor.shape
    if len(shape) != len(wanted.shape):
        raise _wrong_shape(spec, wanted, shape)
    if spec.max_batch_size:
        _check_dims(spec, wanted, shape, 1)
        got = shape[0]
        if not 0 < got <= spec.max_batch_size:
            raise InvalidArgument(
                f"input '{wanted.name}': batch size must be between 1 and {spec.max_batch_size} for model "
                f"'{spec.name}' (inference request batch-size must be <= {spec.max_batch_size}), got {got}"
            )
        return got
    _check_dims(spec, wanted, shape, 0)
    return 0


def _check_dims(spec: ModelSpec, wanted: TensorSpec, shape: tuple[int, ...], start: int) -> None:
    dims = wanted.shape
    for axis in range(start, len(dims)):
        if dims[axis] not in (-1, shape[axis]):
            raise _wrong_shape(spec, wanted, shape)


def _wrong_shape(spec: ModelSpec, wanted: TensorSpec, shape: tuple[int, ...]) -> InvalidArgument:
    return InvalidArgument(
        f"unexpected shape for input '{wanted.name}' for model '{spec.name}': "
        f"expected {list(wanted.shape)}, got {list(shape)}"
    )


def pick_outputs(spec: ModelSpec, requested: Sequence[RequestedOutput]) -> list[int] | None:
    """Indexes into the spec's outputs in the order asked for; None when all are wanted."""
    if not requested:
        return None
    index = {output.name: i for i, output in enumerate(spec.outputs)}
    picked: list[int] = []
    for want in requested:
        position = index.get(want.name)
        if position is None:
            raise InvalidArgument(
                f"unexpected inference output '{want.name}' for model '{spec.name}'; its outputs are {_quoted(index)}"
            )
        if position in picked:
            raise InvalidArgument(f"output '{want.name}' is asked for twice for model '{spec.name}'")
        if want.classification:
            _check_classification(spec, spec.outputs[position], want.classification)
        picked.append(position)
    return picked


def _check_classification(spec: ModelSpec, output: TensorSpec, count: int) -> None:
    if count < 0:
        raise InvalidArgument(f"classification of output '{output.name}' must be a positive count, got {count}")
    if output.datatype == BYTES:
        raise InvalidArgument(
            f"output '{output.name}' of model '{spec.name}' is {BYTES}: classification needs a numeric output"
        )


def queue_terms(parameters: Mapping[str, ParameterValue]) -> tuple[int, int]:
    """(priority, timeout in microseconds) of a request's parameters; 0 where absent."""
    if not parameters:
        return 0, 0
    return _whole(parameters, "priority", 2**32 - 1), _whole(parameters, "timeout", _MAX_TIMEOUT_US)


def _whole(parameters: Mapping[str, ParameterValue], name: str, most: int) -> int:
    value = parameters.get(name, 0)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 20:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise InvalidArgument(f"parameter '{name}' must be a whole number from 0 to {most}, got {str(value)[:64]!r}")
    return value


def check_request(request: InferenceRequest, spec: ModelSpec) -> tuple[list[Tensor | None], int, list[int] | None]:
    """All checks of one request: ordered inputs, rows, and the outputs to answer with."""
    ordered, rows = fit_inputs(spec, request.inputs)
    return ordered, rows, pick_outputs(spec, request.outputs) if request.outputs else None


def _quoted(names: object) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))  # type: ignore[call-overload]
