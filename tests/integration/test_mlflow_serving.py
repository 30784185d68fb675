"""Serving the registered models of an MLflow server: a live gateway beside a small server with MLflow's answers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.mlflow_server import Mlflow, running
from tests.support.server import Server, serving
from tests.support.v2 import call, infer, tensor

X = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]
SECRET = "a secret"


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Mlflow]:
    with running() as server:
        for scale in (2, 3):
            server.add("m", {"model.onnx": models.affine(tmp_path / f"{scale}.onnx", scale).read_bytes()})
        server.point("m", "champion", 1)
        yield server


def start(mlflow: Mlflow, root: Path, **keys: Any) -> Any:
    section = {"url": mlflow.url, "webhook_secrets": ["${HOOK}"], **keys}
    config = {"apiVersion": "tidegate/v1", "registry": {"mlflow": section}, "state": {"dir": str(root / "state")}}
    (root / "tidegate.yaml").write_text(json.dumps(config))
    return serving(str(root / "tidegate.yaml"), env={"HOOK": SECRET})


def answered_by(server: Server) -> str:
    status, body = infer(server.http, "m", X)
    return str(body["model_version"]) if status == 200 else f"{status}"


def eventually(server: Server, version: str) -> None:
    until = time.monotonic() + 20
    while answered_by(server) != version:
        assert time.monotonic() < until, "\n".join(server.raw[-20:])
        time.sleep(0.05)


def hint(server: Server, id_: str) -> int:
    stamp = str(int(time.time()))
    code = base64.b64encode(hmac.new(SECRET.encode(), f"{id_}.{stamp}.".encode(), hashlib.sha256).digest()).decode()
    headers = {"X-MLflow-Delivery-Id": id_, "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": f"v1,{code}"}
    address = f"http://{server.admin}/admin/v1/registry/hints"
    with urllib.request.urlopen(urllib.request.Request(address, b"", headers), timeout=10) as answer:
        return int(answer.status)


def test_aliases_lead_and_a_hint_wakes(mlflow: Mlflow, tmp_path: Path) -> None:
    with start(mlflow, tmp_path, poll="1d") as server:
        assert answered_by(server) == "1"
        mlflow.point("m", "champion", 2)
        assert hint(server, "d-1") == 202
        eventually(server, "2")


def test_changed_bytes_never_serve_and_the_index_says_why(mlflow: Mlflow, tmp_path: Path) -> None:
    mlflow.point("m", "challenger", 2)
    with start(mlflow, tmp_path, poll="100ms") as server:
        eventually(server, "1")
        mlflow.point("m", "challenger", None)
        mlflow.tamper("m", 2, "model.onnx", b"other")
        mlflow.point("m", "champion", 2)
        server.wait_for("registry_version_refused", version=2)
        until = time.monotonic() + 20
        rows: dict[str, str] = {}
        while "bytes of m:2 changed" not in rows.get("2", ""):
            assert time.monotonic() < until
            _, index, _ = call(server.http, "POST", "/v2/repository/index", {})
            rows = {row["version"]: row.get("reason", "") for row in index}
        assert answered_by(server) == "1"
        with urllib.request.urlopen(f"http://{server.admin}/admin/v1/registry", timeout=10) as answer:
            standing = json.load(answer)
        assert standing["reachable"]
        assert [row["version"] for row in standing["refused"]] == [2]


def test_a_start_without_mlflow_serves_what_was_followed(mlflow: Mlflow, tmp_path: Path) -> None:
    with start(mlflow, tmp_path) as server:
        assert answered_by(server) == "1"
    mlflow.trouble = lambda _: (503, b"")
    with start(mlflow, tmp_path, poll="200ms") as server:
        assert answered_by(server) == "1"
        server.wait_for("registry_unreachable")
        mlflow.trouble = lambda _: None
        mlflow.point("m", "champion", 2)
        eventually(server, "2")
