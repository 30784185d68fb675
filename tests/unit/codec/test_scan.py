"""Which messages the scan takes, and which it leaves to protobuf."""

from __future__ import annotations

from typing import Any

import pytest

from server._pb import inference_pb2 as pb
from server.codec import scan as module
from server.codec.protobuf import decode_message
from server.codec.scan import scan
from server.types import RequestLimits

LIMITS = RequestLimits()


def message(**changes: Any) -> pb.ModelInferRequest:
    fields: dict[str, Any] = {
        "model_name": "m",
        "id": "1",
        "inputs": [{"name": "x", "datatype": "INT8", "shape": [2]}],
        "raw_input_contents": [b"ab"],
    }
    return pb.ModelInferRequest(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_version": "3", "outputs": [{"name": "y"}, {"name": "z"}]},
        {"inputs": [{"name": n, "datatype": "INT8", "shape": [1]} for n in "ab"], "raw_input_contents": [b"a", b"b"]},
        {"inputs": [{"name": "x", "datatype": "INT8", "shape": [70_000]}], "raw_input_contents": [b"a" * 70_000]},
        {
            "inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}],
            "raw_input_contents": [b"\x01\x00\x00\x00a"],
        },
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [0]}], "raw_input_contents": [b""]},
    ],
)
def test_ordinary_requests_are_taken(changes: dict[str, Any]) -> None:
    raw = message(**changes).SerializeToString()
    for _ in range(2):  # the second time from the cache
        taken = scan(raw, LIMITS)
        assert taken is not None
        assert taken == decode_message(raw, LIMITS)


# --- messages that begin like one before ------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {},
    {"model_version": "3"},
    {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4]}], "raw_input_contents": [b"0123456789abcdef"]},
    {"inputs": [{"name": "x", "datatype": "BOOL", "shape": [2]}], "raw_input_contents": [b"\x00\x01"]},
    {"inputs": [{"name": "x", "datatype": "INT8", "shape": [300]}], "raw_input_contents": [b"z" * 300]},
    {"outputs": [{"name": "y"}]},
    {"id": "a"},
]


def same_or_left(raw: bytes) -> bool:
    """Whether the scan takes a message, and then as protobuf does."""
    taken = scan(raw, LIMITS)
    if taken is None:
        return False
    assert taken == decode_message(raw, LIMITS)
    return True


@pytest.mark.parametrize("changes", FORMS)
def test_what_differs_from_a_known_message_is_not_taken_for_it(changes: dict[str, Any]) -> None:
    raw = message(**({"id": ""} | changes)).SerializeToString()
    for position in range(min(len(raw), 80)):
        for byte in (0, 1, 2, 0x0A, 0x1A, 0x2A, 0x3A, 0x7F, 0x80, 0xFF, raw[position] ^ 1, raw[position] + 1 & 0xFF):
            assert same_or_left(raw)  # known again, whatever came meanwhile
            same_or_left(raw[:position] + bytes([byte]) + raw[position + 1 :])
            same_or_left(raw[:position] + bytes([byte]) + raw[position:])
        same_or_left(raw[:position])
        same_or_left(raw[:position] + raw[position + 1 :])
        same_or_left(raw[:position] + raw[position:] + raw[:position])


def test_each_message_has_its_own_contents() -> None:
    for contents in (b"ab", b"cd", b"\xff\x00", b"ab"):
        assert same_or_left(message(id="", raw_input_contents=[contents]).SerializeToString())


def test_contents_before_other_fields_are_no_end() -> None:
    """Fields may come in any order; the last one is then no contents."""
    head = message(id="", raw_input_contents=[]).SerializeToString()
    early = b"\x3a\x02ab" + head
    for raw in (early, early.replace(b"ab", b"cd")):
        assert same_or_left(raw)


def test_a_known_message_is_held_against_other_limits_anew() -> None:
    raw = message(id="").SerializeToString()
    assert scan(raw, LIMITS) is not None
    assert scan(raw, RequestLimits(max_inputs=0)) is None


