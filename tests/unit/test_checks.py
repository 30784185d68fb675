"""server.checks: every refusal names the tensor, what was wanted and what was got."""

from __future__ import annotations

import pytest

from server.checks import fit_inputs, pick_outputs, queue_terms
from server.errors import InvalidArgument
from server.types import ModelSpec, ParameterValue, RequestedOutput, Tensor, TensorSpec

BATCHED = ModelSpec(
    "m",
    "1",
    (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT8", (-1, -1, 3), optional=True)),
    (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("s", "BYTES", (-1, 1))),
    max_batch_size=4,
)
PLAIN = ModelSpec("p", "1", (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1,)),))


def tensor(name: str, datatype: str, *shape: int) -> Tensor:
    return Tensor(name, datatype, shape, b"")


def test_inputs_come_in_the_specs_order_and_rows_are_counted() -> None:
    b, a = tensor("b", "INT8", 3, 9, 3), tensor("a", "FP32", 3, 2)
    assert fit_inputs(BATCHED, [b, a]) == ([a, b], 3)
    assert fit_inputs(BATCHED, [a]) == ([a, None], 3)


def test_a_model_that_does_not_batch_takes_any_free_dimension() -> None:
    x = tensor("x", "FP32", 0, 2)
    assert fit_inputs(PLAIN, [x]) == ([x], 0)
    with pytest.raises(InvalidArgument, match=r"expected \[-1, 2\], got \[1, 3\]"):
        fit_inputs(PLAIN, [tensor("x", "FP32", 1, 3)])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "expected 2 inputs but got 0 inputs for model 'm': missing 'a'"),
        ([tensor("c", "FP32", 1, 2)], "unexpected inference input 'c' for model 'm'; its inputs are 'a', 'b'"),
        ([tensor("a", "FP32", 1, 2), tensor("a", "FP32", 1, 2)], "input 'a' is given twice"),
        ([tensor("a", "FP64", 1, 2)], "input 'a' of model 'm' takes datatype FP32, got FP64"),
        ([tensor("a", "FP32", 2)], r"expected \[-1, 2\], got \[2\]"),
        ([tensor("a", "FP32", 1, 3)], r"expected \[-1, 2\], got \[1, 3\]"),
        ([tensor("a", "FP32", 0, 2)], "between 1 and 4 .* got 0"),
        ([tensor("a", "FP32", 5, 2)], "between 1 and 4 .* got 5"),
        ([tensor("a", "FP32", 2, 2), tensor("b", "INT8", 3, 1, 3)], "'a' has 2 rows, 'b' has 3"),
        ([tensor("a", "FP32", 2, 2), tensor("b", "INT8", 2, 1, 4)], r"expected \[-1, -1, 3\], got \[2, 1, 4\]"),
    ],
)
def test_refusals(inputs: list[Tensor], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        fit_inputs(BATCHED, inputs)


def test_a_model_without_inputs_takes_none_and_one_that_batches_takes_one_at_least() -> None:
    nothing = ModelSpec("n", "1", (), (TensorSpec("y", "FP32", (-1,)),))
    assert fit_inputs(nothing, []) == ([], 0)
    with pytest.raises(InvalidArgument, match="unexpected inference input 'x'"):
        fit_inputs(nothing, [tensor("x", "FP32", 1)])
    optional = ModelSpec("o", "1", (TensorSpec("a", "FP32", (-1,), optional=True),), (), max_batch_size=2)
    with pytest.raises(InvalidArgument, match=r"takes its batch size from its inputs, .* at least one of 'a'"):
        fit_inputs(optional, [])


def test_outputs_are_picked_in_the_order_asked_for() -> None:
    assert pick_outputs(BATCHED, []) is None
    assert pick_outputs(BATCHED, [RequestedOutput("s"), RequestedOutput("y")]) == [1, 0]


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([RequestedOutput("z")], "unexpected inference output 'z' for model 'm'; its outputs are 's', 'y'"),
        ([RequestedOutput("y"), RequestedOutput("y")], "output 'y' is asked for twice"),
        ([RequestedOutput("s", classification=1)], "BYTES: classification needs a numeric output"),
        ([RequestedOutput("y", classification=-1)], "positive count, got -1"),
    ],
)
def test_output_refusals(outputs: list[RequestedOutput], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        pick_outputs(BATCHED, outputs)


def test_queue_terms() -> None:
    assert queue_terms({}) == (0, 0)
    assert queue_terms({"priority": 2, "timeout": 500.0}) == (2, 500)
    assert queue_terms({"timeout": "7"}) == (0, 7)


@pytest.mark.parametrize("value", [-1, 1.5, True, "soon", 2**70])
def test_queue_terms_refusals(value: ParameterValue) -> None:
    with pytest.raises(InvalidArgument, match="parameter 'timeout' must be a whole number"):
        queue_terms({"timeout": value})
