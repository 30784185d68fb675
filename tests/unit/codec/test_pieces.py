"""Contents read and written in steps are those read and written at once, in as many steps as they are large."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server._pb import inference_pb2 as pb
from server.codec import binary, protobuf
from server.codec import json as json_codec
from server.codec.binary import PIECE_BYTES, PIECE_ELEMENTS, encode_bytes, input_tensor, raw_contents
from server.codec.pieces import SMALL_BODY_BYTES, finish, has_many, unfinished, wire_bytes, wired
from server.codec.process.steps import Steps, at_once
from server.errors import InvalidArgument
from server.types import (
    InferenceRequest,
    InferenceResponse,
    ModelSpec,
    RequestedOutput,
    RequestLimits,
    Tensor,
    TensorSpec,
)

LIMITS = RequestLimits()
MANY = [b"%d" % i for i in range(3 * PIECE_ELEMENTS)]


def request_of(*tensors: Tensor) -> InferenceRequest:
    return InferenceRequest("m", "", "", list(tensors))


def left(wire: bytes, count: int) -> InferenceRequest:
    return request_of(Tensor("x", "BYTES", (count,), memoryview(wire)))


def steps(work: Steps[object]) -> int:
    return sum(1 for _ in work)


def outcome(decode: Callable[[], object]) -> object:
    try:
        return decode()
    except InvalidArgument as error:
        return error.message


def finished(wire: bytes, count: int) -> object:
    request = left(wire, count)
    at_once(finish(request))
    return request.inputs[0].data


# --- requests --------------------------------------------------------------------------------------------------------

#: Elements of sizes that repeat in turn: none, small ones, and some that are longer than the piece they begin in.
sizes = st.lists(
    st.sampled_from([0, 1, 30, 200, SMALL_BODY_BYTES - 4, SMALL_BODY_BYTES, 70_000]), min_size=1, max_size=4
)


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 300))
@example([0], 10_000)
@example([3, 5], PIECE_ELEMENTS)
@example([3, 5], PIECE_ELEMENTS + 1)
@example([PIECE_BYTES + 7, 2], 3)
def test_elements_are_those_decoded_at_once(pattern: list[int], count: int) -> None:
    elements = [bytes([i % 251]) * size for i, size in enumerate(islice(cycle(pattern), count))]
    wire = encode_bytes(elements)
    assert finished(wire, count) == elements
    for damaged in (wire[:-1], wire + b"x", wire[:3], wire[: len(wire) // 2], b"\xff" * len(wire)):
        for wanted in (count, count + 1, max(0, count - 1)):
            expected = outcome(partial(binary.decode_bytes, "x", damaged, wanted))
            assert outcome(partial(finished, damaged, wanted)) == expected


def test_a_step_is_so_many_elements_or_bytes() -> None:
    assert steps(finish(left(encode_bytes(MANY), len(MANY)))) in range(3, 8)
    assert steps(finish(left(encode_bytes([bytes(100_000)] * 100), 100))) >= 10
    assert steps(finish(request_of(Tensor("b", "BOOL", (3 * PIECE_BYTES + 1,), bytes(3 * PIECE_BYTES + 1))))) == 4


def test_more_is_claimed_than_there_is() -> None:
    """It is told before anything is done."""
    with pytest.raises(InvalidArgument, match="4611686018427387904 BYTES elements need at least"):
        next(finish(left(bytes(20_000), 2**62)))


@pytest.mark.parametrize("at", [0, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 4])
def test_a_bool_that_is_none(at: int) -> None:
    data = bytearray(2 * PIECE_BYTES + 5)
    data[at] = 7
    request = request_of(Tensor("b", "BOOL", (len(data),), bytes(data)))
    assert unfinished(request)
    with pytest.raises(InvalidArgument, match="'b': a BOOL byte must be 0 or 1, got 7"):
        at_once(finish(request))


def test_what_is_finished_stays_as_it_is() -> None:
    tensors = [
        Tensor("s", "BYTES", (len(MANY),), MANY),
        Tensor("f", "FP32", (PIECE_BYTES,), bytes(4 * PIECE_BYTES)),
        Tensor("b", "BOOL", (PIECE_BYTES,), b"\7" * PIECE_BYTES),
    ]
    request = request_of(*tensors)
    assert not unfinished(request)
    assert steps(finish(request)) == 0
    assert request.inputs == tensors


@pytest.mark.parametrize(
    ("datatype", "count", "data", "is_left"),
    [
        ("BYTES", PIECE_ELEMENTS, bytes(4 * PIECE_ELEMENTS), False),
        ("BYTES", PIECE_ELEMENTS + 1, bytes(4 * PIECE_ELEMENTS + 4), True),
        ("BYTES", 1, (PIECE_BYTES - 4).to_bytes(4, "little") + bytes(PIECE_BYTES - 4), False),
        ("BYTES", 1, (PIECE_BYTES - 3).to_bytes(4, "little") + bytes(PIECE_BYTES - 3), True),
        ("BOOL", PIECE_BYTES, bytes(PIECE_BYTES), False),
        ("BOOL", PIECE_BYTES + 1, bytes(PIECE_BYTES + 1), True),
        ("INT8", 2 * PIECE_BYTES, bytes(2 * PIECE_BYTES), False),
    ],
)
def test_only_what_is_large_is_left(datatype: str, count: int, data: bytes, is_left: bool) -> None:
    assert unfinished(request_of(input_tensor("x", datatype, (count,), data, whole=False))) == is_left
    assert not unfinished(request_of(input_tensor("x", datatype, (count,), data))) or datatype == "BOOL"


def test_a_small_body_leaves_nothing() -> None:
    count = SMALL_BODY_BYTES // 4
    assert not unfinished(request_of(input_tensor("x", "BYTES", (count,), bytes(SMALL_BODY_BYTES), whole=False)))


# --- every way in ----------------------------------------------------------------------------------------------------


def grpc_body(*, parameter: bool) -> bytes:
    message = pb.ModelInferRequest(model_name="m")
    message.inputs.add(name="x", datatype="BYTES", shape=[len(MANY)])
    message.raw_input_contents.append(encode_bytes(MANY))
    if parameter:  # not for the scan
        message.parameters["p"].bool_param = True
    return message.SerializeToString()


def http_body(datatype: str, raw: bytes, count: int) -> tuple[bytes, int]:
    entry = {"name": "x", "datatype": datatype, "shape": [count], "parameters": {"binary_data_size": len(raw)}}
    text = json.dumps({"inputs": [entry]}).encode()
    return text + raw, len(text)


@pytest.mark.parametrize("parameter", [False, True])
def test_over_grpc(parameter: bool) -> None:
    raw = grpc_body(parameter=parameter)
    request = protobuf.decode_infer(raw, LIMITS, whole=False)
    assert unfinished(request)
    at_once(finish(request))
    assert request == protobuf.decode_infer(raw, LIMITS)
    assert request.inputs[0].data == MANY


def test_behind_json() -> None:
    """Asked again and again: forms that are known by heart do not take what is left for finished."""
    body, size = http_body("BYTES", encode_bytes(MANY), len(MANY))
    for whole in (False, False, False, True, False):
        request = json_codec.decode_infer(body, model="m", version="", limits=LIMITS, json_size=size, whole=whole)
        assert unfinished(request) != whole
        at_once(finish(request))
        assert request.inputs[0].data == MANY


def test_bools_behind_json() -> None:
    good, bad = bytes(PIECE_BYTES + 1), bytes(PIECE_BYTES) + b"\2"
    for data in (good, good, good, bad):
        body, size = http_body("BOOL", data, len(data))
        request = json_codec.decode_infer(body, model="m", version="", limits=LIMITS, json_size=size, whole=False)
        told = outcome(partial(at_once, finish(request)))
        assert told == (None if data is good else "input 'x': a BOOL byte must be 0 or 1, got 2")
    with pytest.raises(InvalidArgument, match="BOOL"):
        json_codec.decode_infer(body, model="m", version="", limits=LIMITS, json_size=size)


def test_without_json() -> None:
    spec = ModelSpec("m", "1", (TensorSpec("x", "BOOL", (-1,)),), ())
    bad = bytes(PIECE_BYTES) + b"\2"
    request = binary.decode_raw(bad, model="m", version="", spec=spec, whole=False)
    assert outcome(lambda: at_once(finish(request))) == "input 'x': a BOOL byte must be 0 or 1, got 2"
    with pytest.raises(InvalidArgument, match="BOOL"):
        binary.decode_raw(bad, model="m", version="", spec=spec)


# --- answers ---------------------------------------------------------------------------------------------------------

OUTPUTS = [
    Tensor("many", "BYTES", (len(MANY),), MANY),
    Tensor("few", "BYTES", (PIECE_ELEMENTS,), MANY[:PIECE_ELEMENTS]),
    Tensor("f", "FP32", (PIECE_ELEMENTS,), bytes(4 * PIECE_ELEMENTS)),
]


def answer(*outputs: Tensor) -> InferenceResponse:
    return InferenceResponse("m", "1", "a", list(outputs), {"p": 1})


@settings(deadline=None, max_examples=20)
@given(sizes, st.integers(PIECE_ELEMENTS + 1, 2 * PIECE_ELEMENTS))
def test_outputs_are_those_encoded_at_once(pattern: list[int], count: int) -> None:
    elements = [bytes([i % 251]) * (size // 100) for i, size in enumerate(islice(cycle(pattern), count))]
    response = answer(Tensor("y", "BYTES", (count,), elements))
    made = at_once(wired(response))
    assert raw_contents(made.outputs[0]) == encode_bytes(elements)
    assert wire_bytes(response.outputs) == wire_bytes(made.outputs) == len(encode_bytes(elements))
    assert response.outputs[0].data is elements
    assert protobuf.encode_infer(made) == protobuf.encode_infer(response)


def test_the_length_of_an_answer_is_that_of_all_its_outputs() -> None:
    assert wire_bytes([]) == 0
    assert wire_bytes(OUTPUTS) == sum(len(raw_contents(output)) for output in OUTPUTS)
    assert wire_bytes([Tensor("y", "BYTES", (2,), [b"", b"abc"]), Tensor("f", "FP32", (1,), bytes(4))]) == 4 + 7 + 4


def test_the_length_of_very_many_elements_is_known_by_a_sample() -> None:
    """Who asks may be the event loop: as many lengths as it has time for are added up."""
    alike = [b"abcd"] * 1_000_003
    estimate = wire_bytes([Tensor("y", "BYTES", (len(alike),), alike)])
    assert abs(estimate - 8 * len(alike)) <= 4 * 40
    mixed = [b"x" * (i % 50) for i in range(300_000)]
    exact = sum(map(len, mixed)) + 4 * len(mixed)
    assert abs(wire_bytes([Tensor("y", "BYTES", (len(mixed),), mixed)]) / exact - 1) < 0.2


def test_an_answer_is_encoded_in_steps() -> None:
    assert steps(wired(answer(*OUTPUTS))) == 3
    long = [bytes(PIECE_BYTES // 2 + 1)] * 6 + [b""] * PIECE_ELEMENTS
    assert steps(wired(answer(Tensor("y", "BYTES", (len(long),), long)))) in range(4, 6)


def test_only_what_has_many_elements() -> None:
    assert has_many(answer(*OUTPUTS))
    assert not has_many(answer(*OUTPUTS[1:]))
    assert not has_many(at_once(wired(answer(*OUTPUTS))))
    assert at_once(wired(answer(*OUTPUTS))).outputs[1:] == OUTPUTS[1:]


def test_only_the_outputs_that_are_named() -> None:
    response = answer(*OUTPUTS)
    assert at_once(wired(response, ["few", "f"])) == response
    made = at_once(wired(response, ["many"]))
    options = {"outputs": [RequestedOutput("many", True)], "binary_default": False}
    assert json_codec.encode_infer(made, **options) == json_codec.encode_infer(response, **options)  # type: ignore[arg-type]
