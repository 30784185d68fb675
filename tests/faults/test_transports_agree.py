"""One corpus of broken and odd requests to both transports: status and body are the same."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from server.types import RequestLimits
from tests.faults.test_malformed_http import VIOLATIONS
from tests.support import hostile
from tests.support.echo import Running, running
from tests.support.http2 import INFER, STREAM_INFER
from tests.support.wire import Answer, Wire, post

LIMITS = RequestLimits(max_body_bytes=256 * 1024, max_chunks=200)
PATH = "/v2/models/affine/infer"
GOOD = {
    "id": "a",
    "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}],
    "outputs": [{"name": "y", "parameters": {"binary_data": False}}],
}


@pytest.fixture(scope="module")
def both() -> Iterator[tuple[Running, Running]]:
    with (
        running(transport="native", limits=LIMITS) as native,
        running(transport="reference", limits=LIMITS) as reference,
    ):
        yield native, reference


def told(server: Running, raw: bytes) -> tuple[int, object, str, str] | None:
    """What matters of the answer to ``raw`` on a connection of its own."""
    with Wire(f"{server.http[0]}:{server.http[1]}") as wire:
        wire.send(raw)
        return essence(wire.answer())


def essence(answer: Answer | None) -> tuple[int, object, str, str] | None:
    if answer is None:
        return None
    headers = answer.headers
    return answer.status, answer.body, headers.get("content-type", ""), headers.get("connection", "")


def bodies() -> Iterator[bytes]:
    yield from (json.dumps(document).encode() for document in hostile.variants(GOOD))
    rng, whole = random.Random(8), json.dumps(GOOD).encode()
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed)


def test_bodies(both: tuple[Running, Running]) -> None:
    wires = [Wire(f"{server.http[0]}:{server.http[1]}") for server in both]
    statuses = set()
    for raw in bodies():
        for wire in wires:
            wire.send(post(PATH, raw))
        native, reference = (essence(wire.answer()) for wire in wires)
        assert native == reference, raw
        assert native is not None
        statuses.add(native[0])
    assert statuses == {200, 400}
    for wire in wires:
        wire.socket.close()


@pytest.mark.parametrize("case", sorted(VIOLATIONS))
def test_violations(both: tuple[Running, Running], case: str) -> None:
    native, reference = (told(server, VIOLATIONS[case]) for server in both)
    assert native == reference


ODD = {
    "no such model": post("/v2/models/nobody/infer", b"{}"),
    "no such version": post("/v2/models/affine/versions/9/infer", b"{}"),
    "bad version": post("/v2/models/affine/versions/x/infer", b"{}"),
    "name not UTF-8": post("/v2/models/%ff/infer", b"{}"),
    "full": post("/v2/models/full/infer", json.dumps(GOOD).encode()),
    "many": post("/v2/models/many/infer", json.dumps(GOOD).encode()),
    "over the limit": post(PATH, b" " * 300_000),
    "declared over the limit": post(PATH, b"", {"Content-Length": "300000"}),
    "bad timeout": post(PATH, b"{}", {"x-tidegate-timeout-ms": "-1"}),
    "bad binary length": post(PATH, b"{}", {"inference-header-content-length": "9"}),
    "raw binary": post(PATH, np.float32([1, 2]).tobytes(), {"inference-header-content-length": "0"}),
    "unknown coding": post(PATH, b"{}", {"Content-Encoding": "br"}),
    "not gzip": post(PATH, b"{}", {"Content-Encoding": "gzip"}),
    "wrong method": b"GET /v2/models/affine/infer HTTP/1.1\r\nHost: t\r\n\r\n",
    "1.0": post(PATH, json.dumps(GOOD).encode(), version="1.0"),
    "close": post(PATH, json.dumps(GOOD).encode(), {"Connection": "close"}),
    "query": post(PATH + "?a=b", json.dumps(GOOD).encode()),
    "empty": post(PATH, b""),
}


@pytest.mark.parametrize("case", sorted(ODD))
def test_odd_requests(both: tuple[Running, Running], case: str) -> None:
    native, reference = (told(server, ODD[case]) for server in both)
    assert native == reference
    assert native is not None


def messages() -> Iterator[bytes]:
    request = pb.ModelInferRequest(model_name="affine", id="a")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    request.raw_input_contents.append(np.float32([1, 2.5]).tobytes())
    whole, rng = request.SerializeToString(), random.Random(9)
    yield from (whole[:length] for length in range(len(whole) + 1))
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed)


def result(channel: grpc.Channel, path: str, raw: bytes) -> Any:
    try:
        if path == STREAM_INFER:
            return list(channel.stream_stream(path)(iter([raw, raw]), timeout=10))
        return channel.unary_unary(path)(raw, timeout=10)
    except grpc.RpcError as error:
        return error.code(), error.details()


@pytest.mark.parametrize("path", [INFER, STREAM_INFER, "/inference.GRPCInferenceService/ModelMetadata", "/a/B"])
def test_messages(both: tuple[Running, Running], path: str) -> None:
    with (
        grpc.insecure_channel("{}:{}".format(*both[0].grpc)) as native,
        grpc.insecure_channel("{}:{}".format(*both[1].grpc)) as reference,
    ):
        for raw in messages():
            told_native, told_reference = result(native, path, raw), result(reference, path, raw)
            if path == "/a/B":  # the texts are of two libraries
                told_native, told_reference = told_native[0], told_reference[0]
            assert told_native == told_reference, raw
