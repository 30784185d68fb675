"""Small ONNX graphs for the runtime's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, INT32, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.STRING
BOOL, FLOAT16, BFLOAT16, DOUBLE = TensorProto.BOOL, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE

Value = tuple[str, int, Sequence[int | str | None] | None]


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, **attributes)


def constant(name: str, values: Any, dtype: str = "f4") -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 21,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def unary(
    path: Path, operator: str, dtype: int = FLOAT, dims: Sequence[int | str | None] = ("N", 4), **kw: Any
) -> Path:
    return save(path, [node(operator, ["x"], ["y"], **kw)], [("x", dtype, dims)], [("y", dtype, dims)])


def affine(path: Path, refused: float = -7.0) -> Path:
    """``y = 2 * x + 1`` over FP32 [N, 4]; a row that starts with ``refused`` makes a Gather go out of range."""
    nodes = [
        node("Gather", ["x", "zero"], ["first"], axis=1),
        node("Equal", ["first", "marker"], ["marked"]),
        node("Cast", ["marked"], ["index"], to=INT64),
        node("Gather", ["nothing", "index"], ["added"], axis=0, name="lookup"),
        node("Unsqueeze", ["added", "axis"], ["column"]),
        node("Mul", ["x", "two"], ["doubled"]),
        node("Add", ["doubled", "one"], ["shifted"]),
        node("Add", ["shifted", "column"], ["y"]),
    ]
    constants = [
        constant("zero", 0, "i8"),
        constant("axis", [1], "i8"),
        constant("marker", refused),
        constant("nothing", [0.0]),
        constant("two", 2.0),
        constant("one", 1.0),
    ]
    return save(path, nodes, [("x", FLOAT, ("N", 4))], [("y", FLOAT, ("N", 4))], constants)
