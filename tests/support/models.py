"""Small ONNX models written for tests: each has a property that a test is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: V2 datatype -> ONNX element type.
ELEMENT_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "BF16": TensorProto.BFLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}

Dim = int | str | None


def save(
    path: Path,
    nodes: list[Any],
    inputs: list[tuple[str, int, list[Dim]]],
    outputs: list[tuple[str, int, list[Dim]]],
    constants: dict[str, np.ndarray[Any, Any]] | None = None,
    opset: int = 17,
) -> Path:
    """Write one graph to ``path`` (parents made) and give the path back."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def identity(path: Path, datatype: str = "FP32", width: int = 4) -> Path:
    """``y = x`` for [n, width] of any V2 datatype; batches."""
    kind = ELEMENT_TYPES[datatype]
    return save(
        path,
        [helper.make_node("Identity", ["x"], ["y"])],
        [("x", kind, ["n", width])],
        [("y", kind, ["n", width])],
    )


def affine(path: Path, scale: float = 2.0, shift: float = 1.0, width: int = 4) -> Path:
    """``y = scale * x + shift`` for FP32 [n, width]; batches."""
    return save(
        path,
        [helper.make_node("Mul", ["x", "a"], ["m"]), helper.make_node("Add", ["m", "b"], ["y"])],
        [("x", TensorProto.FLOAT, ["n", width])],
        [("y", TensorProto.FLOAT, ["n", width])],
        {"a": np.array([scale], np.float32), "b": np.array([shift], np.float32)},
    )


def two_inputs(path: Path) -> Path:
    """``sum = a + b`` and ``diff = a - b`` for INT32 [n, 16]; Triton's classic ``simple``."""
    kind = TensorProto.INT32
    return save(
        path,
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        [("INPUT0", kind, ["n", 16]), ("INPUT1", kind, ["n", 16])],
        [("OUTPUT0", kind, ["n", 16]), ("OUTPUT1", kind, ["n", 16])],
    )


def lookup(path: Path, size: int = 8) -> Path:
    """``y[i] = table[x[i, 0]]``: an index of ``size`` or more makes the graph fail, so one row can be bad."""
    table = np.arange(size, dtype=np.float32) * 10
    return save(
        path,
        [helper.make_node("Gather", ["table", "x"], ["y"], axis=0)],
        [("x", TensorProto.INT64, ["n", 1])],
        [("y", TensorProto.FLOAT, ["n", 1])],
        {"table": table},
    )


def constant(path: Path) -> Path:
    """``y = [1, 2, 3]``, FP32, from no inputs at all."""
    node = helper.make_node("Identity", ["c"], ["y"])
    return save(path, [node], [], [("y", TensorProto.FLOAT, [3])], {"c": np.array([1, 2, 3], np.float32)})


def across_rows(path: Path, width: int = 4) -> Path:
    """``y = x - mean over the batch``: looks batchable, but a batch of n differs from n singles."""
    return save(
        path,
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["x", "m"], ["y"]),
        ],
        [("x", TensorProto.FLOAT, ["n", width])],
        [("y", TensorProto.FLOAT, ["n", width])],
    )


def slow(path: Path, size: int = 512, layers: int = 24) -> Path:
    """A stack of matrix products that takes tens of milliseconds a row; batches. Input FP32 [n, size, size]."""
    weight = (np.eye(size) * 0.5).astype(np.float32)
    nodes, current = [], "x"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [current, "w"], [f"h{i}" if i < layers - 1 else "y"]))
        current = f"h{i}"
    kind = TensorProto.FLOAT
    return save(path, nodes, [("x", kind, ["n", size, size])], [("y", kind, ["n", size, size])], {"w": weight})


def slow_scalar(path: Path, size: int = 1024, layers: int = 12) -> Path:
    """As ``slow`` with a small message: FP32 [n, 1] in, [n, 1] out, tens of milliseconds a row inside."""
    weight = (np.eye(size) * 1.0).astype(np.float32)
    nodes = [helper.make_node("Mul", ["x3", "ones"], ["h_in"])]
    nodes.insert(0, helper.make_node("Unsqueeze", ["x", "axis"], ["x3"]))
    current = "h_in"
    for i in range(layers):
        nodes.append(helper.make_node("MatMul", [current, "w"], [f"h{i}"]))
        current = f"h{i}"
    nodes.append(helper.make_node("ReduceMean", [current], ["y"], axes=[1, 2], keepdims=0))
    nodes[-1].output[0] = "m"
    nodes.append(helper.make_node("Unsqueeze", ["m", "axis1"], ["y"]))
    kind = TensorProto.FLOAT
    constants = {
        "axis": np.array([2]),
        "axis1": np.array([1]),
        "ones": np.ones((1, size, size), np.float32),
        "w": weight,
    }
    return save(path, nodes, [("x", kind, ["n", 1])], [("y", kind, ["n", 1])], constants)
