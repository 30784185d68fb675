from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.errors import InputRejected
from server.runtime.base import Batch
from server.runtime.proof import Proof, prove
from server.runtime.sampling import Domain
from server.types import BYTES, ModelSpec, Tensor, TensorSpec

Array = np.ndarray[Any, np.dtype[Any]]
DATATYPES = {"f4": "FP32", "i8": "INT64", "f2": "FP16"}


def proved(compute: Callable[[Array], Array], dtype: str = "f4", limit: int = 64) -> Proof:
    """Prove a model that is one numpy function over an input of [-1, 4]."""
    spec = ModelSpec("m", "1", (TensorSpec("x", DATATYPES[dtype], (-1, 4)),), (), max_batch_size=limit)

    def run(batch: Batch) -> list[Tensor]:
        data = b"".join(batch.parts[0] or [])  # type: ignore[arg-type]
        values = compute(np.frombuffer(data, "<" + dtype).reshape(batch.shapes[0]))
        if values.dtype == object:
            return [Tensor("y", BYTES, values.shape, [str(item).encode() for item in values.ravel()])]
        return [Tensor("y", DATATYPES[values.dtype.str[1:]], values.shape, values.tobytes())]

    return prove(run, spec, [Domain(4, 8), Domain(4, 2)], np.random.default_rng(3), lambda: False)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * 2,
        lambda x: x.sum(axis=1),
        lambda x: np.sort(x, axis=1),
        lambda x: x.argmax(axis=1),
        lambda x: np.log(x - 0.5),
        lambda x: x.astype(object),
        lambda x: x * np.float32(1 + 1e-5 * len(x)),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in log")
def test_independent_rows_are_recognised(compute: Callable[[Array], Array]) -> None:
    assert proved(compute).refusal == ""


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: np.sort(x, axis=0),
        lambda x: x - x.mean(axis=0, keepdims=True),
        lambda x: np.cumsum(x, axis=0),
        lambda x: x[::-1].copy(),
        lambda x: np.roll(x, 1, axis=0),
        lambda x: x / x.max(),
        lambda x: x.argsort(axis=0),
        lambda x: np.argsort(np.argsort(x[:, 0])),
        lambda x: (x + len(x)).astype(object),
        lambda x: np.where(np.arange(len(x))[:, None] == 15, 0, x).astype("f4"),
    ],
)
def test_rows_that_meet_are_found_out(compute: Callable[[Array], Array]) -> None:
    assert "together differs from the same rows alone" in proved(compute).refusal


@pytest.mark.parametrize("compute", [lambda x: x.sum(), lambda x: x.mean(axis=0), lambda x: x.ravel(), lambda x: x.T])
def test_an_output_that_does_not_count_rows_is_found_out(compute: Callable[[Array], Array]) -> None:
    assert "rows has shape" in proved(lambda x: np.ascontiguousarray(compute(x))).refusal


def test_one_flipped_tie_is_forgiven_but_not_two() -> None:
    flips: list[int] = []

    def flip(times: int) -> Callable[[Array], Array]:
        flips.clear()

        def compute(x: Array) -> Array:
            labels = x.argmax(axis=1)
            if len(x) == 3 and len(flips) < times:
                flips.append(1)
                labels[1] = 3 - labels[1]
            return labels

        return compute

    assert proved(flip(1)).refusal == ""
    assert "output 'y' of 3 rows" in proved(flip(2)).refusal


def test_a_batch_that_fails_is_a_refusal() -> None:
    def compute(x: Array) -> Array:
        if len(x) > 1:
            raise InputRejected("Rows must be one.")
        return x

    assert proved(compute).refusal == "2 rows run alone but not as a batch: Rows must be one."


def test_other_domains_are_tried_until_single_rows_run() -> None:
    def compute(x: Array) -> Array:
        if x.max() >= 2:
            raise InputRejected("Only flags.")
        return x * 5

    assert proved(compute, "i8") == Proof(Domain(4, 2))


def test_a_model_that_takes_nothing_proves_nothing() -> None:
    def compute(x: Array) -> Array:
        raise InputRejected("No.")

    found = proved(compute)
    assert found.domain is None
    assert "takes no made-up input" in found.refusal


def test_the_limit_bounds_the_batches() -> None:
    sizes: set[int] = set()

    def compute(x: Array) -> Array:
        sizes.add(len(x))
        return x

    proved(compute, limit=2)
    assert sizes == {1, 2}
