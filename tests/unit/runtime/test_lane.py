"""The hot path on real sessions: every datatype and shape, and that nothing of one run shows in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from server.errors import InputRejected, OutOfMemory, RuntimeFailure
from server.runtime.base import Batch, DeclaredTensor, LoadRequest, ModelOptions
from server.runtime.lane import MAX_CALLS, Lane
from server.runtime.onnx import OnnxEngine, OnnxRuntime
from server.runtime.signature import GraphTensor, match
from server.types import BYTES, Buffer, Tensor
from tests.unit.runtime.graphs import (
    BFLOAT16,
    BOOL,
    DOUBLE,
    FLOAT,
    FLOAT16,
    INT64,
    STRING,
    constant,
    node,
    save,
    unary,
)

Array = np.ndarray[Any, np.dtype[Any]]
RNG = np.random.default_rng(5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


def load(path: Path, **options: Any) -> OnnxEngine:
    request = LoadRequest("m", "1", path, ModelOptions(**{"max_batch_size": 0, **options}))
    return OnnxRuntime(measure_budget_s=0).load(request)


def run(engine: OnnxEngine, *arrays: Array | None, rows: int = 1) -> list[Tensor]:
    shapes = [() if array is None else array.shape for array in arrays]
    parts: list[list[Buffer | list[bytes]] | None] = []
    for array in arrays:
        if array is None:
            parts.append(None)
        else:
            parts.append([list(array.ravel()) if array.dtype == object else array.tobytes()])
    return engine.run(0, Batch(rows, shapes, parts))


def reference(path: Path, **feed: Array) -> list[Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return list(ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed))


NUMERIC = [
    (BOOL, "?"),
    (2, "u1"),
    (4, "<u2"),
    (12, "<u4"),
    (13, "<u8"),
    (3, "i1"),
    (5, "<i2"),
    (6, "<i4"),
    (INT64, "<i8"),
    (FLOAT16, "<f2"),
    (BFLOAT16, "<u2"),
    (FLOAT, "<f4"),
    (DOUBLE, "<f8"),
]


@pytest.mark.parametrize(("onnx_type", "dtype"), NUMERIC)
def test_every_fixed_size_datatype_goes_through_unchanged(path: Path, onnx_type: int, dtype: str) -> None:
    engine = load(unary(path, "Identity", onnx_type, ("N", "M")))
    high = 2 if dtype == "?" else 256
    size = np.dtype(dtype).itemsize
    values = RNG.integers(0, high, (3, 5 * size), dtype="u1").view(dtype)
    for array in (values, values[:1], values):
        (answer,) = run(engine, array)
        assert answer.shape == array.shape
        assert answer.data == array.tobytes()


def test_bfloat16_in_and_out(path: Path) -> None:
    nodes = [node("Cast", ["x"], ["wide"], to=FLOAT), node("Cast", ["f"], ["narrow"], to=BFLOAT16)]
    inputs = [("x", BFLOAT16, ("N",)), ("f", FLOAT, ("N",))]
    engine = load(save(path, nodes, inputs, [("wide", FLOAT, ("N",)), ("narrow", BFLOAT16, ("N",))]))
    bits = np.array([0x3F80, 0xC000, 0x7F80], "<u2")
    floats = (bits.astype("<u4") << 16).view("<f4")
    wide, narrow = run(engine, bits, floats)
    assert wide.data == floats.tobytes()
    assert (narrow.datatype, narrow.data) == ("BF16", bits.tobytes())


def test_bytes_that_are_not_0_or_1_are_true(path: Path) -> None:
    engine = load(unary(path, "Not", BOOL, ("N",)))
    (answer,) = engine.run(0, Batch(1, [(3,)], [[b"\x00\x02\xff"]]))
    assert answer.data == b"\x01\x00\x00"


def test_scalars(path: Path) -> None:
    engine = load(unary(path, "Neg", FLOAT, ()))
    (answer,) = run(engine, np.array(3, "<f4"))
    assert (answer.shape, answer.array().item()) == ((), -3.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_tensors(path: Path, shape: tuple[int, int]) -> None:
    engine = load(unary(path, "Relu", FLOAT, ("N", "M")))
    (answer,) = run(engine, np.empty(shape, "<f4"))
    assert (answer.shape, bytes(answer.data)) == (shape, b"")  # type: ignore[arg-type]
    assert run(engine, np.ones((2, 2), "<f4"))[0].shape == (2, 2)


def test_contents_of_several_members_are_joined_once(path: Path) -> None:
    """Where it is to be kept, the whole is left in the batch, and the drift monitor copies nothing."""
    save(path, [node("Identity", ["x"], ["y"])], [("x", FLOAT, ["n", 2])], [("y", FLOAT, ["n", 2])])
    rows = RNG.standard_normal((3, 2)).astype("<f4")
    whole = rows.tobytes()
    members: list[Buffer | list[bytes]] = [memoryview(whole)[:8], whole[8:16], bytearray(whole[16:])]
    engine = load(path, max_batch_size=8)
    batch = Batch(3, [(3, 2)], [members])
    assert engine.run(0, batch)[0].data == whole
    assert batch.parts == [members]  # nobody wants it: it lives no longer than it is needed, and is joined anew
    batch.keep = True
    assert engine.run(0, batch)[0].data == whole
    assert batch.parts == [[whole]]
    joined = batch.parts[0]
    assert joined is not None
    assert b"".join(joined) is joined[0]  # type: ignore[arg-type]


def test_an_empty_typed_view_is_an_empty_tensor(path: Path) -> None:
    engine = load(unary(path, "Relu", FLOAT, ("N", 4)))
    (answer,) = engine.run(0, Batch(1, [(0, 4)], [[memoryview(np.empty((0, 4), "<f4"))]]))
    assert answer.shape == (0, 4)


def test_shapes_that_only_the_run_tells(path: Path) -> None:
    engine = load(save(path, [node("NonZero", ["x"], ["y"])], [("x", FLOAT, ("N",))], [("y", INT64, (1, None))]))
    for values in ([1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 0, 1]):
        (answer,) = run(engine, np.array(values, "<f4"))
        np.testing.assert_array_equal(answer.array(), np.array(values).nonzero())


def test_an_output_that_belies_its_declaration_is_answered_as_it_is(path: Path) -> None:
    nodes = [node("Reshape", ["x", "s"], ["y"]), node("Neg", ["x"], ["z"])]
    inputs = [("x", FLOAT, ("N", 4)), ("s", INT64, (2,))]
    engine = load(save(path, nodes, inputs, [("y", FLOAT, ("N", 4)), ("z", FLOAT, ("N", 4))]))
    x = np.arange(8, dtype="<f4").reshape(2, 4)
    for target in ((4, 2), (2, 4), (1, 8)):
        y, z = run(engine, x, np.array(target, "<i8"))
        np.testing.assert_array_equal(y.array(), x.reshape(target))
        np.testing.assert_array_equal(z.array(), -x)


@pytest.mark.parametrize("offset", [1, 3, 4, 17, 63])
def test_unaligned_input_gives_the_same_bits(path: Path, offset: int) -> None:
    nodes = [
        node("LayerNormalization", ["x", "scale"], ["n"], axis=-1),
        node("ReduceSum", ["n", "axes"], ["y"], keepdims=0),
    ]
    constants = [constant("scale", RNG.random(97)), constant("axes", [1], "i8")]
    save(path, nodes, [("x", FLOAT, ("N", 97))], [("n", FLOAT, ("N", 97)), ("y", FLOAT, ("N",))], constants)
    engine = load(path)
    x = RNG.random((5, 97)).astype("<f4")
    wire = memoryview(bytes(offset) + x.tobytes())[offset:]
    for answer, wanted in zip(engine.run(0, Batch(1, [(5, 97)], [[wire]])), reference(path, x=x), strict=True):
        assert answer.data == wanted.tobytes()


def test_more_shapes_than_are_kept(path: Path) -> None:
    engine = load(unary(path, "Neg", FLOAT, ("N",)))
    for size in [*range(MAX_CALLS + 20), 3, MAX_CALLS + 40, 1]:
        values = np.arange(size, dtype="<f4")
        np.testing.assert_array_equal(run(engine, values)[0].array(), -values)


def test_a_run_over_the_arenas_bound(path: Path) -> None:
    engine = load(unary(path, "Neg", FLOAT, ("N",)))
    large = np.arange(8_500_000, dtype="<f4")
    small = np.arange(10, dtype="<f4")
    for values in (small, large, small):
        np.testing.assert_array_equal(run(engine, values)[0].array(), -values)


def test_strings_keep_every_character(path: Path) -> None:
    engine = load(unary(path, "Identity", STRING, ("N", 2)))
    texts = np.array([[b"", b"a\0b"], ["é€😀".encode(), b"b'x'"]], dtype=object)
    (answer,) = run(engine, texts)
    assert (answer.datatype, answer.shape, answer.data) == (BYTES, (2, 2), list(texts.ravel()))
    assert run(engine, np.empty((0, 2), dtype=object))[0].data == []


def test_strings_that_are_not_utf8_are_refused_by_name(path: Path) -> None:
    engine = load(unary(path, "Identity", STRING, ("N",)))
    with pytest.raises(InputRejected, match=r"^Input 'x' has an element that is not UTF-8"):
        run(engine, np.array([b"ok", b"\xff\xfe"], dtype=object))
    assert run(engine, np.array([b"ok"], dtype=object))[0].data == [b"ok"]


def test_strings_beside_numbers(path: Path) -> None:
    nodes = [node("Identity", ["t"], ["u"]), node("Neg", ["x"], ["y"]), node("Not", ["b"], ["c"])]
    inputs = [("t", STRING, ("N",)), ("x", FLOAT, ("N",)), ("b", BOOL, ("N",))]
    engine = load(save(path, nodes, inputs, [("u", STRING, ("N",)), ("y", FLOAT, ("N",)), ("c", BOOL, ("N",))]))
    x = np.array([1, 2], "<f4")
    for texts in ([b"a", b"b"], [b"c", b"d"]):
        u, y, c = run(engine, np.array(texts, dtype=object), x, np.array([True, False]))
        assert (u.data, y.data, c.data) == (texts, (-x).tobytes(), b"\0\1")


def test_strings_out_of_numbers(path: Path) -> None:
    engine = load(save(path, [node("Cast", ["x"], ["y"], to=STRING)], [("x", INT64, ("N",))], [("y", STRING, ("N",))]))
    assert run(engine, np.array([7, -1], "<i8"))[0].data == [b"7", b"-1"]
    assert run(engine, np.array([5], "<i8"))[0].data == [b"5"]


def test_a_graph_that_answers_other_than_utf8_is_our_failure(path: Path) -> None:
    nodes = [node("Constant", [], ["k"], value_strings=[b"\xff"]), node("Gather", ["k", "x"], ["y"])]
    engine = load(save(path, nodes, [("x", INT64, ("N",))], [("y", STRING, ("N",))]))
    with pytest.raises(RuntimeFailure):
        run(engine, np.array([0], "<i8"))


def test_optional_inputs_default_to_the_graphs_own(path: Path) -> None:
    save(
        path,
        [node("Mul", ["x", "w"], ["y"])],
        [("x", FLOAT, ("N",)), ("w", FLOAT, (1,))],
        [("y", FLOAT, ("N",))],
        [constant("w", [10])],
    )
    engine = load(path, inputs=(DeclaredTensor("x"), DeclaredTensor("w", optional=True)))
    x = np.array([1, 2], "<f4")
    for weight, factor in ((None, 10), (np.array([3], "<f4"), 3), (None, 10)):
        np.testing.assert_array_equal(run(engine, x, weight)[0].array(), x * factor)


def test_reshaped_inputs_and_outputs(path: Path) -> None:
    save(
        path,
        [node("ReduceSum", ["x", "axes"], ["y"], keepdims=0)],
        [("x", FLOAT, ("N", 2, 3))],
        [("y", FLOAT, ("N",))],
        [constant("axes", [1, 2], "i8")],
    )
    engine = load(
        path,
        max_batch_size=8,
        inputs=(DeclaredTensor("x", "FP32", (6,), reshape=(2, 3)),),
        outputs=(DeclaredTensor("y", "FP32", (1,), reshape=()),),
    )
    x = np.arange(12, dtype="<f4").reshape(2, 6)
    (answer,) = run(engine, x, rows=2)
    np.testing.assert_array_equal(answer.array(), x.sum(axis=1, keepdims=True))


def test_a_name_that_stands_for_two_sizes_tells_no_shape(path: Path) -> None:
    inputs = [("a", FLOAT, ("N",)), ("b", FLOAT, ("N",))]
    engine = load(save(path, [node("Add", ["a", "b"], ["y"])], inputs, [("y", FLOAT, ("N",))]))
    for a, b in ((3, 3), (3, 1), (1, 3), (2, 2)):
        (answer,) = run(engine, np.ones(a, "<f4"), np.ones(b, "<f4"))
        assert answer.array().tolist() == [2.0] * max(a, b)


def test_inputs_bound_anew_for_each_run_as_devices_need(path: Path) -> None:
    unary(path, "Neg")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x, y = (GraphTensor(name, "tensor(float)", ("N", 4)) for name in "xy")
    lane = Lane(session, match([x], [y], ModelOptions(), {}, 64), rebind=True)
    for seed in (1, 2):
        values = np.random.default_rng(seed).random((3, 4), dtype="f4")
        (answer,) = lane.run(Batch(3, [(3, 4)], [[values.tobytes()]]))
        np.testing.assert_array_equal(answer.array(), -values)


def failing(path: Path) -> OnnxEngine:
    nodes = [node("Gather", ["table", "x"], ["y"], name="lookup"), node("Expand", ["one", "size"], ["z"])]
    constants = [constant("table", [1, 2, 3]), constant("one", [1])]
    inputs = [("x", INT64, ("N",)), ("size", INT64, ("R",))]
    return load(save(path, nodes, inputs, [("y", FLOAT, ("N",)), ("z", FLOAT, None)], constants))


GOOD = np.array([2], "<i8")


def test_an_index_out_of_range_is_the_callers(path: Path) -> None:
    engine = failing(path)
    with pytest.raises(InputRejected) as caught:
        run(engine, np.array([9], "<i8"), GOOD)
    assert caught.value.message == (
        "The model refused this input: Gather node 'lookup': indices element out of data bounds, "
        "idx=9 must be within the inclusive range [-3,2]."
    )
    assert run(engine, GOOD, GOOD)[0].array().tolist() == [3.0]


def test_a_shape_that_no_memory_holds(path: Path) -> None:
    engine = failing(path)
    with pytest.raises(OutOfMemory):
        run(engine, GOOD, np.array([2**44], "<i8"))
    with pytest.raises(InputRejected):
        run(engine, GOOD, np.array([-3], "<i8"))
    assert run(engine, GOOD, GOOD)[1].array().tolist() == [1.0, 1.0]


def test_a_wrong_rank_is_the_callers(path: Path) -> None:
    engine = load(unary(path, "Relu", FLOAT, ("N", 4)))
    with pytest.raises(InputRejected, match="Invalid rank for input: x Got: 1 Expected: 2"):
        run(engine, np.ones(4, "<f4"))
