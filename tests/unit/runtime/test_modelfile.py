from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from server.runtime.modelfile import ExternalTensor, ModelFacts, quoted, read_facts
from server.runtime.wireformat import Malformed, TooLarge, WireFile
from tests.unit.runtime.graphs import FLOAT, INT64, constant, node, save, unary


def facts(path: Path, max_fields: int = 100_000, max_graph_depth: int = 32) -> ModelFacts:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return read_facts(WireFile(descriptor, path.stat().st_size, max_fields), max_graph_depth)
    finally:
        os.close(descriptor)


def outside(name: str, **entries: Any) -> TensorProto:
    """A tensor with external data and no data of its own."""
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def graph(name: str, *nodes: onnx.NodeProto, constants: tuple[TensorProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("z", FLOAT, [4])], constants)


def write(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_versions_and_domains_of_a_plain_model(tmp_path: Path) -> None:
    found = facts(unary(tmp_path / "model.onnx", "Relu"))
    assert found == ModelFacts(10, {"": 21}, {}, (), frozenset())


def test_the_highest_import_of_a_domain_counts_under_either_name(tmp_path: Path) -> None:
    imports = [
        helper.make_opsetid("", 13),
        helper.make_opsetid("ai.onnx", 15),
        helper.make_opsetid("ai.onnx.ml", 3),
        helper.make_opsetid("", 9),
    ]
    model = helper.make_model(graph("g"), opset_imports=imports, ir_version=7)
    found = facts(write(tmp_path / "model.onnx", model))
    assert (found.ir_version, found.opsets) == (7, {"": 15, "ai.onnx.ml": 3})


def test_operators_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    inner = graph("inner", node("Deep", ["a"], ["z"], domain="in.branch"))
    function = helper.make_function(
        "local", "Twice", ["x"], ["y"], [node("Far", ["x"], ["y"], domain="in.function")], [helper.make_opsetid("", 17)]
    )
    outer = graph(
        "outer",
        node("If", ["c"], ["i"], then_branch=inner, else_branch=inner),
        node("Twice", ["i"], ["t"], domain="local"),
        node("Missing", ["t"], ["z"], domain="local.other"),
        node("Relu", ["t"], ["u"], domain="ai.onnx"),
    )
    training = onnx.TrainingInfoProto(
        initialization=graph("init", node("Start", [], ["z"], domain="in.training")),
        algorithm=graph("step", node("Step", [], ["z"], domain="in.algorithm")),
    )
    model = helper.make_model(outer, functions=[function])
    model.training_info.append(training)
    assert facts(write(tmp_path / "model.onnx", model)).foreign == {
        "in.branch": "Deep",
        "in.function": "Far",
        "in.training": "Start",
        "in.algorithm": "Step",
        "local.other": "Missing",
    }


def test_a_function_of_the_file_covers_its_own_name_only(tmp_path: Path) -> None:
    function = helper.make_function("local", "Known", ["x"], ["y"], [node("Relu", ["x"], ["y"])], [])
    main = graph("g", node("Known", ["a"], ["b"], domain="local"), node("Other", ["b"], ["z"], domain="local"))
    model = helper.make_model(main, functions=[function])
    assert facts(write(tmp_path / "model.onnx", model)).foreign == {"local": "Other"}


def test_external_tensors_are_seen_wherever_they_stand(tmp_path: Path) -> None:
    sparse = onnx.SparseTensorProto(values=outside("v", location="f"), indices=outside("i", location="g"), dims=[4])
    attributes = node("X", [], ["z"], one=outside("one", location="a"))
    attributes.attribute.append(
        onnx.AttributeProto(name="many", type=onnx.AttributeProto.TENSORS, tensors=[outside("many", location="b")])
    )
    attributes.attribute.append(
        onnx.AttributeProto(name="s", type=onnx.AttributeProto.SPARSE_TENSORS, sparse_tensors=[sparse])
    )
    inner = graph("inner", attributes, constants=(outside("deep", location="c", offset=8, length=16, checksum="x"),))
    main = graph("g", node("If", ["q"], ["z"], then_branch=inner), constants=(outside("w", location="d/e"),))
    main.sparse_initializer.append(sparse)
    found = facts(write(tmp_path / "model.onnx", helper.make_model(main))).external
    assert {tensor.location for tensor in found} == {"a", "b", "c", "d/e", "f", "g"}
    assert ExternalTensor("deep", "c", 8, 16) in found
    assert ExternalTensor("w", "d/e", 0, None) in found


def test_entries_of_a_tensor_with_its_own_data_are_not_followed(tmp_path: Path) -> None:
    tensor = constant("w", np.ones(4))
    tensor.external_data.add(key="location", value="../secret")
    path = write(tmp_path / "model.onnx", helper.make_model(graph("g", constants=(tensor,))))
    assert facts(path).external == ()


def raw_tensor(entry: bytes, location_field: bytes = b"\x70\x01") -> bytes:
    tensor = b"\x6a" + bytes([len(entry)]) + entry + location_field
    main = b"\x2a" + bytes([len(tensor)]) + tensor
    return b"\x3a" + bytes([len(main)]) + main


@pytest.mark.parametrize("location_field", [b"\x70\x81\x80\x80\x80\x10", b"\xf0\x80\x00\x01", b"\x70\x00\x70\x01"])
def test_an_enum_is_read_as_protobuf_reads_it(tmp_path: Path, location_field: bytes) -> None:
    """Upper bits dropped, a padded tag, the last of several: each of these is EXTERNAL to protobuf."""
    path = tmp_path / "model.onnx"
    path.write_bytes(raw_tensor(b"\x0a\x08location\x12\x01a", location_field))
    parsed = onnx.ModelProto.FromString(path.read_bytes())
    assert parsed.graph.initializer[0].data_location == TensorProto.EXTERNAL
    assert [tensor.location for tensor in facts(path).external] == ["a"]


def test_the_last_value_of_an_entry_counts_as_in_protobuf(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(raw_tensor(b"\x0a\x01x\x0a\x08location\x12\x01a\x12\x01b"))
    parsed = onnx.ModelProto.FromString(path.read_bytes())
    assert parsed.graph.initializer[0].external_data[0].value == "b"
    assert [tensor.location for tensor in facts(path).external] == ["b"]


@pytest.mark.parametrize("value", ["-1", "1e3", "0x10", "", "9" * 20, "\u0661"])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_offsets_that_are_no_numbers(tmp_path: Path, key: str, value: str) -> None:
    model = helper.make_model(graph("g", constants=(outside("w", location="a", **{key: value}),)))
    with pytest.raises(Malformed, match=f"tensor 'w' has external data with {key} '.*', wanted a whole number"):
        facts(write(tmp_path / "model.onnx", model))


def test_a_location_given_twice(tmp_path: Path) -> None:
    tensor = outside("w", location="a")
    tensor.external_data.add(key="location", value="../b")
    with pytest.raises(Malformed, match="tensor 'w' gives the location of its external data more than once"):
        facts(write(tmp_path / "model.onnx", helper.make_model(graph("g", constants=(tensor,)))))


def test_a_missing_shape_is_not_a_scalar(tmp_path: Path) -> None:
    path = save(
        tmp_path / "model.onnx",
        [node("Reshape", ["x", "s"], ["y"])],
        [("x", FLOAT, None), ("s", INT64, [])],
        [("y", FLOAT, None)],
    )
    assert facts(path).unranked == {"x", "y"}


def nested(depth: int) -> bytes:
    """A model with graphs inside graphs, ``depth`` in all."""
    content = b""
    for _ in range(depth - 1):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            content = tag + _varint(len(content)) + content
    return b"\x3a" + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def test_nested_graphs_have_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(nested(32))
    facts(path)
    for depth in (33, 10_000):
        path.write_bytes(nested(depth))
        with pytest.raises(TooLarge, match="graphs inside graphs more than 32 deep"):
            facts(path)


def test_millions_of_nodes_end_at_the_bound_of_fields(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    nodes = b"\x0a\x00" * 500_000
    path.write_bytes(b"\x3a" + _varint(len(nodes)) + nodes)
    with pytest.raises(TooLarge, match="has more than 100000 fields"):
        facts(path)


def test_operators_without_end_are_refused(tmp_path: Path) -> None:
    many = graph("g", *(node(f"Op{i}", [], ["z"], domain="d") for i in range(10_001)))
    with pytest.raises(TooLarge, match="more than 10000 different operators"):
        facts(write(tmp_path / "model.onnx", helper.make_model(many)))


@pytest.mark.parametrize(
    "content", [b"\xff" * 40, b"location" * 3, bytes(range(256)), b":\xff\xff\xff\xff\x0flocation", b"\x08\x07"]
)
def test_garbage_is_malformed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(Malformed):
        facts(path)


def test_names_out_of_a_file_are_made_fit_for_a_sentence() -> None:
    assert quoted("w.bin") == "'w.bin'"
    assert quoted("a\nb\x1b[31m") == r"'a\nb\x1b[31m'"
    assert len(quoted("x" * 5000)) < 130
