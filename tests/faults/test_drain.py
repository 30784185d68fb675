"""SIGTERM under load: every call that the server took is answered, on both protocols, and the process exits 0."""

from __future__ import annotations

import http.client
import json
import threading
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.metrics import wait_total
from tests.support.server import Server, serving
from tests.support.upstream import Rows, scaled, upstream
from tests.support.wire import Wire, post

CALLERS = 8
#: Turns of a run that takes far longer than the process has.
ENDLESS = 1_000_000
BEFORE_SIGNAL = 40


class HttpCaller(threading.Thread):
    """Calls over one keep-alive connection until the server says no; counts what came of each call."""

    def __init__(self, server: Server, tally: Counter[str], warm: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.server, self.tally, self.warm = server, tally, warm

    def run(self) -> None:
        host, _, port = self.server.http.rpartition(":")
        body = json.dumps({"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [3]}]})
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        while True:
            try:
                connection.connect()
            except ConnectionRefusedError:
                self.tally["refused"] += 1
                return
            try:
                while True:
                    connection.request("POST", "/v2/models/slow/infer", body)
                    response = connection.getresponse()
                    answer = json.loads(response.read())
                    self.tally["ok" if response.status == 200 else f"{response.status} {answer}"] += 1
                    self.warm.release()
                    if response.will_close:
                        break
            except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError) as error:
                self.tally[f"lost {type(error).__name__}"] += 1
                return
            finally:
                connection.close()


class GrpcCaller(threading.Thread):
    """As HttpCaller, over one channel; a call that finds nobody listening is refused, not lost."""

    def __init__(self, server: Server, tally: Counter[str], warm: threading.Semaphore) -> None:
        super().__init__(daemon=True)
        self.server, self.tally, self.warm = server, tally, warm

    def run(self) -> None:
        request = pb.ModelInferRequest(model_name="slow")
        request.inputs.add(name="x", datatype="FP32", shape=[1, 1])
        request.raw_input_contents.append(np.float32([3]).tobytes())
        with grpc.insecure_channel(self.server.grpc) as channel:
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=pb.ModelInferRequest.SerializeToString,
                response_deserializer=pb.ModelInferResponse.FromString,
            )
            while True:
                try:
                    call(request, timeout=30)
                except grpc.RpcError as error:
                    refused = error.code() is grpc.StatusCode.UNAVAILABLE and "refused" in str(error.details())
                    self.tally["refused" if refused else f"lost {error.code()} {error.details()}"] += 1
                    return
                self.tally["ok"] += 1
                self.warm.release()


TRANSPORTS = pytest.mark.parametrize("transport", ["native", "reference"])


def on(transport: str, root: Path) -> AbstractContextManager[Server]:
    options = ("--model-repository", str(root / "models"), "--state-dir", str(root / "state"))
    return serving(*options, "--transport", transport)


@TRANSPORTS
@pytest.mark.parametrize("caller", [HttpCaller, GrpcCaller])
def test_no_call_is_lost(caller: type[HttpCaller] | type[GrpcCaller], transport: str, tmp_path: Path) -> None:
    models.slow_scalar(tmp_path / "models" / "slow" / "1" / "model.onnx", size=256, layers=8)
    with on(transport, tmp_path) as server:
        tally: Counter[str] = Counter()
        warm = threading.Semaphore(0)
        callers = [caller(server, tally, warm) for _ in range(CALLERS)]
        for thread in callers:
            thread.start()
        for _ in range(BEFORE_SIGNAL):
            assert warm.acquire(timeout=30)
        server.terminate()
        assert server.wait() == 0
        for thread in callers:
            thread.join(30)
            assert not thread.is_alive()
    assert tally["ok"] >= BEFORE_SIGNAL
    assert set(tally) <= {"ok", "refused"}, tally


def endless(path: Path, size: int = 256) -> None:
    """``y`` is the mean of a matrix multiplied ``n[0]`` times by a matrix: a run as long as its caller wants."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("MatMul", ["v", "w"], ["product"]),
            helper.make_node("Identity", ["product"], ["next"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, [size, size]),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, [size, size]),
        ],
    )
    models.save(
        path,
        [
            helper.make_node("Squeeze", ["n", "axis"], ["turns"]),
            helper.make_node("Loop", ["turns", "yes", "w"], ["last"], body=body),
            helper.make_node("ReduceMean", ["last"], ["y"], axes=[0, 1], keepdims=0),
        ],
        [("n", TensorProto.INT64, [1])],
        [("y", TensorProto.FLOAT, [])],
        {"axis": np.array([0]), "yes": np.array(True), "w": np.eye(size, dtype=np.float32)},
    )


@TRANSPORTS
def test_readiness_goes_off_first_and_in_flight_is_answered(transport: str, tmp_path: Path) -> None:
    """What is in flight takes until readiness was seen to be off: its version is another server's, which waits."""
    asked, go = threading.Event(), threading.Event()

    def held(x: Rows) -> bytes:
        asked.set()
        go.wait(60)
        return scaled(2)(x)

    config = tmp_path / "tidegate.yaml"
    options = (str(config), "--state-dir", str(tmp_path / "state"), "--transport", transport)
    with upstream(scaled(2)) as far:
        version = f'"1": {{upstream: {{url: "http://{far.address}", model: m, timeout: 60s}}}}'
        config.write_text(f"apiVersion: tidegate/v1\nmodels: {{far: {{versions: {{{version}}}}}}}\n")
        with serving(*options) as server:
            far.behave = held
            host, _, port = server.http.rpartition(":")
            probe = http.client.HTTPConnection(host, int(port), timeout=30)
            probe.request("GET", "/v2/health/ready")
            assert probe.getresponse().read() == b'{"ready":true}'
            call = http.client.HTTPConnection(host, int(port), timeout=60)
            data = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
            call.request("POST", "/v2/models/far/infer", json.dumps(data))
            assert asked.wait(30)
            server.terminate()
            server.wait_for("draining")
            probe.request("GET", "/v2/health/ready")
            answer = probe.getresponse()
            assert (answer.status, json.loads(answer.read())) == (503, {"ready": False})
            go.set()
            answered = call.getresponse()
            assert answered.status == 200
            assert json.loads(answered.read())["outputs"][0]["data"] == [2, 4, 6, 8]
            assert server.wait() == 0


def test_a_run_that_hangs_does_not_break_the_end(tmp_path: Path) -> None:
    """It is left behind in the middle of native code, and the process ends as it would without it."""
    endless(tmp_path / "repository" / "endless" / "1" / "model.onnx")
    options = ("--model-repository", str(tmp_path / "repository"), "--state-dir", str(tmp_path / "state"))
    with serving(*options, "--drain-seconds", "0") as server, Wire(server.http) as wire:
        body = {"inputs": [{"name": "n", "shape": [1], "datatype": "INT64", "data": [ENDLESS]}]}
        wire.send(post("/v2/models/endless/infer", json.dumps(body).encode()))
        wait_total(server, "tidegate_requests_in_flight", 1)
        server.terminate()
        server.wait_for("engine_left_open")
        assert server.wait() == 0
        assert server.lines[-1]["event"] == "stopped"
