"""Golden requests: inputs whose right answers are known. A version that answers one otherwise may not serve.

A file of them is ``{"requests": [{"inputs": [...], "outputs": [...], "abs_tol": 1e-4, "rel_tol": 1e-3}]}``, with
tensors as V2 JSON writes them. Outputs that a request does not list are not compared. Everything here blocks.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from server.batching.assemble import Layout
from server.checks import fit_inputs
from server.codec.checks import dims, shown
from server.codec.dtypes import FLOATS, bfloat16_values
from server.codec.json import decode_infer
from server.errors import InvalidArgument, ModelLoadError, TidegateError
from server.runtime.base import BatchingOptions, Engine
from server.types import RequestLimits, Tensor

MAX_REQUESTS: Final = 1000
MAX_BYTES: Final = 64 * 1024 * 1024
ABS_TOL: Final = 1e-4
REL_TOL: Final = 1e-3

_LIMITS: Final = RequestLimits()
_TOLERANCES: Final = {"abs_tol": ABS_TOL, "rel_tol": REL_TOL}


@dataclass(slots=True, frozen=True)
class GoldenCase:
    """One request and outputs of its answer. Floats may be off by ``abs_tol + rel_tol * |wanted|``."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    abs_tol: float = ABS_TOL
    rel_tol: float = REL_TOL


# --- files -----------------------------------------------------------------------------------------------------------


def load_golden(path: Path) -> tuple[GoldenCase, ...]:
    """The requests of one file, at most 1,000 in 64 MiB. Raises ModelLoadError that says what is wrong with it."""
    try:
        return _cases(_document(_contents(path)))
    except InvalidArgument as error:
        raise ModelLoadError(f"{path.name}: {error.message}") from None


def _contents(path: Path) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InvalidArgument("wanted a regular file")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidArgument(f"golden requests cannot be read: {error.strerror or 'input/output error'}") from error
    if len(raw) > MAX_BYTES:
        raise InvalidArgument(f"is over {MAX_BYTES} bytes, the most that golden requests may have")
    return raw


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe too, which nobody may ever write to, so that it can be refused."""
    return os.open(path, flags | os.O_NONBLOCK)


def _document(raw: bytes) -> Any:
    """The JSON value. The standard library's parser reads NaN, infinities and integers of any size."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"wanted JSON: {error}") from None


def _cases(document: Any) -> tuple[GoldenCase, ...]:
    requests = document.get("requests") if isinstance(document, dict) else None
    if not isinstance(requests, list) or len(document) != 1:
        raise InvalidArgument('wanted {"requests": [...]} and no other key')
    if not 0 < len(requests) <= MAX_REQUESTS:
        raise InvalidArgument(f"wanted 1 to {MAX_REQUESTS} requests, got {len(requests)}")
    return tuple(_case(f"golden request {number}", request) for number, request in enumerate(requests, start=1))


def _case(where: str, request: Any) -> GoldenCase:
    if not isinstance(request, dict) or not {"inputs", "outputs"} <= request.keys():
        raise InvalidArgument(f"{where}: wanted an object with inputs and outputs")
    if unknown := request.keys() - {"inputs", "outputs", *_TOLERANCES}:
        raise InvalidArgument(f"{where}: unknown key {shown(min(unknown))}")
    inputs, outputs = (_tensors(f"{where}, {side}", request[side]) for side in ("inputs", "outputs"))
    return GoldenCase(inputs, outputs, *(_tolerance(where, request, name) for name in _TOLERANCES))


def _tensors(where: str, tensors: Any) -> tuple[Tensor, ...]:
    """Outputs are written like inputs, so both are read as a request's inputs."""
    try:
        body = json.dumps({"inputs": tensors}).encode()
        return tuple(decode_infer(body, model="", version="", limits=_LIMITS, json_size=None).inputs)
    except InvalidArgument as error:
        raise InvalidArgument(f"{where}: {error.message}") from None


def _tolerance(where: str, request: Mapping[str, Any], name: str) -> float:
    value = request.get(name, _TOLERANCES[name])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InvalidArgument(f"{where}: {name} must be a number from 0, got {shown(value)}")
    return value


# --- answers ---------------------------------------------------------------------------------------------------------


def run_golden(engine: Engine, cases: Sequence[GoldenCase], batching: BatchingOptions) -> str:
    """The first disagreement as one sentence, or "" when there is none. Requests count from 1.

    Each request runs by itself on instance 0, padded as ``batching`` says; so nothing else may use the engine yet.
    Raises ConfigError when ``batching`` does not fit the model.
    """
    layout = Layout(engine.spec, batching)
    for number, case in enumerate(cases, start=1):
        if difference := _disagreement(engine, layout, case):
            return f"golden request {number}: {difference}"
    return ""


def _disagreement(engine: Engine, layout: Layout, case: GoldenCase) -> str:
    try:
        inputs, rows = fit_inputs(engine.spec, list(case.inputs))
        (answer,) = layout.split([inputs], [rows], engine.run(0, layout.join([inputs], rows)))
    except TidegateError as error:
        return error.message
    got = {tensor.name: tensor for tensor in answer}
    return next(filter(None, (_difference(wanted, got, case) for wanted in case.outputs)), "")


def _difference(wanted: Tensor, answer: Mapping[str, Tensor], case: GoldenCase) -> str:
    got = answer.get(wanted.name)
    if got is None:
        return f"output {shown(wanted.name)} is not among those of the model, {', '.join(map(shown, answer))}"
    if (got.datatype, got.shape) != (wanted.datatype, wanted.shape):
        return f"output {shown(wanted.name)} should be {_kind(wanted)}, got {_kind(got)}"
    right, have = _values(wanted), _values(got)
    wrong = np.flatnonzero(~_agree(right, have, case))
    if not wrong.size:
        return ""
    first = int(wrong[0])
    place = np.unravel_index(first, wanted.shape)
    where = f" at {dims([int(axis) for axis in place])}" if place else ""
    more = f", and {wrong.size - 1} more of {right.size} values differ" if wrong.size > 1 else ""
    return f"output {shown(wanted.name)}{where} should be {_show(right[first])}, got {_show(have[first])}{more}"


def _agree(wanted: np.ndarray[Any, Any], got: np.ndarray[Any, Any], case: GoldenCase) -> np.ndarray[Any, Any]:
    """Element by element: floats within the tolerances and NaN equal to NaN, everything else exactly equal."""
    if wanted.dtype.kind != "f":
        return np.asarray(got == wanted, dtype=bool)
    return np.asarray(np.isclose(got, wanted, rtol=case.rel_tol, atol=case.abs_tol, equal_nan=True))


def _values(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Flat; all floats as doubles, so that no difference or tolerance is lost to a narrow type."""
    flat = tensor.array().reshape(-1)
    if tensor.datatype not in FLOATS:
        return flat
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return (bfloat16_values(flat) if tensor.datatype == "BF16" else flat).astype(np.float64)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.datatype}{dims(tensor.shape)}"


def _show(value: Any) -> str:
    return (
        f"{value:.9g}" if isinstance(value, np.floating) else shown(value if isinstance(value, bytes) else value.item())
    )
