"""A version that another server has: routed to like any other, hidden by a fallback while it is gone, back on its own.

Two real processes: ``upstream`` serves a file (x times 3), the gateway has that as version 2 beside a file of its own
(x times 2).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.ports import reserved_port
from tests.support.server import Server, serving
from tests.support.v2 import call, infer, tensor

X = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]
SCALES = {"1": 2.0, "2": 3.0}
USERS = [f"user-{n}" for n in range(24)]


class Place:
    """Both models, and the folders that the two servers need."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.own = models.affine(root / "own.onnx", SCALES["1"], 0.0)
        self.others = models.affine(root / "others.onnx", SCALES["2"], 0.0)

    def upstream(self, *more: str) -> Any:
        return serving(str(self.others), "--state-dir", str(self.root / "upstream-state"), *more)

    def gateway(self, address: str) -> Any:
        path = self.root / "config.yaml"
        path.write_text(
            "apiVersion: tidegate/v1\nmodels:\n  m:\n    versions:\n"
            f'      "1": {{source: {self.own}}}\n'
            f'      "2": {{upstream: {{url: "http://{address}", model: others, timeout: 5s, '
            'headers: {x-token: "${TOKEN}"}}}\n'
            '    stable: "1"\n'
            "    key: {from: [header:x-user]}\n"
            '    rollout: {id: r, candidate: "2", weight: 50%, control: all}\n'
            "    resilience: {fallback: stable}\n"
        )
        return serving(str(path), "--state-dir", str(self.root / "state"), env={"TOKEN": "t0ken"})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def ask(server: Server, user: str) -> tuple[str, str]:
    """(version, arm) of one answer, whose numbers are that version's."""
    status, body, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": user})
    assert status == 200, body
    assert body["outputs"][0]["data"] == [SCALES[body["model_version"]] * x for x in (1, 2, 3, 4)]
    return body["model_version"], headers["x-tidegate-arm"]


def ask_grpc(server: Server, **fields: str) -> pb.ModelInferResponse:
    request = pb.ModelInferRequest(model_name="m", **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.float32([1, 2, 3, 4]).tobytes())
    with grpc.insecure_channel(server.grpc) as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        return infer(request, timeout=20)


def index(server: Server) -> dict[str, tuple[str, str]]:
    """(state, reason) of each version."""
    status, rows, _ = call(server.http, "POST", "/v2/repository/index", {})
    assert status == 200
    return {row["version"]: (row["state"], row["reason"]) for row in rows}


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.02)


class Traffic:
    """Clients that ask without a pause, each user in turn, and remember every (version, arm) and every failure."""

    def __init__(self, server: Server) -> None:
        self.seen: list[tuple[str, str]] = []
        self.failures: list[BaseException] = []
        self._server = server
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(3)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(30)

    def more(self, answers: int) -> None:
        """Wait until so many more have come (or one client has failed)."""
        goal = len(self.seen) + answers
        eventually(lambda: len(self.seen) >= goal or bool(self.failures))

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                for user in USERS:
                    self.seen.append(ask(self._server, user))
        except BaseException as error:
            self.failures.append(error)


def test_an_upstream_is_a_version_like_any_other(place: Place) -> None:
    with place.upstream() as upstream, place.gateway(upstream.http) as server:
        status, body = infer(server.http, "m", X, version="2")
        assert (status, body["model_version"], body["outputs"][0]["data"]) == (200, "2", [3, 6, 9, 12])
        answer = ask_grpc(server, model_version="2")
        assert answer.model_version == "2"
        assert np.frombuffer(answer.raw_output_contents[0], "<f4").tolist() == [3, 6, 9, 12]
        _, metadata, _ = call(server.http, "GET", "/v2/models/m/versions/2")
        assert metadata["platform"] == "tidegate_upstream"
        arms = {ask(server, user) for user in USERS}
        assert arms == {("1", "stable"), ("2", "candidate")}
        assert "t0ken" not in "\n".join(server.raw)
        server.terminate()
        assert server.wait() == 0


def test_an_upstream_that_hangs_holds_nobody_else_up(place: Place) -> None:
    with place.upstream() as upstream, place.gateway(upstream.http) as server, ThreadPoolExecutor(1) as pool:
        for _ in range(50):  # short runs, as a batcher that takes those onto the loop would learn
            assert infer(server.http, "m", X, version="2")[0] == 200
        os.kill(upstream.process.pid, signal.SIGSTOP)
        stuck = pool.submit(infer, server.http, "m", X, "2")
        for _ in range(50):
            assert infer(server.http, "m", X, version="1")[0] == 200
        assert not stuck.done()
        os.kill(upstream.process.pid, signal.SIGCONT)
        assert stuck.result(20)[0] == 200


def test_no_client_notices_the_end_of_an_upstream_and_its_return_is_used(place: Place) -> None:
    address = f"127.0.0.1:{reserved_port()}"  # while nobody serves there it is nobody else's
    with place.upstream("--http", address) as upstream, place.gateway(address) as server:
        theirs = [user for user in USERS if ask(server, user)[0] == "2"]
        with Traffic(server) as traffic:
            traffic.more(100)
            upstream.kill()
            traffic.more(300)
        assert not traffic.failures
        assert traffic.seen[-1][0] == "1"
        assert {("1", "stable"), ("2", "candidate")} <= set(traffic.seen)
        assert {ask(server, user)[0] for user in theirs} == {"1"}
        status, body = infer(server.http, "m", X, version="2")
        assert (status, "cannot be reached" in body["error"]) == (503, True)
        with pytest.raises(grpc.RpcError) as caught:
            ask_grpc(server, model_version="2")
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        with place.upstream("--http", address):
            eventually(lambda: {ask(server, user)[0] for user in theirs} == {"2"})
            assert infer(server.http, "m", X, version="2")[0] == 200


def test_an_upstream_that_is_down_at_start_spoils_its_own_version_only(place: Place) -> None:
    address = f"127.0.0.1:{reserved_port()}"
    with place.gateway(address) as server:
        assert {ask(server, user) for user in USERS} == {("1", "stable")}
        assert index(server)["1"] == ("READY", "")
        assert index(server)["2"] == ("UNAVAILABLE", "The upstream of model 'm' version '2' cannot be reached.")
        status, body = infer(server.http, "m", X, version="2")
        assert status == 404, body
        with place.upstream("--http", address):
            os.kill(server.process.pid, signal.SIGHUP)
            eventually(lambda: index(server)["2"][0] == "READY")
            assert {ask(server, user)[0] for user in USERS} == {"1", "2"}
