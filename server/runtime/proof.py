"""Does a batch of n rows give what n single rows give? Shown on made-up data before rows of two callers ever meet.

Floats are compared within a tolerance, as matrix kernels round differently at other sizes. Integers, booleans and
strings are compared exactly, but an argmax may fall the other way where two floats tie, so one draw in three may
differ in these. A model that mixes rows differs in every draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from server.errors import TidegateError
from server.runtime.base import Batch
from server.runtime.sampling import Domain, join, random_rows
from server.types import ModelSpec, Tensor

#: Relative tolerance per datatype; the absolute one is a hundredth of it, scaled by the tensor's largest value.
RELATIVE_TOLERANCE: Final = {"FP64": 1e-6, "FP32": 1e-3, "FP16": 2e-2, "BF16": 1e-1}
_ABSOLUTE_PER_RELATIVE: Final = 1e-2
_DRAWS: Final = 3
_LARGE: Final = 16

RunBatch = Callable[[Batch], list[Tensor]]


@dataclass(slots=True, frozen=True)
class Proof:
    """``domain`` is what the graph took (None: it took nothing); ``refusal`` is why rows must not be gathered."""

    domain: Domain | None
    refusal: str = ""


class _SingleFailed(Exception):
    """The graph refuses even single rows of this domain."""


def prove(
    run: RunBatch, spec: ModelSpec, candidates: Iterable[Domain], rng: np.random.Generator, expired: Callable[[], bool]
) -> Proof:
    """Find a domain that single rows run on, and compare batches of 2, 3 and more rows with single rows.

    ``expired`` ends the search for a domain, and leaves out the large batch, when time is up; 2 and 3 are always run.
    """
    for domain in candidates:
        try:
            return Proof(domain, _first_refusal(run, spec, domain, rng, expired))
        except _SingleFailed:
            if expired():
                break
    return Proof(None, "the model takes no made-up input, so it cannot be shown that rows do not influence each other")


def _first_refusal(
    run: RunBatch, spec: ModelSpec, domain: Domain, rng: np.random.Generator, expired: Callable[[], bool]
) -> str:
    for rows in sorted({2, min(3, spec.max_batch_size), min(_LARGE, spec.max_batch_size)}):
        if rows > 3 and expired():
            break
        if refusal := _compare_draws(run, spec, domain, rows, rng):
            return refusal
    return ""


def _compare_draws(run: RunBatch, spec: ModelSpec, domain: Domain, rows: int, rng: np.random.Generator) -> str:
    """Why a batch of ``rows`` differs from singles, or ""."""
    mistakes: list[str] = []
    for draw in range(_DRAWS):
        exact, refusal = _compare(run, spec, random_rows(spec, domain, rows, rng))
        if refusal:
            return refusal
        mistakes += [exact] if exact else []
        if draw == 0 and not mistakes:
            return ""
    return mistakes[0] if len(mistakes) > 1 else ""


def _compare(run: RunBatch, spec: ModelSpec, singles: list[Batch]) -> tuple[str, str]:
    """What differs in exactly compared outputs, and what rules gathering out; each "" when all is well."""
    rows = len(singles)
    try:
        wanted = [run(single) for single in singles]
    except TidegateError as error:
        raise _SingleFailed from error
    try:
        got = run(join(singles))
    except TidegateError as error:
        return "", f"{rows} rows run alone but not as a batch: {error.message}"
    exact = ""
    for index, output in enumerate(got):
        expected = [answer[index] for answer in wanted]
        if any(tensor.shape[:1] != (1,) for tensor in expected) or output.shape[:1] != (rows,):
            return "", f"output '{output.name}' of {rows} rows has shape {list(output.shape)}, not {rows} rows"
        difference = f"output '{output.name}' of {rows} rows together differs from the same rows alone"
        if len({tensor.shape for tensor in expected}) > 1 or output.shape[1:] != expected[0].shape[1:]:
            return "", difference
        if not _same(output, expected):
            if output.datatype in RELATIVE_TOLERANCE:
                return "", difference
            exact = difference
    return exact, ""


def _same(output: Tensor, expected: list[Tensor]) -> bool:
    if isinstance(output.data, list):
        return output.data == [item for tensor in expected for item in tensor.data]
    want = np.concatenate([values(tensor) for tensor in expected])
    got = values(output)
    tolerance = RELATIVE_TOLERANCE.get(output.datatype)
    if tolerance is None:
        return np.array_equal(got, want)
    finite = np.abs(want[np.isfinite(want)])
    scale = max(1.0, float(finite.max())) if finite.size else 1.0
    return np.allclose(got, want, rtol=tolerance, atol=tolerance * _ABSOLUTE_PER_RELATIVE * scale, equal_nan=True)


def values(tensor: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """The numbers of a fixed-size tensor; FP16 and BF16 widened so that they can be compared."""
    array = tensor.array()
    if tensor.datatype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if tensor.datatype == "FP16" else array
