"""A live server that routes: its folder, its configuration texts, and callers that check every answer they get."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from server._pb import inference_pb2 as pb
from tests.support import models
from tests.support.server import Server, serving
from tests.support.v2 import call, tensor

X = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]
SCALES = {"1": 2.0, "2": 3.0, "3": 5.0}


class Place:
    """A folder with three versions of ``m`` (x times 2, 3, 5), a configuration file and a state folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        self.path = root / "config.yaml"
        for version, scale in SCALES.items():
            models.affine(root / f"v{version}.onnx", scale, 0.0)

    def text(self, more: str, versions: str = "123", stable: str = "1") -> str:
        listed = "\n".join(f'      "{v}": {{source: {self.root}/v{v}.onnx}}' for v in versions)
        return f'apiVersion: tidegate/v1\nmodels:\n  m:\n    versions:\n{listed}\n    stable: "{stable}"\n{more}'

    def write(self, more: str, **fields: str) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(self.text(more, **fields))
        new.rename(self.path)

    def token(self) -> str:
        return (self.state / "admin-token").read_text().strip()

    def serve(self, *more: str) -> Any:
        return serving(str(self.path), "--state-dir", str(self.state), *more)

    def admin(
        self, server: Server, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, dict[str, str]]:
        given = {"Authorization": f"Bearer {self.token()}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return call(server.admin, method, f"/admin/v1/{path}", body, given)

    def apply(self, server: Server, text: str) -> dict[str, Any]:
        """Put a text in force; the answer."""
        status, answer, _ = self.admin(server, "POST", "config", text.encode())
        assert status == 200, answer
        return dict(answer)


def canary(weight: str, candidate: str = "2") -> str:
    return f'    key: {{from: [header:x-user]}}\n    rollout: {{id: r1, candidate: "{candidate}", weight: {weight}}}\n'


def ask(server: Server, user: str) -> tuple[str, str, int]:
    """(version, arm, generation) of one answer; its numbers are checked."""
    status, body, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": X}, {"x-user": user})
    assert status == 200, body
    version = headers["x-tidegate-version"]
    assert body["model_version"] == version
    assert body["outputs"][0]["data"] == [SCALES[version] * x for x in (1, 2, 3, 4)]
    return version, headers["x-tidegate-arm"], int(headers["x-tidegate-generation"])


def ask_grpc(channel: grpc.Channel, user: str) -> str:
    request = pb.ModelInferRequest(model_name="m")
    request.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    request.raw_input_contents.append(np.float32([1, 2, 3, 4]).tobytes())
    infer = channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )
    answer, done = infer.with_call(request, timeout=20, metadata=(("x-user", user),))
    assert dict(done.initial_metadata())["x-tidegate-version"] == answer.model_version
    return str(answer.model_version)


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "the server did not follow"
        time.sleep(0.05)


def shadow_report(place: Place, server: Server) -> dict[str, Any]:
    status, body, _ = place.admin(server, "GET", "shadows")
    assert status == 200
    return dict(body["shadows"][0])
