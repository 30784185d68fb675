"""Connections of an age are asked to end; a gRPC client opens the next one and loses no call."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.server import serving

INFER = "/inference.GRPCInferenceService/ModelInfer"
#: Far more calls than fit into the age that the server is told.
MOST_CALLS = 200_000


@pytest.mark.parametrize("transport", ["native", "reference"])
def test_calls_go_on_over_connections_that_end(tmp_path: Path, transport: str) -> None:
    models.affine(tmp_path / "models" / "affine" / "1" / "model.onnx")
    config = tmp_path / "tidegate.yaml"
    config.write_text(
        "apiVersion: tidegate/v1\n"
        f"server: {{transport: {transport}, connections: {{max_age: 1s}}}}\n"
        f"state: {{dir: {tmp_path / 'state'}}}\n"
        f"registry: {{directory: {tmp_path / 'models'}}}\n"
    )
    request = pb.ModelInferRequest(model_name="affine")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.arange(4, dtype="<f4").tobytes())
    message = request.SerializeToString()
    ended, was_ready = threading.Event(), threading.Event()

    def seen(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            was_ready.set()
        elif was_ready.is_set():
            ended.set()

    with (
        serving(str(config), "--transport", transport) as server,
        grpc.insecure_channel(server.grpc) as channel,
    ):
        channel.subscribe(seen)
        infer = channel.unary_unary(INFER)
        calls = after = 0
        while calls < MOST_CALLS and after < 20:
            answer = pb.ModelInferResponse.FromString(infer(message, timeout=30, wait_for_ready=True))
            assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [1.0, 3.0, 5.0, 7.0]
            calls += 1
            after += ended.is_set()
        assert ended.is_set(), f"{calls} calls went over one connection"
