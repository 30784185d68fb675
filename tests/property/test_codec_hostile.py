"""Whatever bytes come in, a decoder answers with a request or a TidegateError, and its two ways agree."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from server._pb import inference_pb2 as pb
from server.codec.binary import decode_raw, parse_header_length
from server.codec.compression import compress, decompress
from server.codec.json import _depth, decode_infer
from server.codec.protobuf import decode_infer as decode_protobuf
from server.codec.protobuf import decode_message
from server.codec.scan import scan
from server.errors import TidegateError
from server.types import InferenceRequest, ModelSpec, RequestLimits, TensorSpec

LIMITS = RequestLimits(max_json_depth=8)
relaxed = settings(deadline=None)  # other tests may keep the machine busy


def outcome(call: Callable[[], InferenceRequest]) -> tuple[Any, ...]:
    """The request in comparable form, or the error's class and text; any other exception is a failure of the test."""
    try:
        request = call()
    except TidegateError as error:
        return (type(error), error.message)
    for tensor in request.inputs:
        assert tensor.array().shape == tensor.shape
    inputs = [
        (t.name, t.datatype, t.shape, t.data if isinstance(t.data, list) else bytes(t.data)) for t in request.inputs
    ]
    return (request.model, request.version, request.id, inputs, request.outputs, request.parameters)


