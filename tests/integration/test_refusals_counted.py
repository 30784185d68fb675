"""A client that is told of nothing but errors leaves traces: what cannot be read is counted like what has no room."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest

from tests.support import http2, models
from tests.support.metrics import samples
from tests.support.server import Server, serving
from tests.support.v2 import tensor
from tests.support.wire import Wire, post

PATH = "/v2/models/affine/infer"
GOOD = json.dumps({"inputs": [tensor("x", "FP32", [1, 4], [1.0] * 4)]}).encode()
SHAPE = json.dumps({"inputs": [tensor("x", "FP32", [1, 4], [1.0] * 3)]}).encode()


@pytest.fixture(scope="module", params=["native", "reference"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("models")
    models.affine(root / "affine" / "1" / "model.onnx")
    (root / "tidegate.yaml").write_text("apiVersion: tidegate/v1\nserver: {limits: {max_body: 64KiB}}\n")
    args = [str(root / "tidegate.yaml"), "--model-repository", str(root), "--state-dir", str(root / "state")]
    with serving(*args, "--transport", request.param) as running:
        yield running


def refused(server: Server) -> dict[str, float]:
    """Refusals by reason, where there are any."""
    return {key: value for key, value in samples(server, "tidegate_rejected_total").items() if value}


def grown(server: Server, before: dict[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0) for key, value in refused(server).items() if value != before.get(key, 0)}


def of(reason: str, count: int) -> dict[str, float]:
    return {f'{{reason="{reason}"}}': count}


@pytest.mark.parametrize(
    ("request_bytes", "status", "reason"),
    [
        (post(PATH, b"{"), 400, "invalid_argument"),
        (post(PATH, SHAPE), 400, "invalid_argument"),
        (post("/v2/models/affine/versions/x/infer", GOOD), 400, "invalid_argument"),
        (post(PATH, GOOD, {"X-Tidegate-Timeout-Ms": "soon"}), 400, "invalid_argument"),
        (post(PATH, GOOD, {"Inference-Header-Content-Length": "x"}), 400, "invalid_argument"),
        (post(PATH, GOOD, {"Content-Encoding": "gzip"}), 400, "invalid_argument"),
        (post(PATH, b" " * 70_000), 413, "payload_too_large"),
        (post("/v2/models/nobody/infer", GOOD), 404, "model_not_found"),
    ],
)
def test_over_http(server: Server, request_bytes: bytes, status: int, reason: str) -> None:
    before = refused(server)
    for _ in range(3):  # known by its head and form from the second on, where it is known at all
        with Wire(server.http) as wire:
            wire.send(request_bytes)
            answer = wire.answer()
            assert answer is not None
            assert answer.status == status
    assert grown(server, before) == of(reason, 3)


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\xff"])
def test_over_grpc(server: Server, message: bytes) -> None:
    before = refused(server)
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(http2.INFER)
        for _ in range(3):
            with pytest.raises(grpc.RpcError) as raised:
                infer(message, timeout=30)
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert grown(server, before) == of("invalid_argument", 3)


def test_messages_of_a_stream(server: Server) -> None:
    before = refused(server)
    with grpc.insecure_channel(server.grpc) as channel:
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        answers = list(stream(iter([b"\xff", b"\xff"]), timeout=30))
    assert len(answers) == 2
    assert grown(server, before) == of("invalid_argument", 2)


def test_what_is_answered_is_no_refusal(server: Server) -> None:
    before = refused(server)
    with Wire(server.http) as wire:
        for _ in range(3):
            wire.send(post(PATH, GOOD))
            answer = wire.answer()
            assert answer is not None
            assert answer.status == 200
    assert grown(server, before) == {}
