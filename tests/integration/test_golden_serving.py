"""Golden requests from outside: a version with wrong answers never serves, and what served before goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import models
from tests.support.server import PRODUCT_PATH, Server, serving
from tests.support.v2 import call, infer, tensor

X = [tensor("x", "FP32", [1, 4], [1, 2, 3, 4])]


def golden(path: Path, scale: float) -> Path:
    """Requests whose right answers are ``scale`` times the input; the first is right for every scale."""
    nought = {"inputs": [{**X[0], "data": [0, 0, 0, 0]}], "outputs": [tensor("y", "FP32", [1, 4], [0, 0, 0, 0])]}
    scaled = {"inputs": X, "outputs": [tensor("y", "FP32", [1, 4], [scale * x for x in (1, 2, 3, 4)])]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"requests": [nought, scaled]}))
    return path


def answer(server: Server) -> tuple[str, list[float]]:
    status, body = infer(server.http, "m", X)
    assert status == 200, body
    return body["model_version"], body["outputs"][0]["data"]


def eventually(check: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < until, "the server did not follow"
        time.sleep(0.05)


class Place:
    """Models ``x`` times 2 and 3, golden requests of each, and a configuration that serves one of them as ``m``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "state"
        for scale in (2, 3):
            models.affine(root / f"times{scale}.onnx", float(scale), 0.0)
            golden(root / f"is{scale}.json", scale)

    def text(self, version: str, source: str, tried_with: str) -> bytes:
        return (
            f'apiVersion: tidegate/v1\nmodels:\n  m:\n    versions: {{"{version}": {{source: {source}}}}}\n'
            f"    golden: {tried_with}\n"
        ).encode()

    def admin(self, server: Server, method: str, path: str, body: bytes | None = None) -> tuple[int, Any]:
        token = (self.state / "admin-token").read_text().strip()
        status, found, _ = call(server.admin, method, f"/admin/v1/{path}", body, {"Authorization": f"Bearer {token}"})
        return status, found

    def generation(self, server: Server) -> int:
        return int(self.admin(server, "GET", "config/history")[1]["history"][0]["generation"])

    def registry(self, *args: str) -> str:
        environment = {**os.environ, "PYTHONPATH": PRODUCT_PATH, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "server", "registry", *args, "--state-dir", str(self.state)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=True).stdout

    def publish(self, scale: float, tried_with: float) -> None:
        folder = self.root / f"published-{scale}"
        models.affine(folder / "model.onnx", scale, 0.0)
        golden(folder / "golden.json", tried_with)
        self.registry("publish", "m", str(folder), "--alias", "champion")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_reload_to_wrong_answers_changes_nothing(place: Place) -> None:
    config = place.root / "config.yaml"
    config.write_bytes(place.text("1", "times2.onnx", "is2.json"))
    with serving(str(config), "--state-dir", str(place.state)) as server:
        before = place.generation(server)
        seen: list[tuple[str, list[float]]] = []
        failures: list[BaseException] = []
        done = threading.Event()

        def caller() -> None:
            try:
                while not done.is_set():
                    seen.append(answer(server))
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=caller)
        thread.start()
        try:
            status, body = place.admin(server, "POST", "config", place.text("2", "times3.onnx", "is2.json"))
            assert status == 400
            assert "model 'm' version 2: is2.json: golden request 2: output 'y' at [0,0] should be 2, got 3" in str(
                body
            )
            assert place.generation(server) == before
            asked = len(seen)
            eventually(lambda: len(seen) > asked + 20 or bool(failures))
        finally:
            done.set()
            thread.join(30)
        assert not failures
        assert all(one == ("1", [2.0, 4.0, 6.0, 8.0]) for one in seen)
        status, body = place.admin(server, "POST", "config", place.text("2", "times3.onnx", "[is3.json]"))
        assert status == 200, body
        assert body["generation"] == place.generation(server) > before
        assert answer(server) == ("2", [3.0, 6.0, 9.0, 12.0])


def test_other_golden_requests_alone_have_a_version_tried_again(place: Place) -> None:
    config = place.root / "config.yaml"
    config.write_bytes(place.text("1", "times2.onnx", "is2.json"))
    with serving(str(config), "--state-dir", str(place.state)) as server:
        text = place.text("1", "times2.onnx", "[is2.json, is3.json]")
        status, plan = place.admin(server, "POST", "config?dry_run=1", text)
        assert status == 200
        assert "m:1" in str(plan)
        status, body = place.admin(server, "POST", "config", text)
        assert status == 400
        assert "is3.json: golden request 2" in str(body)
        status, body = place.admin(server, "POST", "config", place.text("1", "times2.onnx", "gone.json"))
        assert status == 400
        assert "gone.json: golden requests cannot be read" in str(body)
        assert str(place.root) not in str(body)
        assert answer(server) == ("1", [2.0, 4.0, 6.0, 8.0])


def test_a_champion_with_wrong_answers_does_not_take_over(place: Place) -> None:
    place.publish(2, tried_with=2)
    with serving("--state-dir", str(place.state)) as server:
        assert answer(server) == ("1", [2.0, 4.0, 6.0, 8.0])
        place.publish(3, tried_with=4)
        failed = server.wait_for("model_load_failed", model="m", version="2")
        assert failed["error"] == (
            "golden.json: golden request 2: output 'y' at [0,0] should be 4, got 3, and 3 more of 4 values differ"
        )
        assert answer(server) == ("1", [2.0, 4.0, 6.0, 8.0])
        place.publish(5, tried_with=5)
        eventually(lambda: answer(server) == ("3", [5.0, 10.0, 15.0, 20.0]))


def test_a_version_folder_brings_its_own(place: Place) -> None:
    for version, scale, tried_with in (("1", 2.0, 2.0), ("2", 3.0, 2.0)):
        models.affine(place.root / "models" / "m" / version / "model.onnx", scale, 0.0)
        golden(place.root / "models" / "m" / version / "golden.json", tried_with)
    (place.root / "models" / "m" / "config.pbtxt").write_text("version_policy { all {} }\n")
    config = place.root / "config.yaml"
    config.write_text(
        "apiVersion: tidegate/v1\nserver: {model_control: poll, poll_interval: 100ms}\n"
        "registry: {directory: models}\nmodels: {}\n"
    )
    with serving(str(config), "--state-dir", str(place.state)) as server:
        server.wait_for("model_load_failed", model="m", version="2")
        assert answer(server) == ("1", [2.0, 4.0, 6.0, 8.0])
        golden(place.root / "models" / "m" / "2" / "golden.json", 3.0)
        eventually(lambda: answer(server)[0] == "2")
