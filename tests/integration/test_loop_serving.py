"""The closed loop on a live server: labels go bad, one event, a local command trains, gates, steps, promoted."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.state import open_state
from tests.support import models
from tests.support.cli import cli
from tests.support.routed import eventually
from tests.support.server import ROOT, Server, serving
from tests.support.v2 import call, tensor

CONFIG = """\
apiVersion: tidegate/v1
registry: {{embedded: true, poll_interval: 200ms}}
capture: {{sample: 100%, format: jsonl, segment: {{age: 200ms}}}}
alerts:
  sinks:
    train:
      command: {{argv: [{python}, {root}/train.py, {root}], timeout: 1m, environment: {{PYTHONPATH: {source}}}}}
defaults: {{gates: {{evaluate_every: 100ms}}}}
gates:
  honest: {{task: regression, holdout: {{path: {root}/holdout.csv, label: truth, columns: [x]}}}}
models:
  m:
    gate: honest
    monitor:
      labels: {{task: binary, form: class, output: y, windows: [200], learn_rows: 400, persistence: 1 of 1,
               expected_run: 1k}}
    rollout:
      id: r1
      candidate: "@challenger"
      steps: [{{weight: 50%, certify: {{ceiling: 5%}}}}]
      gates: {{ceiling: {{event: error, max_rate: 10%}}}}
    retrain: {{on: {{labels: {{}}}}, sinks: [train], coalesce: 1s}}
"""
#: What a team would have: reads the event, counts what was captured, and publishes what it has "trained".
TRAIN = """\
import glob, json, subprocess, sys
root, event = sys.argv[1], json.load(sys.stdin)
data = event["data"]
files = [file for path in data["capture"]["paths"] for file in glob.glob(path)]
rows = sum(len(open(file).readlines()) for file in files)
open(root + "/event.json", "a").write(json.dumps(event) + "\\n")
about = {"metrics": [{"dataset": "capture", "name": "rows", "value": rows}],
         "lineage": {"trigger_id": data["trigger_id"]}}
open(root + "/about.json", "w").write(json.dumps(about))
subprocess.run([sys.executable, "-m", "server", "registry", "publish", "m", root + "/next.onnx", "--state-dir",
                root + "/state", "--description", root + "/about.json", "--alias", "challenger"], check=True)
