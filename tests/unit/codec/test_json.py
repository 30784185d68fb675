"""The JSON form: what is accepted, what is refused and how, and what is written."""

from __future__ import annotations

import gc
import json
import math
import struct
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import orjson
import pytest

from server.codec.json import decode_infer, encode_infer
from server.errors import InvalidArgument
from server.types import DATATYPES, InferenceRequest, InferenceResponse, RequestedOutput, RequestLimits, Tensor

LIMITS = RequestLimits()


def decode(body: bytes | str, *, json_size: int | None = None, limits: RequestLimits = LIMITS) -> InferenceRequest:
    raw = body.encode() if isinstance(body, str) else body
    return decode_infer(raw, model="m", version="1", limits=limits, json_size=json_size)


def request(**changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "datatype": "INT32", "shape": [2, 2], "data": [1, 2, 3, 4]}
    tensor.update(changes)
    return {"inputs": [{key: value for key, value in tensor.items() if value is not ...}]}


def tensor_of(**changes: Any) -> Tensor:
    return decode(orjson.dumps(request(**changes))).inputs[0]


def refused(document: Any, text: str, limits: RequestLimits = LIMITS) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(InvalidArgument, match=text):
        decode(body, limits=limits)


# --- What is accepted ----------------------------------------------------------------------------------------------


def test_a_whole_request() -> None:
    document = {
        "id": "a",
        "parameters": {"priority": 1, "note": "n", "flag": True, "ratio": 0.5, "binary_data_output": True},
        "inputs": [{"name": "x", "datatype": "INT32", "shape": [2], "data": [1, 2], "parameters": {"p": 1}}],
        "outputs": [{"name": "y"}, {"name": "z", "parameters": {"binary_data": False, "classification": 2}}],
        "model_name": "ignored",
    }
    assert decode(orjson.dumps(document)) == InferenceRequest(
        "m",
        "1",
        "a",
        [Tensor("x", "INT32", (2,), b"\x01\x00\x00\x00\x02\x00\x00\x00")],
        [RequestedOutput("y"), RequestedOutput("z", False, 2)],
        {"priority": 1, "note": "n", "flag": True, "ratio": 0.5},
        binary_output=True,
    )


def test_absent_and_null_options_are_the_same() -> None:
    assert decode(orjson.dumps(request() | {"id": None, "outputs": None, "parameters": None})) == decode(
        orjson.dumps(request())
    )


@pytest.mark.parametrize("data", [[1, 2, 3, 4], [[1, 2], [3, 4]], [1.0, 2.0, 3, 4.0]])
def test_flat_nested_and_float_typed(data: list[Any]) -> None:
    assert tensor_of(data=data).array().tolist() == [[1, 2], [3, 4]]
    assert tensor_of(shape=[2.0, 2.0], data=data).shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "data"), [([], [7]), ([0], []), ([2, 0], []), ([2, 0], [[], []]), ([2, 0, 3], [[], []]), ([0, 3], [])]
)
def test_scalars_and_empty_tensors(shape: list[int], data: list[Any]) -> None:
    tensor = tensor_of(shape=shape, data=data)
    assert tensor.shape == tuple(shape)
    assert len(tensor.data) == 4 * bool(data and shape == [])


@pytest.mark.parametrize("number", [2**53 + 1, 2**63 - 1, -(2**63), -(2**53) - 1])
def test_64_bit_integers_are_exact(number: int) -> None:
    assert tensor_of(datatype="INT64", shape=[1], data=[number]).array().tolist() == [number]


def test_unsigned_64_bit_integers_are_exact() -> None:
    assert tensor_of(datatype="UINT64", shape=[1], data=[2**64 - 1]).array().tolist() == [2**64 - 1]


@pytest.mark.parametrize("number", [-(2**63) - 1, 2**63, 2**64, 10**30])
def test_integers_that_a_double_would_bring_into_range(number: int) -> None:
    refused(request(datatype="INT64", shape=[1], data=[number]), f"is {number}; INT64 wants an integer in")


def test_inexact_float_literals_are_not_integers() -> None:
    refused(b'{"inputs":[{"name":"x","datatype":"INT64","shape":[1],"data":[9007199254740993.0]}]}', "without point")


