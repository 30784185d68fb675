"""The file MLmodel, read strictly."""

from __future__ import annotations

import json

import pytest

from router.registry.manifest import Signature, TensorEntry
from router.registry.origin import Unusable
from server.mlflow.mlmodel import read_mlmodel
from tests.support.mlflow_server import MLMODEL


def tensor(name: str | None, dtype: str = "float32", shape: object = (-1, 4)) -> dict[str, object]:
    spec: dict[str, object] = {"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": shape}}
    return spec if name is None else {"name": name, **spec}


def declared(inputs: object, outputs: object) -> Signature | None:
    signature = json.dumps({"inputs": json.dumps(inputs), "outputs": json.dumps(outputs), "params": None})
    return read_mlmodel(f"flavors: {{onnx: {{data: a/b.onnx}}}}\nsignature: {signature}\n".encode()).signature


def test_the_graph_and_its_tensors() -> None:
    found = read_mlmodel(MLMODEL)
    assert found.graph == "model.onnx"
    x, y = (TensorEntry(name, "FP32", (-1, 4)) for name in "xy")
    assert found.signature == Signature((x,), (y,))


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [("int64", "INT64"), ("uint8", "UINT8"), ("float16", "FP16"), ("bool", "BOOL"), ("object", "BYTES")],
)
def test_datatypes(dtype: str, datatype: str) -> None:
    found = declared([tensor("x", dtype)], [tensor("y", dtype, [])])
    assert found == Signature((TensorEntry("x", datatype, (-1, 4)),), (TensorEntry("y", datatype, ()),))


def test_a_tensor_alone_needs_no_name() -> None:
    x, y = (TensorEntry(name, "FP32", (-1, 4)) for name in ("", "y"))
    assert declared([tensor(None)], [tensor("y")]) == Signature((x,), (y,))


@pytest.mark.parametrize(
    "inputs",
    [
        [tensor("x"), tensor(None)],
        [tensor(None), tensor(None)],
        [tensor("x"), tensor("x")],
        [tensor("x", "complex64")],
        [tensor("x", shape=[-2])],
        [tensor("x", shape="4")],
        [{"name": "a", "type": "double"}],
        [],
        {},
        None,
    ],
)
def test_a_signature_that_does_not_say_all_is_none(inputs: object) -> None:
    assert declared(inputs, [tensor("y")]) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "mapping"),
        (b"[]", "mapping"),
        (b"flavors: {}", "no ONNX flavor"),
        (b"flavors: {onnx: 1}", "mapping"),
        (b"flavors: {onnx: {}}", "path of the ONNX file"),
        (b"flavors: {onnx: {data: ../x.onnx}}", "'..'"),
        (b"flavors: {onnx: {data: /x.onnx}}", "absolute"),
        (b"flavors: &a {onnx: {data: m}}\nb: *a", "alias"),
        (b"flavors: {onnx: {data: m}}\nflavors: {onnx: {data: n}}", "twice"),
        (b"flavors: {onnx: {data: m}}\n? [a]\n: b", "twice"),
        (b"flavors: {onnx: {data: m}}\n<<: {x: 1}", ""),
        (b"!!python/object/apply:os.system ['true']", "no YAML"),
        (b"a: [", "no YAML"),
        (b"\xff\xfe\xff", "no YAML"),
        (b"[" * 100_000, "no YAML"),
        (b"flavors: {onnx: {data: m}}\nsignature: {inputs: '[', outputs: '[]'}", "no JSON"),
    ],
)
def test_anything_else_is_refused(text: bytes, reason: str) -> None:
    if not reason:  # a merge key is a key like any other
        assert read_mlmodel(text).graph == "m"
        return
    with pytest.raises(Unusable, match=reason):
        read_mlmodel(text)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("", "nothing"),
        ("[1]", "a list"),
        ("!!omap [{a: 1}]", "a list"),
        ("!!pairs [{a: 1}]", "a list"),
        ("model.onnx", "a text"),
        ("1", "a number"),
        ("1.5", "a number"),
        ("yes", "a boolean"),
        ("2026-01-01", "a date"),
        ("2026-01-01 00:00:00", "a date"),
        ("!!binary AAAA", "binary data"),
        ("!!set {a, b}", "a set"),
    ],
)
def test_what_stands_in_place_of_a_mapping_is_named(value: str, got: str) -> None:
    with pytest.raises(Unusable, match=rf"^flavors\.onnx must be a mapping, got {got}$"):
        read_mlmodel(f"flavors:\n  onnx: {value}\n".encode())
    with pytest.raises(Unusable, match=rf"^MLmodel must be a mapping, got {got}$"):
        read_mlmodel(value.encode())
