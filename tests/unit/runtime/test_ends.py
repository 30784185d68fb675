"""What the ends of a graph are called, read from its file; compared with what ONNX itself says."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from server.runtime.ends import graph_ends
from tests.support import models


def test_the_ends_are_those_that_onnx_says(tmp_path: Path) -> None:
    for path in (models.affine(tmp_path / "a.onnx"), models.two_inputs(tmp_path / "b.onnx")):
        graph = onnx.load(path).graph
        weights = {tensor.name for tensor in graph.initializer}
        inputs = tuple(value.name for value in graph.input if value.name not in weights)
        assert graph_ends(path) == (inputs, tuple(value.name for value in graph.output))


def test_an_input_with_an_initializer_is_none_that_must_be_given(tmp_path: Path) -> None:
    x, w, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xwy")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x, w], [y], [weight])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    assert graph_ends(tmp_path / "m.onnx") == (("x",), ("y",))


@pytest.mark.parametrize("content", [b"\x3a\xff", b"no protobuf", b"\x3a\x06\x5a\x04\x0a\x02\xff\xfe"])
def test_what_is_no_graph_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    assert graph_ends(tmp_path / "m.onnx") is None


def test_a_file_that_is_not_there_has_none(tmp_path: Path) -> None:
    assert graph_ends(tmp_path / "m.onnx") is None