def test_literals_of_non_finite_numbers() -> None:
    body = '{"inputs":[{"name":"x","datatype":"FP32","shape":[4],"data":[NaN,Infinity,-Infinity,1e-3]}]}'
    values = decode(body).inputs[0].array().tolist()
    assert np.isnan(values[0])
    assert values[1:] == [float("inf"), float("-inf"), pytest.approx(1e-3)]
    refused(body.replace("FP32", "INT32").encode(), "element 0 of the data is nan; INT32 wants an integer")


def test_the_exact_parser_is_as_strict() -> None:
    template = '{"a":NaN,"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["%s"]}]}'
    assert decode(template % "\\u00e9\\ud83d\\ude00").inputs[0].data == ["é😀".encode()]
    refused((template % "\\ud800").encode(), "not valid JSON")
    refused((template % "\x01").encode(), "not valid JSON")
    refused((template % "a").encode() + b"x", "not valid JSON")
    refused((template % "a").encode().replace(b'"a":NaN', b'"a":[NaN,1e400]'), "1e400.*beyond the range")
    refused((template % "a").encode().replace(b"NaN", b"NaN" + b"9" * 5000), "not valid JSON")
    refused((template % "a").encode().replace(b"NaN", b"[NaN," + b"9" * 5000 + b"]"), "not valid JSON")


def test_strings_stay_text() -> None:
    assert tensor_of(datatype="BYTES", shape=[2], data=["é\x00", ""]).data == ["é\x00".encode(), b""]


# --- What is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b"\xff\xfe{",
        json.dumps(request()).encode("utf-16"),
        json.dumps(request()).encode("utf-8-sig"),
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}',
        b'{"inputs":[{"name":"\xff"}]}',
        b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[1e400]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP64","shape":[1],"data":[01]}]}',
        json.dumps(request()).encode() + b"x",
    ],
)
def test_not_json(body: bytes) -> None:
    refused(body, "not valid JSON")


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([], "must be a JSON object, got an empty list"),
        (None, "must be a JSON object, got nothing"),
        ({}, "'inputs' must be a list"),
        ({"inputs": {}}, "'inputs' must be a list"),
        ({"inputs": [1]}, "entry of 'inputs' must be a JSON object, got 1"),
        ({"inputs": [{}]}, "'name'"),
        (request(name=""), "'name'"),
        (request(name=1), "'name'"),
        (request(datatype=...), "'x': 'datatype' must be a string, got nothing"),
        (request(datatype="INT33"), "unknown datatype 'INT33'"),
        (request(datatype=["INT32"]), "'datatype' must be a string"),
        (request(shape=...), "'shape' must be a list"),
        (request(shape=4), "'shape' must be a list"),
        (request(shape=[2, True]), "dimension must be an integer, got true"),
        (request(shape=[2, 2.5]), "dimension must be an integer, got 2.5"),
        (request(shape=["2"]), "dimension must be an integer"),
        (request(shape=[2, None]), "dimension must be an integer, got nothing"),
        (request(shape=[-1, 4]), r"\[-1,4\] has a negative"),
        (request(shape=[2**40, 2**40]), "64-bit"),
        (request(shape=[2**100]), "64-bit"),
        (request(shape=[1] * 33), "at most 32 dimensions"),
        (request(data=...), "'data' must be a list"),
        (request(data="AQID"), "'data' must be a list"),
        (request(data=[1, 2, 3]), r"\[2,2\] wants 4 elements, got 3"),
        (request(data=[[1, 2], [3]]), "nested data do not match"),
        (request(data=[[1, 2], 3]), "nested data do not match"),
        (request(data=[[1, 2, 3, 4]]), "wants 2 lists, got 1"),
        (request(data=[[[1], [2]], [[3], [4]]]), "element 0 of the data is a list"),
        (request(shape=[], data=[[1]]), "element 0 of the data is a list"),
        (request(data=[1, 2, 3, [4]]), "element 3 of the data is a list"),
        (request(data=[1, 2, 3, "4"]), "element 3 of the data is the string '4'; INT32 wants an integer"),
        (request(data=[1, 2, 3, None]), "element 3 of the data is null"),
        (request(data=[1, 2, 3, True]), "element 3 of the data is true"),
        (request(datatype="INT8", data=[1, 2, 3, 300]), r"element 3 .* 300; INT8 wants an integer in -128\.\.127"),
        (request(datatype="BOOL", data=[True, False, True, 1]), "BOOL wants true or false"),
        (request(parameters=[]), "'parameters' must be a JSON object"),
        (request(parameters={"a": None}), "parameter 'a' must be"),
        (request(parameters={"a": [1]}), "parameter 'a' must be"),
        (request() | {"parameters": 3}, "'parameters' must be a JSON object"),
        (request() | {"parameters": {"binary_data_output": 1}}, "'binary_data_output' must be true or false"),
        (request() | {"id": 7}, "'id' must be a string, got 7"),
        (request() | {"id": "x" * 5000}, "at most 4096 bytes"),
        (request() | {"outputs": {}}, "'outputs' must be a list"),
        (request() | {"outputs": ["y"]}, "entry of 'outputs' must be a JSON object"),
        (request() | {"outputs": [{"name": "y"}, {"name": "y"}]}, "output 'y' is given more than once"),
        (request() | {"outputs": [{"name": "y", "parameters": {"binary_data": "yes"}}]}, "'binary_data' must be"),
        (request() | {"outputs": [{"name": "y", "parameters": {"classification": 1.5}}]}, "'classification' must be"),
        ({"inputs": request()["inputs"] * 2}, "input 'x' is given more than once"),
    ],
)
def test_wrong_documents(document: Any, text: str) -> None:
    refused(document, text)


