"""Serving the registered models of an MLflow server: a live gateway beside a small server with MLflow's answers."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper

from server.state import open_state
from tests.support import models
from tests.support.mlflow_server import Asked, Mlflow, running
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
    with urllib.request.urlopen(urllib.request.Request(address, b"", headers), timeout=30) as answer:
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
        with urllib.request.urlopen(f"http://{server.admin}/admin/v1/registry", timeout=30) as answer:
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


LISTING, DOWNLOAD = "/mlflow-artifacts/artifacts", "/artifacts/model.onnx"
MIB = 2**20


def outside(path: Path) -> bytes:
    """A graph whose weights are said to lie in a file far above its folder."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../../../../../etc/passwd")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path.read_bytes()


def attacks(root: Path) -> dict[str, tuple[bytes, Callable[[Asked], Any], str]]:
    """Model -> the graph of its version 2, what MLflow answers instead, and the words of the refusal."""
    good = models.affine(root / "good.onnx", 3).read_bytes()

    def listed(**row: Any) -> Callable[[Asked], Any]:
        rows = [{"path": "model.onnx", "is_dir": False, "file_size": len(good)} | row]
        return lambda asked: (200, {"files": rows}) if asked.path.endswith(LISTING) else None

    def sent(raw: bytes) -> Callable[[Asked], Any]:
        return lambda asked: (0, raw) if asked.path.endswith(DOWNLOAD) else None

    head = b"HTTP/1.1 200 OK\r\n"
    bomb = gzip.compress(bytes(64 * MIB))
    packed = head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb
    return {
        "shrunk": (good, sent(head + b"Content-Length: 9\r\n\r\n" + good[:9]), "bytes and came with 9"),
        "swapped": (good, sent(head + b"Content-Length: 0\r\n\r\n"), "bytes and came with 0"),
        "traversal": (good, listed(path="../../../state/tidegate.db"), "leads elsewhere"),
        "absolute": (good, listed(path="/etc/passwd"), "leads elsewhere"),
        "huge": (good, listed(file_size=1 << 50), "at most 1048576 are taken"),
        "endless": (good, sent(head + b"\r\n" + bytes(2 * MIB)), "more than the 1048576 bytes"),
        "bomb": (good, sent(packed), "and came with"),
        "outside": (outside(root / "outside.onnx"), lambda _: None, "etc/passwd"),
        "garbage": (b"no graph at all", lambda _: None, "model.onnx"),
    }


def test_whatever_is_done_to_artifacts_the_champion_goes_on_serving(tmp_path: Path) -> None:
    found = attacks(tmp_path)
    first = models.affine(tmp_path / "first.onnx", 2).read_bytes()
    with running() as mlflow:
        for name, (graph, _, _) in found.items():
            for content in (first, graph):
                mlflow.add(name, {"model.onnx": content})
            mlflow.point(name, "champion", 1)

        def trouble(asked: Asked) -> Any:
            place = asked.query.get("path", "") + asked.path
            name = next((name for name in found if f"/m-{name}-2/" in place), None)
            return None if name is None else found[name][1](asked)

        mlflow.trouble = trouble
        with start(mlflow, tmp_path, poll="100ms", max_file="1MiB", max_version="1MiB") as server:
            for name in found:
                mlflow.point(name, "champion", 2)
            reasons: dict[str, str] = {}
            until = time.monotonic() + 40
            while not all(words in reasons.get(name, "") for name, (_, _, words) in found.items()):
                assert time.monotonic() < until, reasons
                time.sleep(0.1)
                _, index, _ = call(server.http, "POST", "/v2/repository/index", {})
                reasons = {row["name"]: row.get("reason", "") for row in index if row["version"] == "2"}
            for name in found:
                status, body = infer(server.http, name, X)
                assert (status, body["model_version"]) == (200, "1"), (name, body)
                assert body["outputs"][0]["data"] == [3, 5, 7, 9]
    state = open_state(tmp_path / "state")
    try:
        audited = {row.event.subject for row in state.audit.tail(1000) if row.event.action.endswith(".refused")}
        assert audited >= {f"{name}:2" for name in found}
    finally:
        state.close()