def test_what_is_known_is_bounded() -> None:
    for size in range(1, 1000):
        changes = {"inputs": [{"name": "x", "datatype": "INT8", "shape": [size]}], "raw_input_contents": [b"a" * size]}
        assert same_or_left(message(id="", **changes).SerializeToString())
    assert len(module._forms) <= 256


def test_a_name_that_is_long_is_read_each_time() -> None:
    raw = message(id="", model_name="m" * 2000).SerializeToString()
    for _ in range(2):
        taken = scan(raw, LIMITS)
        assert taken is None or taken == decode_message(raw, LIMITS)
    assert len(raw) not in module._forms


def test_large_contents_are_views() -> None:
    changes = {"inputs": [{"name": "x", "datatype": "INT8", "shape": [9_000]}], "raw_input_contents": [b"a" * 9_000]}
    raw = message(id="", **changes).SerializeToString()
    for _ in range(2):
        taken = scan(raw, LIMITS)
        assert taken is not None
        assert isinstance(taken.inputs[0].data, memoryview)


def test_contents_are_views() -> None:
    raw = message().SerializeToString()
    taken = scan(raw, LIMITS)
    assert taken is not None
    data = taken.inputs[0].data
    assert isinstance(data, memoryview)
    assert data.obj is raw


CONTENTS = {"name": "x", "datatype": "INT8", "shape": [2], "contents": {"int_contents": [1, 2]}}


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"a": pb.InferParameter(int64_param=1)}},
        {"inputs": [CONTENTS], "raw_input_contents": []},
        {"inputs": [CONTENTS]},
        {"inputs": [{"name": "x", "datatype": "INT8", "shape": [3]}]},
        {"inputs": [{"name": "x", "datatype": "INT7", "shape": [2]}]},
        {"inputs": [{"name": "x", "datatype": "INT8", "shape": [-2]}]},
        {"inputs": [{"name": "", "datatype": "INT8", "shape": [2]}]},
        {"inputs": [{"name": "x" * 2000, "datatype": "INT8", "shape": [2]}]},
        {"inputs": [{"name": "x", "datatype": "INT8", "shape": [2]}] * 2, "raw_input_contents": [b"ab"] * 2},
        {"outputs": [{"name": "y"}] * 2},
        {"outputs": [{"name": "y", "parameters": {"classification": pb.InferParameter(int64_param=1)}}]},
        {"raw_input_contents": []},
        {"raw_input_contents": [b"ab", b"ab"]},
        {"id": "x" * 5000},
    ],
)
def test_others_are_left(changes: dict[str, Any]) -> None:
    assert scan(message(**changes).SerializeToString(), LIMITS) is None


def test_limits_are_kept() -> None:
    raw = message(inputs=[{"name": "x", "datatype": "INT8", "shape": [2, 1, 1]}]).SerializeToString()
    assert scan(raw, LIMITS) is not None
    assert scan(raw, RequestLimits(max_dims=2)) is None
    two = message(outputs=[{"name": "y"}, {"name": "z"}]).SerializeToString()
    assert scan(two, RequestLimits(max_outputs=1)) is None


def test_repeated_and_unknown_fields_are_left() -> None:
    raw = message().SerializeToString()
    assert scan(raw + b"\x0a\x01n", LIMITS) is None  # a second model name
    assert scan(raw + b"\x42\x01n", LIMITS) is None  # field 8
    assert scan(raw + b"\x40\x01", LIMITS) is None  # field 8 as a varint
    assert scan(raw[:-1], LIMITS) is None
    assert scan(raw + b"\x3a", LIMITS) is None
    assert scan(raw + b"\x3a\xff\xff\xff\xff\xff\x01", LIMITS) is None
    assert scan(b"\x0a\x01\xff" + message(model_name="").SerializeToString(), LIMITS) is None
    assert scan(b"", LIMITS) is None