def test_shared_memory_is_not_offered() -> None:
    with pytest.raises(InvalidArgument, match="shared memory"):
        tensor_of(parameters={"shared_memory_region": "r"})


def test_limits() -> None:
    limits = RequestLimits(max_inputs=1, max_outputs=1, max_parameters=1)
    inputs = [request(name=name)["inputs"][0] for name in "ab"]
    refused({"inputs": inputs}, "too many inputs: at most 1 are accepted, got 2", limits)
    refused(request() | {"outputs": [{"name": "a"}, {"name": "b"}]}, "too many outputs", limits)
    refused(request() | {"parameters": {"a": 1, "b": 2}}, "too many parameters of request", limits)
    refused(request(parameters={"a": 1, "b": 2}), "too many parameters of input 'x'", limits)


# --- Depth ---------------------------------------------------------------------------------------------------------


def nested(depth: int) -> str:
    """A request whose ignored member makes it ``depth`` levels deep in all."""
    return json.dumps(request())[:-1] + ', "extra": ' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


def test_depth_limit() -> None:
    assert decode(nested(100)).inputs[0].shape == (2, 2)
    refused(nested(101).encode(), "at most 100 levels are accepted, got 101")
    refused(b"[" * 200_000, "at most 100 levels")
    refused(b'{"a":' * 200_000, "at most 100 levels")
    refused(nested(1500).encode(), "not valid JSON", RequestLimits(max_json_depth=10_000))
    # Over what the standard library's parser takes; newer Pythons take tens of thousands.
    refused(nested(300_000).replace("[]", "[NaN]").encode(), "not valid JSON", RequestLimits(max_json_depth=1_000_000))


@pytest.mark.parametrize("text", ["[" * 500, '\\"' + "[" * 500, "\\\\", '\\\\\\"' + "{" * 500, "]" * 500])
def test_brackets_in_strings_are_no_depth(text: str) -> None:
    document = json.dumps(request())[:-1] + ', "extra": ["' + text + '", ' + "[" * 90 + "]" * 90 + "]}"
    assert decode(document).inputs[0].shape == (2, 2)
    refused(document.replace("[" * 90 + "]" * 90, "[" * 99 + "]" * 99).encode(), "got 101")


def test_depth_of_more_brackets_than_are_looked_at_together() -> None:
    flat = json.dumps(request())[:-1] + ', "extra": [' + "[]," * 40_000 + "%s]}"
    assert decode(flat % ("[" * 98 + "]" * 98)).inputs[0].shape == (2, 2)
    refused((flat % ("[" * 99 + "]" * 99)).encode(), "got 101")


