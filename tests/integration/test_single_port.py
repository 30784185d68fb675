"""``--single-port``: one address for every protocol of inference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grpc
import numpy as np

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.http2 import INFER
from tests.support.server import ROOT, Server
from tests.support.wire import Wire, post


def test_one_address_answers_both(tmp_path: Path) -> None:
    models.affine(tmp_path / "models" / "affine" / "1" / "model.onnx")
    folder, state = str(tmp_path / "models"), str(tmp_path / "state")
    server = Server("--model-repository", folder, "--state-dir", state, "--transport", "native", "--single-port")
    try:
        ready = server.wait_for("ready")
        assert set(ready) & {"http", "grpc"} == {"http"}
        request = pb.ModelInferRequest(model_name="affine")
        request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
        request.raw_input_contents.append(np.ones(4, "<f4").tobytes())
        with grpc.insecure_channel(ready["http"]) as channel:
            raw = channel.unary_unary(INFER)(request.SerializeToString(), timeout=30)
        assert np.frombuffer(pb.ModelInferResponse.FromString(raw).raw_output_contents[0], "<f4").tolist() == [3.0] * 4
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
        with Wire(ready["http"]) as wire:
            wire.send(post("/v2/models/affine/infer", json.dumps(body).encode()))
            answer = wire.answer()
            assert answer is not None
            assert answer.body["outputs"][0]["data"] == [3.0] * 4
        server.terminate()
        assert server.wait() == 0
    finally:
        server.kill()


def test_the_reference_transport_needs_two() -> None:
    command = [sys.executable, "-m", "server", "serve", "--transport", "reference", "--single-port"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert told.returncode != 0
    assert "--single-port needs --transport native" in told.stderr
