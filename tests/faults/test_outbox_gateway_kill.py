"""kill -9 of a whole gateway while it delivers to a flaky receiver and its commands run: nothing lost, none twice."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from server.audit import AuditLog, Verified
from server.state import DATABASE
from server.store.sqlite import SqliteStore
from tests.faults.test_outbox_kill import Flaky
from tests.support import models
from tests.support.cli import cli
from tests.support.receiver import KEY, SECRET, Received, receiving
from tests.support.server import Server, serving
from tests.support.v2 import call

SEED = 20261124
MODELS = 5
#: Less than any lease: what a gateway had leased that was killed is taken over by the next one, and not waited for.
DRAIN_SECONDS = 85

#: A command that is in the middle of its work when most of the kills come.
CONFIG = """\
apiVersion: tidegate/v1
registry: {{embedded: true, poll_interval: 200ms}}
alerts:
  retry: {{first: 100ms, cap: 200ms, max_attempts: 1000}}
  sinks:
    hook: {{webhook: {{url: "{url}", secrets: ["${{SECRET}}"], allow: [127.0.0.1], timeout: 60s}}}}
    train:
      command:
        argv: [/bin/sh, -c, "echo $TIDEGATE_IDEMPOTENCY_KEY >> {root}/began; sleep 0.5; echo $$ >> {root}/ended"]
        timeout: 60s
        queue: 0s
models:
"""
RETRAIN = "  {name}: {{retrain: {{on: {{}}, sinks: [hook, train]}}}}\n"


class House:
    """A state folder with a few models, and what its gateways have promised."""

    def __init__(self, root: Path, url: str) -> None:
        self.root, self.state = root, root / "state"
        self.names = [f"m{number}" for number in range(MODELS)]
        model = models.affine(root / "m.onnx", 1.0)
        for name in self.names:
            cli("registry", "publish", name, str(model), "--state-dir", str(self.state), "--alias", "champion")
        text = CONFIG.format(url=url, root=root) + "".join(RETRAIN.format(name=name) for name in self.names)
        (root / "config.yaml").write_text(text)
        self.promised: list[str] = []

    def serve(self) -> Any:
        return serving(str(self.root / "config.yaml"), "--state-dir", str(self.state), env={"SECRET": SECRET})

    def ask(self, server: Server, name: str) -> None:
        """Ask for a training; what the gateway says it has taken is promised, whatever becomes of it then."""
        token = (self.state / "admin-token").read_text().strip()
        asked = {"reason": "a drill", "actor": "ann"}
        try:
            status, job, _ = call(
                server.admin, "POST", f"/admin/v1/retrains/{name}", asked, {"Authorization": f"Bearer {token}"}
            )
        except (OSError, HTTPException, ValueError):
            return  # it was killed first, or in the middle of its answer
        if job == b"":  # or in the middle of its head
            return
        assert status in (200, 201, 202), job
        self.promised.append(job["trigger_id"])

    def deliveries(self) -> list[dict[str, Any]]:
        return list(json.loads(cli("hook", "list", "--json", "-n", "100", "--state-dir", str(self.state)).stdout))

    def lines(self, name: str) -> list[str]:
        path = self.root / name
        return path.read_text().split() if path.exists() else []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_gateway_that_is_killed_keeps_every_promise_once(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    with receiving() as receiver:
        receiver.answer = Flaky(chance)
        house = House(tmp_path, receiver.url)
        for name in house.names:
            with house.serve() as server:
                asking = threading.Thread(target=house.ask, args=(server, name))
                asking.start()
                if not house.promised:
                    asking.join(30)  # one promise at least is there to be kept
                time.sleep(chance.uniform(0.0, 0.7))  # the moment of the kill is what is tried here
                server.kill()
                asking.join(30)
        with house.serve():
            until = time.monotonic() + DRAIN_SECONDS
            while any(delivery["state"] != "delivered" for delivery in house.deliveries()):
                assert time.monotonic() < until, house.deliveries()
                time.sleep(0.5)  # the store tells nobody
        check(house, receiver.got)


def check(house: House, got: list[Received]) -> None:
    deliveries = house.deliveries()
    keys = {delivery["idempotency_key"] for delivery in deliveries}
    assert Counter(delivery["sink"] for delivery in deliveries) == {"hook": len(keys), "train": len(keys)}
    assert house.promised
    assert set(house.promised) <= keys
    bodies = defaultdict(set)
    for received in got:
        assert received.signed_by(KEY)
        assert received.headers["idempotency-key"] == received.id == received.event["data"]["trigger_id"]
        bodies[received.id].add(received.body)
    assert set(bodies) == keys
    assert all(len(seen) == 1 for seen in bodies.values())
    # The commands lived on, and none was started again.
    assert Counter(house.lines("began")) == dict.fromkeys(keys, 1)
    assert len(house.lines("ended")) == len(keys)
    with closing(SqliteStore(house.state / DATABASE)) as store:
        assert store.problems() == []
        audit = AuditLog(store)
        assert isinstance(audit.verify(), Verified)
        requested = [
            row.event.detail["trigger_id"] for row in audit.tail(1000) if row.event.action == "retrain.requested"
        ]
        assert sorted(requested) == sorted(keys)