"""


class Loop:
    """A folder with everything: champion 1 of the registry is ``y = x``, and so is what training makes, nearly."""

    def __init__(self, root: Path, shift: float = 1e-6) -> None:
        self.root, self.state = root, root / "state"
        (root / "train.py").write_text(TRAIN)
        x, noise = np.random.default_rng(3).normal(size=(2, 2000))
        np.savetxt(root / "holdout.csv", np.c_[x, x + noise], delimiter=",", header="x,truth", comments="")
        models.affine(root / "next.onnx", 1.0, shift, width=1)
        first = models.affine(root / "first.onnx", 1.0, 0.0, width=1)
        cli("registry", "publish", "m", str(first), "--state-dir", str(self.state), "--alias", "champion")
        text = CONFIG.format(root=root, python=sys.executable, source=ROOT)
        (root / "config.yaml").write_text(text)

    def serve(self) -> Any:
        return serving(str(self.root / "config.yaml"), "--state-dir", str(self.state))

    def admin(self, server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        token = (self.state / "admin-token").read_text().strip()
        return call(server.admin, method, f"/admin/v1/{path}", body, {"Authorization": f"Bearer {token}"})[:2]

    def job(self, server: Server) -> dict[str, Any]:
        """The newest job; ``state`` "" while there is none."""
        status, answer = self.admin(server, "GET", "retrains")
        assert status == 200, answer
        return dict((answer["retrains"] or [{"state": ""}])[0])

    def actions(self, server: Server, prefix: str) -> list[dict[str, Any]]:
        _, answer = self.admin(server, "GET", "audit?limit=1000")
        return [event for event in answer["events"] if event["action"].startswith(prefix)]


def ask(server: Server, right: bool = True) -> str:
    """Fifty rows and what became of them; the version that answered."""
    inputs = [tensor("x", "FP32", [50, 1], [n % 2 for n in range(50)])]
    status, answer, headers = call(server.http, "POST", "/v2/models/m/infer", {"inputs": inputs})
    assert status == 200, answer
    name = headers["x-tidegate-id"]
    items = [{"id": name, "row": n, "outcome": n % 2 if right else 1 - n % 2} for n in range(50)]
    status, told, _ = call(server.http, "POST", "/v2/models/m/feedback", items)
    assert (status, told["accepted"]) == (200, 50)
    return headers["x-tidegate-version"]


@contextmanager
def callers(server: Server) -> Iterator[list[Any]]:
    """Somebody who asks without pause, with labels that are as they should be; what went wrong."""
    done, wrong = threading.Event(), list[Any]()

    def run() -> None:
        while not done.is_set():
            try:
                ask(server)
            except (OSError, AssertionError) as error:
                wrong.append(error)
                return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield wrong
    finally:
        done.set()
        thread.join(30)


def decay(server: Server) -> None:
    """The alarm of the labels is raised, and flaps."""
    for _ in range(12):
        ask(server)
    for _ in range(4):
        for right in (False, False, False, True):
            ask(server, right)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_decay_leads_to_one_training_whose_version_climbs_to_champion(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.serve() as server:
        decay(server)
        eventually(lambda: loop.job(server)["state"] != "", 30)
        with callers(server) as wrong:
            eventually(lambda: loop.job(server)["state"] == "promoted", 90)
            eventually(lambda: ask(server) == "2")
        assert not wrong
        job = loop.job(server)
        assert (job["version"], job["champion"], job["kinds"]) == ("2", "1", ["labels"])
        states = [event["action"] for event in loop.actions(server, "retrain.")]
        followed = [state for state in states if state != "retrain.suppressed"]
        wanted = ["requested", "registered", "gated", "promoted"]
        assert [state for state in followed if state != "retrain.accepted"] == [f"retrain.{word}" for word in wanted]
        (verdict,) = loop.actions(server, "gate.")
        assert (verdict["action"], verdict["subject"]) == ("gate.passed", "m:2")
        assert verdict["detail"]["against"] == "1"
    (event,) = [json.loads(line) for line in (tmp_path / "event.json").read_text().splitlines()]
    assert event["id"] == event["idempotencykey"] == job["trigger_id"]
    assert event["data"]["reasons"][0]["kind"] == "labels"
    assert event["data"]["champion"]["version"] == "1"
    found = open_state(loop.state)
    try:
        made = found.registry.version("m", 2)
        assert dict(found.registry.aliases("m")) == {"champion": 2, "previous": 1}
    finally:
        found.close()
    assert made.manifest is not None
    assert made.manifest.description.lineage.trigger_id == job["trigger_id"]
    assert made.manifest.description.metrics[0].value >= 200
    assert cli("audit", "verify", "--state-dir", str(loop.state)).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_training_that_made_things_worse_is_refused_by_the_gate(tmp_path: Path) -> None:
    loop = Loop(tmp_path, shift=3.0)
    with loop.serve() as server:
        ask(server)
        status, refused = loop.admin(server, "POST", "retrains/m", {"why": "x"})
        assert (status, "reason" in refused["error"]) == (400, True)
        assert call(server.admin, "POST", "/admin/v1/retrains/m", {"reason": "x"})[0] == 401
        assert loop.admin(server, "POST", "retrains/nobody", {"reason": "x"})[0] == 404
        status, job = loop.admin(server, "POST", "retrains/m", {"reason": "to see", "actor": "ada"})
        assert (status, job["state"], job["kinds"]) == (202, "requested", ["manual"])
        status, refused = loop.admin(server, "POST", "retrains/m", {"reason": "once more"})
        assert (status, "its job" in refused["error"]) == (409, True)
        eventually(lambda: loop.job(server)["state"] == "rejected", 60)
        assert "quality" in loop.job(server)["detail"]
        status, shown = loop.admin(server, "GET", "retrains/m")
        assert (status, shown["champion"], shown["job"], shown["sinks"]) == (200, "1", None, ["train"])
        assert {ask(server) for _ in range(20)} == {"1"}
        (verdict,) = loop.actions(server, "gate.")
        assert verdict["action"] == "gate.failed"
        assert loop.actions(server, "retrain.requested")[0]["actor"] == "ada"
        listed = cli("retrain", "--list", "--url", server.admin).stdout
        assert job["trigger_id"] in listed
