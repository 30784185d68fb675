"""Which messages the scan takes, and which it leaves to protobuf."""

from __future__ import annotations

from typing import Any

import pytest

from server._pb import inference_pb2 as pb
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
