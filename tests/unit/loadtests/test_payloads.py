"""loadtests.payloads: what is sent is what the gateway's own codecs read, and answers are read back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from loadtests import payloads
from server._pb import inference_pb2 as pb
from server.codec import json as json_codec
from server.codec import protobuf
from server.errors import InvalidArgument
from server.types import InferenceRequest, InferenceResponse, RequestLimits, Tensor

PAYLOADS = {
    "floats": {"x": np.array([[1.5, -2.0]], np.float32)},
    "two": {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.array([[True], [False]])},
    "text": {"words": np.array([["tide", "gäte"]], dtype=object)},
    "half": {"h": np.array([1.5, 2.5], np.float16)},
}


def decoded(body: bytes, json_size: int | None) -> InferenceRequest:
    return json_codec.decode_infer(body, model="m", version="", limits=RequestLimits(), json_size=json_size)


def same(request: InferenceRequest, payload: payloads.Payload) -> None:
    assert [tensor.name for tensor in request.inputs] == list(payload)
    for tensor, array in zip(request.inputs, payload.values(), strict=True):
        wanted = array.ravel().tolist()
        if array.dtype == object:
            wanted = [text.encode() for text in wanted]
        assert tensor.shape == array.shape
        assert tensor.array().ravel().tolist() == wanted


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "half"])
def test_json(name: str) -> None:
    same(decoded(payloads.json_body(PAYLOADS[name]), None), PAYLOADS[name])


@pytest.mark.parametrize("name", PAYLOADS)
def test_binary(name: str) -> None:
    body, size = payloads.binary_body(PAYLOADS[name])
    request = decoded(body, size)
    same(request, PAYLOADS[name])
    assert request.binary_output


@pytest.mark.parametrize("name", PAYLOADS)
def test_grpc(name: str) -> None:
    request = protobuf.decode_infer(payloads.grpc_message("m", "3", PAYLOADS[name]), RequestLimits())
    same(request, PAYLOADS[name])
    assert (request.model, request.version) == ("m", "3")


def answer() -> InferenceResponse:
    floats = np.array([[0.25, 1e-3]], np.float32)
    return InferenceResponse(
        "m", "1", "", [Tensor("y", "FP32", (1, 2), floats.tobytes()), Tensor("label", "BYTES", (1,), [b"high"])]
    )


def check(found: dict[str, payloads.Array]) -> None:
    assert np.allclose(found["y"], [[0.25, 1e-3]])
    assert [v.encode() if isinstance(v, str) else v for v in found["label"].tolist()] == [b"high"]


def test_answers_are_read_in_every_form() -> None:
    check(payloads.read_grpc(protobuf.encode_infer(answer())))
    outputs: list[dict[str, Any]] = [
        {"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [0.25, 0.001]},
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["high"]},
    ]
    check(payloads.read_json(json.dumps({"outputs": outputs}).encode()))
    raw = np.array([0.25, 1e-3], np.float32).tobytes()
    outputs[0] = {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}
    check(payloads.read_binary(json.dumps({"outputs": outputs}).encode() + raw))


def test_agreement_tolerates_the_last_bits_of_floats_only() -> None:
    wanted = {"y": np.array([1.0, 2.0], np.float32), "n": np.array([3])}
    assert payloads.agrees({"y": wanted["y"] * np.float32(1.000001), "n": wanted["n"], "more": wanted["n"]}, wanted)
    assert not payloads.agrees({"y": wanted["y"] * 1.1, "n": wanted["n"]}, wanted)
    assert not payloads.agrees({"y": wanted["y"], "n": np.array([4])}, wanted)
    assert not payloads.agrees({"y": wanted["y"].reshape(2, 1), "n": wanted["n"]}, wanted)
    assert not payloads.agrees({"y": wanted["y"]}, wanted)


def test_made_up_fits_the_signature_and_is_the_same_again() -> None:
    inputs = [
        {"name": "x", "datatype": "FP32", "shape": [-1, 30]},
        {"name": "words", "datatype": "BYTES", "shape": [-1, -1]},
        {"name": "flag", "datatype": "BOOL", "shape": [-1, 2]},
        {"name": "ids", "datatype": "INT64", "shape": ["-1", "4"]},  # JSON of protobuf writes integers as text
    ]
    made = payloads.made_up({"inputs": inputs}, 3)
    assert {name: (payloads.datatype_of(a), a.shape) for name, a in made.items()} == {
        "x": ("FP32", (3, 30)),
        "words": ("BYTES", (3, 1)),
        "flag": ("BOOL", (3, 2)),
        "ids": ("INT64", (3, 4)),
    }
    again = payloads.made_up({"inputs": inputs}, 3)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    pb.ModelInferRequest.FromString(payloads.grpc_message("m", "", made))


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "datatype": "BF16", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": "COMPLEX", "shape": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [10**6, 10**6]}]},
    ],
)
def test_what_cannot_be_made_up_is_named(metadata: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        payloads.made_up(metadata, 1)


def test_foreign_types_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="complex128"):
        payloads.json_body({"x": np.array([1j])})
