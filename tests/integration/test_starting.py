"""From the moment its ports are bound: what is to be served is not ready, and never unknown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.ports import reserved_port
from tests.support.server import PRODUCT_PATH, Server
from tests.support.v2 import call

#: Folders beside the model that the first scan has to look into.
CROWD = 3000


@contextmanager
def starting(*arguments: str) -> Iterator[tuple[Server, str]]:
    """A server that has just been started, and the address that it will have."""
    address = f"127.0.0.1:{reserved_port()}"
    server = Server(*arguments, "--http", address)
    try:
        yield server, address
    finally:
        server.kill()


def is_ready(server: Server) -> bool:
    return any(line.get("event") == "ready" for line in server.lines)


def statuses_until_ready(server: Server, address: str, paths: list[tuple[str, str]]) -> dict[str, set[int]]:
    """What each path was answered from the first answer on until the server was ready."""
    found: dict[str, set[int]] = {path: set() for _, path in paths}
    while not is_ready(server):
        assert server.process.poll() is None, server.raw
        for method, path in paths:
            try:
                found[path].add(call(address, method, path, {} if method == "POST" else None)[0])
            except OSError:
                break  # not bound yet
    return found


def crowded(root: Path) -> Path:
    """A repository that takes a while to be looked at."""
    for number in range(CROWD):
        (root / f"empty{number}").mkdir(parents=True)
    models.identity(root / "wanted" / "1" / "model.onnx")
    models.identity(root / "other" / "1" / "model.onnx")
    return root


@pytest.mark.parametrize("control", ["none", "explicit"])
def test_a_model_of_a_directory_is_never_unknown(tmp_path: Path, control: str) -> None:
    named = ["--load-model", "wanted"] if control == "explicit" else []
    repository = ["--model-repository", str(crowded(tmp_path / "repository")), "--state-dir", str(tmp_path / "state")]
    asked = [
        ("POST", "/v2/models/wanted/infer"),
        ("GET", "/v2/models/wanted/ready"),
        ("POST", "/v2/models/other/versions/1/infer"),
    ]
    with starting(*repository, "--model-control", control, *named) as (server, address):
        found = statuses_until_ready(server, address, asked)
        # A body without inputs: 400 once the model is there.
        assert 503 in found["/v2/models/wanted/infer"] <= {503, 400}
        assert found["/v2/models/other/versions/1/infer"] <= {503, 400}
        assert 503 in found["/v2/models/wanted/ready"] <= {503, 200}
        assert call(address, "POST", "/v2/models/nobody/infer", {})[0] == 404


def test_who_reads_the_log_late_is_told_that_it_is_ready(tmp_path: Path) -> None:
    """A repository with more to say of than a pipe holds. After ``ready`` no line follows that could bring it along."""
    address = f"127.0.0.1:{reserved_port()}"
    command = [sys.executable, "-m", "server", "serve", "--model-repository", str(crowded(tmp_path / "repository"))]
    command += ["--state-dir", str(tmp_path / "state"), "--http", address]
    for flag in ("--grpc", "--metrics", "--admin"):
        command += [flag, "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        ended = threading.Timer(120, process.kill)
        ended.start()
        try:
            while process.poll() is None and not answers_ready(address):
                pass
            assert process.stderr is not None
            events = []
            for line in process.stderr:
                events.append(json.loads(line)["event"])
                if events[-1] == "ready":
                    break
        finally:
            ended.cancel()
            process.kill()
    assert Counter(events) == {"model_refused": CROWD, "model_loading": 2, "model_ready": 2, "ready": 1}


def answers_ready(address: str) -> bool:
    try:
        return call(address, "GET", "/v2/health/ready")[0] == 200
    except OSError:
        return False  # not bound yet


def test_an_alias_is_not_ready_while_its_model_loads(tmp_path: Path) -> None:
    models.slow(tmp_path / "m.onnx")
    config = tmp_path / "config.yaml"
    config.write_text("apiVersion: tidegate/v1\nmodels: {m: {source: m.onnx, aliases: [also]}}\n")
    names = ["m", "also"]
    asked = [("POST", f"/v2/models/{name}/infer") for name in names] + [("GET", "/v2/health/ready")]
    with starting(str(config), "--state-dir", str(tmp_path / "state")) as (server, address):
        found = statuses_until_ready(server, address, asked)
        for name in names:
            assert 503 in found[f"/v2/models/{name}/infer"] <= {503, 400}
        server.wait_ready()
        with grpc.insecure_channel(server.grpc) as channel:
            ready = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelReady",
                request_serializer=pb.ModelReadyRequest.SerializeToString,
                response_deserializer=pb.ModelReadyResponse.FromString,
            )
            assert ready(pb.ModelReadyRequest(name="also"), timeout=30).ready
