"""The protobuf form: typed and raw contents, what is refused, and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.codec.protobuf import decode_infer, encode_infer, encode_stream_error, encode_stream_infer, framed_infer
from server.errors import InvalidArgument
from server.types import InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor

LIMITS = RequestLimits()


def decode(limits: RequestLimits = LIMITS, **fields: Any) -> InferenceRequest:
    return decode_infer(pb.ModelInferRequest(**fields).SerializeToString(), limits)


def entry(datatype: str, shape: list[int], **contents: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape} | ({"contents": contents} if contents else {})


TYPED = [
    ("BOOL", "bool_contents", [True, False]),
    ("INT8", "int_contents", [-128, 127]),
    ("INT16", "int_contents", [-(2**15), 2**15 - 1]),
    ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
    ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
    ("UINT8", "uint_contents", [0, 255]),
    ("UINT16", "uint_contents", [0, 2**16 - 1]),
    ("UINT32", "uint_contents", [0, 2**32 - 1]),
    ("UINT64", "uint64_contents", [0, 2**64 - 1]),
    ("FP32", "fp32_contents", [0.5, float("inf")]),
    ("FP64", "fp64_contents", [0.1, -1e300]),
]


@pytest.mark.parametrize(("datatype", "field", "values"), TYPED)
def test_typed_contents(datatype: str, field: str, values: list[Any]) -> None:
    (tensor,) = decode(inputs=[entry(datatype, [2, 1], **{field: values})]).inputs
    assert tensor.array().reshape(-1).tolist() == values
    assert isinstance(tensor.data, bytes)
    (empty,) = decode(inputs=[entry(datatype, [0])]).inputs
    assert empty.data == b""


def test_typed_bytes() -> None:
    request = decode(inputs=[entry("BYTES", [2], bytes_contents=[b"", b"\xff"])])
    assert request.inputs == [Tensor("x", "BYTES", (2,), [b"", b"\xff"])]


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (entry("INT8", [1], int_contents=[128]), r"element 0 is 128; INT8 wants an integer in -128\.\.127"),
        (entry("INT16", [2], int_contents=[1, -40_000]), "element 1 is -40000"),
        (entry("UINT8", [1], uint_contents=[256]), "element 0 is 256"),
        (entry("UINT16", [1], uint_contents=[2**32 - 1]), "element 0 is 4294967295"),
        (entry("FP32", [1], int_contents=[1]), "FP32 belongs in fp32_contents, got int_contents"),
        (entry("INT64", [1], int64_contents=[1], fp32_contents=[1.0]), "got fp32_contents"),
        (entry("FP16", [1], fp32_contents=[1.0]), "FP16 is accepted in raw_input_contents only"),
        (entry("BF16", [1]), "BF16 is accepted in raw_input_contents only"),
        (entry("FP32", [2], fp32_contents=[1.0]), r"\[2\] wants 2 elements, got 1"),
        (entry("FP32", [2]), "wants 2 elements, got 0"),
        (entry("FP33", [1], fp32_contents=[1.0]), "unknown datatype 'FP33'"),
        (entry("FP32", [-1], fp32_contents=[1.0]), "negative dimension"),
        (entry("FP32", [2**62, 2**62], fp32_contents=[1.0]), "64-bit"),
        (entry("FP32", [1] * 33, fp32_contents=[1.0]), "at most 32 dimensions"),
        (entry("FP32", [1], fp32_contents=[1.0]) | {"name": ""}, "name that is not empty"),
        (entry("FP32", [1], fp32_contents=[1.0]) | {"parameters": {"a": {}}}, "parameter 'a' has no value"),
    ],
)
def test_wrong_inputs(item: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        decode(inputs=[item])


INT8 = {"name": "x", "datatype": "INT8", "shape": [2]}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"raw_input_contents": [b"ab"]}, "wanted 0, got 1"),
        ({"inputs": [INT8, INT8], "raw_input_contents": [b"ab", b"ab"]}, "'x' is given more than once"),
        ({"inputs": [INT8], "raw_input_contents": [b"ab", b"ab"]}, "wanted 1, got 2"),
        ({"inputs": [INT8, INT8 | {"name": "y"}], "raw_input_contents": [b"ab"]}, "wanted 2, got 1"),
        ({"inputs": [INT8], "raw_input_contents": [b"abc"]}, "wants 2 bytes of data, got 3"),
        (
            {"inputs": [INT8 | {"contents": {"int_contents": [1, 2]}}], "raw_input_contents": [b"ab"]},
            "typed contents beside raw_input_contents",
        ),
        ({"inputs": [INT8 | {"datatype": "BYTES"}], "raw_input_contents": [b"\x09\x00\x00\x00a\x00\x00\x00"]}, "past"),
        ({"inputs": [INT8 | {"datatype": "BOOL"}], "raw_input_contents": [b"\x00\x02"]}, "0 or 1, got 2"),
        ({"inputs": [INT8], "raw_input_contents": [b"ab"], "outputs": [{"name": "y"}] * 2}, "output 'y'"),
        ({"inputs": [INT8], "raw_input_contents": [b"ab"], "outputs": [{"name": ""}]}, "every output needs a name"),
        ({"inputs": [INT8], "raw_input_contents": [b"ab"], "id": "x" * 5000}, "at most 4096 bytes"),
        ({"inputs": [INT8], "raw_input_contents": [b"ab"], "parameters": {"a": {}}}, "'a' has no value"),
    ],
)
def test_wrong_requests(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        decode(**fields)


@pytest.mark.parametrize(
    "raw", [b"\xff", b"\x0a\x05a", b"\x0a\x01\xff", b"GET / HTTP/1.1\r\n", b"\x2a\x03\x0a\x01\xff"]
)
def test_not_a_message(raw: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"not a valid inference\.ModelInferRequest"):
        decode_infer(raw, LIMITS)


def test_limits() -> None:
    limits = RequestLimits(max_inputs=1, max_outputs=1, max_parameters=1)
    parameters = {key: pb.InferParameter(int64_param=1) for key in "ab"}
    for fields in (
        {"inputs": [INT8, INT8 | {"name": "y"}], "raw_input_contents": [b"ab", b"ab"]},
        {"inputs": [INT8], "raw_input_contents": [b"ab"], "outputs": [{"name": "y"}, {"name": "z"}]},
        {"inputs": [INT8], "raw_input_contents": [b"ab"], "parameters": parameters},
    ):
        with pytest.raises(InvalidArgument, match="at most 1 are accepted, got 2"):
            decode(limits, **fields)


def test_parameters_and_outputs() -> None:
    request = decode(
        model_name="m",
        model_version="2",
        id="i",
        parameters={
            "b": pb.InferParameter(bool_param=False),
            "i": pb.InferParameter(int64_param=-1),
            "s": pb.InferParameter(string_param=""),
            "d": pb.InferParameter(double_param=0.5),
            "u": pb.InferParameter(uint64_param=2**64 - 1),
        },
        inputs=[INT8],
        outputs=[{"name": "y", "parameters": {"classification": pb.InferParameter(int64_param=3)}}],
        raw_input_contents=[b"ab"],
    )
    assert (request.model, request.version, request.id) == ("m", "2", "i")
    assert request.parameters == {"b": False, "i": -1, "s": "", "d": 0.5, "u": 2**64 - 1}
    assert request.outputs == [RequestedOutput("y", classification=3)]


def test_shared_memory_is_not_offered() -> None:
    region = {"shared_memory_region": pb.InferParameter(string_param="r")}
    with pytest.raises(InvalidArgument, match="shared memory"):
        decode(inputs=[INT8 | {"parameters": region}])
    with pytest.raises(InvalidArgument, match="output 'y'"):
        decode(inputs=[INT8], raw_input_contents=[b"ab"], outputs=[{"name": "y", "parameters": region}])


RESPONSE = InferenceResponse(
    "m",
    "2",
    "id",
    [
        Tensor("a", "FP32", (1, 70_000), np.arange(70_000, dtype="<f4").tobytes()),
        Tensor("b", "BYTES", (2,), [b"x", b""]),
        Tensor("c", "INT8", (0,), b""),
        Tensor("d", "INT8", (), memoryview(b"\x07")),
    ],
    {"t": True, "i": -3, "u": 2**64 - 1, "f": 0.5, "s": "é"},
)


def test_answer_is_what_protobuf_reads() -> None:
    message = pb.ModelInferResponse.FromString(encode_infer(RESPONSE))
    assert (message.model_name, message.model_version, message.id) == ("m", "2", "id")
    assert [(o.name, o.datatype, tuple(o.shape)) for o in message.outputs] == [
        (tensor.name, tensor.datatype, tensor.shape) for tensor in RESPONSE.outputs
    ]
    assert not any(output.HasField("contents") for output in message.outputs)
    assert list(message.raw_output_contents) == [
        RESPONSE.outputs[0].data,
        b"\x01\x00\x00\x00x\x00\x00\x00\x00",
        b"",
        b"\x07",
    ]
    values = {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in message.parameters.items()}
    assert values == RESPONSE.parameters
    assert isinstance(values["t"], bool)


def test_stream_messages() -> None:
    message = pb.ModelStreamInferResponse.FromString(encode_stream_infer(RESPONSE))
    assert message.error_message == ""
    assert message.infer_response.SerializeToString(deterministic=True) == pb.ModelInferResponse.FromString(
        encode_infer(RESPONSE)
    ).SerializeToString(deterministic=True)
    error = pb.ModelStreamInferResponse.FromString(encode_stream_error("wrong", "7"))
    assert (error.error_message, error.infer_response.id) == ("wrong", "7")


ONE = Tensor("y", "FP32", (1, 2), bytes(8))


@pytest.mark.parametrize(
    "other",
    [
        InferenceResponse("n", "1", "", [ONE]),
        InferenceResponse("m", "2", "", [ONE]),
        InferenceResponse("m", "1", "", [replace(ONE, name="z")]),
        InferenceResponse("m", "1", "", [replace(ONE, datatype="INT32")]),
        InferenceResponse("m", "1", "", [replace(ONE, shape=(2, 1))]),
        InferenceResponse("m", "1", "", [replace(ONE, data=bytes(9))]),  # BYTES differ so; their length is not known
        InferenceResponse("m", "1", "id", [ONE]),
        InferenceResponse("m", "1", "", [ONE, ONE]),
    ],
)
def test_framed_answers_that_follow_each_other_each_have_their_own_head(other: InferenceResponse) -> None:
    usual = InferenceResponse("m", "1", "", [ONE])
    for response in (usual, usual, other, other, usual, other):
        message = encode_infer(response)
        assert framed_infer(response) == b"\0" + len(message).to_bytes(4, "big") + message