def mutated(originals: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the originals with up to four edits: a byte changed, removed, put in, or a piece repeated or cut off."""

    @st.composite
    def build(draw: st.DrawFn) -> bytes:
        raw = bytearray(draw(st.sampled_from(originals)))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, max(0, len(raw) - 1)))
            size = draw(st.integers(0, 8))
            edit = draw(st.sampled_from(["set", "delete", "insert", "repeat", "cut"]))
            if edit == "set" and raw:
                raw[at] = draw(st.integers(0, 255))
            elif edit == "delete":
                del raw[at : at + size]
            elif edit == "insert":
                raw[at:at] = draw(st.binary(max_size=4))
            elif edit == "repeat":
                raw[at:at] = raw[at : at + size * 4]
            else:
                del raw[at:]
        return bytes(raw)

    return build()


# --- protobuf ------------------------------------------------------------------------------------------------------


def raw_entry(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


MESSAGES = [
    pb.ModelInferRequest(
        model_name="m",
        model_version="1",
        id="42",
        inputs=[raw_entry("x", "INT16", 2)],
        raw_input_contents=[b"abcd"],
    ),
    pb.ModelInferRequest(
        model_name="m",
        inputs=[raw_entry("x", "BYTES", 2), raw_entry("y", "BOOL", 1, 1)],
        outputs=[{"name": "a"}, {"name": "b"}],
        raw_input_contents=[b"\x01\x00\x00\x00a\x00\x00\x00\x00", b"\x01"],
    ),
    pb.ModelInferRequest(
        model_name="m",
        parameters={"p": pb.InferParameter(int64_param=1)},
        inputs=[raw_entry("x", "INT8", 2) | {"contents": {"int_contents": [1, -1]}}],
        outputs=[{"name": "a", "parameters": {"classification": pb.InferParameter(int64_param=1)}}],
    ),
    pb.ModelInferRequest(inputs=[raw_entry("x", "FP32", 40)], raw_input_contents=[bytes(160)]),
]
WIRE = [message.SerializeToString() for message in MESSAGES]


def test_the_originals_are_valid() -> None:
    assert [decode_message(raw, LIMITS).model for raw in WIRE] == ["m", "m", "m", ""]
    assert [scan(raw, LIMITS) is not None for raw in WIRE] == [True, True, False, True]


@relaxed
@given(mutated(WIRE) | st.binary(max_size=60))
@example(WIRE[0] + b"\x0a\x01n")
@example(WIRE[0] + b"\x0a\x00")
@example(b"\x0a\x81\x00m" + WIRE[3])
def test_scan_and_protobuf_agree(raw: bytes) -> None:
    taken = scan(raw, LIMITS)
    expected = outcome(lambda: decode_message(raw, LIMITS))
    if taken is not None:
        assert outcome(lambda: taken) == expected
    assert outcome(lambda: decode_protobuf(raw, LIMITS)) == expected


# --- JSON and binary -----------------------------------------------------------------------------------------------

DOCUMENTS: list[dict[str, Any]] = [
    {
        "id": "1",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [[1.5, 2], [float("nan"), -1e30]]}],
        "outputs": [{"name": "y", "parameters": {"classification": 2, "binary_data": False}}],
        "parameters": {"binary_data_output": True, "priority": 3},
    },
    {"inputs": [{"name": "x", "datatype": "INT64", "shape": [3], "data": [2**63 - 1, 1.0, -(2**63)]}]},
    {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1, 2], "data": ["\ud83d\ude00\\", '"é']}]},
    {"inputs": [{"name": "x", "datatype": "BF16", "shape": [], "data": [65504.0]}]},
]
JSON = [json.dumps(document).encode() for document in DOCUMENTS]
BINARY_HEAD = json.dumps(
    {"inputs": [{"name": "x", "datatype": "INT16", "shape": [2], "parameters": {"binary_data_size": 4}}]}
).encode()


@relaxed
@given(mutated(JSON) | st.binary(max_size=60))
def test_json_bodies(body: bytes) -> None:
    outcome(lambda: decode_infer(body, model="m", version="", limits=LIMITS, json_size=None))


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from(["x", "INT8", "FP16", "BYTES", "BOOL", 2**64, 1e300, -1])
)
keys = st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size", "binary_data", "id"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
entries = st.lists(
    st.fixed_dictionaries(
        {"name": st.just("x") | values},
        optional={
            "datatype": st.sampled_from(["INT8", "FP16", "BYTES", "BOOL", "UINT64"]) | values,
            "shape": st.lists(st.integers(-1, 3), max_size=3) | values,
            "data": st.lists(leaves, max_size=4) | values,
            "parameters": values,
        },
    )
    | values,
    max_size=3,
)
documents = st.fixed_dictionaries(
    {"inputs": entries | values}, optional={"outputs": entries | values, "parameters": values, "id": values}
)


@relaxed
@given(documents | values)
def test_json_of_any_structure(document: Any) -> None:
    body = json.dumps(document).encode()
    outcome(lambda: decode_infer(body, model="m", version="", limits=LIMITS, json_size=None))


@relaxed
@given(mutated([BINARY_HEAD + b"abcd"]), st.integers(-2, len(BINARY_HEAD) + 8) | st.text(max_size=4))
def test_binary_bodies(body: bytes, header: object) -> None:
    def decode() -> InferenceRequest:
        size = parse_header_length(str(header), len(body))
        return decode_infer(body, model="m", version="", limits=LIMITS, json_size=size)

    outcome(decode)


@relaxed
@given(
    st.binary(max_size=40),
    st.sampled_from(["FP32", "BYTES", "BOOL"]),
    st.lists(st.integers(-1, 3), max_size=3),
    st.integers(0, 2),
)
def test_raw_bodies(body: bytes, datatype: str, shape: list[int], batch: int) -> None:
    spec = ModelSpec("m", "1", (TensorSpec("x", datatype, tuple(shape)),), (), max_batch_size=batch)
    outcome(lambda: decode_raw(body, model="m", version="", spec=spec))


# --- Depth and compression -----------------------------------------------------------------------------------------


def naive_depth(document: Any) -> int:
    if isinstance(document, dict):
        return 1 + max(map(naive_depth, document.values()), default=0)
    if isinstance(document, list):
        return 1 + max(map(naive_depth, document), default=0)
    return 0


brackets = st.text(st.sampled_from('[]{}"\\a,:é'), max_size=6)
nests = st.recursive(
    brackets, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(brackets, inner, max_size=3), max_leaves=10
)


@relaxed
@given(nests, st.booleans())
def test_depth_is_that_of_the_document(document: Any, ascii_only: bool) -> None:
    assert _depth(json.dumps(document, ensure_ascii=ascii_only).encode()) == naive_depth(document)


CODED = [zlib.compress(b"tide" * 40), *(bytes(compress(b"gate" * 40, coding)[0]) for coding in ("gzip", "deflate"))]


@relaxed
@given(mutated(CODED) | st.binary(max_size=60), st.sampled_from(["gzip", "deflate", "identity", "br"]))
def test_compressed_bodies(body: bytes, encoding: str) -> None:
    try:
        plain = decompress(body, encoding, 100)
    except TidegateError:
        return
    assert len(plain) <= 100


@relaxed
@given(st.text(st.sampled_from('gzipdeflatq=;,.* 0159\u0661"'), max_size=30))
def test_any_accept_encoding(accept: str) -> None:
    body, coding = compress(b"tide", accept)
    assert decompress(body, coding, 4) == b"tide"
