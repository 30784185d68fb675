"""Any tensor of any datatype survives every wire form, bit for bit, both as a request and as an answer."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from server._pb import inference_pb2 as pb
from server.codec.binary import decode_bytes, encode_bytes, input_tensor, raw_contents
from server.codec.dtypes import bfloat16_values
from server.codec.json import decode_infer, encode_infer
from server.codec.protobuf import decode_infer as decode_protobuf
from server.codec.protobuf import encode_infer as encode_protobuf
from server.types import (
    BYTES,
    DATATYPES,
    InferenceRequest,
    InferenceResponse,
    RequestedOutput,
    RequestLimits,
    Tensor,
    element_count,
)

LIMITS = RequestLimits()
relaxed = settings(deadline=None)  # other tests may keep the machine busy

shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Random bit patterns, so NaN payloads, infinities and subnormals are among the floats."""
    name, datatype, shape = draw(names), draw(st.sampled_from([*DATATYPES, BYTES])), draw(shapes)
    count = element_count(shape)
    if datatype == BYTES:
        return Tensor(name, datatype, shape, draw(st.lists(st.binary(max_size=6), min_size=count, max_size=count)))
    if datatype == "BOOL":
        return Tensor(name, datatype, shape, bytes(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))))
    size = count * DATATYPES[datatype][1]
    return Tensor(name, datatype, shape, draw(st.binary(min_size=size, max_size=size)))


tensor_lists = st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda tensor: tensor.name)


def plain(tensor: Tensor) -> tuple[Any, ...]:
    data = tensor.data if isinstance(tensor.data, list) else bytes(tensor.data)
    return tensor.name, tensor.datatype, tensor.shape, data


def same(inputs: list[Tensor], expected: list[Tensor]) -> None:
    assert [plain(tensor) for tensor in inputs] == [plain(tensor) for tensor in expected]


def json_request(body: bytes, json_size: int | None) -> InferenceRequest:
    return decode_infer(body, model="m", version="1", limits=LIMITS, json_size=json_size)


def response(outputs: list[Tensor]) -> InferenceResponse:
    return InferenceResponse("m", "1", "id", outputs)


def as_inputs(document: dict[str, Any]) -> bytes:
    """An answer's JSON as a request's: the entries have the same form."""
    return json.dumps({"inputs": document["outputs"]}).encode()


@relaxed
@given(tensor_lists)
def test_binary_extension(outputs: list[Tensor]) -> None:
    chunks, size = encode_infer(response(outputs), outputs=[], binary_default=True)
    body = b"".join(chunks)
    head = as_inputs(orjson.loads(body[:size]))
    same(json_request(head + body[size:], len(head)).inputs, outputs)


@relaxed
@given(tensor_lists)
def test_protobuf_raw(outputs: list[Tensor]) -> None:
    answer = pb.ModelInferResponse.FromString(encode_protobuf(response(outputs)))
    inputs = [{"name": o.name, "datatype": o.datatype, "shape": o.shape} for o in answer.outputs]
    request = pb.ModelInferRequest(inputs=inputs, raw_input_contents=answer.raw_output_contents)
    same(decode_protobuf(request.SerializeToString(), LIMITS).inputs, outputs)


FIELDS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}


@relaxed
@given(tensors().filter(lambda tensor: tensor.datatype in FIELDS))
def test_protobuf_typed(tensor: Tensor) -> None:
    values = tensor.array().reshape(-1).tolist()
    entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    request = pb.ModelInferRequest(inputs=[entry | {"contents": {FIELDS[tensor.datatype]: values}}])
    (got,) = decode_protobuf(request.SerializeToString(), LIMITS).inputs
    if tensor.datatype in ("FP32", "FP64"):  # building the message may make a signalling NaN a quiet one
        assert got.shape == tensor.shape
        assert np.array_equal(got.array(), tensor.array(), equal_nan=True)
    else:
        same([got], [tensor])


def is_text(tensor: Tensor) -> bool:
    try:
        return not isinstance(tensor.data, list) or all(element.decode() is not None for element in tensor.data)
    except UnicodeDecodeError:
        return False


def as_numbers(tensor: Tensor) -> np.ndarray[Any, Any]:
    return bfloat16_values(tensor.array()) if tensor.datatype == "BF16" else tensor.array()


def nest(values: list[Any], shape: tuple[int, ...]) -> list[Any]:
    for dim in shape[:0:-1]:
        if dim == 0:
            return np.empty(shape).tolist()
        values = [values[start : start + dim] for start in range(0, len(values), dim)]
    return values


@relaxed
@given(tensors().filter(is_text), st.booleans())
def test_json_text(tensor: Tensor, nested: bool) -> None:
    """All but the payload of NaN is kept, and flat and nested data mean the same."""
    chunks, size = encode_infer(response([tensor]), outputs=[], binary_default=False)
    assert size is None
    document = json.loads(b"".join(chunks))
    if nested:
        document["outputs"][0]["data"] = nest(document["outputs"][0]["data"], tensor.shape)
    (got,) = json_request(as_inputs(document), None).inputs
    assert (got.name, got.datatype, got.shape) == (tensor.name, tensor.datatype, tensor.shape)
    if tensor.datatype.startswith(("FP", "BF")):
        want, have = as_numbers(tensor), as_numbers(got)
        assert np.array_equal(want, have, equal_nan=True)
        numbers = ~np.isnan(want)
        assert np.array_equal(np.signbit(want[numbers]), np.signbit(have[numbers]))
    else:
        same([got], [tensor])


@relaxed
@given(tensors().filter(is_text))
def test_finite_answers_are_strict_json(tensor: Tensor) -> None:
    """orjson, which refuses the literals, reads every answer without NaN and infinities."""
    finite = tensor.datatype == BYTES or bool(np.isfinite(as_numbers(tensor)).all())
    body = b"".join(encode_infer(response([tensor]), outputs=[], binary_default=False)[0])
    if finite:
        assert orjson.loads(body) == json.loads(body)
    else:
        data = json.loads(body)["outputs"][0]["data"]
        assert [math.isfinite(value) for value in data] == np.isfinite(as_numbers(tensor)).reshape(-1).tolist()


@relaxed
@given(tensor_lists.filter(lambda outputs: all(map(is_text, outputs))), st.data())
def test_mixed_answers(outputs: list[Tensor], data: st.DataObject) -> None:
    """Each output goes where the request wanted it, and the binary part is exactly those that went there."""
    wanted = [RequestedOutput(o.name, data.draw(st.sampled_from([None, True, False]))) for o in outputs]
    default = data.draw(st.booleans())
    chunks, size = encode_infer(response(outputs), outputs=wanted, binary_default=default)
    binary = [o for o, w in zip(outputs, wanted, strict=True) if (default if w.binary is None else w.binary)]
    assert (size is None) == (not binary)
    assert b"".join(chunks[1:]) == b"".join(bytes(raw_contents(output)) for output in binary)
    entries = json.loads(chunks[0])["outputs"]
    assert ["data" not in entry for entry in entries] == [output in binary for output in outputs]


@relaxed
@given(st.lists(st.binary(max_size=300)))
def test_bytes_elements(elements: list[bytes]) -> None:
    wire = encode_bytes(elements)
    assert decode_bytes("x", wire, len(elements)) == elements
    assert input_tensor("x", BYTES, (len(elements),), memoryview(wire)).data == elements
