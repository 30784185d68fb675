from __future__ import annotations

import pytest

from server.errors import ModelLoadError
from server.runtime.base import DeclaredTensor, ModelOptions
from server.runtime.signature import GraphTensor, Signature, batch_blocker, match

X = GraphTensor("x", "tensor(float)", ("N", 4))
Y = GraphTensor("y", "tensor(float)", ("N", 2))


def served(
    graph_in: list[GraphTensor] | None = None, graph_out: list[GraphTensor] | None = None, **options: object
) -> Signature:
    return match(graph_in or [X], graph_out or [Y], ModelOptions(**options), {}, 64)  # type: ignore[arg-type]


def refused(
    graph_in: list[GraphTensor] | None = None, graph_out: list[GraphTensor] | None = None, **options: object
) -> str:
    with pytest.raises(ModelLoadError) as caught:
        served(graph_in, graph_out, **options)
    return caught.value.message


def test_free_first_dimensions_of_one_symbol_are_a_batch() -> None:
    found = served()
    assert found.max_batch_size == 64
    assert [port.spec.shape for port in (*found.inputs, *found.outputs)] == [(-1, 4), (-1, 2)]


@pytest.mark.parametrize(
    ("dims", "why"),
    [
        ((2, None, 128), "the first dimension of input 'state' is fixed to 2"),
        ((), "input 'state' is a scalar"),
        (("M", 4), "first dimensions differ: 'N' and 'M'"),
        (None, "input 'state' has no declared rank"),
    ],
)
def test_what_rules_a_batch_out(dims: tuple[int | str | None, ...] | None, why: str) -> None:
    assert batch_blocker([X, GraphTensor("state", "tensor(float)", dims)], [Y]) == why


@pytest.mark.parametrize("dims", [(None, 2), ("unk__12", 2), ("", 2)])
def test_a_nameless_first_dimension_may_be_the_batch(dims: tuple[int | str | None, ...]) -> None:
    assert batch_blocker([X], [GraphTensor("y", "tensor(float)", dims)]) == ""


def test_batching_can_be_declared_away_or_limited() -> None:
    assert served(max_batch_size=0).max_batch_size == 0
    assert served(max_batch_size=8).max_batch_size == 8


def test_declared_batching_needs_a_free_first_dimension() -> None:
    state = GraphTensor("state", "tensor(float)", (2, "N"))
    assert refused([X, state], max_batch_size=8) == (
        "max_batch_size over 0 needs a free first dimension; input 'state' has shape [2, -1]."
    )


def test_declarations_narrow_the_graph() -> None:
    x = GraphTensor("x", "tensor(float)", ("N", "L", 4))
    found = served([x], inputs=(DeclaredTensor("x", "FP32", (7, 4)),), max_batch_size=8)
    assert found.inputs[0].spec.shape == (-1, 7, 4)


def test_declared_dims_without_a_batch_size_are_whole_shapes() -> None:
    found = served(inputs=(DeclaredTensor("x", "FP32", (3, 4)),))
    assert found.max_batch_size == 0
    assert found.inputs[0].spec.shape == (3, 4)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (DeclaredTensor("z"), "Declared input 'z' is not in the graph, which has 'x'."),
        (DeclaredTensor("x", "INT64"), "Input 'x': datatype INT64 is declared, the graph has FP32."),
        (DeclaredTensor("x", "FP32", (5,)), "Input 'x': dims [5] are declared, the graph has [4]."),
        (DeclaredTensor("x", "FP32", (4, 1)), "Input 'x': dims [4, 1] are declared, the graph has [4]."),
        (DeclaredTensor("x", "FP32", (-1,)), "Input 'x': dims [-1] are declared, the graph has [4]."),
        (DeclaredTensor("x", "FP32", (5,), reshape=(4,)), "Input 'x': dims [5] cannot be reshaped to [4]."),
        (DeclaredTensor("x", optional=True), "Input 'x' is declared optional, but the graph has no default for it."),
    ],
)
def test_a_mismatch_names_wanted_and_got(declared: DeclaredTensor, message: str) -> None:
    assert refused(inputs=(declared,), max_batch_size=8) == message


