"""A real MLflow server and its own client, in an environment of their own: what the gateway serves from them."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.registry.base import CHAMPION
from router.registry.manifest import DATA
from router.registry.origin import BytesChanged
from server.audit import AuditLog
from server.control.registry import RegistryPlans, RegistrySource
from server.mlflow.build import MlflowPart, open_mlflow
from server.mlflow.options import MlflowOptions
from server.runtime.base import ModelOptions
from server.runtime.ends import graph_ends
from tests.support import models
from tests.support.environments import CLIENTS, environment
from tests.support.pinned_store import pinned_store
from tests.support.ports import reserved_port
from tests.support.receiver import Received, receiving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRET = "a secret of the webhook"
#: Nothing leaves this machine.
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true"}
#: Far longer than any of these tests: who sees a change sooner was woken.
NEVER_S = 3600.0


class MlflowServer:
    """``mlflow server`` on sqlite, which may be stopped and started again on its port, and a client of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, reserved_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()
        command = [str(environment("mlflow")), str(CLIENTS / "mlflow_client.py"), self.url]
        with (root / "client.log").open("wb") as log:
            self.client = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=root,
                env={**os.environ, **QUIET},
            )

    def start(self) -> None:
        command = [
            str(environment("mlflow")),
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.root}/mlflow.db"]
        command += ["--artifacts-destination", str(self.root / "artifacts")]
        allowed = {**QUIET, "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true", "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https"}
        # How long it may not know a webhook that was just made; a minute by default.
        allowed["MLFLOW_WEBHOOK_CACHE_TTL"] = "1"
        with (self.root / "server.log").open("ab") as log:
            # A group of its own: the server's workers end with it.
            self.process = subprocess.Popen(
                command, cwd=self.root, env={**os.environ, **allowed}, stdout=log, stderr=log, start_new_session=True
            )
        until = time.monotonic() + 180
        while not self._healthy():
            assert time.monotonic() < until, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.2)

    def said(self) -> str:
        return (self.root / "server.log").read_text()[-3000:]

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def close(self) -> None:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.close()
        self.client.wait(30)
        self.client.stdout.close()
        self.stop()

    def do(self, act: str, **more: Any) -> Any:
        assert self.client.stdin is not None
        assert self.client.stdout is not None
        self.client.stdin.write(json.dumps({"do": act, **more}) + "\n")
        self.client.stdin.flush()
        for line in self.client.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise AssertionError((self.root / "client.log").read_text()[-3000:])

    def publish(
        self, model: str, scale: float, *, external: bool = False, names: bool = True, place: str = "",
        trigger_id: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        path = models.affine(self.root / f"{model}-{scale}.onnx", scale)
        told = {"external": external, "names": names, "place": place, "trigger_id": trigger_id}
        return dict(self.do("publish", model=model, path=str(path), **told))

    def put(self, uri: str, name: str, content: bytes) -> None:
        """Overwrite a file of a registered version through the artifact proxy."""
        path = uri.removeprefix("mlflow-artifacts:/").lstrip("/")
        assert self._request("PUT", f"/api/2.0/mlflow-artifacts/artifacts/{path}/{name}", content) == 200

    def _healthy(self) -> bool:
        try:
            return self._request("GET", "/health") == 200
        except OSError:
            return False

    def _request(self, method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body)
            return connection.getresponse().status
        finally:
            connection.close()


class Gateway:
    """What a gateway has of MLflow: the adapter on a state folder, and the plans that it serves by."""

    def __init__(self, root: Path, url: str, **options: Any) -> None:
        self.store = pinned_store(root)
        self.audit = AuditLog(self.store)
        given = {"poll_s": 0.5, "promotes": True, "hint_secrets": (SECRET,), **options}
        self.part: MlflowPart = open_mlflow(
            MlflowOptions(url, **given), root / "state", self.store, self.audit.journal, graph_ends
        )
        self.registry = self.part.registry
        plans = RegistryPlans(self.registry, root / "state", lambda *_: None)
        self.source = RegistrySource(plans, ModelOptions())

    def look(self, model: str) -> list[Exception | None]:
        """Poll, and take what is wanted; what came of each version of ``model`` that was looked at."""
        self.registry.poll()
        return [settled.error for settled in list(self.registry.settle()) if settled.model == model]

    def answers(self, model: str) -> str:
        """The version that answers requests which name none."""
        return self.source.scan()[model].stable or ""

    def eventually(self, model: str, version: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self.answers(model) != version:
            assert time.monotonic() < until, self.registry.standing()
            time.sleep(0.05)

    def acts(self, action: str) -> list[str]:
        return [row.event.subject for row in self.audit.tail(1000) if row.event.action == action]

    def close(self) -> None:
        self.part.follower.close(20)
        self.store.close()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def gateway(mlflow: MlflowServer, tmp_path: Path) -> Iterator[Gateway]:
    found = Gateway(tmp_path, mlflow.url)
    try:
        yield found
    finally:
        found.close()


def test_what_the_client_published_is_what_is_served(mlflow: MlflowServer, gateway: Gateway) -> None:
    made = mlflow.publish("whole", 2, external=True)
    mlflow.do("alias", model="whole", name="champion", version=1)
    assert gateway.look("whole") == [None]
    found = gateway.registry.version("whole", 1)
    assert found.manifest is not None
    told = found.manifest.description
    assert told.lineage.parent_run == made["run"]
    assert told.params == {"depth": "10"}
    assert [(metric.name, metric.value) for metric in told.metrics] == [("auc", 0.91)]
    assert told.signature is not None
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in told.signature.inputs] == [
        ("x", "FP32", (-1, 4))
    ]
    fetched = gateway.registry.fetch("whole", 1)
    roles = {entry.path: entry.role for entry in fetched.files}
    assert roles.pop("model.onnx") == "model"
    assert set(roles.values()) <= {DATA}
    plan = gateway.source.scan()["whole"]
    (version,) = plan.versions
    assert plan.load_request(version).path == fetched.folder / "model.onnx"
    assert [row.version for row in gateway.registry.versions("whole")] == [1]


def test_names_that_mlflow_leaves_out_are_the_graphs(mlflow: MlflowServer, gateway: Gateway) -> None:
    mlflow.publish("unnamed", 2, names=False)
    mlflow.do("alias", model="unnamed", name="champion", version=1)
    assert gateway.look("unnamed") == [None]
    manifest = gateway.registry.version("unnamed", 1).manifest
    assert manifest is not None
    told = manifest.description.signature
    assert told is not None
    assert [tensor.name for tensor in (*told.inputs, *told.outputs)] == ["x", "y"]


def test_artifacts_on_a_disk_are_taken_from_allowed_folders_only(mlflow: MlflowServer, tmp_path: Path) -> None:
    place = tmp_path / "shared"
    made = mlflow.publish("beside", 2, external=True, place=place.as_uri())
    assert made["uri"].startswith("file://")
    mlflow.do("alias", model="beside", name="champion", version=1)
    gateway = Gateway(tmp_path, mlflow.url)
    try:
        (error,) = gateway.look("beside")
        assert "registry.mlflow.artifact_folders" in str(error)
    finally:
        gateway.close()
    gateway = Gateway(tmp_path, mlflow.url, artifact_folders=(place,))
    try:
        assert gateway.look("beside") == [None]
        (graph,) = place.rglob("model.onnx")
        assert (gateway.registry.fetch("beside", 1).folder / "model.onnx").read_bytes() == graph.read_bytes()
        graph.write_bytes(graph.read_bytes()[:-1] + b"!")
        mlflow.do("alias", model="beside", name="challenger", version=1)
        (error,) = gateway.look("beside")
        assert isinstance(error, BytesChanged)
        assert gateway.answers("beside") == "1"
    finally:
        gateway.close()


def test_a_version_without_an_alias_is_found_by_its_trigger(mlflow: MlflowServer, gateway: Gateway) -> None:
    mlflow.publish("retrained", 2)
    mlflow.do("alias", model="retrained", name="champion", version=1)
    gateway.look("retrained")
    for scale, trigger_id in ((3, "t-1"), (4, "t-1"), (5, "")):
        mlflow.publish("retrained", scale, trigger_id=trigger_id)
    assert gateway.registry.triggered("retrained") == {}
    gateway.look("retrained")
    assert gateway.registry.triggered("retrained") == {"t-1": 3}


def test_an_alias_moves_routing_within_the_poll(mlflow: MlflowServer, gateway: Gateway) -> None:
    for scale in (2, 3):
        mlflow.publish("moved", scale)
    mlflow.do("alias", model="moved", name="champion", version=1)
    gateway.part.follower.start()
    gateway.eventually("moved", "1")
    mlflow.do("alias", model="moved", name="champion", version=2)
    gateway.eventually("moved", "2")
    mlflow.do("alias", model="moved", name="champion", version=1)
    gateway.eventually("moved", "1")


def test_bytes_that_changed_are_refused_while_the_old_serves(mlflow: MlflowServer, gateway: Gateway) -> None:
    uris = [mlflow.publish("tampered", scale)["uri"] for scale in (2, 3)]
    mlflow.do("alias", model="tampered", name="champion", version=1)
    mlflow.do("alias", model="tampered", name="challenger", version=2)
    assert gateway.look("tampered") == [None, None]
    graph = (gateway.registry.fetch("tampered", 2).folder / "model.onnx").read_bytes()
    mlflow.put(uris[1], "model.onnx", graph[:-1] + bytes([graph[-1] ^ 1]))
    mlflow.do("alias", model="tampered", name="champion", version=2)
    (error,) = gateway.look("tampered")
    assert isinstance(error, BytesChanged)
    assert gateway.answers("tampered") == "1"
    assert "SHA-256" in gateway.registry.refused("tampered")[2]
    assert gateway.acts("registry.bytes_changed") == ["tampered:2"]
    assert (gateway.registry.fetch("tampered", 2).folder / "model.onnx").read_bytes() == graph
    mlflow.put(uris[1], "model.onnx", graph)
    mlflow.do("alias", model="tampered", name="shadow", version=2)
    assert gateway.look("tampered") == [None]
    assert gateway.answers("tampered") == "2"


def test_a_webhook_wakes_the_poll(mlflow: MlflowServer, tmp_path: Path) -> None:
    for scale in (2, 3):
        mlflow.publish("hinted", scale)
    mlflow.do("alias", model="hinted", name="champion", version=1)
    gateway = Gateway(tmp_path, mlflow.url, poll_s=NEVER_S)
    hints = gateway.part.hints
    assert hints is not None
    try:
        gateway.part.follower.start()
        assert gateway.answers("hinted") == "1"
        with receiving() as receiver:
            mlflow.do("webhook", url=receiver.url, secret=SECRET)
            mlflow.do("alias", model="hinted", name="champion", version=2)
            # MLflow may not know a new webhook at once: the alias is set again until it is told.
            received: list[Received] = []
            until = time.monotonic() + 90
            while not received and time.monotonic() < until:
                mlflow.do("alias", model="hinted", name="champion", version=2)
                threading.Event().wait(0.5)
                received = receiver.got
            assert received
            assert gateway.answers("hinted") == "1"
            assert hints.take(received[0].headers, received[0].body)
            assert not hints.take(received[0].headers, received[0].body)
        gateway.eventually("hinted", "2")
    finally:
        gateway.close()


def test_an_outage_is_survived_over_a_restart(mlflow: MlflowServer, tmp_path: Path) -> None:
    mlflow.publish("kept", 2)
    mlflow.publish("kept", 3)
    mlflow.do("alias", model="kept", name="champion", version=1)
    gateway = Gateway(tmp_path, mlflow.url)
    assert gateway.look("kept") == [None]
    gateway.registry.fetch("kept", 1)
    gateway.close()
    mlflow.stop()
    try:
        gateway = Gateway(tmp_path, mlflow.url, timeout_s=2.0)
        gateway.part.follower.start()
        assert not gateway.registry.standing().reachable
        assert "cannot be reached" in gateway.registry.standing().error
        assert gateway.answers("kept") == "1"
        assert gateway.registry.fetch("kept", 1).healed == ()
    finally:
        mlflow.start()
    mlflow.do("alias", model="kept", name="champion", version=2)
    gateway.part.follower.hint()
    gateway.eventually("kept", "2", 90)
    gateway.close()


def test_promotions_are_written_back_and_people_are_right(mlflow: MlflowServer, gateway: Gateway) -> None:
    for scale in (2, 3, 4):
        mlflow.publish("promoted", scale)
    mlflow.do("alias", model="promoted", name="champion", version=1)
    mlflow.do("alias", model="promoted", name="challenger", version=2)
    gateway.look("promoted")
    assert gateway.part.aliases.move("promoted", CHAMPION, "1", "2") == ""
    assert mlflow.do("aliases", model="promoted") == {"champion": 2, "previous": 1}
    gateway.look("promoted")
    assert gateway.answers("promoted") == "2"
    mlflow.do("alias", model="promoted", name="champion", version=3)
    refused = gateway.part.aliases.move("promoted", CHAMPION, "2", "1")
    assert refused == "champion of promoted was expected to be 2 and is 3: somebody moved it in MLflow"
    assert mlflow.do("aliases", model="promoted") == {"champion": 3, "previous": 1}
    assert gateway.acts("registry.override") == ["promoted:1"]