def test_many_brackets_are_no_depth() -> None:
    data = [[float(i)] for i in range(1000)]
    assert tensor_of(datatype="FP32", shape=[1000, 1], data=data).shape == (1000, 1)


# --- Binary contents -----------------------------------------------------------------------------------------------


def binary_request(*sizes: Any, tail: bytes, shape: tuple[int, ...] = (2,)) -> tuple[bytes, int]:
    inputs = [
        {"name": f"x{i}", "datatype": "INT16", "shape": shape, "parameters": {"binary_data_size": size}}
        for i, size in enumerate(sizes)
    ]
    head = json.dumps({"inputs": inputs}).encode()
    return head + tail, len(head)


def test_binary_contents_are_consumed_in_order() -> None:
    tail = struct.pack("<4h", 1, 2, 3, 4)
    body, size = binary_request(4, 4.0, tail=tail)
    inputs = decode(body, json_size=size).inputs
    assert [tensor.array().tolist() for tensor in inputs] == [[1, 2], [3, 4]]
    assert all(isinstance(tensor.data, memoryview) and tensor.data.obj is body for tensor in inputs)


@pytest.mark.parametrize(
    ("sizes", "tail", "text"),
    [
        ((4,), b"\x00" * 3, r"'x0': 'binary_data_size' must be a whole number in 0\.\.3.*got 4"),
        ((4, 4), b"\x00" * 7, r"'x1': 'binary_data_size' must be a whole number in 0\.\.3"),
        ((4,), b"\x00" * 6, "2 bytes of the body belong to no input"),
        ((-4,), b"\x00" * 4, "whole number"),
        (("4",), b"\x00" * 4, "whole number"),
        ((True,), b"\x00" * 4, "whole number"),
        ((2,), b"\x00" * 2, "wants 4 bytes of data, got 2"),
        ((2**70,), b"\x00" * 4, "whole number"),
    ],
)
def test_binary_contents_that_do_not_fit(sizes: tuple[Any, ...], tail: bytes, text: str) -> None:
    body, size = binary_request(*sizes, tail=tail)
    with pytest.raises(InvalidArgument, match=text):
        decode(body, json_size=size)


def test_binary_and_json_contents() -> None:
    mixed = {"name": "x", "datatype": "INT16", "shape": [1], "data": [1], "parameters": {"binary_data_size": 2}}
    body = orjson.dumps({"inputs": [mixed]})
    with pytest.raises(InvalidArgument, match="both"):
        decode(body + b"\x00\x00", json_size=len(body))
    head = orjson.dumps(request())
    with pytest.raises(InvalidArgument, match="1 bytes of the body belong to no input"):
        decode(head + b"x", json_size=len(head))
    with pytest.raises(InvalidArgument, match="said to have"):
        decode(head, json_size=len(head) + 1)
    body, _ = binary_request(4, tail=b"")
    with pytest.raises(InvalidArgument, match=r"in 0\.\.0"):
        decode(body)


def test_binary_bytes() -> None:
    item = {"name": "x", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
    head = orjson.dumps({"inputs": [item]})
    assert decode(head + b"\x02\x00\x00\x00\xff\x00", json_size=len(head)).inputs[0].data == [b"\xff\x00"]
    with pytest.raises(InvalidArgument, match="past the end"):
        decode(head + b"\x03\x00\x00\x00\xff\x00", json_size=len(head))


# --- Answers -------------------------------------------------------------------------------------------------------


def answer(*outputs: Tensor, **options: Any) -> tuple[bytes, int | None]:
    response = InferenceResponse("m", "1", "", list(outputs))
    chunks, size = encode_infer(response, **({"outputs": [], "binary_default": False} | options))
    return b"".join(chunks), size


def floats(name: str, datatype: str, *values: float) -> Tensor:
    return (
        Tensor(name, "FP32", (len(values),), np.array(values, "<f4").tobytes())
        if datatype == "FP32"
        else Tensor(name, datatype, (len(values),), np.array(values, "<f8" if datatype == "FP64" else "<f2").tobytes())
    )


def test_answer_text() -> None:
    response = InferenceResponse(
        "m", "1", 'i"d', [Tensor("y", "INT64", (1, 2), struct.pack("<2q", 2**63 - 1, -1))], {"p": True, "q": "é"}
    )
    chunks, size = encode_infer(response, outputs=[], binary_default=False)
    assert size is None
    assert json.loads(b"".join(chunks)) == {
        "model_name": "m",
        "model_version": "1",
        "id": 'i"d',
        "parameters": {"p": True, "q": "é"},
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [1, 2], "data": [2**63 - 1, -1]}],
    }