def test_every_input_the_graph_needs_must_be_declared() -> None:
    second = GraphTensor("x2", "tensor(float)", ("N", 4))
    assert refused([X, second], inputs=(DeclaredTensor("x"),)) == "The graph needs input 'x2', which is not declared."


def test_declared_outputs_choose_what_is_served() -> None:
    extra = GraphTensor("extra", "tensor(float)", ("N", 9))
    found = match([X], [extra, Y], ModelOptions(outputs=(DeclaredTensor("y"),)), {"y": ("cat", "dog")}, 64)
    assert [port.spec.name for port in found.outputs] == ["y"]
    assert found.outputs[0].spec.labels == ("cat", "dog")


def test_an_output_that_cannot_be_carried_is_left_out_with_a_note() -> None:
    found = served(graph_out=[Y, GraphTensor("m", "seq(map(int64,tensor(float)))", ())])
    assert [port.spec.name for port in found.outputs] == ["y"]
    assert found.notes == ("output 'm' has type seq(map(int64,tensor(float))), which cannot be served: left out",)


def test_no_usable_output_or_an_unusable_input_fails_the_load() -> None:
    f8 = GraphTensor("q", "tensor(float8e4m3fn)", ("N",))
    assert refused(graph_out=[f8]) == "No output can be served: the graph has 'q' (tensor(float8e4m3fn))."
    assert refused([f8]) == "Input 'q' has type tensor(float8e4m3fn), which V2 cannot carry."


def test_overridable_initializers_are_inputs_only_when_declared() -> None:
    weight = GraphTensor("w", "tensor(float)", (4,), overridable=True)
    assert [port.spec.name for port in served([X, weight]).inputs] == ["x"]
    found = served([X, weight], inputs=(DeclaredTensor("x"), DeclaredTensor("w", optional=True)), max_batch_size=0)
    assert [(port.spec.name, port.spec.optional) for port in found.inputs] == [("x", False), ("w", True)]


def test_a_shapeless_input_needs_declared_dims_and_a_shapeless_output_none() -> None:
    free = GraphTensor("x", "tensor(float)", None)
    assert refused([free]) == "Input 'x' has no shape in the graph: declare its dims."
    found = served([free], inputs=(DeclaredTensor("x", dims=(3, -1)),), max_batch_size=0)
    assert found.inputs[0].spec.shape == (3, -1)
    assert served(graph_out=[GraphTensor("y", "tensor(float)", None)]).outputs[0].spec.shape == (-1,)


def test_reshape_maps_shapes_both_ways() -> None:
    x = GraphTensor("x", "tensor(float)", ("N", None, 2, 2))
    y = GraphTensor("y", "tensor(float)", ("N",))
    found = match(
        [x],
        [y],
        ModelOptions(
            max_batch_size=4,
            inputs=(DeclaredTensor("x", "FP32", (4, -1), reshape=(-1, 2, 2)),),
            outputs=(DeclaredTensor("y", "FP32", (1,), reshape=()),),
        ),
        {},
        64,
    )
    assert [port.spec.shape for port in (*found.inputs, *found.outputs)] == [(-1, 4, -1), (-1, 1)]
    assert found.inputs[0].to_graph((3, 4, 5), True) == (3, 5, 2, 2)
    assert found.outputs[0].to_caller((3,), True) == (3, 1)


def test_strings_and_bfloat16_do_not_go_together() -> None:
    text = GraphTensor("t", "tensor(string)", ("N",))
    half = GraphTensor("h", "tensor(bfloat16)", ("N",))
    assert refused([text, half]) == "The runtime cannot take BYTES and BF16 inputs in one model."
    found = served([text], [half, Y])
    assert [port.spec.name for port in found.outputs] == ["y"]
    assert "output 'h'" in found.notes[0]
