"""A version that a foreign server has, MLServer or KServe's, each in an environment of its own made on first use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.environments import CLIENTS, environment
from tests.support.fast import ask_grpc_all, ask_http, by_user
from tests.support.ports import reserved_port
from tests.support.routed import Place, X, eventually
from tests.support.server import Server
from tests.support.v2 import infer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TENSOR = {"datatype": "FP32", "shape": [-1, 4]}
SETTINGS = {
    "name": "tripled",
    "implementation": "mlserver_model.Tripled",
    "inputs": [{"name": "x", **TENSOR}],
    "outputs": [{"name": "y", **TENSOR}],
}


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://{address}/v2/models/tripled/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def mlserver(folder: Path, http: int) -> list[str]:
    shutil.copy(CLIENTS / "mlserver_model.py", folder)
    ports = {"http_port": http, "grpc_port": reserved_port(), "metrics_port": reserved_port()}
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0, **ports}))
    (folder / "model-settings.json").write_text(json.dumps(SETTINGS))
    return [str(environment("mlserver").with_name("mlserver")), "start", "."]


def kserve(folder: Path, http: int) -> list[str]:
    shutil.copy(CLIENTS / "kserve_model.py", folder)
    return [str(environment("kserve")), "kserve_model.py", str(http), str(reserved_port())]


@pytest.fixture(scope="module", params=[mlserver, kserve], ids=["mlserver", "kserve"])
def upstream(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its HTTP address."""
    folder, http = tmp_path_factory.mktemp("foreign"), reserved_port()
    command = request.param(folder, http)
    surroundings = {**os.environ, "PYTHONPATH": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=surroundings, stdout=log, stderr=log)
        try:
            eventually(lambda: ready(f"127.0.0.1:{http}"), 90)
            yield f"127.0.0.1:{http}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, upstream: str) -> Place:
    place = Place(tmp_path_factory.mktemp("gateway"))
    place.path.write_text(
        "apiVersion: tidegate/v1\nmodels:\n  m:\n    versions:\n"
        f'      "1": {{source: {place.root}/v1.onnx}}\n'
        f'      "2": {{upstream: {{url: "http://{upstream}", model: tripled, timeout: 60s}}}}\n'
        '    stable: "1"\n    key: {from: [header:x-user]}\n'
        '    rollout: {id: r1, candidate: "2", weight: 50%}\n'
        "    resilience: {fallback: none}\n"
    )
    return place


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[Server]:
    with place.serve() as running:
        yield running


def test_its_answers_are_a_versions_answers(server: Server) -> None:
    status, body = infer(server.http, "m", X, version="2")
    assert (status, body.get("model_version")) == (200, "2"), body
    assert body["outputs"][0]["data"] == [3, 6, 9, 12]


def test_it_takes_its_share_on_both_protocols(server: Server) -> None:
    asks = by_user(f"user-{n}" for n in range(300))
    went = ask_http(server, asks)
    assert 110 < Counter(one.version for one in went)["2"] < 190
    assert ask_grpc_all(server, asks) == went


def test_many_at_once_get_their_own_answers(server: Server) -> None:
    wrong: list[object] = []

    def caller(number: int) -> None:
        for n in range(20):
            value = number * 100 + n
            inputs = [{**X[0], "data": [value, 0, 0, value]}]
            status, body = infer(server.http, "m", inputs, version="2")
            if status != 200 or body["outputs"][0]["data"] != [3 * value, 0, 0, 3 * value]:
                wrong.append((status, body))

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(6)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert wrong == []