def test_singles_have_their_own_shortest_text() -> None:
    body, _ = answer(floats("y", "FP32", 0.1, 1e-8, 3.0))
    assert b'"data":[0.1,1e-8,3.0]' in body


def test_non_finite_numbers() -> None:
    nan, inf = float("nan"), float("inf")
    for datatype in ("FP16", "FP32", "FP64"):
        body, _ = answer(floats("null", datatype, nan, 1.5, inf, -inf, -nan))
        assert b'"data":[NaN,1.5,Infinity,-Infinity,NaN]' in body
        with pytest.raises(InvalidArgument, match=r"output 'null'.*binary"):
            answer(floats("null", datatype, 1.0, inf), strict_json=True)
    assert b'"data":[NaN,-Infinity]' in answer(Tensor("y", "BF16", (2,), b"\xc0\x7f\x80\xff"))[0]
    assert b'"data":[NaN]' in answer(Tensor("y", "FP16", (1,), b"\x01\x7c"))[0]


def test_binary_answer() -> None:
    one, two = floats("a", "FP32", 1.0), Tensor("b", "BYTES", (1,), [b"\xff"])
    body, size = answer(one, two, outputs=[RequestedOutput("a", False)], binary_default=True)
    assert size is not None
    outputs = orjson.loads(body[:size])["outputs"]
    assert outputs[0]["data"] == [1.0]
    assert outputs[1]["parameters"] == {"binary_data_size": 5}
    assert body[size:] == b"\x01\x00\x00\x00\xff"
    body, size = answer(one, two, outputs=[RequestedOutput("b", True)])
    assert body[size:] == b"\x01\x00\x00\x00\xff"


def test_bytes_in_json_must_be_text() -> None:
    assert orjson.loads(answer(Tensor("y", "BYTES", (2,), ["é".encode(), b'"']))[0])["outputs"][0]["data"] == ["é", '"']
    with pytest.raises(InvalidArgument, match=r"output 'y'.*UTF-8.*binary"):
        answer(Tensor("y", "BYTES", (1,), [b"\xff"]))


def test_unaligned_contents() -> None:
    raw = memoryview(b"x" + struct.pack("<2d", 0.5, 2.0))[1:]
    assert b'"data":[0.5,2.0]' in answer(Tensor("y", "FP64", (2,), raw))[0]


def test_no_outputs_and_no_elements() -> None:
    assert orjson.loads(answer()[0])["outputs"] == []
    assert b'"shape":[0,3],"data":[]' in answer(Tensor("y", "FP32", (0, 3), b""))[0]
    assert b'"shape":[],"data":[true]' in answer(Tensor("y", "BOOL", (), b"\x01"))[0]


# --- Answers that repeat -------------------------------------------------------------------------------------------

#: Of 4 bytes each, so that there is a frame, and memory to write on, that the answer before has used.
SMALL: dict[str, list[list[Any]]] = {
    "FP32": [[0.1], [-2.5], [float("nan")], [float("inf")], [3e38]],
    "INT32": [[1], [-2], [2**31 - 1]],
    "UINT16": [[1, 2], [65535, 0]],
    "INT8": [[1, 2, 3, 4], [-1, -2, -3, -128]],
    "BOOL": [[True, False, True, True], [False, False, False, True]],
    "FP16": [[0.5, 2], [float("-inf"), 1]],
}


def expected(tensor: Tensor, version: str, id: str) -> dict[str, Any]:
    output = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
    return {"model_name": "m", "model_version": version} | ({"id": id} if id else {}) | {"outputs": [output]}


