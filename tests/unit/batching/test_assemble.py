"""Joining, splitting, buckets and padding: the promises of ``server.batching.assemble``, one example each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from server.batching.assemble import Layout
from server.errors import ConfigError, InvalidArgument, RuntimeFailure
from server.runtime.base import Batch, BatchingOptions
from server.types import ModelSpec, Tensor, TensorSpec


@dataclass
class Part:
    inputs: list[Tensor | None]
    rows: int


def tensor(array: Any, name: str = "x", datatype: str = "FP32", dtype: str = "<f4") -> Tensor:
    values = np.asarray(array, dtype)
    return Tensor(name, datatype, values.shape, values.tobytes())


def join(layout: Layout, parts: list[Part]) -> Batch:
    return layout.join([part.inputs for part in parts], sum(part.rows for part in parts))


def split(layout: Layout, parts: list[Part], outputs: list[Tensor]) -> list[list[Tensor]]:
    return layout.split([part.inputs for part in parts], [part.rows for part in parts], outputs)


def spec(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (), batch: int = 8) -> ModelSpec:
    return ModelSpec("m", "1", inputs, outputs, max_batch_size=batch, learned_batch_size=batch)


def ids(*rows: list[int]) -> Part:
    return Part([tensor(rows, "ids", "INT64", "<i8")], len(rows))


IDS = TensorSpec("ids", "INT64", (-1, -1))
BUCKETS = BatchingOptions(buckets={"ids": (4, 8)}, pad_values={"ids": 7})


# --- plans -----------------------------------------------------------------------------------------------------------


def test_inputs_that_cannot_differ_need_no_plan() -> None:
    layout = Layout(spec(TensorSpec("x", "FP32", (-1, 3))), BatchingOptions())
    assert layout.plan([tensor([[1, 2, 3]])]) == layout.plan([tensor([[1, 2, 3]] * 2)]) == ()


def test_free_dimensions_make_plans() -> None:
    layout = Layout(spec(TensorSpec("x", "FP32", (-1, -1))), BatchingOptions())
    assert layout.plan([tensor(np.zeros((1, 3)))]) == layout.plan([tensor(np.zeros((5, 3)))])
    assert layout.plan([tensor(np.zeros((1, 3)))]) != layout.plan([tensor(np.zeros((1, 4)))])


def test_absent_inputs_make_plans() -> None:
    layout = Layout(
        spec(TensorSpec("x", "FP32", (-1, 2), optional=True), TensorSpec("y", "FP32", (-1, 2), optional=True)),
        BatchingOptions(),
    )
    x = tensor([[1, 2]])
    plans = {layout.plan(inputs) for inputs in ([x, x], [x, None], [None, x], [None, None])}
    assert len(plans) == 4


def test_buckets_bring_plans_together() -> None:
    layout = Layout(spec(IDS), BUCKETS)
    assert layout.plan(ids([1]).inputs) == layout.plan(ids([1, 2, 3, 4]).inputs)
    assert layout.plan(ids([1] * 4).inputs) != layout.plan(ids([1] * 5).inputs)


def test_over_the_largest_bucket_names_input_wanted_and_got() -> None:
    with pytest.raises(InvalidArgument, match=r"input 'ids': .*dimension 1 must be at most 8.*got 9"):
        Layout(spec(IDS), BUCKETS).plan(ids([1] * 9).inputs)


# --- join ------------------------------------------------------------------------------------------------------------


def test_join_refers_to_the_members_buffers() -> None:
    layout = Layout(spec(TensorSpec("x", "FP32", (-1, 3))), BatchingOptions())
    members = [Part([tensor(np.full((rows, 3), rows))], rows) for rows in (1, 2)]
    batch = join(layout, members)
    assert (batch.rows, batch.shapes) == (3, [(3, 3)])
    assert batch.parts[0] is not None
    assert all(part is member.inputs[0].data for part, member in zip(batch.parts[0], members, strict=True))  # type: ignore[union-attr]


def test_join_leaves_absent_inputs_out() -> None:
    declared = (TensorSpec("x", "FP32", (-1, 1)), TensorSpec("y", "FP32", (-1, 1), optional=True))
    batch = join(Layout(spec(*declared), BatchingOptions()), [Part([tensor([[1]]), None], 1)] * 2)
    assert batch.shapes == [(2, 1), ()]
    assert batch.parts[1] is None


def test_a_model_without_batch_axis_keeps_its_shape() -> None:
    layout = Layout(spec(TensorSpec("x", "FP32", (-1, 2)), batch=0), BatchingOptions())
    batch = join(layout, [Part([tensor(np.zeros((5, 2)))], 0)])
    assert (batch.rows, batch.shapes) == (0, [(5, 2)])


def test_join_pads_at_the_end_of_the_axis_with_the_declared_value() -> None:
    batch = join(Layout(spec(IDS), BUCKETS), [ids([1, 2], [3, 4]), ids([5, 6, 7, 8])])
    assert batch.shapes == [(3, 4)]
    got = np.frombuffer(b"".join(batch.parts[0]), "<i8").reshape(3, 4)  # type: ignore[arg-type]
    assert got.tolist() == [[1, 2, 7, 7], [3, 4, 7, 7], [5, 6, 7, 8]]


def test_an_inner_axis_is_padded_too() -> None:
    declared = TensorSpec("x", "FP32", (-1, -1, 2))
    layout = Layout(spec(declared), BatchingOptions(buckets={"x": (2,)}))
    batch = join(layout, [Part([tensor([[[1, 2]], [[3, 4]]])], 2)])
    got = np.frombuffer(b"".join(batch.parts[0]), "<f4").reshape(2, 2, 2)  # type: ignore[arg-type]
    assert got.tolist() == [[[1, 2], [0, 0]], [[3, 4], [0, 0]]]


def test_strings_are_padded_with_empty_ones() -> None:
    layout = Layout(spec(TensorSpec("s", "BYTES", (-1, -1))), BatchingOptions(buckets={"s": (3,)}))
    batch = join(layout, [Part([Tensor("s", "BYTES", (2, 1), [b"a", b"b"])], 2)])
    assert batch.parts[0] == [[b"a", b"", b"", b"b", b"", b""]]


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("FP16", 1.5, np.float16(1.5).tobytes()),
        ("FP32", -0.5, np.float32(-0.5).tobytes()),
        ("BF16", 1.0, b"\x80\x3f"),
        ("INT8", -128, b"\x80"),
        ("UINT64", 2**63, (2**63).to_bytes(8, "little")),
        ("BOOL", 1, b"\x01"),
    ],
)
def test_pad_values_by_datatype(datatype: str, value: float, expected: bytes) -> None:
    options = BatchingOptions(buckets={"x": (1,)}, pad_values={"x": value})
    layout = Layout(spec(TensorSpec("x", datatype, (-1, -1))), options)
    batch = join(layout, [Part([Tensor("x", datatype, (1, 0), b"")], 1)])
    assert batch.parts[0] == [expected]


@pytest.mark.parametrize(
    ("datatype", "value"), [("INT8", 128), ("UINT8", -1), ("INT32", 0.5), ("BOOL", 2), ("INT64", float("nan"))]
)
def test_a_pad_value_that_does_not_fit_is_a_configuration_error(datatype: str, value: float) -> None:
    options = BatchingOptions(buckets={"x": (4,)}, pad_values={"x": value})
    with pytest.raises(ConfigError, match=rf"input 'x': pad value {value} does not fit datatype {datatype}"):
        Layout(spec(TensorSpec("x", datatype, (-1, -1))), options)


@pytest.mark.parametrize(
    ("declared", "options", "words"),
    [
        (TensorSpec("x", "FP32", (-1, 3)), BatchingOptions(buckets={"x": (4,)}), "exactly one variable dimension"),
        (TensorSpec("x", "FP32", (-1, -1, -1)), BatchingOptions(buckets={"x": (4,)}), r"\[-1, -1, -1\] has 2"),
        (TensorSpec("x", "FP32", (-1, -1)), BatchingOptions(buckets={"x": (4, 4)}), r"ascending, got \[4, 4\]"),
        (TensorSpec("x", "FP32", (-1, -1)), BatchingOptions(buckets={"x": (0, 4)}), r"positive .*got \[0, 4\]"),
        (
            TensorSpec("x", "FP32", (-1, -1)),
            BatchingOptions(buckets={"y": (4,)}),
            "'y', which is not one of its inputs",
        ),
        (
            TensorSpec("x", "FP32", (-1, -1)),
            BatchingOptions(pad_values={"y": 4}),
            "'y', which is not one of its inputs",
        ),
    ],
)
def test_impossible_buckets_are_configuration_errors(
    declared: TensorSpec, options: BatchingOptions, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Layout(spec(declared), options)


# --- split -----------------------------------------------------------------------------------------------------------


def test_a_member_alone_gets_the_tensors_unchanged() -> None:
    outputs = [tensor([[1, 2]], "y")]
    (share,) = split(Layout(spec(IDS), BatchingOptions()), [ids([1, 2])], outputs)
    assert share is outputs


def test_split_slices_without_copying() -> None:
    layout = Layout(spec(IDS), BatchingOptions())
    buffer = bytearray(np.arange(6, dtype="<f4").tobytes())
    shares = split(layout, [ids([1]), ids([2], [3])], [Tensor("y", "FP32", (3, 2), buffer)])
    assert [share[0].array().tolist() for share in shares] == [[[0, 1]], [[2, 3], [4, 5]]]
    buffer[0:4] = np.float32(9).tobytes()
    assert shares[0][0].array().tolist() == [[9, 1]]


def test_split_understands_typed_and_shaped_views() -> None:
    view = memoryview(np.arange(6, dtype="<f4").reshape(3, 2))
    shares = split(Layout(spec(IDS), BatchingOptions()), [ids([1]), ids([2], [3])], [Tensor("y", "FP32", (3, 2), view)])
    assert [share[0].array().tolist() for share in shares] == [[[0, 1]], [[2, 3], [4, 5]]]


def test_split_of_empty_rows() -> None:
    view = memoryview(np.zeros((2, 0), "<f4"))
    shares = split(Layout(spec(IDS), BatchingOptions()), [ids([1]), ids([2])], [Tensor("y", "FP32", (2, 0), view)])
    assert [(share[0].shape, bytes(share[0].data)) for share in shares] == [((1, 0), b"")] * 2  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1,), (3, 1), ()])
def test_split_refuses_outputs_that_are_not_the_batch(shape: tuple[int, ...]) -> None:
    output = Tensor("y", "FP32", shape, bytes(4 * int(np.prod(shape))))
    with pytest.raises(RuntimeFailure, match=r"output 'y' of a batch of 2 rows has shape"):
        split(Layout(spec(IDS), BatchingOptions()), [ids([1]), ids([2])], [output])


# --- cut -------------------------------------------------------------------------------------------------------------

HIDDEN = TensorSpec("hidden", "FP32", (-1, -1, 2))


def test_the_axis_that_grew_is_cut_back_for_each_member() -> None:
    layout = Layout(spec(IDS, outputs=(HIDDEN,)), BUCKETS)
    members = [ids([1]), ids([1, 2, 3]), ids([1, 2, 3, 4])]
    shares = split(layout, members, [tensor(np.arange(24).reshape(3, 4, 2), "hidden")])
    assert [share[0].shape for share in shares] == [(1, 1, 2), (1, 3, 2), (1, 4, 2)]
    assert shares[0][0].array().tolist() == [[[0, 1]]]
    assert shares[1][0].array().tolist() == [[[8, 9], [10, 11], [12, 13]]]


def test_a_member_alone_is_cut_too_and_strings_as_well() -> None:
    layout = Layout(spec(IDS, outputs=(TensorSpec("tags", "BYTES", (-1, -1)),)), BUCKETS)
    ((tags,),) = split(
        layout, [ids([1, 2], [3, 4])], [Tensor("tags", "BYTES", (2, 4), list(map(str.encode, "abcdefgh")))]
    )
    assert (tags.shape, tags.data) == ((2, 2), [b"a", b"b", b"e", b"f"])


@pytest.mark.parametrize(
    ("declared", "shape"),
    [
        (TensorSpec("fixed", "FP32", (-1, 4)), (1, 4)),  # the spec says it is always four
        (TensorSpec("elsewhere", "FP32", (-1, 2, -1)), (1, 2, 4)),  # free, but at another position
        (TensorSpec("other", "FP32", (-1, -1)), (1, 3)),  # free, but not the padded size
        (TensorSpec("pooled", "FP32", (-1,)), (1,)),
    ],
)
def test_other_outputs_are_left_alone(declared: TensorSpec, shape: tuple[int, ...]) -> None:
    output = tensor(np.zeros(shape))
    ((got,),) = split(Layout(spec(IDS, outputs=(declared,)), BUCKETS), [ids([1, 2])], [output])
    assert got is output


def test_when_two_inputs_disagree_nothing_is_cut() -> None:
    """Both could explain the output's size; cutting by the wrong one would lose data."""
    declared = (IDS, TensorSpec("more", "INT64", (-1, -1)))
    options = BatchingOptions(buckets={"ids": (4,), "more": (4,)})
    layout = Layout(spec(*declared, outputs=(HIDDEN,)), options)
    output = tensor(np.zeros((1, 4, 2)), "hidden")
    short, longer = ids([1, 2]).inputs[0], ids([1, 2, 3]).inputs[0]
    assert split(layout, [Part([short, longer], 1)], [output])[0][0] is output
    assert split(layout, [Part([short, short], 1)], [output])[0][0].shape == (1, 2, 2)