@pytest.mark.parametrize("datatype", SMALL)
def test_each_answer_has_its_own_numbers(datatype: str) -> None:
    dtype = DATATYPES[datatype][0]
    for version, id in (("1", ""), ("2", 'a"b'), ("1", ""), ("1", "é")):
        for values in SMALL[datatype] * 2:
            array = np.array(values, dtype)
            tensor = Tensor("y", datatype, array.shape, array.tobytes())
            response = InferenceResponse("m", version, id, [tensor])
            chunks, size = encode_infer(response, outputs=[], binary_default=False)
            assert size is None
            document = json.loads(b"".join(chunks))
            np.testing.assert_array_equal(np.array(document["outputs"][0].pop("data"), dtype), array)
            assert document == expected(tensor, version, id)
            chunks, size = encode_infer(response, outputs=[], binary_default=True)
            document = json.loads(bytes(chunks[0]))
            assert (document["outputs"][0].pop("parameters"), chunks[1]) == ({"binary_data_size": 4}, tensor.data)
            assert (document, size) == (expected(tensor, version, id), len(chunks[0]))


def test_answers_that_differ_in_one_thing() -> None:
    """Each after each: nothing of one is left in another, whether the newest fits or an older one."""
    tensors = [
        Tensor(name, datatype, shape, bytes(count * 8))
        for name in ("y", "z")
        for datatype in ("INT64", "FP64")
        for count, shape in ((2, (2,)), (2, (1, 2)), (2, (2, 1)), (1, (1,)), (0, (0,)), (400, (400,)))
    ]
    tensors += [Tensor("y", "BYTES", (1,), [text]) for text in (b"a", b"bb")]
    answers = [InferenceResponse(model, version, "", [t]) for t in tensors for model, version in ("m1", "m2", "n1")]
    for first in answers[:9] + answers[-6:]:
        for second in answers:
            for binary in (False, True):
                for response in (first, second):
                    chunks, size = encode_infer(response, outputs=[], binary_default=binary)
                    (tensor,) = response.outputs
                    document = json.loads(bytes(chunks[0]))
                    assert (document["model_name"], document["model_version"]) == (response.model, response.version)
                    (entry,) = document["outputs"]
                    shown = entry["name"], entry["datatype"], tuple(entry["shape"])
                    assert shown == (tensor.name, tensor.datatype, tensor.shape)
                    if binary:
                        assert entry["parameters"] == {"binary_data_size": len(chunks[1])}
                        assert size == len(chunks[0])
                    elif isinstance(tensor.data, list):
                        assert entry["data"] == [text.decode() for text in tensor.data]
                    else:
                        assert entry["data"] == [0] * (len(tensor.data) // 8)


def test_a_preference_for_the_one_output() -> None:
    tensor = floats("y", "FP32", 1.5)
    for preference in (None, True, False):
        for default in (True, False):
            wanted = default if preference is None else preference
            for name, binary in (("y", wanted), ("other", default)):
                _, size = answer(tensor, outputs=[RequestedOutput(name, preference)], binary_default=default)
                assert (size is not None) is binary


def test_a_refused_answer_leaves_the_next_one_alone() -> None:
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="'y' has NaN or infinite values"):
            answer(floats("y", "FP32", math.inf, 1), strict_json=True)
        assert json.loads(answer(floats("y", "FP32", 2, 1), strict_json=True)[0])["outputs"][0]["data"] == [2, 1]


def test_answers_are_written_side_by_side() -> None:
    """Large answers leave the loop: small ones of the same kind may be written in several threads at once."""

    def write(number: int) -> set[bytes]:
        tensor = floats("side", "FP32", *range(number, number + 100))
        return {answer(tensor)[0] for _ in range(2000)}

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            for number, written in enumerate(pool.map(write, range(8))):
                (text,) = written
                assert json.loads(text)["outputs"][0]["data"] == list(range(number, number + 100))
    finally:
        sys.setswitchinterval(before)


def test_what_is_kept_of_answers_is_bounded() -> None:
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(6000):
            response = InferenceResponse(f"m{number}", "1", "", [Tensor("y", "FP32", (256,), bytes(1024))])
            encode_infer(response, outputs=[], binary_default=False)
            if number == 2000:
                before, _ = tracemalloc.get_traced_memory()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after < before + 6_000_000
